"""Train and evaluate DeepFM (arXiv:1703.04247) for click-through-rate prediction with OneFlow graphs and OneEmbedding.

One process (CPU or one GPU):
    python deepfm_train_eval.py --data_dir data/criteo --persistent_path tables --persistent_path_fm tables_fm
Several processes (one per GPU, or one per CPU core):
    python -m oneflow.distributed.launch --nproc_per_node 8 deepfm_train_eval.py --data_dir ... (same arguments)

Reads DATA_DIR/{train,val,test}/*.parquet (a Label column, then one column of global ids per field) and, if it is there,
DATA_DIR/dataset_info.json. Writes checkpoints to --model_save_dir, embedding rows as OneEmbedding snapshots under
--persistent_path and --persistent_path_fm, and metrics to --log_dir.

Letters in shape comments: B batch, F fields, C columns of ids (a field of lists has several), D embedding size,
H hidden units.
"""

from tools.trainer.cli import start_script

if __name__ == "__main__":
    start_script()  # imports take seconds

import math
import os
import re
import shutil
import subprocess
import sys
import time
import warnings
from contextlib import ExitStack, closing, suppress
from typing import NamedTuple

# before SciPy and its users, so that OneFlow gets the fastest matrix products
from tools.trainer.startup import check_thread, flow, no_garbage_collection, prepare_graphs, prepare_run

# isort: split
import numpy as np
import pyarrow as pa

from tools.serving.growth import growth_of
from tools.serving.output import check_output, check_suffix
from tools.serving.predictor import Predictor, write_predictions
from tools.trainer import checkpoints, chunks, cpu, metrics, run_log, tensors
from tools.trainer.arguments import check_arguments
from tools.trainer.batches import draw_masks, eval_batches, keep_probability, prefetched, steps_per_epoch, train_batches
from tools.trainer.cli import (
    Parser,
    UserError,
    boolean,
    first_line,
    float_list,
    int_list,
    name_list,
    number,
    raise_error,
)
from tools.trainer.dataset import (
    LABEL,
    SPLITS,
    Dataset,
    QuotedPaths,
    check_ids,
    check_labels,
    extra_columns,
    read_dataset,
)
from tools.trainer.files import hold
from tools.trainer.peers import run_together
from tools.trainer.plateau import MONITORS
from tools.trainer.processes import (
    all_agree,
    check_same_data,
    from_rank0,
    on_rank0,
    print_rank0,
    progress_bar,
    rank,
    share_arrays,
    to_split,
    world_size,
)
from tools.trainer.progress import Progress, trained_epoch
from tools.trainer.run_record import write_record
from tools.trainer.schedule import LONGEST, TRAIN_STEP, BiasCorrection, Factors, WarmUp
from tools.trainer.tables import OPTIMIZERS, Growth, TableStore, hold_paths

# petastorm uses pyarrow's legacy interfaces, which warn with every row group, and warns of columns that nobody reads
for category in (FutureWarning, DeprecationWarning, UserWarning):
    warnings.filterwarnings("ignore", category=category, module="petastorm")
from petastorm import make_batch_reader

nn = flow.nn
STORE_TYPES = ("device_mem", "cached_host_mem", "cached_ssd")
TABLES = {"embedding": "persistent_path", "embedding_fm": "persistent_path_fm"}  # {name: option of its folder}
# a checkpoint carries the model's shape, the columns of a stored row, and what its predictions are corrected by
MODEL_OPTIONS = ("embedding_vec_size", "dnn", "batch_norm", "optimizer", "negative_sampling_rate")
SAME_IN_A_RUN = ("seed", "batch_size", "net_dropout", "learning_rate", "embedding_l2", "max_grad_norm", "monitor",
                 "warmup_batches", "adam_betas", "adam_epsilon", "weight_column", "negative_sampling_rate")


# ---------------------------------------------------------------------------------------------------------------------
# Arguments
# ---------------------------------------------------------------------------------------------------------------------


POSITIVE, NATURAL = number(int, 1), number(int, 0)
USAGE = """
  %(prog)s --data_dir DATA --persistent_path TABLES --persistent_path_fm TABLES_FM [--model_save_dir DIR] ...
  %(prog)s --model_load_dir CHECKPOINT --data_dir DATA --eval_only
  %(prog)s --model_load_dir CHECKPOINT --predict ROWS --predict_output FILE"""


def make_parser():
    parser = Parser("Train and evaluate DeepFM with OneFlow graphs and OneEmbedding tables.", usage=USAGE)
    add_model_options(parser)
    add_training_options(parser)
    add_storage_options(parser)
    return parser


def add_model_options(parser):
    data = parser.add_argument_group("data")
    data.add_argument("--data_dir", help="folder (or URL) with train/, val/, test/ shards; required but for --predict")
    for split in SPLITS:
        data.add_argument(f"--num_{split}_samples", type=POSITIVE,
                          help=f"rows of the {split} split; required unless dataset_info.json has it")
    data.add_argument("--table_size_array", type=int_list,
                      help="rows of every field's table, comma-separated; required unless dataset_info.json has it")
    data.add_argument("--weight_column", metavar="COLUMN", help="weights of the rows, in the loss and in all metrics")
    data.add_argument("--group_column", metavar="COLUMN",
                      help="whole numbers or text, a user id say: val and test get a GAUC, the mean AUC of the groups")
    data.add_argument("--negative_sampling_rate", type=number(float, 0, 1, open_low=True), default=1.0,
                      help="share of the rows with label 0 that train kept; probabilities p are then corrected to "
                           "p / (p + (1 - p) / rate), in evaluation and prediction")

    model = parser.add_argument_group("model")
    model.add_argument("--embedding_vec_size", type=POSITIVE, default=16, help="embedding vector size, floats per id")
    model.add_argument("--dnn", type=int_list, default="1000,1000,1000,1000,1000", help="hidden units of the DNN")
    model.add_argument("--net_dropout", type=number(float, 0, 0.99), default=0.2,
                       help="dropout rate behind every hidden layer of the DNN, in training")
    model.add_argument("--batch_norm", action="store_true",
                       help="batch normalisation between linear map and activation of every hidden layer")
    model.add_argument("--disable_fusedmlp", type=boolean, nargs="?", const=True, default=True,
                       help="use separate operators instead of OneFlow's fused MLP; False needs CUDA")


