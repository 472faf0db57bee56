#!/usr/bin/env python3
"""Draw the course of one or several training runs as one picture, or the calibration of their predictions.

    python tools/plot_training.py runs/small runs/fast --output training.png

prints what the trainer keeps as best_checkpoint of each run, and writes the picture:

    run    steps  best epoch   val AUC  val logloss  test AUC  test logloss
    small    600           5  0.792606     0.457643  0.783596      0.465838
    fast     500           1  0.794732     0.449612  0.790909      0.453312
    wrote training.png

RUN is a --model_save_dir, a --log_dir or a metrics.jsonl of deepfm_train_eval.py, or a folder of such runs; a run may
still be going on. Panels: training loss; what the run monitors, val AUC and val logloss, with the best evaluation
marked; learning rate with its cuts; throughput. Of more than ten runs the ten best are in colour, the rest in grey.

    python tools/plot_training.py --calibration small.parquet fast.parquet --output calibration.png

draws click rates against predictions in 20 bins of equal mass, with 95 % intervals (Wilson), and the rows and clicks of
each bin; on logarithmic scales where most bins crowd near 0:

    file    rows  clicks  predicted CTR  actual CTR  predicted/actual       ECE
    small  25000    6213       0.236011    0.248520            0.9497  0.039530
    fast   25000    6213       0.233367    0.248520            0.9390  0.018133
    wrote calibration.png

FILE is parquet or CSV with the columns probability and Label: what the trainer writes with --predict_output and
--keep_columns Label. Several files are drawn together.
"""

import argparse
import io
import math
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `tools` is found from any folder
from tools.trainer import cli

if __name__ == "__main__":
    cli.start_script()  # imports take seconds

import matplotlib

matplotlib.use("Agg")  # no display needed

import matplotlib.pyplot as plt
import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullLocator

from tools.trainer.calibration import equal_mass_bins
from tools.trainer.cli import Parser, UserError
from tools.trainer.files import replaced_file
from tools.trainer.runs import (
    MONITORS,
    best_evaluation,
    cut_middle,
    evaluated_within_epochs,
    last_step,
    monitored,
    printable,
    read_some_runs,
    table_text,
)

# Okabe and Ito's palette without its yellow; told apart by people with any colour vision
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
MARKERS = "osD^vPX<>p"
GREY = "#c4c4c4"
WIDTH, PANELS_HEIGHT, LINE_HEIGHT = 9.0, 6.6, 0.2  # inches; text is readable at 900 pixels
DOTS_PER_INCH = 150
LONGEST_NAME = 32  # characters
COLOURED = 10  # runs; more than that cannot be followed
THIN_LINES = 4  # runs whose single values are drawn beside their moving averages
COLUMNS = {"run": 0.075, "steps": 0.45, "best epoch": 0.555, "val AUC": 0.66, "val logloss": 0.765, "test AUC": 0.865,
           "test logloss": 0.985}  # of the table, with their places in the picture: run from here on, others up to here
CALIBRATION_COLUMNS = {"file": 0.075, "rows": 0.44, "clicks": 0.53, "predicted CTR": 0.655, "actual CTR": 0.755,
                       "predicted/actual": 0.89, "ECE": 0.985}
PROBABILITY, LABEL = "probability", "Label"


# ---------------------------------------------------------------------------------------------------------------- runs


def rate_steps(run):
    """Where each logged learning rate was used -> (edges (n + 1,), rates (n,)): rates[i] after step edges[i].

    A train line tells the rate of the steps since the line before. A rate falls after an evaluation, so a lower one
    begins where the last evaluation before its line was, if there was one between the two.
    """
    edges = [0]
    for before, after in zip(run.train, run.train[1:]):
        between = [line["step"] for line in run.val if before["step"] <= line["step"] < after["step"]]
        edges.append(between[-1] if between and after["lr"] < before["lr"] else before["step"])
    return np.array([*edges, run.train[-1]["step"]], dtype=float), column(run.train, "lr")


