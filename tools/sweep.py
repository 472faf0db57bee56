#!/usr/bin/env python3
"""Train with every combination of some options, one run after another, and compare the results.

    python tools/sweep.py --grid learning_rate=1e-3,3e-4 --grid net_dropout=0,0.2 --seeds 1,2,3 \\
        --output_dir sweeps/rates -- --data_dir data/mine --batch_size 2000 --train_batches 600

What follows `--` goes to deepfm_train_eval.py in every run, or with --launcher to train_deepfm_criteo_x4.sh, which
reads DATA_DIR and the like from the environment and leaves its run.log of the last run in this folder. Every
combination is trained with the first seed before any is with the second. Values of lists such as dnn are separated by
semicolons: --grid 'dnn=400,400;1000'. `on` gives a switch, `off` leaves it out: --grid batch_norm=on,off.

    DIR/sweep.json                what was run, with which arguments, and how it ended
    DIR/learning_rate_1e-3,.../   a run: logs/ (metrics.jsonl, run.json), output.log, model/ (checkpoints), tables/,
                                  tables_fm/

The same command goes on after a stop: finished runs are skipped, a half-done one is resumed from its last checkpoint, a
failed one is tried again. A run that fails is noted, the others go on, and the exit status is 1. Another grid for the
same DIR adds runs; other trainer arguments for a run that is there are refused. At the end the table of
tools/compare_runs.py shows all runs in DIR.

Checkpoints and table rows of all runs stay (--keep all). --keep best removes those of a finished run when another one
has a larger monitor on val; --keep none keeps only logs and output. It also works afterwards, with the same command.

Why not a library: Optuna's grid sampler skips finished points but begins a half-done one again and wants a database;
Ray Tune needs CPython 3.10 and a cluster runtime of 80 MB around Python functions; Hydra starts a stopped sweep again
from its first job and wants to parse the options itself; Guild AI does nearly this, but has had no release since 2023.
"""

import argparse
import ctypes
import hashlib
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `tools` is found from any folder
from tools.trainer import cli

if __name__ == "__main__":
    cli.start_script()

from tools.compare_runs import report, terminal_width
from tools.trainer.cli import Parser, UserError, brief
from tools.trainer.files import fits, hold, read_json, write_json
from tools.trainer.runs import best_evaluation, metrics_of, monitored, read_runs

ROOT = Path(__file__).resolve().parents[1]
TRAINER = [sys.executable, str(ROOT / "deepfm_train_eval.py")]
LAUNCHER = ["bash", str(ROOT / "train_deepfm_criteo_x4.sh")]
OURS = ("model_save_dir", "persistent_path", "persistent_path_fm", "log_dir", "resume")  # options that a sweep sets
NOT_TRAINING = ("overwrite_tables", "eval_only", "predict", "predict_output", "keep_columns", "unknown_ids",
                "overwrite")  # options that make no sense in one
LISTS = ("dnn", "table_size_array")  # options whose values have commas
HEAVY = ("model", "tables", "tables_fm")  # folders of a run that --keep is about
LONGEST_NAME = 120  # characters of a run's folder
PATIENCE, MORE_PATIENCE = 60, 10  # seconds that a run may take to end after Ctrl-C, and after a second one
LIBC, PR_SET_PDEATHSIG = ctypes.CDLL(None), 1
TOOL = "tools/sweep.py"


def is_folder_name(text):
    """What lies in a folder of this name may be removed, so it must not lead elsewhere."""
    return re.fullmatch(r"[a-z][A-Za-z0-9_.,+-]*", text) is not None


RUN = {"arguments": [str], "state": lambda state: state in ("new", "started", "finished", "failed"),
       "seconds?": float, "status?": int, "error?": str, "removed?": bool}
STATE = {"tool": lambda tool: tool == TOOL,  # our mark
         "runs": lambda runs: isinstance(runs, dict) and all(is_folder_name(name) and fits(run, RUN)
                                                             for name, run in runs.items())}


# ---------------------------------------------------------------------------------------------------------- arguments


def grid_axis(text):
    """An argparse type: 'learning_rate=1e-3,3e-4' -> ("learning_rate", ["1e-3", "3e-4"])"""
    name, equals, values = text.partition("=")
    if not equals or not re.fullmatch("[a-z][a-z0-9_]*", name):
        raise argparse.ArgumentTypeError(f"{brief(text)!r} is not NAME=VALUE,VALUE with an option of the trainer")
    if name in OURS + NOT_TRAINING:
        raise argparse.ArgumentTypeError(f"{name} is no option for a grid")
    values = values.split(";" if ";" in values or name in LISTS else ",")
    check_values(text, values)
    return name, values


