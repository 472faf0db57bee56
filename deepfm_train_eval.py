"""Train and evaluate DeepFM (arXiv:1703.04247) for click-through-rate prediction with OneFlow graphs and OneEmbedding.

One process (CPU or one GPU):
    python deepfm_train_eval.py --data_dir data/criteo --persistent_path tables --persistent_path_fm tables_fm
Several processes (one per GPU, or one per CPU core):
    python -m oneflow.distributed.launch --nproc_per_node 8 deepfm_train_eval.py --data_dir ... (same arguments)

Reads DATA_DIR/{train,val,test}/*.parquet (a Label column, then one column of global ids per field) and, if it is there,
DATA_DIR/dataset_info.json. Writes checkpoints to --model_save_dir, embedding rows as OneEmbedding snapshots under
--persistent_path and --persistent_path_fm, and metrics to --log_dir.

Letters in shape comments: B batch, F fields, D embedding size, H hidden units.
"""

import argparse
import ctypes
import fcntl
import glob
import importlib.util
import json
import keyword
import math
import os
import queue
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
import warnings
from collections import deque
from contextlib import ExitStack, closing, contextmanager, suppress
from datetime import datetime


def preload_blas():
    """Put the OpenBLAS of SciPy's wheel before the older one inside OneFlow; return its name for the log, or None.

    OneFlow calls cblas_sgemm through the dynamic linker, so a library that is loaded first with global symbols serves
    its matrix products. SciPy's OpenBLAS has kernels for newer CPUs (AVX-512 among them), OneFlow's has not. It must
    happen before `import oneflow`. DEEPFM_BLAS=oneflow leaves OneFlow's own library in place.
    """
    spec = importlib.util.find_spec("scipy")
    if os.environ.get("DEEPFM_BLAS", "scipy") == "oneflow" or spec is None or not sys.platform.startswith("linux"):
        return None
    folder = os.path.join(os.path.dirname(os.path.dirname(spec.origin)), "scipy.libs")
    quadmath, gfortran, openblas = (
        sorted(glob.glob(os.path.join(folder, f"lib{name}*.so*"))) for name in ("quadmath", "gfortran", "openblas"))
    if not openblas:
        return None
    with suppress(OSError), open("/proc/cpuinfo") as cpuinfo:
        flags = next((line.split() for line in cpuinfo if line.startswith("flags")), [])
        # OpenBLAS falls back to AVX2 kernels on CPUs newer than itself; any CPU with these flags runs its AVX-512 ones
        if {"avx512f", "avx512dq", "avx512bw", "avx512vl", "avx512cd"} <= set(flags):
            os.environ.setdefault("OPENBLAS_CORETYPE", "SkylakeX")
    try:
        for path in quadmath + gfortran + openblas:
            library = ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
        library.cblas_sgemm  # noqa: B018 - SciPy builds with renamed symbols would not replace OneFlow's: AttributeError
        library.openblas_get_corename.restype = ctypes.c_char_p
        return f"OpenBLAS {library.openblas_get_corename().decode()} (SciPy's)"
    except (OSError, AttributeError):
        return None


def avoid_launch_race():
    """Schedule every thread as a batch thread, so that a thread that OneFlow wakes does not displace the waking one.

    OneFlow 0.8 and 0.9 start a graph (Push) before they queue it (EnqueueNNGraph, vm/lazy_job_instruction_policy.h).
    When the thread that does so is displaced in between and the graph is small, its end is taken off an empty queue:
    a segmentation fault now and then. No crash was seen in 20,000 calls of a tiny graph with this, one in a few
    thousand without. Threads inherit the policy, so it must be set before `import oneflow`.
    """
    if hasattr(os, "SCHED_BATCH"):
        with suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def wait_for_first_process(patience=60):
    """Let the first process listen before OneFlow calls it at import: after a call in vain it sleeps for 10 seconds.

    See rpc_client.cpp. Gives up after `patience` seconds, because OneFlow says more clearly who is missing.
    """
    if int(os.environ.get("RANK", "0")) <= 0 or "MASTER_PORT" not in os.environ:
        return
    address = os.environ.get("MASTER_ADDR", "127.0.0.1"), int(os.environ["MASTER_PORT"])
    end = time.monotonic() + patience
    while time.monotonic() < end:
        with suppress(OSError), socket.create_connection(address, timeout=1):
            return
        time.sleep(0.05)


BLAS = preload_blas()
avoid_launch_race()

import numpy as np  # noqa: E402
import psutil  # noqa: E402
import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
from sklearn.metrics import roc_auc_score  # noqa: E402
from tqdm import tqdm  # noqa: E402

# petastorm uses pyarrow's legacy interfaces, which warn with every row group
warnings.filterwarnings("ignore", category=FutureWarning, module="petastorm")
warnings.filterwarnings("ignore", category=DeprecationWarning, module="petastorm")
wait_for_first_process()
import oneflow as flow  # noqa: E402
from oneflow import nn  # noqa: E402
from petastorm import make_batch_reader  # noqa: E402
from tensorboardX.event_file_writer import EventsWriter  # noqa: E402
from tensorboardX.proto.event_pb2 import Event, SessionLog  # noqa: E402
from tensorboardX.proto.summary_pb2 import Summary  # noqa: E402


def use_one_compute_thread():
    """Run the operators of a CPU graph in one thread of this process.

    OneFlow makes one for every core (cpu_device_num, task_stream_index_manager.cpp) and deals the operators to them.
    With one process per core they displace each other: two processes on two cores took 1.2 times as long per step.
    """
    session = flow.framework.session_context.GetDefaultSession()
    session.TryInit()
    resource = session.resource
    resource.cpu_device_num = 1
    session.update_resource_eagerly(resource)


use_one_compute_thread()


def calm_scheduler():
    """Let OneFlow's scheduler thread give way to the threads that compute.

    As long as a graph runs, that thread looks for new work without a pause (ScheduleLoop, vm/virtual_machine.cpp). With
    as many compute threads as cores it took 3 to 25 % of the cores; nice values from 5 to 19 leave it below 2 %. It is
    the thread that works most while operators run one by one, since it polls for a millisecond after each.
    """
    with suppress(OSError, LookupError, ValueError):  # a system without these files, or without times in them
        before = thread_times()
        for _ in range(10):
            flow.zeros(1)
            time.sleep(0.002)
        worked = {thread: time_now - before.get(thread, 0) for thread, time_now in thread_times().items()}
        busiest = max(worked, key=worked.get)
        if worked[busiest] > 0:
            os.setpriority(os.PRIO_PROCESS, busiest, 10)


def thread_times():
    """{thread id: nanoseconds on a core} of this process's threads but the calling one (Linux)."""
    times = {}
    for thread in os.listdir("/proc/self/task"):
        with open(f"/proc/self/task/{thread}/schedstat") as file:
            times[int(thread)] = int(file.read().split()[0])
    del times[threading.get_native_id()]
    return times


LABEL = "Label"
SPLITS = ("train", "val", "test")
STORE_TYPES = ("device_mem", "cached_host_mem", "cached_ssd")
ADAM_BETAS = (0.9, 0.999)
INIT_STD = 1e-4  # standard deviation of new embedding rows
SIZE_FACTOR = 3  # a stored row is [value | Adam m | Adam v]
BLOCK_SIZE = 4096  # bytes; named everywhere, because OneFlow's defaults differ by version
CHUNK_ROWS = 1 << 18  # rows that are initialised, saved or loaded at a time
SHUFFLE_ROWS = 1 << 19  # training rows held in memory for shuffling, over all processes
READ_LANES = 8
CHECKPOINT_FORMAT = 1


class UserError(Exception):
    """A mistake in the data or files that the user can mend; its text is shown without a traceback."""


def world_size():
    return flow.env.get_world_size()


def rank():
    return flow.env.get_rank()


def print_rank0(*values):
    """Print a log line on the first process only; tqdm.write keeps progress bars whole."""
    if rank() == 0:
        tqdm.write(" ".join(str(value) for value in values), file=sys.stdout)
        sys.stdout.flush()


