"""The input path: every row once for any number of processes, order, errors in data, prefetching."""

import json
import os
import subprocess
import sys
import threading
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import TABLE_SIZES, make_dataset, trainer_command, write_split

import deepfm_train_eval as trainer_module
from deepfm_train_eval import read_rows
from tools.trainer import batches as batching
from tools.trainer.batches import RowStream, choose_lanes, prefetched, shuffled
from tools.trainer.cli import UserError
from tools.trainer.dataset import SPLITS, read_dataset


def dataset_of(folder, counts=None, table_sizes=None):
    """counts: rows of train, val, test; None: dataset_info.json says them"""
    return read_dataset(str(folder), table_sizes, dict(zip(SPLITS, counts)) if counts else None)


def train_batches(dataset, batch_size, seed=0, epoch=1, rank=0, world_size=1, first_step=0, **options):
    return batching.train_batches(read_rows, dataset, batch_size, seed=seed, epoch=epoch, rank=rank,
                                 world_size=world_size, first_step=first_step, **options)


def eval_batches(dataset, split, batch_size, rank=0, world_size=1):
    return batching.eval_batches(read_rows, dataset, split, batch_size, rank=rank, world_size=world_size)


def numbered(folder, rows=(1013, 211, 103), row_group_rows=50, files=1):
    """A dataset whose second field numbers the rows of each split, so that rows can be counted. Labels: its parity."""
    for name, count in zip(("train", "val", "test"), rows):
        ids = np.stack([np.arange(count) % 3, 3 + np.arange(count)], axis=1)
        for part in np.array_split(np.arange(count), files if name == "train" else 1):
            write_split(folder / name, part % 2, ids[part], row_group_rows, ["kind", "number"])
            path = folder / name / "part-00000.parquet"
            os.rename(path, path.with_name(f"part-{part[0]:05d}-of.parquet"))
    return dataset_of(folder, rows, [3, max(rows)])


def numbers(batch):
    """Row numbers of a batch's valid rows; its padding is checked on the way."""
    valid = batch.num_valid
    assert batch.ids.dtype == np.int64 and batch.labels.dtype == batch.weights.dtype == np.float32
    assert batch.labels.shape == batch.weights.shape == (len(batch.ids), 1)
    assert np.allclose(batch.weights[:valid], 1 / batch.num_global) and not batch.weights[valid:].any()
    assert not batch.labels[valid:].any()
    found = batch.ids[:valid, 1] - 3
    assert (batch.ids[:valid, 0] == found % 3).all() and (batch.labels[:valid, 0] == found % 2).all()
    return found.tolist()


