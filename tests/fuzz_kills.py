"""Signals at random moments, for fuzz.py: killed runs that go on to the end, and programs that end in one line."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from fuzz_inputs import COLUMNS, HASHED, ROOT, make_rows, trained

CLEAR = {signal.SIGINT: "error: interrupted", signal.SIGTERM: "error: terminated"}
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
TIMEOUT = 120  # seconds


def start(command, **streams):
    return subprocess.Popen(list(map(str, command)), stdin=subprocess.DEVNULL, text=True, env=ENVIRONMENT, **streams)


# --------------------------------------------------------------------------------------------------- killed and resumed


def run_of(data, work):
    """The command of a run of some seconds of training that saves every few steps, or goes on with it."""
    from conftest import trainer_command

    more = ["--resume"] if (work / "save" / "run.json").exists() else []
    return trainer_command(data, work, "--model_save_dir", work / "save", "--train_batches", "210", "--net_dropout",
                           "0.3", "--checkpoint_interval", "10", "--loss_print_interval", "5", "--patience", "1",
                           "--early_stop_patience", "0", "--dnn", "400,400", *more)


def result_of(work, output):
    """Scores, every number of the last checkpoint, and what the log has of every step."""
    names = ("event", "step", "epoch", "loss", "lr", "monitor", "auc", "logloss")
    lines = [json.loads(line) for line in (work / "save/logs/metrics.jsonl").read_text().splitlines()]
    left = [str(path) for path in [*work.glob("tables*/.*"), *(work / "save").glob(".*")]
            if path.name != ".deepfm-encoder"]
    return trained(work, output), [{name: line.get(name) for name in names} for line in lines], left


def to_the_end(data, work):
    """Let a run end -> (seconds of the last start, output, how often OneFlow crashed on the way)

    OneFlow's race at the start of tiny graphs (see startup.avoid_launch_race) ends a run as a kill does.
    """
    crashes = 0
    while True:
        began = time.monotonic()
        process = start(run_of(data, work), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        output, errors = process.communicate(timeout=TIMEOUT)
        if process.returncode == 0:
            return time.monotonic() - began, output, crashes
        assert process.returncode in (-signal.SIGSEGV, -signal.SIGABRT) and crashes < 5, (
            f"{process.returncode}: {output[-500:]}{errors}")
        crashes += 1


def kills(count, seed=0):
    """Kill runs `count` times at random moments and resume them to the end.

    Returns (number of runs that ended other than one that nobody disturbed, number of all runs).
    """
    from conftest import make_dataset

    rng, done, runs, other = random.Random(seed), 0, 0, 0
    with tempfile.TemporaryDirectory(prefix="fuzz") as folder:
        folder = Path(folder)
        data = make_dataset(folder / "data", digests=True)
        seconds, output, crashes = to_the_end(data, folder / "whole")
        print(f"undisturbed run: {seconds:.1f} s, {crashes} crashes of OneFlow", flush=True)
        whole = result_of(folder / "whole", output)
        while done < count:
            work, killed = folder / f"run{runs}", 0
            while done < count and killed < 5:
                began = time.monotonic()
                process = start(run_of(data, work), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(rng.uniform(0.3 * seconds, seconds))
                    if not killed:  # the machine may have been busier before
                        seconds = min(seconds, time.monotonic() - began)
                    break
                process.kill()
                process.wait()
                done, killed = done + 1, killed + 1
            _, output, crashes = to_the_end(data, work)
            same = result_of(work, output) == whole
            runs, other = runs + 1, other + (not same)
            print(f"run {runs}: {killed} kills, {crashes} crashes of OneFlow, {'the same' if same else 'OTHER'}",
                  flush=True)
            shutil.rmtree(work)
    return other, runs


# ------------------------------------------------------------------------------------------------------------- one line


def programs(folder):
    """{name: function of a new folder that returns a command} of programs that take some seconds."""
    from conftest import make_dataset, trainer_command
    from made_runs import run_info, write_run

    data = make_dataset(folder / "data", digests=True)
    write_run(folder / "runs/a/logs", info=run_info(1))
    make_rows(folder / "raw")

    def trainer(work):
        return trainer_command(data, work, "--model_save_dir", work / "save", "--train_batches", "20000")

    def tool(name, *arguments):
        return lambda work: [sys.executable, ROOT / "tools" / f"{name}.py", *(
            work / "out" if argument == "OUT" else argument for argument in arguments)]

    rows = folder / "raw/day/day.csv"
    return {"deepfm_train_eval": trainer, "inspect_dataset": tool("inspect_dataset", data),
            "plot_training": tool("plot_training", folder / "runs", "--output", folder / "x.png"),
            "compare_runs": tool("compare_runs", folder / "runs"),
            "table_to_parquet": tool("table_to_parquet", "--input", rows, "--output_dir", "OUT", *COLUMNS,
                                     *HASHED)}


def wait_for_handler(process):
    """Until the program's first lines have run: what comes before is Python's own start."""
    mask = 1 << (signal.SIGTERM - 1)
    while process.poll() is None:
        with contextlib.suppress(OSError, StopIteration):
            lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            if int(next(line for line in lines if line.startswith("SigCgt")).split()[1], 16) & mask:
                return
        time.sleep(0.001)


def signals(count, seed=0):
    """Send SIGINT and SIGTERM in turn to programs at random moments, the first one at their first lines.

    Every second program is the trainer. Returns the number of those that did not end in one line and with status 130
    or 143.
    """
    rng, done, wrong = random.Random(seed), 0, 0
    with tempfile.TemporaryDirectory(prefix="fuzz") as folder:
        folder = Path(folder)
        found = programs(folder)
        others = [name for name in found if name != "deepfm_train_eval"]
        while done < count:
            name = "deepfm_train_eval" if done % 2 else others[done // 2 % len(others)]
            number = (signal.SIGINT, signal.SIGTERM)[done // 4 % 2]
            with tempfile.TemporaryDirectory(dir=folder) as work:
                process = start(found[name](Path(work)), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
                wait_for_handler(process)
                longest = 6 if name == "deepfm_train_eval" else 1
                time.sleep(0 if done < 4 else rng.uniform(0, longest))
                process.send_signal(number)
                began = time.monotonic()
                _, errors = process.communicate(timeout=TIMEOUT)
            if process.returncode == 0:
                continue  # it was faster
            good = (process.returncode == 128 + number and errors.count("\n") == 1
                    and errors.startswith(CLEAR[number]) and time.monotonic() - began < 10)
            done, wrong = done + 1, wrong + (not good)
            if not good:
                print(f"{name}, {number.name}: status {process.returncode}, {errors!r}", flush=True)
    return wrong
