#!/usr/bin/env python3
"""Measure the parts of this package on this machine.

    python tools/benchmark.py step --peer /path/to/python/with/torch --plot step.png
    python tools/benchmark.py step --device cuda
    python tools/benchmark.py loader
    python tools/benchmark.py eval
    python tools/benchmark.py scale
    python tools/benchmark.py scale --save_rows 10000000
    python tools/benchmark.py serve --peer /path/to/python/with/torch
    python tools/benchmark.py convert --num_rows 500000 --peer /path/to/python/with/fuxictr
    python tools/benchmark.py convert --num_rows 500000,2000000 --engine spark
    python tools/benchmark.py accuracy --data data/mine --seeds 1,2,3 --peer /path/to/python/with/fuxictr

prints a table, one line per job, of medians over --repeats runs; the jobs take turns, so that a slow spell of the
machine hits all of them. --json FILE keeps every single measurement. Training runs are those of the launcher,
train_deepfm_criteo_x4.sh, on synthetic data; its environment variables (VENV, OMP_NUM_THREADS, DEEPFM_BLAS) work here.
With --device cuda they are the trainer's loop in the Python that runs this script, in one process per GPU.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `tools` is found from any folder
import benchmark_conversion
import benchmark_serving
from benchmark_workers import last_words, make_dataset, output_lines, save_batches

from tools.trainer import cli
from tools.trainer.cli import Parser, UserError, int_list, number
from tools.trainer.plateau import MONITORS

TOOLS = Path(__file__).resolve().parent
LAUNCHER = TOOLS.parent / "train_deepfm_criteo_x4.sh"
WORKERS = TOOLS / "benchmark_workers.py"
STORES = ("device_mem", "cached_host_mem", "cached_ssd")

# ------------------------------------------------------------------------------------------------------ shared pieces


def median(runs, key):
    """Median of runs[i][key] over the runs that have it, or None."""
    values = [run[key] for run in runs if key in run]
    return statistics.median(values) if values else None


def take_turns(jobs, repeats):
    """Run the jobs {name: function returning a dict of numbers} in turns; returns {name: list of the dicts}."""
    results = {name: [] for name in jobs}
    for repeat in range(repeats):
        for name, job in jobs.items():
            print(f"run {repeat + 1}/{repeats}: {name}", file=sys.stderr, flush=True)
            results[name].append(job())
    return results


def print_table(headers, rows):
    """Print rows of cells as a markdown table with aligned columns."""
    widths = [max(len(str(row[column])) for row in [headers, *rows]) for column in range(len(headers))]
    for row in [headers, ["-" * width for width in widths], *rows]:
        print_row(row, widths)


def print_row(cells, widths):
    print("| " + " | ".join(str(cell).ljust(width) for cell, width in zip(cells, widths)) + " |", flush=True)


def write_json(path, results):
    """Write all results to path, or do nothing when path is None."""
    if path:
        Path(path).write_text(json.dumps(results, indent=2) + "\n")


def apart(function, *args):
    """Call it in a process of its own: what this one once took would count in the peak of every process it starts."""
    with ProcessPoolExecutor(1) as pool:
        return pool.submit(function, *args).result()


def run_measured(command, watch=None, **options):
    """Run a command that prints {"seconds": ...} as its last line; returns that dict with process_seconds and peak_mb.

    process_seconds is the whole process with its start and imports, peak_mb the largest resident size of the process
    or of one of its children, unless `watch`, a context manager of the process's number, has measured() it otherwise.
    Raises UserError with the command's messages when it fails.
    """
    with tempfile.TemporaryFile("w+") as output:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, **options)
        with watch(process.pid) if watch else nullcontext() as watched:
            _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = status
        output.seek(0)
        lines = output.read().splitlines()
    if status != 0:
        raise UserError(f"{' '.join(map(str, command[:1]))} failed:\n" + "\n".join(lines[-15:]))
    return {**json.loads(lines[-1]), "process_seconds": seconds, "peak_mb": usage.ru_maxrss / 1024,
            **(watched.measured() if watch else {})}


def add_shared_options(parser):
    parser.add_argument("--repeats", type=natural, default=3, help="runs of each job; medians are printed")
    parser.add_argument("--json", help="file for all measurements")
    parser.add_argument("--work_dir", help="folder for scratch data; default: the system's")


# -------------------------------------------------------------------------------------------------------------- convert

def convert(args):
    """Speed and memory of the converters, of another version of them, of Spark and of FuxiCTR, on one input."""
    with tempfile.TemporaryDirectory(dir=args.work_dir) as work:
        jobs = {}
        for num_rows in args.num_rows:
            jobs.update(benchmark_conversion.jobs_of(Path(work), num_rows, args, run_measured, apart))
        results = take_turns(jobs, args.repeats)
    print_table(benchmark_conversion.HEADS, benchmark_conversion.table_of(results))
    print(*benchmark_conversion.estimates_of(results), sep="\n")
    write_json(args.json, [{"job": name, "rows": num, "runs": runs} for (name, num), runs in results.items()])


# -------------------------------------------------------------------------------------- training runs on synthetic data


def steps_plan(steps):
    """(steps between two log lines, steps of the run); the first line, with compilation and warm-up, is not counted."""
    interval = max(1, steps // 4)
    return interval, interval * (1 + -(-steps // interval))


def rows_for(batch_size, steps):
    """Training rows with which the reader is still at work when the last step runs: its pool has 2^19 rows."""
    return batch_size * (steps_plan(steps)[1] + 4) + (0 if batch_size * steps < 50_000 else 1 << 19)


def model_options(dnn, net_dropout, updates):
    """updates: "recipe" leaves L2 and clipping to the launcher (every row moves), "lazy" moves looked-up rows only."""
    lazy = ["--embedding_l2", "0", "--max_grad_norm", "0"] if updates == "lazy" else []
    return ["--dnn", ",".join(map(str, dnn)), "--net_dropout", str(net_dropout), *lazy]


def train(data_dir, options, interval, steps, processes=None, last_event=("train", 1), timeout=3000):
    """Run the launcher until metrics.jsonl has `last_event` = (event, number of such lines), then end it.

    Returns {"ms_per_step", "samples_per_second": means without the first line, "first_line_seconds": from the start,
    "peak_mb": sum over the trainer's processes, "processes", "threads", "lines": of metrics.jsonl}.
    Raises UserError with the trainer's last messages when it ends before.
    """
    environment = {**os.environ, "DATA_DIR": str(data_dir)}
    if processes:
        environment["DEVICE_NUM_PER_NODE"] = str(processes)
    with tempfile.TemporaryDirectory(dir=Path(data_dir).parent) as work, open(Path(work) / "output", "w+") as output:
        metrics = Path(work) / "logs" / "metrics.jsonl"
        start = time.perf_counter()
        process = subprocess.Popen(
            ["bash", LAUNCHER, "--persistent_path", f"{work}/tables", "--persistent_path_fm", f"{work}/tables_fm",
             "--log_dir", f"{work}/logs", "--loss_print_interval", str(interval), "--train_batches", str(steps),
             *options], cwd=work, env=environment, stdout=output, stderr=subprocess.STDOUT)  # fmt: skip
        try:
            first = None
            while True:
                ended = process.poll() is not None
                lines = read_metrics(metrics)
                first = first or (time.perf_counter() - start if lines else None)
                if sum(line["event"] == last_event[0] for line in lines) >= last_event[1]:
                    break
                if ended or time.perf_counter() - start > timeout:
                    output.seek(0)
                    raise UserError("the training run failed:\n" + "".join(output.readlines()[-15:]))
                time.sleep(0.02)
            peak = peak_memory(process.pid)
        finally:
            end(process)
        output.seek(0)
        found = re.search(r"(\d+) process(?:es)? with (\d+) thread", output.read())
    counted = [line for line in lines if line["event"] == "train"][1:] or lines[:1]
    ms = statistics.mean(line["ms_per_step"] for line in counted)
    batch_size = counted[0]["samples_per_second"] * counted[0]["ms_per_step"] / 1000
    return {"ms_per_step": ms, "samples_per_second": 1000 * batch_size / ms, "first_line_seconds": first,
            "peak_mb": peak, "processes": int(found[1]), "threads": int(found[2]), "lines": lines}  # fmt: skip


def read_metrics(path):
    """The complete lines of a metrics.jsonl that is being written."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def peak_memory(launcher_pid):
    """Sum of the largest resident sizes, in MB, of the trainer's processes below the launcher."""
    import psutil

    total = 0
    for process in psutil.Process(launcher_pid).children(recursive=True):
        command = process.cmdline()
        if process.name().startswith("python") and "oneflow.distributed.launch" not in command:
            status = Path(f"/proc/{process.pid}/status").read_text()
            total += int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024
    return total


def end(process, patience=60):
    """Stop the launcher with all its processes."""
    import psutil

    children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    process.terminate()
    try:
        process.wait(patience)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for child in children:
        if child.is_running():
            child.kill()


def training_job(work, updates, args, **options):
    """A function that runs the trainer on the dataset in work with the settings of args and the names in options."""
    setting = {**vars(args), **options}
    interval, steps = steps_plan(setting["steps"])
    arguments = [*model_options(setting["dnn"], setting["net_dropout"], updates), "--batch_size",
                 str(setting["batch_size"]), "--device", "cpu"]  # fmt: skip
    return lambda: train(work / "data", arguments, interval, steps, setting["processes"], ("train", steps // interval))


def worker(name, spec):
    """Run a job of benchmark_workers.py in a process of its own; see `run_measured`."""
    return run_measured([sys.executable, WORKERS, name, json.dumps(spec)])


# ----------------------------------------------------------------------------------------------------------------- step

def peer_job(work, updates, args):
    path = work / "batches.npz"
    if not path.exists():
        apart(save_batches, work / "data", path, args.batch_size)
    names = ("table_rows", "fields", "dnn", "net_dropout", "steps")
    spec = {"batches": str(path), "updates": updates, "warmup": 2, **{name: getattr(args, name) for name in names}}
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "OPENBLAS_"))}
    return lambda: run_measured([args.peer, WORKERS, "peer", json.dumps(spec)], env=environment)


