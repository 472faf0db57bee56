"""What a training run leaves in its log folder, metrics.jsonl and run.json, read for the tools that show runs.

Imports nothing beyond the standard library. A run may still be going on, and may come from an earlier version: without
run.json its metrics are known, its options are not.
"""

import json
import math
import os
import re
import statistics
from pathlib import Path
from typing import NamedTuple

from tools.trainer import plateau
from tools.trainer.cli import UserError, first_line, shorten
from tools.trainer.files import check_json, count, read_json

LARGEST_NUMBER = 1e39  # above all float32; what is larger only breaks the arithmetic of who draws it


def number(value):
    """A schema. NaN and infinity fit: AUC is NaN when all labels are equal."""
    return type(value) in (int, float) and not LARGEST_NUMBER < abs(value) < math.inf


EVALUATION = {"step": count, "epoch": count, "auc": number, "logloss": number, "monitor?": (number, None),
              "gauc?": (number, None), "calibration?": (number, None), "ece?": (number, None)}
LINES = {  # of metrics.jsonl by event; earlier versions write less
    "train": {"step": count, "epoch": count, "loss": number, "lr": number, "samples_per_second": number},
    "val": EVALUATION, "test": EVALUATION,
}
TITLES = {"auc-logloss": "AUC - logloss", "auc": "AUC", "logloss": "-logloss"}
# the largest is the best
MONITORS = {name: (TITLES[name], monitor.value) for name, monitor in plateau.MONITORS.items()}
INFO = {"options?": dict, "restarts?": [{"options?": dict}], "data?": dict, "versions?": dict, "machine?": dict,
        "monitor?": lambda value: isinstance(value, str) and value in MONITORS}  # run.json
DEPTH = 3  # levels of folders in which runs are looked for


class Run(NamedTuple):
    """One training run.

    name: how tables and pictures call it; path: its metrics.jsonl; train, val, test: its lines by event, in order of
    their steps; info: run.json, or None; monitor: a key of MONITORS.
    """

    name: str
    path: Path
    train: list
    val: list
    test: list
    info: dict = None
    monitor: str = "auc-logloss"


# ------------------------------------------------------------------------------------------------------------- finding


def metrics_of(path):
    """The metrics.jsonl of a --model_save_dir, a --log_dir or the file itself; None when it is none of these."""
    candidates = [path / "logs" / "metrics.jsonl", path / "metrics.jsonl"] if path.is_dir() else [path]
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def metrics_below(folder, depth=DEPTH):
    """The metrics.jsonl of all runs in a folder of runs, in the order of their names."""
    if depth == 0:
        return []
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if entry.is_dir()]
    found = []
    for name in sorted(names, key=natural_order):
        file = metrics_of(folder / name)
        found += [file] if file else metrics_below(folder / name, depth - 1)
    return found


def natural_order(text):
    """A key: numbers in a text count as numbers, so seed_2 comes before seed_10 and 3e-4 before 1e-3."""
    parts = re.split(r"(\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)", text)
    return [float(part) if number % 2 else part for number, part in enumerate(parts)], text


def find_runs(path):
    """[(name, metrics.jsonl)] of a RUN argument: one run, or all that lie in a folder of runs. Raises: UserError"""
    path = Path(path)
    file = metrics_of(path)
    if file:
        return [(folder_name(file), file)]
    found = metrics_below(path) if path.is_dir() else []
    if not found:
        problem = ("has neither logs/metrics.jsonl nor metrics.jsonl" if path.is_dir() else
                   "is neither a file nor a folder" if path.exists() else "does not exist")
        raise UserError(f"{path} {problem}; give the --model_save_dir or --log_dir of a training run")
    return [(str(run_folder(file).relative_to(path)), file) for file in found]


def run_folder(file):
    """The folder of a run; logs/ inside it does not count."""
    return file.parent.parent if file.parent.name == "logs" else file.parent


def folder_name(file):
    return run_folder(file.resolve()).name


# ------------------------------------------------------------------------------------------------------------- reading


