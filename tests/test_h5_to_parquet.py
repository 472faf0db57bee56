"""tools/h5_to_parquet.py on small files of every FuxiCTR generation, against a plain reading of the same files."""
import contextlib
import io
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
from pathlib import Path

import encode_rows
import h5_to_parquet
import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tools.converter.encoders import Encoder
from tools.trainer.dataset_info import digest_of

TOOL = Path(__file__).resolve().parents[1] / "tools" / "h5_to_parquet.py"

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
    return pq.read_table(tmp_path / "out" / split)


def expected_frame(columns):
    """The contract in plain pandas: Label, then local id + offset of the field."""
    frame, offset = {"Label": columns["clk"]}, 0
    for name, size in VOCAB_SIZES.items():
        frame[name] = columns[name] + offset
        offset += size
    return pd.DataFrame(frame)


def assert_refused(tmp_path, capsys, *pieces, options=()):
    """Exit code 1, one error line that holds every piece, nothing left behind."""
    before = set(os.listdir(tmp_path)) | {"scratch"}
    assert convert(tmp_path, *options) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    for piece in pieces:
        assert piece in lines[0]
    assert set(os.listdir(tmp_path)) <= before
    assert not any((tmp_path / "scratch").glob("*"))


@pytest.fixture
def tiny_blocks(monkeypatch):
    monkeypatch.setattr(h5_to_parquet, "CHUNK_ROWS", 7)


def assert_same_rows(tmp_path, data):
    for split, name in zip(ROWS, ("train", "val", "test")):
        rows, expected = read_split(tmp_path, name).to_pandas(), expected_frame(data[split])
        if split == "train":
            assert not np.array_equal(rows["user"], expected["user"])  # shuffled
            rows, expected = (frame.sort_values(list(frame), ignore_index=True) for frame in (rows, expected))
        pd.testing.assert_frame_equal(rows, expected, check_dtype=False)


@pytest.mark.parametrize("form", FORMATS)
def test_rows_of_every_generation(tmp_path, form, tiny_blocks):
    data = write_dataset(tmp_path / "in", form)
    assert convert(tmp_path) == 0
    assert_same_rows(tmp_path, data)
    schema = read_split(tmp_path, "val").schema
    assert schema.names == ["Label", *VOCAB_SIZES]
    assert schema.types == [pa.float32()] + [pa.int32()] * len(VOCAB_SIZES)


def test_other_layouts_of_the_same_formats(tmp_path, tiny_blocks):
    """Not what FuxiCTR writes, but valid: compressed npz; small row groups; chunks and compression in h5."""
    data = {split: random_rows(ROWS[split], seed) for seed, split in enumerate(ROWS)}
    for form in ("npz", "parquet", "h5"):
        folder = tmp_path / form / "in"
        folder.mkdir(parents=True)
        write_feature_map(folder, "2.0")
        for split, columns in data.items():
            if form == "npz":
                np.savez_compressed(folder / f"{split}.npz", **columns)
            elif form == "parquet":
                frame = pd.DataFrame(columns).astype({"hour": "int8", "user": "float32", "clk": "bool"})
                frame.to_parquet(folder / f"{split}.parquet", row_group_size=13)
            else:
                with h5py.File(folder / f"{split}.h5", "w") as file:
                    for name, values in columns.items():
                        file.create_dataset(name, data=values, chunks=(5,), compression="gzip")
        assert convert(tmp_path / form) == 0
        assert_same_rows(tmp_path / form, data)


def test_files_named_after_the_csv_in_the_folder_below(tmp_path, capsys):
    """FuxiCTR 1.0 turns train_sample.csv into DATASET_ID/train_sample.h5; other files lie beside it."""
    data = write_dataset(tmp_path / "in" / "ds", "1.x")
    for split in ROWS:
        (tmp_path / "in" / "ds" / f"{split}.h5").rename(tmp_path / "in" / "ds" / f"{split}_sample.h5")
        (tmp_path / "in" / "ds" / f"{split}.csv").write_text("clk,user\n")
    (tmp_path / "in" / "ds" / "feature_encoder.pkl").write_bytes(b"x")
    assert convert(tmp_path) == 0
    assert_same_rows(tmp_path, data)
    out = capsys.readouterr().out
    assert f"{tmp_path / 'in' / 'ds'}: FuxiCTR 1.0-1.2 output, 5 fields" in out
    assert "train: 317 rows in" in out
    assert "valid_sample.h5" in out