def run_floor(work, args, processes, threads):
    """The matrix products of a step in as many processes, with as many threads each, as the trainer had."""
    sizes = [args.fields * 16, *args.dnn, 1]
    with tempfile.TemporaryDirectory(dir=work) as folder, ThreadPoolExecutor(processes) as pool:
        spec = {"sizes": sizes, "rows": args.batch_size // processes, "steps": max(1, args.steps // 2),
                "processes": processes, "folder": folder}  # fmt: skip
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        commands = [[sys.executable, WORKERS, "floor", json.dumps({**spec, "process": process})]
                    for process in range(processes)]  # fmt: skip
        results = list(pool.map(lambda command: run_measured(command, env=environment), commands))
    flop = 6 * args.batch_size * sum(a * b for a, b in zip(sizes[:-1], sizes[1:]))
    ms = max(result["ms_per_step"] for result in results)
    return {"ms_per_step": ms, "gflops": flop / ms / 1e6, "blas": results[0]["blas"]}


def step(args):
    """Time of a training step of the launcher's own run, from parquet, against its matrix products and a peer.

    Start-up is from the launcher's start to the first step's end.
    """
    if args.device == "cuda":
        return step_on_cuda(args)
    with tempfile.TemporaryDirectory(dir=args.work_dir) as work:
        work = Path(work)
        rows = rows_for(args.batch_size, args.steps)
        apart(make_dataset, work / "data", (rows, args.batch_size, args.batch_size), args.fields, args.table_rows)
        jobs, layout = {}, {}

        def remember(job):
            result = job()
            layout.update(processes=result["processes"], threads=result["threads"])
            return result

        for updates in args.updates:
            job = training_job(work, updates, args)
            jobs["trainer", updates] = lambda job=job: remember(job)
            if args.peer:
                jobs["PyTorch peer", updates] = peer_job(work, updates, args)
        jobs["matrix products", ""] = lambda: run_floor(work, args, **layout)
        jobs["start-up", args.updates[0]] = lambda: startup(work, args.updates[0], args)
        results = take_turns(jobs, args.repeats)
    report_step(args, results, layout)