def seed_list(text):
    """An argparse type: '1,2,3' -> ["1", "2", "3"]"""
    seeds = text.split(",")
    for seed in seeds:
        cli.number(int, 0)(seed)
    check_values(text, seeds)
    return seeds


def check_values(text, values):
    if not all(values):
        raise argparse.ArgumentTypeError(f"{brief(text)!r} has an empty value")
    twice = [value for value in values if values.count(value) > 1]
    if twice:
        raise argparse.ArgumentTypeError(f"{brief(text)!r} has {twice[0]} twice")


def parse_args(argv=None):
    argv = sys.argv[1:] if argv is None else list(argv)
    cut = argv.index("--") if "--" in argv else len(argv)
    parser = Parser(__doc__, usage="%(prog)s [options] --output_dir DIR -- TRAINER_ARGUMENTS")
    parser.add_argument("--grid", type=grid_axis, action="append", metavar="NAME=VALUE,VALUE",
                        help="an option of the trainer with its values; several times for all combinations")
    parser.add_argument("--seeds", type=seed_list, metavar="SEED,SEED", help="seeds for every combination")
    parser.add_argument("--output_dir", required=True, metavar="DIR", help="folder of the runs")
    parser.add_argument("--keep", choices=("all", "best", "none"), default="all",
                        help="of finished runs: whose checkpoints and table rows stay")
    parser.add_argument("--launcher", action="store_true",
                        help="train with train_deepfm_criteo_x4.sh: its recipe, and all processes that it chooses")
    args = parser.parse_args(argv[:cut])
    args.trainer_arguments = argv[cut + 1:]
    args.grid = [*(args.grid or []), *([("seed", args.seeds)] if args.seeds else [])]
    names = [name for name, _ in args.grid]
    given = [argument[2:].partition("=")[0] for argument in args.trainer_arguments if argument.startswith("--")]
    if not names:
        parser.error("nothing to vary; give --grid or --seeds")
    for name in names:
        if names.count(name) > 1:
            parser.error(f"{name} is varied twice; give all its values at once")
        if name in given:
            parser.error(f"--{name} is both varied and among the trainer's arguments; give it once")
    for name in given:
        if name in OURS + NOT_TRAINING:
            parser.error(f"--{name} is not for a sweep, which trains each run in a folder of its own; leave it out")
    return args


# ------------------------------------------------------------------------------------------------------------ planning


def settings_of(grid):
    """[{name: value}] of all combinations; the last option, which is the seed, varies slowest."""
    names = [name for name, _ in grid]
    for values in itertools.product(*(values for _, values in reversed(grid))):
        yield dict(zip(names, reversed(values)))


def name_of(setting):
    """A folder name that tells a setting from others: 'learning_rate_1e-3,seed_1'"""
    name = ",".join(f"{option}_{re.sub('[^A-Za-z0-9_.+-]', '-', value)}" for option, value in setting.items())
    digest = hashlib.sha256(json.dumps(setting).encode()).hexdigest()[:8]
    return name if len(name) <= LONGEST_NAME else f"{name[:LONGEST_NAME - 9]}-{digest}"


def options_of(setting):
    switches = {"on": "--{0}", "off": None}
    options = [switches.get(value, "--{0}={1}") for value in setting.values()]
    return [option.format(name, value) for option, (name, value) in zip(options, setting.items()) if option]


