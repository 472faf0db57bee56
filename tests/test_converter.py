"""tools/converter: row groups, the shuffle, the split writer, publishing, and the description of a dataset."""

import fcntl
import json
import os
import resource

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tools.converter import info, progress, publish, writer
from tools.converter.encoders import Encoder, Hash, Modulus
from tools.converter.publish import published_folder, scratch_folder
from tools.converter.spool import RowLayout, RowSpool
from tools.converter.writer import SplitWriter, plan_files, plan_row_groups
from tools.trainer.cli import UserError


def fields_of(sizes):
    return [Modulus(name, modulus=size) for name, size in sizes.items()]


def test_offsets_are_running_sums():
    entries = info.fields_info(fields_of({"a": 3, "b": 5, "c": 2}))
    assert [(f["name"], f["table_size"], f["offset"]) for f in entries] == [("a", 3, 0), ("b", 5, 3), ("c", 2, 8)]


@pytest.mark.parametrize("sizes, dtype", [([10, 20], np.int32), ([2**31 - 2, 1], np.int32), ([2**31 - 1, 1], np.int64)])
def test_id_columns_are_as_narrow_as_the_ids_allow(sizes, dtype):
    assert Encoder({}, fields_of(dict(zip("ab", sizes)))).id_dtype == dtype


@pytest.mark.parametrize("num_rows", [0, 1, 7, 8, 9, 63, 50_000, 400_000, 400_001, 36_672_493])
def test_row_groups(num_rows):
    groups = plan_row_groups(num_rows)
    assert sum(groups) == num_rows
    if num_rows >= 8:
        assert len(groups) % 8 == 0 and max(groups) - min(groups) <= 1 and max(groups) <= 50_000
        lanes = [sum(groups[lane::8]) for lane in range(8)]
        assert max(lanes) - min(lanes) <= 1
    files = plan_files(num_rows)
    assert [size for _, sizes in files for size in sizes] == groups
    assert [name for name, _ in files] == sorted(name for name, _ in files)


def test_writer_adds_offsets_and_keeps_rows_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "GROUPS_PER_FILE", 3)
    a, b, label = np.arange(100), np.arange(100) % 50, np.arange(100) % 2
    with SplitWriter(tmp_path / "val", [("a", 0), ("b", 100)], np.int32, 100) as split_writer:
        for start, end in [(0, 1), (1, 30), (30, 30), (30, 100)]:
            split_writer.write(label[start:end], [a[start:end], b[start:end]])
    assert len(split_writer.digests) == 3
    paths = sorted((tmp_path / "val").iterdir())
    assert [path.name for path in paths] == ["part-00000.parquet", "part-00001.parquet", "part-00002.parquet"]
    groups = [pq.ParquetFile(path).metadata.row_group(i).num_rows
              for path in paths for i in range(pq.ParquetFile(path).num_row_groups)]  # fmt: skip
    assert sorted(groups, reverse=True) == groups == [13] * 4 + [12] * 4
    table = pq.read_table(tmp_path / "val")
    assert [str(field.type) for field in table.schema] == ["float", "int32", "int32"]
    assert table.schema.names == ["Label", "a", "b"]
    assert (table["a"].to_numpy() == a).all() and (table["b"].to_numpy() == b + 100).all()
    assert (table["Label"].to_numpy() == label).all()


@pytest.mark.parametrize("dtype", [np.uint8, np.int64])
def test_writer_adds_offsets_in_the_type_of_the_result(tmp_path, dtype):
    with SplitWriter(tmp_path / "val", [("a", 0), ("b", 300)], np.int32, 2) as split_writer:
        split_writer.write(np.zeros(2), [np.array([1, 255], dtype), np.array([2, 254], dtype)])
    assert pq.read_table(tmp_path / "val")["b"].to_pylist() == [302, 554]


@pytest.mark.parametrize("rows", [9, 11])
def test_writer_refuses_another_number_of_rows(tmp_path, rows):
    with pytest.raises(UserError, match="10"), SplitWriter(tmp_path / "val", [("a", 0)], np.int32, 10) as split_writer:
        split_writer.write(np.zeros(rows), [np.zeros(rows, int)])


