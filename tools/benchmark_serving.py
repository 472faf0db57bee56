"""benchmark.py serve: requests to an exported model, beside PyTorch's eval mode."""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.exit("error: this is a part of tools/benchmark.py; run: python tools/benchmark.py serve")

from benchmark_workers import make_served_data

from tools.trainer.cli import UserError

TOOLS = Path(__file__).resolve().parent
SIZES = (1, 32, 1000)  # rows of a request


def make_models(work, args):
    """({"raw" or "ids": ONNX file} of a model after one training step, its number of ids)"""
    data = make_served_data(work, args.num_rows)
    run([TOOLS.parent / "deepfm_train_eval.py", "--data_dir", data, "--persistent_path", work / "t",
         "--persistent_path_fm", work / "f", "--model_save_dir", work / "run", "--dnn", ",".join(map(str, args.dnn)),
         "--batch_size", "2000", "--train_batches", "1", "--device", "cpu"])
    models = {}
    for inputs in ("raw", "ids"):
        models[inputs] = work / f"{inputs}.onnx"
        run([TOOLS / "export_onnx.py", "--model_load_dir", work / "run" / "best_checkpoint", "--output", models[inputs],
             "--inputs", inputs, "--device", "cpu", "--rows", "2000"])
    info = json.loads((data / "dataset_info.json").read_text())
    return models, sum(field["table_size"] for field in info["fields"])


def run(command):
    result = subprocess.run([sys.executable, *map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            text=True)
    if result.returncode:
        raise UserError("\n".join(result.stdout.splitlines()[-10:]))


def jobs_of(work, models, ids, args, worker, peer):
    """{name: function} of the jobs, which take turns."""
    core = min(os.sched_getaffinity(0))
    common = {"core": core, "sizes": SIZES, "seconds": args.seconds}
    rows = {"raw": str(work / "raw" / "test.csv"), "ids": str(work / "data" / "test" / "part-00000.parquet")}
    jobs = {inputs: lambda inputs=inputs: worker(
        "serve", {**common, "model": str(models[inputs]), "rows": rows[inputs]}) for inputs in models}
    if args.peer:
        jobs["PyTorch, ids"] = lambda: peer("serve_peer", {**common, "table_rows": ids, "fields": 39, "dnn": args.dnn})
    return jobs


def summary(results):
    """{job: {rows of a request: (p50, p99) in seconds}}, medians over the runs."""
    found = {}
    for job, runs in results.items():
        found[job] = {}
        for size in SIZES:
            points = [statistics.quantiles(run[str(size)], n=100) for run in runs]
            found[job][size] = tuple(statistics.median(point[place] for point in points) for place in (49, 98))
    return found


def table_of(results, models):
    """Rows of cells for the printed table."""
    found, rows = summary(results), []
    for job, by_size in found.items():
        size = f"{models[job].stat().st_size / 1e6:.1f}" if job in models else ""
        load = f"{statistics.median(run['load_seconds'] for run in results[job]):.2f}" if job in models else ""
        for number, (middle, slow) in by_size.items():
            peer = found.get("PyTorch, ids", {}).get(number)
            rows.append([job, number, f"{1000 * middle:.3f}", f"{1000 * slow:.3f}", f"{number / middle:.0f}",
                         f"{peer[0] / middle:.2f}" if peer else "", load, size])
    return rows
