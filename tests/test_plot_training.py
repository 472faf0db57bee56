"""tools/plot_training.py: the table, what is drawn where, many runs, calibration, and error lines."""

import math
import os
import signal
import subprocess
import sys
import warnings

import matplotlib.pyplot as plt
import numpy as np
import plot_training
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, train_here
from made_runs import LINES, eval_line, run_info, train_line, write_run

from tools.trainer.calibration import equal_mass_bins
from tools.trainer.runs import read_some_runs

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of pyparsing, inside matplotlib


def draw(*paths):
    """{title of a panel: its axes}"""
    figure = plot_training.draw(read_some_runs(paths)[0])
    axes = {panel.get_title(loc="left"): panel for panel in figure.axes}
    plt.close(figure)
    return axes


def markers(axes, marker):
    return [(float(line.get_xdata()[0]), float(line.get_ydata()[0])) for line in axes.lines
            if line.get_marker() == marker]


def test_a_real_resumed_run_with_cuts(shared_dataset_dir, tmp_path, capsys):
    options = ["--model_save_dir", tmp_path / "demo", "--loss_print_interval", 2, "--patience", 1, "--min_delta", 1]
    train_here(shared_dataset_dir, tmp_path, *options, "--train_batches", 14)
    train_here(shared_dataset_dir, tmp_path, *options, "--train_batches", 28, "--resume")
    assert plot_training.main([str(tmp_path / "demo"), "--output", str(tmp_path / "new" / "demo.png")]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[1].split()[:2] == ["demo", "28"] and out[2] == f"wrote {tmp_path}/new/demo.png"
    picture = plt.imread(tmp_path / "new" / "demo.png")
    assert picture.shape[1] == 1350 and picture.std() > 0.05
    axes = draw(tmp_path / "demo")
    assert list(axes["Training loss"].lines[0].get_xdata()) == list(range(2, 29, 2))
    # min_delta 1: no epoch but the first is a gain, so every one cuts the rate to a tenth
    assert [rate for _, rate in markers(axes["Learning rate"], "v")] == pytest.approx([0.001, 0.0001])


def segments(axes, number=0):
    """[(from, to, value)] of a stepped line: the value that is drawn between two places."""
    line = axes.lines[number]
    assert line.get_drawstyle() == "steps-pre"
    steps, values = line.get_xdata(), line.get_ydata()
    return [(float(a), float(b), float(v)) for a, b, v in zip(steps, steps[1:], values[1:])]


def test_best_evaluation_and_table(tmp_path):
    axes = draw(write_run(tmp_path / "a"))
    assert markers(axes["Val AUC"], "*") == [(2, 0.79)]
    assert markers(axes["Val logloss"], "*") == [(2, 0.41)]
    assert markers(axes["Val AUC - logloss (monitor)"], "*") == [(2, pytest.approx(0.38))]
    rows = plot_training.table_rows(read_some_runs([tmp_path / "a"])[0])
    assert rows[1] == ["a", "50", "2", "0.790000", "0.410000", "0.780000", "0.420000"]


def test_the_learning_rate_is_drawn_where_it_was_used(tmp_path):
    """The line of step 300 tells the rate of the steps 201 to 300."""
    lines = [train_line(100, 0.01), train_line(200, 0.01), eval_line("val", 200, 1, 0.7, 0.4), train_line(300, 0.001)]
    axes = draw(write_run(tmp_path / "a", lines))["Learning rate"]
    assert segments(axes) == [(0, 100, 0.01), (100, 200, 0.01), (200, 300, 0.001)]
    assert markers(axes, "v") == [(200, 0.001)]


def test_a_cut_between_two_lines_is_where_the_evaluation_was(tmp_path):
    lines = [train_line(100, 0.01), eval_line("val", 125, 1, 0.7, 0.4), eval_line("val", 150, 1, 0.6, 0.4),
             train_line(200, 0.001)]
    axes = draw(write_run(tmp_path / "a", lines))["Learning rate"]
    assert segments(axes) == [(0, 150, 0.01), (150, 200, 0.001)]
    assert axes.get_title(loc="right") == "triangle: cut"


def test_a_rising_rate_is_no_cut(tmp_path):
    """Warm-up."""
    lines = [train_line(10, 0.001), eval_line("val", 15, 1, 0.7, 0.4), train_line(20, 0.002)]
    axes = draw(write_run(tmp_path / "a", lines))["Learning rate"]
    assert segments(axes) == [(0, 10, 0.001), (10, 20, 0.002)]
    assert markers(axes, "v") == [] and axes.get_title(loc="right") == ""


def test_notes_name_only_what_is_there(tmp_path):
    axes = draw(write_run(tmp_path / "a", [train_line(10), train_line(20)]))
    assert [panel.get_title(loc="right") for panel in axes.values()] == [""] * 6
    many = [train_line(step) for step in range(1, 101)]
    axes = draw(write_run(tmp_path / "b", [*many, eval_line("val", 100, 1, 0.7, 0.4)]))
    assert axes["Training loss"].get_title(loc="right") == "thick: moving average"
    assert axes["Val AUC"].get_title(loc="right") == "star: best evaluation"


@pytest.mark.parametrize("monitor, star, titles", [
    ("auc", (3, 0.80), ["Val AUC (monitor)", "Val logloss"]),
    ("logloss", (1, 0.70), ["Val AUC", "Val logloss (monitor)"]),
])
def test_a_monitor_that_has_a_panel_gets_no_second(tmp_path, monitor, star, titles):
    axes = draw(write_run(tmp_path / "a", LINES[:-1], run_info(monitor=monitor)))
    assert [title for title in axes if title.startswith("Val")] == titles
    assert markers(axes[titles[0]], "*") == [star]


def test_runs_with_different_monitors(tmp_path):
    """Each star is where the run's own monitor is largest; no panel is everybody's monitor."""
    for monitor in ("auc", "logloss", "auc-logloss"):
        write_run(tmp_path / monitor, LINES[:-1], run_info(monitor=monitor))
    axes = draw(tmp_path)
    assert [title for title in axes if title.startswith("Val")] == ["Val AUC", "Val logloss", "Val AUC - logloss"]
    assert sorted(markers(axes["Val AUC"], "*")) == [(1, 0.70), (2, 0.79), (3, 0.80)]
    assert axes["Val AUC"].get_title(loc="right") == "star: best by the run's monitor"


def test_several_runs_are_told_apart(tmp_path):
    for name in "xyz":
        write_run(tmp_path / name)
    axes = draw(tmp_path)["Val AUC"]
    assert len({line.get_color() for line in axes.lines if line.get_marker() == "*"}) == 3
    looks = [plot_training.look_of(number) for number in range(plot_training.COLOURED)]
    assert len({(look["color"], look["linestyle"]) for look in looks}) == len({look["marker"] for look in looks}) == 10


def test_of_many_runs_the_best_are_coloured(tmp_path):
    for number in range(13):
        lines = [train_line(10), eval_line("val", 10, 1, 0.1 + number / 100, 0.4)]
        write_run(tmp_path / f"run_{number}", lines)
    figure = plot_training.draw(read_some_runs([tmp_path])[0])
    texts = [text.get_text() for text in figure.texts]
    plt.close(figure)
    assert [text for text in texts if text.startswith("run_")] == [f"run_{number}" for number in range(12, 2, -1)]
    assert "3 more runs, with a smaller val AUC - logloss" in texts
    axes = next(panel for panel in figure.axes if panel.get_title(loc="left") == "Val AUC")
    assert len(axes.lines) == 2 * 10 + 3  # curves and stars, and the grey ones
    grey = [line for line in axes.get_lines() if line.get_color() == plot_training.GREY]
    assert [line.get_ydata()[0] for line in grey] == pytest.approx([0.12, 0.11, 0.10])
    assert axes.get_ylim()[0] > 0.12  # they do not stretch the scale


def test_texts_of_the_table_do_not_overlap(tmp_path):
    name = "run_with_a_rather_long_name_number_0_of_the_sweep_lr_0"
    folder = write_run(tmp_path / name, [train_line(99_999_999), eval_line("val", 9, 1, 0.7, 0.4)])
    runs = read_some_runs([folder])[0]
    figure = plot_training.draw(runs)
    rows = plot_training.table_rows(runs)
    boxes = {text.get_text(): text.get_window_extent() for text in figure.texts}
    plt.close(figure)
    assert len(rows[1][0]) == plot_training.LONGEST_NAME
    for row in rows:
        for left, right in zip(row, row[1:]):
            assert left == "-" or right == "-" or boxes[left].x1 < boxes[right].x0


def test_names_are_no_formulas(tmp_path):
    write_run(tmp_path / "$a_$b^{")
    write_run(tmp_path / "名")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        assert plot_training.main([str(tmp_path), "--output", str(tmp_path / "a.png")]) == 0
    assert plt.imread(tmp_path / "a.png").std() > 0.05


def test_nothing_is_drawn_on_the_edge_and_epochs_are_whole_numbers(tmp_path):
    lines = [train_line(10), eval_line("val", 10, 1, 0.7, 0.4), train_line(20, speed=1030.0)]
    axes = draw(write_run(tmp_path / "a", lines))
    low, high = axes["Throughput, samples/s"].get_ylim()
    assert low == 0 and high > 1.05 * 1030
    assert all(tick == int(tick) for tick in axes["Val AUC"].get_xticks())
    limits = {axes[title].get_xlim() for title in ("Training loss", "Learning rate", "Throughput, samples/s")}
    assert len(limits) == 1  # steps are at the same place everywhere


def test_evaluations_within_an_epoch_are_drawn_over_their_steps(tmp_path):
    lines = [train_line(5), eval_line("val", 5, 1, 0.6, 0.5), eval_line("val", 9, 1, 0.7, 0.4)]
    folder = write_run(tmp_path / "a", lines)
    axes = draw(folder)["Val AUC"]
    assert (list(axes.lines[0].get_xdata()), list(axes.lines[0].get_ydata())) == ([5, 9], [0.6, 0.7])
    assert axes.get_xlabel() == "step" and markers(axes, "*") == [(9, 0.7)]
    assert plot_training.table_rows(read_some_runs([folder])[0])[0][2] == "best step"


def test_moving_average():
    values = np.random.default_rng(0).random(100)
    expected = [values[max(0, i - 4):i + 1].mean() for i in range(100)]
    np.testing.assert_allclose(plot_training.moving_average(values), expected)
    assert list(plot_training.moving_average(np.array([1.0, 5.0]))) == [1, 5]
    gap = plot_training.moving_average(np.where(np.arange(100) == 50, np.nan, 1.0))
    assert list(gap) == [1] * 100  # does not spread


def test_a_run_that_is_still_going_on(tmp_path):
    folder = write_run(tmp_path / "a", LINES[:2])
    assert plot_training.table_rows(read_some_runs([folder])[0])[1] == ["a", "20", "-", "-", "-", "-", "-"]
    assert [text.get_text() for text in draw(folder)["Val AUC"].texts] == ["nothing logged yet"]
    only_val = write_run(tmp_path / "b", LINES[2:3])
    assert [text.get_text() for text in draw(only_val)["Learning rate"].texts] == ["nothing logged yet"]


@pytest.mark.parametrize("line", [
    train_line(1, loss=math.nan), train_line(1, lr=0.0), train_line(1, lr=-1), train_line(1, lr=1e38, speed=1e38),
    train_line(1, loss=math.inf, speed=math.inf), train_line(1, lr=math.nan, speed=-1.0),
    eval_line("val", 1, 1, math.nan, math.nan), eval_line("test", 1, 1, math.inf, 1e38),
])
def test_odd_numbers_are_drawn_or_left_out(tmp_path, line):
    for number, lines in enumerate(([line], [train_line(1), line, train_line(2), eval_line("val", 2, 1, 0.7, 0.4)])):
        folder = write_run(tmp_path / str(number), lines)
        assert plot_training.main([str(folder), "--output", str(tmp_path / "a.png")]) == 0


# --------------------------------------------------------------------------------------------------------- calibration


def write_predictions(path, labels, probs, **more):
    pq.write_table(pa.table({"probability": probs, "Label": labels, **more}), path)
    return path


def made_predictions(count=3000, seed=0):
    """(labels, probabilities), calibrated"""
    rng = np.random.default_rng(seed)
    probs = rng.beta(1, 3, count).astype(np.float32)
    return (rng.random(count) < probs).astype(np.float32), probs


def test_the_reliability_curve_shows_the_bins(tmp_path, capsys):
    labels, probs = made_predictions()
    path = write_predictions(tmp_path / "p.parquet", labels, probs)
    assert plot_training.main(["--calibration", str(path), "--output", str(tmp_path / "c.png")]) == 0
    header, row, wrote = capsys.readouterr().out.splitlines()
    ratio = probs.mean(dtype=float) / labels.mean()
    assert row.split()[:4] == ["p", "3000", str(int(labels.sum())), f"{probs.mean(dtype=float):.6f}"]
    assert float(row.split()[5]) == pytest.approx(ratio, abs=1e-4)
    assert plt.imread(tmp_path / "c.png").shape[1] == 1350
    bins = equal_mass_bins(labels, probs)
    figure = plot_training.draw_calibration(["p"], [bins])
    curve, counts = figure.axes
    plt.close(figure)
    np.testing.assert_array_equal(curve.lines[0].get_xdata(), bins.predicted)
    np.testing.assert_array_equal(curve.lines[0].get_ydata(), bins.actual)
    np.testing.assert_array_equal(counts.lines[0].get_ydata(), [150] * 20)
    assert curve.get_xscale() == "linear"


def test_rare_clicks_are_drawn_on_logarithmic_scales():
    rng = np.random.default_rng(1)
    probs = 10 ** rng.uniform(-5, -1, 20_000)
    bins = equal_mass_bins(rng.random(20_000) < probs, probs)
    assert (bins.actual == 0).any()  # has no logarithm
    figure = plot_training.draw_calibration(["p"], [bins])
    plt.close(figure)
    assert figure.axes[0].get_xscale() == figure.axes[0].get_yscale() == "log"
    assert figure.axes[0].get_xlim() == figure.axes[0].get_ylim()


def test_wilson_interval():
    """From its definition: the rates p with |rate - p| = z sqrt(p (1 - p) / n)."""
    for rate, count in ((0.0, 50), (0.2, 10), (0.5, 1000), (1.0, 7)):
        for bound in plot_training.wilson(rate, count):
            assert abs(rate - bound) == pytest.approx(1.96 * math.sqrt(bound * (1 - bound) / count), abs=1e-9)


def test_predictions_as_csv_and_with_weights(tmp_path):
    labels, probs = made_predictions(40)
    weights = np.arange(40.0)
    parquet = write_predictions(tmp_path / "p.parquet", labels, probs, w=weights)
    (tmp_path / "p.csv").write_text("w,Label,other,probability\n" + "".join(
        f"{w:g},{label:g},x,{p!r}\n" for w, label, p in zip(weights, labels, probs.astype(float))))
    for path in (parquet, tmp_path / "p.csv"):
        read = plot_training.read_predictions(str(path), "w")
        for found, expected in zip(read, (labels, probs, weights)):
            np.testing.assert_allclose(found, expected)
    assert plot_training.read_predictions(str(parquet))[2] is None


@pytest.mark.parametrize("columns, message", [
    ({"probability": [0.5]}, "lacks the column Label, it has probability (1); predict with --keep_columns Label (of "
                             "raw rows the label has its own name: rename its column to Label)"),
    ({"Label": [1], "p": [0.5]}, "lacks the column probability, it has Label, p (2)"),
    ({"probability": [0.5, 1.5], "Label": [0, 1]}, "row 2: probability is 1.5, expected from 0 to 1"),
    ({"probability": [None, 0.5], "Label": [0, 1]}, "row 1: probability is nan, expected from 0 to 1"),
    ({"probability": [0.5, 0.5], "Label": [0, 2]}, "row 2: Label is 2, expected 0 or 1"),
    ({"probability": [], "Label": []}, "has no rows"),
    ({"probability": ["x"], "Label": [0]}, "cannot be read as parquet or CSV with numbers"),
    ({"probability": [[0.5]], "Label": [0]}, "cannot be read as parquet or CSV with numbers"),
])
def test_predictions_that_cannot_be_drawn(tmp_path, capsys, columns, message):
    path = tmp_path / "p.parquet"
    pq.write_table(pa.table(columns), path)
    assert plot_training.main(["--calibration", str(path), "--output", str(tmp_path / "c.png")]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {path}") and message in error and error.count("\n") == 1
    assert not (tmp_path / "c.png").exists()


@pytest.mark.parametrize("weights, message", [
    ([1, -1], "row 2: w is -1, expected a number from 0 on"), ([0, 0], "the weights in w are all 0")])
def test_weights_that_cannot_be_used(tmp_path, capsys, weights, message):
    path = write_predictions(tmp_path / "p.parquet", [0, 1], [0.5, 0.5], w=weights)
    assert plot_training.main(["--calibration", str(path), "--weight_column", "w"]) == 1
    assert message in capsys.readouterr().err


def test_damaged_predictions_are_one_line(tmp_path, capsys):
    labels, probs = made_predictions(500)
    whole = write_predictions(tmp_path / "p.parquet", labels, probs).read_bytes()
    rng = np.random.default_rng(3)
    for _ in range(60):
        text = bytearray(whole)
        start = rng.integers(4, len(text))
        text[start:start + 8] = rng.bytes(8)
        (tmp_path / "p.parquet").write_bytes(text[:rng.integers(4, len(text))] if rng.random() < 0.3 else text)
        status = plot_training.main(["--calibration", str(tmp_path / "p.parquet"), "--output", str(tmp_path / "c.png")])
        error = capsys.readouterr().err
        assert (status, error.count("\n")) in ((0, 0), (1, 1))
    for name, content in (("a.csv", b""), ("b.csv", b"\xff\xfe\x00"), ("c.csv", b"Label,probability\n1,0.5,3\n")):
        (tmp_path / name).write_bytes(content)
        assert plot_training.main(["--calibration", str(tmp_path / name)]) == 1
        assert capsys.readouterr().err.count("\n") == 1


# --------------------------------------------------------------------------------------------------------- errors, ends


def test_exit_status(tmp_path, capsys):
    assert plot_training.main([str(tmp_path / "none")]) == 1
    assert plot_training.main([str(tmp_path)]) == 1
    assert plot_training.main(["--calibration", str(tmp_path)]) == 1
    assert capsys.readouterr().err.splitlines() == [
        f"error: {tmp_path}/none does not exist; give the --model_save_dir or --log_dir of a training run",
        f"error: {tmp_path} has neither logs/metrics.jsonl nor metrics.jsonl; give the --model_save_dir or --log_dir "
        "of a training run",
        f"error: {tmp_path} is a folder; give a file that deepfm_train_eval.py wrote to --predict_output"]


@pytest.mark.parametrize("arguments, message", [
    (["run", "--output", "a.jpg"], "argument --output: 'a.jpg' does not end in .png"),
    ([], "give either runs or --calibration with files"),
    (["run", "--calibration", "p"], "give either runs or --calibration with files"),
    (["run", "--weight_column", "w"], "--weight_column is for --calibration"),
])
def test_mistakes_in_arguments(capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        plot_training.main(arguments)
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"error: {message} (see --help)\n"


def test_an_older_picture_stays_until_the_new_one_is_complete(tmp_path, monkeypatch, capsys):
    write_run(tmp_path / "a")
    (tmp_path / "a.png").write_bytes(b"old")

    def no_space(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", no_space)
    assert plot_training.main([str(tmp_path / "a"), "--output", str(tmp_path / "a.png")]) == 1
    assert "no space left on the disk" in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path)) == ["a", "a.png"] and (tmp_path / "a.png").read_bytes() == b"old"


def test_ctrl_c_while_importing_is_one_line(tmp_path):
    """A matplotlib that takes long to import, and meanwhile gets the signal."""
    (tmp_path / "matplotlib.py").write_text(f"import os, time\nos.kill(os.getpid(), {int(signal.SIGINT)})\n"
                                            "time.sleep(60)\n")
    done = subprocess.run([sys.executable, str(ROOT / "tools" / "plot_training.py"), "run"], capture_output=True,
                          text=True, env={**os.environ, "PYTHONPATH": str(tmp_path)}, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "error: interrupted\n")