def test_dataset_info(tmp_path, capsys):
    write_dataset(tmp_path / "in")
    assert convert(tmp_path, "--export_dataset_info") == 0
    text = (tmp_path / "out" / "dataset_info.json").read_text()
    info = json.loads(text)
    assert info["label"] == "Label"
    assert info["num_samples"] == {"train": 317, "val": 110, "test": 103}
    assert [(f["name"], f["table_size"], f["offset"], f["encoding"]["oov"]) for f in info["fields"]] == [
        (name, size, offset, size - 1) for (name, size), offset in zip(VOCAB_SIZES.items(), [0, 400, 430, 454, 456])]
    assert {f["encoding"]["kind"] for f in info["fields"]} == {"foreign"}  # there was no vocabulary
    assert info["source"]["encoding"] == "FuxiCTR 2.0-2.1"
    assert text in capsys.readouterr().out
    assert "README.md" in os.listdir(tmp_path / "out")


def test_shuffle_depends_on_the_seed_only(tmp_path, monkeypatch):
    write_dataset(tmp_path / "in")
    orders = []
    for seed, bucket_bytes in ((1, 10**9), (1, 1), (2, 10**9)):
        monkeypatch.setattr(h5_to_parquet, "MIN_BUCKET_BYTES", bucket_bytes)
        assert convert(tmp_path, f"--seed={seed}", "--overwrite") == 0
        orders.append(read_split(tmp_path, "train")["user"].to_pylist())
    assert orders[0] == orders[1] != orders[2]


def test_meta_columns_and_shared_tables_are_reported(tmp_path, capsys):
    data = write_dataset(tmp_path / "in", "2.2")
    features = {name: {"type": "categorical", "vocab_size": size} for name, size in VOCAB_SIZES.items()}
    features["item"]["share_embedding"] = "user"
    features = {"group_id": {"type": "meta"}, **features}
    write_feature_map(tmp_path / "in", "2.2", features)
    for split, columns in data.items():
        write_split(tmp_path / "in", "2.2", split, {"group_id": np.array(["a"] * ROWS[split]), **columns})
    assert convert(tmp_path) == 0
    assert_same_rows(tmp_path, data)
    out = capsys.readouterr().out
    assert "left out, because meta columns are no model input: group_id" in out
    assert "given tables of their own (shared in FuxiCTR): item" in out


def test_one_of_several_labels(tmp_path, capsys):
    data = write_dataset(tmp_path / "in")
    write_feature_map(tmp_path / "in", "2.0", labels=("buy", "clk"))
    assert_refused(tmp_path, capsys, "2 labels (buy, clk)", "choose one with --label")
    assert_refused(tmp_path, capsys, "--label like is not a label", "buy, clk", options=["--label=like"])
    assert convert(tmp_path, "--label=clk") == 0
    assert_same_rows(tmp_path, data)


# --- FuxiCTR's own vocabulary ----------------------------------------------------------------------------------------

def write_vocab(folder, change=None):
    """feature_vocab.json as FuxiCTR 2.x writes it: token -> id, padding 0, out-of-vocabulary last."""
    vocab = {}
    for name, size in VOCAB_SIZES.items():
        words = [f"{name} ü {i}" if name == "item" else str(3 * i) for i in range(1, size - 1)]
        vocab[name] = {"__PAD__": 0, **{word: i for i, word in enumerate(words, 1)}, "__OOV__": size - 1}
    if change:
        change(vocab)
    (folder / "feature_vocab.json").write_text(json.dumps(vocab, indent=4))
    return vocab


