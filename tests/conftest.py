"""Fixtures: a tiny dataset of three fields with a learnable label, and ways to run the trainer as users do."""

import contextlib
import importlib.util
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

TABLE_SIZES = [7, 11, 40]
ROWS = 32  # batch size of `make_trainer`
HAS_SPARK = bool((shutil.which("java") or os.environ.get("JAVA_HOME")) and importlib.util.find_spec("pyspark"))
ONE_BY_ONE = ("test_ends.py", "test_nodes.py", "test_launcher.py")  # tests that share nothing
needs_spark = pytest.mark.skipif(not HAS_SPARK, reason="the Spark engine needs Java and pyspark")


def pytest_configure(config):
    from tools.trainer import startup

    startup.prepare_run(on_cpu=False)  # before the first graph, as in a run: graphs here are tiny
    startup.calm_scheduler = lambda: None  # what starts a graph must not be displaced, see there
    for category in ("FutureWarning", "DeprecationWarning"):  # petastorm uses pyarrow's old interfaces
        config.addinivalue_line("filterwarnings", f"ignore::{category}:petastorm")
    config.addinivalue_line("markers", "xdist_group(name): of pytest-xdist, which single tests do without")


@pytest.hookimpl(tryfirst=True)  # pytest-xdist reads the marks in the same hook
def pytest_collection_modifyitems(items):
    """Where several processes share the tests, they do so by files, but one has all those on Spark, for one Java.

    It has them beside the file with the most tests, with which pytest-xdist begins, since they take long. It ends with
    what is dealt out one by one.
    """
    for item in items:
        name = "test_table_to_parquet.py" if "run_on_spark" in item.fixturenames else item.path.name
        if name not in ONE_BY_ONE:
            item.add_marker(pytest.mark.xdist_group(name))


def write_split(folder, labels, ids, row_group_rows, names=None):
    """One parquet file; labels (n,), ids int (n, F) global."""
    folder.mkdir(parents=True, exist_ok=True)
    names = names or [f"f{i}" for i in range(ids.shape[1])]
    columns = {"Label": labels.astype(np.float32), **{name: ids[:, i] for i, name in enumerate(names)}}
    pq.write_table(pa.table(columns), folder / "part-00000.parquet", row_group_size=row_group_rows)


def make_dataset(folder, rows=(403, 101, 97), table_sizes=TABLE_SIZES, row_group_rows=51, seed=0, info=True,
                 digests=False):
    """A dataset as design.md says. The label follows the parity-like interaction of the first two fields."""
    rng = np.random.default_rng(seed)
    from tools.trainer.dataset_info import digests_of

    offsets = np.concatenate([[0], np.cumsum(table_sizes)[:-1]])
    for name, count in zip(("train", "val", "test"), rows):
        local = np.stack([np.minimum(rng.geometric(0.3, count) - 1, size - 1) for size in table_sizes], axis=1)
        score = 2.0 * ((local[:, 0] + local[:, 1]) % 2) - 1.0
        labels = rng.random(count) < 1 / (1 + np.exp(-1.5 * score))
        write_split(Path(folder) / name, labels, (local + offsets).astype(np.int32), row_group_rows)
    if info:
        fields = [{"name": f"f{i}", "table_size": size, "offset": int(offset)}
                  for i, (size, offset) in enumerate(zip(table_sizes, offsets))]
        description = {"format_version": 1, "label": "Label", "fields": fields,
                       "num_samples": dict(zip(("train", "val", "test"), rows)), "source": {"tool": "tests"}}
        if digests:
            description["files"] = digests_of(str(folder))
        (Path(folder) / "dataset_info.json").write_text(json.dumps(description))
    return Path(folder)


@pytest.fixture
def dataset_dir(tmp_path):
    return make_dataset(tmp_path / "data")


@pytest.fixture(scope="session")
def shared_dataset_dir(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("shared") / "data")


@pytest.fixture(scope="session")
def distinct_dataset_dir(tmp_path_factory):
    """No two rows to score are equal: their scores differ in the last bit between processes, and so would the AUC."""
    folder = make_dataset(tmp_path_factory.mktemp("distinct") / "data", rows=(403, 300, 300))
    info = json.loads((folder / "dataset_info.json").read_text())
    for name in ("val", "test"):
        path = folder / name / "part-00000.parquet"
        rows = pd.read_parquet(path)
        rows = rows.drop_duplicates([column for column in rows if column != "Label"])
        rows.to_parquet(path, index=False)
        info["num_samples"][name] = len(rows)
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return folder