def startup(work, updates, args):
    options = [*model_options(args.dnn, args.net_dropout, updates), "--batch_size", str(args.batch_size)]
    return {"seconds": train(work / "data", [*options, "--device", "cpu"], 1, 1, args.processes)["first_line_seconds"]}


def report_step(args, results, layout):
    ms = {name: median(runs, "ms_per_step") for name, runs in results.items()}
    floor, rows = ms["matrix products", ""], []
    for (job, updates), value in ms.items():
        if value is None:
            continue
        peer = ms.get(("PyTorch peer", updates))
        rows.append([
            job, updates, f"{value:.1f}", f"{1000 * args.batch_size / value:.0f}", f"{value / floor:.2f}",
            f"{1 - floor / value:.0%}" if job == "trainer" else "", f"{peer / value:.2f}" if peer else "",
        ])  # fmt: skip
    blas = results["matrix products", ""][0]["blas"]
    gflops = median(results["matrix products", ""], "gflops")
    print(f"batch {args.batch_size}, {args.fields} fields, {args.table_rows} table rows, DNN {args.dnn}, dropout "
          f"{args.net_dropout}; {layout['processes']} process(es), {layout['threads']} thread(s) each; {blas}, "
          f"{gflops:.0f} GFLOP/s")  # fmt: skip
    print_table(["job", "tables", "ms/step", "samples/s", "times the floor", "outside products", "times the peer"],
                rows)
    print(f"start-up: {median(results['start-up', args.updates[0]], 'seconds'):.1f} s")
    measured = {"settings": settings(args), **layout, "runs": named(results)}
    write_json(args.json, measured)
    if args.plot:
        plot_step(measured, args.plot)


def settings(args):
    return {name: value for name, value in vars(args).items() if name not in ("work", "json", "work_dir", "plot")}