def test_fuxictr_vocabulary_is_taken_over(tmp_path, capsys):
    """New raw rows get FuxiCTR's ids; convert_to_bucket's fields are named."""
    data = write_dataset(tmp_path / "in", "2.3")
    vocab = write_vocab(tmp_path / "in")
    assert convert(tmp_path, "--buckets=C10") == 0
    assert_same_rows(tmp_path, data)
    assert "no vocabulary that can be read" not in capsys.readouterr().out
    rows = pd.DataFrame({"user": ["3", "6", "7", ""], "item": ["item ü 1", "item ü 28", "3", None],
                         "hour": [3, 66, 69, 0], "clicked": ["0"] * 4, "C10": ["", "3", "20", "5"]})
    rows.to_csv(tmp_path / "new.csv", index=False)
    assert encode_rows.main(["--dataset", str(tmp_path / "out"), "--input", str(tmp_path / "new.csv"), "--output_dir",
                             str(tmp_path / "new")]) == 0
    made = pq.read_table(tmp_path / "new").to_pandas()
    offset = 0
    for name, size in VOCAB_SIZES.items():
        def token(text, name=name):
            if name == "C10" and text:  # floor(ln(5)^2) is 2, of 20 it is 8
                return {"3": "1", "20": "8", "5": "2"}[text]
            return text
        expected = [vocab[name].get(token(str(text or "")), size - 1) + offset for text in rows[name]]
        assert made[name].tolist() == expected, name
        offset += size


@pytest.mark.parametrize("change", [
    lambda vocab: vocab["item"].update(more=29), lambda vocab: vocab["item"].pop("__OOV__"),
    lambda vocab: vocab.pop("item"), lambda vocab: vocab["item"].update({"item ü 1": 2}),
])
def test_vocabulary_that_is_not_of_consecutive_ids(tmp_path, capsys, change):
    """Shared embeddings leave holes in some versions; such a field trains, but its raw values cannot be encoded."""
    data = write_dataset(tmp_path / "in")
    write_vocab(tmp_path / "in", change)
    assert convert(tmp_path) == 0
    assert_same_rows(tmp_path, data)
    assert "for item (1): rows can be trained on" in capsys.readouterr().out
    kinds = {field.name: field.kind for field in Encoder.load(tmp_path / "out").fields}
    assert kinds == {**dict.fromkeys(VOCAB_SIZES, "category"), "item": "foreign"}
    assert encode_rows.main(["--dataset", str(tmp_path / "out"), "--input", str(tmp_path), "--output_dir", "x"]) == 1
    capsys.readouterr()


def test_pickles_are_not_opened(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "opened"),)

    write_dataset(tmp_path / "in", "1.x")
    (tmp_path / "in" / "feature_encoder.pkl").write_bytes(pickle.dumps(Bomb()))
    assert convert(tmp_path) == 0
    assert not (tmp_path / "opened").exists()
    assert all(len(field.described["digest"]) == 64 for field in Encoder.load(tmp_path / "out").fields)


