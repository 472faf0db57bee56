"""tools/compare_runs.py: what differs, means over seeds, the table and JSON."""

import json
import math
import os
import statistics
import subprocess
import sys

import compare_runs
import pytest
from conftest import ROOT
from made_runs import LINES, eval_line, run_info, train_line, write_run

from tools.trainer.runs import read_some_runs

TEST_AUCS = {0.001: [0.70, 0.72, 0.77], 0.01: [0.80, 0.81, 0.79]}  # by learning rate, for the seeds 1, 2, 3


def result_lines(auc):
    return [train_line(5), eval_line("val", 5, 1, auc + 0.01, 0.4), eval_line("test", 5, 1, auc, 0.5)]


@pytest.fixture
def sweep(tmp_path):
    for rate, aucs in TEST_AUCS.items():
        for seed, auc in enumerate(aucs, 1):
            write_run(tmp_path / f"rate_{rate},seed_{seed}" / "logs", result_lines(auc),
                      run_info(seed, learning_rate=rate))
    return tmp_path


def compared(*paths):
    return compare_runs.compare(read_some_runs(paths)[0])


def table(text):
    """[{header: cell}] of the lines of one table; no cell here holds two spaces."""
    header, *lines = ([cell.strip() for cell in line.split("  ") if cell.strip()] for line in text.splitlines())
    return [dict(zip(header, line)) for line in lines]


def test_only_what_differs_has_a_column(sweep):
    comparison = compared(sweep)
    assert comparison["differing"] == ["seed", "learning_rate"]
    assert comparison["runs"][0]["differs"] == {"seed": 1, "learning_rate": 0.001}


def test_places_are_no_difference_but_data_versions_and_device_are(tmp_path):
    info = run_info()
    other = json.loads(json.dumps(info))
    other["options"].update(model_save_dir="elsewhere", persistent_path="p", resume=True)
    other["data"]["dir"] = "copy"
    runs = [write_run(tmp_path / "a", info=info), write_run(tmp_path / "b", info=other)]
    assert compared(*runs)["differing"] == []
    assert len(compared(*runs)["groups"]) == 1
    other["data"]["fingerprint"], other["versions"]["oneflow"], other["device"] = "beef", "0.8.0", "cuda"
    other["machine"]["cpu"] = "one core"
    write_run(tmp_path / "b", info=other)
    assert compared(*runs)["differing"] == ["device", "data", "version oneflow", "machine cpu"]
    assert len(compared(*runs)["groups"]) == 2


def test_data_folder_counts_where_there_is_no_fingerprint(tmp_path):
    runs = [write_run(tmp_path / name, info={**run_info(data_dir=name), "data": {}}) for name in "ab"]
    assert compared(*runs)["differing"] == ["data_dir"]


def test_an_option_that_only_one_version_has_is_a_difference(tmp_path):
    runs = [write_run(tmp_path / "a", info=run_info()), write_run(tmp_path / "b", info=run_info(warmup_batches=0))]
    rows = table(compare_runs.report(read_some_runs(runs)[0]).split("\n\n")[0])
    assert [row["warmup_batches"] for row in rows] == ["-", "0"]


def test_options_of_a_restart_count(tmp_path):
    changes = [{"epochs": 5}, {"epochs": 9, "resume": True, "model_load_dir": None}]
    info = {**run_info(epochs=1, model_load_dir="best"), "restarts": [{"step": 5, "options": one} for one in changes]}
    other = run_info(2, epochs=1, model_load_dir="best")
    runs = [write_run(tmp_path / "a", info=info), write_run(tmp_path / "b", info=other)]
    comparison = compared(*runs)
    assert comparison["runs"][0]["differs"] == {"seed": 1, "epochs": 9} and len(comparison["groups"]) == 2


def test_mean_and_deviation_over_the_seeds(sweep):
    groups = compared(sweep)["groups"]
    assert [group["differs"] for group in groups] == [{"learning_rate": 0.01}, {"learning_rate": 0.001}]  # best first
    for group, aucs in zip(groups, (TEST_AUCS[0.01], TEST_AUCS[0.001])):
        assert group["test_auc"] == {"mean": pytest.approx(statistics.mean(aucs)),
                                     "std": pytest.approx(statistics.stdev(aucs)), "n": 3}
        assert group["seeds"] == [1, 2, 3]
    assert groups[1]["test_auc"]["std"] == pytest.approx(0.0360555)  # sqrt((0.03^2 + 0.01^2 + 0.04^2) / 2)


def test_the_text(sweep):
    runs, _ = read_some_runs([sweep])
    first, second, note = compare_runs.report(runs).split("\n\n")
    rows = table(first)
    assert len(rows) == 6
    assert rows[0] == {"run": "rate_0.001,seed_1", "seed": "1", "learning_rate": "0.001", "steps": "5",
                       "best epoch": "1", "val AUC": "0.710000", "val logloss": "0.400000", "test AUC": "0.700000",
                       "test logloss": "0.500000", "samples/s": "1000.0"}
    title, rows = second.splitlines()[0], table("\n".join(second.splitlines()[1:]))
    assert title == "runs that differ in the seed only, mean +- standard deviation:"
    assert rows[0]["seeds"] == "3" and rows[0]["test AUC"] == "0.800000 +- 0.010000"
    assert note == "largest val AUC - logloss: 0.420000, rate_0.01,seed_2"