def epoch_of(dataset, processes, batch_size=48, seed=1, epoch=1, first_step=0, **options):
    """[[rows of process 0, rows of process 1, ...] per step]"""
    streams = [list(train_batches(dataset, batch_size, seed, epoch, process, processes, first_step, **options))
               for process in range(processes)]  # fmt: skip
    assert len({len(stream) for stream in streams}) == 1
    for batches in zip(*streams):
        assert sum(batch.num_valid for batch in batches) == batches[0].num_global
        assert {len(batch.ids) for batch in batches} == {batch_size // processes}
        padding = [batch.ids[batch.num_valid:] for batch in batches]
        assert all((rows == dataset.num_ids).all() for rows in padding)
    return [[numbers(batch) for batch in batches] for batches in zip(*streams)]


@pytest.mark.parametrize("files", [1, 3])
@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("rows, row_group_rows", [(1013, 50), (1013, 1013), (331, 17), (48, 6), (47, 47), (3, 1)])
def test_every_training_row_once(tmp_path, rows, row_group_rows, processes, files):
    dataset = numbered(tmp_path, (rows, 7, 5), row_group_rows, files)
    steps = epoch_of(dataset, processes)
    assert sorted(number for step in steps for part in step for number in part) == list(range(rows))


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("rows", [211, 96, 97, 2, 50])
def test_every_evaluation_row_once_and_in_order(tmp_path, rows, processes):
    dataset = numbered(tmp_path, (60, rows, 9), row_group_rows=13)
    streams = [list(eval_batches(dataset, dataset.splits["val"], 48, process, processes))
               for process in range(processes)]  # fmt: skip
    found, labels = [], []
    for batches in zip(*streams):
        found += [number for batch, _ in batches for number in numbers(batch)]
        [batch_labels] = batches[0][1]
        assert all((other == batch_labels).all() for _, [other] in batches)
        labels += batch_labels.tolist()
    assert found == list(range(rows)) and labels == [row % 2 for row in range(rows)]


def test_one_two_and_four_processes_train_on_the_same_batches(tmp_path):
    dataset = numbered(tmp_path, (1600, 7, 5), row_group_rows=50)
    assert choose_lanes(dataset.splits["train"], 48, 1) == choose_lanes(dataset.splits["train"], 48, 4) == 8
    runs = [epoch_of(dataset, processes) for processes in (1, 2, 4)]
    merged = [[sum(step, []) for step in run] for run in runs]
    assert merged[0] == merged[1] == merged[2]


@pytest.mark.parametrize("row_group_rows", [50, 1013])  # several lanes, one lane
def test_order_depends_on_seed_and_epoch_only_and_resumes_anywhere(tmp_path, row_group_rows):
    dataset = numbered(tmp_path, row_group_rows=row_group_rows)
    first = epoch_of(dataset, 1)
    assert first == epoch_of(dataset, 1)
    for other in (epoch_of(dataset, 1, epoch=2), epoch_of(dataset, 1, seed=2)):
        assert sum(1 for a, b in zip(first, other) if a == b) <= 1  # at most the short last batch
    for step in (1, 7, len(first) - 1):
        assert epoch_of(dataset, 1, first_step=step) == first[step:]


def test_rows_are_mixed_across_row_groups(tmp_path):
    """The first batch has rows of most row groups, not of one."""
    dataset = numbered(tmp_path, (4000, 7, 5), row_group_rows=100)
    [batch] = epoch_of(dataset, 1, batch_size=200)[0]
    assert len({number // 100 for number in batch}) > 30


def test_row_groups_come_in_an_order_of_their_own_for_each_seed_and_epoch(tmp_path):
    dataset = numbered(tmp_path, (1000, 7, 5), row_group_rows=50)
    orders = []
    for seed, epoch in ((1, 1), (1, 2), (2, 1)):
        # a pool that keeps the order of the row groups
        rows = [number for [part] in epoch_of(dataset, 1, seed=seed, epoch=epoch, shuffle_rows=8) for number in part]
        orders.append(list(dict.fromkeys(number // 50 for number in rows)))
    for i, order in enumerate(orders):
        assert sorted(order) == list(range(20)) and order not in [list(range(20)), *orders[:i]]


def test_a_small_pool_still_moves_rows_far(tmp_path):
    blocks = [(np.arange(start, start + 100), np.zeros(100)) for start in range(0, 2000, 100)]
    handed_out = np.concatenate([ids for ids, _ in shuffled(blocks, 400, np.random.default_rng(0))])
    assert sorted(handed_out) == list(range(2000))
    moved = np.abs(handed_out - np.arange(2000))
    assert np.median(moved) > 50 and (np.diff(handed_out) == 1).sum() < 40


def test_row_stream_takes_any_portion():
    stream = RowStream((np.arange(start, start + 10), np.zeros(10)) for start in (0, 10, 20))
    stream.skip(3)
    sizes = [[len(ids) for ids, _ in stream.take(count)] for count in (4, 5, 0, 14, 99)]
    assert sizes == [[4], [3, 2], [], [8, 6], [4]] and stream.take(1) == []


def save_named(folder, names):
    """40 rows, 4 ids in each field -> (dataset, ids)"""
    ids = np.stack([np.arange(40) % 4 + 4 * f for f in range(len(names))], axis=1)
    for split in ("train", "val", "test"):
        write_split(folder / split, np.arange(40) % 2, ids, 9, names)
    return dataset_of(folder, [40] * 3, [4] * len(names)), ids


def test_names_and_number_of_fields(tmp_path):
    """One name begins another, and petastorm takes patterns; more fields than Python once had arguments."""
    for names in (["f", "ff", "日本", "F", "Label2"], [f"field{i}" for i in range(300)]):
        dataset, ids = save_named(tmp_path / str(len(names)), names)
        assert dataset.fields == names
        [(batch, _)] = eval_batches(dataset, dataset.splits["val"], 40, 0, 1)
        assert (batch.ids == ids).all()


@pytest.mark.parametrize("name", ["user id", "f.", "class", "_x", "1st"])
def test_names_that_petastorm_cannot_read(tmp_path, name):
    with pytest.raises(UserError, match="petastorm cannot read the columns .*; rename them"):
        save_named(tmp_path, ["f0", name])


# --------------------------------------------------------------------------------------------- what is wrong with data


def edit_info(change):
    def edit(folder):
        path = folder / "dataset_info.json"
        info = json.loads(path.read_text())
        change(info)
        path.write_text(json.dumps(info))

    return edit


def rewrite(split, change):
    """Damage a split by changing its table's columns {name: array}, with statistics as any writer makes them."""
    def edit(folder):
        path = folder / split / "part-00000.parquet"
        table = pq.read_table(path).to_pandas()
        change(table).to_parquet(path, index=False, row_group_size=51)

    return edit


def truncate(folder):
    path = folder / "val" / "part-00000.parquet"
    path.write_bytes(path.read_bytes()[:-100])


def set_value(column, row, value):
    def change(table):
        table.loc[row, column] = value
        return table

    return change


def cast(column, kind):
    return lambda table: table.astype({column: kind})


def two_columns_of_one_name(folder):
    path = folder / "train" / "part-00000.parquet"
    pq.write_table(pq.read_table(path).rename_columns(["Label", "f0", "f1", "f1"]), path)


NOT_READ = [
    (lambda folder: (folder / "test" / "part-00000.parquet").unlink(), "no *.parquet files in"),
    (lambda folder: os.rename(folder / "val", folder / "valid"), "val; convert data with tools/table_to_parquet.py"),
    (truncate, "is not a readable parquet file"),
    (rewrite("train", lambda table: table.drop(columns="Label")), "lacks the column Label (1)"),
    (rewrite("train", lambda table: table[["Label"]]), "lacks the columns f0, f1, f2 (3)"),
    (rewrite("val", lambda table: table.drop(columns="f1")), "lacks the column f1 (1); its columns are Label, f0, f2"),
    (rewrite("train", cast("f1", str)), "is of type string, expected signed integers"),
    (rewrite("val", cast("f1", "uint16")), "is of type uint16, expected signed integers"),
    (rewrite("val", cast("f1", "uint64")), "is of type uint64, expected signed integers"),
    (rewrite("val", cast("f2", "float64")), "is of type double, expected signed integers"),
    (rewrite("test", lambda table: table.assign(f1=[[1]] * len(table))), "is of type list<"),
    (rewrite("train", cast("Label", str)), "is of type string, expected numbers"),
    (two_columns_of_one_name, "several columns of one name: Label, f0, f1, f1 (4)"),
    (rewrite("test", lambda table: table[:0]), "has no rows"),
    (rewrite("train", lambda table: table[:-1]), "--num_train_samples is 403, but the files in"),
    (rewrite("train", set_value("f1", 5, 99)), "field f1 of the train split has ids from 7 to 99, expected [7, 18)"),
    (rewrite("val", set_value("f0", 5, -1)), "field f0 of the val split has ids from -1 to "),
    (rewrite("test", set_value("Label", 3, 2.0)), "the labels of the test split go from 0 to 2"),
    (rewrite("train", lambda table: table.assign(Label=np.float32(1))), "all labels of the train split are 1"),
    (rewrite("val", lambda table: table.assign(Label=np.float32(0))), "all labels of the val split are 0; AUC"),
    (edit_info(lambda info: info["fields"].clear()), "dataset_info.json names the fields"),
    (edit_info(lambda info: info.pop("fields")), "dataset_info.json cannot be used (it lacks fields); convert"),
    (edit_info(lambda info: info["fields"][0].update(table_size=float("inf"))), "(fields, table_size is inf)"),
    (edit_info(lambda info: info["fields"][0].update(table_size=2**70)), f"(fields, table_size is {2**70})"),
    (edit_info(lambda info: info["fields"][0].update(name=5)), "(fields, name is 5)"),
    (edit_info(lambda info: info["fields"][0].update(name="f1")), "expected names that differ"),
    (edit_info(lambda info: info.update(format_version=3)), "(format_version is 3)"),
    (edit_info(lambda info: info["num_samples"].update(val=102)), "--num_val_samples is 102, but"),
    (edit_info(lambda info: info["fields"][0].update(table_size=7.5)), "(fields, table_size is 7.5)"),
    (edit_info(lambda info: info["fields"][0].update(table_size=3)), "f1 the offset 7, but the tables before it have"),
    (edit_info(lambda info: info["fields"][2].update(table_size=3)), "field f2 of the train split has ids from 18"),
]


@pytest.mark.parametrize("damage, message", NOT_READ, ids=[message for _, message in NOT_READ])
def test_data_errors_are_found_before_training(dataset_dir, damage, message):
    dataset_of(dataset_dir)
    damage(dataset_dir)
    with pytest.raises(UserError) as raised:
        dataset_of(dataset_dir)
    assert message in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("counts, table_sizes, message", [
    ([403, 5, 97], None, "--num_val_samples is 5, but dataset_info.json says 101"),
    (None, [7, 11], "--table_size_array is 7,11, but dataset_info.json says 7,11,40"),
])
def test_arguments_that_contradict_the_data(dataset_dir, counts, table_sizes, message):
    with pytest.raises(UserError, match=message):
        dataset_of(dataset_dir, counts, table_sizes)
    with pytest.raises(UserError, match="--data_dir /no/such/folder is not a folder"):
        dataset_of("/no/such/folder")


def test_columns_that_are_no_fields_are_left_alone(dataset_dir):
    """dataset_info.json says which columns are fields; others may be of any type, and differ between splits."""
    def more_columns(split, position):
        path = dataset_dir / split / "part-00000.parquet"
        table = pq.read_table(path)
        struct = pa.array([{"a": row, "b": -row} for row in range(len(table))])
        for name, values in (("struct", struct), ("text", pa.array(["x"] * len(table))),
                             ("__index_level_0__", pa.array(range(len(table))))):
            table = table.add_column(position, name, values)
        pq.write_table(table, path, row_group_size=51)

    expected = {name: list(read_rows(dataset_of(dataset_dir), split))
                for name, split in dataset_of(dataset_dir).splits.items()}
    more_columns("train", 0)  # statistics of nested columns come before those of the fields
    more_columns("test", 2)
    dataset = dataset_of(dataset_dir)
    assert dataset.fields == ["f0", "f1", "f2"]
    for name, split in dataset.splits.items():
        for block, other in zip(read_rows(dataset, split), expected[name]):
            assert all((array == known).all() for array, known in zip(block, other))


@pytest.mark.parametrize("name", ["data[1]", "a?b", "a#b", "a%41", "a*", "tab\tin", "line\nin", "blank in", "日本"])
def test_paths_are_neither_patterns_nor_urls(tmp_path, name):
    """Siblings that a pattern or a cut URL would find hold other rows."""
    for sibling, seed in (("data1", 1), ("a", 2), ("aXb", 3), (name, 0)):
        make_dataset(tmp_path / sibling, seed=seed)
    expected = pq.read_table(tmp_path / name / "train")
    os.rename(tmp_path / name / "train" / "part-00000.parquet", tmp_path / name / "train" / "x.parquet#1.parquet")
    (tmp_path / name / "train" / "[x]*.txt").write_text("not parquet")
    dataset = dataset_of(tmp_path / name)
    rows = [np.concatenate(arrays) for arrays in zip(*read_rows(dataset, dataset.splits["train"]))]
    assert (rows[0] == np.stack([expected[field].to_numpy() for field in dataset.fields], axis=1)).all()
    assert (rows[1] == expected["Label"].to_numpy()).all()


@pytest.mark.parametrize("make, message", [
    (lambda path: path.mkdir(), "is a folder, expected a parquet file; put the files that Spark wrote"),
    (os.mkfifo, "is not a regular file"),
])
def test_folders_and_pipes_called_parquet(dataset_dir, make, message):
    make(dataset_dir / "val" / "x.parquet")
    with pytest.raises(UserError, match=message):
        dataset_of(dataset_dir)


def test_without_dataset_info_the_arguments_are_needed(tmp_path):
    make_dataset(tmp_path, info=False)
    counts = [403, 101, 97]
    with pytest.raises(UserError, match="--table_size_array is required"):
        dataset_of(tmp_path, counts)
    with pytest.raises(UserError, match="--num_test_samples is required"):
        dataset_of(tmp_path, counts[:2], [7, 11, 40])
    with pytest.raises(UserError, match=r"--table_size_array has 2 values, expected 3: f0, f1, f2 \(3\)"):
        dataset_of(tmp_path, counts, [7, 51])
    assert dataset_of(tmp_path, counts, [7, 11, 40]).table_sizes == TABLE_SIZES
    path = tmp_path / "test" / "part-00000.parquet"
    table = pq.read_table(path)
    pq.write_table(table.append_column("__index_level_0__", table["f0"]), path)  # pandas' index is never a field
    assert dataset_of(tmp_path, counts, [7, 11, 40]).fields == ["f0", "f1", "f2"]
    pq.write_table(table.append_column("extra", table["f0"]), path)
    with pytest.raises(UserError, match=r"not in both: extra \(1\)"):
        dataset_of(tmp_path, counts, [7, 11, 40])


def test_labels_of_any_kind_of_number(dataset_dir):
    for split, kind in (("train", "bool"), ("val", "int8"), ("test", "float64")):
        rewrite(split, cast("Label", kind))(dataset_dir)
    dataset = dataset_of(dataset_dir)
    for split in dataset.splits.values():
        labels = np.concatenate([labels for _, labels in read_rows(dataset, split)])
        assert labels.dtype == np.float32 and set(labels) == {0, 1}


def test_files_are_compared_with_their_digests_before_they_are_read(tmp_path):
    data = make_dataset(tmp_path / "data", digests=True)
    info = json.loads((data / "dataset_info.json").read_text())
    assert sorted(info["files"]) == [f"{split}/part-00000.parquet" for split in ("test", "train", "val")]
    dataset = dataset_of(data)
    rows = sum(len(ids) for ids, _ in read_rows(dataset, dataset.splits["train"]))
    path = data / "train" / "part-00000.parquet"
    content = path.read_bytes()
    for change in (content[:100] + bytes([content[100] ^ 1]) + content[101:], content + b"\0" * 8):
        path.write_bytes(content)
        dataset = dataset_of(data)
        unchecked = read_dataset(str(data), checksums=False)
        path.write_bytes(change)
        with pytest.raises(UserError, match="part-00000.parquet was changed or damaged since dataset_info.json"):
            next(read_rows(dataset, dataset.splits["train"]))
        assert not unchecked.splits["train"].digests
    path.write_bytes(content)
    os.link(path, path.with_name("part-00001.parquet"))
    info["num_samples"]["train"] += rows
    (data / "dataset_info.json").write_text(json.dumps(info))
    with pytest.raises(UserError, match="do not have the same files, different: train/part-00001.parquet"):
        dataset_of(data)


def test_a_row_without_an_id(dataset_dir):
    rewrite("train", lambda table: table.assign(f1=table.f1.astype("Int32").where(table.index != 5)))(dataset_dir)
    dataset = dataset_of(dataset_dir)
    with pytest.raises(UserError, match="field f1 of the train split has rows without an id"):
        list(read_rows(dataset, dataset.splits["train"]))


@pytest.mark.parametrize("column, value, message", [
    ("f2", 5000, r"field f2 of the train split has ids from \d+ to 5000, expected \[18, 58\)"),
    ("Label", 0.5, "the train split has a label 0.5, expected only 0 and 1"),
])
def test_rows_are_checked_where_files_have_no_statistics(dataset_dir, column, value, message):
    path = dataset_dir / "train" / "part-00000.parquet"
    table = pq.read_table(path).to_pandas()
    table.loc[100, column] = value
    pq.write_table(pa.Table.from_pandas(table, preserve_index=False), path, write_statistics=False)
    dataset = dataset_of(dataset_dir)
    with pytest.raises(UserError, match=message):
        list(train_batches(dataset, 64, 0, 1, 0, 1))


def test_labels_of_one_kind_where_files_have_no_statistics(fails, dataset_dir, tmp_path):
    path = dataset_dir / "val" / "part-00000.parquet"
    rows = pq.read_table(path)
    rows = rows.set_column(0, "Label", pa.array(np.ones(len(rows), np.float32)))
    pq.write_table(rows, path, write_statistics=False)
    error = fails(dataset_dir, tmp_path, "--train_batches", "1")
    assert error == "error: all labels of the val split are 1; AUC needs both 0 and 1"


def test_row_group_that_is_damaged(dataset_dir):
    path = dataset_dir / "train" / "part-00000.parquet"
    content = bytearray(path.read_bytes())
    content[4:2000] = os.urandom(1996)
    path.write_bytes(content)
    dataset = dataset_of(dataset_dir)
    with pytest.raises(UserError, match="cannot read the train split"):
        list(train_batches(dataset, 64, 0, 1, 0, 1))


def test_data_errors_end_in_one_line_and_status_1(dataset_dir, tmp_path, capfd, monkeypatch):
    def leave(status):
        raise SystemExit(status)

    monkeypatch.setattr(os, "_exit", leave)
    truncate(dataset_dir)
    with pytest.raises(SystemExit) as ended:
        trainer_module.main(trainer_command(dataset_dir, tmp_path)[2:])
    output, errors = capfd.readouterr()
    lines = [line for line in errors.splitlines() if "parquet" in line]
    assert ended.value.code == 1 and len(lines) == 1 and lines[0].startswith("error: ")
    assert "Traceback" not in output + errors and not (tmp_path / "tables").exists()


def test_one_process_of_several_reports_what_all_meet(dataset_dir, tmp_path):
    rewrite("val", set_value("Label", 7, np.nan))(dataset_dir)  # seen by every process when it evaluates
    command = trainer_command(dataset_dir, tmp_path, "--train_batches", "2", processes=2)
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode == 1 and lines == ["error: the val split has a label nan, expected only 0 and 1"]
    assert "Check failure stack trace" not in result.stdout + result.stderr


def test_two_processes_end_when_nobody_reads_their_output(dataset_dir, tmp_path):
    command = trainer_command(dataset_dir, tmp_path, "--loss_print_interval", "1", processes=2)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    while b"Step 1/" not in process.stdout.readline():
        pass
    process.stdout.close()
    assert process.wait(timeout=60) == 1


def test_too_little_memory_is_one_line(dataset_dir, tmp_path, capfd, monkeypatch):
    def allocate(args):
        raise MemoryError("Unable to allocate 146. TiB")

    monkeypatch.setattr(trainer_module, "run", allocate)
    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(SystemExit) as ended:
        trainer_module.main(trainer_command(dataset_dir, tmp_path)[2:])
    errors = capfd.readouterr().err
    assert ended.value.code == 1 and errors.startswith("error: not enough memory") and "146. TiB" in errors


# -------------------------------------------------------------------------------------------------- readers and threads


def test_a_split_that_lost_rows_while_it_was_read(dataset_dir):
    dataset = dataset_of(dataset_dir)
    dataset.splits["val"].row_groups.append(1)  # as if another row group had been there at the start
    with pytest.raises(UserError, match="fewer rows of the val split"):
        list(read_rows(dataset, dataset.splits["val"]))


def test_prefetched_keeps_order_and_runs_ahead():
    made = []

    def numbers_up_to(count):
        for number in range(count):
            made.append(number)
            yield number

    with prefetched(numbers_up_to(10)) as stream:
        assert next(stream) == 0
        deadline = time.monotonic() + 10
        while len(made) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert 3 <= len(made) <= 5  # ahead, but not by more than the queue
        assert list(stream) == list(range(1, 10))


def test_prefetched_raises_the_readers_error():
    def failing():
        yield 1
        raise UserError("no more")

    with prefetched(failing()) as stream:
        assert next(stream) == 1
        with pytest.raises(UserError, match="no more"):
            next(stream)


def test_prefetched_ends_its_thread_and_closes_the_reader():
    closed, before = [], threading.active_count()

    def endless():
        try:
            while True:
                yield 0
        finally:
            closed.append(True)

    with prefetched(endless()) as stream:
        next(stream)
    assert closed == [True] and threading.active_count() == before