@pytest.mark.parametrize("form", ["1.x", "2.0", "2.2 parts", "2.3"])
def test_one_split_like_a_dataset(tmp_path, capsys, form):
    write_dataset(tmp_path / "in", form)
    (tmp_path / "in" / "feature_encoder.pkl").write_bytes(b"x")
    if form != "1.x":
        write_vocab(tmp_path / "in")
    assert convert(tmp_path) == 0
    later = tmp_path / "later"
    data = write_dataset(later, form, splits=["test"])
    shutil.copy(tmp_path / "in" / "feature_encoder.pkl", later)
    if form != "1.x":
        write_vocab(later)

    def like(*options):
        return h5_to_parquet.main([f"--input_dir={later}", f"--output_dir={tmp_path / 'ids'}",
                                   f"--like={tmp_path / 'out'}", *options])
    assert like() == 0
    pd.testing.assert_frame_equal(pq.read_table(tmp_path / "ids").to_pandas(), expected_frame(data["test"]),
                                  check_dtype=False)
    info = json.loads((tmp_path / "ids" / "_dataset_info.json").read_text())
    assert info["num_samples"] == {"rows": ROWS["test"]}
    assert info["files"] == {path.name: digest_of(path) for path in (tmp_path / "ids").glob("*.parquet")} != {}
    assert info["fingerprint"] == Encoder.load(tmp_path / "out").fingerprint
    write_split(later, form, "valid", data["valid"])
    assert like("--overwrite") == 1
    assert "has val and test, expected one of train, valid and test; choose one with --split" in capsys.readouterr().err
    assert like("--overwrite", "--split=val") == 0
    # another vocabulary of the same size
    if form == "1.x":
        (later / "feature_encoder.pkl").write_bytes(b"y")
    else:
        write_vocab(later, lambda vocab: vocab["item"].update({"item ü 1": 2, "item ü 2": 1}))
    assert like("--overwrite", "--split=val") == 1
    assert "are not those of --like" in capsys.readouterr().err
    write_feature_map(later, form.split()[0], {name: {"type": "categorical", "vocab_size": 9} for name in VOCAB_SIZES})
    assert like("--overwrite", "--split=val") == 1
    assert "has other features or vocab_sizes than --like" in capsys.readouterr().err


def test_names_that_petastorm_cannot_read(tmp_path, capsys):
    write_dataset(tmp_path / "in", "2.0")
    features = {name: {"type": "categorical", "vocab_size": size} for name, size in VOCAB_SIZES.items()}
    features = {f"the-{name}": spec for name, spec in features.items()}
    write_feature_map(tmp_path / "in", "2.0", features)
    for seed, split in enumerate(ROWS):
        rows = random_rows(ROWS[split], seed)
        rows = {name if name == "clk" else f"the-{name}": values for name, values in rows.items()}
        write_split(tmp_path / "in", "2.0", split, rows)
    assert convert(tmp_path) == 0
    assert read_split(tmp_path, "val").column_names == ["Label", *(f"the_{name}" for name in VOCAB_SIZES)]


# --- what is refused ------------------------------------------------------------------------------------------------

def test_no_input(tmp_path, capsys):
    assert_refused(tmp_path, capsys, "in is not a folder")
    write_dataset(tmp_path / "in")
    (tmp_path / "in" / "feature_map.json").unlink()
    assert_refused(tmp_path, capsys, "no feature_map.json in", "one folder below")
    write_dataset(tmp_path / "in" / "a")
    write_dataset(tmp_path / "in" / "b")
    assert_refused(tmp_path, capsys, "2 data sets below", "a, b")


GOOD = {"type": "categorical", "vocab_size": 5}
BAD_MAPS = {
    "not JSON": ("{", "cannot be used (Expecting property name"),
    "deep": ("[" * 100_000, "cannot be used"),
    "large": ({"features": [{"a": {**GOOD, "vocab_size": 2**70}}], "labels": ["y"]}, "a has vocab_size 1180"),
    "no label names": ({"features": [{"a": GOOD}], "labels": [1]}, "FuxiCTR version"),
    "empty index": ({"feature_specs": {"a": {**GOOD, "index": []}}}, "indexes are not 0..0"),
    "truth": ({"features": [{"a": {**GOOD, "vocab_size": True}}], "labels": ["y"]}, "a has vocab_size True"),
    "no known keys": ({"fields": {}}, "no known FuxiCTR version"),
    "both styles": ({"features": [], "feature_specs": {}}, "no known FuxiCTR version"),
    "features is no list of objects": ({"features": ["a"], "labels": ["y"]}, "no known FuxiCTR version"),
    "numeric": ({"features": [{"age": {"type": "numeric"}}, {"a": GOOD}], "labels": ["y"]}, "age (numeric)"),
    "sequence": ({"feature_specs": {"clicks": {"type": "sequence", "index": [0, 1], "vocab_size": 5}}},
                 "clicks (sequence)"),
    "embedding": ({"features": [{"v": {"type": "embedding"}}], "labels": ["y"]}, "v (embedding)"),
    "no vocab_size": ({"features": [{"a": {"type": "categorical"}}], "labels": ["y"]}, "a has vocab_size None"),
    "vocab_size 0": ({"feature_specs": {"a": {**GOOD, "vocab_size": 0, "index": 0}}}, "a has vocab_size 0"),
    "twice": ({"features": [{"a": GOOD}, {"a": GOOD}], "labels": ["y"]}, "a is listed twice"),
    "no fields": ({"features": [{"g": {"type": "meta"}}], "labels": ["y"]}, "no categorical feature"),
    "no label": ({"features": [{"a": GOOD}]}, "0 labels"),
    "same index": ({"feature_specs": {"a": {**GOOD, "index": 0}, "b": {**GOOD, "index": 0}}}, "indexes are not 0..1"),
    "no index": ({"feature_specs": {"a": GOOD}}, "indexes are not 0..0"),
}


