"""tools/trainer/runs.py: finding runs, reading what they wrote, their best evaluation, and damaged files."""

import json
import math

import numpy as np
import pytest
from compare_runs import report
from made_runs import LINES, eval_line, run_info, train_line, write_run

from tools.trainer import runs
from tools.trainer.cli import UserError


def read(*paths):
    return runs.read_some_runs(paths)[0]


def test_a_run_is_found_by_its_folder_its_logs_and_its_file(tmp_path):
    folder = write_run(tmp_path / "demo" / "logs").parent
    for path in (folder, folder / "logs", folder / "logs" / "metrics.jsonl"):
        assert [run.name for run in read(str(path))] == ["demo"]
    (tmp_path / "link").symlink_to(folder)
    assert len(read(folder, folder / "logs", tmp_path / "link")) == 1  # a run given twice counts once


def test_a_folder_of_runs_in_the_order_of_their_numbers(tmp_path):
    for name in ("seed_10", "seed_2", "rate_1e-3", "rate_3e-4", "more/seed_1"):
        write_run(tmp_path / name / "logs")
    (tmp_path / "empty" / "deep" / "deeper").mkdir(parents=True)
    assert [run.name for run in read(tmp_path)] == ["more/seed_1", "rate_3e-4", "rate_1e-3", "seed_2", "seed_10"]


def test_names_of_folders_are_no_patterns(tmp_path):
    write_run(tmp_path / "a1")
    write_run(tmp_path / "a[1]", LINES[:2])
    assert [run.val for run in read(tmp_path / "a[1]")] == [[]]


def test_runs_of_one_name_are_called_by_their_paths(tmp_path):
    same = [write_run(tmp_path / name / "run" / "logs").parent for name in "xy"]
    assert [run.name for run in read(*same)] == [str(path) for path in same]


def test_runs_without_metrics_are_named(tmp_path):
    write_run(tmp_path / "going")
    write_run(tmp_path / "starting", [])
    found, without = runs.read_some_runs([tmp_path])
    assert [run.name for run in found] == ["going"] and without == ["starting"]
    with pytest.raises(UserError, match="no metrics yet: starting .1.; wait for the first logged step"):
        runs.read_some_runs([tmp_path / "starting"])


def test_a_line_that_is_being_written_is_left_out(tmp_path):
    folder = write_run(tmp_path / "a", LINES[:2])
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"event": "train", "st')
    assert [line["step"] for line in read(folder)[0].train] == [10, 20]


@pytest.mark.parametrize("content, message", [
    ("loss 0.5\n", r"line 1 is not a line of the trainer's log \(Expecting value"),
    ('{"event": "train", "step": 1}\n', r"line 1 is not .* \(it lacks epoch\)"),
    ('{"event": "lunch"}\n', r"\(event is 'lunch'\)"),
    ('{"event": ["val"]}\n', r"\(event is \['val'\]\)"),
    ("[1]\n", r"\(it is \[1\], expected an object\)"),
    ("[" * 100_000 + "\n", r"line 1 is not .* \(maximum recursion depth"),
    (json.dumps(train_line(True)) + "\n", r"\(step is True\)"),
    (json.dumps(train_line(1.5)) + "\n", r"\(step is 1.5\)"),
    (json.dumps(train_line(10**400)) + "\n", r"\(step is 1000"),
    (json.dumps(train_line(1, loss=10**400)) + "\n", r"\(loss is 1000"),
    (json.dumps(eval_line("val", 1, 1, 0.7, 0.4, monitor="high")) + "\n", r"\(monitor is 'high'\)"),
    (json.dumps(train_line(1)) + "\n\udcff\n", r"line 2 is not .* \('utf-8' codec can't decode byte 0xff"),
])
def test_files_that_are_no_metrics(tmp_path, content, message):
    (tmp_path / "metrics.jsonl").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=message) as caught:
        read(tmp_path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize("content, message", [
    ("{", r"run.json cannot be used \(Expecting property name"),
    ("[]", r"it is \[\], expected an object"),
    ('{"options": 3}', r"options is 3"),
    ('{"options": {}, "monitor": ["auc"]}', r"monitor is \['auc'\]"),
    ('{"options": {}, "data": "x"}', r"data is 'x'"),
])
def test_a_damaged_run_json(tmp_path, content, message):
    (write_run(tmp_path) / "run.json").write_text(content)
    with pytest.raises(UserError, match=message + ".*mend it, or move it away"):
        read(tmp_path)


def test_a_run_json_without_options_is_one_of_an_earlier_version(tmp_path):
    """The mark of a run that lies in --model_save_dir, when that is also its --log_dir."""
    assert read(write_run(tmp_path, info={"run_id": "x", "model_load_dir": None}))[0].info is None


@pytest.mark.parametrize("path, message", [
    ("none", "does not exist; give the --model_save_dir"),
    ("empty", "has neither logs/metrics.jsonl nor metrics.jsonl"),
    ("/dev/null", "/dev/null is neither a file nor a folder"),
])
def test_paths_that_are_no_runs(tmp_path, path, message):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=message):
        read(tmp_path / path)


