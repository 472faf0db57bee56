"""tools/parquet_common.py: offsets, row groups, the shuffle, the split writer, publishing and error lines."""

import errno
import json
import os

import numpy as np
import parquet_common
import pyarrow.parquet as pq
import pytest
from parquet_common import DataError, RowSpool, SplitWriter, make_fields, plan_files, plan_row_groups, published_folder


def test_offsets_are_running_sums():
    fields = make_fields(["a", "b", "c"], [3, 5, 2])
    assert [(f["name"], f["table_size"], f["offset"]) for f in fields] == [("a", 3, 0), ("b", 5, 3), ("c", 2, 8)]


@pytest.mark.parametrize("sizes, dtype", [([10, 20], np.int32), ([2**31 - 2, 1], np.int32), ([2**31 - 1, 1], np.int64)])
def test_id_columns_are_as_narrow_as_the_ids_allow(sizes, dtype):
    assert parquet_common.id_dtype(make_fields(["a", "b"], sizes)) == dtype


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
    monkeypatch.setattr(parquet_common, "GROUPS_PER_FILE", 3)
    fields = make_fields(["a", "b"], [100, 50])
    a, b, label = np.arange(100), np.arange(100) % 50, np.arange(100) % 2
    with SplitWriter(tmp_path, "val", fields, 100) as writer:
        for start, end in [(0, 1), (1, 30), (30, 30), (30, 100)]:
            writer.write(label[start:end], [a[start:end], b[start:end]])
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
    with SplitWriter(tmp_path, "val", make_fields(["a", "b"], [300, 300]), 2) as writer:
        writer.write(np.zeros(2), [np.array([1, 255], dtype), np.array([2, 254], dtype)])
    assert pq.read_table(tmp_path / "val")["b"].to_pylist() == [302, 554]


@pytest.mark.parametrize("rows", [9, 11])
def test_writer_refuses_another_number_of_rows(tmp_path, rows):
    with pytest.raises(DataError, match="10"), SplitWriter(tmp_path, "val", make_fields(["a"], [9]), 10) as writer:
        writer.write(np.zeros(rows), [np.zeros(rows, int)])


ROWS = np.zeros(5000, [("n", "<i8"), ("x", "u1", 3)])
ROWS["n"] = np.arange(5000)
ROWS["x"] = (np.arange(5000) % 251)[:, None]


def spooled(folder, memory, seed, step=701):
    spool = RowSpool(folder, ROWS.dtype, len(ROWS), memory, seed)
    for start in range(0, len(ROWS), step):
        spool.append(ROWS[start : start + step])
    return spool.num_buckets, np.concatenate(list(spool.read()))


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


def test_published_folder_appears_only_when_all_went_well(tmp_path):
    output = tmp_path / "data"
    with pytest.raises(KeyboardInterrupt), published_folder(output, tmp_path / "raw") as folder:
        (folder / "x").write_text("")
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []
    with published_folder(output, tmp_path / "raw") as folder:
        (folder / "x").write_text("new")
        assert not output.exists()
    assert os.listdir(tmp_path) == ["data"] and os.listdir(output) == ["x"]


def test_published_folder_replaces_only_with_overwrite(tmp_path):
    output = tmp_path / "data"
    output.mkdir()
    (output / "old").write_text("")
    with pytest.raises(DataError, match="--overwrite"), published_folder(output, tmp_path / "raw"):
        pass
    with pytest.raises(DataError, match="bad"), published_folder(output, tmp_path / "raw", overwrite=True):
        raise DataError("bad")
    assert os.listdir(output) == ["old"]
    with published_folder(output, tmp_path / "raw", overwrite=True) as folder:
        (folder / "new").write_text("")
    assert os.listdir(tmp_path) == ["data"] and os.listdir(output) == ["new"]


def test_folder_of_the_input_and_current_folder_are_never_replaced(tmp_path, monkeypatch):
    raw = tmp_path / "raw"
    inner = tmp_path / "outer" / "inner"
    inner.mkdir(parents=True)
    monkeypatch.chdir(inner)
    for output, held in ((inner, "current folder"), (inner.parent, "current folder"), (tmp_path, "input")):
        with pytest.raises(DataError, match=f"holds the {held}"):
            published_folder(output, raw, overwrite=True).__enter__()
        assert inner.is_dir()


@pytest.mark.parametrize(
    "error, code, text",
    [
        (DataError("train has 3 rows"), 1, "error: train has 3 rows\n"),
        (OSError(errno.ENOSPC, "No space left on device", "/d/x"), 1, "error: no space left on the disk (/d/x); "),
        (PermissionError(errno.EACCES, "Permission denied", "/d"), 1, "error: no permission (/d): Permission denied; "),
        (FileNotFoundError(errno.ENOENT, "No such file", "/d"), 1, "error: [Errno 2] No such file: '/d'\n"),
        (KeyboardInterrupt(), 130, "error: interrupted; nothing was written to OUT\n"),
        (SystemExit(143), 143, "error: terminated; nothing was written to OUT\n"),
    ],
)
def test_errors_end_in_one_line(capsys, error, code, text):
    def work():
        raise error

    assert parquet_common.run_tool(work, "OUT") == code
    shown = capsys.readouterr().err
    assert shown.startswith(text) and shown.count("\n") == 1


def test_progress_logs_rate_and_time_left(capsys, monkeypatch):
    clock = iter([0, 5, 10, 10, 15, 20])
    monkeypatch.setattr(parquet_common.time, "monotonic", lambda: next(clock))
    with parquet_common.Progress("reading", 4000) as progress:
        progress.update(1000)  # at 5 s: too early for a line
        progress.update(1000)  # at 10 s
        progress.update(2000)
    assert capsys.readouterr().out == (
        "reading: 2000 rows of 4000, 10 s left, 200 rows/s\nreading: 4000 rows, 200 rows/s, 20.0 s\n"
    )


def test_info_and_readme(tmp_path, capsys):
    fields = make_fields(["a", "b"], [3, 5])
    source = {"tool": "t", "options": {"seed": 1}, "encoding": "x4"}
    info = parquet_common.dataset_info(fields, {"train": 80, "val": 10, "test": 11}, source)
    parquet_common.write_info(tmp_path, info)
    assert capsys.readouterr().out == ""
    assert json.loads((tmp_path / "dataset_info.json").read_text()) == {
        "format_version": 1,
        "label": "Label",
        "fields": [{"name": "a", "table_size": 3, "offset": 0}, {"name": "b", "table_size": 5, "offset": 3}],
        "num_samples": {"train": 80, "val": 10, "test": 11},
        "source": source,
    }
    readme = (tmp_path / "README.md").read_text()
    assert "--num_train_samples 80 --num_val_samples 10 --num_test_samples 11" in readme
    assert "--table_size_array 3,5\n" in readme
    parquet_common.write_info(tmp_path, info, show=True)
    assert "--table_size_array 3,5\n" in capsys.readouterr().out
