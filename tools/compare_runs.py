#!/usr/bin/env python3
"""Compare training runs: what differs between them, what came out, and how much of that is chance.

    python tools/compare_runs.py runs/small runs/fast
    python tools/compare_runs.py sweeps/rates

prints a line per run, with a column for every option that differs:

    run                                      net_dropout  learning_rate  seed  steps  best epoch   val AUC  ...
    learning_rate_1e-3,net_dropout_0,seed_1          0.0          0.001     1    300           3  0.780529  ...
    learning_rate_1e-2,net_dropout_0,seed_1          0.0           0.01     1    300           1  0.799194  ...
    ...

and, where several runs differ in nothing but the seed, a line for each such group: mean +- standard deviation (n - 1)
over its runs, the group with the largest mean monitor first. A difference below that deviation may be chance.

    seeds  net_dropout  learning_rate               val AUC           val logloss              test AUC  ...
    3              0.0           0.01  0.799182 +- 0.005486  0.446174 +- 0.005172  0.792276 +- 0.005941  ...
    3              0.2           0.01  0.795462 +- 0.006146  0.448970 +- 0.005617  0.787536 +- 0.006359  ...
    ...

RUN is a --model_save_dir, a --log_dir or a metrics.jsonl of deepfm_train_eval.py, or a folder of such runs (looked for
three levels down); a run may still be going on. Val metrics are those of the best evaluation, by the run's own
--monitor; samples/s is the median over the logged intervals but the first. Options come from the run's run.json, as do
data (compared by fingerprint), versions, device and machine; where the run is stored (--model_save_dir and the like) is
no difference. A run without run.json shows its metrics, and a dash for every option.

On a terminal, columns that do not fit go below. Values longer than 24 characters and names longer than 44 are cut in
their middle; --json prints all of it.
"""

import json
import math
import shutil
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `tools` is found from any folder
from tools.trainer import cli

if __name__ == "__main__":
    cli.start_script()

from tools.trainer.cli import Parser
from tools.trainer.runs import (
    MONITORS,
    best_evaluation,
    cut_middle,
    evaluated_within_epochs,
    last_step,
    monitored,
    printable,
    read_some_runs,
    samples_per_second,
    table_text,
)

LONGEST_VALUE, LONGEST_NAME = 24, 44  # characters
PLACES = ("model_save_dir", "persistent_path", "persistent_path_fm", "log_dir", "resume", "overwrite_tables")
# (split, metric, header, decimals); the first two of a split are always shown, the others where a run has them
METRICS = [("val", "auc", "val AUC", 6), ("val", "logloss", "val logloss", 6), ("val", "gauc", "val GAUC", 6),
           ("test", "auc", "test AUC", 6), ("test", "logloss", "test logloss", 6), ("test", "gauc", "test GAUC", 6),
           ("test", "calibration", "test pCTR/CTR", 4), ("test", "ece", "test ECE", 6)]
ALWAYS = ("auc", "logloss")


# -------------------------------------------------------------------------------------------------------- what differs


def conditions(run):
    """{name: value} of all that could change the result of a run, but its seed is among them; None without run.json."""
    if run.info is None:
        return None
    options = dict(run.info["options"])
    for restart in run.info.get("restarts", [])[-1:]:  # says what changed since the start, such as more --epochs
        changed = restart.get("options", {})
        # --resume goes without --model_load_dir, which is where the run began all the same
        options.update({name: value for name, value in changed.items() if name != "model_load_dir"})
    options = {name: value for name, value in options.items() if name not in PLACES}
    for name in ("device", "processes"):  # as chosen, for --device auto
        if name in run.info:
            options[name] = run.info[name]
    fingerprint = run.info.get("data", {}).get("fingerprint")
    if fingerprint is not None:  # the same data may lie in another folder
        options.pop("data_dir", None)
        options["data"] = fingerprint
    options.update({f"version {name}": value for name, value in run.info.get("versions", {}).items()})
    return options


def machine(run):
    return {f"machine {name}": value for name, value in run.info.get("machine", {}).items()} if run.info else {}


