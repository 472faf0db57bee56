#!/usr/bin/env python3
"""Damage inputs of every kind at random, run the programs on them, and count how they end.

    python tests/fuzz.py --count 10000
    python tests/fuzz.py --minutes 5 --kind tables --seed 7

prints a table of kinds and ends:

    right            all that comes out is what undamaged inputs give
    as it is         other numbers from a valid input of a format without checksums, or with forged or skipped ones
    clear line       one line, `error: ...`, and exit status 1 or 2
    traceback, abort, hang
    silently other   exit status 0 and other numbers than undamaged inputs give

and after it each of the last four with the seed that repeats it: `--kind KIND --seed SEED --count 1`. The programs run
in a few long-lived processes, every fiftieth time in one of their own.

    python tests/fuzz.py --kills 40 --signals 40

instead kills training runs so many times at random moments and resumes them, which must end in the same numbers bit for
bit, and sends so many signals SIGINT and SIGTERM to the trainer and to tools, which must end in one line and with the
status 130 or 143.
"""

import argparse
import contextlib
import json
import os
import queue
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from pathlib import Path

from fuzz_inputs import KINDS, PLACES, ROOT, make_inputs, task

from tools.trainer.cli import UserError

ENDS = ("right", "as it is", "clear line", "traceback", "abort", "hang", "silently other")
WRONG = ENDS[3:]
TIMEOUT = 120  # seconds; on a busy machine a worker takes a while to start
RUNS_OF_A_WORKER = 150
WHOLE_PROCESS = 50  # every so many runs
DEEP = 100000  # nesting


# ------------------------------------------------------------------------------------------------------------- damage


def odd_value(rng, value):
    """Something else for a value in JSON."""
    deep = "[" * DEEP + "]" * DEEP
    odd = [None, True, False, -1, 0, 1, 2**31, 2**63, 2**70, -2**70, 0.5, -0.0, float("nan"), float("inf"), 1e308, "",
           "x", "\ud800", "../..", "a\nb", "x" * 10000, [], {}, [[]], {"a": 1}, [None], deep, "NaN", str(value)]
    if isinstance(value, int) and not isinstance(value, bool):
        odd += [value + 1, value - 1, -value, value * 2, float(value), value + 0.5]
    if isinstance(value, list):
        odd += [value[:-1], value * 2, value[::-1], value + [None]]
    if isinstance(value, str):
        odd += [value + " ", value.upper(), value[:-1], value + "\0"]
    return rng.choice(odd)


def change_json(rng, value):
    """Replace, remove or add one thing somewhere in a JSON value; returns the changed value."""
    if isinstance(value, (dict, list)) and value and rng.random() < 0.85:
        key = rng.choice(sorted(value)) if isinstance(value, dict) else rng.randrange(len(value))
        if rng.random() < 0.15:
            del value[key]
        elif isinstance(value, dict) and rng.random() < 0.1:
            value[rng.choice(["", "extra", key + "2", "*", "__class__"])] = odd_value(rng, value[key])
        else:
            value[key] = change_json(rng, value[key])
        return value
    return odd_value(rng, value)


def mutate_json(rng, path):
    try:
        value = change_json(rng, json.loads(path.read_text()))
    except (ValueError, OSError):
        return mutate_bytes(rng, path, "flip")
    text = json.dumps(value, indent=rng.choice([None, 1]))
    path.write_text(text.replace(json.dumps("[" * DEEP + "]" * DEEP), "[" * DEEP + "]" * DEEP))
    return "json"


def mutate_json_line(rng, path):
    """Of a file with a value in every line."""
    lines = path.read_text().splitlines()
    place = rng.randrange(len(lines))
    value = change_json(rng, json.loads(lines[place]))
    lines[place] = json.dumps(value)
    path.write_text("\n".join(lines) + "\n")
    return f"json, line {place + 1}"


