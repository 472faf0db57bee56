"""tools/inspect_dataset.py: its numbers against pandas, every kind of fault, exit status and output."""

import json
import shutil

import inspect_dataset
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import table_to_parquet
from conftest import TABLE_SIZES, make_dataset

from tools.trainer.cli import UserError
from tools.trainer.dataset import read_dataset

OFFSETS = [0, 7, 18]
FILE = "part-00000.parquet"


def edit_info(folder, change):
    info = json.loads((folder / "dataset_info.json").read_text())
    change(info)
    (folder / "dataset_info.json").write_text(json.dumps(info))


def edit_split(folder, split, change):
    """change: gets the split as a DataFrame, and may return one."""
    frame = pd.read_parquet(folder / split / FILE)
    result = change(frame)
    pq.write_table(pa.Table.from_pandas(frame if result is None else result, preserve_index=False),
                   folder / split / FILE, row_group_size=50)


def run(capsys, folder, *options):
    """(exit status, standard output, lines on standard error)"""
    status = inspect_dataset.main([str(folder), *options])
    output = capsys.readouterr()
    return status, output.out, output.err.splitlines()


@pytest.fixture
def x4_dir(dataset_dir):
    edit_info(dataset_dir, lambda info: info["source"].update(encoding="x4"))
    return dataset_dir