# ---------------------------------------------------------------------------------------------------------------------
# Arguments
# ---------------------------------------------------------------------------------------------------------------------


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Defaults behind the help texts, where there is one."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """One line per mistake, from one process only, and exit status 2."""

    def __init__(self, description):
        super().__init__(description=description, formatter_class=HelpFormatter, allow_abbrev=False)

    def error(self, message):
        if int(os.environ.get("RANK", "0")) <= 0:  # importing OneFlow sets -1 in a process that was not launched
            sys.stderr.write(f"error: {message} (see --help)\n")
        sys.exit(2)


def int_list(text):
    """'1000,1000' -> [1000, 1000]"""
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a comma-separated list of integers") from None
    if min(values) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} has a value below 1")
    return values


def boolean(text):
    if text.lower() in ("true", "1", "yes"):
        return True
    if text.lower() in ("false", "0", "no"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is not True or False")


def bounded(kind, low=None, high=None, open_low=False):
    """A number type for argparse with inclusive bounds (`open_low`: the lower one is excluded)."""

    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a valid {kind.__name__}") from None
        if not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not finite")
        if low is not None and (value < low or open_low and value == low):
            raise argparse.ArgumentTypeError(f"{text} must be {'above' if open_low else 'at least'} {low}")
        if high is not None and value > high:
            raise argparse.ArgumentTypeError(f"{text} must be at most {high}")
        return value

    convert.__name__ = kind.__name__
    return convert


def make_parser():
    parser = Parser("Train and evaluate DeepFM with OneFlow graphs and OneEmbedding tables.")
    positive, natural = bounded(int, 1), bounded(int, 0)

    data = parser.add_argument_group("data")
    data.add_argument("--data_dir", required=True, help="folder with train/, val/, test/ parquet shards")
    for split in SPLITS:
        data.add_argument(f"--num_{split}_samples", type=positive,
                          help=f"rows of the {split} split; required unless dataset_info.json has it")
    data.add_argument("--table_size_array", type=int_list,
                      help="rows of every field's table, comma-separated; required unless dataset_info.json has it")

    model = parser.add_argument_group("model")
    model.add_argument("--embedding_vec_size", type=positive, default=16, help="embedding vector size, floats per id")
    model.add_argument("--dnn", type=int_list, default="1000,1000,1000,1000,1000", help="hidden units of the DNN")
    model.add_argument("--net_dropout", type=bounded(float, 0, 0.99), default=0.2,
                       help="dropout rate behind every hidden layer of the DNN, in training")
    model.add_argument("--batch_norm", action="store_true",
                       help="batch normalisation between linear map and activation of every hidden layer")
    model.add_argument("--disable_fusedmlp", type=boolean, nargs="?", const=True, default=True,
                       help="use separate operators instead of OneFlow's fused MLP (which needs CUDA)")

    training = parser.add_argument_group("training")
    training.add_argument("--learning_rate", type=bounded(float, 0, open_low=True), default=0.001,
                          help="initial learning rate of Adam")
    training.add_argument("--batch_size", type=positive, default=10000,
                          help="global training/evaluation batch size, samples per step over all processes")
    training.add_argument("--train_batches", type=positive, default=75000, help="maximum number of training steps")
    training.add_argument("--loss_print_interval", type=positive, default=100, help="steps between two loss lines")
    training.add_argument("--patience", type=positive, default=2,
                          help="epochs without gain in val AUC - logloss after which the learning rate is reduced")
    training.add_argument("--min_delta", type=bounded(float, 0), default=1.0e-6, help="smallest change that is a gain")
    training.add_argument("--lr_factor", type=bounded(float, 0, 1, open_low=True), default=0.1,
                          help="factor of a learning-rate reduction")
    training.add_argument("--min_lr", type=bounded(float, 0), default=1.0e-6, help="lower bound of the learning rate")
    training.add_argument("--early_stop_patience", type=natural, default=4,
                          help="epochs without gain after which training stops; 0: never")
    training.add_argument("--embedding_l2", type=bounded(float, 0), default=0.0,
                          help="L2 weight of both tables: on CPU this/2 * sum of squares over all rows, part of the "
                               "loss (every row is then updated in every step); on CUDA decay of looked-up rows only")
    training.add_argument("--max_grad_norm", type=bounded(float, 0), default=0.0,
                          help="clip the global gradient norm over all parameters together; 0: off. On CPU every row "
                               "is then updated in every step")
    training.add_argument("--seed", type=bounded(int, 0, 2**31 - 1), default=2022,
                          help="seed of initial values, shuffling and dropout")

    tables = parser.add_argument_group("embedding tables")
    tables.add_argument("--persistent_path", required=True,
                        help="folder of the persistent store of the embedding; must not be shared with another run")
    tables.add_argument("--persistent_path_fm", required=True,
                        help="folder of the persistent store of the first-order (FM) embedding")
    tables.add_argument("--store_type", choices=STORE_TYPES, default="cached_host_mem",
                        help="where OneEmbedding keeps the tables on CUDA; without CUDA they live in host memory")
    tables.add_argument("--cache_memory_budget_mb", type=natural, default=1024,
                        help="GPU cache per device and table in megabytes, for cached_host_mem and cached_ssd")
    tables.add_argument("--overwrite_tables", action="store_true",
                        help="delete the rows and checkpoints that an earlier run left in the given folders")

    checkpoints = parser.add_argument_group("checkpoints")
    checkpoints.add_argument("--model_load_dir", help="checkpoint to start from: parameters, tables, Adam's moments")
    checkpoints.add_argument("--model_save_dir", help="folder for checkpoints; without it none is kept after the run")
    checkpoints.add_argument("--save_initial_model", action="store_true", help="save initial model parameters")
    checkpoints.add_argument("--save_model_after_each_eval", action="store_true", help="save model after each eval")
    checkpoints.add_argument("--resume", action="store_true",
                             help="continue the run in --model_save_dir from its last complete checkpoint")
    checkpoints.add_argument("--checkpoint_interval", type=natural, default=0,
                             help="steps between checkpoints for --resume; 0: only after each evaluation")
    checkpoints.add_argument("--keep_checkpoints", type=positive, default=2,
                             help="number of checkpoints for --resume that are kept; best and initial always stay")

    use = parser.add_argument_group("evaluation and prediction")
    use.add_argument("--eval_only", action="store_true", help="score val and test of --model_load_dir, then end")
    use.add_argument("--predict", metavar="SPLIT_DIR",
                     help="folder with parquet files to score with --model_load_dir; labels are not needed")
    use.add_argument("--predict_output", metavar="FILE.parquet", help="file for the probabilities, in row order")

    machine = parser.add_argument_group("machine and log")
    machine.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto",
                         help="auto: cuda when OneFlow sees a GPU")
    machine.add_argument("--amp", action="store_true", help="automatic mixed precision (CUDA only)")
    machine.add_argument("--loss_scale_policy", choices=("static", "dynamic"), default="static",
                         help="loss scale with --amp: static is 1024, dynamic adapts")
    machine.add_argument("--log_dir", help="folder for metrics.jsonl and TensorBoard events; with --model_save_dir the "
                                           "default is MODEL_SAVE_DIR/logs")
    return parser


def parse_args(argv=None):
    """Parse and cross-check; what needs the data files is checked by `read_dataset`.

    Derived: args.device is "cuda" or "cpu", args.world_size the number of processes.
    """
    parser = make_parser()
    args = parser.parse_args(argv)
    args.world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if args.batch_size % args.world_size:
        parser.error(f"--batch_size {args.batch_size} is not divisible by {args.world_size} processes; "
                     f"use a multiple of {args.world_size}")
    if args.device == "cuda" and not flow.cuda.is_available():
        parser.error("--device cuda, but OneFlow sees no CUDA device; use --device cpu or mend the driver")
    if args.device == "auto":
        args.device = "cuda" if flow.cuda.is_available() else "cpu"
    if args.amp and args.device != "cuda":
        parser.error("--amp needs a CUDA device; leave it out on CPU")
    if not args.disable_fusedmlp and args.batch_norm:
        parser.error("--disable_fusedmlp False has no batch normalisation; leave out --batch_norm or the fused MLP")
    if args.store_type != "device_mem" and args.cache_memory_budget_mb == 0:
        parser.error(f"--cache_memory_budget_mb 0 leaves --store_type {args.store_type} without a cache; "
                     "give at least 1 or use --store_type device_mem")
    if os.path.realpath(args.persistent_path) == os.path.realpath(args.persistent_path_fm):
        parser.error(f"--persistent_path and --persistent_path_fm are both {args.persistent_path}; use two folders")
    if args.min_lr > args.learning_rate:
        parser.error(f"--min_lr {args.min_lr} is above --learning_rate {args.learning_rate}")
    if (args.predict is None) != (args.predict_output is None):
        parser.error("--predict and --predict_output go together")
    if args.predict_output and os.path.isdir(args.predict_output):
        parser.error(f"--predict_output {args.predict_output} is a folder; name a file in it")
    if (args.predict or args.eval_only) and not args.model_load_dir:
        parser.error(f"{'--predict' if args.predict else '--eval_only'} needs --model_load_dir, the checkpoint to use")
    if args.resume and not args.model_save_dir:
        parser.error("--resume needs --model_save_dir, the folder of the run to continue")
    if args.resume and (args.model_load_dir or args.overwrite_tables):
        parser.error("--resume continues from --model_save_dir; leave out --model_load_dir and --overwrite_tables")
    if not args.model_save_dir:
        for name in ("save_initial_model", "save_model_after_each_eval", "checkpoint_interval"):
            if getattr(args, name):
                parser.error(f"--{name} needs --model_save_dir")
    if args.log_dir is None and args.model_save_dir:
        args.log_dir = os.path.join(args.model_save_dir, "logs")
    return args


# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------


class Split:
    """The parquet files of one split: where they are, how many rows every row group has, which columns.

    Attributes: name, labelled (whether the labels are read), files (sorted), row_groups (row counts, in reading order),
    num_rows, schemas (one per file), columns (names in file order).
    """

    def __init__(self, folder, name, labelled=True):
        self.name, self.labelled = name, labelled
        self.files = sorted(glob.glob(os.path.join(folder, "*.parquet")))
        if not self.files:
            raise UserError(f"no *.parquet files in {folder}; run tools/criteo_parquet.py or tools/h5_to_parquet.py, "
                            "or check --data_dir")
        self.metadata = [_read_metadata(path) for path in self.files]
        self.row_groups = [m.row_group(i).num_rows for m in self.metadata for i in range(m.num_row_groups)]
        self.num_rows = sum(self.row_groups)
        if self.num_rows == 0:
            raise UserError(f"the {name} split in {folder} has no rows; convert the data again")
        self.schemas = [m.schema.to_arrow_schema() for m in self.metadata]
        self.columns = self.schemas[0].names
        if len(set(self.columns)) < len(self.columns):
            raise UserError(f"{self.files[0]} has several columns of one name: {_shorten(self.columns)}")
        for path, schema in zip(self.files, self.schemas):
            if schema.names != self.columns:
                raise UserError(f"{path} has columns {_shorten(schema.names)}, but {self.files[0]} has "
                                f"{_shorten(self.columns)}; convert the data again")

    def column_range(self, column):
        """(min, max) of a column from the files' statistics; None where a file has none."""
        index = self.columns.index(column)
        low, high = [], []
        for metadata in self.metadata:
            for i in range(metadata.num_row_groups):
                statistics = metadata.row_group(i).column(index).statistics
                if statistics is None or not statistics.has_min_max:
                    return None
                low.append(statistics.min)
                high.append(statistics.max)
        return min(low), max(high)


class Dataset:
    """Three splits with the same fields. Attributes: splits {name: Split}, fields, table_sizes, offsets (F+1)."""

    def __init__(self, splits, fields, table_sizes):
        self.splits = splits
        self.fields = fields
        self.table_sizes = table_sizes
        self.offsets = np.concatenate([[0], np.cumsum(table_sizes)]).astype(np.int64)

    @property
    def num_rows(self):
        """Rows of all tables together; also the id of the padding row behind them."""
        return int(self.offsets[-1])


def _shorten(names):
    names = list(names)
    return ", ".join(names if len(names) <= 6 else names[:3] + ["..."] + names[-2:]) + f" ({len(names)})"


def _read_metadata(path):
    try:
        return pq.read_metadata(path)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is not a readable parquet file ({str(error).splitlines()[0]}); "
                        "it may be truncated: convert or copy it again") from None


def _read_dataset_info(data_dir):
    path = os.path.join(data_dir, "dataset_info.json")
    if not os.path.exists(path):
        return {}
    try:
        with open(path) as file:
            info = json.load(file)
        fields, sizes = info["fields"], [field["table_size"] for field in info["fields"]]
        if not all(type(size) is int and size > 0 for size in sizes):
            raise ValueError(f"table sizes {_brief(sizes)}")
        for field, offset in zip(fields, np.cumsum([0] + sizes)):
            if field["offset"] != offset:
                raise ValueError(f"offset {field['offset']} of {field['name']}, but the tables before it have "
                                 f"{offset} rows")
        return {"fields": [field["name"] for field in fields], "table_sizes": sizes,
                "num_samples": {split: int(info["num_samples"][split]) for split in SPLITS}}
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise UserError(f"{path} is not a dataset description ({error!r}); convert the data again") from None


def read_dataset(args):
    """Find the splits and check them against the arguments and dataset_info.json.

    Raises: UserError with one line for what cannot be trained on.
    """
    if not os.path.isdir(args.data_dir):
        raise UserError(f"--data_dir {args.data_dir} is not a folder; it should hold train/, val/ and test/")
    info = _read_dataset_info(args.data_dir)
    splits = {name: Split(os.path.join(args.data_dir, name), name) for name in SPLITS}
    columns = splits["train"].columns
    if LABEL not in columns:
        raise UserError(f"{splits['train'].files[0]} has no column {LABEL}; its columns are {_shorten(columns)}")
    fields = [name for name in columns if name != LABEL]
    if not fields:
        raise UserError(f"{splits['train'].files[0]} has no column but {LABEL}; convert the data again")
    unusable = [name for name in fields if not name.isidentifier() or keyword.iskeyword(name) or name.startswith("_")]
    if unusable:
        raise UserError(f"petastorm cannot read the columns {_shorten(unusable)}; rename them in {args.data_dir}: "
                        "letters, digits, underscores; no digit or underscore first, no Python keyword")
    for split in splits.values():
        if set(split.columns) != set(columns):
            raise UserError(f"the {split.name} split has columns {_shorten(split.columns)}, but train has "
                            f"{_shorten(columns)}; not in both: {_shorten(sorted(set(columns) ^ set(split.columns)))}")
    if info and info["fields"] != fields:
        raise UserError(f"dataset_info.json names the fields {_shorten(info['fields'])}, but the files have "
                        f"{_shorten(fields)}; convert the data again")
    table_sizes = _agreed(args.table_size_array, info.get("table_sizes"), "--table_size_array")
    if len(table_sizes) != len(fields):
        raise UserError(f"--table_size_array has {len(table_sizes)} values, expected {len(fields)}: {_shorten(fields)}")
    for name, split in splits.items():
        expected = _agreed(getattr(args, f"num_{name}_samples"), info.get("num_samples", {}).get(name),
                           f"--num_{name}_samples")
        if expected != split.num_rows:
            raise UserError(f"--num_{name}_samples is {expected}, but the files in {args.data_dir}/{name} have "
                            f"{split.num_rows} rows; correct the number or check --data_dir")
    dataset = Dataset(splits, fields, table_sizes)
    for split in splits.values():
        _check_columns(dataset, split)
    return dataset


def _agreed(argument, from_info, name):
    if argument is None and from_info is None:
        raise UserError(f"{name} is required, because there is no dataset_info.json in --data_dir")
    if argument is not None and from_info is not None and argument != from_info:
        raise UserError(f"{name} is {_brief(argument)}, but dataset_info.json says {_brief(from_info)}; "
                        "leave the argument out or check --data_dir")
    return from_info if argument is None else argument


def _brief(value):
    text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _check_columns(dataset, split):
    """Check ids and labels by the files' types and statistics, before rows are read, which are checked once more."""
    for path, schema in zip(split.files, split.schemas):
        for name in dataset.fields + ([LABEL] if split.labelled else []):
            kind = schema.field(name).type
            is_id = pa.types.is_integer(kind) and not pa.types.is_uint64(kind)  # petastorm leaves out uint64
            if not (is_id or name == LABEL and (pa.types.is_floating(kind) or pa.types.is_boolean(kind))):
                raise UserError(f"column {name} of {path} is of type {kind}, expected "
                                f"{'numbers' if name == LABEL else 'integers'}; convert the data again")
    for f, field in enumerate(dataset.fields):
        bounds = split.column_range(field)
        if bounds and (bounds[0] < dataset.offsets[f] or bounds[1] >= dataset.offsets[f + 1]):
            _raise_id_error(dataset, split, f, *bounds)
    bounds = split.column_range(LABEL) if split.labelled else None
    if bounds and not 0 <= bounds[0] <= bounds[1] <= 1:
        raise UserError(f"the labels of the {split.name} split go from {bounds[0] + 0:g} to {bounds[1]:g}, "
                        "expected only 0 and 1; convert the data again")
    if bounds and bounds[0] == bounds[1]:
        raise UserError(f"all labels of the {split.name} split are {bounds[1]:g}; AUC needs both 0 and 1")


def _raise_id_error(dataset, split, f, low, high):
    if low != low:  # a missing id is read as NaN
        raise UserError(f"field {dataset.fields[f]} of the {split.name} split has rows without an id; "
                        "convert the data again")
    raise UserError(f"field {dataset.fields[f]} of the {split.name} split has ids from {low} to {high}, expected "
                    f"[{dataset.offsets[f]}, {dataset.offsets[f + 1]}); check --table_size_array or convert again")


class Batch:
    """What one process feeds for one step. b = B / number of processes; rows behind `num_valid` are padding.

    Attributes: ids int64 (b, F), labels float32 (b, 1), weights float32 (b, 1): 1 / valid rows of the global batch, 0
    for padding; num_valid: valid rows of this process; num_global: valid rows over all; masks: dropout masks, see
    `draw_masks`.
    """

    __slots__ = ("ids", "labels", "weights", "num_valid", "num_global", "masks")

    def __init__(self, parts, size, num_global, pad_id):
        num_fields = parts[0][0].shape[1]
        self.ids = np.full((size, num_fields), pad_id, np.int64)
        self.labels = np.zeros((size, 1), np.float32)
        self.weights = np.zeros((size, 1), np.float32)
        position = 0
        for ids, labels in parts:
            self.ids[position:position + len(ids)] = ids
            self.labels[position:position + len(ids), 0] = labels
            position += len(ids)
        self.weights[:position] = 1.0 / num_global
        self.num_valid, self.num_global, self.masks = position, num_global, ()


