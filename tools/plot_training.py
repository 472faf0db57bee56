#!/usr/bin/env python3
"""Draw the course of one or several training runs as one picture.

    python tools/plot_training.py runs/small runs/fast --output training.png

prints what the trainer keeps as best_checkpoint of each run, and writes the picture:

    run    steps  best epoch   val AUC  val logloss  test AUC  test logloss
    small    600           5  0.791415     0.458567  0.782837      0.466417
    fast     500           1  0.794747     0.449648  0.790917      0.453364
    wrote training.png

RUN is a --model_save_dir, a --log_dir or a metrics.jsonl of deepfm_train_eval.py; the run may still be going on.
Panels: training loss, val AUC and val logloss per epoch with the best epoch (largest val AUC - logloss) marked,
learning rate with its cuts, throughput.
"""

import argparse
import json
import math
import sys
from collections import namedtuple
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display needed

import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
from matplotlib.lines import Line2D  # noqa: E402
from matplotlib.ticker import EngFormatter, MaxNLocator, NullLocator  # noqa: E402
from parquet_common import Parser  # noqa: E402

# Okabe and Ito's palette without its yellow; told apart by people with any colour vision
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
MARKERS = "osD^vP"
WIDTH, PANELS_HEIGHT, LINE_HEIGHT = 9.0, 6.6, 0.2  # inches; text is readable at 900 pixels
DOTS_PER_INCH = 150
LONGEST_NAME = 32  # characters
NEEDED = {"train": ("step", "epoch", "loss", "lr", "samples_per_second"), "val": ("step", "epoch", "auc", "logloss"),
          "test": ("step", "epoch", "auc", "logloss")}  # numbers in a line of metrics.jsonl, by event
COLUMNS = {"run": 0.075, "steps": 0.45, "best epoch": 0.555, "val AUC": 0.66, "val logloss": 0.765, "test AUC": 0.865,
           "test logloss": 0.985}  # of the table, with their places in the picture: run from here on, others up to here

Run = namedtuple("Run", "name train val test")
Run.__doc__ = """One metrics.jsonl: the run's name, and its lines of each event in order of their step."""


class RunError(Exception):
    """A run that cannot be drawn; the message is shown to the user as one line."""


# ------------------------------------------------------------------------------------------------------------- reading


def find_metrics(path):
    """The metrics.jsonl of a RUN argument."""
    path = Path(path)
    candidates = [path / "logs" / "metrics.jsonl", path / "metrics.jsonl"] if path.is_dir() else [path]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    problem = "has neither logs/metrics.jsonl nor metrics.jsonl" if path.is_dir() else "does not exist"
    raise RunError(f"{path} {problem}; give the --model_save_dir or --log_dir of a training run")


def read_metrics(path):
    """{"train": [dict, ...], "val": ..., "test": ...} of a metrics.jsonl.

    A last line without a line end is one that the trainer is writing, or was killed in: it is left out.
    Raises: RunError with the line's number when one is not as the trainer writes it, or when nothing is there.
    """
    events = {event: [] for event in NEEDED}
    try:
        lines = path.read_text().splitlines(keepends=True)
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"{path} is not readable: {error}") from None
    for number, line in enumerate(lines, 1):
        if line.endswith("\n"):
            values = parse_line(line, f"{path}, line {number}")
            events[values["event"]].append(values)
    if not any(events.values()):
        raise RunError(f"{path} holds no metrics yet; wait for the first logged step (--loss_print_interval)")
    return {event: sorted(values, key=lambda line: line["step"]) for event, values in events.items()}


def parse_line(line, where):
    hint = "is this the trainer's metrics.jsonl?"
    try:
        values = json.loads(line)
    except ValueError:
        raise RunError(f"{where}: {line.strip()[:40]!r} is not JSON; {hint}") from None
    event = values.get("event") if isinstance(values, dict) else None
    if event not in NEEDED:
        raise RunError(f"{where}: the event is {event!r}, expected {', '.join(NEEDED)}; {hint}")
    for name in NEEDED[event]:
        if not isinstance(values.get(name), (int, float)):
            raise RunError(f"{where}: {name} is {values.get(name)!r}, expected a number; {hint}")
    return values