@pytest.mark.parametrize("slice_rows", [13, 1 << 18])
def test_numbers_are_those_of_pandas(x4_dir, capsys, monkeypatch, slice_rows):
    monkeypatch.setattr(inspect_dataset, "SLICE_ROWS", slice_rows)
    status, out, errors = run(capsys, x4_dir, "--json")
    assert (status, errors) == (0, [])
    result = json.loads(out)
    frames = {split: pd.read_parquet(x4_dir / split) for split in ("train", "val", "test")}
    for split, frame in frames.items():
        assert result["splits"][split] == {"rows": len(frame), "files": 1, "row_groups": -(-len(frame) // 51),
                                           "label_rate": pytest.approx(frame["Label"].mean())}
    assert [field["table_size"] for field in result["fields"]] == TABLE_SIZES
    assert any(field["new"]["val"] > 0 for field in result["fields"])
    for field, offset in zip(result["fields"], OFFSETS):
        train = frames["train"][field["name"]]
        assert (field["seen"], field["outside"]) == (train.nunique(), 0)
        assert field["top"] == pytest.approx(train.value_counts(normalize=True).iloc[0])
        last = offset + field["table_size"] - 1
        for split, frame in frames.items():
            assert field["oov"][split] == pytest.approx((frame[field["name"]] == last).mean())
        for split in ("val", "test"):
            assert field["new"][split] == pytest.approx((~frames[split][field["name"]].isin(train)).mean())


def test_both_ways_of_counting():
    ids = np.random.default_rng(0).integers(0, 90, 1000)
    for size in (90, 100_000):  # bincount, then sorting
        counts = np.ones(size, np.int32)
        inspect_dataset.add_counts(counts, ids)
        assert [counts[i] for i in range(90)] == [1 + int((ids == i).sum()) for i in range(90)]
        assert counts.sum() == size + 1000


@pytest.mark.parametrize("encoding, expected", [("x4", 9), ("FuxiCTR 2.3", 9), ("FuxiCTR 1.0-1.2", 0), ("hash", None),
                                                (None, None)])
def test_out_of_vocabulary_id(encoding, expected):
    assert inspect_dataset.oov_id(encoding, 10) == expected


def test_table_on_the_terminal(x4_dir, capsys):
    edit_info(x4_dir, lambda info: info["fields"][1].update(name="a_field_with_a_very_long_name"))
    for split in ("train", "val", "test"):
        edit_split(x4_dir, split, lambda frame: frame.rename(columns={"f1": "a_field_with_a_very_long_name"}))
    status, out, _ = run(capsys, x4_dir)
    lines = out.splitlines()
    assert status == 0 and max(map(len, lines)) <= 120
    assert lines[1].split()[:2] == ["train", "403"] and lines[-1] == "nothing wrong"
    table = lines[5:9]
    assert len({len(line) for line in table}) == 1 and "a_field_with_..." in table[2]
    assert table[1].split()[:3] == ["f0", "7", "7"]


def test_wide_numbers_fit_the_terminal():
    field = {"name": "x" * 50, "table_size": 40_000_000, "seen": 39_000_000, "top": 1.0, "outside": 45_000_000,
             "oov": {"train": 1.0, "val": 1.0, "test": 1.0}, "new": {"val": 1.0, "test": 1.0}}
    result = {"splits": {}, "fields": [field] * 39, "encoding": "FuxiCTR 1.0-1.2"}
    assert max(map(len, inspect_dataset.text_of(result).splitlines())) <= 120


def set_cell(column, value):
    def change(frame):
        frame.loc[3, column] = value
    return change


@pytest.mark.parametrize("split, change, message", [
    ("val", set_cell("f1", 18), "field f1 of the val split has ids from 7 to 18, expected [7, 18)"),
    ("test", set_cell("f2", -5), "field f2 of the test split has ids from -5 to 57, expected [18, 58)"),
    ("train", set_cell("Label", 0.5), "the train split has a label 0.5, expected only 0 and 1"),
    ("val", lambda frame: frame.assign(Label=1.0), "all labels of the val split are 1; AUC needs both 0 and 1"),
    ("test", lambda frame: frame[5:], "the test split has 92 rows, dataset_info.json says 97"),
    ("val", lambda frame: frame.astype({"f0": float}),
     "field f0 of the val split is of type double, expected signed integers (petastorm drops unsigned ones); convert "
     "the data again"),
    ("test", lambda frame: frame.astype({"f1": "uint16"}),
     "field f1 of the test split is of type uint16, expected signed integers (petastorm drops unsigned ones); convert "
     "the data again"),
    ("test", lambda frame: frame.astype({"f1": "uint64"}),
     "field f1 of the test split is of type uint64, expected signed integers (petastorm drops unsigned ones); convert "
     "the data again"),
    ("val", lambda frame: frame.assign(f0=frame["f0"].astype("Int32").mask(frame["f1"] == 7)),
     "column f0 of the val split lacks 35 values; convert it again"),
    ("val", lambda frame: frame.drop(columns="f2"), "the val split lacks the columns f2 (1); it has Label, f0, f1 (3)"),
])
def test_faults_in_the_files(dataset_dir, capsys, split, change, message):
    edit_split(dataset_dir, split, change)
    status, _, errors = run(capsys, dataset_dir)
    assert status == 1
    assert f"error: {message}" in errors
    result = json.loads(run(capsys, dataset_dir, "--json")[1])
    assert message in result["problems"]


def test_rows_outside_are_counted(dataset_dir, capsys):
    edit_split(dataset_dir, "train", lambda frame: frame.assign(f1=frame["f1"] + 5))
    outside = int((pd.read_parquet(dataset_dir / "train")["f1"] >= 18).sum())
    fields = json.loads(run(capsys, dataset_dir, "--json")[1])["fields"]
    assert outside > 0 and [field["outside"] for field in fields] == [0, outside, 0]


@pytest.mark.parametrize("change, message", [
    (lambda info: info["fields"][2].update(offset=17), "gives f2 the offset 17, but the tables before it have 18 rows"),
    (lambda info: info["num_samples"].update(val=100), "the val split has 101 rows, dataset_info.json says 100"),
    (lambda info: info["fields"][0].update(table_size=0), "dataset_info.json cannot be used (fields"),
    (lambda info: info["fields"][0].update(table_size=2**70), "dataset_info.json cannot be used (fields"),
    (lambda info: info["fields"][0].update(name="g"), "the train split lacks the columns g (1); it has Label, f0, f1, "
                                                      "f2"),
    (lambda info: info.update(label="click"), "names the label click, the trainer reads Label"),
    (lambda info: info.pop("num_samples"), "dataset_info.json cannot be used (it lacks num_samples)"),
])
def test_faults_in_the_description(dataset_dir, capsys, change, message):
    edit_info(dataset_dir, change)
    status, _, errors = run(capsys, dataset_dir)
    assert status == 1
    assert any(message in line for line in errors), errors


@pytest.mark.parametrize("name", ["f-1", "te\u0301le", "µ", "m²"])
def test_names_that_the_trainer_cannot_read(dataset_dir, capsys, name):
    for split in ("train", "val", "test"):
        edit_split(dataset_dir, split, lambda frame: frame.rename(columns={"f1": name}))
    edit_info(dataset_dir, lambda info: info["fields"][1].update(name=name))
    status, _, errors = run(capsys, dataset_dir)
    assert status == 1
    assert errors == [f"error: the trainer's reader, petastorm, cannot read the columns {name} (1); rename them"]
    with pytest.raises(UserError, match="petastorm cannot read the columns"):
        read_dataset(str(dataset_dir))


def test_files_of_a_split_with_columns_in_another_order(dataset_dir, capsys):
    first = dataset_dir / "val" / FILE
    frame = pd.read_parquet(first)
    frame[:50].to_parquet(first, index=False)
    frame.loc[50:, ["Label", "f0", "f2", "f1"]].to_parquet(first.with_name("part-00001.parquet"), index=False)
    status, _, errors = run(capsys, dataset_dir)
    message = f"part-00001.parquet has other columns, types or order than {first}: Label, f0, f2, f1 (4)"
    assert status == 1 and message in errors[0]


def test_one_fault_is_one_line(dataset_dir, capsys):
    path = dataset_dir / "train" / FILE
    path.write_bytes(b"")
    assert [line.split(" (")[0] for line in run(capsys, dataset_dir)[2]] == [
        f"error: {path} is not a readable parquet file"]
    shutil.rmtree(dataset_dir / "train")
    assert len(run(capsys, dataset_dir)[2]) == 1


def test_unreadable_files(dataset_dir, capsys):
    path = dataset_dir / "val" / FILE
    content = path.read_bytes()
    path.write_bytes(content[:200])
    status, out, errors = run(capsys, dataset_dir)
    assert status == 1 and "f0" in out  # the other splits are shown
    assert sum(f"{path} is not a readable parquet file" in line for line in errors) == 1
    # the metadata is fine, but not the data
    path.write_bytes(content[:4] + b"\xff" * (len(content) // 2) + content[4 + len(content) // 2:])
    status, _, errors = run(capsys, dataset_dir)
    assert status == 1 and sum(str(path) in line for line in errors) == 1, errors


def test_columns_that_are_no_fields_are_left_alone(dataset_dir, capsys):
    """Structs, texts and pandas' index, before and behind the fields."""
    for split in ("train", "val", "test"):
        table = pq.read_table(dataset_dir / split / FILE)
        struct = pa.array([{"x": i, "y": "z"} for i in range(len(table))])
        table = table.add_column(0, "before", struct).append_column("text", pa.array(["t"] * len(table)))
        table = table.append_column("__index_level_0__", pa.array(range(len(table)), pa.int64()))
        pq.write_table(table, dataset_dir / split / FILE, row_group_size=50)
    status, out, errors = run(capsys, dataset_dir, "--json")
    assert (status, errors) == (0, [])
    assert [field["name"] for field in json.loads(out)["fields"]] == ["f0", "f1", "f2"]


def test_lists_and_vocabularies(tmp_path, capsys):
    """A dataset of the converter: the columns of a list are one field, and a swapped vocabulary is found."""
    rng = np.random.default_rng(0)
    tags = ["|".join(rng.choice(list("abcdef"), size)) for size in rng.integers(0, 4, 2000)]
    frame = pd.DataFrame({"tags": tags, "u": rng.integers(0, 90, 2000), "y": rng.integers(0, 2, 2000)})
    frame.to_csv(tmp_path / "t.csv", index=False)
    assert table_to_parquet.main(["--input", str(tmp_path / "t.csv"), "--output_dir", str(tmp_path / "d"),
                                  "--label", "y", "--categorical", "u", "--list", "tags", "--min_count", "30"]) == 0
    capsys.readouterr()
    status, out, errors = run(capsys, tmp_path / "d", "--json")
    assert (status, errors) == (0, [])
    fields = {field["name"]: field for field in json.loads(out)["fields"]}
    assert (fields["tags"]["table_size"], fields["tags"]["seen"]) == (8, 7)  # padding and six tags, none unknown
    train = pd.read_parquet(tmp_path / "d" / "train")
    oov = train["u"].max()
    assert fields["u"]["oov"]["train"] == pytest.approx((train["u"] == oov).mean()) and fields["u"]["oov"]["train"] > 0
    path = tmp_path / "d" / "vocabulary" / "tags.parquet"
    table = pq.read_table(path)
    pq.write_table(table.set_column(0, "token", pa.array(table["token"].to_pylist()[::-1])), path)
    assert f"{path} was changed or damaged since dataset_info.json was written" in run(capsys, tmp_path / "d")[2][0]
    edit_info(tmp_path / "d", lambda info: info.pop("files"))
    status, _, errors = run(capsys, tmp_path / "d")
    assert status == 1 and "field tags is not encoded as its fingerprint says" in errors[0]


def test_shards_are_compared_with_their_checksums(tmp_path, capsys):
    """A changed byte of which parquet sees nothing, a file that is missing, and one too many."""
    folder = make_dataset(tmp_path / "data", digests=True)
    path = folder / "val" / FILE
    whole, found = path.read_bytes(), []
    for place in range(60, 400):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1:])
        status, out, errors = run(capsys, folder)
        assert status == 1 and any(f"{path} was changed or damaged since" in line for line in errors)
        found.append(len(errors))
    assert min(found) == 1  # by the checksum alone
    path.write_bytes(whole)
    assert run(capsys, folder)[0] == 0
    shutil.copy(path, path.with_name("part-00001.parquet"))
    assert "does not know the files val/part-00001.parquet" in run(capsys, folder)[2][0]
    path.rename(path.with_name("part-00001.parquet"))
    assert any(f"{path} cannot be read" in line for line in run(capsys, folder)[2])


def test_a_name_with_a_line_break_is_one_line(tmp_path, capsys):
    assert run(capsys, tmp_path / "a\nb")[2] == [
        f"error: {tmp_path}/a\\nb is not a folder; it should hold train/, val/ and test/"]


def test_a_page_that_gives_fewer_rows_than_the_file_says(dataset_dir, capsys, monkeypatch):
    batches = pq.ParquetFile.iter_batches

    def short(self, *args, columns, **options):
        for batch in batches(self, *args, columns=columns, **options):
            yield batch[:-5] if columns == ["Label"] and self.metadata.num_rows == 101 else batch

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", short)
    status, _, errors = run(capsys, dataset_dir)
    assert status == 1 and "column Label has 96 rows, the file says 101" in errors[0]


@pytest.mark.parametrize("name", ["data[1]", "a?b", "a#b", "100%"])
def test_paths_are_not_patterns(tmp_path, capsys, name):
    assert run(capsys, make_dataset(tmp_path / name))[0] == 0


def test_missing_folders(dataset_dir, capsys, tmp_path):
    assert run(capsys, tmp_path / "none") == (
        1, "", [f"error: {tmp_path}/none is not a folder; it should hold train/, val/ and test/"])
    shutil.rmtree(dataset_dir / "test")
    status, _, errors = run(capsys, dataset_dir)
    assert status == 1 and any(f"no *.parquet files in {dataset_dir}/test" in line for line in errors)


def test_dataset_without_description(tmp_path, capsys):
    folder = make_dataset(tmp_path / "data", info=False)
    status, out, errors = run(capsys, folder)
    assert status == 1 and "train" in out
    assert errors == ["error: there is no usable dataset_info.json; give --table_size_array, the rows of each field's "
                      "table"]
    assert run(capsys, folder, "--table_size_array", "7,11")[0] == 1
    status, out, _ = run(capsys, folder, "--table_size_array", "7,11,40")
    assert status == 0 and "encoding: not known" in out


def test_wrong_arguments(tmp_path, capsys):
    for options in ([], [str(tmp_path), "--table_size_array", "7,0"], [str(tmp_path), "--nope"]):
        with pytest.raises(SystemExit) as stop:
            inspect_dataset.main(options)
        assert stop.value.code == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
