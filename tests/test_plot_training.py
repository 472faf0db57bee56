"""tools/plot_training.py: reading metrics, the table, what is drawn where, and error lines."""

import json

import matplotlib.pyplot as plt
import numpy as np
import plot_training
import pytest
from conftest import run_trainer
from plot_training import RunError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of pyparsing, inside matplotlib

def train_line(step, lr=0.01, loss=0.5):
    return {"event": "train", "step": step, "epoch": 1, "loss": loss, "lr": lr, "samples_per_second": 1000.0}


def eval_line(event, step, epoch, auc, logloss):
    return {"event": event, "step": step, "epoch": epoch, "auc": auc, "logloss": logloss}


# by AUC alone epoch 3 would be best, by logloss alone epoch 1; a cut behind steps 20 and 40
LINES = [train_line(10), train_line(20), eval_line("val", 20, 1, 0.70, 0.40), train_line(30, 0.001),
         train_line(40, 0.001), eval_line("val", 40, 2, 0.79, 0.41), train_line(50, 0.0001),
         eval_line("val", 50, 3, 0.80, 0.45), eval_line("test", 40, 2, 0.78, 0.42)]


def write_metrics(folder, lines=LINES):
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def draw(*paths):
    """{title of a panel: its axes}"""
    figure = plot_training.draw(plot_training.read_runs(paths))
    axes = {panel.get_title(loc="left"): panel for panel in figure.axes}
    plt.close(figure)
    return axes


def markers(axes, marker):
    return [(float(line.get_xdata()[0]), float(line.get_ydata()[0])) for line in axes.lines
            if line.get_marker() == marker]


