"""Fixtures: a tiny dataset of three fields with a learnable label, and ways to run the trainer as users do."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

TABLE_SIZES = [7, 11, 40]


def pytest_configure(config):
    for category in ("FutureWarning", "DeprecationWarning"):  # petastorm uses pyarrow's old interfaces
        config.addinivalue_line("filterwarnings", f"ignore::{category}:petastorm")


def write_split(folder, labels, ids, row_group_rows, names=None):
    """One parquet file; labels (n,), ids int (n, F) global."""
    folder.mkdir(parents=True, exist_ok=True)
    names = names or [f"f{i}" for i in range(ids.shape[1])]
    columns = {"Label": labels.astype(np.float32), **{name: ids[:, i] for i, name in enumerate(names)}}
    pq.write_table(pa.table(columns), folder / "part-00000.parquet", row_group_size=row_group_rows)


def make_dataset(folder, rows=(403, 101, 97), table_sizes=TABLE_SIZES, row_group_rows=51, seed=0, info=True):
    """A dataset as design.md says. The label follows the parity-like interaction of the first two fields."""
    rng = np.random.default_rng(seed)
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


def trainer_command(data_dir, work_dir, *options, processes=1):
    """The command line of a small training run whose files lie in work_dir."""
    script = [str(ROOT / "deepfm_train_eval.py")]
    if processes > 1:
        port = 20000 + os.getpid() % 20000
        launch = ["-m", "oneflow.distributed.launch", "--nproc_per_node", str(processes), "--master_port", str(port)]
        script = [*launch, *script]
    return [sys.executable, *script, "--data_dir", str(data_dir), "--persistent_path", str(Path(work_dir) / "tables"),
            "--persistent_path_fm", str(Path(work_dir) / "tables_fm"), "--device", "cpu", "--dnn", "8,8",
            "--embedding_vec_size", "4", "--batch_size", "64", "--learning_rate", "0.01", *map(str, options)]


def run_trainer(data_dir, work_dir, *options, processes=1, status=0, timeout=120):
    """Run it; returns (stdout, stderr)."""
    command = trainer_command(data_dir, work_dir, *options, processes=processes)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=timeout)
    assert result.returncode == status, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout, result.stderr