def run_name(path):
    """The name of a run's folder; logs/ inside it does not count."""
    folder = path.resolve().parent
    return folder.parent.name if folder.name == "logs" else folder.name


def read_runs(paths):
    """A Run per RUN argument. Runs whose folders have the same name are called by their arguments."""
    files = [find_metrics(path) for path in paths]
    names = [run_name(file) for file in files]
    names = [name if names.count(name) == 1 else str(path) for name, path in zip(names, paths)]
    names = [name if len(name) <= LONGEST_NAME else "..." + name[3 - LONGEST_NAME:] for name in names]
    return [Run(name, **read_metrics(file)) for name, file in zip(names, files)]


def best_evaluation(run):
    """The val line of the step that test was scored with; before the end the one with the largest AUC - logloss.

    They differ where --min_delta keeps the trainer from counting a gain. The earliest of equals; None without one.
    """
    scored = [line for line in run.val if math.isfinite(line["auc"] - line["logloss"])]
    chosen = [line for line in scored if run.test and line["step"] == run.test[-1]["step"]]
    return max(chosen or scored, key=lambda line: line["auc"] - line["logloss"], default=None)


def rate_cuts(run):
    """[(step, learning rate)] of the first logged step after every change of the learning rate."""
    pairs = zip(run.train, run.train[1:])
    return [(after["step"], after["lr"]) for before, after in pairs if before["lr"] != after["lr"]]


def table_row(run):
    """Texts for COLUMNS; a dash stands for what has not happened yet. Test is scored once, at the end."""
    steps = max(line["step"] for line in run.train + run.val + run.test)
    best, test = best_evaluation(run), run.test[-1] if run.test else None
    row = [run.name, str(steps), str(best["epoch"]) if best else "-"]
    return row + [f"{line[metric]:.6f}" if line else "-" for line in (best, test) for metric in ("auc", "logloss")]


def table_text(runs):
    rows = [list(COLUMNS), *map(table_row, runs)]
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows)


# ------------------------------------------------------------------------------------------------------------- drawing


def look_of(number):
    """Colour and marker of the run with this number, from 0; colour is never the only difference of the first seven."""
    return {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)], "markersize": 4}


def column(lines, name):
    return np.array([line[name] for line in lines], dtype=float)


def moving_average(values):
    """Mean over each point and the points before it, 5 % of all (at least one)."""
    window = max(1, len(values) // 20)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def draw_smoothed(axes, run, look, name):
    """A noisy quantity of the training steps: thin as it is, thick as moving average. Some markers tell runs apart."""
    steps, values = column(run.train, "step"), column(run.train, name)
    axes.plot(steps, values, color=look["color"], linewidth=0.7, alpha=0.35)
    axes.plot(steps, moving_average(values), **{**look, "markersize": 3}, linewidth=1.5,
              markevery=0.1 if len(steps) > 20 else None)


def draw_metric(axes, run, look, metric):
    """One point per epoch: its last evaluation, as --train_batches may have cut an epoch that was then resumed."""
    lines = list({line["epoch"]: line for line in run.val}.values())
    axes.plot(column(lines, "epoch"), column(lines, metric), **look, linewidth=1.4)
    best = best_evaluation(run)
    if best:
        axes.plot(best["epoch"], best[metric], marker="*", markersize=15, color=look["color"], markeredgecolor="white",
                  zorder=3)


def draw_rate(axes, run, look):
    steps = column(run.train, "step")
    axes.plot(steps, column(run.train, "lr"), color=look["color"], drawstyle="steps-post", linewidth=1.6,
              marker=look["marker"] if len(steps) == 1 else "")
    for step, rate in rate_cuts(run):
        axes.plot(step, rate, marker="v", markersize=7, color=look["color"], markeredgecolor="white", zorder=3)


def scale_rates(axes, rates):
    """Log scale between powers of ten, so that also a constant rate has two labelled ticks around it."""
    axes.set_yscale("log")
    low, high = math.floor(math.log10(min(rates))), math.ceil(math.log10(max(rates)))
    if low == high:
        low, high = low - 1, high + 1
    axes.set_ylim(10.0**low / 1.5, 10.0**high * 1.5)
    axes.set_yticks([10.0**power for power in range(low, high + 1)])
    axes.yaxis.set_minor_locator(NullLocator())


def finish(axes, title, note, xlabel, has_data):
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold")
    axes.set_title(note, loc="right", fontsize=8, color="#555555")
    axes.set_xlabel(xlabel, fontsize=9)
    axes.tick_params(labelsize=8.5, color="#888888")
    axes.grid(True, color="#e4e4e4", linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if xlabel == "step":
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))
    axes.margins(x=0.02, y=0.1)
    if not has_data:
        axes.text(0.5, 0.5, "nothing logged yet", transform=axes.transAxes, ha="center", va="center", color="#555555")
        axes.set_xticks([])
        axes.set_yticks([])