def write_rows(folder, labels, ids, carried=None):
    """digests of a split of two columns"""
    schema = None if carried is None else carried.schema
    with SplitWriter(folder, [("a", 0), ("b", 100)], np.int32, len(ids), labels is not None, schema) as split_writer:
        split_writer.write(labels, [ids, ids + 1], carried)
    return split_writer.digests


def test_digests_tell_other_rows(tmp_path):
    """Equal rows have equal digests, whatever is carried; another label, id or order is another digest."""
    ids, labels = np.arange(20), np.arange(20) % 2
    first = write_rows(tmp_path / "1", labels, ids)
    assert write_rows(tmp_path / "2", labels, ids, pa.table({"x": [str(i) for i in ids]})) == first
    others = [write_rows(tmp_path / "3", 1 - labels, ids), write_rows(tmp_path / "4", labels, ids[::-1]),
              write_rows(tmp_path / "5", labels, ids + 1), write_rows(tmp_path / "6", None, ids)]
    assert len({digest for digests in [first, *others] for digest in digests}) == 5


def test_carried_columns_stand_behind_the_ids(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "GROUPS_PER_FILE", 3)
    names = pa.array([f"r{i}" if i % 3 else None for i in range(100)])
    write_rows(tmp_path / "1", np.zeros(100), np.arange(100), pa.table({"request": names, "t": np.arange(100.0)}))
    table = pq.read_table(tmp_path / "1")
    assert table.column_names == ["Label", "a", "b", "request", "t"]
    assert table["request"].to_pylist() == names.to_pylist() and table["t"].to_pylist() == list(range(100))


ROWS = np.zeros(5000, [("n", "<i8"), ("x", "u1", 3)])
ROWS["n"] = np.arange(5000)
ROWS["x"] = (np.arange(5000) % 251)[:, None]


def spooled(folder, memory, seed, step=701):
    spool = RowSpool(folder, ROWS.dtype, len(ROWS), memory, seed)
    for start in range(0, len(ROWS), step):
        spool.append(ROWS[start : start + step])
    return spool.num_buckets, np.concatenate([rows for rows, _ in spool.read()])


def test_shuffle_is_a_permutation_that_depends_on_the_seed_only(tmp_path):
    buckets, first = spooled(tmp_path / "1", 10_000, seed=3)
    one_bucket, same = spooled(tmp_path / "2", 10**9, seed=3, step=5000)
    assert buckets > 5 and one_bucket == 1
    assert (first == same).all()
    assert (np.sort(first["n"]) == ROWS["n"]).all()
    assert (first["x"][:, 2] == first["n"] % 251).all()  # rows stay whole
    other = spooled(tmp_path / "3", 10_000, seed=4)[1]
    assert (other["n"] == first["n"]).mean() < 0.01


def test_shuffle_looks_random(tmp_path):
    order = spooled(tmp_path / "1", 10_000, seed=3)[1]["n"]
    assert abs(np.corrcoef(order, np.arange(5000))[0, 1]) < 0.05
    assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.05
    # a tenth of the output holds rows of all tenths of the input: about 50 each, standard deviation below 7
    counts = np.histogram2d(order, np.arange(5000), bins=10)[0]
    assert counts.min() > 15 and counts.max() < 85


def test_spool_without_seed_keeps_the_order(tmp_path):
    assert (spooled(tmp_path / "1", 10_000, seed=None)[1] == ROWS).all()


def test_more_buckets_than_files_may_be_open(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, limits[1]))
    try:
        schema = pa.schema([("text", pa.string())])
        spool = RowSpool(tmp_path / "s", np.int64, 400, 100, 3, schema, 20)
        assert spool.num_buckets > 100
        for start in (0, 150):
            numbers = np.arange(start, start + 200)
            spool.append(numbers, pa.table({"text": pa.array(numbers).cast(pa.string())}))
        read = [(rows, carried["text"].to_pylist()) for rows, carried in spool.read()]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert all(list(map(str, rows)) == texts for rows, texts in read) and sum(len(rows) for rows, _ in read) == 400