def rate_cuts(run):
    """[(step after which a lower rate was used, that rate)]"""
    edges, rates = rate_steps(run)
    return [(edges[i], rates[i]) for i in range(1, len(rates)) if rates[i] < rates[i - 1]]


def ranked(runs):
    """The runs to draw in colour and those in grey: all and none, or the best COLOURED and the rest, best first.

    Judged by the monitor, or by val AUC where the runs have different ones.
    """
    if len(runs) <= COLOURED:
        return runs, []
    alike = len({run.monitor for run in runs}) == 1

    def value(run):
        best = best_evaluation(run)
        return -math.inf if best is None else monitored(run, best) if alike else best["auc"]

    runs = sorted(runs, key=value, reverse=True)
    return runs[:COLOURED], runs[COLOURED:]


def column_names(runs):
    """Of the table; an epoch does not name an evaluation where an epoch has several."""
    return ["best step" if name == "best epoch" and evaluated_within_epochs(runs) else name for name in COLUMNS]


def table_row(run, names):
    """Texts for column_names; a dash stands for what has not happened yet. Test is scored once, at the end."""
    best, test = best_evaluation(run), run.test[-1] if run.test else None
    place = "step" if "best step" in names else "epoch"
    row = [cut_middle(run.name, LONGEST_NAME), f"{last_step(run):.0f}", f"{best[place]:.0f}" if best else "-"]
    return row + [f"{line[metric]:.6f}" if line else "-" for line in (best, test) for metric in ("auc", "logloss")]


def table_rows(runs):
    names = column_names(runs)
    return [names, *(table_row(run, names) for run in runs)]


# ------------------------------------------------------------------------------------------------------------- drawing


def look_of(number):
    """Colour, marker and line of the run with this number, from 0; colour is never the only difference."""
    return {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)], "markersize": 4,
            "linestyle": "-" if number < len(COLOURS) else (0, (4, 1.5))}


LOOK_OF_THE_REST = {"color": GREY, "marker": "", "markersize": 0, "linestyle": "-"}


def column(lines, name):
    """Numbers of the lines; what is not finite becomes NaN, a gap in the curve."""
    values = np.array([line[name] for line in lines], dtype=float)
    return np.where(np.isfinite(values), values, np.nan)


def window_of(count):
    return max(1, count // 20)


def moving_average(values):
    """Mean over each point and the points before it, 5 % of all (at least one)."""
    known = np.isfinite(values)
    sums, counts = (np.concatenate([[0.0], np.cumsum(part)]) for part in (np.where(known, values, 0), known))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window_of(len(values)), 0)
    with np.errstate(invalid="ignore"):
        return (sums[ends] - sums[starts]) / (counts[ends] - counts[starts])


def draw_smoothed(axes, run, look, name, thin):
    """A noisy quantity of the training steps as a moving average. Some markers tell runs apart.

    thin: also draw the single values, where they differ from it.
    """
    steps, values = column(run.train, "step"), column(run.train, name)
    if thin and window_of(len(steps)) > 1:
        axes.plot(steps, values, color=look["color"], linewidth=0.7, alpha=0.35)
    axes.plot(steps, moving_average(values), **{**look, "markersize": 3}, linewidth=width_of(look),
              markevery=0.1 if len(steps) > 20 else None, zorder=order_of(look))


def width_of(look):
    return 0.8 if look is LOOK_OF_THE_REST else 1.5


def order_of(look):
    """Grey below all coloured curves."""
    return 1.5 if look is LOOK_OF_THE_REST else 2


def draw_metric(axes, run, look, value, place):
    """value: function of a val line; place: what the horizontal axis shows of it, epoch or step."""
    lines = list({line[place]: line for line in run.val}.values())
    values = np.array([value(line) for line in lines], dtype=float)
    steps, values = column(lines, place), np.where(np.isfinite(values), values, np.nan)
    if look is LOOK_OF_THE_REST:  # as an artist it does not stretch the scale on which the best are told apart
        axes.add_artist(Line2D(steps, values, **look, linewidth=width_of(look), zorder=order_of(look)))
        return
    axes.plot(steps, values, **look, linewidth=width_of(look))
    best = best_evaluation(run)
    if best:
        axes.plot(best[place], value(best), marker="*", markersize=14, color=look["color"], markeredgecolor="white",
                  zorder=3, clip_on=False)