class Sweep:
    """The folder of a sweep: its runs by name, each {"arguments", "state": started, finished or failed, ...}.

    command: what starts the trainer; environment: what else decides what a run is, as texts.
    """

    def __init__(self, folder, command, environment=()):
        self.folder, self.command, self.environment = Path(folder), command, list(environment)
        self.runs = {}

    def open(self, held):
        """Make the folder, hold it until `held` closes, and read what was run. Raises: UserError"""
        hold(self.folder, held, f"another sweep runs in {self.folder}; wait for its end or stop it")
        self.runs = read_state(self.folder / "sweep.json")

    def write(self):
        write_json(str(self.folder / "sweep.json"), {"tool": TOOL, "runs": self.runs})

    def plan(self, grid, trainer_arguments):
        """Names of the runs of this grid, in order; new ones are added. Raises: UserError"""
        names = []
        for setting in settings_of(grid):
            name = name_of(setting)
            arguments = [*self.environment, *trainer_arguments, *options_of(setting)]
            known = self.runs.get(name)
            if known and known["arguments"] != arguments and (self.folder / name).is_dir():
                raise UserError(f"{self.folder / name} was made with other arguments, "
                                f"{difference(known['arguments'], arguments)}; use another --output_dir")
            if (not known or known["state"] == "new") and os.path.lexists(self.folder / name):
                raise UserError(f"{self.folder / name} is there, but not of this sweep; use another --output_dir")
            if not known or not (self.folder / name).is_dir():  # whoever removes a run's folder wants it again
                self.runs[name] = {"arguments": arguments, "state": "new"}
            names.append(name)
        return names

    def has_begun(self, name):
        """Whether the trainer has marked the run's folder, so that it can be resumed, from a checkpoint or not."""
        return (self.folder / name / "model" / "run.json").is_file()

    def command_of(self, name):
        folder = self.folder / name
        places = {"model_save_dir": folder / "model", "persistent_path": folder / "tables",
                  "persistent_path_fm": folder / "tables_fm", "log_dir": folder / "logs"}
        arguments = self.runs[name]["arguments"][len(self.environment):]
        if self.has_begun(name):  # its model/run.json says where it started
            arguments = without_option(arguments, "--model_load_dir")
        return [*self.command, *arguments, *(f"--{option}={path}" for option, path in places.items()),
                *["--resume"] * self.has_begun(name)]

    def train(self, name):
        """Run it to its end and note how that was; raises what a signal raises, when the run has ended too."""
        record, started = self.runs[name], time.monotonic()
        record["state"] = "started"
        self.write()  # first, so that the folder is known as ours
        (self.folder / name).mkdir(exist_ok=True)
        output = self.folder / name / "output.log"
        with open(output, "ab") as file:
            start = file.tell()
            # in a session of its own: Ctrl-C reaches it once, through `stop`
            process = subprocess.Popen(self.command_of(name), stdin=subprocess.DEVNULL, stdout=file,
                                       stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=end_with_parent)
            try:
                status = process.wait()
            except BaseException:
                stop(process)
                raise
        record.update(state="failed" if status else "finished", status=status,
                      seconds=record.get("seconds", 0) + round(time.monotonic() - started, 1))
        if status:
            record["error"] = last_words(output, start)
        else:
            record.pop("error", None)
        self.write()

    def read(self, names):
        """(runs, names of those without metrics) among the runs of these names that have begun"""
        return read_runs([self.folder / name for name in names if metrics_of(self.folder / name)])

    def tidy(self, keep):
        """Remove checkpoints and tables of finished runs, as --keep says. A run that cannot be judged stays."""
        finished = [name for name, run in self.runs.items() if run["state"] == "finished" and not run.get("removed")]
        for name in [] if keep == "all" else self.worse(finished) if keep == "best" else finished:
            for part in HEAVY:
                if (self.folder / name / part).exists():
                    shutil.rmtree(self.folder / name / part)
            self.runs[name]["removed"] = True
            self.write()

    def worse(self, names):
        """All runs but the best. Monitors of two kinds cannot be compared: the best of each is none of them."""
        judged = {}
        for run in self.read(names)[0]:
            best = best_evaluation(run)
            if best:
                judged.setdefault(run.monitor, []).append((monitored(run, best), run.path.parent.parent.name))
        return [name for scores in judged.values() for score, name in scores if score < max(scores)[0]]


def read_state(path):
    """The runs of sweep.json; {} when there is none. Raises: UserError when it is not as Sweep.write makes it."""
    if not path.exists():
        return {}
    return read_json(path, STATE, "mend it, or use another --output_dir")["runs"]


def without_option(words, name):
    """Words of a command line, but for an option and its value."""
    return [word for before, word in zip(["", *words], words)
            if name not in (before, word) and not word.startswith(name + "=")]