def test_carried_columns_travel_with_their_rows(tmp_path):
    for number, seed in enumerate((None, 3)):
        schema = pa.schema([("text", pa.string())])
        spool = RowSpool(tmp_path / str(number), ROWS.dtype, len(ROWS), 20_000, seed, schema, 10)
        for start in range(0, len(ROWS), 701):
            part = ROWS[start : start + 701]
            spool.append(part, pa.table({"text": [f"row {n}" for n in part["n"]]}))
        count = 0
        for rows, carried in spool.read():
            assert carried["text"].to_pylist() == [f"row {n}" for n in rows["n"]]
            count += len(rows)
        assert count == len(ROWS) and not os.listdir(tmp_path / str(number))


def test_rows_are_packed_and_unpacked():
    small = np.arange(5, dtype=np.int32)
    columns = [small, np.arange(5, dtype=np.uint64) << np.uint64(40), -small]
    layout = RowLayout([column.dtype for column in columns])
    rows = layout.pack([0, 1, 1, 0, 1], columns)
    assert rows.dtype.itemsize == 1 + 4 + 8 + 4
    labels, unpacked = layout.unpack(rows[::-1])
    assert labels.tolist() == [1, 0, 1, 1, 0]
    assert all((one == other[::-1]).all() for one, other in zip(unpacked, columns))


# ---------------------------------------------------------------------------------------------------------- publishing


def make_output(folder):
    """The least that counts as a dataset."""
    folder.mkdir()
    content = {"format_version": 2, "fields": [{"name": "a", "table_size": 3, "offset": 0}]}
    (folder / "dataset_info.json").write_text(json.dumps(content))


def test_published_folder_appears_only_when_all_went_well(tmp_path):
    output = tmp_path / "data"
    with pytest.raises(KeyboardInterrupt), published_folder(output, [tmp_path / "raw"]) as folder:
        (folder / "x").write_text("")
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []
    with published_folder(output, [tmp_path / "raw"]) as folder:
        (folder / "x").write_text("new")
        assert not output.exists()
    assert os.listdir(tmp_path) == ["data"] and os.listdir(output) == ["x"]


def test_published_folder_replaces_only_with_overwrite(tmp_path):
    output = tmp_path / "data"
    make_output(output)
    with pytest.raises(UserError, match="--overwrite"), published_folder(output, [tmp_path / "raw"]):
        pass
    with pytest.raises(UserError, match="bad"), published_folder(output, [tmp_path / "raw"], overwrite=True):
        raise UserError("bad")
    assert os.listdir(output) == ["dataset_info.json"]
    with published_folder(output, [tmp_path / "raw"], overwrite=True) as folder:
        (folder / "new").write_text("")
    assert os.listdir(tmp_path) == ["data"] and os.listdir(output) == ["new"]


def test_folder_of_the_input_and_current_folder_are_never_replaced(tmp_path, monkeypatch):
    raw = tmp_path / "raw"
    inner = tmp_path / "outer" / "inner"
    inner.mkdir(parents=True)
    monkeypatch.chdir(inner)
    for output, held in ((inner, "current folder"), (inner.parent, "current folder"), (tmp_path, "input")):
        with pytest.raises(UserError, match=f"holds the {held}"):
            published_folder(output, [raw], overwrite=True).__enter__()
        assert inner.is_dir()


@pytest.mark.parametrize("entry, message", [
    ("notes.txt", r"holds notes.txt \(1\) beside the dataset"), ("train/model.bin", r"holds train/model.bin \(1\) "
                                                                                    r"beside"),
    (None, "is no dataset: it holds train"), ("{", "cannot be used"),
])
def test_only_a_dataset_is_replaced(tmp_path, entry, message):
    output = tmp_path / "data"
    make_output(output)
    (output / "train").mkdir()
    if entry is None:
        (output / "dataset_info.json").unlink()
    elif entry == "{":
        (output / "dataset_info.json").write_text(entry)
    else:
        (output / entry).write_text("mine")
    before = sorted(os.listdir(output))
    with pytest.raises(UserError, match=message), published_folder(output, [], overwrite=True):
        pass
    assert sorted(os.listdir(output)) == before and os.listdir(tmp_path) == ["data"]


def test_two_runs_to_one_output(tmp_path):
    """The second ends at once, whether the folder exists or not; the first is not disturbed."""
    output = tmp_path / "data"
    with published_folder(output, []) as folder:
        with pytest.raises(UserError, match="is being written by another run"), published_folder(output, []):
            pass
        (folder / "x").write_text("")
    assert os.listdir(output) == ["x"] and os.listdir(tmp_path) == ["data"]