@pytest.mark.parametrize("case", BAD_MAPS)
def test_bad_feature_map(tmp_path, capsys, case):
    content, message = BAD_MAPS[case]
    write_dataset(tmp_path / "in")
    text = content if isinstance(content, str) else json.dumps(content)
    (tmp_path / "in" / "feature_map.json").write_text(text)
    assert_refused(tmp_path, capsys, "feature_map.json", message)


def test_label_option_is_for_2x(tmp_path, capsys):
    write_dataset(tmp_path / "in", "1.x")
    assert_refused(tmp_path, capsys, "--label clk was given", "1.x", options=["--label=clk"])


@pytest.mark.parametrize("split", ROWS)
def test_missing_split(tmp_path, capsys, split):
    write_dataset(tmp_path / "in", splits=[other for other in ROWS if other != split])
    assert_refused(tmp_path, capsys, f"no {split} split in", f"{split}.h5")


def test_split_found_twice(tmp_path, capsys):
    data = write_dataset(tmp_path / "in", "2.0")
    write_split(tmp_path / "in", "2.1 parts", "valid", data["valid"])
    assert_refused(tmp_path, capsys, "more than one val split", "valid.h5 and ", "part_0.h5")


def test_missing_part(tmp_path, capsys):
    write_dataset(tmp_path / "in", "1.x parts")
    (tmp_path / "in" / "test_part_9.h5").unlink()
    assert_refused(tmp_path, capsys, "part_9 is missing", "10 parts found", "test_part_10.h5")


def test_files_of_two_generations(tmp_path, capsys):
    data = write_dataset(tmp_path / "in", "2.0", splits=("train", "test"))
    write_split(tmp_path / "in", "2.2", "valid", data["valid"])
    assert_refused(tmp_path, capsys, "different FuxiCTR versions", "valid.npz")
    write_feature_map(tmp_path / "in", "1.x")
    assert_refused(tmp_path, capsys, "train.h5 holds the columns", "expected one 2-D table")
    for split in ROWS:
        (tmp_path / "in" / f"{split}.h5").unlink(missing_ok=True)
        write_split(tmp_path / "in", "2.2", split, data[split])
    assert_refused(tmp_path, capsys, "train.npz is a npz file", "1.x, which writes h5")


def test_table_without_names_for_a_2x_feature_map(tmp_path, capsys):
    write_dataset(tmp_path / "in", "1.x")
    write_feature_map(tmp_path / "in", "2.0")
    assert_refused(tmp_path, capsys, "train.h5 has no column clk")


@pytest.mark.parametrize("form", ["1.x", "2.0", "2.2", "2.3", "2.1 parts"])
@pytest.mark.parametrize(("field", "value"), [("item", 30), ("C10", -1), ("clicked", 0.5), ("hour", np.nan),
                                              ("user", 2.0**40), ("clk", 2)])
