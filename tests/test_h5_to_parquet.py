"""tools/h5_to_parquet.py on small files of every FuxiCTR generation, against a plain reading of the same files."""
import glob
import json
import os
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

TOOL = Path(__file__).resolve().parents[1] / "tools" / "h5_to_parquet.py"
sys.path.insert(0, str(TOOL.parent))
import h5_to_parquet  # noqa: E402

VOCAB_SIZES = {"user": 400, "item": 30, "hour": 24, "clicked": 2, "C10": 7}  # `clicked` sorts after `C10` in h5 files
ROWS = {"train": 317, "valid": 110, "test": 103}
FORMATS = ["1.x", "1.x parts", "2.0", "2.1 parts", "2.2", "2.2 parts", "2.3", "2.3 parts", "2.3.0"]


# --- FuxiCTR's files, written as its versions write them (read in its sources, compared with real output) -----------

def random_rows(num_rows, seed):
    """`user` makes rows recognisable; the first and the last id of every field occur."""
    rng = np.random.default_rng(seed)
    columns = {name: rng.integers(0, size, num_rows) for name, size in VOCAB_SIZES.items()}
    columns["user"] = rng.permutation(VOCAB_SIZES["user"])[:num_rows]
    for name, size in VOCAB_SIZES.items():
        columns[name][:2] = 0, size - 1
    columns["clk"] = (rng.random(num_rows) < 0.3).astype(float)
    return columns


def write_feature_map(folder, style, features=None, labels=("clk",)):
    features = features or {name: {"source": "", "type": "categorical", "vocab_size": size}
                            for name, size in VOCAB_SIZES.items()}
    if style == "1.x":
        # written in another order than the columns: the index counts
        specs = {name: {**spec, "min_categr_count": 1, "index": index}
                 for index, (name, spec) in reversed(list(enumerate(features.items())))}
        content = {"dataset_id": "ds", "num_fields": len(specs), "input_length": len(specs), "feature_specs": specs}
    else:
        content = {"dataset_id": "ds", "num_fields": len(features), "total_features": 0, "labels": list(labels),
                   "features": [{name: {**spec, "padding_idx": 0}} for name, spec in features.items()]}
    (folder / "feature_map.json").write_text(json.dumps(content, indent=4))


def write_columns(path, columns):
    """One file; its extension says the format. A path without extension is 2.3.0's parquet."""
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".h5":
        with h5py.File(path, "w") as file:
            for name, values in columns.items():
                file.create_dataset(name, data=values)
    elif path.suffix == ".npz":
        np.savez(path, **columns)
    else:
        pd.DataFrame(dict(reversed(list(columns.items())))).to_parquet(path, index=False, engine="pyarrow")


def write_table(path, columns):
    with h5py.File(path, "w") as file:
        file.create_dataset("data", data=np.stack([values.astype(float) for values in columns.values()], axis=1))


def write_split(folder, form, split, columns):
    num_rows = len(columns["clk"])
    blocks = [range(start, min(start + 10, num_rows)) for start in range(0, num_rows, 10)]  # 11 parts at least
    parts = [{name: values[block] for name, values in columns.items()} for block in blocks]
    if form == "1.x":
        write_table(folder / f"{split}.h5", columns)
    elif form == "1.x parts":
        for number, part in enumerate(parts):
            write_table(folder / f"{split}_part_{number}.h5", part)
    elif form == "2.1 parts":
        for number, part in enumerate(parts):
            write_columns(folder / split / f"part_{number}.h5", part)
    elif form.endswith("parts"):
        extension = {"2.2 parts": "npz", "2.3 parts": "parquet"}[form]
        for number, part in enumerate(parts):
            write_columns(folder / split / f"part_{number:05d}.{extension}", part)
    else:
        write_columns(folder / (split + {"2.0": ".h5", "2.2": ".npz", "2.3": ".parquet", "2.3.0": ""}[form]), columns)


def write_dataset(folder, form="2.0", splits=tuple(ROWS)):
    """A whole FuxiCTR folder. Returns {split: its columns}."""
    folder.mkdir(parents=True, exist_ok=True)
    write_feature_map(folder, form.split()[0])
    data = {split: random_rows(ROWS[split], seed) for seed, split in enumerate(ROWS)}
    for split in splits:
        write_split(folder, form, split, data[split])
    return data


# --- running the tool and reading its output -------------------------------------------------------------------------

def convert(tmp_path, *options):
    return h5_to_parquet.main([f"--input_dir={tmp_path / 'in'}", f"--output_dir={tmp_path / 'out'}",
                               f"--spark_tmp_dir={tmp_path / 'scratch'}", *options])


def read_split(tmp_path, split):
    files = sorted(glob.glob(str(tmp_path / "out" / split / "part-*.parquet")))
    return pa.concat_tables([pq.read_table(file) for file in files])


def expected_frame(columns):
    """The contract in plain pandas: Label, then local id + offset of the field."""
    frame, offset = {"Label": columns["clk"]}, 0
    for name, size in VOCAB_SIZES.items():
        frame[name] = columns[name] + offset
        offset += size
    return pd.DataFrame(frame)


def assert_refused(tmp_path, capsys, *pieces, options=(), code=1):
    """One line on stderr that holds every piece, the exit code, no traceback, nothing left in the output folder."""
    try:
        result = convert(tmp_path, *options)
    except SystemExit as stop:
        result = stop.code
    text = capsys.readouterr().err.strip().splitlines()[-1]
    assert result == code
    assert text.startswith("error: ") or ": error: " in text
    for piece in pieces:
        assert piece in text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", FORMATS)
def test_rows_of_every_generation(tmp_path, form):
    data = write_dataset(tmp_path / "in", form)
    assert not convert(tmp_path)
    for split, name in zip(ROWS, ("train", "val", "test")):
        table = read_split(tmp_path, name)
        assert table.column_names == ["Label", *VOCAB_SIZES]
        assert table.schema.field("Label").type == pa.float32()
        assert all(pa.types.is_integer(table.schema.field(field).type) for field in VOCAB_SIZES)
        rows, expected = table.to_pandas(), expected_frame(data[split])
        if split == "train":
            assert not np.array_equal(rows["user"], expected["user"])  # shuffled
            rows, expected = (frame.sort_values(list(frame), ignore_index=True) for frame in (rows, expected))
        pd.testing.assert_frame_equal(rows, expected, check_dtype=False)


def test_dataset_info(tmp_path):
    write_dataset(tmp_path / "in")
    convert(tmp_path)
    info = json.loads((tmp_path / "out" / "dataset_info.json").read_text())
    assert info["label"] == "Label"
    assert info["num_samples"] == {"train": 317, "val": 110, "test": 103}
    assert info["fields"] == [{"name": name, "table_size": size, "offset": offset} for (name, size), offset
                              in zip(VOCAB_SIZES.items(), [0, 400, 430, 454, 456])]
    assert "README.md" in os.listdir(tmp_path / "out")