def named(results):
    """Tuples as keys made fit for JSON."""
    return {" ".join(str(part) for part in name if part != ""): runs for name, runs in results.items()}


def plot_step(measured, path):
    """Bars of the median throughput of each job, and every run as a dot. measured: what --json holds."""
    import matplotlib

    matplotlib.use("Agg")  # no display needed
    import matplotlib.pyplot as plt

    colours = {"trainer": "#0072B2", "PyTorch peer": "#D55E00", "matrix products": "#999999"}
    batch_size, fields = measured["settings"]["batch_size"], measured["settings"]["fields"]
    speeds = {name: [1000 * batch_size / run["ms_per_step"] for run in runs]
              for name, runs in measured["runs"].items() if "ms_per_step" in runs[0]}
    repeats = max(map(len, speeds.values()))
    highest = max(map(max, speeds.values()))
    figure, axes = plt.subplots(figsize=(1.5 + 1.6 * len(speeds), 4), layout="constrained")
    for place, (name, values) in enumerate(speeds.items()):
        job = next(job for job in colours if name.startswith(job))
        axes.bar(place, statistics.median(values), width=0.75, color=colours[job], alpha=0.85)
        if len(values) > 1:  # beside each other in the order of the runs
            steps = [place - 0.2 + 0.4 * number / (len(values) - 1) for number in range(len(values))]
            axes.plot(steps, values, "o", color="white", markeredgecolor="black", markersize=4.5, clip_on=False)
        axes.text(place, max(values) + 0.02 * highest, f"{statistics.median(values):.0f}", ha="center", va="bottom")
    axes.set_xticks(range(len(speeds)), [re.sub(" (recipe|lazy)$", r"\n\1", name) for name in speeds])
    axes.set(ylabel="samples/s", ylim=(0, 1.1 * highest),
             title=f"Training throughput, batch {batch_size}, {fields} fields")  # fmt: skip
    axes.set_xlabel(f"bars: medians, dots: the {repeats} runs" if repeats > 1 else "", fontsize=9, color="#555555")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def step_on_cuda(args):
    """Every store type, with and without AMP, the tables as in "lazy": a line of each as soon as it is known."""
    gpus = count_gpus()
    if gpus == 0:
        print("OneFlow sees no CUDA device: nothing measured")
        return
    processes, results = args.processes or gpus, {}
    print(f"batch {args.batch_size}, {args.fields} fields, {args.table_rows} table rows, DNN {args.dnn}, dropout "
          f"{args.net_dropout}; {processes} process(es)")  # fmt: skip
    headers = ["store type", "AMP", "data", "ms/step", "samples/s", "GPU MB"]
    widths = [15, 3, 12, 8, 9, 6]
    print_row(headers, widths)
    print_row(["-" * width for width in widths], widths)
    with tempfile.TemporaryDirectory(dir=args.work_dir) as work:
        rows = 2 * args.steps * args.batch_size + (1 << 19)  # the reader is still at work when the last step runs
        apart(make_dataset, Path(work) / "data", (rows, args.batch_size, args.batch_size), args.fields, args.table_rows)
        for repeat in range(args.repeats):
            for store, amp in ((store, amp) for store in STORES for amp in ("", "AMP")):
                print(f"run {repeat + 1}/{args.repeats}: {store} {amp}", file=sys.stderr, flush=True)
                for data, result in gpu_results(work, args, processes, store, amp):
                    runs = results.setdefault((store, amp, data), [])
                    runs.append(result)
                    write_json(args.json, {"settings": settings(args), "processes": processes, "runs": named(results)})
                    if repeat + 1 == args.repeats:
                        print_row([store, "yes" if amp else "no", data, *gpu_cells(runs)], widths)


def count_gpus():
    """GPUs that OneFlow sees, asked in a process of its own."""
    script = "import oneflow; print(oneflow.cuda.device_count() if oneflow.cuda.is_available() else 0)"
    seen = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return int(seen.stdout.split()[-1]) if seen.returncode == 0 else 0


def gpu_results(work, args, processes, store, amp):
    """Yield ("from parquet", result) and ("same batch", result) of `gpu_worker`; what it did not come to: {"error"}."""
    options = [*model_options(args.dnn, args.net_dropout, "lazy"), "--batch_size", str(args.batch_size), "--device",
               "cuda", "--store_type", store, *(["--amp"] if amp else [])]  # fmt: skip
    launch = ["-m", "oneflow.distributed.launch", "--nproc_per_node", str(processes)] if processes > 1 else []
    left, words = ["from parquet", "same batch"], []
    with tempfile.TemporaryDirectory(dir=work) as scratch:
        spec = {"data_dir": f"{work}/data", "work_dir": scratch, "options": options, "steps": args.steps}
        process = subprocess.Popen([sys.executable, *launch, WORKERS, "gpu", json.dumps(spec)], stdout=subprocess.PIPE,
                                   stderr=subprocess.STDOUT, text=True, start_new_session=True)  # fmt: skip
        for line in output_lines(process, 60 + args.steps):
            if line.startswith('{"data"'):
                yield left.pop(0), json.loads(line)
            else:
                words.append(line)
    for data in left:
        yield data, {"error": [*last_words(words, 15), f"ended with status {process.returncode}"]}