def test_bad_value_is_named(tmp_path, capsys, tiny_blocks, form, field, value):
    data = write_dataset(tmp_path / "in", form)
    columns = dict(data["valid"])
    columns[field] = columns[field].astype(type(value))
    columns[field][[23, 25]] = value
    write_split(tmp_path / "in", form, "valid", columns)
    file, row = (os.path.join("valid", "part_2.h5"), 3) if form == "2.1 parts" else ("valid.", 23)
    name = "the label" if (form, field) == ("1.x", "clk") else field
    shown = float(value) if form == "1.x" else value
    limit = "0 or 1" if field == "clk" else f"from 0 to {VOCAB_SIZES[field] - 1}"
    assert_refused(tmp_path, capsys, file, f"row {row} ", f"{name} is {shown},", limit)


def test_empty_value_in_parquet(tmp_path, capsys):
    data = write_dataset(tmp_path / "in", "2.3")
    frame = pd.DataFrame(data["test"]).astype({"item": "Int64"})
    frame.loc[5, "item"] = pd.NA
    frame.to_parquet(tmp_path / "in" / "test.parquet")
    assert_refused(tmp_path, capsys, "test.parquet: row 5 ", "item is nan")


@pytest.mark.parametrize("form", ["2.0", "2.2"])
def test_columns_of_unequal_length_or_shape(tmp_path, capsys, form):
    data = write_dataset(tmp_path / "in", form)
    for values in (data["train"]["item"][:-1], np.zeros((317, 4), int)):
        write_split(tmp_path / "in", form, "train", data["train"])
        extension = {"2.0": "h5", "2.2": "npz"}[form]
        write_columns(tmp_path / "in" / f"train.{extension}", {**data["train"], "item": values})
        assert_refused(tmp_path, capsys, f"column item has shape {values.shape}, expected (317,)")


@pytest.mark.parametrize("form", ["2.0", "2.2", "2.3"])
def test_missing_column_and_text_column(tmp_path, capsys, form):
    data = write_dataset(tmp_path / "in", form)
    columns = dict(data["test"])
    texts = [f"id{value}" for value in columns["hour"]]
    columns["hour"] = np.array(texts, dtype="S" if form == "2.0" else object)
    write_split(tmp_path / "in", form, "test", columns)
    assert_refused(tmp_path, capsys, "test.", "column hour has values of type", "expected numbers")
    del columns["hour"]
    write_split(tmp_path / "in", form, "test", columns)
    assert_refused(tmp_path, capsys, "test.", "has no column hour (1 of 6")


def test_table_of_another_width(tmp_path, capsys):
    data = write_dataset(tmp_path / "in", "1.x")
    write_table(tmp_path / "in" / "test.h5", {"more": data["test"]["hour"], **data["test"]})
    assert_refused(tmp_path, capsys, "test.h5: the table `data` has 7 columns, expected 6")