def draw_rate(axes, run, look, width):
    edges, rates = rate_steps(run)
    rates = np.where(rates > 1e-30, rates, np.nan)  # has a logarithm
    axes.plot(edges, np.append(rates[:1], rates), color=look["color"], drawstyle="steps-pre", linewidth=width,
              linestyle=look["linestyle"], zorder=order_of(look), solid_capstyle="butt")
    for step, rate in rate_cuts(run) if look is not LOOK_OF_THE_REST else ():
        axes.plot(step, rate, marker="v", markersize=7, color=look["color"], markeredgecolor="white", zorder=3)


def scale_rates(axes, rates):
    """Log scale between powers of ten, so that also a constant rate has two labelled ticks around it."""
    axes.set_yscale("log")
    low, high = math.floor(math.log10(min(rates))), math.ceil(math.log10(max(rates)))
    if low == high:
        low, high = low - 1, high + 1
    axes.set_ylim(10.0**low / 1.5, 10.0**high * 1.5)
    axes.set_yticks([10.0**power for power in range(low, high + 1, 1 + (high - low) // 8)])
    axes.yaxis.set_minor_locator(NullLocator())


def finish(axes, title, note, xlabel):
    """Titles, grid and scales. note: what the panel's signs mean, to the right."""
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold")
    axes.set_title(note, loc="right", fontsize=8, color="#555555")
    axes.set_xlabel(xlabel, fontsize=9)
    axes.tick_params(labelsize=8.5, color="#888888")
    axes.grid(True, color="#e4e4e4", linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.margins(x=0.03, y=0.1)


def finish_course(axes, title, note, xlabel):
    """A panel over steps or epochs."""
    finish(axes, title, note, xlabel)
    if xlabel == "step":
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))
    if not any(np.isfinite(line.get_ydata(orig=True)).any() for line in axes.lines):
        axes.text(0.5, 0.5, "nothing logged yet", transform=axes.transAxes, ha="center", va="center", color="#555555")
        axes.set_xticks([])
        axes.set_yticks([])


def draw_table(figure, rows, places, looks):
    """The legend at the top of the figure: headers, then a line for each look. places: of the columns, 0 to 1."""
    height = figure.get_figheight()
    for number, row in enumerate(rows):
        y = 1 - (0.2 + LINE_HEIGHT * number) / height
        for first, (text, x) in enumerate(zip(row, places)):
            figure.text(x, y, text, fontsize=9, ha="right" if first else "left", va="center", parse_math=False,
                        color="black" if number else "#555555", fontweight="normal" if first or not number else "bold")
        if number:
            figure.add_artist(Line2D([0.015, 0.04, 0.065], [y] * 3, **looks[number - 1], linewidth=1.6, markevery=[1]))


def panels(runs):
    """{name: axes} of a new figure -> (figure, panels); "monitor" is there where a run monitors val AUC - logloss.

    The others monitor what has a panel anyway.
    """
    lines = min(len(runs), COLOURED) + 1 + (len(runs) > COLOURED)
    top = LINE_HEIGHT * lines + 0.2
    figure = plt.figure(figsize=(WIDTH, PANELS_HEIGHT + top))
    height = figure.get_figheight()
    grid = figure.add_gridspec(3, 2, left=0.07, right=0.985, bottom=0.45 / height, top=1 - (top + 0.25) / height,
                               hspace=0.5, wspace=0.16)
    places = {"loss": grid[0, :], "auc": grid[1, 0], "logloss": grid[1, 1], "rate": grid[2, 0], "speed": grid[2, 1]}
    if any(run.monitor == "auc-logloss" for run in runs):
        places.update({"loss": grid[0, 0], "auc-logloss": grid[0, 1]})
    return figure, {name: figure.add_subplot(place) for name, place in places.items()}


def draw(runs):
    """The figure of all runs, and the table on top."""
    coloured, grey = ranked(runs)
    figure, axes = panels(runs)
    looks = [look_of(number) for number in range(len(coloured))]
    place = "step" if evaluated_within_epochs(runs) else "epoch"
    thin = len(coloured) <= THIN_LINES
    # equal learning rates lie on each other: those below show as margins
    widths = np.linspace(min(3.2, 0.4 + 1.1 * len(coloured)), 1.5, len(coloured))
    for run, look, width in [*((run, LOOK_OF_THE_REST, 0.8) for run in grey), *zip(coloured, looks, widths)]:
        if run.train:
            draw_smoothed(axes["loss"], run, look, "loss", thin)
            draw_rate(axes["rate"], run, look, width)
            draw_smoothed(axes["speed"], run, look, "samples_per_second", thin)
        if run.val:
            for name in MONITORS.keys() & axes.keys():
                draw_metric(axes[name], run, look, value_of(run, name), place)
    label(axes, runs, coloured, place)
    rows, rest = table_rows(coloured), []
    if grey:
        rest = [[f"{len(grey)} more runs, {rank_text(runs)}"]]
    draw_table(figure, rows + rest, COLUMNS.values(), [*looks, LOOK_OF_THE_REST])
    return figure


def value_of(run, name):
    """The function of a val line that the panel of this name draws."""
    if name == run.monitor == "auc-logloss":
        return lambda line: monitored(run, line)
    return (lambda line: line[name]) if name != "auc-logloss" else MONITORS[name][1]


def rank_text(runs):
    monitors = {run.monitor for run in runs}
    return f"with a smaller val {MONITORS[monitors.pop()][0] if len(monitors) == 1 else 'AUC'}"


def label(axes, runs, coloured, place):
    """Titles, and notes on the signs that are there."""
    averaged = "thick: moving average" if len(coloured) <= THIN_LINES else "moving average"
    averaged *= any(window_of(len(run.train)) > 1 for run in coloured)
    star = "star: best evaluation" if len({run.monitor for run in runs}) == 1 else "star: best by the run's monitor"
    star *= any(best_evaluation(run) is not None for run in coloured)
    cut = "triangle: cut" * any(rate_cuts(run) for run in coloured if run.train)
    finish_course(axes["loss"], "Training loss", averaged, "step")
    for name, title in (("auc-logloss", "Val AUC - logloss"), ("auc", "Val AUC"), ("logloss", "Val logloss")):
        if name in axes:
            monitor = " (monitor)" * all(run.monitor == name for run in runs)
            finish_course(axes[name], title + monitor, star, place)
    finish_course(axes["rate"], "Learning rate", cut, "step")
    finish_course(axes["speed"], "Throughput, samples/s", averaged, "step")
    last = max(last_step(run) for run in runs)
    for panel in axes.values():
        if panel.get_xlabel() == "step" and panel.lines:
            panel.set_xlim(-0.03 * last, 1.03 * last)
    rates = [line["lr"] for run in runs for line in run.train if 1e-30 < line["lr"] < math.inf]
    if rates:
        scale_rates(axes["rate"], rates)
    if any(run.train for run in runs) and math.isfinite(axes["speed"].dataLim.y1):
        axes["speed"].yaxis.set_major_formatter(EngFormatter(sep=""))
        axes["speed"].set_ylim(0, max(axes["speed"].dataLim.y1 * 1.1, 1))


# --------------------------------------------------------------------------------------------------------- calibration


def read_predictions(path, weight_column=None):
    """(labels, probabilities, weights or None) of a parquet or CSV file, float64 (n,). Raises: UserError"""
    if not Path(path).is_file():
        problem = "is a folder" if Path(path).is_dir() else "is not a file" if Path(path).exists() else "does not exist"
        raise UserError(f"{path} {problem}; give a file that deepfm_train_eval.py wrote to --predict_output")
    names = [PROBABILITY, LABEL, *([weight_column] if weight_column else [])]
    with open(path, "rb") as file:
        magic = file.read(4)
        file.seek(0)
        try:
            if magic == b"PAR1":
                parquet = pq.ParquetFile(file)
                check_columns(path, parquet.schema_arrow.names, names)
                table = parquet.read(names)
            else:
                table = pa.csv.read_csv(file)
                check_columns(path, table.column_names, names)
            columns = [table[name].cast(pa.float64()).to_numpy() for name in names]
        except (pa.ArrowException, OSError, ValueError, KeyError, OverflowError) as error:
            raise UserError(f"{path} cannot be read as parquet or CSV with numbers: {cli.first_line(error)}") from None
    probs, labels, weights = [*columns, None][:3]
    check_values(path, probs, labels, weights, weight_column)
    return labels, probs, weights


def check_columns(path, found, names):
    missing = [name for name in names if name not in found]
    if missing:
        raise UserError(f"{path} lacks the column {missing[0]}, it has {cli.brief(cli.shorten(found), 200)}; predict "
                        f"with --keep_columns {LABEL} (of raw rows the label has its own name: rename its column to "
                        f"{LABEL})")


def check_values(path, probs, labels, weights, weight_column):
    if not len(probs):
        raise UserError(f"{path} has no rows; predict rows that have labels")
    rules = [(PROBABILITY, probs, (probs >= 0) & (probs <= 1), "from 0 to 1"),
             (LABEL, labels, (labels == 0) | (labels == 1), "0 or 1")]
    if weights is not None:
        rules.append((weight_column, weights, (weights >= 0) & (weights < math.inf), "a number from 0 on"))
    for name, values, right, expected in rules:
        if not right.all():
            row = int(np.argmin(right))
            raise UserError(f"{path}, row {row + 1}: {name} is {values[row]:g}, expected {expected}; mend the file")
    if weights is not None and weights.sum() <= 0:
        raise UserError(f"{path}: the weights in {weight_column} are all 0; give another --weight_column")


def wilson(rate, count, z=1.96):
    """95 % interval of a click rate over `count` rows (Wilson, 1927) -> (low, high), each of rate's shape."""
    centre = (rate + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * np.sqrt(rate * (1 - rate) / count + (z / (2 * count)) ** 2)
    return centre - half, centre + half


def calibration_rows(names, all_bins):
    """Rows of the table. CTRs are weighted where the bins are."""
    rows = [list(CALIBRATION_COLUMNS)]
    for name, bins in zip(names, all_bins):
        ratio = f"{bins.mean_predicted / bins.mean_actual:.4f}" if bins.mean_actual else "-"
        rows.append([cut_middle(name, LONGEST_NAME), str(bins.rows.sum()), str(bins.clicks.sum()),
                     f"{bins.mean_predicted:.6f}", f"{bins.mean_actual:.6f}", ratio, f"{bins.ece:.6f}"])
    return rows


def draw_calibration(names, all_bins):
    """The figure: reliability curves, below them the rows and clicks of the bins, and the table on top."""
    top = LINE_HEIGHT * (len(names) + 1) + 0.2
    figure = plt.figure(figsize=(WIDTH, PANELS_HEIGHT + top))
    height = figure.get_figheight()
    grid = figure.add_gridspec(2, 1, left=0.085, right=0.985, bottom=0.45 / height, top=1 - (top + 0.25) / height,
                               hspace=0.3, height_ratios=[3, 1.2])
    curve = figure.add_subplot(grid[0])
    counts = figure.add_subplot(grid[1], sharex=curve)
    looks = [look_of(number) for number in range(len(names))]
    for bins, look in zip(all_bins, looks):
        curve.vlines(bins.predicted, *wilson(bins.actual, bins.effective), color=look["color"], linewidth=1, alpha=0.6)
        curve.plot(bins.predicted, bins.actual, **look, linewidth=1.3)
        counts.plot(bins.predicted, bins.rows, **look, linewidth=0.8, markerfacecolor="white")
        counts.plot(bins.predicted, bins.clicks, **look, linewidth=1.3)
    finish(curve, "Click rate by predicted probability", "dotted: perfect; bars: 95 % interval", "")
    finish(counts, "Rows and clicks by bin", "hollow: rows, filled: clicks", "predicted probability")
    scale_calibration(curve, counts, all_bins)
    draw_table(figure, calibration_rows(names, all_bins), CALIBRATION_COLUMNS.values(), looks)
    return figure


def scale_calibration(curve, counts, all_bins):
    """Equal scales on both axes of the curve, with its diagonal; logarithmic where most bins crowd near 0."""
    predicted, actual = (np.concatenate([getattr(bins, name) for bins in all_bins]) for name in ("predicted", "actual"))
    limit = 1.04 * max(predicted.max(), *(wilson(bins.actual, bins.effective)[1].max() for bins in all_bins))
    low = 0.0
    if np.median(predicted) < limit / 10:
        low = max(0.7 * np.concatenate([values[values > 0] for values in (predicted, actual)]).min(), limit * 1e-6)
        curve.set(xscale="log", yscale="log")
        for axis in (curve.xaxis, curve.yaxis):
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter("{x:g}")
            axis.set_minor_locator(NullLocator())
    curve.plot([low, limit], [low, limit], color="#888888", linewidth=1, linestyle=(0, (1, 2)), zorder=1.5)
    curve.set(xlim=(low, limit), ylim=(low, limit))
    counts.set_yscale("symlog", linthresh=1)  # shows 0
    counts.set_ylim(0, 3 * max(bins.rows.max() for bins in all_bins))
    counts.yaxis.set_major_formatter(EngFormatter(sep=""))


# ----------------------------------------------------------------------------------------------------------------- main


def save(figure, path):
    """Write a figure as PNG; its folder is made, and an older picture stays until the new one is complete."""
    path = Path(path).resolve()
    picture = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # in the name of a run: a box is drawn
        figure.savefig(picture, format="png", dpi=DOTS_PER_INCH)
    plt.close(figure)
    with replaced_file(path) as part:
        Path(part).write_bytes(picture.getbuffer())


def png_path(text):
    """An argparse type."""
    if not text.lower().endswith(".png"):
        raise argparse.ArgumentTypeError(f"{text!r} does not end in .png")
    return text


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="*", metavar="RUN",
                        help="a --model_save_dir, a --log_dir, a metrics.jsonl, or a folder of runs")
    parser.add_argument("--calibration", nargs="+", metavar="FILE", help="predictions with labels, instead of runs")
    parser.add_argument("--weight_column", metavar="NAME", help="weights of the rows, with --calibration")
    parser.add_argument("--output", type=png_path, metavar="FILE.png",
                        help="the picture (default: training.png or calibration.png)")
    args = parser.parse_args(argv)
    if bool(args.runs) == bool(args.calibration):
        parser.error("give either runs or --calibration with files")
    if args.weight_column and not args.calibration:
        parser.error("--weight_column is for --calibration")
    args.output = args.output or ("calibration.png" if args.calibration else "training.png")
    return args


def plot_runs(args):
    runs, without = read_some_runs(args.runs)
    save(draw(runs), args.output)
    print(table_text(table_rows(runs)))
    if without:
        print(f"no metrics yet: {cli.shorten(without)}")


def plot_calibration(args):
    names = [Path(path).stem for path in args.calibration]
    names = [printable(name if names.count(name) == 1 else path) for name, path in zip(names, args.calibration)]
    all_bins = [equal_mass_bins(*read_predictions(path, args.weight_column)) for path in args.calibration]
    save(draw_calibration(names, all_bins), args.output)
    print(table_text(calibration_rows(names, all_bins)))


def work(args):
    if args.calibration:
        plot_calibration(args)
    else:
        plot_runs(args)
    print(f"wrote {args.output}")


def main(argv=None):
    args = parse_args(argv)
    return cli.run_tool(lambda: work(args))


if __name__ == "__main__":
    sys.exit(main())