def add_training_options(parser):
    training = parser.add_argument_group("training")
    training.add_argument("--optimizer", choices=OPTIMIZERS, default="adam", help="of all parameters, tables included")
    training.add_argument("--learning_rate", type=number(float, 0, open_low=True), default=0.001,
                          help="initial learning rate")
    training.add_argument("--warmup_batches", type=number(int, 0, LONGEST), default=0,
                          help="steps in which the learning rate grows linearly to its initial value")
    training.add_argument("--adam_betas", type=float_list(2, 0, 0.9999), default="0.9,0.999",
                          help="decay of Adam's two moments, comma-separated")
    training.add_argument("--adam_epsilon", type=number(float, 0, open_low=True), default=1.0e-8,
                          help="Adam's epsilon, beside the root of the second moment")
    training.add_argument("--batch_size", type=POSITIVE, default=10000,
                          help="global training/evaluation batch size, samples per step over all processes")
    training.add_argument("--train_batches", type=POSITIVE, default=75000, help="maximum number of training steps")
    training.add_argument("--epochs", type=POSITIVE, help="maximum number of epochs; what ends first counts")
    training.add_argument("--loss_print_interval", type=POSITIVE, default=100,
                          help="steps between two loss lines; the loss is the mean over them")
    training.add_argument("--eval_interval", type=NATURAL, default=0,
                          help="steps between two evaluations on val; 0: at the end of every epoch")
    training.add_argument("--monitor", choices=MONITORS, default="auc-logloss",
                          help="what decides on val which evaluation is the best, when to cut the rate, when to stop")
    training.add_argument("--patience", type=POSITIVE, default=2,
                          help="evaluations without gain after which the learning rate is reduced")
    training.add_argument("--min_delta", type=number(float, 0), default=1.0e-6, help="smallest change that is a gain")
    training.add_argument("--lr_factor", type=number(float, 0, 1, open_low=True), default=0.1,
                          help="factor of a learning-rate reduction")
    training.add_argument("--min_lr", type=number(float, 0), default=1.0e-6, help="lower bound of the learning rate")
    training.add_argument("--early_stop_patience", type=NATURAL, default=4,
                          help="evaluations without gain after which training stops; 0: never")
    training.add_argument("--embedding_l2", type=number(float, 0), default=0.0,
                          help="L2 weight of both tables: on CPU this/2 * sum of squares over all rows, part of the "
                               "loss (every row is then updated in every step); on CUDA decay of looked-up rows only")
    training.add_argument("--max_grad_norm", type=number(float, 0), default=0.0,
                          help="clip the global gradient norm over all parameters together; 0: off. On CPU every row "
                               "is then updated in every step")
    training.add_argument("--seed", type=number(int, 0, 2**31 - 1), default=2022,
                          help="seed of initial values, shuffling and dropout")


def add_storage_options(parser):
    tables = parser.add_argument_group("embedding tables")
    tables.add_argument("--persistent_path", help="folder of the persistent store of the embedding, not shared with "
                        "another run; required to train, else the checkpoint's")
    tables.add_argument("--persistent_path_fm",
                        help="folder of the persistent store of the first-order (FM) embedding, likewise")
    tables.add_argument("--store_type", choices=STORE_TYPES, default="cached_host_mem",
                        help="where OneEmbedding keeps the tables on CUDA; without CUDA they live in host memory")
    tables.add_argument("--cache_memory_budget_mb", type=NATURAL, default=1024,
                        help="GPU cache per device and table in megabytes, at most, for cached_host_mem and cached_ssd")
    tables.add_argument("--overwrite_tables", action="store_true",
                        help="delete the rows and checkpoints that an earlier run left in the given folders")

    saving = parser.add_argument_group("checkpoints")
    saving.add_argument("--model_load_dir", help="checkpoint to start from: parameters, tables, Adam's moments")
    saving.add_argument("--new_rows", choices=("oov", "normal"), default="oov",
                        help="rows of tokens that the data has grown by since --model_load_dir: as the trained "
                             "out-of-vocabulary row of their field, or as in a new table")
    saving.add_argument("--model_save_dir", help="folder for checkpoints; without it none is kept after the run")
    saving.add_argument("--save_initial_model", action="store_true", help="save initial model parameters")
    saving.add_argument("--save_model_after_each_eval", action="store_true", help="save model after each eval")
    saving.add_argument("--resume", action="store_true",
                        help="continue the run in --model_save_dir from its last complete checkpoint")
    saving.add_argument("--checkpoint_interval", type=NATURAL, default=0,
                        help="steps between checkpoints for --resume; 0: only after each evaluation")
    saving.add_argument("--keep_checkpoints", type=POSITIVE, default=2,
                        help="number of checkpoints for --resume that are kept; best and initial always stay")
    saving.add_argument("--skip_checksums", action="store_true",
                        help="use data and checkpoints without comparing files and tables with their checksums")

    use = parser.add_argument_group("evaluation and prediction")
    use.add_argument("--eval_only", action="store_true", help="score val and test of --model_load_dir, then end")
    use.add_argument("--predict", metavar="ROWS",
                     help="rows to score with --model_load_dir: a file, or a folder of files, of ids (parquet) or raw "
                          "(parquet, or text as the model's data was made of); labels are not needed")
    use.add_argument("--predict_output", metavar="FILE",
                     help="file for the probabilities, in row order: CSV where it ends in .csv, else parquet")
    use.add_argument("--keep_columns", type=name_list, metavar="NAME,NAME",
                     help="columns of the rows to write behind the probability")
    use.add_argument("--unknown_ids", choices=("error", "oov"),
                     help="what becomes of raw values that the vocabulary lacks, by default oov, and of ids outside "
                          "their tables, by default error; oov: they count as out-of-vocabulary")
    use.add_argument("--overwrite", action="store_true", help="replace an existing --predict_output")

    machine = parser.add_argument_group("machine and log")
    machine.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto",
                         help="auto: cuda when OneFlow sees a GPU")
    machine.add_argument("--amp", action="store_true", help="automatic mixed precision (CUDA only)")
    machine.add_argument("--loss_scale_policy", choices=("static", "dynamic"), default="static",
                         help="loss scale with --amp: static is 1024, dynamic adapts")
    machine.add_argument("--log_dir", help="folder for metrics.jsonl and TensorBoard events; with --model_save_dir the "
                                           "default is MODEL_SAVE_DIR/logs")


def parse_args(argv=None, error=None):
    """Parse and cross-check; what needs the data files or a checkpoint is checked when they are read.

    Derived: args.device names one of DEVICES, args.given has the names of the options that are on the command line.
    error: function that is called with a mistake, instead of the end of the process with a line.
    """
    parser = make_parser()
    parser.error = error or parser.error
    args = parser.parse_args(argv)
    words = {word.split("=")[0] for word in (sys.argv[1:] if argv is None else argv)}
    args.given = {action.dest for action in parser._actions if words & set(action.option_strings)}
    check_arguments(parser, args, TABLES.values())
    if args.predict_output:
        try:
            check_output(args.predict_output, args.overwrite, inputs=[args.predict, args.model_load_dir])
            check_suffix(args.predict_output)
        except UserError as error:
            parser.error(str(error))
    if args.log_dir is None and args.model_save_dir:
        args.log_dir = os.path.join(args.model_save_dir, "logs")
    return args


def adopt_model(args, folder):
    """Take the model from a checkpoint where the command line does not describe it; returns its state."""
    return checkpoints.adopt_model(args, folder, make_parser(), MODEL_OPTIONS, TABLES)


# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------