def read_rows(dataset, split, lane=0, num_lanes=1, seed=None):
    """Yield (ids int32 or int64 (n, F), labels float32 (n,)) per row group with petastorm.

    A lane is every num_lanes-th row group. seed: None reads in order, a positive number shuffles the row groups.
    Raises: UserError for an id outside its table or a label that is not 0 or 1.
    """
    lanes = {"cur_shard": lane, "shard_count": num_lanes} if num_lanes > 1 else {}
    dtype = np.int32 if dataset.num_rows < 2**31 - 1 else np.int64
    wanted = ([LABEL] if split.labelled else []) + dataset.fields
    # read in the calling thread, which is `prefetched`: petastorm's own threads wake up 1000 times a second to look for
    # work (thread_pool.py, 0.13.1), which cost 5 % of a step's time
    reader = make_batch_reader(
        ["file://" + os.path.abspath(path) for path in split.files], reader_pool_type="dummy",
        schema_fields=[f"^{re.escape(name)}$" for name in wanted],
        num_epochs=1, shuffle_row_groups=seed is not None, seed=seed, **lanes)
    remaining = lane_sizes(split, num_lanes)[lane]
    try:
        while remaining > 0:
            group = next(reader, None)
            if group is None:
                raise UserError(f"petastorm delivered fewer rows of the {split.name} split than its files have; they "
                                "may have changed while they were read: start again")
            ids = np.empty((len(getattr(group, dataset.fields[0])), len(dataset.fields)), dtype)
            for f, field in enumerate(dataset.fields):
                column = getattr(group, field)
                low, high = column.min(), column.max()
                if not (low >= dataset.offsets[f] and high < dataset.offsets[f + 1]):
                    _raise_id_error(dataset, split, f, low, high)
                ids[:, f] = column
            labels = getattr(group, LABEL).astype(np.float32) if split.labelled else np.zeros(len(ids), np.float32)
            if not ((labels == 0) | (labels == 1)).all():
                wrong = labels[(labels != 0) & (labels != 1)][0]
                raise UserError(f"the {split.name} split has a label {wrong:g}, expected only 0 and 1")
            remaining -= len(ids)
            yield ids, labels
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"cannot read the {split.name} split ({str(error).splitlines()[0]}); a file may be truncated: "
                        "convert or copy it again") from None
    finally:
        reader.stop()
        reader.join()


def shuffled(blocks, pool_rows, rng):
    """Yield the rows of `blocks` in random order: each new row takes the place of a random one of a pool."""
    stream = RowStream(blocks)
    pool = stream.take(pool_rows)
    if not pool:
        return
    ids, labels = (np.concatenate(parts) for parts in zip(*pool))
    while stream.available or stream.fill(1):
        for new_ids, new_labels in stream.take(min(stream.available, len(ids))):
            places = rng.permutation(len(ids))[:len(new_ids)]
            yield ids.take(places, axis=0), labels[places]  # twice as fast as ids[places]
            ids[places], labels[places] = new_ids, new_labels
    order = rng.permutation(len(ids))
    yield ids.take(order, axis=0), labels[order]


class RowStream:
    """Takes rows out of blocks in portions of any size."""

    def __init__(self, blocks):
        self.blocks = iter(blocks)
        self.parts, self.available = deque(), 0

    def fill(self, count):
        """Read on until `count` rows are available, or fewer at the end of the stream; returns how many are."""
        while self.available < count:
            block = next(self.blocks, None)
            if block is None:
                break
            self.parts.append(block)
            self.available += len(block[0])
        return self.available

    def take(self, count):
        """A list of (ids, labels) with `count` rows together, fewer at the end of the stream."""
        self.fill(count)
        taken = []
        while count > 0 and self.parts:
            ids, labels = self.parts.popleft()
            if len(ids) > count:
                self.parts.appendleft((ids[count:], labels[count:]))
            taken.append((ids[:count], labels[:count]))
            count -= len(taken[-1][0])
            self.available -= len(taken[-1][0])
        return taken

    def skip(self, count):
        while count > 0:
            skipped = sum(len(ids) for ids, _ in self.take(min(count, 1 << 16)))
            if skipped == 0:
                return
            count -= skipped


def lane_sizes(split, num_lanes):
    return [sum(split.row_groups[lane::num_lanes]) for lane in range(num_lanes)]


def choose_lanes(split, batch_size, processes):
    """Number of lanes in which training rows are read; every batch takes the same share from each lane.

    With 8 lanes 1, 2, 4 or 8 processes read disjoint row groups and still see the same global batches, so results do
    not depend on the number of processes. Where the files do not allow equal lanes, every process reads all rows and
    takes its share of each batch (1 lane).
    """
    lanes = math.gcd(batch_size, READ_LANES)
    lanes = lanes if lanes % processes == 0 else processes
    if len(split.row_groups) < lanes:
        return 1
    sizes = lane_sizes(split, lanes)
    return lanes if max(sizes) - min(sizes) <= batch_size // lanes else 1