def end_with_parent():
    """In a process that is starting: end (SIGTERM) also when this one is killed and cannot end it itself."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def difference(before, now):
    """What two lists of arguments do not share, as a text."""
    texts = [brief(shlex.join(word for word in words if word not in others), 150) or "none"
             for words, others in ((before, now), (now, before))]
    return f"{texts[0]} instead of {texts[1]}" if texts != ["none", "none"] else "in another order"


def stop(process):
    """End a run as Ctrl-C would; again after PATIENCE seconds or a second signal, at which the launcher kills it."""
    for patience in (PATIENCE, MORE_PATIENCE):
        try:
            process.send_signal(signal.SIGINT)
            process.wait(patience)
            return
        except (subprocess.TimeoutExpired, KeyboardInterrupt, SystemExit):
            pass
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def last_words(path, start):
    """The trainer's error line in its output from byte `start` on, else the last line."""
    with open(path, "rb") as file:
        file.seek(max(start, os.path.getsize(path) - 20_000))
        lines = [line.strip() for line in file.read().decode("utf-8", "replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    return brief((errors or lines or ["no output"])[-1], 300)


# -------------------------------------------------------------------------------------------------------------- running


def how_it_ended(sweep, name):
    """One line on a run that has ended."""
    record = sweep.runs[name]
    text = f"{name}: {duration(record['seconds'])}"
    if record["state"] == "failed":
        status = record["status"]
        how = f"status {status}" if status > 0 else f"signal {-status}"
        return f"{text}, failed with {how}: {record['error']} (see {sweep.folder / name / 'output.log'})"
    for run in sweep.read([name])[0]:
        for split, line in (("val", best_evaluation(run)), ("test", run.test[-1] if run.test else None)):
            text += f", {split} AUC {line['auc']:.6f}" if line else ""
    return f"{text}, {megabytes(sweep.folder / name):.1f} MB on disk"


def duration(seconds):
    return (f"{seconds / 3600:.1f} h" if seconds >= 5400 else f"{seconds / 60:.0f} min" if seconds >= 90 else
            f"{seconds:.0f} s")


def count_of(number):
    return f"{number} run{'s' * (number != 1)}"


def megabytes(folder):
    return sum(os.lstat(os.path.join(place, name)).st_blocks * 512 / 1e6
               for place, _, names in os.walk(folder) for name in names)


def run_all(sweep, names, keep):
    """Train what is not finished. Prints a line at the beginning and the end of each run."""
    left = [name for name in names if sweep.runs[name]["state"] != "finished"]
    print(f"{count_of(len(names))} in {sweep.folder}, {len(names) - len(left)} finished", flush=True)
    sweep.tidy(keep)
    began, done = time.monotonic(), 0
    for number, name in enumerate(names, 1):
        if name not in left:
            continue
        resumed = " resumed" if sweep.has_begun(name) else " begun"
        print(f"[{number}/{len(names)}] {name}:{resumed} at {time.strftime('%Y-%m-%d %H:%M:%S')}", flush=True)
        sweep.train(name)
        done += 1
        rest = (time.monotonic() - began) / done * (len(left) - done)
        ahead = f"; {count_of(len(left) - done)} left, about {duration(rest)}" if done < len(left) else ""
        print(f"[{number}/{len(names)}] {how_it_ended(sweep, name)}{ahead}", flush=True)
        sweep.tidy(keep)


def work(args, command=None):
    environment = ["DATA_DIR=" + os.environ.get("DATA_DIR", ""), "launcher"] if args.launcher else []
    sweep = Sweep(args.output_dir, command or (LAUNCHER if args.launcher else TRAINER), environment)
    with ExitStack() as held:
        sweep.open(held)
        names = sweep.plan(args.grid, args.trainer_arguments)
        sweep.write()
        run_all(sweep, names, args.keep)
    runs, without = sweep.read(sweep.runs)
    if runs:
        print("\n" + report(runs, without, terminal_width()))
    failed = [name for name in names if sweep.runs[name]["state"] == "failed"]
    if failed:
        raise UserError(f"{len(failed)} of {count_of(len(names))} failed: {cli.shorten(failed)}; mend the cause and "
                        "start the same command again")


def main(argv=None, command=None):
    """command: what starts the trainer, instead of this package's."""
    args = parse_args(argv)
    if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:  # the terminal goes away, and nohup did not ask to stay
        signal.signal(signal.SIGHUP, lambda *_: sys.exit(128 + signal.SIGHUP))
    return cli.run_tool(lambda: work(args, command), ending="; the same command goes on where it was")


if __name__ == "__main__":
    sys.exit(main())