def gpu_cells(runs):
    """Medians of the runs that have one, else in one cell why the last one failed."""
    values = [median(runs, name) for name in ("ms_per_step", "samples_per_second", "gpu_memory_mb")]
    if values[0] is not None:
        return [f"{values[0]:.2f}", *(f"{value:.0f}" for value in values[1:])]
    words = runs[-1]["error"]
    reasons = [word for word in words if "Check failed" in word] or [word for word in words if "rror" in word] or words
    return [f"failed: {cli.brief(reasons[-1], 200)} ({words[-1]})"]


# --------------------------------------------------------------------------------------------------------------- loader


def loader(args):
    """Rows per second that the trainer's own input path reads, shuffles and batches on one core."""
    with tempfile.TemporaryDirectory(dir=args.work_dir) as work:
        data_dir = Path(work) / "data"
        apart(make_dataset, data_dir, (args.num_rows, 1000, 1000), args.fields, args.table_rows)
        spec = {"data_dir": str(data_dir), "batch_size": args.batch_size, "dnn": args.dnn}
        results = take_turns({"loader": lambda: worker("loader", spec)}, args.repeats)
    rows = []
    for job, key in (("read, shuffle, batch", "rows_per_second"), ("dropout masks", "masks_per_second")):
        speed = median(results["loader"], key)
        rows.append([job, f"{speed:.0f}", f"{10_000 / speed:.1%}", f"{median(results['loader'], 'peak_mb'):.0f}"])
    print_table(["job, on one core", "rows/s", "of one core at 10,000 samples/s", "peak MB"], rows)
    write_json(args.json, {"settings": settings(args), "runs": results})


# ----------------------------------------------------------------------------------------------------------------- eval


def eval_run(work, args):
    """Train, score val (with the graph's compilation) and then test in one run of the launcher."""
    interval, steps = steps_plan(args.steps)
    options = [*model_options(args.dnn, args.net_dropout, "lazy"), "--batch_size", str(args.batch_size)]
    result = train(work / "data", [*options, "--device", "cpu"], interval, steps, args.processes, ("test", 1))
    lines = {line["event"]: line for line in result["lines"]}
    return {"train": result["samples_per_second"], "processes": result["processes"],
            **{split: lines[split]["samples"] / lines[split]["seconds"] for split in ("val", "test")}}  # fmt: skip


def evaluate(args):
    """Evaluation, with reading and metrics, against training in the same run; the metrics of many rows."""
    with tempfile.TemporaryDirectory(dir=args.work_dir) as work:
        work = Path(work)
        train_rows = rows_for(args.batch_size, args.steps)
        apart(make_dataset, work / "data", (train_rows, args.num_rows, args.num_rows), args.fields, args.table_rows)
        jobs = {"run": lambda: eval_run(work, args), "metrics": lambda: worker("metrics", {"rows": args.metric_rows})}
        results = take_turns(jobs, args.repeats)
    training = median(results["run"], "train")
    names = {"train": "training", "val": "evaluation, first", "test": "evaluation, later"}
    rows = [[name, f"{median(results['run'], key):.0f}", f"{median(results['run'], key) / training:.2f}"]
            for key, name in names.items()]  # fmt: skip
    print_table(["job", "rows/s", "times training"], rows)
    held, extra = (median(results["metrics"], key) for key in ("held_bytes", "extra_bytes"))
    seconds, grouped = (median(results["metrics"], key) for key in ("seconds", "seconds_with_groups"))
    print(f"metrics of {args.metric_rows} rows: {seconds:.2f} s, with GAUC {grouped:.2f} s; labels and scores take "
          f"{held:.0f} bytes a row, groups 8, computing up to {extra:.0f} more")  # fmt: skip
    write_json(args.json, {"settings": settings(args), "runs": results})


# ---------------------------------------------------------------------------------------------------------------- scale


def scale_settings(args):
    """(table rows, fields, batch size) of every run: one of the three varies at a time."""
    base = (args.table_rows[0], args.fields[0], args.batch_size[0])
    found = [base]
    found += [(value, *base[1:]) for value in args.table_rows[1:]]
    found += [(base[0], value, base[2]) for value in args.fields[1:]]
    return found + [(*base[:2], value) for value in args.batch_size[1:]]