def read_rows(dataset, split, lane=0, num_lanes=1, seed=None):
    """Yield (ids int32 or int64 (n, C), labels float32 (n,), *extras of the split (n,)) per row group with petastorm.

    A lane is every num_lanes-th row group. seed: None reads in order, a positive number shuffles the row groups.
    Raises: UserError for an id outside its table or a label that is not 0 or 1.
    """
    split.check_files()
    lanes = {"cur_shard": lane, "shard_count": num_lanes} if num_lanes > 1 else {}
    dtype = np.int32 if dataset.num_ids < 2**31 - 1 else np.int64
    wanted = dict.fromkeys([*([LABEL] if split.labelled else []), *dataset.columns, *split.extras.values()])
    # read in the calling thread, which is `prefetched`: petastorm's own threads wake up 1000 times a second to look for
    # work (thread_pool.py, 0.13.1), which cost 5 % of a step's time
    reader = make_batch_reader(
        split.urls(), filesystem=QuotedPaths(), reader_pool_type="dummy",
        schema_fields=[f"^{re.escape(name)}$" for name in wanted],
        num_epochs=1, shuffle_row_groups=seed is not None, seed=seed, **lanes)
    remaining = sum(split.row_groups[lane::num_lanes])
    try:
        while remaining > 0:
            group = next(reader, None)
            if group is None:
                raise UserError(f"petastorm delivered fewer rows of the {split.name} split than its files have; they "
                                "may have changed while they were read: start again")
            ids = np.empty((len(getattr(group, dataset.columns[0])), len(dataset.columns)), dtype)
            for place, name in enumerate(dataset.columns):
                column = getattr(group, name)
                check_ids(dataset, split, place, column.min(), column.max())
                ids[:, place] = column
            labels = getattr(group, LABEL).astype(np.float32) if split.labelled else np.zeros(len(ids), np.float32)
            check_labels(split, labels)
            remaining -= len(ids)
            yield (ids, labels, *extra_columns(split, group))
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"cannot read the {split.name} split ({first_line(error)}); a file may be truncated: "
                        "convert or copy it again") from None
    finally:
        reader.stop()
        reader.join()


# ---------------------------------------------------------------------------------------------------------------------
# OneEmbedding, and what else is of its own on CUDA
# ---------------------------------------------------------------------------------------------------------------------


class OneEmbedding(nn.Module):
    """Rows of all fields in one table, looked up by global id; ids of fields never collide.

    On CUDA it is OneFlow's MultiTableEmbedding (`Cuda.make_table`). OneEmbedding has no CPU kernels, so without CUDA it
    is a parameter in host memory, split over the processes, with the same rule of update (tools/trainer/cpu.py).

    Row `num_ids` is the padding row: it is looked up by padding samples only and gets zero gradients. It never moves,
    but for the decay of looked-up rows on CUDA.
    """

    def __init__(self, device, table, dim):
        super().__init__()
        self.device, self.weight, self.dim = device, table, dim

    def forward(self, ids):
        """int64 (B, C) -> float (B, C, D)"""
        return self.device.look_up(self.weight, ids)


def make_store_options(store_type, store, capacity, cache_memory_budget_mb):
    """OneEmbedding's options of a --store_type for a TableStore; capacity: number of rows over all processes."""
    common = {"persistent_path": store.path, "capacity": capacity, "size_factor": store.size_factor,
              "physical_block_size": chunks.BLOCK_SIZE}
    if store_type == "device_mem":
        return flow.one_embedding.make_device_mem_store_options(**common)
    common["cache_budget_mb"] = min(cache_memory_budget_mb, store.cache_mb(capacity))
    if store_type == "cached_host_mem":
        return flow.one_embedding.make_cached_host_mem_store_options(**common)
    return flow.one_embedding.make_cached_ssd_store_options(**common)


class OneEmbeddingTable(flow.one_embedding.MultiTableEmbedding):
    """OneEmbedding without snapshots as a side effect of state_dict(): checkpoints save and load them by name."""

    def __init__(self, name, dim, placement, store_options, seed):
        initializer = flow.one_embedding.make_normal_initializer(0.0, cpu.INIT_STD)
        super().__init__(name, embedding_dim=dim, dtype=flow.float, key_type=flow.int64,
                         tables=[flow.one_embedding.make_table(initializer)], store_options=store_options)
        self.seed = seed  # 0.9.0 draws a new row from (seed, id); 0.8.0 has no such argument
        # its one parameter, `shadow`, stands for the table in a graph; the lookup wants it global as the ids are
        self.to_global(placement, flow.sbp.broadcast)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        nn.Module._save_to_state_dict(self, destination, prefix, keep_vars)

    def _load_from_state_dict(self, *args):
        nn.Module._load_from_state_dict(self, *args)