def train_batches(dataset, batch_size, seed, epoch, process, processes, first_step=0):
    """Yield this process's `Batch`es of one epoch from `first_step` on: every training row once over all processes.

    Order: row groups, then rows within a pool, are shuffled by (seed, epoch); the last batch is padded.
    """
    split = dataset.splits["train"]
    lanes = choose_lanes(split, batch_size, processes)
    share, pool_rows = batch_size // lanes, SHUFFLE_ROWS // lanes
    seeds = np.random.SeedSequence((seed, epoch))
    reader_seed = int(seeds.generate_state(1)[0] >> 1) + 1  # petastorm takes 0 for "no seed"

    def lane_stream(lane):
        rng = np.random.Generator(np.random.SFC64(np.random.SeedSequence((seed, epoch, lane))))
        stream = RowStream(shuffled(read_rows(dataset, split, lane, lanes, reader_seed), pool_rows, rng))
        stream.skip(first_step * share)
        return stream

    mine = range(lanes)[process * lanes // processes:(process + 1) * lanes // processes] if lanes > 1 else [0]
    streams = [lane_stream(lane) for lane in mine]
    sizes = lane_sizes(split, lanes)
    for step in range(first_step, math.ceil(max(sizes) / share)):
        counts = [min(share, max(0, size - step * share)) for size in sizes]
        parts = [part for stream, lane in zip(streams, mine) for part in stream.take(counts[lane])]
        if lanes == 1:
            parts = _share_of(parts, batch_size, process, processes)
        yield Batch(parts or [_no_rows(dataset)], batch_size // processes, sum(counts), dataset.num_rows)


def _no_rows(dataset):
    return np.empty((0, len(dataset.fields)), np.int64), np.empty(0, np.float32)


def _share_of(parts, batch_size, process, processes):
    """Rows [process * b, (process + 1) * b) of a global batch."""
    stream, local = RowStream(parts), batch_size // processes
    stream.skip(process * local)
    return stream.take(local)


def eval_batches(dataset, split, batch_size, process, processes):
    """Yield (this process's `Batch`, labels (n,) of the whole global batch) in row order, every row once.

    Every process reads all rows: all of them need all labels, and the order of rows must not depend on their number.
    """
    stream = RowStream(read_rows(dataset, split))
    for start in range(0, split.num_rows, batch_size):
        parts = stream.take(min(batch_size, split.num_rows - start))
        labels = np.concatenate([labels for _, labels in parts])
        local = _share_of(parts, batch_size, process, processes) or [_no_rows(dataset)]
        yield Batch(local, batch_size // processes, len(labels), dataset.num_rows), labels


def draw_masks(hidden_units, rows, dropout, seed, step, process):
    """Dropout masks, int8 (rows, H) per hidden layer: -1 drops a unit, 0 keeps it.

    Drawn from a stream of its own for every (seed, step, process), so they differ between layers, steps and processes
    and come back the same after a resume. OneFlow's own dropout in a graph gives layers of equal size equal masks.
    A byte decides, so the rate is a multiple of 1/256; see `keep_probability`.
    """
    rng = np.random.Generator(np.random.SFC64(np.random.SeedSequence((seed, step, process))))
    threshold = np.uint8(round(256 * (1 - keep_probability(dropout))))
    masks = []
    for units in hidden_units:
        size = rows * units
        # 64 bits at a time, and compared in place: four times as fast as rng.bytes and a new array
        noise = rng.integers(0, 2**64 - 1, -(-size // 8), np.uint64, endpoint=True).view(np.uint8)[:size]
        np.less(noise, threshold, out=noise.view(bool))
        masks.append(np.negative(noise.view(np.int8), out=noise.view(np.int8)).reshape(rows, units))
    return masks


def keep_probability(dropout):
    """Share of units that `draw_masks` keeps: 1 - dropout, rounded to a multiple of 1/256."""
    return 1 - round(256 * dropout) / 256


@contextmanager
def prefetched(generator, depth=2):
    """Run a generator in a thread, `depth` items ahead, so that reading overlaps with training."""
    items, stop, end = queue.Queue(maxsize=depth), threading.Event(), object()

    def put(item):
        while not stop.is_set():
            with suppress(queue.Full):
                items.put(item, timeout=0.1)
                return

    def produce():
        try:
            for item in generator:
                put((item, None))
                if stop.is_set():
                    break
            put((end, None))
        except BaseException as error:  # handed to the consumer, which raises it
            put((end, error))
        finally:
            generator.close()

    def consume():
        while True:
            item, error = items.get()
            if error is not None:
                raise error
            if item is end:
                return
            yield item

    thread = threading.Thread(target=produce, daemon=True)
    thread.start()
    try:
        yield consume()
    finally:
        stop.set()
        thread.join()


# ---------------------------------------------------------------------------------------------------------------------
# Model
# ---------------------------------------------------------------------------------------------------------------------


def local_range(num_rows):
    """[start, end) of the rows that OneFlow's split(0) puts on this process."""
    share, rest = divmod(num_rows, world_size())
    start = rank() * share + min(rank(), rest)
    return start, start + share + (rank() < rest)


def initial_rows(start, end, dim, seed, table):
    """Rows [start, end) of a new table, float32 (end - start, D), N(0, 1e-4); the same on any number of processes."""
    rows = np.empty((end - start, dim), np.float32)
    for chunk in range(start // CHUNK_ROWS, -(-end // CHUNK_ROWS)):
        rng = np.random.Generator(np.random.SFC64(np.random.SeedSequence((seed, table, chunk))))
        values = rng.standard_normal((CHUNK_ROWS, dim), np.float32) * np.float32(INIT_STD)
        first, last = max(start, chunk * CHUNK_ROWS), min(end, (chunk + 1) * CHUNK_ROWS)
        rows[first - start:last - start] = values[first - chunk * CHUNK_ROWS:last - chunk * CHUNK_ROWS]
    return rows


def make_store_options(store_type, persistent_path, capacity, cache_memory_budget_mb):
    """OneEmbedding's options of a --store_type; `capacity` is the number of rows over all processes."""
    common = {"persistent_path": persistent_path, "capacity": capacity, "size_factor": SIZE_FACTOR,
              "physical_block_size": BLOCK_SIZE}
    if store_type == "device_mem":
        return flow.one_embedding.make_device_mem_store_options(**common)
    if store_type == "cached_host_mem":
        return flow.one_embedding.make_cached_host_mem_store_options(cache_budget_mb=cache_memory_budget_mb, **common)
    return flow.one_embedding.make_cached_ssd_store_options(cache_budget_mb=cache_memory_budget_mb, **common)


class OneEmbeddingTable(flow.one_embedding.MultiTableEmbedding):
    """OneEmbedding without snapshots as a side effect of state_dict(): checkpoints save and load them by name."""

    def __init__(self, name, dim, placement, store_options, seed):
        initializer = flow.one_embedding.make_normal_initializer(0.0, INIT_STD)
        super().__init__(name, embedding_dim=dim, dtype=flow.float, key_type=flow.int64,
                         tables=[flow.one_embedding.make_table(initializer)], store_options=store_options)
        self.seed = seed  # 0.9.0 draws a new row from (seed, id); 0.8.0 has no such argument
        # its one parameter, `shadow`, stands for the table in a graph; the lookup wants it global as the ids are
        self.to_global(placement, flow.sbp.broadcast)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        nn.Module._save_to_state_dict(self, destination, prefix, keep_vars)

    def _load_from_state_dict(self, *args):
        nn.Module._load_from_state_dict(self, *args)


class OneEmbedding(nn.Module):
    """Rows of all fields in one table, looked up by global id; ids of fields never collide.

    cuda: OneFlow's MultiTableEmbedding. What this relies on, read in OneFlow's sources at v0.8.0 and v0.9.0 (not run
    here on a GPU): keys are int64 (`key_type` must equal the ids' type, one_embedding.py `Embedding.forward`); one
    lookup per table and graph, because the training pass rewrites one lookup with its update; a stored row has
    3 x D floats, value, Adam m and Adam v (size factor 3, `MakeConstantInitializerAttr` in
    replace_embedding_ops_pass.cpp); `capacity` counts rows over all processes, is divided by their number and enlarged
    by 5 % or 4096 rows (key_value_store_options.h), and the full cache does not check it, so it must not be too small;
    rows live at PATH/<rank>-<number of processes>, snapshots at .../snapshots/NAME, and a missing snapshot is only
    logged, so `TableStore` checks before loading; a key belongs to the rank given by OneFlow's ShardingHash, which the
    persistent table writer also uses; a table lives until the process ends, and no second one may have its name.
    cpu: OneEmbedding has no CPU kernels. The table is a parameter in host memory, split over the processes.

    Row `num_rows` is the padding row: it is looked up by padding samples only and gets zero gradients. It never moves,
    but for the decay of looked-up rows on CUDA.
    """

    def __init__(self, name, num_rows, dim, placement, seed=0, table=0, store_options=None):
        super().__init__()
        self.num_rows, self.dim = num_rows, dim
        self.on_cuda = placement.type == "cuda"
        if self.on_cuda:
            self.weight = OneEmbeddingTable(name, dim, placement, store_options, 2 * seed + table)
        else:
            start, end = local_range(num_rows + 1)
            rows = initial_rows(start, end, dim, seed, table)
            if end == num_rows + 1 and end > start:
                rows[-1] = 0
            self.weight = nn.Parameter(flow.from_numpy(rows).to_global(placement, flow.sbp.split(0)))

    def forward(self, ids):
        """int64 (B, F) -> float (B, F, D)"""
        if self.on_cuda:
            return self.weight(ids)
        # every process looks up its own rows of the table for the whole batch; the partial sums are then dealt out
        embeddings = flow._C.gather(self.weight, ids.to_global(sbp=flow.sbp.broadcast), axis=0)
        return embeddings.to_global(sbp=flow.sbp.split(0))


class FM(nn.Module):
    """First-order and second-order terms of DeepFM (arXiv:1703.04247, section 3.1)."""

    def __init__(self, dim):
        super().__init__()
        self.dim = dim

    def forward(self, first_order, embeddings):
        """first_order (B, F), embeddings (B, F*D) -> (B, 1), in logit units"""
        return sum_over_fields(first_order, 1) + second_order(embeddings, self.dim)


def sum_over_fields(x, dim):
    """(B, F*D) -> (B, D)"""
    fields = x.shape[1] // dim
    if x.placement.type != "cpu":
        return x.reshape(x.shape[0], fields, dim).sum(dim=1)
    # as a product with F identity matrices, because OneFlow's sums and their gradients are slow on CPU
    identities = flow.cat([flow.eye(dim, placement=x.placement, sbp=flow.sbp.broadcast)] * fields)
    return flow._C.matmul(x, identities)


def second_order(embeddings, dim):
    """Sum of inner products over all pairs of fields (DeepFM, eq. 2): float (B, F*D) -> (B, 1), in logit units.

    In O(F*D) by Rendle's identity (Factorization Machines, 2010, lemma 3.1).
    """
    square_of_sum = sum_over_fields(flow.square(sum_over_fields(embeddings, dim)), 1)
    sum_of_square = sum_over_fields(flow.square(embeddings), 1)
    return 0.5 * (square_of_sum - sum_of_square)


def repeat_rows(vector, x):
    """(H,) -> (B, H) for x (B, H); on CUDA the vector itself, which is broadcast

    On CPU it is a lookup of row 0 for every sample: the gradient of a lookup is a segment sum, which OneFlow computes
    faster than the sum over rows that is the gradient of a broadcast (3 to 4 % of the step's time).
    """
    if x.placement.type != "cpu":
        return vector
    rows = flow._C.global_constant((x.shape[0],), 0, dtype=flow.int64, placement=x.placement, sbp=[flow.sbp.split(0)])
    return flow._C.gather(vector.reshape(1, -1), rows, axis=0)


class DNN(nn.Module):
    """Multi-layer perceptron: hidden layers with [batch norm,] ReLU and dropout, then one linear unit.

    Weights are Xavier normal, biases 0 (drawn with numpy, the same on every process).
    """

    def __init__(self, in_features, hidden_units, dropout, placement, seed=0, batch_norm=False, fused=False):
        super().__init__()
        self.hidden_units, self.dropout, self.batch_norm, self.fused = hidden_units, dropout, batch_norm, fused
        self.placement = placement
        rng = np.random.default_rng((seed, 2))

        def replicated(array):
            return flow.tensor(array.astype(np.float32)).to_global(placement, flow.sbp.broadcast)

        sizes = [in_features, *hidden_units, 1]
        for i, (fan_in, fan_out) in enumerate(zip(sizes[:-1], sizes[1:])):
            weight = rng.standard_normal((fan_out, fan_in)) * math.sqrt(2.0 / (fan_in + fan_out))
            self.register_parameter(f"weight_{i}", nn.Parameter(replicated(weight)))
            # batch norm subtracts a bias again; its gradient would be rounding noise that Adam blows up
            if not batch_norm or i == len(hidden_units):
                self.register_parameter(f"bias_{i}", nn.Parameter(replicated(np.zeros(fan_out))))
        for i, units in enumerate(hidden_units if batch_norm else []):
            self.register_parameter(f"gamma_{i}", nn.Parameter(replicated(np.ones(units))))
            self.register_parameter(f"beta_{i}", nn.Parameter(replicated(np.zeros(units))))
            self.register_buffer(f"running_mean_{i}", replicated(np.zeros(units)))
            self.register_buffer(f"running_var_{i}", replicated(np.ones(units)))
        # on CUDA the masks are drawn inside the graph, by one operator for all layers: see `draw_masks` for why; its
        # seed comes from a generator that must be one of the CPU (GlobalRandFunctor, random_functor.cpp, 0.9.0)
        self.draws_masks = placement.type == "cuda"
        self.generator = flow.Generator("cpu")
        self.generator.manual_seed(seed)

    def forward(self, x, weights, masks=()):
        """x (B, F*D), weights (B, 1) as in `Batch`, masks int8 (B, H) per layer -> ((B, 1), batch statistics)

        In evaluation and without dropout, masks stay empty. Batch statistics: [mean, biased variance, ...] per layer.
        """
        num_hidden = len(self.hidden_units)
        if self.fused:
            layers = range(num_hidden + 1)
            weights = [getattr(self, f"weight_{i}") for i in layers]
            arguments = (x, weights, [getattr(self, f"bias_{i}") for i in layers])
            if self.training and self.dropout > 0:
                rates = [self.dropout] * num_hidden + [0.0]
                return flow._C.fused_matmul_bias_add_relu_dropout(*arguments, True, rates), []
            return flow._C.fused_mlp(*arguments, True), []
        # fed masks (CPU) are folded into ReLU: on top of products shrunk by a power of two, which is exact, -1 leaves a
        # unit below 0 whatever it was; two passes over memory less than a product with a mask, forward and backward
        shrink = 2.0**-40 if masks else 1.0
        drawn = self.draw_masks_in_graph(x.shape[0]) if self.draws_masks and self.training and self.dropout > 0 else ()
        keep = keep_probability(self.dropout) if masks or drawn else 1.0
        statistics, scale = [], 1.0
        for i in range(num_hidden):
            if self.batch_norm:
                x, offset = self.normalise(i, self.multiply(i, x, scale), weights, statistics, shrink)
            else:
                x, offset = self.multiply(i, x, scale * shrink), getattr(self, f"bias_{i}") * shrink
            if self.training:
                offset = repeat_rows(offset, x)
            x = flow.relu(x + (masks[i].to(x.dtype) + offset if masks else offset))
            if drawn:
                x = x * drawn[i].to(x.dtype)
            scale = 1.0 / (keep * shrink)  # free of charge in the next product
        return self.multiply(num_hidden, x, scale) + getattr(self, f"bias_{num_hidden}"), statistics

    def multiply(self, i, x, scale):
        return flow._C.matmul(x, getattr(self, f"weight_{i}"), transpose_b=True, alpha=scale)

    def normalise(self, i, x, weights, statistics, scale, epsilon=1e-5):
        """Batch normalisation (arXiv:1502.03167) over the valid rows of the whole global batch.

        Returns two terms whose sum is the result, times `scale`: normalised x (B, H), offset (H,). OneFlow's own
        BatchNorm1d knows neither padding rows nor other processes.
        """
        if self.training:
            mean = flow._C.matmul(weights, x, transpose_a=True).to_global(sbp=flow.sbp.broadcast)  # (1, H)
            centred = x - mean
            var = flow._C.matmul(weights, centred * centred, transpose_a=True).to_global(sbp=flow.sbp.broadcast)
            statistics += [mean, var]
        else:
            centred, var = x - getattr(self, f"running_mean_{i}"), getattr(self, f"running_var_{i}")
        gamma = getattr(self, f"gamma_{i}") * flow.rsqrt(var + epsilon)
        return centred * (gamma * scale), getattr(self, f"beta_{i}") * scale

    def update_running_statistics(self, statistics, num_rows, momentum=0.1):
        """Move the running mean and (unbiased) variance towards those of a batch of `num_rows`, as PyTorch does."""
        with flow.no_grad():
            for i in range(len(statistics) // 2):
                mean, var = statistics[2 * i].flatten(), statistics[2 * i + 1].flatten()
                running_mean, running_var = getattr(self, f"running_mean_{i}"), getattr(self, f"running_var_{i}")
                running_mean.mul_(1 - momentum).add_(mean * momentum)
                running_var.mul_(1 - momentum).add_(var * (momentum * num_rows / max(num_rows - 1, 1)))

    def draw_masks_in_graph(self, rows):
        """bool (rows, H) per hidden layer: True keeps a unit"""
        noise = flow.rand(rows, sum(self.hidden_units), placement=self.placement, sbp=flow.sbp.split(0),
                          generator=self.generator)
        keep, masks, start = noise < keep_probability(self.dropout), [], 0
        for units in self.hidden_units:
            masks.append(keep[:, start:start + units])
            start += units
        return masks


class DeepFM(nn.Module):
    """logit = first order + second order + DNN, all on the same fields."""

    def __init__(self, embedding, embedding_fm, dnn):
        super().__init__()
        self.embedding, self.embedding_fm, self.fm, self.dnn = embedding, embedding_fm, FM(embedding.dim), dnn

    def forward(self, ids, weights, masks=()):
        """ids int64 (B, F) -> (logits (B, 1), batch statistics of the DNN)"""
        embeddings = self.embedding(ids).flatten(1)
        dnn, statistics = self.dnn(embeddings, weights, masks)
        return self.fm(self.embedding_fm(ids).flatten(1), embeddings) + dnn, statistics


def build_model(args, dataset, placement):
    def table(name, number, dim, path):
        options = None
        if placement.type == "cuda":
            # + 1 for the padding row
            options = make_store_options(args.store_type, path, dataset.num_rows + 1, args.cache_memory_budget_mb)
        return OneEmbedding(name, dataset.num_rows, dim, placement, args.seed, number, options)

    dnn = DNN(len(dataset.fields) * args.embedding_vec_size, args.dnn, args.net_dropout, placement, args.seed,
              args.batch_norm, fused=not args.disable_fusedmlp)
    return DeepFM(table("embedding", 0, args.embedding_vec_size, args.persistent_path),
                  table("embedding_fm", 1, 1, args.persistent_path_fm), dnn)


# ---------------------------------------------------------------------------------------------------------------------
# Graphs
# ---------------------------------------------------------------------------------------------------------------------


class BiasCorrection(flow.optim.lr_scheduler._LRScheduler):
    """Adam's bias correction as a learning-rate schedule, for the lazy update of the tables on CPU.

    OneFlow's graph pass for sparse gradients (indexed_slices_optimizer_rewrite_pass.cpp) drops the correction. Step t
    has the factor sqrt(1 - b2^t) / (1 - b1^t), which is 1 to float accuracy after 10,000 steps. Adam's epsilon is then
    added to an uncorrected sqrt(v); the difference is below 1 % for gradients above 1e-5.
    """

    STEPS = 10000

    def get_lr(self, base_lr, step):
        return base_lr  # only the graph's schedule is used

    def _generate_conf_for_graph(self, lr_conf):
        lr_conf.piecewise_scaling_conf.SetInParent()
        conf = lr_conf.piecewise_scaling_conf
        beta1, beta2 = ADAM_BETAS
        for t in range(1, self.STEPS + 1):
            conf.scales.append(math.sqrt(1 - beta2**t) / (1 - beta1**t))
            conf.boundaries.append(t - 1)  # last step, from 0, that has the scale
        conf.scales.append(1.0)


class TableDecayAdam(flow.optim.Adam):
    """Adam in a graph that adds l2 * w to the gradients of `tables` only, after all gradients were clipped together.

    In a parameter group of their own the tables could have weight_decay, but a group that is clipped must have
    OneEmbedding's tables in it (ClipGradByGlobalNorm in replace_embedding_ops_pass.cpp).
    """

    def __init__(self, groups, tables, l2, **options):
        super().__init__(groups, **options)
        self.tables, self.l2 = tables, l2

    def _generate_conf_for_graph(self, train_conf, vars_conf):
        groups = super()._generate_conf_for_graph(train_conf, vars_conf)
        for table in self.tables:
            vars_conf[table].l2 = self.l2
        return groups


class TrainGraph(nn.Graph):
    """One training step: forward, backward, Adam. The learning rate is compiled in: see `Trainer.make_train_graph`.

    On CPU the tables' Adam is lazy: it moves only rows that were looked up, as OneEmbedding does on CUDA. An L2 term
    or clipping over all parameters makes their update dense, as in FuxiCTR.
    """

    def __init__(self, model, learning_rate, embedding_l2=0.0, max_grad_norm=0.0, amp=False,
                 loss_scale_policy="static"):
        super().__init__()
        self.config.allow_fuse_add_to_output(True)  # adds bias and mask inside the matrix product
        self.model = model
        self.loss = nn.BCEWithLogitsLoss(reduction="none")
        dense = list(model.dnn.parameters())
        tables = list(model.embedding.parameters()) + list(model.embedding_fm.parameters())
        on_cuda = model.embedding.on_cuda
        clip = {"clip_grad_max_norm": max_grad_norm, "clip_grad_norm_type": 2.0} if max_grad_norm > 0 else {}
        self.l2 = 0.0 if on_cuda else embedding_l2

        def adam(parameters, **options):
            return flow.optim.Adam([{"params": parameters, **options}], lr=learning_rate, betas=ADAM_BETAS)

        if on_cuda:
            self.add_optimizer(TableDecayAdam([{"params": tables + dense, **clip}], tables, embedding_l2,
                                              lr=learning_rate, betas=ADAM_BETAS))
        elif embedding_l2 > 0 or max_grad_norm > 0:
            self.add_optimizer(adam(tables + dense, **clip))
        else:
            lazy = adam(tables, do_bias_correction=False)
            self.add_optimizer(lazy, lr_sch=BiasCorrection(lazy), is_sparse=True)
            self.add_optimizer(adam(dense))
        if amp:
            self.config.enable_amp(True)
            self.set_grad_scaler(
                flow.amp.StaticGradScaler(1024) if loss_scale_policy == "static" else
                # halves until gradients are finite, doubles after 2000 finite steps
                flow.amp.GradScaler(init_scale=2.0**30, growth_factor=2.0, backoff_factor=0.5, growth_interval=2000))

    def build(self, ids, labels, weights, *masks):
        """Shapes as in `Batch`, over all processes -> (loss (), batch statistics...)"""
        logits, statistics = self.model(ids, weights, masks)
        loss = (self.loss(logits, labels) * weights).sum()
        objective = loss
        if self.l2 > 0:
            for table in (self.model.embedding, self.model.embedding_fm):
                objective = objective + 0.5 * self.l2 * sum_of_squares(table.weight)
        objective.backward()
        return (loss.to_global(sbp=flow.sbp.broadcast), *statistics)


def sum_of_squares(x):
    """(N, D) -> ()

    As the trace of x^T x, which is only D x D: x * x, its sum and their gradients take more passes over a table.
    """
    gram = flow._C.matmul(x, x, transpose_a=True)
    return (gram * flow.eye(x.shape[1], placement=x.placement, sbp=flow.sbp.broadcast)).sum()


class EvalGraph(nn.Graph):
    """Probabilities of one batch, the same on all processes."""

    def __init__(self, model, amp=False):
        super().__init__()
        self.model = model
        if amp:
            self.config.enable_amp(True)

    def build(self, ids, weights):
        logits, _ = self.model(ids, weights)
        return flow.sigmoid(logits).to_global(sbp=flow.sbp.broadcast)


def to_split(array, placement):
    """This process's rows as a global tensor that is split over the processes."""
    return flow.from_numpy(array).to_global(placement, flow.sbp.split(0))


# ---------------------------------------------------------------------------------------------------------------------
# Metrics, learning rate and stopping
# ---------------------------------------------------------------------------------------------------------------------


def auc_and_logloss(labels, probs):
    """labels and probs float32 (n,) -> (AUC, logloss in nats)"""
    probs = np.clip(probs, 1e-7, 1 - 1e-7)  # FuxiCTR's bound
    auc = roc_auc_score(labels, probs) if 0 < labels.sum() < len(labels) else float("nan")
    # scikit-learn's log_loss takes more than five times as long
    likelihood = np.where(labels == 1, probs, 1 - probs.astype(np.float64))
    return float(auc), float(-np.log(likelihood, out=likelihood).mean())


class Plateau:
    """Learning-rate cuts and early stopping by val AUC - val logloss, once per epoch.

    No gain of more than min_delta for `patience` epochs: the rate is multiplied by lr_factor, down to min_lr, and the
    counter starts again. No gain for `early_stop_patience` epochs (0: never): `stopped`.
    """

    STATE = ("learning_rate", "best", "epochs_to_cut", "epochs_to_stop", "stopped")

    def __init__(self, args):
        self.args = args
        self.learning_rate, self.best = args.learning_rate, None
        self.epochs_to_cut = self.epochs_to_stop = 0  # epochs without gain, as counted for the cut and for the stop
        self.stopped = False

    def update(self, monitor):
        """Count one epoch. Returns whether it is the best so far."""
        if self.best is None or monitor > self.best + self.args.min_delta:
            self.best, self.epochs_to_cut, self.epochs_to_stop = monitor, 0, 0
            return True
        self.epochs_to_cut += 1
        self.epochs_to_stop += 1
        if self.epochs_to_cut >= self.args.patience:
            self.epochs_to_cut = 0
            self.learning_rate = max(self.learning_rate * self.args.lr_factor, self.args.min_lr)
        self.stopped = 0 < self.args.early_stop_patience <= self.epochs_to_stop
        return False

    def state(self):
        return {name: getattr(self, name) for name in self.STATE}

    def load(self, state):
        for name in self.STATE:
            setattr(self, name, state[name])


class MetricsLog:
    """metrics.jsonl (one JSON object per line) and TensorBoard events in `folder`, written by the first process.

    A resumed run appends; first it drops lines behind the step it resumes from and the test line of an earlier end, so
    that nothing appears twice.
    """

    def __init__(self, folder, resumed_step=None):
        self.file = self.writer = None
        if folder is None or rank() != 0:
            return
        os.makedirs(folder, exist_ok=True)
        path = os.path.join(folder, "metrics.jsonl")
        kept = []
        if resumed_step is None:
            for old in glob.glob(os.path.join(folder, "events.out.tfevents.*")):
                os.remove(old)
        elif os.path.exists(path):
            with open(path) as file:
                lines = [(line, json.loads(line)) for line in file if line.endswith("\n")]
            kept = [line for line, entry in lines if entry["step"] <= resumed_step and entry["event"] != "test"]
        with open(path + ".tmp", "w") as file:
            file.writelines(kept)
        os.replace(path + ".tmp", path)
        self.file = open(path, "a", buffering=1)  # noqa: SIM115 - open as long as the run
        # not SummaryWriter: its thread may still hold the last event when the process is killed
        self.writer = EventsWriter(os.path.join(folder, "events"))
        if resumed_step is not None:  # TensorBoard then hides what earlier starts logged behind that step
            self.write_event(resumed_step + 1, session_log=SessionLog(status=SessionLog.START))

    def write(self, event, step, **values):
        """event: "train" or an evaluated split, e.g. "val"."""
        if self.file is None:
            return
        self.file.write(json.dumps({"event": event, "step": step, **values}) + "\n")
        scalars = [Summary.Value(tag=f"{event}/{name}", simple_value=value) for name, value in values.items()]
        self.write_event(step, summary=Summary(value=scalars))

    def write_event(self, step, **content):
        self.writer.write_event(Event(step=step, wall_time=time.time(), **content))
        self.writer.flush()

    def close(self):
        if self.file is not None:
            self.file.close()
            self.writer.close()


def memory_in_use(device):
    """{"host_memory_mb": resident memory of this process[, "gpu_memory_mb": used memory of the first visible GPU]}"""
    used = {"host_memory_mb": psutil.Process().memory_info().rss >> 20}
    if device == "cuda":
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        with suppress(OSError, ValueError, subprocess.SubprocessError):
            output = subprocess.run(
                ["nvidia-smi", f"--id={visible}", "--query-gpu=memory.used", "--format=csv,noheader,nounits"],
                stdout=subprocess.PIPE, check=True, timeout=10)
            used["gpu_memory_mb"] = int(output.stdout)
    return used


# ---------------------------------------------------------------------------------------------------------------------
# Tables on disk
# ---------------------------------------------------------------------------------------------------------------------


def all_processes_sum(value):
    """Sum of a number over all processes; also a barrier: nobody returns before all have come here."""
    placement = flow.placement("cpu", list(range(world_size())))
    total = flow.tensor([float(value)], dtype=flow.float64).to_global(placement, flow.sbp.partial_sum)
    return float(total.to_global(sbp=flow.sbp.broadcast).to_local().numpy()[0])


def on_rank0(function, *args):
    """Run a function on the first process while the others wait; a failure there ends all."""
    failure = None
    if rank() == 0:
        try:
            function(*args)
        except (OSError, UserError) as error:
            failure = error
    if all_processes_sum(failure is not None):
        raise failure or UserError("stopped, because the first process failed")


class TableStore:
    """One table on disk, in OneEmbedding's persistent-table format (oneflow/core/embedding/persistent_table.cpp).

    PATH/<rank>-<processes>/ holds chunk files keys/key-*, values/value-* and snapshots/NAME/{LIST,index-*}. An index
    entry is a row's position, counted over the chunks. A stored row is [value | m | v], float32; the key is the id.
    """

    def __init__(self, path, dim, num_rows):
        self.path, self.dim, self.num_rows = path, dim, num_rows

    def folder(self, process, processes):
        """Where OneEmbedding keeps a process's rows (key_value_store_options.h): 3-8, but 03-16."""
        return os.path.join(self.path, f"{str(process).zfill(len(str(processes)))}-{processes}")

    def folders(self, processes):
        return [self.folder(process, processes) for process in range(processes)]

    def existing_folders(self):
        """Folders of this table, of any number of processes; others, "2024-01" say, are not ours to touch."""
        folders = [os.path.join(self.path, name) for name in sorted(_listdir(self.path))
                   if re.fullmatch(r"\d+-\d+", name)]
        return [folder for folder in folders if os.path.exists(os.path.join(folder, "LOCK"))]

    def snapshots(self):
        return {name for folder in self.existing_folders() for name in _listdir(os.path.join(folder, "snapshots"))
                if not name.startswith(".")}

    def has_rows(self):
        return any(_listdir(os.path.join(folder, "keys")) for folder in self.existing_folders())

    def remove_all(self):
        for folder in self.existing_folders():
            shutil.rmtree(folder)
        self.remove_scratch()

    def remove_scratch(self):
        """Delete what a killed save left behind."""
        for name in _listdir(self.path):
            if name.startswith(".writing-"):
                shutil.rmtree(os.path.join(self.path, name))

    # --- writing ------------------------------------------------------------------------------------------------------

    def write_snapshot(self, name, blocks):
        """Write rows as a snapshot for the current number of processes; all processes call it, each with its own rows.

        blocks: yields (keys int64 (n,), rows float32 (n, 3 * D)). Rows go to new chunk files in a scratch folder, which
        the first process then adds to the table: nothing is visible before all of it is on disk, and each snapshot has
        chunks of its own, so that deleting it gives the space back.
        """
        on_rank0(self._check_disk_space)
        processes = world_size()
        scratch = [os.path.join(self.path, f".writing-{process}") for process in range(processes)]
        mine = scratch[rank()]
        shutil.rmtree(mine, ignore_errors=True)
        os.makedirs(mine)
        paths = [os.path.join(mine, f"{process}-{processes}") for process in range(processes)]
        writer = flow.one_embedding.make_persistent_table_writer(
            paths, name, flow.int64, flow.float, SIZE_FACTOR * self.dim, physical_block_size=BLOCK_SIZE)
        for keys, rows in blocks:
            writer.write(keys, rows)
        writer.close()
        _sync(mine)
        all_processes_sum(0)  # every process has written its rows
        on_rank0(self._add_snapshot, name, scratch, processes)

    def _check_disk_space(self):
        """For the whole table, since all processes may share the disk. OneFlow's writer aborts when it is full.

        Raises: UserError
        """
        row_bytes = 4 * SIZE_FACTOR * self.dim
        block_bytes = -(-row_bytes // BLOCK_SIZE) * BLOCK_SIZE
        rows_per_block = block_bytes // row_bytes
        needed = -(-self.num_rows // rows_per_block) * block_bytes + 16 * self.num_rows  # 8 each for key and index
        free = shutil.disk_usage(self.path).free
        if free < needed:
            raise UserError(f"saving the table needs {needed / 2**20:.1f} MiB in {self.path}, but only "
                            f"{free / 2**20:.1f} MiB are free; free some space and continue with --resume")

    def _add_snapshot(self, name, scratch, processes):
        for process, target in enumerate(self.folders(processes)):
            sources = [os.path.join(folder, f"{process}-{processes}") for folder in scratch]
            if not os.path.exists(os.path.join(target, "LOCK")):
                self._make_empty_table(sources[0], target)
            staging = os.path.join(target, "snapshots", "." + name)
            shutil.rmtree(staging, ignore_errors=True)
            os.makedirs(staging)
            with open(os.path.join(staging, "LIST"), "w") as listing:
                for source in sources:
                    for index_file in self._move_chunks(source, target, name, staging):
                        listing.write(index_file + "\n")
            for folder in ("keys", "values"):
                _sync_entry(os.path.join(target, folder))
            _sync(staging)
            _rename_for_good(staging, os.path.join(target, "snapshots", name))
        for folder in scratch:
            shutil.rmtree(folder)

    @staticmethod
    def _make_empty_table(source, target):
        staging = source + ".empty"
        for name in ("keys", "values", "snapshots"):
            os.makedirs(os.path.join(staging, name))
        for name in ("KEY_SIZE", "VALUE_SIZE", "PHYSICAL_BLOCK_SIZE", "NUM_LOGICAL_BLOCKS_PER_CHUNK", "LOCK"):
            shutil.copyfile(os.path.join(source, name), os.path.join(staging, name))
        _sync(staging)
        _rename_for_good(staging, target)  # fails if there is a folder with other files

    @staticmethod
    def _move_chunks(source, target, name, staging):
        """Give the source's chunks new numbers behind the target's; yield the new index files of the snapshot."""
        rows_per_chunk = _rows_per_chunk(target)
        new = max(_chunk_ids(target), default=-1) + 1
        for old in sorted(_chunk_ids(source)):
            for kind in ("key", "value"):
                os.rename(os.path.join(source, f"{kind}s", f"{kind}-{old:012d}"),
                          os.path.join(target, f"{kind}s", f"{kind}-{new:012d}"))
            index_file = os.path.join(source, "snapshots", name, f"index-{old:012d}")
            if os.path.exists(index_file):
                positions = np.fromfile(index_file, np.uint64) + np.uint64((new - old) * rows_per_chunk)
                positions.tofile(os.path.join(staging, f"index-{new:012d}"))
                yield f"index-{new:012d}"
            new += 1

    # --- reading ------------------------------------------------------------------------------------------------------

    def count_rows(self, name, processes):
        """Rows of a snapshot after a check of every file that it needs.

        Raises: UserError when a folder or file is missing, short, or of another row width.
        """
        total = 0
        for folder in self.folders(processes):
            listing = os.path.join(folder, "snapshots", name, "LIST")
            if not os.path.exists(listing):
                raise UserError(f"the table snapshot {name} is not in {folder}; give the --persistent_path and "
                                "--persistent_path_fm that the checkpoint was saved with")
            width = _read_number(os.path.join(folder, "VALUE_SIZE")) // 4
            if width != SIZE_FACTOR * self.dim:
                raise UserError(f"{folder} holds rows of {width} floats, expected {SIZE_FACTOR} x {self.dim}; check "
                                "--embedding_vec_size and the order of --persistent_path and --persistent_path_fm")
            with open(listing) as file:
                total += sum(self._count_chunk(folder, name, line.strip()) for line in file)
        return total

    def _count_chunk(self, folder, name, index_file):
        chunk = int(index_file.rsplit("-", 1)[1])
        broken = UserError(f"chunk {chunk} of the table snapshot {name} in {folder} is missing or incomplete; "
                           "use another checkpoint")
        try:
            positions = np.fromfile(os.path.join(folder, "snapshots", name, index_file), np.uint64)
            key_bytes = os.path.getsize(os.path.join(folder, "keys", f"key-{chunk:012d}"))
            value_bytes = os.path.getsize(os.path.join(folder, "values", f"value-{chunk:012d}"))
        except OSError:
            raise broken from None
        if len(positions) == 0:
            raise broken
        last = int(positions.max()) - chunk * _rows_per_chunk(folder)
        if key_bytes < (last + 1) * 8 or value_bytes < (last // _rows_per_block(folder) + 1) * _block_bytes(folder):
            raise broken
        return len(positions)

    def read_snapshot(self, name, processes):
        """Yield (keys int64 (n,), rows float32 (n, 3 * D)) of a snapshot that `processes` processes wrote."""
        first, folders = rank() % processes, self.folders(processes)
        for folder in folders[first:] + folders[:first]:  # all processes read, each begins with another folder
            with _alone_in(folder):
                reader = flow.one_embedding.make_persistent_table_reader(
                    [folder], name, flow.int64, flow.float, SIZE_FACTOR * self.dim, physical_block_size=BLOCK_SIZE)
                for keys, rows in reader:
                    known = keys < self.num_rows  # a table trained on CUDA also has the padding row
                    yield keys[known], rows[known]
                reader.close()

    # --- deleting -----------------------------------------------------------------------------------------------------

    def prune(self, unwanted, keep_last_chunk):
        """Delete the snapshots `unwanted` and the chunks that no snapshot needs any more.

        Each process cares for its own folders. keep_last_chunk: OneEmbedding on CUDA still appends to it.
        """
        for folder in self.existing_folders():
            if int(os.path.basename(folder).split("-")[0]) % world_size() != rank():
                continue
            for name in unwanted:
                shutil.rmtree(os.path.join(folder, "snapshots", name), ignore_errors=True)
            needed = {int(index_file.rsplit("-", 1)[1])
                      for name in _listdir(os.path.join(folder, "snapshots"))
                      for index_file in _listdir(os.path.join(folder, "snapshots", name)) if index_file != "LIST"}
            chunks = _chunk_ids(folder)
            if keep_last_chunk and chunks:
                needed.add(max(chunks))
            for chunk in chunks - needed:
                for kind in ("key", "value"):
                    with suppress(FileNotFoundError):
                        os.remove(os.path.join(folder, f"{kind}s", f"{kind}-{chunk:012d}"))


@contextmanager
def _alone_in(folder):
    """Wait for the other processes that are in the folder: OneFlow 0.8.0 aborts when two open a table to read."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a network file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _listdir(path):
    return os.listdir(path) if os.path.isdir(path) else []


def _read_number(path):
    with open(path) as file:
        return int(file.read())


def _chunk_ids(folder):
    return {int(name.split("-")[1]) for kind in ("key", "value") for name in _listdir(os.path.join(folder, f"{kind}s"))}


def _block_bytes(folder):
    """A block holds whole rows only; a row longer than a block takes several."""
    block, row = (_read_number(os.path.join(folder, name)) for name in ("PHYSICAL_BLOCK_SIZE", "VALUE_SIZE"))
    return max(block, -(-row // block) * block)


def _rows_per_block(folder):
    return _block_bytes(folder) // _read_number(os.path.join(folder, "VALUE_SIZE"))


def _rows_per_chunk(folder):
    return _rows_per_block(folder) * _read_number(os.path.join(folder, "NUM_LOGICAL_BLOCKS_PER_CHUNK"))


def _sync(folder):
    """Flush a folder with all that is in it to disk."""
    for root, _, files in os.walk(folder):
        for name in [*files, ""]:
            _sync_entry(os.path.join(root, name))


def _sync_entry(path):
    """Flush a file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def _rename_for_good(staging, final):
    """Give a folder that `_sync` flushed its name; from here on it survives a power cut."""
    os.rename(staging, final)
    _sync_entry(os.path.dirname(final))


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints
# ---------------------------------------------------------------------------------------------------------------------


def read_checkpoint(folder):
    """state.json of a complete checkpoint.

    Raises: UserError when the folder is no checkpoint, an incomplete one, or of another format.
    """
    path = os.path.join(folder, "state.json")
    if not os.path.isdir(folder):
        raise UserError(f"there is no checkpoint folder {folder}")
    try:
        with open(path) as file:
            state = json.load(file)
    except (OSError, ValueError):
        raise UserError(f"{folder} is not a complete checkpoint (no readable state.json); use another one") from None
    if state.get("format_version") != CHECKPOINT_FORMAT:
        raise UserError(f"{folder} has checkpoint format {state.get('format_version')}, expected {CHECKPOINT_FORMAT}")
    return state


def find_checkpoints(folder):
    """{name: state} of the complete checkpoints in a --model_save_dir, oldest step first."""
    found = {}
    for name in _listdir(folder):
        if not name.startswith(".") and os.path.exists(os.path.join(folder, name, "state.json")):
            found[name] = read_checkpoint(os.path.join(folder, name))
    return dict(sorted(found.items(), key=lambda item: (item[1]["progress"]["step"], item[0])))


def publish(staging, names, folder):
    """Make a written checkpoint visible under each name; a name that exists is replaced, and never half."""
    for name in names:
        final, old = os.path.join(folder, name), os.path.join(folder, f".old-{name}")
        copy = os.path.join(folder, f".new-{name}")
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(staging, copy)
        _sync(copy)
        if os.path.exists(final):
            shutil.rmtree(old, ignore_errors=True)
            os.rename(final, old)
        _rename_for_good(copy, final)
        shutil.rmtree(old, ignore_errors=True)
    shutil.rmtree(staging)


def remove_checkpoint(folder, name):
    """Delete a checkpoint; a kill leaves it whole or under a name that `clean_save_dir` deletes."""
    doomed = os.path.join(folder, f".staging-{name}")
    os.rename(os.path.join(folder, name), doomed)
    shutil.rmtree(doomed)


def clean_save_dir(folder):
    """Undo what a kill interrupted: put a replaced checkpoint back if its successor is missing, drop unfinished."""
    for name in _listdir(folder):
        path = os.path.join(folder, name)
        if name.startswith(".old-") and not os.path.exists(os.path.join(folder, name[5:])):
            os.rename(path, os.path.join(folder, name[5:]))
        elif name.startswith((".old-", ".new-", ".staging")):
            shutil.rmtree(path)


SAME_IN_A_RUN = ("seed", "batch_size", "net_dropout", "learning_rate", "embedding_l2", "max_grad_norm")
PERIODIC = re.compile(r"step_\d+$")  # checkpoints for --resume, which --keep_checkpoints counts
STATE_OF_GRAPH = "this-graph"  # for the graph's name in that of a dynamic loss scale: each graph has another one


class Trainer:
    """The model with its graphs, tables on disk and progress; the same code path for CPU and CUDA.

    Attributes that survive in a checkpoint: step (steps taken), epoch (from 1), step_in_epoch, plateau, best (epoch,
    step, auc and logloss of the best evaluation, or None).
    """

    def __init__(self, args, dataset, stores, run_id=None, checkpoint=None):
        """run_id: prefix of this run's snapshots; checkpoint: folder to load, or None for a new model."""
        self.args, self.dataset, self.stores = args, dataset, stores
        self.placement = flow.placement(args.device, list(range(world_size())))
        self.save_dir = save_dir_of(args)
        self.plateau = Plateau(args)
        self.step, self.epoch, self.step_in_epoch, self.best = 0, 1, 0, None
        self.run_id = run_id
        self.train_graph = self.eval_graph = None
        if checkpoint:
            self.prepare_snapshot(checkpoint)
        self.model = build_model(args, dataset, self.placement)
        self.optimizer_state = {}
        if checkpoint:
            self.load(checkpoint, to_train=not (args.eval_only or args.predict))

    # --- graphs -------------------------------------------------------------------------------------------------------

    def make_train_graph(self):
        """(Re)compile the training graph: a learning rate is fixed in it. Adam's state moves over without a copy."""
        if self.train_graph is not None:
            self.optimizer_state = self.current_optimizer_state()
        for parameter in self.model.parameters():
            parameter.grad = None  # a gradient of the earlier graph cannot be part of the new one
        args = self.args
        self.train_graph = TrainGraph(self.model.train(), self.plateau.learning_rate, args.embedding_l2,
                                      args.max_grad_norm, args.amp, args.loss_scale_policy)
        self.train_graph.load_state_dict({name.replace(STATE_OF_GRAPH, self.train_graph.name): value
                                          for name, value in self.optimizer_state.items()})
        self.graph_learning_rate = self.plateau.learning_rate

    def current_optimizer_state(self):
        """{"model.<parameter>-m", "...-v", "System-Train-TrainStep", ...: tensor}; empty before the first step."""
        if self.train_graph is None:
            return self.optimizer_state
        return {name.replace(self.train_graph.name, STATE_OF_GRAPH): value
                for name, value in self.train_graph.state_dict().items() if not isinstance(value, dict)}

    def train_step(self, batch):
        """One step on a `Batch`; returns the loss as a tensor, without waiting for it."""
        if self.train_graph is None or self.graph_learning_rate != self.plateau.learning_rate:
            self.make_train_graph()
        inputs = [to_split(array, self.placement) for array in (batch.ids, batch.labels, batch.weights, *batch.masks)]
        loss, *statistics = self.train_graph(*inputs)
        self.step += 1
        self.step_in_epoch += 1
        if statistics:
            self.model.dnn.update_running_statistics(statistics, batch.num_global)
        if self.optimizer_state:
            self.check_state_used()
        return loss

    def check_state_used(self):
        """OneFlow ignores a state whose name the graph does not know; that must not happen silently."""
        unused = set(self.optimizer_state) - set(self.current_optimizer_state())
        if unused:
            raise RuntimeError(f"optimizer state without a place in the graph: {sorted(unused)[:3]}")
        self.optimizer_state = {}

    # --- evaluation ---------------------------------------------------------------------------------------------------

    def predict(self, split):
        """Score every row of a split once -> (probabilities float32 (n,), labels float32 (n,)), in row order."""
        batches = eval_batches(self.dataset, split, self.args.batch_size, rank(), world_size())
        return self.score(batches, split.num_rows, split.name)

    def score(self, batches, num_rows, name):
        """The same for the pairs that `eval_batches` yields; name: for the progress bar."""
        if self.eval_graph is None:
            self.eval_graph = EvalGraph(self.model.eval(), self.args.amp)
        probs, labels = np.empty(num_rows, np.float32), np.empty(num_rows, np.float32)
        pending, position = None, 0

        def collect(output, start, count):
            probs[start:start + count] = output.to_local().numpy()[:count, 0]

        self.model.eval()
        bar = tqdm(total=num_rows, unit=" rows", desc=name, leave=False, disable=not show_bar())
        with prefetched(batches) as stream:
            for batch, batch_labels in stream:
                output = self.eval_graph(to_split(batch.ids, self.placement), to_split(batch.weights, self.placement))
                if pending:  # one batch behind, so that reading a result does not hold up the next batch
                    collect(*pending)
                pending = (output, position, len(batch_labels))
                labels[position:position + len(batch_labels)] = batch_labels
                position += len(batch_labels)
                bar.update(len(batch_labels))
        collect(*pending)
        bar.close()
        self.model.train()
        return probs, labels

    def evaluate(self, split_name, epoch, log=None):
        """Score a split and print one line -> (AUC, logloss)"""
        started = time.time()
        probs, labels = self.predict(self.dataset.splits[split_name])
        auc, logloss = auc_and_logloss(labels, probs)
        seconds = time.time() - started
        print_rank0(f"Rank[{rank()}], Epoch {epoch}, Step {self.step}, {split_name} AUC {auc:.6f}, "
                    f"{split_name} LogLoss {logloss:.6f}, Samples {len(labels)}, Eval_time {seconds:.2f} s")
        if log:
            log.write(split_name, self.step, epoch=epoch, auc=auc, logloss=logloss, samples=len(labels),
                      seconds=round(seconds, 3), **memory_in_use(self.args.device))
        return auc, logloss

    # --- saving -------------------------------------------------------------------------------------------------------

    def save(self, names):
        """Save the state as one table snapshot and one checkpoint folder per name."""
        snapshot = f"{self.run_id}-step_{self.step}"
        state = self.current_optimizer_state()
        for name, store in self.stores.items():
            table = getattr(self.model, name)
            if self.args.device == "cuda":
                table.weight.save_snapshot(snapshot)
                _sync(store.folder(rank(), world_size()))
            elif snapshot not in store.snapshots():  # else saved at this step already: replacing it could leave it half
                store.write_snapshot(snapshot, self.table_blocks(name, state))
        all_processes_sum(0)  # every process has saved
        dense = {name: self.to_numpy(value) for name, value in self.dense_state(state).items()}
        try:
            on_rank0(self.write_checkpoint, names, snapshot, dense)
        except OSError as error:
            reason = os.strerror(error.errno) if error.errno else error.args[0][0][2]  # copytree lists all its files
            raise UserError(f"cannot write a checkpoint to {self.save_dir} ({reason}); the earlier ones are whole: "
                            "mend that and continue with --resume") from None
        self.prune()

    def dense_state(self, state):
        """All tensors but the tables': parameters and buffers of the DNN, Adam's moments and step, loss scale."""
        tables = tuple(f"model.{name}." for name in self.stores)
        parameters = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        return {name: value for name, value in {**parameters, **state}.items() if not name.startswith(tables)}

    @staticmethod
    def to_numpy(tensor):
        if tensor.is_global:
            tensor = tensor.to_global(sbp=flow.sbp.broadcast).to_local()
        return tensor.numpy()

    def table_blocks(self, name, state):
        """This process's rows of a CPU table, a chunk at a time: the table is never copied as a whole."""
        value, m, v = self.table_arrays(name, state)
        start, end = local_range(self.dataset.num_rows + 1)
        end = min(end, self.dataset.num_rows)  # without the padding row
        for first in range(start, end, CHUNK_ROWS):
            part = slice(first - start, min(first + CHUNK_ROWS, end) - start)
            parts = [array[part] if array is not None else np.zeros_like(value[part]) for array in (value, m, v)]
            yield np.arange(first, first + len(parts[0])), np.concatenate(parts, axis=1)

    def table_arrays(self, name, state):
        """Views on this process's rows of a CPU table: value, m, v; the moments are None before the first step."""
        tensors = [getattr(self.model, name).weight] + [state.get(f"model.{name}.weight-{moment}") for moment in "mv"]
        return [None if tensor is None else tensor.detach().to_local().numpy() for tensor in tensors]

    def write_checkpoint(self, names, snapshot, dense):
        staging = os.path.join(self.save_dir, ".staging")
        shutil.rmtree(staging, ignore_errors=True)
        os.makedirs(staging)
        flow.save({name: flow.tensor(array) for name, array in dense.items()}, os.path.join(staging, "dense"))
        args = self.args
        state = {
            "format_version": CHECKPOINT_FORMAT,
            "model": {"fields": self.dataset.fields, "table_sizes": self.dataset.table_sizes,
                      "embedding_vec_size": args.embedding_vec_size, "dnn": args.dnn, "batch_norm": args.batch_norm},
            "run": {"run_id": self.run_id, "processes": world_size(),
                    "train_rows": self.dataset.splits["train"].num_rows,
                    **{option: getattr(args, option) for option in SAME_IN_A_RUN}},
            "progress": {"step": self.step, "epoch": self.epoch, "step_in_epoch": self.step_in_epoch,
                         "best": self.best},
            "plateau": self.plateau.state(),
            "tables": {name: {"path": os.path.abspath(store.path), "snapshot": snapshot, "processes": world_size(),
                              "rows": self.rows_on_this_disk(store, snapshot)} for name, store in self.stores.items()},
        }
        with open(os.path.join(staging, "state.json"), "w") as file:
            json.dump(state, file, indent=1)
        publish(staging, names, self.save_dir)

    @staticmethod
    def rows_on_this_disk(store, snapshot):
        """Rows of the snapshot, or None where several machines hold it."""
        with suppress(UserError):
            return store.count_rows(snapshot, world_size())

    def prune(self):
        """Drop old periodic checkpoints, then this run's snapshots that no checkpoint needs."""
        checkpoints = find_checkpoints(self.save_dir)
        periodic = [name for name in checkpoints if PERIODIC.match(name)]
        old = periodic[:-self.args.keep_checkpoints]
        all_processes_sum(0)  # every process has read the folder
        if rank() == 0:
            for name in old:
                remove_checkpoint(self.save_dir, name)
        needed = {table["snapshot"] for name, state in checkpoints.items() if name not in old
                  for table in state["tables"].values()}
        for store in self.stores.values():
            own = {name for name in store.snapshots() if name.startswith(self.run_id + "-")}
            all_processes_sum(0)  # every process has seen the same snapshots
            store.prune(own - needed, keep_last_chunk=self.args.device == "cuda")
        all_processes_sum(0)

    # --- loading ------------------------------------------------------------------------------------------------------

    def prepare_snapshot(self, folder):
        """Check a checkpoint against the arguments and its tables; on CUDA put those where OneEmbedding looks."""
        state = read_checkpoint(folder)
        self.check_compatible(state, folder)
        for name, store in self.stores.items():
            saved = state["tables"][name]
            snapshot, processes = saved["snapshot"], saved["processes"]
            on_cuda = self.args.device == "cuda"
            if on_cuda and snapshot in _listdir(os.path.join(store.folder(rank(), world_size()), "snapshots")):
                continue
            source = self.store_with(name, saved)
            if source is not store:
                print_rank0(f"Reading the rows of {name} from {source.path}, where the checkpoint was saved")
            rows = source.count_rows(snapshot, processes)
            if saved["rows"] is not None and rows != saved["rows"]:
                raise UserError(f"the table snapshot {snapshot} in {source.path} has {rows} rows, the checkpoint "
                                f"says {saved['rows']}; use another checkpoint")
            if on_cuda:
                store.write_snapshot(snapshot, source.read_snapshot(snapshot, processes) if rank() == 0 else ())

    def store_with(self, name, saved):
        """The store that holds a checkpoint's snapshot: this run's, or the one that it was saved to."""
        store = self.stores[name]
        return store if saved["snapshot"] in store.snapshots() else TableStore(saved["path"], store.dim, store.num_rows)

    def check_compatible(self, state, folder):
        args, model = self.args, state["model"]
        for name in ("embedding_vec_size", "dnn", "batch_norm"):
            if model[name] != getattr(args, name):
                raise UserError(f"{folder} was saved with --{name} {_brief(model[name])}, now it is "
                                f"{_brief(getattr(args, name))}; use the same value")
        if (model["fields"], model["table_sizes"]) != (self.dataset.fields, self.dataset.table_sizes):
            raise UserError(f"{folder} was trained on other fields or table sizes than those of --data_dir "
                            f"{args.data_dir}; use the data it was trained on")

    def load(self, folder, to_train=True):
        """Parameters and table rows of a checkpoint; Adam's state, twice as large, only if it is needed to train."""
        self.train_graph, self.optimizer_state = None, {}  # frees the moments that a graph holds
        state = read_checkpoint(folder)
        saved = self.load_dense(folder)
        moments = {name: value for name, value in saved.items() if to_train and name not in self.parameter_names()}
        self.optimizer_state = {name: flow.tensor(value.numpy()).to_global(self.placement, flow.sbp.broadcast)
                                for name, value in moments.items()}
        for name in self.stores:
            if self.args.device == "cuda":
                getattr(self.model, name).weight.load_snapshot(state["tables"][name]["snapshot"])
            else:
                self.load_table(name, state["tables"][name], with_moments=bool(moments))
        self.step = state["progress"]["step"]
        all_processes_sum(0)

    def load_progress(self, folder):
        """Continue where the checkpoint's run was, rather than begin a new run with its parameters."""
        state = read_checkpoint(folder)
        for name in ("step", "epoch", "step_in_epoch", "best"):
            setattr(self, name, state["progress"][name])
        self.plateau.load(state["plateau"])

    def parameter_names(self):
        return {f"model.{name}" for name in self.model.state_dict()}

    def load_dense(self, folder):
        """Read the dense tensors into the model; return all of them."""
        path = os.path.join(folder, "dense")
        try:
            saved = flow.load(path)
        except Exception as error:  # for a missing or short file it is an AssertionError, an OSError, a pickle error...
            raise UserError(f"{path} cannot be read ({type(error).__name__}): it is incomplete; "
                            "use another checkpoint") from None
        with flow.no_grad():
            for name, value in self.model.dnn.state_dict().items():
                key = f"model.dnn.{name}"
                if key not in saved or saved[key].shape != value.shape:
                    found = tuple(saved[key].shape) if key in saved else "nothing"
                    raise UserError(f"{folder} has {found} for {key}, expected {tuple(value.shape)}; "
                                    "use another checkpoint")
                value.copy_(flow.tensor(saved[key].numpy()).to_global(self.placement, flow.sbp.broadcast))
        return saved

    def load_table(self, name, saved, with_moments):
        """Fill this process's rows of a CPU table, and Adam's moments, from a snapshot of any number of processes."""
        start, end = local_range(self.dataset.num_rows + 1)
        dim = self.stores[name].dim
        value = getattr(self.model, name).weight.detach().to_local().numpy()
        arrays = [value] + [np.zeros_like(value) for _ in range(2 if with_moments else 0)]
        for keys, rows in self.store_with(name, saved).read_snapshot(saved["snapshot"], saved["processes"]):
            mine = (keys >= start) & (keys < end)
            for i, array in enumerate(arrays):
                array[keys[mine] - start] = rows[mine, i * dim:(i + 1) * dim]
        for moment, array in zip("mv", arrays[1:]):
            self.optimizer_state[f"model.{name}.weight-{moment}"] = to_split(array, self.placement)


# ---------------------------------------------------------------------------------------------------------------------
# Runs
# ---------------------------------------------------------------------------------------------------------------------


def show_bar():
    return rank() == 0 and sys.stderr.isatty()


def save_dir_of(args):
    """Without --model_save_dir the best checkpoint lives beside the table until the run ends."""
    return args.model_save_dir or os.path.join(args.persistent_path, ".best")


def make_stores(args, dataset):
    return {"embedding": TableStore(args.persistent_path, args.embedding_vec_size, dataset.num_rows),
            "embedding_fm": TableStore(args.persistent_path_fm, 1, dataset.num_rows)}


def prepare_new_run(args, stores):
    """Make sure that nothing of another run is overwritten or mixed in, and mark the folders as this run's.

    Runs on the first process. Raises: UserError when the folders hold another run's rows or checkpoints.
    """
    save_dir = save_dir_of(args)
    if args.model_load_dir and args.overwrite_tables:
        needed = {table["snapshot"] for table in read_checkpoint(args.model_load_dir)["tables"].values()}
        if any(needed & store.snapshots() for store in stores.values()):
            raise UserError(f"--overwrite_tables would delete the tables of --model_load_dir {args.model_load_dir}; "
                            "give another --persistent_path and --persistent_path_fm")
        if os.path.realpath(save_dir) == os.path.dirname(os.path.realpath(args.model_load_dir)):
            raise UserError(f"--overwrite_tables would delete --model_load_dir {args.model_load_dir}; "
                            "give another --model_save_dir")
    if args.overwrite_tables:
        for store in stores.values():
            store.remove_all()
        for name in find_checkpoints(save_dir):
            remove_checkpoint(save_dir, name)
    elif find_checkpoints(save_dir):
        raise UserError(f"{save_dir} holds checkpoints of another run; continue it with --model_save_dir {save_dir} "
                        "--resume, give another folder, or delete it with --overwrite_tables")
    for option, store in zip(("persistent_path", "persistent_path_fm"), stores.values()):
        if store.has_rows() and not args.model_load_dir:
            raise UserError(f"--{option} {store.path} already holds rows of another run; continue it with --resume, "
                            "start from a checkpoint with --model_load_dir, give another path, or delete the rows "
                            "with --overwrite_tables")
        os.makedirs(store.path, exist_ok=True)
        store.remove_scratch()
    os.makedirs(save_dir, exist_ok=True)
    clean_save_dir(save_dir)
    path = os.path.join(save_dir, "run.json")
    start = args.model_load_dir and os.path.abspath(args.model_load_dir)
    with open(path + ".tmp", "w") as file:
        json.dump({"run_id": uuid.uuid4().hex[:8], "model_load_dir": start}, file)
    os.replace(path + ".tmp", path)


def prepare_resume(args, stores):
    """Undo half-done work of a killed run. Runs on the first process.

    Raises: UserError when --model_save_dir is not the folder of a run, or the tables belong to another one.
    """
    path = os.path.join(args.model_save_dir, "run.json")
    if not os.path.exists(path):
        raise UserError(f"--resume: {args.model_save_dir} is not the folder of a run; start without --resume")
    clean_save_dir(args.model_save_dir)
    run_id = read_run(args.model_save_dir)["run_id"]
    for store in stores.values():
        store.remove_scratch()
        foreign = [name for name in store.snapshots() if not name.startswith(run_id + "-")]
        if not find_checkpoints(args.model_save_dir) and not foreign:
            store.remove_all()  # killed before its first checkpoint: start again
        os.makedirs(store.path, exist_ok=True)


def hold_tables(args, held):
    """Lock the table folders until `held` (an ExitStack) closes: a run restarted too early would damage the first.

    Raises: UserError when another run holds one.
    """
    for path in (args.persistent_path, args.persistent_path_fm):
        os.makedirs(path, exist_ok=True)
        descriptor = os.open(path, os.O_RDONLY)
        held.callback(os.close, descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another run is training with the tables in {path}; wait for its end or stop it") from None
        except OSError:
            pass  # a network file system without locks


def read_run(save_dir):
    """{"run_id": prefix of the run's snapshots, "model_load_dir": checkpoint that it started from, or None}"""
    with open(os.path.join(save_dir, "run.json")) as file:
        return json.load(file)


def start_run(args, dataset):
    """A Trainer for a new, continued or resumed run -> (trainer, step it resumes from or None)"""
    stores = make_stores(args, dataset)
    if args.eval_only or args.predict:
        trainer = Trainer(args, dataset, stores, checkpoint=args.model_load_dir)
        return trainer, None
    on_rank0(prepare_resume if args.resume else prepare_new_run, args, stores)
    started = read_run(save_dir_of(args))
    checkpoints = find_checkpoints(args.model_save_dir) if args.resume else {}
    if not checkpoints:
        if args.resume:
            print_rank0(f"No complete checkpoint in {args.model_save_dir} yet: starting from the beginning")
        trainer = Trainer(args, dataset, stores, started["run_id"], started.get("model_load_dir"))
        trainer.step = 0
        if args.resume:
            trainer.prune()
        return trainer, 0 if args.resume else None
    name, state = list(checkpoints.items())[-1]
    check_same_run(args, dataset, state, name)
    folder = os.path.join(args.model_save_dir, name)
    trainer = Trainer(args, dataset, stores, started["run_id"], folder)
    trainer.load_progress(folder)
    trainer.prune()
    print_rank0(f"Resuming from {folder}: epoch {trainer.epoch}, step {trainer.step}")
    return trainer, trainer.step


def check_same_run(args, dataset, state, name):
    """The learning rate, cut or not, and the position in the epoch come from the checkpoint."""
    run = state["run"]
    for option in set(SAME_IN_A_RUN) & set(run):  # checkpoints of earlier versions have fewer
        if run[option] != getattr(args, option):
            raise UserError(f"--resume: {name} was trained with --{option} {run[option]}, now it is "
                            f"{getattr(args, option)}; use the same value, or begin a run with --model_load_dir")
    rows = dataset.splits["train"].num_rows
    if run.get("train_rows", rows) != rows:
        raise UserError(f"--resume: {name} was trained on {run['train_rows']} rows, now --data_dir {args.data_dir} has "
                        f"{rows}; use the same data")


def batches_of_epoch(trainer):
    """This process's batches of the current epoch from the current step on, with dropout masks on CPU."""
    args = trainer.args
    needs_masks = args.device == "cpu" and args.net_dropout > 0 and args.disable_fusedmlp
    batches = train_batches(trainer.dataset, args.batch_size, args.seed, trainer.epoch, rank(), world_size(),
                            trainer.step_in_epoch)
    for step, batch in enumerate(batches, trainer.step):
        if needs_masks:
            batch.masks = draw_masks(args.dnn, len(batch.ids), args.net_dropout, args.seed, step, rank())
        yield batch


def steps_per_epoch(args, dataset):
    split = dataset.splits["train"]
    lanes = choose_lanes(split, args.batch_size, world_size())
    return math.ceil(max(lane_sizes(split, lanes)) / (args.batch_size // lanes))


class StepClock:
    """Seconds spent on training (not on evaluation or saving), with the steps and samples in them."""

    def __init__(self):
        self.seconds, self.samples, self.steps, self.started = 0.0, 0, 0, None
        self.mark = (0.0, 0, 0)

    def start(self):
        self.started = time.perf_counter()

    def stop(self):
        self.seconds += time.perf_counter() - self.started

    def count(self, samples):
        self.samples += samples
        self.steps += 1

    def since_last_call(self):
        """(ms per step, samples per second)"""
        self.stop()
        self.start()
        now = (self.seconds, self.samples, self.steps)
        seconds, samples, steps = (new - old for new, old in zip(now, self.mark))
        self.mark = now
        return 1000 * seconds / steps, samples / seconds


def train_epoch(trainer, clock, log):
    """Train to the end of the epoch or to --train_batches, whichever comes first."""
    args = trainer.args
    total = steps_per_epoch(args, trainer.dataset)
    bar = tqdm(total=total, initial=trainer.step_in_epoch, unit=" steps", desc=f"epoch {trainer.epoch}", leave=False,
               disable=not show_bar())
    previous = None
    with prefetched(batches_of_epoch(trainer)) as batches:
        clock.start()
        for batch in batches:
            loss = trainer.train_step(batch)
            clock.count(batch.num_global)
            if previous is not None:
                check_finite(previous, trainer)
            previous = loss  # read one step late, so that the next step's input is prepared meanwhile
            bar.update()
            if trainer.step % args.loss_print_interval == 0 or trainer.step == args.train_batches:
                log_step(trainer, check_finite(loss, trainer), clock, log)
            due = args.checkpoint_interval and trainer.step % args.checkpoint_interval == 0
            if due and trainer.step_in_epoch < total and trainer.step < args.train_batches:  # else finish_epoch saves
                check_finite(loss, trainer)
                clock.stop()
                trainer.save([f"step_{trainer.step}"])
                clock.start()
            if trainer.step == args.train_batches:
                break
        if previous is not None:  # another number of processes may have fewer steps in an epoch: none is left then
            check_finite(previous, trainer)
        clock.stop()
    bar.close()


def check_finite(loss, trainer):
    """The loss as a number; waits for its step."""
    value = float(loss.to_local().numpy())
    if not math.isfinite(value):
        raise UserError(f"the loss is {value} near step {trainer.step}; use a lower --learning_rate or --max_grad_norm"
                        + (" or --loss_scale_policy dynamic" if trainer.args.amp else ""))
    return value


def log_step(trainer, loss, clock, log):
    latency, throughput = clock.since_last_call()
    rate = trainer.plateau.learning_rate
    print_rank0(f"Rank[{rank()}], Step {trainer.step}/{trainer.args.train_batches}, Loss {loss:.6f}, "
                f"Latency {latency:.3f} ms, Throughput {throughput:.1f} samples/s, LR {rate:g}, "
                f"Time {datetime.now():%Y-%m-%d %H:%M:%S}")
    log.write("train", trainer.step, epoch=trainer.epoch, loss=loss, lr=rate, samples_per_second=round(throughput, 1),
              ms_per_step=round(latency, 3), **memory_in_use(trainer.args.device))


def finish_epoch(trainer, log):
    """Evaluate, decide on learning rate, stop and best, print that in one line, and save."""
    args, plateau, epoch = trainer.args, trainer.plateau, trainer.epoch
    auc, logloss = trainer.evaluate("val", epoch, log)
    rate = plateau.learning_rate
    improved = plateau.update(auc - logloss)
    if improved:
        trainer.best = {"epoch": epoch, "step": trainer.step, "auc": auc, "logloss": logloss}
    decision = f"learning rate {rate:g}" + (f" -> {plateau.learning_rate:g}" if plateau.learning_rate != rate else "")
    print_rank0(f"Epoch {epoch}, val AUC - LogLoss {auc - logloss:.6f}, best {plateau.best:.6f} (epoch "
                f"{trainer.best['epoch']}), epochs without gain {plateau.epochs_to_stop}"
                f"/{args.early_stop_patience or 'never'}, since cut {plateau.epochs_to_cut}/{args.patience}, {decision}"
                + (", stop" if plateau.stopped else ""))
    if trainer.step_in_epoch >= steps_per_epoch(args, trainer.dataset):  # else --train_batches ended it early
        trainer.epoch, trainer.step_in_epoch = epoch + 1, 0
    names = ["best_checkpoint"] if improved else []
    if args.model_save_dir:
        names.append(f"step_{trainer.step}")
        if args.save_model_after_each_eval:
            names.append(f"step_{trainer.step}_val_auc_{auc:0.5f}")
    if names:
        trainer.save(names)


def train(trainer, log):
    """Epochs until --train_batches or early stopping, then val and test with the best checkpoint."""
    args, started, clock = trainer.args, time.time(), StepClock()
    if args.save_initial_model and trainer.step == 0:
        trainer.save(["initial_checkpoint"])
    while not trainer.plateau.stopped and trainer.step < args.train_batches:
        train_epoch(trainer, clock, log)
        finish_epoch(trainer, log)
    if trainer.best is None:
        raise UserError(f"nothing is left to train after step {trainer.step} and no epoch was evaluated yet; use more "
                        f"--train_batches than {args.train_batches}")
    best = os.path.join(trainer.save_dir, "best_checkpoint")
    trainer.load(best, to_train=False)
    print_rank0(f"Best epoch {trainer.best['epoch']}, step {trainer.best['step']}:")
    for split in ("val", "test"):
        trainer.evaluate(split, trainer.best["epoch"], log if split == "test" else None)
    if clock.seconds:
        print_rank0(f"Trained {clock.samples} samples in {clock.seconds:.1f} s, mean throughput "
                    f"{clock.samples / clock.seconds:.1f} samples/s; total time {time.time() - started:.1f} s")
    if args.model_save_dir:
        print_rank0(f"Best checkpoint: {best}\nPredict with: {predict_command(trainer, best)}")
    else:
        print_rank0("No --model_save_dir: the checkpoint is not kept")
        on_rank0(shutil.rmtree, trainer.save_dir)
        trainer.prune()


def predict_command(trainer, checkpoint):
    """A shell command that works in the current folder, also for data without a dataset_info.json."""
    args, parser = trainer.args, make_parser()
    # python as the user calls it, if that is this one: the launcher uses an environment that is not activated
    command = ["python" if shutil.which("python") == sys.executable else sys.executable, sys.argv[0]]
    for name in ("data_dir", *(f"num_{split}_samples" for split in SPLITS), "table_size_array", "embedding_vec_size",
                 "dnn", "persistent_path", "persistent_path_fm"):
        value = getattr(args, name)
        text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
        if value is not None and text != str(parser.get_default(name)):
            command += [f"--{name}", text]
    command += ["--batch_norm"] * args.batch_norm
    command += ["--model_load_dir", checkpoint, "--predict", os.path.join(args.data_dir, "test"),
                "--predict_output", "predictions.parquet"]
    return shlex.join(command)


def predict(trainer):
    """Write one probability per row of --predict, in row order, to --predict_output."""
    args, dataset = trainer.args, trainer.dataset
    split = Split(args.predict, "predict", labelled=False)
    missing = [field for field in dataset.fields if field not in split.columns]
    if missing:
        raise UserError(f"--predict {args.predict} lacks the columns {_shorten(missing)}")
    _check_columns(dataset, split)
    probs, _ = trainer.predict(split)

    def write():
        folder = os.path.dirname(os.path.abspath(args.predict_output))
        os.makedirs(folder, exist_ok=True)
        pq.write_table(pa.table({"probability": probs}), args.predict_output + ".tmp")
        os.replace(args.predict_output + ".tmp", args.predict_output)

    on_rank0(write)
    print_rank0(f"Wrote {len(probs)} probabilities to {args.predict_output}")


def describe(trainer):
    """A few lines on what will run."""
    args, dataset = trainer.args, trainer.dataset
    threads = os.environ.get("OPENBLAS_NUM_THREADS") or os.environ.get("OMP_NUM_THREADS") or "all"
    print_rank0(f"OneFlow {flow.__version__}, device {args.device}, {world_size()} process(es), {threads} thread(s) "
                f"each, {len(os.sched_getaffinity(0))} cores, BLAS: {BLAS or 'OneFlow built-in'}")
    counts = ", ".join(f"{name} {split.num_rows}" for name, split in dataset.splits.items())
    print_rank0(f"Data {args.data_dir}: {len(dataset.fields)} fields, rows {counts}, "
                f"{steps_per_epoch(args, dataset)} batches of {args.batch_size} per epoch")
    width = args.embedding_vec_size + 1
    dense = sum(parameter.numel() for parameter in trainer.model.dnn.parameters())
    print_rank0(f"Tables: {dataset.num_rows} rows x ({args.embedding_vec_size} + 1), "
                f"{dataset.num_rows * width * 4 * SIZE_FACTOR / 2**20:.1f} MiB with Adam's moments; parameters "
                f"{dataset.num_rows * width + dense} ({dataset.num_rows} x {width} + {dense})")
    if args.device == "cpu":
        print_rank0(f"Without CUDA the tables live in host memory; --store_type {args.store_type} has no effect")
        if args.embedding_l2 > 0 or args.max_grad_norm > 0:
            print_rank0("With --embedding_l2 or --max_grad_norm every table row is updated in each step, as in FuxiCTR")
    elif args.embedding_l2 > 0:
        print_rank0("On CUDA --embedding_l2 decays looked-up rows only, and --max_grad_norm does not clip the decay")
    print_rank0(f"Checkpoints: {args.model_save_dir or 'none kept'}; tables on disk: {args.persistent_path}, "
                f"{args.persistent_path_fm}; logs: {args.log_dir or 'none'}")


def run(args):
    if args.device == "cpu":
        calm_scheduler()
    dataset = read_dataset(args)
    with ExitStack() as held:
        if not (args.eval_only or args.predict):
            on_rank0(hold_tables, args, held)
        trainer, resumed_step = start_run(args, dataset)
        describe(trainer)
        if args.predict:
            predict(trainer)
        elif args.eval_only:
            progress = read_checkpoint(args.model_load_dir)["progress"]
            for split in ("val", "test"):
                trainer.evaluate(split, progress["epoch"] - (progress["step_in_epoch"] == 0))
        else:
            log = held.enter_context(closing(MetricsLog(args.log_dir, resumed_step)))
            train(trainer, log)


def give_up(message, status, patience=5):
    """Say why in one line and end, without waiting for the collective calls of other processes.

    Most mistakes meet every process. Only the first one of a node speaks at once; when it ends, the launcher ends too.
    The others wait for that in silence, since OneFlow prints a stack trace in them when one is gone.
    """
    with suppress(OSError):  # perhaps nobody reads any more
        if int(os.environ.get("LOCAL_RANK", "0")) > 0:
            launcher, end, stderr = os.getppid(), time.monotonic() + patience, os.dup(2)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            while os.getppid() == launcher and time.monotonic() < end:
                time.sleep(0.1)
            if os.getppid() == launcher:  # the first process has not met it
                os.dup2(stderr, 2)
        sys.stderr.write(message + "\n")
        sys.stderr.flush()
        sys.stdout.flush()
    os._exit(status)


def main(argv=None):
    args = parse_args(argv)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # `import oneflow` put one there that ends at once
    try:
        run(args)
    except (UserError, OSError) as error:
        give_up(f"error: {error}", 1)
    except MemoryError as error:
        give_up(f"error: not enough memory for these sizes of model, tables and batch ({error})", 1)
    except KeyboardInterrupt:
        give_up("interrupted" + ("; continue with --resume" if args.model_save_dir else ""), 128 + signal.SIGINT)


if __name__ == "__main__":
    main()