@pytest.mark.parametrize("monitor, epoch", [("auc-logloss", 2), ("auc", 3), ("logloss", 1)])
def test_best_evaluation_is_the_one_with_the_largest_monitor(tmp_path, monitor, epoch):
    [run] = read(write_run(tmp_path, LINES[:-1], run_info(monitor=monitor)))
    assert runs.best_evaluation(run)["epoch"] == epoch


def test_the_monitor_that_was_written_wins(tmp_path):
    lines = [eval_line("val", 1, 1, 0.7, 0.4, monitor=0.9), eval_line("val", 2, 2, 0.8, 0.3, monitor=0.8),
             eval_line("val", 3, 3, math.nan, 0.3)]
    assert runs.best_evaluation(read(write_run(tmp_path, lines))[0])["epoch"] == 1


def test_best_evaluation_is_the_one_that_test_was_scored_with(tmp_path):
    """With a large --min_delta a later epoch with a larger monitor is no gain."""
    [run] = read(write_run(tmp_path, [*LINES[:-1], eval_line("test", 20, 1, 0.65, 0.45)]))
    assert runs.best_evaluation(run)["epoch"] == 1


def test_speed_is_the_median_without_the_first_interval(tmp_path):
    speeds = [1, 100, 300, 200]
    lines = [train_line(step, speed=speed) for step, speed in enumerate(speeds, 1)]
    assert runs.samples_per_second(read(write_run(tmp_path / "a", lines))[0]) == 200
    assert runs.samples_per_second(read(write_run(tmp_path / "b", lines[:1]))[0]) == 1
    assert runs.samples_per_second(read(write_run(tmp_path / "c", LINES[2:3]))[0]) is None


def test_columns_that_do_not_fit_go_below():
    rows = [["run", "first", "second", "third"], ["a", "1", "2", "3"], ["b", "10", "20", "30"]]
    assert runs.table_text(rows) == ("run  first  second  third\n"
                                     "a        1       2      3\n"
                                     "b       10      20     30")  # fmt: skip
    blocks = runs.table_text(rows, 18).split("\n\n")
    assert [block.splitlines()[0].split() for block in blocks] == [["run", "first", "second"], ["run", "third"]]
    assert runs.table_text(rows, 1).count("run") == 3  # a column is never lost


def test_texts_are_cut_in_the_middle_and_printable():
    assert runs.cut_middle("learning_rate_0.001,seed_1", 15) == "learni...seed_1"
    assert runs.printable("a\nb\x1b\udcff") == "a?b??"


def test_mutated_files_give_a_table_or_one_line(tmp_path):
    """Bytes and values changed at random, always the same ones."""
    rng = np.random.default_rng(7)
    lines = [json.dumps(line).encode() for line in LINES]
    info = json.dumps(run_info()).encode()
    odd = [b"null", b"-1", b"1e999", b"NaN", b"[]", b"{}", b'"x"', b"true", b"1" * 400, b"[" * 2000, b"", b"\xff\xfe"]
    refused = 0
    for _ in range(400):
        damaged = [*lines, info]
        for _ in range(rng.integers(1, 4)):
            place = rng.integers(len(damaged))
            text = bytearray(damaged[place])
            start = rng.integers(len(text) + 1)
            text[start:start + rng.integers(0, 9)] = odd[rng.integers(len(odd))]
            damaged[place] = bytes(text)
        (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(damaged[:-1]) + b"\n")
        (tmp_path / "run.json").write_bytes(damaged[-1])
        try:
            assert "samples/s" in report(*runs.read_some_runs([tmp_path]))
        except UserError as error:
            assert str(tmp_path) in str(error) and "\n" not in str(error)
            refused += 1
    assert 300 < refused < 400