def scale_run(work, args, table_rows, fields, batch_size):
    """One training run on a dataset of its own, which is gone afterwards: large tables do not crowd the disk."""
    with tempfile.TemporaryDirectory(dir=work) as folder:
        rows = batch_size * (steps_plan(args.steps)[1] + 4)
        apart(make_dataset, Path(folder) / "data", (rows, 1000, 1000), fields, table_rows)
        return training_job(Path(folder), "lazy", args, batch_size=batch_size)()


def scale(args):
    """Step time and memory against table rows, fields and batch size; or --save_rows: saving and loading tables."""
    if args.save_rows:
        return scale_checkpoint(args)
    with tempfile.TemporaryDirectory(dir=args.work_dir) as work:
        jobs = {key: lambda key=key: scale_run(work, args, *key) for key in scale_settings(args)}
        results = take_turns(jobs, args.repeats)
    base = median(next(iter(results.values())), "ms_per_step")
    rows = []
    for key, runs in results.items():
        ms, peak = median(runs, "ms_per_step"), median(runs, "peak_mb")
        tables = key[0] * 17 * 4 * 3 / 2**20
        rows.append([*key, f"{ms:.1f}", f"{ms / base:.3f}", f"{median(runs, 'samples_per_second'):.0f}",
                     f"{peak:.0f}", f"{tables:.0f}", f"{peak - tables:.0f}"])  # fmt: skip
    print_table(["table rows", "fields", "batch", "ms/step", "times the first", "samples/s", "peak MB",
                 "3 x tables MB", "rest MB"], rows)  # fmt: skip
    write_json(args.json, {"settings": settings(args), "runs": named(results)})


def scale_checkpoint(args):
    """Seconds and bytes of a checkpoint of --save_rows table rows, 16 + 1 wide, with Adam's moments."""

    def run():
        with tempfile.TemporaryDirectory(dir=work) as scratch:
            return worker("checkpoint", {"data_dir": f"{work}/data", "work_dir": scratch, "options": options})

    options = ["--device", "cpu", "--dnn", "8", "--batch_size", "1000"]
    with tempfile.TemporaryDirectory(dir=args.work_dir) as work:
        apart(make_dataset, Path(work) / "data", (8000, 1000, 1000), args.fields[0], args.save_rows)
        results = take_turns({"checkpoint": run}, args.repeats)["checkpoint"]
    names = ("save_seconds", "load_seconds", "check_seconds", "bytes_per_row", "peak_mb")
    print_table(["rows", "save s", "load s", "of it checksums s", "bytes/row on disk", "peak MB"],
                [[args.save_rows, *(f"{median(results, name):.1f}" for name in names)]])  # fmt: skip
    write_json(args.json, {"settings": settings(args), "runs": results})


# ------------------------------------------------------------------------------------------------------------- accuracy


MODEL = ("dnn", "embedding_vec_size", "net_dropout", "batch_norm", "embedding_l2", "learning_rate", "batch_size",
         "max_grad_norm", "monitor", "epochs", "early_stop_patience")  # what both are given


def train_here(folder, args, seed):
    """The trainer's metrics on test, in one process; the rate is cut after each epoch without gain, as FuxiCTR's.

    Leaves what the model began with in folder, for `fuxictr_worker`.
    """
    options = {name: getattr(args, name) for name in MODEL if name != "batch_norm"}
    options.update(dnn=",".join(map(str, args.dnn)), patience=1, seed=seed, device="cpu", data_dir=args.data,
                   persistent_path=folder / "t", persistent_path_fm=folder / "f", model_save_dir=folder / "model")
    flags = ["--save_initial_model", *["--batch_norm"] * args.batch_norm]
    start = time.perf_counter()
    run_quietly("deepfm_train_eval.py", *flags, *(f"--{name}={value}" for name, value in options.items()))
    seconds = time.perf_counter() - start
    run_quietly("tools/export_embeddings.py", "--model_load_dir", folder / "model/initial_checkpoint", "--output",
                folder / "embeddings.parquet")
    lines = read_metrics(folder / "model" / "logs" / "metrics.jsonl")
    return {"auc": lines[-1]["auc"], "logloss": lines[-1]["logloss"], "seconds": seconds,
            "best_epoch": lines[-1]["epoch"], "epochs": lines[-2]["epoch"]}  # fmt: skip


def run_quietly(script, *options):
    """Run a script of this package. Raises UserError with the end of its messages when it fails."""
    result = subprocess.run([sys.executable, TOOLS.parent / script, *options], stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True)  # fmt: skip
    if result.returncode:
        raise UserError(f"{script} failed:\n" + "\n".join(result.stdout.splitlines()[-15:]))