def test_a_real_resumed_run_with_cuts(shared_dataset_dir, tmp_path, capsys):
    options = ["--model_save_dir", tmp_path / "demo", "--loss_print_interval", 2, "--patience", 1, "--min_delta", 1]
    run_trainer(shared_dataset_dir, tmp_path, *options, "--train_batches", 14)
    run_trainer(shared_dataset_dir, tmp_path, *options, "--train_batches", 28, "--resume")
    assert plot_training.main([str(tmp_path / "demo"), "--output", str(tmp_path / "new" / "demo.png")]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[1].split()[:2] == ["demo", "28"] and out[2] == f"wrote {tmp_path}/new/demo.png"
    picture = plt.imread(tmp_path / "new" / "demo.png")
    assert picture.shape[1] == 1350 and picture.std() > 0.05
    axes = draw(tmp_path / "demo")
    assert list(axes["Training loss"].lines[0].get_xdata()) == list(range(2, 29, 2))
    # min_delta 1: no epoch but the first is a gain, so every one cuts the rate to a tenth
    assert [rate for _, rate in markers(axes["Learning rate"], "v")] == pytest.approx([0.001, 0.0001])


def test_best_epoch_cuts_and_table(tmp_path):
    axes = draw(write_metrics(tmp_path / "a"))
    assert markers(axes["Val AUC"], "*") == [(2, 0.79)]
    assert markers(axes["Val logloss"], "*") == [(2, 0.41)]
    assert markers(axes["Learning rate"], "v") == [(30, 0.001), (50, 0.0001)]
    [run] = plot_training.read_runs([tmp_path / "a"])
    assert plot_training.table_row(run) == ["a", "50", "2", "0.790000", "0.410000", "0.780000", "0.420000"]


def test_best_epoch_is_the_one_that_test_was_scored_with(tmp_path):
    """With a large --min_delta a later epoch with a larger AUC - logloss is no gain."""
    lines = [*LINES[:-1], eval_line("test", 20, 1, 0.65, 0.45)]
    assert markers(draw(write_metrics(tmp_path / "a", lines))["Val AUC"], "*") == [(1, 0.70)]
    assert markers(draw(write_metrics(tmp_path / "b", lines[:-1]))["Val AUC"], "*") == [(2, 0.79)]


def test_several_runs_are_told_apart(tmp_path):
    same = [write_metrics(tmp_path / name / "run" / "logs").parent for name in "xy"]
    other = write_metrics(tmp_path / "other")
    runs = plot_training.read_runs([*same, other])
    assert [run.name[-5:] for run in runs] == ["x/run", "y/run", "other"]
    assert max(len(run.name) for run in runs) <= plot_training.LONGEST_NAME
    text = plot_training.table_text(runs).splitlines()
    assert len(text) == 4 and len({len(line) for line in text}) == 1
    stars = [line.get_color() for line in draw(*same, other)["Val AUC"].lines if line.get_marker() == "*"]
    assert len(set(stars)) == 3


def test_long_names_leave_the_numbers_legible(tmp_path):
    folder = write_metrics(tmp_path / "run_with_a_rather_long_name_number_0_of_the_sweep_lr_0", [train_line(36680)])
    runs = plot_training.read_runs([folder])
    figure = plot_training.draw(runs)
    name, steps = (next(text for text in figure.texts if text.get_text() == content).get_window_extent()
                   for content in plot_training.table_row(runs[0])[:2])
    plt.close(figure)
    assert name.x1 < steps.x0


def test_nothing_is_drawn_on_the_edge_and_epochs_are_whole_numbers(tmp_path):
    faster = {**train_line(20), "samples_per_second": 1030.0}
    axes = draw(write_metrics(tmp_path / "a", [train_line(10), eval_line("val", 10, 1, 0.7, 0.4), faster]))
    low, high = axes["Throughput, samples/s"].get_ylim()
    assert low == 0 and high > 1.05 * 1030
    assert all(tick == int(tick) for tick in axes["Val AUC"].get_xticks())


def test_last_evaluation_of_an_epoch_is_drawn(tmp_path):
    lines = [train_line(5), eval_line("val", 5, 1, 0.6, 0.5), eval_line("val", 9, 1, 0.7, 0.4)]
    curve = draw(write_metrics(tmp_path / "a", lines))["Val AUC"].lines[0]
    assert (list(curve.get_xdata()), list(curve.get_ydata())) == ([1], [0.7])


def test_moving_average():
    values = np.random.default_rng(0).random(100)
    expected = [values[max(0, i - 4):i + 1].mean() for i in range(100)]
    np.testing.assert_allclose(plot_training.moving_average(values), expected)
    assert list(plot_training.moving_average(np.array([1.0, 5.0]))) == [1, 5]


def test_a_run_that_is_still_going_on(tmp_path):
    folder = write_metrics(tmp_path / "a", LINES[:2])
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"event": "train", "st')
    [run] = plot_training.read_runs([folder / "metrics.jsonl"])
    assert plot_training.table_row(run) == ["a", "20", "-", "-", "-", "-", "-"]
    assert [text.get_text() for text in draw(folder)["Val AUC"].texts] == ["nothing logged yet"]


@pytest.mark.parametrize("content, message", [
    ("", "holds no metrics yet"),
    ("loss 0.5\n", "line 1: 'loss 0.5' is not JSON"),
    ('{"event": "train", "step": 1}\n', "line 1: epoch is None, expected a number"),
    ('{"event": "lunch"}\n', "line 1: the event is 'lunch', expected train, val, test"),
])
def test_files_that_are_no_metrics(tmp_path, content, message):
    (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(RunError, match=message):
        plot_training.read_runs([tmp_path])


def test_exit_status(tmp_path, capsys):
    assert plot_training.main([str(tmp_path / "none")]) == 1
    assert plot_training.main([str(tmp_path)]) == 1
    error = capsys.readouterr().err.splitlines()
    assert error == [f"error: {tmp_path}/none does not exist; give the --model_save_dir or --log_dir of a training run",
                     f"error: {tmp_path} has neither logs/metrics.jsonl nor metrics.jsonl; give the --model_save_dir "
                     "or --log_dir of a training run"]
    with pytest.raises(SystemExit) as stop:
        plot_training.main(["run", "--output", "a.jpg"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: argument --output: 'a.jpg' does not end in .png (see --help)\n"