def differing(settings):
    """Names with different values, in the order in which they come up. settings: a dict a run, or None."""
    known = [values for values in settings if values is not None]
    names = dict.fromkeys(name for values in known for name in values)
    return [name for name in names if len({name in values and key_of(values[name]) for values in known}) > 1]


def key_of(value):
    """Equal for equal JSON values; 0 and 0.0 are equal, 1 and True are not."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return json.dumps(value, sort_keys=True, default=str)


def seed_groups(runs):
    """[[run, ...]] of runs that differ in the seed only, in the order of the runs; of a seed the first run counts."""
    groups = {}
    for run in runs:
        setting = conditions(run)
        if setting is not None:
            seed = key_of(setting.pop("seed", None))
            key = tuple(sorted((name, key_of(value)) for name, value in setting.items()))
            groups.setdefault(key, {}).setdefault(seed, run)
    return [list(group.values()) for group in groups.values()]


# ------------------------------------------------------------------------------------------------------------- results


def result_of(run):
    """What came out: steps, best_epoch, best_step, monitor, val and test (lines of metrics.jsonl), samples_per_second.

    None stands for what has not happened yet.
    """
    best, test = best_evaluation(run), run.test[-1] if run.test else None
    return {"steps": last_step(run), "best_epoch": best and best["epoch"], "best_step": best and best["step"],
            "monitor": best and monitored(run, best), "val": best, "test": test,
            "samples_per_second": samples_per_second(run)}


def metric_of(result, split, metric):
    """A number, or None when the run has not come that far, or its version did not write it."""
    value = (result[split] or {}).get(metric)
    return value if value is not None and math.isfinite(value) else None


def statistics_of(values):
    """{"mean", "std": with n - 1, None for one number, "n"} of the numbers that are not None; None without any."""
    values = [value for value in values if value is not None]
    if not values:
        return None
    return {"mean": statistics.mean(values), "std": statistics.stdev(values) if len(values) > 1 else None,
            "n": len(values)}


def summarise(group):
    """What a group of runs that differ in the seed only has in common."""
    results = [result_of(run) for run in group]
    return {"runs": [run.name for run in group], "seeds": [conditions(run).get("seed") for run in group],
            "monitor": statistics_of([result["monitor"] for result in results]),
            **{f"{split}_{metric}": statistics_of([metric_of(result, split, metric) for result in results])
               for split, metric, _, _ in METRICS}}


def compare(runs):
    """All that is known, fit for JSON: {"differing", "runs", "groups"}; the groups of one run are among them."""
    columns = differing([conditions(run) for run in runs]) + differing([machine(run) for run in runs if run.info])
    described = []
    for run in runs:
        known = {**(conditions(run) or {}), **machine(run)}
        described.append({"name": run.name, "path": str(run.path), "monitored": run.monitor,
                          "differs": {name: known[name] for name in columns if name in known},
                          "options": run.info and run.info["options"], **result_of(run)})
    groups = []
    for group in seed_groups(runs):
        known = conditions(group[0])
        groups.append({"differs": {name: known[name] for name in columns if name in known and name != "seed"},
                       **summarise(group)})
    if len({run.monitor for run in runs}) == 1:  # different monitors cannot be ranked
        groups.sort(key=lambda group: -group["monitor"]["mean"] if group["monitor"] else math.inf)
    return {"differing": columns, "runs": described, "groups": groups}


# ---------------------------------------------------------------------------------------------------------------- text


def value_text(values, name, length=LONGEST_VALUE):
    """A dash for a value that is not known, "none" for an option that was not given."""
    value = values.get(name, "-")
    if isinstance(value, list):
        value = ",".join(map(str, value))
    return cut_middle(printable("none" if value is None else str(value)), length)


def number_text(value, decimals):
    return "-" if value is None else f"{value:.{decimals}f}"


def spread_text(values, decimals, runs):
    """'0.790000 +- 0.001000'; says over how many of the runs, when some lack the number."""
    if values is None:
        return "-"
    text = number_text(values["mean"], decimals)
    text += f" +- {values['std']:.{decimals}f}" if values["std"] is not None else ""
    return text + (f" ({values['n']} of {runs})" if values["n"] < runs else "")


def shown_metrics(comparison):
    return [column for column in METRICS if column[1] in ALWAYS or
            any(metric_of(run, column[0], column[1]) is not None for run in comparison["runs"])]


def run_rows(comparison, with_step):
    columns, metrics = comparison["differing"], shown_metrics(comparison)
    rows = [["run", *columns, "steps", "best epoch", *["best step"] * with_step,
             *(header for _, _, header, _ in metrics), "samples/s"]]
    for run in comparison["runs"]:
        numbers = [run["steps"], run["best_epoch"], *[run["best_step"]] * with_step]
        rows.append([
            cut_middle(run["name"], LONGEST_NAME), *(value_text(run["differs"], name) for name in columns),
            *(number_text(number, 0) for number in numbers),
            *(number_text(metric_of(run, split, metric), decimals) for split, metric, _, decimals in metrics),
            number_text(run["samples_per_second"], 1)])
    return rows


def group_rows(comparison):
    """Headed by what tells the groups apart, or by "all runs" where nothing does."""
    metrics = shown_metrics(comparison)
    columns = [name for name in comparison["differing"] if any(name in group["differs"] for group in
                                                               comparison["groups"])]
    rows = [["seeds", *columns, *(header for _, _, header, _ in metrics)]]
    for group in comparison["groups"]:
        count = len(group["runs"])
        rows.append([str(count), *(value_text(group["differs"], name) for name in columns),
                     *(spread_text(group[f"{split}_{metric}"], decimals, count)
                       for split, metric, _, decimals in metrics)])
    return rows


def report(runs, without=(), width=None):
    """The text that is printed. without: names of runs that have no metrics yet; width: of the terminal, or None."""
    comparison = compare(runs)
    parts = [table_text(run_rows(comparison, evaluated_within_epochs(runs)), width)]
    repeated = any(len(group["runs"]) > 1 for group in comparison["groups"])
    if repeated:
        parts.append("runs that differ in the seed only, mean +- standard deviation:\n"
                     + table_text(group_rows(comparison), width))
    notes = [best_note(runs, comparison)] if len(runs) > 1 else []
    unknown = [run.name for run in runs if run.info is None]
    if unknown:
        notes.append(f"options unknown, no run.json: {cli.shorten(unknown)}")
    counted = sum(len(group["runs"]) for group in comparison["groups"])
    if repeated and counted < len(runs) - len(unknown):
        notes.append(f"left out of the means, as another run has the same options and seed: "
                     f"{len(runs) - len(unknown) - counted}")
    if without:
        notes.append(f"no metrics yet: {cli.shorten(without)}")
    notes = [note for note in notes if note]
    return "\n\n".join(parts + ["\n".join(notes)] * bool(notes))


def best_note(runs, comparison):
    """Which run is the best, where all were judged alike."""
    scored = [run for run in comparison["runs"] if run["monitor"] is not None]
    if not scored or len({run.monitor for run in runs}) > 1:
        return None
    best = max(scored, key=lambda run: run["monitor"])
    return f"largest val {MONITORS[runs[0].monitor][0]}: {best['monitor']:.6f}, {best['name']}"


def terminal_width():
    """Characters a line, or None where the output is no terminal."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def finite(value):
    """JSON has no NaN: None instead."""
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN",
                        help="a --model_save_dir, a --log_dir, a metrics.jsonl, or a folder of runs")
    parser.add_argument("--json", action="store_true", help="print all of it as JSON instead of the table")
    return parser.parse_args(argv)


def work(args):
    runs, without = read_some_runs(args.runs)
    if args.json:
        print(json.dumps(finite({**compare(runs), "no_metrics_yet": without}), indent=1))
    else:
        print(report(runs, without, terminal_width()))


def main(argv=None):
    args = parse_args(argv)
    return cli.run_tool(lambda: work(args))


if __name__ == "__main__":
    sys.exit(main())