@pytest.fixture(scope="session")
def weighted_dataset_dir(tmp_path_factory):
    """Two columns that are no fields: weights w, some of them 0, and users, text with a missing one here and there."""
    rng = np.random.default_rng(8)
    folder = make_dataset(tmp_path_factory.mktemp("weighted") / "data", rows=(403, 301, 299))
    for name in ("train", "val", "test"):
        path = folder / name / "part-00000.parquet"
        rows = pq.read_table(path)
        weights = np.round(rng.exponential(size=len(rows)), 2) * (rng.random(len(rows)) < 0.9)
        users = [f"user{number}" if number else None for number in rng.geometric(0.2, len(rows)) - 1]
        rows = rows.add_column(1, "user", pa.array(users)).append_column("w", pa.array(weights))
        pq.write_table(rows, path, row_group_size=51)
    return folder


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def trainer_command(data_dir, work_dir, *options, processes=1, script=ROOT / "deepfm_train_eval.py"):
    """The command line of a small training run whose files lie in work_dir; script: in the trainer's place."""
    launch = []
    if processes > 1:
        launch = ["-m", "oneflow.distributed.launch", "--nproc_per_node", str(processes), "--master_port",
                  str(free_port())]
    return [sys.executable, *launch, str(script), "--data_dir", str(data_dir), "--persistent_path",
            str(Path(work_dir) / "tables"), "--persistent_path_fm", str(Path(work_dir) / "tables_fm"), "--device",
            "cpu", "--dnn", "8,8", "--embedding_vec_size", "4", "--batch_size", "64", "--learning_rate", "0.01",
            *map(str, options)]


def run_trainer(data_dir, work_dir, *options, processes=1, status=0, timeout=120, **script):
    """Run it; returns (stdout, stderr). Several processes get what the launcher gives them, which takes longer."""
    command, port, started = trainer_command(data_dir, work_dir, *options, **script), free_port(), []
    for rank in range(processes):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        if processes > 1:
            environment.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(processes),
                               RANK=str(rank), LOCAL_RANK=str(rank))
        started.append(subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                        env=environment))
    outputs = at_the_same_time(*(partial(process.communicate, timeout=timeout) for process in started))
    assert [process.returncode for process in started] == [status] * processes, f"{command}\n{outputs}"
    return tuple(map("".join, zip(*outputs)))