def accuracy(args):
    """Test AUC and logloss of this trainer and of FuxiCTR: the same rows, recipe, monitor and initial values.

    The initial values of a seed are the trainer's; order of the rows and dropout are each one's own. Printed are the
    means over the seeds and their standard errors, that of the difference from the differences of the seeds.
    """
    recipe = {name: getattr(args, name) for name in MODEL}
    jobs = {}
    with tempfile.TemporaryDirectory(dir=args.work_dir) as work:
        for seed in args.seeds:
            folder = Path(work, str(seed))
            folder.mkdir()
            spec = json.dumps({**recipe, "data": args.data, "seed": seed, "folder": str(folder)})
            jobs["here", seed] = lambda seed=seed, folder=folder: train_here(folder, args, seed)
            jobs["FuxiCTR", seed] = lambda spec=spec: run_measured([args.peer, WORKERS, "fuxictr", spec])
        results = take_turns(jobs, 1)
    runs = {job: runs[0] for job, runs in results.items()}
    print(f"FuxiCTR {runs['FuxiCTR', args.seeds[0]]['fuxictr']}, PyTorch {runs['FuxiCTR', args.seeds[0]]['torch']}; "
          f"monitor {args.monitor}")  # fmt: skip
    print_table(["seed", "AUC here", "FuxiCTR", "difference", "logloss here", "FuxiCTR", "difference"],
                accuracy_rows(runs, args.seeds))  # fmt: skip
    write_json(args.json, {"settings": settings(args), "runs": named(results)})


def accuracy_rows(runs, seeds):
    """A row per seed, then means and standard errors; both sides of a seed begin alike, so differences are paired."""
    columns = []
    for metric in ("auc", "logloss"):
        here, theirs = ([runs[side, seed][metric] for seed in seeds] for side in ("here", "FuxiCTR"))
        columns += [here, theirs, [ours - other for ours, other in zip(here, theirs)]]

    def row(name, numbers, sign="+"):
        formats = [".6f", ".6f", f"{sign}.6f"] * 2
        return [name, *(format(number, form) for number, form in zip(numbers, formats))]

    rows = [row(seed, numbers) for seed, numbers in zip(seeds, zip(*columns))]
    rows.append(row("mean", map(statistics.mean, columns)))
    if len(seeds) > 1:
        errors = [statistics.stdev(column) / len(seeds) ** 0.5 for column in columns]
        rows.append(row("standard error", errors, sign=""))
    return rows


# ---------------------------------------------------------------------------------------------------------------- serve


def serve(args):
    """Requests of 1, 32 and 1000 rows to exported models, with raw columns and with ids, one core each, and a peer."""
    with tempfile.TemporaryDirectory(dir=args.work_dir) as work:
        work = Path(work)
        models, ids = benchmark_serving.make_models(work, args)

        def peer(name, spec):
            return run_measured([args.peer, WORKERS, name, json.dumps(spec)])

        results = take_turns(benchmark_serving.jobs_of(work, models, ids, args, worker, peer), args.repeats)
        rows = benchmark_serving.table_of(results, models)
    print(f"{ids} ids x (16 + 1), DNN {args.dnn}, one core")
    print_table(["job", "rows", "p50 ms", "p99 ms", "rows/s", "times PyTorch", "load s", "file MB"], rows)
    write_json(args.json, {"settings": settings(args), "ids": ids, "runs": results})


# ----------------------------------------------------------------------------------------------------------------- main


natural = number(int, 1)


def update_list(text):
    values = text.split(",")
    if not set(values) <= {"recipe", "lazy"}:
        raise argparse.ArgumentTypeError(f"'{text}', expected recipe, lazy or recipe,lazy")
    return values


def add_data_options(command, fields=39, batch_size=10_000, table_rows=1_100_000, kind=natural):
    """kind: natural, or int_list where several values are measured."""
    command.add_argument("--fields", type=kind, default=fields, help="number of fields")
    command.add_argument("--batch_size", type=kind, default=batch_size, help="samples per step over all processes")
    command.add_argument("--table_rows", type=kind, default=table_rows, help="rows of all tables together")
    command.add_argument("--dnn", type=int_list, default=[1000] * 5, help="hidden units of the DNN")


def add_run_options(command, steps):
    command.add_argument("--net_dropout", type=float, default=0.2, help="dropout rate behind the hidden layers")
    command.add_argument("--processes", type=natural, help="processes; default: the launcher's choice")
    command.add_argument("--steps", type=natural, default=steps, help="measured steps of a run")