def forge_info(rng, path):
    """Other descriptions of fields with the right fingerprints, as far as they can have any."""
    from tools.converter import encoders

    info = json.loads(path.read_text())
    info["fields"] = change_json(rng, info["fields"])
    with contextlib.suppress(UserError, LookupError, TypeError, ValueError, AttributeError, OverflowError):
        fields = []
        for entry in info["fields"]:
            fields.append(encoders.field_from_json(entry))
            if fields[-1].counted and not fields[-1].sampled:
                fields[-1].read(path.parent, entry["encoding"]["num_tokens"])
            entry["fingerprint"] = fields[-1].digest()
        info["fingerprint"] = encoders.fingerprint(fields)
    path.write_text(json.dumps(info))
    return "forged info"


def forge_state(rng, path):
    """Another state with the right digest."""
    from tools.trainer import checkpoints

    state = change_json(rng, json.loads(path.read_text()))
    with contextlib.suppress(Exception):
        state = {**state, "digest": checkpoints.digest(state)}
    path.write_text(json.dumps(state))
    return "forged state"


def forge_arrays(rng, path):
    """Other arrays; the caller makes the checksums fit."""
    import numpy as np

    arrays = dict(np.load(path))
    name = rng.choice(sorted(arrays))
    array = arrays.pop(name)
    other = [None, array.astype(np.float64), array.astype("U8"), array[None], array.ravel()[:1], array * np.nan,
             np.zeros(0, np.float32), array.astype(np.int64), np.array(3), array.astype(np.complex64),
             np.zeros((2, 3), [("a", "f4")]), array + 1, np.array("x"), array.astype(bool)]
    choice = rng.choice(other)
    if choice is not None:
        arrays[rng.choice([name, name, name, name + "2", "", "a/b"])] = choice
    np.savez(path, **arrays)
    return f"forged arrays {name}"


def mutate_bytes(rng, path, way):
    content = bytearray(path.read_bytes())
    if not content:
        return "empty already"
    start = rng.randrange(len(content))
    length = min(len(content) - start, rng.choice([1, 2, 8, 64, 1000]))
    if way == "flip":
        for _ in range(rng.choice([1, 1, 1, 3, 20])):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif way == "zero":
        content[start:start + length] = bytes(length)
    elif way == "cut":
        del content[rng.choice([0, start]):start + (length if rng.random() < 0.5 else len(content))]
    elif way == "append":
        content += rng.choice([b"\0" * 8, bytes(rng.randrange(256) for _ in range(rng.randrange(1, 40))), b"\n", b"{}"])
    elif way == "double":
        content[start:start] = content[start:start + length]
    path.write_bytes(content)
    return f"{way} at {start}, {length} bytes"


def place(rng, path, way):
    """Put something that is no such file where a file was."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
    if way == "empty":
        path.touch()
    elif way == "folder":
        path.mkdir()
    elif way == "pipe":
        os.mkfifo(path)
    elif way in ("device", "dangling"):
        path.symlink_to("/dev/zero" if way == "device" else "/nowhere")
    return way


def add_something(rng, folder):
    """A strange file or folder beside what belongs there."""
    folder = folder if folder.is_dir() else folder.parent
    beside = [path.name for path in folder.iterdir()]
    names = ["x", ".x", "keys", "key-000000000099", "value-000000000007", "key-00000000000x", "index-000000000000",
             "0-2", "1-1", "2024-01", "step_99", "best_checkpoint", ".deepfm-staging", ".deepfm-old-step_14",
             ".deepfm-new-x", ".deepfm-writing-0", ".deepfm-process-x-0", "CHECKSUMS.tmp", "part.crc", "_SUCCESS",
             "LOCK", "run.json.tmp", "a\nb", "x" * 200, *(name + "~" for name in beside),
             *(name[:-1] for name in beside)]
    path = folder / rng.choice(names)
    if not path.name or os.path.lexists(path):
        return "nothing"
    kind = rng.choice(["file", "folder", "pipe", "dangling", "full"])
    if kind == "full":
        path.mkdir()
        (path / "state.json").write_text("{}")
    else:
        path.touch()
        if kind != "file":
            place(rng, path, kind)
    return f"add {kind} {path.name[:30]!r}"


def damage(rng, kind, work):
    """Change one file of a kind's targets; returns what was done."""
    paths = sorted({path for pattern in kind.targets for path in work.glob(pattern)})
    path, way = rng.choice(paths), rng.choice(kind.ways)
    if path.is_dir() and way not in (*PLACES, "add"):
        way = rng.choice(PLACES)
    if way == "swap":
        other = rng.choice([other for other in paths if not other.is_dir()])
        content = other.read_bytes()
        other.write_bytes(path.read_bytes())
        path.write_bytes(content)
        done = f"swap with {other.relative_to(work)}"
    elif way in PLACES:
        done = place(rng, path, way)
    elif way == "add":
        done = add_something(rng, path)
    elif way == "json":
        done = mutate_json(rng, path)
    elif way == "json line":
        done = mutate_json_line(rng, path)
    elif way == "forged info":
        done = forge_info(rng, path)
    elif way == "forged state":
        done = forge_state(rng, path)
    elif way == "forged arrays":
        done = forge_arrays(rng, path)
    else:
        done = mutate_bytes(rng, path, way)
    return f"{path.relative_to(work)}: {done}"