def test_a_seed_counts_once_and_unfinished_runs_say_so(tmp_path):
    for name, seed, lines in (("a", 1, result_lines(0.7)), ("b", 1, result_lines(0.9)), ("c", 2, LINES[:3])):
        write_run(tmp_path / name, lines, run_info(seed))
    text = compare_runs.report(read_some_runs([tmp_path])[0])
    group = table("\n".join(text.split("\n\n")[1].splitlines()[1:]))[0]
    assert group["seeds"] == "2" and group["test AUC"] == "0.700000 (1 of 2)"
    assert "left out of the means, as another run has the same options and seed: 1" in text


def test_runs_without_run_json_show_their_metrics(tmp_path):
    write_run(tmp_path / "old")
    write_run(tmp_path / "new", info=run_info(1))
    write_run(tmp_path / "newer", info=run_info(2))
    write_run(tmp_path / "starting", [])
    text = compare_runs.report(*read_some_runs([tmp_path]))
    rows = {row["run"]: row for row in table(text.split("\n\n")[0])}
    assert rows["old"]["seed"] == "-" and rows["old"]["test AUC"] == "0.780000" and rows["new"]["seed"] == "1"
    assert text.splitlines()[-2:] == ["options unknown, no run.json: old (1)", "no metrics yet: starting (1)"]


def test_other_metrics_have_columns_where_a_run_has_them(tmp_path):
    more = {"gauc": 0.6, "calibration": 1.02, "ece": 0.003}
    write_run(tmp_path / "a", [*LINES[:-1], eval_line("test", 40, 2, 0.78, 0.42, **more)], run_info(1))
    write_run(tmp_path / "b", info=run_info(2))
    rows = table(compare_runs.report(read_some_runs([tmp_path])[0]).split("\n\n")[0])
    assert (rows[0]["test GAUC"], rows[0]["test pCTR/CTR"], rows[0]["test ECE"]) == ("0.600000", "1.0200", "0.003000")
    assert rows[1]["test GAUC"] == "-" and "val GAUC" not in rows[0]


def test_different_monitors_are_not_ranked(tmp_path):
    for monitor in ("auc", "logloss"):
        for seed in (1, 2):
            write_run(tmp_path / f"{monitor}{seed}", info=run_info(seed, monitor))
    text = compare_runs.report(read_some_runs([tmp_path])[0])
    assert "largest" not in text


def test_evaluations_within_an_epoch_are_named_by_their_step(tmp_path):
    lines = [train_line(5), eval_line("val", 5, 1, 0.6, 0.5), eval_line("val", 9, 1, 0.7, 0.4)]
    assert table(compare_runs.report(read_some_runs([write_run(tmp_path, lines)])[0]))[0]["best step"] == "9"


def test_long_values_are_cut_and_json_has_all(tmp_path, capsys):
    lists = [[1000] * 9, [1000] * 8 + [500]]
    for number, dnn in enumerate(lists):
        write_run(tmp_path / f"{number}{'x' * 200}", info=run_info(dnn=dnn))
    assert compare_runs.main([str(tmp_path)]) == 0
    rows = table(capsys.readouterr().out.split("\n\n")[0])
    assert [row["dnn"] for row in rows] == ["1000,1000,...0,1000,1000", "1000,1000,...00,1000,500"]
    assert [len(row["run"]) for row in rows] == [44, 44]
    assert compare_runs.main(["--json", str(tmp_path)]) == 0
    assert [run["differs"]["dnn"] for run in json.loads(capsys.readouterr().out)["runs"]] == lists


def test_json_has_no_nan(tmp_path, capsys):
    write_run(tmp_path, [*LINES[:3], eval_line("test", 20, 1, math.nan, math.inf)])
    assert compare_runs.main(["--json", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "NaN" not in printed and "Infinity" not in printed
    [run] = json.loads(printed)["runs"]
    assert run["test"]["auc"] is None and run["val"]["auc"] == 0.7


def run_tool(*arguments, **options):
    return subprocess.Popen([sys.executable, str(ROOT / "tools" / "compare_runs.py"), *map(str, arguments)],
                            stderr=subprocess.PIPE, text=True, **options)


def test_nobody_reads_the_output(tmp_path):
    write_run(tmp_path)
    tool = run_tool(tmp_path, stdout=subprocess.PIPE)
    tool.stdout.close()
    assert tool.stderr.read() == "error: nobody reads the output any more\n" and tool.wait() == 1
    closed = run_tool(tmp_path, preexec_fn=lambda: os.close(1))
    assert closed.stderr.read() == "" and closed.wait() == 0


def test_names_that_the_terminal_cannot_show(tmp_path):
    write_run(tmp_path / "käse")
    tool = run_tool(tmp_path, stdout=subprocess.PIPE, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert "k\\xe4se" in tool.stdout.read() and tool.stderr.read() == ""


def test_mistakes_are_one_line(tmp_path, capsys):
    assert compare_runs.main([str(tmp_path / "none")]) == 1
    error = capsys.readouterr().err
    assert error == f"error: {tmp_path}/none does not exist; give the --model_save_dir or --log_dir of a training run\n"