def parse_args(argv=None):
    parser = Parser("Measure the parts of this package on this machine.")
    commands = parser.add_subparsers(dest="command", required=True)

    def add_command(work, name, help):
        command = commands.add_parser(name, help=help, description=work.__doc__)
        command.set_defaults(work=work)
        return command

    command = add_command(step, "step", "the training step against its matrix products and a peer")
    add_data_options(command)
    add_run_options(command, steps=20)
    command.add_argument("--updates", type=update_list, default=["recipe", "lazy"],
                         help="recipe: the launcher's L2 and clipping, every table row moves in each step; lazy: "
                              "neither, looked-up rows move; both are measured when separated by a comma")
    command.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: every store type and AMP")
    command.add_argument("--peer", help="a Python that has torch: a plain PyTorch DeepFM is measured in turns")
    command.add_argument("--plot", help="picture for a bar chart of the throughput")
    add_shared_options(command)

    command = add_command(loader, "loader", "reading, shuffling and batching")
    add_data_options(command)
    command.add_argument("--num_rows", type=natural, default=2_000_000, help="rows that are read")
    add_shared_options(command)

    command = add_command(evaluate, "eval", "evaluation against training, metrics")
    add_data_options(command)
    add_run_options(command, steps=12)
    command.add_argument("--num_rows", type=natural, default=400_000, help="rows that are scored")
    command.add_argument("--metric_rows", type=natural, default=4_584_062, help="rows of the metrics")
    add_shared_options(command)

    command = add_command(scale, "scale", "step time and memory as tables, fields and batches grow; checkpoints")
    add_data_options(command, [39, 10, 100], [10_000, 1000, 2000, 5000, 20_000, 50_000],
                     [1_000_000, 10_000_000, 33_000_000], int_list)
    add_run_options(command, steps=12)
    command.add_argument("--save_rows", type=natural, help="measure a checkpoint of so many table rows instead")
    add_shared_options(command)

    command = add_command(serve, "serve", "exported models: time per request, load time, file size")
    command.add_argument("--num_rows", type=natural, default=700_000, help="raw rows of which the model gets its ids")
    command.add_argument("--dnn", type=int_list, default=[1000] * 5, help="hidden units of the DNN")
    command.add_argument("--seconds", type=number(float, 0.01), default=2.0, help="time for each number of rows")
    command.add_argument("--peer", help="a Python that has torch: a plain PyTorch DeepFM is measured in turns")
    add_shared_options(command)

    command = add_command(convert, "convert", "the converters")
    command.add_argument("--num_rows", type=int_list, default=[500_000], help="raw rows; several are measured in turns")
    command.add_argument("--memory_gb", type=float, default=1, help="--memory_gb of the converters")
    command.add_argument("--engine", choices=("arrow", "spark"), default="arrow",
                         help="spark: criteo_parquet.py on Spark beside arrow; arrow: all converters")
    command.add_argument("--spark_cores", type=int_list, default=[1, 2], help="cores of Spark's workers, N,N,...")
    command.add_argument("--against", help="folder tools/ of another version, whose criteo_parquet.py is measured too")
    command.add_argument("--peer", help="a Python that has fuxictr 2.3, to be measured on the same files")
    add_shared_options(command)

    command = add_command(accuracy, "accuracy", "test AUC and logloss beside FuxiCTR's, over several seeds")
    add_accuracy_options(command)
    return parser.parse_args(argv)


def add_accuracy_options(command):
    command.add_argument("--data", required=True, help="dataset folder, with dataset_info.json")
    command.add_argument("--peer", required=True, help="a Python that has fuxictr 2.3")
    command.add_argument("--seeds", type=int_list, default=[1, 2, 3], help="a run of each for each seed")
    command.add_argument("--dnn", type=int_list, default=[400, 400, 400], help="hidden units of the DNN")
    command.add_argument("--embedding_vec_size", type=natural, default=10, help="embedding vector size, floats per id")
    command.add_argument("--net_dropout", type=float, default=0.2, help="dropout rate behind the hidden layers")
    command.add_argument("--batch_norm", action="store_true", help="batch normalisation in the hidden layers")
    command.add_argument("--embedding_l2", type=float, default=1e-5, help="L2 weight of the tables")
    command.add_argument("--learning_rate", type=float, default=0.001, help="initial learning rate of Adam")
    command.add_argument("--batch_size", type=natural, default=4096, help="samples per step")
    command.add_argument("--max_grad_norm", type=number(float, 0, open_low=True), default=10.0,
                         help="the global gradient norm is clipped to")
    command.add_argument("--monitor", choices=tuple(MONITORS), default="auc-logloss", help="what decides on val")
    command.add_argument("--epochs", type=natural, default=100, help="maximum number of epochs")
    command.add_argument("--early_stop_patience", type=natural, default=2,
                         help="epochs without gain after which training stops; the rate is cut after each of them")
    command.add_argument("--json", help="file for all measurements")
    command.add_argument("--work_dir", help="folder for scratch data; default: the system's")


def main(argv=None):
    args = parse_args(argv)
    return cli.run_tool(lambda: args.work(args))


if __name__ == "__main__":
    sys.exit(main())