def refit(work):
    """Make the checksums of all checkpoints fit their files."""
    from tools.trainer import checkpoints
    from tools.trainer.files import checksum

    for path in [*work.glob("save/*/state.json"), *work.glob("packed/state.json")]:
        state = json.loads(path.read_text())
        for name in state["files"]:
            file = path.parent / name
            if file.is_file():
                state["files"][name] = {"bytes": file.stat().st_size, "crc32": checksum(str(file))}
        with contextlib.suppress(Exception):
            info = json.loads((path.parent / "encoder" / "dataset_info.json").read_text())
            state["data"]["fingerprint"] = info["fingerprint"]
        path.write_text(json.dumps({**state, "digest": checkpoints.digest(state)}))


# --------------------------------------------------------------------------------------------------------- one attempt


def run_inside(module, arguments, log):
    """Run a program in this process -> (exit status, or the traceback of what came out of it, output, errors)"""
    program = __import__(module)
    outputs = [open(f"{log}.{name}", "w+b") for name in ("out", "err")]  # noqa: SIM115 - closed below
    saved = [os.dup(number) for number in (1, 2)]
    leave, os._exit = os._exit, sys.exit
    for number, file in enumerate(outputs, 1):
        os.dup2(file.fileno(), number)
    try:
        status = program.main(arguments) or 0
    except SystemExit as end:
        status = end.code
    except BaseException:
        status = traceback.format_exc()
    finally:
        os._exit = leave
        sys.stdout.flush()
        sys.stderr.flush()
        for number, old in enumerate(saved, 1):
            os.dup2(old, number)
            os.close(old)
    texts = []
    for file in outputs:
        file.seek(0)
        texts.append(file.read().decode("utf-8", "replace"))
        file.close()
    return (status, *texts)


def run_apart(module, arguments):
    script = ROOT / ("" if module == "deepfm_train_eval" else "tools") / f"{module}.py"
    result = subprocess.run([sys.executable, str(script), *arguments], capture_output=True, stdin=subprocess.DEVNULL,
                            timeout=TIMEOUT)
    return (result.returncode, *(text.decode("utf-8", "replace") for text in (result.stdout, result.stderr)))


def classify(status, errors, same, checked, several=False):
    """The end of a run.

    same: whether what came out is what undamaged inputs give, None where it cannot be read; several: whether there may
    be several lines, one for each thing that is wrong.
    """
    if isinstance(status, str) or "Traceback (most recent" in errors:
        return "traceback"
    if status < 0 or "Check failure stack trace" in errors:
        return "abort"
    if status:
        lines = [line for line in errors.splitlines() if line.strip()]
        clear = all(line.startswith("error: ") for line in lines) and (len(lines) == 1 or several and lines)
        return "clear line" if status in (1, 2) and clear else "traceback"
    if same:
        return "right"
    return "silently other" if checked else "as it is"