@pytest.mark.parametrize("form", ["1.x", "2.2", "2.3"])
def test_damaged_file(tmp_path, capsys, form):
    write_dataset(tmp_path / "in", form)
    path, = (path for path in (tmp_path / "in").glob("test.*"))
    content = path.read_bytes()
    path.write_bytes(content[:len(content) // 2])
    assert_refused(tmp_path, capsys, str(path), "cannot be read", "cut short")
    path.write_text("version https://git-lfs.github.com/spec/v1\n")
    assert_refused(tmp_path, capsys, str(path), "Git LFS pointer")


def test_flipped_byte_in_npz(tmp_path, capsys):
    """The zip checksum of a column is compared when it has been read."""
    write_dataset(tmp_path / "in", "2.2")
    path = tmp_path / "in" / "test.npz"
    content = bytearray(path.read_bytes())
    start = content.index(b"item.npy") + 300
    content[start] ^= 1
    path.write_bytes(content)
    assert_refused(tmp_path, capsys, "test.npz", "CRC")


def test_split_without_rows(tmp_path, capsys):
    data = write_dataset(tmp_path / "in")
    write_split(tmp_path / "in", "2.0", "valid", {name: values[:0] for name, values in data["valid"].items()})
    assert_refused(tmp_path, capsys, "the val split", "has no rows")


def test_existing_output_and_output_around_the_input(tmp_path, capsys):
    data = write_dataset(tmp_path / "in")
    (tmp_path / "out").mkdir()
    assert_refused(tmp_path, capsys, "exists already", "--overwrite")
    assert convert(tmp_path, "--overwrite") == 0
    assert_same_rows(tmp_path, data)
    for output in ("in", "."):
        assert convert(tmp_path, "--overwrite", f"--output_dir={tmp_path / output}") == 1
        assert "holds the input" in capsys.readouterr().err
    assert (tmp_path / "in" / "train.h5").exists()


def test_command_line(tmp_path):
    """As a program: exit codes 0, 1 and 2, one line for a mistake."""
    def run(*options):
        return subprocess.run([sys.executable, str(TOOL), *options], capture_output=True, text=True, cwd=tmp_path)
    write_dataset(tmp_path / "in", "2.3")
    assert run("--input_dir=in", "--output_dir=out", "--spark_tmp_dir=scratch").returncode == 0
    assert (tmp_path / "out" / "dataset_info.json").exists()
    again = run("--input_dir=in", "--output_dir=out")
    assert again.returncode == 1
    assert len(again.stderr.splitlines()) == 1
    assert run("--input_dir=in").returncode == 2


@pytest.mark.parametrize("form, name", [("2.2 parts", "train/part_00004 (1).npz"), ("2.2 parts", "train/copy.npz"),
                                        ("1.x parts", "valid_part_3 (1).h5"), ("2.0", "test (copy).h5"),
                                        ("2.0", "test_old.h5")])
def test_copies_are_not_read(tmp_path, capsys, form, name):
    write_dataset(tmp_path / "in", form)
    first = next(path for path in (tmp_path / "in").rglob("*") if path.suffix in (".npz", ".h5"))
    shutil.copy(first, tmp_path / "in" / name)
    assert_refused(tmp_path, capsys, name, "not a name that FuxiCTR gives its files")


def mutated(data, rng):
    """The bytes of a file with some of them changed, cut out or doubled."""
    data, kind = bytearray(data), rng.randrange(4)
    for _ in range(rng.choice([1, 1, 3, 20])):
        place = rng.randrange(len(data) or 1)
        if kind == 0:
            data[place : place + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            data[place : place + rng.randrange(1, 40)] = bytes(rng.randrange(1, 40))
        elif kind == 2:
            del data[place : place + rng.randrange(1, 400)]
        else:
            data[place:place] = data[place : place + rng.randrange(1, 100)]
    return bytes(data)


@pytest.mark.parametrize("form", ["1.x", "2.0", "2.2 parts", "2.3"])
def test_damaged_files_end_in_one_line_or_in_the_right_rows(tmp_path, form):
    """A fuzz of its own: 100 mutations of data files and JSON files per generation."""
    rng = random.Random(form)
    data = write_dataset(tmp_path / "good", form)
    write_vocab(tmp_path / "good")
    files = [path.relative_to(tmp_path / "good") for path in sorted((tmp_path / "good").rglob("*")) if path.is_file()]
    files += [path for path in files if path.suffix == ".json"] * 3
    for number in range(100):
        shutil.rmtree(tmp_path / "in", ignore_errors=True)
        shutil.copytree(tmp_path / "good", tmp_path / "in")
        victim = tmp_path / "in" / rng.choice(files)
        victim.write_bytes(mutated(victim.read_bytes(), rng))
        shown = io.StringIO()
        with contextlib.redirect_stderr(shown), contextlib.redirect_stdout(io.StringIO()):
            status = convert(tmp_path, "--overwrite")
        lines = shown.getvalue().splitlines()
        assert (status, len(lines)) in ((0, 0), (1, 1)), (number, victim, lines)
        if status == 0 and victim.suffix == ".npz":  # the only one with checksums
            assert_same_rows(tmp_path, data)