class Cuda:
    """GPUs. What this relies on was read in OneFlow's sources at v0.8.0 and v0.9.0 (not run here on a GPU):

    Keys are int64 (`key_type` must equal the ids' type, one_embedding.py `Embedding.forward`); one lookup per table and
    graph, because the training pass rewrites one lookup with its update; a stored row has 3 x D floats, value, Adam m
    and Adam v, or 2 x D, value and Adagrad's sum (size factor, one_embedding_update_kernels.cu); `capacity` counts rows
    over all processes, is divided by their number and enlarged by 5 % or 4096 rows (key_value_store_options.h), and the
    full cache does not check it, so it must not be too small; rows live at PATH/<rank>-<number of processes>, snapshots
    at .../snapshots/NAME, and a missing snapshot is only logged, so a checkpoint's is checked before loading; a key
    belongs to the rank given by OneFlow's ShardingHash, which the persistent table writer also uses; a table lives
    until the process ends, no second one may have its name, and no other process may have its folder open.
    """

    name = "cuda"
    one_embedding = True  # it keeps and updates the tables, and goes on writing to the files of a snapshot
    feeds_masks = False  # they are drawn in the graph

    def __init__(self):
        self.placement = flow.placement(self.name, list(range(world_size())))

    def make_table(self, store, seed, number, store_type, cache_memory_budget_mb):
        """A table of the model; number: of the table in it, so that each has initial values of its own."""
        capacity = store.num_ids + 1  # with the padding row
        options = make_store_options(store_type, store, capacity, cache_memory_budget_mb)
        return OneEmbeddingTable(store.claim(), store.dim, self.placement, options, 2 * seed + number)

    def look_up(self, table, ids):
        return table(ids)

    def save_rows(self, table, store, snapshot, moments):
        table.save_snapshot(snapshot)
        store.sync()

    def load_rows(self, table, store, snapshot, blocks, with_moments):
        table.load_snapshot(snapshot)
        return {}

    def sum_over_fields(self, x, dim):
        """(B, F*D) -> (B, D)"""
        return x.reshape(x.shape[0], x.shape[1] // dim, dim).sum(dim=1)

    def repeat_rows(self, vector, x):
        return vector

    def draw_masks(self, hidden_units, rows, dropout, generator):
        """bool (rows, H) per hidden layer: True keeps a unit. One operator for all layers: see batches.draw_masks."""
        noise = flow.rand(rows, sum(hidden_units), placement=self.placement, sbp=flow.sbp.split(0), generator=generator)
        ends = np.cumsum(hidden_units)
        keep = noise < keep_probability(dropout)
        return [keep[:, int(end - units):int(end)] for end, units in zip(ends, hidden_units)]

    def memory(self):
        """{"gpu_memory_mb": used memory of the first process's GPU, by whatever program}"""
        return {"gpu_memory_mb": round(flow._oneflow_internal.GetCUDAMemoryUsed())}

    def machine(self):
        """{"gpu": name of the first visible GPU}, {} where nvidia-smi does not say it."""
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        with suppress(OSError, subprocess.SubprocessError):
            output = subprocess.run(
                ["nvidia-smi", f"--id={visible}", "--query-gpu=name", "--format=csv,noheader"],
                stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True, timeout=10, text=True)
            return {"gpu": output.stdout.strip()}
        return {}

    def notes(self, args, columns):
        """Lines for the start of the log; columns: of ids."""
        if args.batch_size * columns >= 2**20:
            # 32-bit sizes of buffers in PersistentTableImpl::Get and Put, persistent_table.cpp
            yield (f"--batch_size {args.batch_size} looks up {args.batch_size * columns} ids a step; from 1048576 on "
                   "OneEmbedding may end the process or damage rows when it reads or saves many of them at once")
        if args.embedding_l2 > 0:
            yield "On CUDA --embedding_l2 decays looked-up rows only, and --max_grad_norm does not clip the decay"


DEVICES = {device.name: device for device in (Cuda, cpu.Cpu)}


# ---------------------------------------------------------------------------------------------------------------------
# Model
# ---------------------------------------------------------------------------------------------------------------------


class FM(nn.Module):
    """First-order and second-order terms of DeepFM (arXiv:1703.04247, section 3.1)."""

    def __init__(self, device, dim):
        super().__init__()
        self.device, self.dim = device, dim

    def forward(self, first_order, embeddings):
        """first_order (B, F), embeddings (B, F*D) -> (B, 1), in logit units"""
        return self.device.sum_over_fields(first_order, 1) + self.second_order(embeddings)

    def second_order(self, embeddings):
        """Sum of inner products over all pairs of fields (DeepFM, eq. 2): (B, F*D) -> (B, 1), in logit units.

        In O(F*D) by Rendle's identity (Factorization Machines, 2010, lemma 3.1).
        """
        total = self.device.sum_over_fields
        square_of_sum = total(flow.square(total(embeddings, self.dim)), 1)
        sum_of_square = total(flow.square(embeddings), 1)
        return 0.5 * (square_of_sum - sum_of_square)


class DNN(nn.Module):
    """Multi-layer perceptron: hidden layers with [batch norm,] ReLU and dropout, then one linear unit.

    Weights are Xavier normal, biases 0 (drawn with numpy, the same on every process).
    """

    def __init__(self, device, in_features, hidden_units, dropout, *, seed=0, batch_norm=False, fused=False):
        super().__init__()
        self.device, self.hidden_units, self.dropout = device, hidden_units, dropout
        self.batch_norm, self.fused = batch_norm, fused
        rng = np.random.default_rng((seed, 2))

        def replicated(array):
            return flow.tensor(array.astype(np.float32)).to_global(device.placement, flow.sbp.broadcast)

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
        # for masks drawn in the graph; even on CUDA one of the CPU (GlobalRandFunctor, random_functor.cpp, 0.9.0)
        self.generator = flow.Generator("cpu")
        self.generator.manual_seed(seed)

    def forward(self, x, sample_weights, masks=()):
        """x (B, F*D), sample_weights (B, 1) as in `Batch`, masks int8 (B, H) per layer -> ((B, 1), batch statistics)

        In evaluation and without dropout, masks stay empty. Batch statistics: [mean, biased variance, ...] per layer.
        """
        dropping = self.training and self.dropout > 0
        if self.fused:
            return self.fused_layers(x, dropping), []
        drawn = self.device.draw_masks(self.hidden_units, x.shape[0], self.dropout, self.generator) if dropping else ()
        shrink = cpu.MASK_SHRINK if masks else 1.0  # see cpu.masked_relu
        keep = keep_probability(self.dropout) if masks or drawn else 1.0
        statistics, scale = [], 1.0
        for i in range(len(self.hidden_units)):
            if self.batch_norm:
                x, offset = self.normalise(i, self.multiply(i, x, scale), sample_weights, statistics, shrink)
            else:
                x, offset = self.multiply(i, x, scale * shrink), getattr(self, f"bias_{i}") * shrink
            if self.training:
                offset = self.device.repeat_rows(offset, x)
            x = cpu.masked_relu(x, offset, masks[i]) if masks else flow.relu(x + offset)
            if drawn:
                x = x * drawn[i].to(x.dtype)
            scale = 1.0 / (keep * shrink)  # free of charge in the next product
        last = len(self.hidden_units)
        return self.multiply(last, x, scale) + getattr(self, f"bias_{last}"), statistics

    def fused_layers(self, x, dropping):
        """All layers in one operator of CUDA."""
        layers = range(len(self.hidden_units) + 1)
        arguments = (x, [getattr(self, f"weight_{i}") for i in layers], [getattr(self, f"bias_{i}") for i in layers])
        if dropping:
            rates = [self.dropout] * len(self.hidden_units) + [0.0]
            return flow._C.fused_matmul_bias_add_relu_dropout(*arguments, True, rates)
        return flow._C.fused_mlp(*arguments, True)

    def multiply(self, i, x, scale):
        return flow._C.matmul(x, getattr(self, f"weight_{i}"), transpose_b=True, alpha=scale)

    def normalise(self, i, x, sample_weights, statistics, scale, epsilon=1e-5):
        """Batch normalisation (arXiv:1502.03167) over the valid rows of the whole global batch.

        Returns two terms whose sum is the result, times `scale`: normalised x (B, H), offset (H,). OneFlow's own
        BatchNorm1d knows neither padding rows nor other processes.
        """
        if self.training:
            mean = flow._C.matmul(sample_weights, x, transpose_a=True).to_global(sbp=flow.sbp.broadcast)  # (1, H)
            centred = x - mean
            var = flow._C.matmul(sample_weights, centred * centred, transpose_a=True).to_global(sbp=flow.sbp.broadcast)
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


class ListPooling(nn.Module):
    """Makes one field of a list's columns: mean of the embeddings and sum of the first-order weights of what is there.

    lists: [(first column, last column + 1, id of an absent element)], as `Dataset.list_columns` gives them.
    """

    def __init__(self, lists):
        super().__init__()
        self.lists = sorted(lists)

    def forward(self, ids, embeddings, first_order):
        """ids (B, C), embeddings (B, C, D), first_order (B, C, 1) -> (B, F, D), (B, F, 1)"""
        vectors, weights, done = [], [], 0
        for start, end, absent in self.lists:
            present = (ids[:, start:end] != absent).to(embeddings.dtype).unsqueeze(-1)  # (B, L, 1)
            number = flow.clamp(present.sum(dim=1, keepdim=True), min=1.0)
            total = (embeddings[:, start:end] * present).sum(dim=1, keepdim=True)
            vectors += [embeddings[:, done:start], total / number]
            weights += [first_order[:, done:start], (first_order[:, start:end] * present).sum(dim=1, keepdim=True)]
            done = end
        vectors, weights = vectors + [embeddings[:, done:]], weights + [first_order[:, done:]]
        return tuple(flow.cat([part for part in parts if part.shape[1]], dim=1) for parts in (vectors, weights))


class DeepFM(nn.Module):
    """logit = first order + second order + DNN [+ further towers], all on the same fields.

    towers: {name: module from embeddings (B, F*D) to (B, 1)}; lists: see ListPooling.
    """

    def __init__(self, device, embedding, embedding_fm, dnn, towers=None, lists=()):
        super().__init__()
        self.pooling = ListPooling(lists) if lists else None
        self.embedding, self.embedding_fm, self.dnn = embedding, embedding_fm, dnn
        self.fm = FM(device, embedding.dim)
        self.towers = nn.ModuleDict(towers or {})

    def forward(self, ids, sample_weights, masks=()):
        """ids int64 (B, C) -> (logits (B, 1), batch statistics of the DNN)"""
        embeddings, first_order = self.embedding(ids), self.embedding_fm(ids)
        if self.pooling is not None:
            embeddings, first_order = self.pooling(ids, embeddings, first_order)
        embeddings = embeddings.flatten(1)
        dnn, statistics = self.dnn(embeddings, sample_weights, masks)
        logits = self.fm(first_order.flatten(1), embeddings) + dnn
        for tower in self.towers.values():
            logits = logits + tower(embeddings)
        return logits, statistics

    def tables(self):
        """{name: OneEmbedding}, as TABLES names them"""
        return {"embedding": self.embedding, "embedding_fm": self.embedding_fm}

    def dense_parameters(self):
        """Every parameter that is not a table's."""
        return [parameter for name, parameter in self.named_parameters() if name.split(".")[0] not in TABLES]


def make_tables(args, num_ids):
    """The records of the model's tables: vectors of the second order and the DNN, weights of the first order."""
    widths = {"embedding": args.embedding_vec_size, "embedding_fm": 1}
    return [TableStore(name, option, getattr(args, option), widths[name], num_ids, args.optimizer)
            for name, option in TABLES.items()]


def build_model(args, device, tables, dataset):
    """The model of MODEL_OPTIONS; tables: of `make_tables`."""
    embedding, embedding_fm = (
        OneEmbedding(device, device.make_table(table, args.seed, number, args.store_type, args.cache_memory_budget_mb),
                     table.dim) for number, table in enumerate(tables))
    dnn = DNN(device, len(dataset.fields) * args.embedding_vec_size, args.dnn, args.net_dropout, seed=args.seed,
              batch_norm=args.batch_norm, fused=not args.disable_fusedmlp)
    return DeepFM(device, embedding, embedding_fm, dnn, lists=dataset.list_columns())


# ---------------------------------------------------------------------------------------------------------------------
# Graphs
# ---------------------------------------------------------------------------------------------------------------------


def decay_tables(optimizer, tables, l2):
    """Let an optimizer in a graph add l2 * w to the gradients of `tables` only, after all were clipped together.

    In a parameter group of their own the tables could have weight_decay, but a group that is clipped must have
    OneEmbedding's tables in it (ClipGradByGlobalNorm in replace_embedding_ops_pass.cpp).
    """
    generate = optimizer._generate_conf_for_graph

    def generate_with_decay(train_conf, vars_conf):
        groups = generate(train_conf, vars_conf)
        for table in tables:
            vars_conf[table].l2 = l2
        return groups

    optimizer._generate_conf_for_graph = generate_with_decay
    return optimizer


def add_optimizer(graph, device, tables, dense, *, optimizer, learning_rate, betas, epsilon, embedding_l2,
                  max_grad_norm, warm_up, steps):
    """Adam or Adagrad for the parameters of the tables and for all others, the dense ones.

    OneEmbedding moves looked-up rows. So does Adam's lazy update on CPU, but with L2 or clipping every row moves there,
    as in FuxiCTR. Adagrad leaves rows alone that have no gradient, so its plain update is lazy in itself. L2 on
    OneEmbedding's tables decays looked-up rows and is not clipped; on CPU it is `l2_terms`.
    warm_up: WarmUp or None; steps: range of those that the optimizer will count.
    """
    clip = {"clip_grad_max_norm": max_grad_norm, "clip_grad_norm_type": 2.0} if max_grad_norm > 0 else {}

    def make(parameters, **options):
        groups = [{"params": parameters, **options}]
        if optimizer == "adagrad":
            return flow.optim.Adagrad(groups, lr=learning_rate)  # epsilon 1e-10, sums begin with 0, as in PyTorch
        return flow.optim.Adam(groups, lr=learning_rate, betas=betas, eps=epsilon)

    def add(made, *factors, **options):
        factors = [*factors, *([warm_up] if warm_up else [])]
        graph.add_optimizer(made, lr_sch=Factors(made, factors, steps) if factors else None, **options)

    if device.one_embedding:
        add(decay_tables(make(tables + dense, **clip), tables, embedding_l2))
    elif embedding_l2 > 0 or clip or optimizer == "adagrad":
        add(make(tables + dense, **clip))
    else:
        add(make(tables, do_bias_correction=False), BiasCorrection(betas), is_sparse=True)
        add(make(dense))


def l2_terms(device, tables, embedding_l2):
    """Parts of the loss, so that they are clipped too: l2 / 2 * sum of squares of all rows of each table."""
    if device.one_embedding or embedding_l2 == 0:
        return []
    return [0.5 * embedding_l2 * cpu.sum_of_squares(table) for table in tables]


class Graph(nn.Graph):
    """nn.Graph that compiles without a garbage collection.

    The end of an earlier graph empties the list of variables that a new one fills (Graph.__del__, graph.py, 0.9.0).
    """

    def _compile(self, *inputs):
        with no_garbage_collection():
            return super()._compile(*inputs)


class TrainGraph(Graph):
    """One training step: forward, backward, update. The learning rate is compiled in: see `Trainer.make_train_graph`.

    weighted: whether rows have weights of their own; options: of `add_optimizer`.
    """

    def __init__(self, model, device, *, weighted, embedding_l2, amp, loss_scale_policy, **options):
        super().__init__()
        self.config.allow_fuse_add_to_output(True)  # adds bias and mask inside the matrix product
        self.model, self.device, self.weighted, self.embedding_l2 = model, device, weighted, embedding_l2
        self.loss = nn.BCEWithLogitsLoss(reduction="none")
        tables = [parameter for table in model.tables().values() for parameter in table.parameters()]
        add_optimizer(self, device, tables, model.dense_parameters(), embedding_l2=embedding_l2, **options)
        if amp:
            self.config.enable_amp(True)
            self.set_grad_scaler(
                flow.amp.StaticGradScaler(1024) if loss_scale_policy == "static" else
                # halves until gradients are finite, doubles after 2000 finite steps
                flow.amp.GradScaler(init_scale=2.0**30, growth_factor=2.0, backoff_factor=0.5, growth_interval=2000))

    def build(self, ids, labels, weights, *more):
        """Shapes as in `Batch`, over all processes -> (loss (), [sum of the rows' weights (),] batch statistics...)

        more: [row weights,] dropout masks.
        """
        row_weights, masks = more[:self.weighted], more[self.weighted:]
        logits, statistics = self.model(ids, weights, masks)
        losses, total = self.loss(logits, labels), []
        if self.weighted:  # mean over the weights of the global batch; 0 where all of them are 0
            total = [row_weights[0].sum().to_global(sbp=flow.sbp.broadcast)]
            loss = (losses * row_weights[0]).sum() / flow.clamp(total[0], min=1e-30)
        else:
            loss = (losses * weights).sum()
        objective = loss
        tables = [self.model.embedding.weight, self.model.embedding_fm.weight]
        for term in l2_terms(self.device, tables, self.embedding_l2):
            objective = objective + term
        objective.backward()
        return (loss.to_global(sbp=flow.sbp.broadcast), *total, *statistics)


class EvalGraph(Graph):
    """Probabilities of one batch, the same on all processes.

    negative_sampling_rate: the odds are multiplied by it, which is p / (p + (1 - p) / rate) for a probability p.
    """

    def __init__(self, model, amp=False, negative_sampling_rate=1.0):
        super().__init__()
        self.model, self.shift = model, math.log(negative_sampling_rate)
        if amp:
            self.config.enable_amp(True)

    def build(self, ids, weights):
        logits, _ = self.model(ids, weights)
        return flow.sigmoid(logits + self.shift if self.shift else logits).to_global(sbp=flow.sbp.broadcast)


# ---------------------------------------------------------------------------------------------------------------------
# Metrics
# ---------------------------------------------------------------------------------------------------------------------


class Metric(NamedTuple):
    """A function of `metrics.Scores` that gives a number, or None where it does not apply; what the log calls it."""

    function: object
    title: str


METRICS = {
    "auc": Metric(metrics.auc, "AUC"), "logloss": Metric(metrics.logloss, "LogLoss"),  # the log's first line has these
    "calibration": Metric(metrics.calibration, "pCTR/CTR"), "ece": Metric(metrics.ece, "ECE"),
    "gauc": Metric(metrics.gauc, "GAUC"), "gauc_left_out": Metric(metrics.left_out, "rows outside GAUC"),
}


def compute_metrics(scores):
    """{name: value} of those METRICS that apply to `metrics.Scores`."""
    scores = metrics.clipped(scores)
    values = {name: metric.function(scores) for name, metric in METRICS.items()}
    return {name: value for name, value in values.items() if value is not None}


# ---------------------------------------------------------------------------------------------------------------------
# Trainer
# ---------------------------------------------------------------------------------------------------------------------


class Trainer(Progress):
    """The model with its graphs: steps and scores. tools/trainer/checkpoints.py saves and loads it."""

    def __init__(self, args, dataset, device, tables):
        train = dataset.splits.get("train")
        super().__init__(args, steps_per_epoch(train, args.batch_size, world_size()) if train else None)
        self.dataset, self.device = dataset, device
        self.train_graph = self.eval_graph = None
        self.model = build_model(args, device, tables, dataset)
        self.optimizer_state = {}  # what the next training graph is to begin with

    # --- training -----------------------------------------------------------------------------------------------------

    def make_train_graph(self):
        """(Re)compile the training graph: a learning rate is fixed in it. Adam's state moves over without a copy."""
        if self.train_graph is not None:
            self.optimizer_state = self.current_optimizer_state()
        for parameter in self.model.parameters():
            parameter.grad = None  # a gradient of the earlier graph cannot be part of the new one
        args, done = self.args, 0
        if TRAIN_STEP in self.optimizer_state:  # also those before --model_load_dir, which are not of this run
            counted = tensors.to_numpy(self.optimizer_state[TRAIN_STEP])  # a graph keeps it on the first process only
            done = from_rank0(lambda: int(counted.item()))
        warm_up = WarmUp(args.warmup_batches, done - self.step) if self.step < args.warmup_batches else None
        self.train_graph = TrainGraph(
            self.model.train(), self.device, weighted=args.weight_column is not None, optimizer=args.optimizer,
            learning_rate=self.plateau.learning_rate, warm_up=warm_up, betas=tuple(args.adam_betas),
            steps=range(done + 1, done + self.steps_left() + 1), epsilon=args.adam_epsilon,
            embedding_l2=args.embedding_l2, max_grad_norm=args.max_grad_norm, amp=args.amp,
            loss_scale_policy=args.loss_scale_policy)
        tensors.load_graph_state(self.train_graph, self.optimizer_state)
        self.graph_learning_rate = self.plateau.learning_rate

    def current_optimizer_state(self):
        """{"model.<parameter>-m", "...-v", "System-Train-TrainStep", ...: tensor}; empty before the first step."""
        return self.optimizer_state if self.train_graph is None else tensors.graph_state(self.train_graph)

    def train_step(self, batch):
        """One step on a `Batch`; returns the loss as a tensor, without waiting for it.

        Sets step_weight: number of samples, or a tensor with the sum of their weights.
        """
        is_new = self.train_graph is None or self.graph_learning_rate != self.plateau.learning_rate
        if is_new:
            self.make_train_graph()
        row_weights = [] if batch.row_weights is None else [batch.row_weights]
        arrays = (batch.ids, batch.labels, batch.weights, *row_weights, *batch.masks)
        inputs = [to_split(array, self.device.placement) for array in arrays]
        if is_new:
            self.compile_seconds = run_log.announced("Compiling the training graph", self.train_graph._compile, *inputs)
        loss, *statistics = self.train_graph(*inputs)
        self.step_weight = statistics.pop(0) if row_weights else batch.num_global
        self.step += 1
        self.step_in_epoch += 1
        if statistics:
            self.model.dnn.update_running_statistics(statistics, batch.num_global)
        if self.optimizer_state:
            self.check_state_used()
        return loss

    def check_state_used(self):
        """OneFlow ignores a state whose name the graph does not know; only of a loss scale may that happen silently."""
        unused = tensors.without_loss_scale(self.optimizer_state) - set(self.current_optimizer_state())
        if unused:
            raise RuntimeError(f"optimizer state without a place in the graph: {sorted(unused)[:3]}")
        self.optimizer_state = {}

    # --- scoring ------------------------------------------------------------------------------------------------------

    def predict(self, split):
        """Score every row of a split once, in row order -> `metrics.Scores`"""
        batches = eval_batches(read_rows, self.dataset, split, self.args.batch_size,
                               rank=rank(), world_size=world_size())
        probs, columns = self.score(batches, split.num_rows, split.name)
        return metrics.Scores(probs, **dict(zip(["labels", *split.extras], columns)))

    def score(self, batches, num_rows, name):
        """The same for the pairs that `eval_batches` yields -> (probabilities float32 (n,), [labels (n,), ...])

        name: for the progress bar.
        """
        probs, columns, done = np.empty(num_rows, np.float32), None, 0
        with closing(progress_bar(num_rows, " rows", name)) as bar:
            for batch_probs, parts in self.probabilities(batches):
                columns = columns or [np.empty(num_rows, part.dtype) for part in parts]
                part = slice(done, done + len(batch_probs))
                for column, values in zip([probs, *columns], [batch_probs, *parts]):
                    column[part] = values
                done = part.stop
                bar.update(len(batch_probs))
        return probs, columns

    def probabilities(self, batches):
        """For pairs of (Batch, rest) yield (probabilities float32 (n,) of the whole global batch, rest).

        Raises: UserError when a probability is not a number.
        """
        if self.eval_graph is None:
            self.eval_graph = EvalGraph(self.model.eval(), self.args.amp, self.args.negative_sampling_rate)
        self.model.eval()
        placement, pending = self.device.placement, None
        with prefetched(batches) as stream:
            for batch, rest in stream:
                output = self.eval_graph(to_split(batch.ids, placement), to_split(batch.weights, placement))
                if pending:  # one batch behind, so that reading a result does not hold up the next batch
                    yield tensors.finite_probabilities(*pending[:2]), pending[2]
                pending = (output, batch.num_global, rest)
        if pending:
            yield tensors.finite_probabilities(*pending[:2]), pending[2]
        self.model.train()

    def evaluate(self, split_name, epoch, log=None):
        """Score a split and print two lines -> {metric: value}"""
        started = time.time()
        scores = metrics.with_both_labels(self.predict(self.dataset.splits[split_name]), split_name)
        values, samples = compute_metrics(scores), len(scores.probs)
        seconds, texts = time.time() - started, [f"{split_name} {METRICS[name].title} {value:.6f}"
                                                 for name, value in values.items()]
        print_rank0(f"Rank[{rank()}], Epoch {epoch}, Step {self.step}, {', '.join(texts[:2])}, Samples {samples}, "
                    f"Eval_time {seconds:.2f} s\n  {', '.join(texts[2:])}")
        if log:
            decides = {"monitor": MONITORS[self.args.monitor].value(values)} if split_name == "val" else {}
            log.write(split_name, self.step, epoch=epoch, **values, **decides, samples=samples,
                      seconds=round(seconds, 3), host_memory_mb=run_log.host_memory(), **self.device.memory())
        return values

    # --- what a checkpoint keeps --------------------------------------------------------------------------------------

    def state(self):
        """Parts of state.json."""
        args, dataset = self.args, self.dataset
        return {
            "model": {"fields": dataset.fields, "table_sizes": dataset.table_sizes, "lists": dataset.lists,
                      **{name: getattr(args, name) for name in MODEL_OPTIONS}},
            "data": {"dir": dataset.folder, "fingerprint": dataset.fingerprint},
            "run": {"train_rows": dataset.splits["train"].num_rows, "train_digest": dataset.train_digest(),
                    **{name: getattr(args, name) for name in SAME_IN_A_RUN}},
            **self.progress_state(),
        }

    def dense_tensors(self):
        return tensors.dense_arrays(self.model, self.current_optimizer_state(), TABLES)

    def load_dense(self, saved, folder, to_train):
        """saved: {name: array}; Adam's state, twice as large as the model, is kept only if it is needed to train."""
        self.train_graph, self.optimizer_state = None, {}  # frees the moments that a graph holds
        rest = tensors.load_dense(self.model, saved, TABLES, self.device.placement, folder)
        self.optimizer_state = rest if to_train else {}

    def save_rows(self, store, snapshot):
        state, name = self.current_optimizer_state(), f"model.{store.name}.weight"
        moments = [state.get(f"{name}-{moment}") for moment in OPTIMIZERS[store.optimizer]]
        self.device.save_rows(self.model.tables()[store.name].weight, store, snapshot, moments)

    def load_rows(self, store, snapshot, blocks, to_train):
        """snapshot: what the rows are called where OneEmbedding keeps them; blocks: of (ids, rows), for host memory."""
        table, with_moments = self.model.tables()[store.name].weight, to_train and bool(self.optimizer_state)
        moments = self.device.load_rows(table, store, snapshot, blocks, with_moments)
        self.optimizer_state.update({f"model.{store.name}.weight-{name}": tensor for name, tensor in moments.items()})


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


def batches_of_epoch(trainer):
    """This process's batches of the current epoch from the current step on, with dropout masks where they are fed."""
    args = trainer.args
    batches = train_batches(read_rows, trainer.dataset, args.batch_size, seed=args.seed, epoch=trainer.epoch,
                            rank=rank(), world_size=world_size(), first_step=trainer.step_in_epoch)
    for step, batch in enumerate(batches, trainer.step):
        if trainer.device.feeds_masks and args.net_dropout > 0:
            batch.masks = draw_masks(args.dnn, len(batch.ids), args.net_dropout, args.seed, step, rank())
        yield batch


def train_epoch(trainer, checkpointer, clock, log):
    """Train to the end of the epoch or of the run, with all that is due on the way."""
    with prefetched(batches_of_epoch(trainer)) as batches, closing(
            progress_bar(trainer.steps_per_epoch, " steps", f"epoch {trainer.epoch}", trainer.step_in_epoch)) as bar:
        clock.start()
        for batch in batches:
            loss = trainer.train_step(batch)
            trainer.losses.add(loss, trainer.step_weight, trainer.step)  # reads the loss of the step before
            clock.count(batch.num_global)
            bar.update()
            finish_step(trainer, checkpointer, clock, log)
            if trainer.is_finished():
                break
        clock.stop()


def finish_step(trainer, checkpointer, clock, log):
    """Log, evaluate and save, where that is due."""
    args = trainer.args
    if clock.steps == 1:
        with clock.paused(trainer.losses):
            print_rank0(run_log.first_step_text(trainer, clock))
    if trainer.step % args.loss_print_interval == 0 or trainer.steps_left() <= 0:
        with clock.paused(trainer.losses):
            run_log.log_step(trainer, clock, log)
    if trainer.is_epoch_over():
        trainer.begin_epoch()
    if trainer.is_evaluation_due():
        with clock.paused(trainer.losses):
            evaluate_and_save(trainer, checkpointer, log)
    elif args.checkpoint_interval and trainer.step % args.checkpoint_interval == 0:
        with clock.paused(trainer.losses):
            checkpointer.save(trainer, [f"step_{trainer.step}"])


def evaluate_and_save(trainer, checkpointer, log):
    """Evaluate, decide on learning rate, stop and best, print that, and save."""
    args, plateau, epoch = trainer.args, trainer.plateau, trained_epoch(trainer.progress_state()["progress"])
    values = trainer.evaluate("val", epoch, log)
    rate, improved = plateau.learning_rate, plateau.update(MONITORS[args.monitor].value(values))
    if improved:
        trainer.best = {"epoch": epoch, "step": trainer.step, **values}
    print_rank0(run_log.decision_text(trainer, epoch, values, rate))
    names = ["best_checkpoint"] if improved else []  # first: what a kill leaves of this step says that it is the best
    if args.save_model_after_each_eval:
        names.append(f"step_{trainer.step}_val_auc_{values['auc']:0.5f}")
    if args.model_save_dir:
        names.append(f"step_{trainer.step}")  # last, because --resume then takes the evaluation for done
    if names:
        checkpointer.save(trainer, names)


def train(trainer, checkpointer, log):
    """Epochs to the end of the run or to an early stop, then val and test with the best checkpoint."""
    args, started, clock = trainer.args, time.time(), run_log.StepClock()
    if args.save_initial_model and trainer.step == 0:
        checkpointer.save(trainer, ["initial_checkpoint"])
    if trainer.is_epoch_over():  # resumed with another number of processes
        trainer.begin_epoch()
        if not args.eval_interval or trainer.steps_left() <= 0 and trainer.step % args.eval_interval:
            evaluate_and_save(trainer, checkpointer, log)
    while not trainer.is_finished():
        train_epoch(trainer, checkpointer, clock, log)
    if trainer.best is None:
        raise UserError(f"nothing is left to train after step {trainer.step} and nothing was evaluated yet; use more "
                        f"--train_batches than {args.train_batches}" + (" and --epochs" if args.epochs else ""))
    best = os.path.join(checkpointer.save_dir, "best_checkpoint")
    checkpointer.load(trainer, best, to_train=False)
    print_rank0(f"Best epoch {trainer.best['epoch']}, step {trainer.best['step']}:")
    for split in ("val", "test"):
        trainer.evaluate(split, trainer.best["epoch"], log if split == "test" else None)
    if clock.seconds:
        print_rank0(f"Trained {clock.samples} samples in {clock.seconds:.1f} s, mean throughput "
                    f"{clock.samples / clock.seconds:.1f} samples/s; total time {time.time() - started:.1f} s")
    if args.model_save_dir:
        print_rank0(f"Best checkpoint: {best}\nPredict with: {run_log.predict_command(args, best)}")
    else:
        print_rank0("No --model_save_dir: the checkpoint is not kept")
        on_rank0(shutil.rmtree, checkpointer.save_dir)
        checkpointer.prune()


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation and prediction
# ---------------------------------------------------------------------------------------------------------------------


def load(folder, device="auto", batch_size=1000):
    """The model of a checkpoint, for use in this process: a Predictor. batch_size: rows scored at a time.

    Raises: UserError where the folder holds no whole checkpoint.
    """
    check_thread()
    args = parse_args([f"--model_load_dir={folder}", "--predict=-", "--predict_output=-", f"--device={device}",
                       f"--batch_size={batch_size}", "--overwrite"], raise_error)
    prepare_graphs()
    return Predictor(open_checkpoint(args, str(folder))[0])


# ---------------------------------------------------------------------------------------------------------------------
# Runs
# ---------------------------------------------------------------------------------------------------------------------


def open_checkpoint(args, folder, dataset=None):
    """(Trainer, its Checkpointer) with a checkpoint's model, to score with; dataset: None for one without splits."""
    state = adopt_model(args, folder)
    model = state["model"]
    dataset = dataset or Dataset({}, model["fields"], model["table_sizes"], model.get("lists"))
    return start_trainer(args, dataset, folder, to_train=False)


def start_trainer(args, dataset, folder=None, to_train=True, run_id=None):
    """(Trainer, its Checkpointer); folder: checkpoint to load, or None for a new model; run_id: of this run."""
    device, tables = DEVICES[args.device](), make_tables(args, dataset.num_ids)
    checkpointer = checkpoints.Checkpointer(
        save_dir_of(args), tables, run_id=run_id, keep=args.keep_checkpoints, appends=device.one_embedding,
        saves_all=not device.one_embedding or args.store_type != "cached_ssd", checksums=not args.skip_checksums)
    if folder:
        growth = check_data(args, dataset, folder, to_train)
        checkpointer.prepare(folder, device.one_embedding, growth)
    trainer = Trainer(args, dataset, device, tables)
    if folder:
        checkpointer.load(trainer, folder, to_train, growth)
    return trainer, checkpointer


def check_data(args, dataset, folder, to_train):
    """How the rows of a checkpoint's tables move where the dataset grew since (a Growth), else None.

    Raises: UserError where the dataset is another one.
    """
    state = from_rank0(checkpoints.read_checkpoint, folder)
    model, fingerprint = state["model"], state.get("data", {}).get("fingerprint")
    if None not in (fingerprint, dataset.fingerprint) and fingerprint != dataset.fingerprint:
        if to_train:
            return Growth(**share_arrays(lambda: vars(growth_of(folder, args.data_dir, args.new_rows))))
        raise UserError(f"{folder} was trained on rows encoded with another vocabulary than those of --data_dir "
                        f"{args.data_dir}; use the data it was trained on, the raw rows with --predict, or rows that "
                        "tools/encode_rows.py encodes for it")
    if (model["fields"], model["table_sizes"], model.get("lists", {})) != (
            dataset.fields, dataset.table_sizes, dataset.lists):
        raise UserError(f"{folder} was trained on other fields or table sizes than those of --data_dir "
                        f"{args.data_dir}; use the data it was trained on")
    return None


def save_dir_of(args):
    """Without --model_save_dir the best checkpoint lives beside the table until the run ends."""
    return args.model_save_dir or os.path.join(args.persistent_path, ".deepfm-best")


def start_run(args, dataset):
    """A new, continued or resumed run -> (Trainer, Checkpointer, step it resumes from or None)"""
    save_dir, tables = save_dir_of(args), make_tables(args, dataset.num_ids)
    if args.resume:
        checkpoints.prepare_resume(save_dir, tables)
    else:
        if args.model_load_dir and args.overwrite_tables:  # which comes before the model is looked at
            adopt_model(args, args.model_load_dir)
            check_data(args, dataset, args.model_load_dir, to_train=True)
        checkpoints.prepare_new_run(save_dir, tables, args.data_dir, args.model_load_dir, args.overwrite_tables)
    started = from_rank0(checkpoints.read_run, save_dir)
    found = from_rank0(checkpoints.find_checkpoints, save_dir) if args.resume else {}
    if not found:
        if args.resume:
            print_rank0(f"No complete checkpoint in {save_dir} yet: starting from the beginning")
        if started["model_load_dir"]:
            adopt_model(args, started["model_load_dir"])
        trainer, checkpointer = start_trainer(args, dataset, started["model_load_dir"], run_id=started["run_id"])
        trainer.step = 0
        if args.resume:
            checkpointer.prune()
        return trainer, checkpointer, 0 if args.resume else None
    name, state = list(found.items())[-1]
    folder = os.path.join(save_dir, name)
    adopt_model(args, folder)
    options = {option: getattr(args, option) for option in SAME_IN_A_RUN}
    earlier = {option: getattr(make_parser().parse_args([]), option) for option in SAME_IN_A_RUN}
    checkpoints.check_same_run({**earlier, **state["run"]}, name, options, dataset, args.data_dir)
    trainer, checkpointer = start_trainer(args, dataset, folder, run_id=started["run_id"])
    trainer.load_progress(state)
    checkpointer.prune()
    print_rank0(f"Resuming from {folder}: epoch {trainer.epoch}, step {trainer.step}")
    return trainer, checkpointer, trainer.step


def run(args):
    prepare_run(on_cpu=args.device == "cpu")
    if args.predict:
        trainer, _ = open_checkpoint(args, args.model_load_dir)
        run_log.describe(trainer)
        return write_predictions(trainer)
    num_samples = {split: getattr(args, f"num_{split}_samples") for split in SPLITS}
    dataset = all_agree(read_dataset, args.data_dir, args.table_size_array, num_samples, args.weight_column,
                        args.group_column, not args.skip_checksums)
    check_same_data(dataset, args.data_dir)
    if args.eval_only:
        trainer, _ = open_checkpoint(args, args.model_load_dir, dataset)
        state = from_rank0(checkpoints.read_checkpoint, args.model_load_dir)
        run_log.describe(trainer, trained_with=state["run"])
        for split in ("val", "test"):
            trainer.evaluate(split, trained_epoch(state["progress"]))
        return None
    with ExitStack() as held:
        hold_paths([getattr(args, option) for option in TABLES.values()], held)
        if args.model_save_dir:
            on_rank0(hold, args.model_save_dir, held, f"another run is saving to {args.model_save_dir}; wait for its "
                     "end or stop it")
        trainer, checkpointer, resumed_step = start_run(args, dataset)
        run_log.describe(trainer)
        on_rank0(write_record, args, dataset, checkpointer.run_id, resumed_step, trainer.device.machine())
        log = held.enter_context(closing(run_log.MetricsLog(args.log_dir, resumed_step)))
        return train(trainer, checkpointer, log)


def main(argv=None):
    args = parse_args(argv)
    run_together(lambda: run(args), "; continue with --resume" if args.model_save_dir else "")


if __name__ == "__main__":
    main()