def read_runs(paths):
    """The runs of all RUN arguments -> (list of Run, names of those that have no metrics yet)

    A run given twice counts once; runs with equal names are called by their paths. Raises: UserError for a path that
    is no run, and for files that the trainer did not write so.
    """
    found = {}
    for path in paths:
        for name, file in find_runs(path):
            found.setdefault(file.resolve(), (name, file))
    names = [name for name, _ in found.values()]
    runs, without = [], []
    for name, file in found.values():
        name = printable(name if names.count(name) == 1 else str(run_folder(file)))
        lines = read_metrics(file)
        if any(lines.values()):
            info = read_info(file.parent / "run.json")
            runs.append(Run(name, file, **lines, info=info, monitor=(info or {}).get("monitor", "auc-logloss")))
        else:
            without.append(name)
    return runs, without


def read_some_runs(paths):
    """read_runs, with at least one run. Raises: UserError"""
    runs, without = read_runs(paths)
    if not runs:
        raise UserError(f"no metrics yet: {shorten(without)}; wait for the first logged step (--loss_print_interval)")
    return runs, without


def read_metrics(path):
    """{"train": [dict, ...], "val": ..., "test": ...} of a metrics.jsonl, each in the order of the steps.

    A last line without a line end is one that the trainer is writing, or was killed in: it is left out.
    Raises: UserError with the line's number when one is not as the trainer writes it.
    """
    events = {event: [] for event in LINES}
    for place, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            values = json.loads(line.decode("utf-8"))
            check_json(values, {"event": lambda event: isinstance(event, str) and event in LINES})
            check_json(values, LINES[values["event"]])
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {place} is not a line of the trainer's log ({first_line(error)}); give the "
                            "metrics.jsonl of a run") from None
        events[values["event"]].append(values)
    return {event: sorted(lines, key=lambda line: line["step"]) for event, lines in events.items()}


def read_info(path):
    """run.json, or None for a run of an earlier version, which did not write its options. Raises: UserError"""
    if not path.exists():
        return None
    info = read_json(path, INFO, "mend it, or move it away to see the metrics alone")
    return info if "options" in info else None


# -------------------------------------------------------------------------------------------------------------- results


def monitored(run, line):
    """The number by which a val line was judged."""
    value = line.get("monitor")
    return MONITORS[run.monitor][1](line) if value is None else value


def best_evaluation(run):
    """The val line of the step that test was scored with; before the end the one with the largest monitor.

    They differ where --min_delta keeps the trainer from counting a gain. The earliest of equals; None without one.
    """
    scored = [line for line in run.val if math.isfinite(monitored(run, line))]
    chosen = [line for line in scored if run.test and line["step"] == run.test[-1]["step"]]
    return max(chosen or scored, key=lambda line: monitored(run, line), default=None)


def last_step(run):
    return max(line["step"] for line in run.train + run.val + run.test)


def samples_per_second(run):
    """Median over the logged intervals without the first, which holds the compilation; None before the first."""
    values = [line["samples_per_second"] for line in run.train]
    return statistics.median(values[1:] or values) if values else None


def evaluated_within_epochs(runs):
    """Whether a run has several evaluations in one epoch (--eval_interval), so that an epoch does not name one."""
    return any(len({line["epoch"] for line in run.val}) < len(run.val) for run in runs)


# ---------------------------------------------------------------------------------------------------------------- texts


def printable(text):
    """One line of text that every terminal can show, whatever bytes a folder's name has."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def cut_middle(text, length):
    """Both ends of a text, when it is too long."""
    head = (length - 3) // 2
    return text if len(text) <= length else text[:head] + "..." + text[len(text) - (length - 3 - head):]


def table_text(rows, width=None):
    """Lines of aligned columns, the first to the left. What does not fit in `width` goes below, after the first again.

    rows: lists of texts, the headers first.
    """
    columns = [list(column) for column in zip(*rows)]
    sizes = [max(map(len, column)) for column in columns]
    blocks, used = [[]], sizes[0]
    for number in range(1, len(columns)):
        if width and blocks[-1] and used + 2 + sizes[number] > width:
            blocks.append([])
            used = sizes[0]
        blocks[-1].append(number)
        used += 2 + sizes[number]
    return "\n\n".join("\n".join("  ".join([
        row[0].ljust(sizes[0]), *(row[number].rjust(sizes[number]) for number in block)]).rstrip()
        for row in rows) for block in blocks)