def attempt(inputs, name, seed):
    """Damage a copy of the inputs and run a program on it -> {"end", "what", "text"}"""
    rng, kind = random.Random(f"{name} {seed}"), KINDS[name]
    with tempfile.TemporaryDirectory(dir=inputs.parent) as folder:
        work = Path(folder) / "work"
        shutil.copytree(inputs / kind.folder, work)
        job = rng.choice(kind.tasks)
        module, arguments, describe = task(job, work)
        what = f"{job}, {damage(rng, kind, work)}"
        if name in ("dense_forged", "encoder_forged"):
            refit(work)
        status, output, errors = (run_apart(module, arguments) if rng.randrange(WHOLE_PROCESS) == 0 else
                                  run_inside(module, arguments, Path(folder) / "log"))
        same = None
        if status == 0:
            expected = expected_result(inputs, kind.folder, job)
            with contextlib.suppress(Exception):
                same = json.loads(json.dumps(describe(work, output))) == expected
        end = classify(status, errors, same, kind.checked, several=module == "inspect_dataset")
        return {"end": end, "what": what,
                "text": (status if isinstance(status, str) else errors)[-2000:]}


def expected_result(inputs, folder_of_job, job):
    """What undamaged inputs give; found out when it is first asked for, and kept beside the inputs."""
    known = inputs.parent / f"{folder_of_job} {job}.json"
    if not known.exists():
        with tempfile.TemporaryDirectory(dir=inputs.parent) as folder:
            work, result = Path(folder) / "work", Path(folder) / "result"
            shutil.copytree(inputs / folder_of_job, work)
            module, arguments, describe = task(job, work)
            status, output, errors = run_inside(module, arguments, Path(folder) / "log")
            assert status == 0, f"{job}: {status} {output} {errors}"
            result.write_text(json.dumps(describe(work, output)))
            result.rename(known)  # whole, also where two workers ask at once
    return json.loads(known.read_text())


# ------------------------------------------------------------------------------------------------------------- workers


def work_on_orders(inputs):
    """Orders come as lines of JSON, answers go back so."""
    sys.argv[0] = str(ROOT / "deepfm_train_eval.py")
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    orders = os.fdopen(os.dup(0))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    import deepfm_train_eval  # noqa: F401 - and with it OneFlow, once

    for line in orders:
        name, seed = json.loads(line)
        answers.write(json.dumps(attempt(inputs, name, seed)) + "\n")


def start_worker(inputs):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, __file__, "--work_on", str(inputs)], stdin=subprocess.PIPE, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment)


def ask(worker, order):
    """A worker's answer; it is killed where none comes."""
    answer = queue.Queue()
    worker.stdin.write(json.dumps(order) + "\n")
    worker.stdin.flush()
    threading.Thread(target=lambda: answer.put(worker.stdout.readline()), daemon=True).start()
    try:
        line = answer.get(timeout=TIMEOUT)
        if line:
            return json.loads(line)
        return {"end": "abort", "what": f"status {worker.wait()}", "text": ""}
    except queue.Empty:
        worker.kill()
        worker.wait()
        return {"end": "hang", "what": f"no answer in {TIMEOUT} seconds", "text": ""}


def serve(inputs, orders, results):
    """Hand orders to workers, one after the other; a worker that died or is old gets a successor."""
    worker, runs = None, 0
    for order in iter(lambda: orders.get(), None):
        if worker is None or worker.poll() is not None or runs == RUNS_OF_A_WORKER:
            if worker is not None:
                worker.kill()
                worker.wait()
            worker, runs = start_worker(inputs), 0
        answer = ask(worker, order)
        if answer["end"] in ("abort", "hang"):  # once more: OneFlow has a race at the start of tiny graphs
            worker.kill()
            worker.wait()
            worker, runs = start_worker(inputs), 0
            answer = ask(worker, order)
        results.put((order, answer))
        runs += 1
    if worker is not None:
        worker.kill()
        worker.wait()
    results.put(None)