def draw_table(figure, runs):
    """The legend, a line per run, at the top of the figure."""
    height = figure.get_figheight()
    for line, row in enumerate([list(COLUMNS), *map(table_row, runs)]):
        y = 1 - (0.2 + LINE_HEIGHT * line) / height
        for text, (name, x) in zip(row, COLUMNS.items()):
            figure.text(x, y, text, fontsize=9, ha="left" if name == "run" else "right", va="center",
                        color="#555555" if line == 0 else "black", fontweight="bold" if x < 0.1 and line else "normal")
        if line:
            figure.add_artist(Line2D([0.015, 0.04, 0.065], [y] * 3, **look_of(line - 1), linewidth=1.6, markevery=[1]))


def draw(runs):
    """The figure of all runs: five panels, and the table on top."""
    top = LINE_HEIGHT * (len(runs) + 1) + 0.2
    figure = plt.figure(figsize=(WIDTH, PANELS_HEIGHT + top))
    draw_table(figure, runs)
    height = figure.get_figheight()
    grid = figure.add_gridspec(3, 2, left=0.07, right=0.985, bottom=0.45 / height, top=1 - (top + 0.25) / height,
                               hspace=0.5, wspace=0.16)
    loss, auc, logloss, rate, throughput = (
        figure.add_subplot(place) for place in (grid[0, :], grid[1, 0], grid[1, 1], grid[2, 0], grid[2, 1]))
    for number, run in enumerate(runs):
        look = look_of(number)
        if run.train:
            draw_smoothed(loss, run, look, "loss")
            draw_rate(rate, run, look)
            draw_smoothed(throughput, run, look, "samples_per_second")
        if run.val:
            draw_metric(auc, run, look, "auc")
            draw_metric(logloss, run, look, "logloss")
    trained, evaluated = any(run.train for run in runs), any(run.val for run in runs)
    finish(loss, "Training loss", "thick: moving average", "step", trained)
    finish(auc, "Val AUC", "star: best epoch", "epoch", evaluated)
    finish(logloss, "Val logloss", "star: best epoch", "epoch", evaluated)
    finish(rate, "Learning rate", "triangle: cut", "step", trained)
    finish(throughput, "Throughput, samples/s", "thick: moving average", "step", trained)
    if trained:
        scale_rates(rate, [line["lr"] for run in runs for line in run.train])
        throughput.yaxis.set_major_formatter(EngFormatter(sep=""))
        throughput.set_ylim(0, throughput.dataLim.y1 * 1.1)
    return figure


def save(figure, path):
    """Write a figure as PNG; its folder is made."""
    Path(path).resolve().parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=DOTS_PER_INCH)
    plt.close(figure)


def png_path(text):
    """An argparse type."""
    if not text.lower().endswith(".png"):
        raise argparse.ArgumentTypeError(f"{text!r} does not end in .png")
    return text


def parse_args(argv=None):
    parser = Parser(__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a --model_save_dir, a --log_dir or a metrics.jsonl")
    parser.add_argument("--output", type=png_path, default="training.png", metavar="FILE.png", help="the picture")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    try:
        runs = read_runs(args.runs)
        save(draw(runs), args.output)
    except (RunError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    print(table_text(runs))
    print(f"wrote {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