@contextlib.contextmanager
def locked(path):
    """Another process has locked a file with fcntl, as OneFlow does. Raises: CalledProcessError where it cannot."""
    script = ("import fcntl, sys; file = open(sys.argv[1], 'r+'); fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB); "
              "print(flush=True); sys.stdin.read()")
    with subprocess.Popen([sys.executable, "-c", script, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          stderr=subprocess.DEVNULL) as process:
        if not process.stdout.readline():
            raise subprocess.CalledProcessError(process.wait(), script)
        yield
        process.stdin.close()


def at_the_same_time(*works):
    """What the functions return, which wait for processes."""
    with ThreadPoolExecutor(len(works)) as pool:
        return [future.result() for future in [pool.submit(work) for work in works]]


def metrics_lines(output, split):
    """[(AUC, logloss)] of the trainer's lines on a split."""
    found = re.findall(rf"{split} AUC ([\d.]+), {split} LogLoss ([\d.]+)", output)
    return [(float(auc), float(logloss)) for auc, logloss in found]


# --------------------------------------------------------------------------------------------------------------- Spark


# Java keeps the first context's local folder, which is gone then, and would make it again for the next one
SPARK_TOOLS = """
import importlib, json, sys
from pyspark import SparkContext
from tools.converter import raw
for line in sys.stdin:
    tool, raw.BLOCK_BYTES, options = json.loads(line)
    status = importlib.import_module(tool).main(options) or 0
    if SparkContext._jvm:
        getattr(getattr(SparkContext._jvm.org.apache.spark.util, "Utils$"), "MODULE$").clearLocalRootDirs()
    print("STATUS", status, flush=True)
"""


@pytest.fixture(scope="session")
def run_on_spark(tmp_path_factory):
    """Run a tool on Spark in a process for all of them: the first start of Java takes most of the time.

    Returns (exit status, output, errors) of the tool, and of Java. The current folder is one beside tmp_path, and must
    be empty at the end. None where Spark does not run.
    """
    if not HAS_SPARK:
        yield None
        return
    folder = tmp_path_factory.mktemp("spark")
    errors = folder.with_name(f"{folder.name}-errors")
    java = {"SPARK_SUBMIT_OPTS": "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC"}  # starts in half of the time
    with errors.open("w") as file, errors.open() as new_errors, subprocess.Popen(
            [sys.executable, "-c", SPARK_TOOLS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, text=True,
            cwd=folder, env={**os.environ, **java, "PYTHONPATH": f"{ROOT}:{ROOT / 'tools'}"}) as process:

        def run(tool, *options, cores=2, block_bytes=20_000):  # small blocks, so that there are several tasks
            options = [*map(str, options), "--engine", "spark", "--spark_master", f"local[{cores}]", "--memory_gb", "1"]
            print(json.dumps([tool, block_bytes, options]), file=process.stdin, flush=True)
            lines = []
            for line in process.stdout:
                if line.startswith("STATUS "):
                    return int(line.split()[1]), "".join(lines), new_errors.read()
                lines.append(line)
            raise AssertionError(f"{tool} ended the process with {process.wait()}: {new_errors.read()}")

        yield run
    assert os.listdir(folder) == []


# ----------------------------------------------------------------------------------------- the trainer in this process


def assert_same(first, second):
    """{name: array} equal bit for bit. With OneFlow 0.8.0 a process in six rounds now and then another way."""
    import oneflow

    compare = np.allclose if oneflow.__version__.startswith("0.8.") else np.array_equal
    assert first.keys() == second.keys()
    for name in first:
        assert compare(first[name], second[name]), name


def no_end():
    """A trainer that ends with an error must not end the process of the tests."""
    return mock.patch.object(os, "_exit", side_effect=AssertionError("the trainer ended with an error"))


def main_here(*arguments):
    """The trainer in this process, which saves its start; returns stdout."""
    from deepfm_train_eval import main

    with no_end(), contextlib.redirect_stdout(io.StringIO()) as output:
        main([*map(str, arguments)])
    return output.getvalue()


def train_here(data_dir, work_dir, *options):
    """As `run_trainer` in this process; returns stdout."""
    return main_here(*trainer_command(data_dir, work_dir, *options)[2:])


@pytest.fixture
def run_here(capfd):
    """Run the trainer in this process, which saves its start; returns what it prints."""
    from deepfm_train_eval import main

    def run(data_dir, work, *options):
        capfd.readouterr()
        with no_end():
            main(trainer_command(data_dir, work, *options)[2:])
        return capfd.readouterr().out

    return run


@pytest.fixture
def fails(monkeypatch, capfd):
    """Run the trainer in this process; it must stop with status 1 and one error line, which is returned."""
    from deepfm_train_eval import main

    def leave(status):
        raise SystemExit(status)

    monkeypatch.setattr(os, "_exit", leave)

    def run(data_dir, work, *options):
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(trainer_command(data_dir, work, *options)[2:])
        errors = capfd.readouterr().err
        lines = [line for line in errors.splitlines() if line.startswith("error: ")]
        assert ended.value.code == 1 and len(lines) == 1 and "Traceback" not in errors
        return lines[0]

    return run


def make_trainer(data_dir, folder, *options):
    """A Trainer of a new model on CPU with larger rows than N(0, 1e-4), so that all terms matter."""
    from deepfm_train_eval import parse_args, read_dataset, start_trainer

    args = parse_args(["--data_dir", str(data_dir), "--persistent_path", f"{folder}/t", "--persistent_path_fm",
                       f"{folder}/f", "--device", "cpu", "--dnn", "8,6", "--embedding_vec_size", "4", "--batch_size",
                       str(ROWS), "--train_batches", "1000", *map(str, options)])
    trainer, trainer.checkpointer = start_trainer(args, read_dataset(str(data_dir)), run_id="test")
    enlarge_rows(trainer.model)
    return trainer


def enlarge_rows(model):
    rng = np.random.default_rng(5)
    for table in model.tables().values():
        rows = table.weight.detach().to_local().numpy()
        rows[:-1] = rng.normal(size=rows[:-1].shape) * 0.3


def values_of(model):
    """{name: array} as `Reference` names them; a copy."""
    state = {name: value.to_local().numpy().copy() for name, value in model.state_dict().items()}
    values = {name.split(".", 1)[1]: value for name, value in state.items() if name.startswith("dnn.")}
    return {**values, "embedding": state["embedding.weight"], "embedding_fm": state["embedding_fm.weight"]}


def random_batches(dataset, count, seed=3, last_rows=ROWS - 9):
    """(ids, labels) per step; the last one is shorter, so that the graph gets padding rows."""
    rng = np.random.default_rng(seed)
    for step in range(count):
        size = last_rows if step == count - 1 else ROWS
        ids = np.stack([rng.integers(low, high, size) for low, high in zip(dataset.offsets, dataset.offsets[1:])], 1)
        yield ids, (rng.random(size) < 0.4).astype(np.float32)


def batch_of(dataset, ids, labels, *weights):
    """A Batch of ROWS rows for one process."""
    from tools.trainer.batches import Batch

    return Batch([(ids, labels, *weights)], ROWS, len(ids), dataset.num_ids)