def campaign(count=None, seed=0, minutes=None, kinds=None, workers=None, prepared=None):
    """Run it -> ({kind: Counter of ends}, [(kind, seed, result) of the wrong ones])

    minutes: after the inputs have been made, which takes some seconds; prepared: folder where they are already.
    """
    kinds, workers = list(kinds or KINDS), workers or len(os.sched_getaffinity(0))
    table, wrong = {name: Counter() for name in kinds}, []
    with contextlib.ExitStack() as stack:
        folder = prepared or stack.enter_context(tempfile.TemporaryDirectory(prefix="fuzz"))
        if not prepared:
            subprocess.run([sys.executable, __file__, "--prepare", folder], check=True, stdout=subprocess.DEVNULL)
        end = time.monotonic() + 60 * minutes if minutes else None
        orders, results = queue.Queue(2 * workers), queue.Queue()
        for _ in range(workers):
            threading.Thread(target=serve, args=(Path(folder) / "inputs", orders, results), daemon=True).start()

        def give():
            number = 0
            while (count is None or number < count) and (end is None or time.monotonic() < end):
                orders.put((kinds[number % len(kinds)], seed + number // len(kinds)))
                number += 1
            for _ in range(workers):
                orders.put(None)

        threading.Thread(target=give, daemon=True).start()
        left = workers
        with contextlib.suppress(KeyboardInterrupt):  # Ctrl-C shows what there is
            while left:
                result = results.get()
                if result is None:
                    left -= 1
                    continue
                (name, number), found = result
                table[name][found["end"]] += 1
                if found["end"] in WRONG:
                    wrong.append((name, number, found))
                    print(f"{found['end']}: {name} {number}, {found['what']}\n{found['text']}", file=sys.stderr)
    return table, wrong


def print_table(table):
    width = max(len(name) for name in table)
    print(" " * width, *(f"{end:>14}" for end in ENDS))
    for name, ends in [*table.items(), ("all", sum(table.values(), Counter()))]:
        print(f"{name:<{width}}", *(f"{ends[end]:>14}" for end in ENDS))


def end_by_signals(kills, signals, seed):
    """Returns the exit status."""
    import fuzz_kills

    failed = 0
    if kills:
        other, runs = fuzz_kills.kills(kills, seed)
        print(f"{kills} SIGKILL in {runs} runs, which were resumed: {runs - other} ended in the same numbers, {other} "
              "not")
        failed += other
    if signals:
        wrong = fuzz_kills.signals(signals, seed)
        print(f"{signals} SIGINT and SIGTERM: {signals - wrong} ended in one line and status 130 or 143, {wrong} not")
        failed += wrong
    return 1 if failed else 0


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=0, help="of the first damage of each kind; further ones count on")
    parser.add_argument("--count", type=int, help="number of damaged inputs")
    parser.add_argument("--minutes", type=float, help="stop after so many minutes")
    parser.add_argument("--kind", action="append", choices=list(KINDS), help="only this kind; may be given repeatedly")
    parser.add_argument("--workers", type=int, help="processes at a time; default: one per core")
    parser.add_argument("--kills", type=int, default=0, help="kill training runs so many times")
    parser.add_argument("--signals", type=int, default=0, help="end programs by a signal so many times")
    parser.add_argument("--prepared", type=Path, metavar="DIR", help="take the inputs that --prepare DIR has made")
    parser.add_argument("--prepare", type=Path, metavar="DIR", help="only make the inputs, in DIR")
    parser.add_argument("--work_on", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work_on:
        return work_on_orders(args.work_on)
    if args.prepare:
        make_inputs(args.prepare, run_inside)
        return 0
    if args.kills or args.signals:
        return end_by_signals(args.kills, args.signals, args.seed)
    count = args.count if args.count or args.minutes else 1000
    table, wrong = campaign(count, args.seed, args.minutes, args.kind, args.workers, args.prepared)
    print_table(table)
    for name, number, found in wrong:
        print(f"{found['end']}: --kind {name} --seed {number} --count 1: {found['what']}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