def test_a_run_that_begins_is_no_leftover(tmp_path, monkeypatch):
    """Another run looks for leftovers when the mark is there and not yet locked."""
    looked, locked = [], publish._locked

    def look_first(file):
        if not looked:
            looked.append(file.name)
            publish._remove_leftovers(tmp_path, "x-")
        return locked(file)

    monkeypatch.setattr(publish, "_locked", look_first)
    with publish.marked_folder("--output_dir", tmp_path, tmp_path, "x-") as folder:
        publish._remove_leftovers(tmp_path, "x-")
        assert looked and os.listdir(folder) == [publish.MARK]


def test_leftovers_of_killed_runs_are_removed_and_nothing_else(tmp_path, capsys):
    output, scratch = tmp_path / "data", tmp_path / "scratch"
    for name in (".data.partial-dead", ".data.partial-mine", "scratch/parquet-scratch-dead",
                 "scratch/parquet-scratch-alive", "scratch/parquet-scratch-mine"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "file").write_text("")
        if not name.endswith("mine"):
            (tmp_path / name / publish.MARK).write_text("")
    with open(scratch / "parquet-scratch-alive" / publish.MARK, "a") as alive:
        fcntl.flock(alive, fcntl.LOCK_EX)
        with published_folder(output, []) as folder, scratch_folder(str(scratch), folder):
            pass
    assert sorted(os.listdir(tmp_path)) == [".data.partial-mine", "data", "scratch"]
    assert sorted(os.listdir(scratch)) == ["parquet-scratch-alive", "parquet-scratch-mine"]
    assert capsys.readouterr().err.count("which a killed run had left") == 2


def test_a_dataset_that_lost_its_name_gets_it_back(tmp_path, capsys):
    """Killed between the two renames of --overwrite."""
    left = tmp_path / ".data.partial-dead"
    left.mkdir()
    (left / publish.MARK).write_text("")
    make_output(left / "old")
    with pytest.raises(UserError, match="exists already"), published_folder(tmp_path / "data", []):
        pass
    assert os.listdir(tmp_path) == ["data"] and "it is back" in capsys.readouterr().err
    assert publish.read_info(tmp_path / "data")["format_version"] == 2


def test_progress_logs_rate_and_time_left(capsys, monkeypatch):
    clock = iter([0, 5, 10, 10, 15, 20])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with progress.Progress("reading", 4000) as shown:
        shown.update(1000)  # at 5 s: too early for a line
        shown.update(1000)  # at 10 s
        shown.update(2000)
    assert capsys.readouterr().out == (
        "reading: 2000 rows of 4000, 10 s left, 200 rows/s\nreading: 4000 rows, 200 rows/s, 20.0 s\n"
    )


def test_info_and_readme(tmp_path, capsys):
    fields = [Hash("a", "A", size=13), *fields_of({"b": 5})]
    source = {"tool": "t", "options": {"seed": 1}, "encoding": "table"}
    content = info.dataset_info(fields, {"train": 80, "val": 10, "test": 11}, {"format": "text"}, source, ["request"])
    info.write_info(tmp_path, content)
    assert capsys.readouterr().out == ""
    read = json.loads((tmp_path / "dataset_info.json").read_text())
    assert read == content
    assert [read[key] for key in ("format_version", "label", "num_samples", "source", "carried", "grown_from")] == [
        2, "Label", {"train": 80, "val": 10, "test": 11}, source, ["request"], []]
    assert [{k: f[k] for k in ("name", "table_size", "offset", "raw_column")} for f in read["fields"]] == [
        {"name": "a", "table_size": 13, "offset": 0, "raw_column": "A"},
        {"name": "b", "table_size": 5, "offset": 13, "raw_column": "b"}]
    readme = (tmp_path / "README.md").read_text()
    assert "--num_train_samples 80 --num_val_samples 10 --num_test_samples 11" in readme
    assert "--table_size_array 13,5\n" in readme and "not used as features: request" in readme
    info.write_info(tmp_path, content, show=True)
    assert "--table_size_array 13,5\n" in capsys.readouterr().out
