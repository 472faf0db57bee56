#!/usr/bin/env python3
"""Measure the parts of this package on this machine.

    python tools/benchmark.py convert --num_rows 500000 --peer /path/to/python/with/fuxictr

prints a table, one line per job, of medians over --repeats runs; the jobs take turns, so that a slow spell of the
machine hits all of them. --json FILE keeps every single measurement.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TOOLS = Path(__file__).resolve().parent

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
    cells = [[str(cell) for cell in row] for row in [headers, *rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(headers))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in cells]
    lines.insert(1, "| " + " | ".join("-" * width for width in widths) + " |")
    print("\n".join(lines), flush=True)


def write_json(path, results):
    """Write all results to path, or do nothing when path is None."""
    if path:
        Path(path).write_text(json.dumps(results, indent=2) + "\n")


def run_measured(command):
    """Run a command that prints {"seconds": ...} as its last line; returns that dict with process_seconds and peak_mb.

    process_seconds is the whole process with its start and imports, peak_mb the largest resident size of the process
    or of one of its children. Raises RuntimeError with the command's messages when it fails.
    """
    with tempfile.TemporaryFile("w+") as output:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = status
        output.seek(0)
        lines = output.read().splitlines()
    if status != 0:
        raise RuntimeError(f"{' '.join(map(str, command[:1]))} failed:\n" + "\n".join(lines[-15:]))
    return {**json.loads(lines[-1]), "process_seconds": seconds, "peak_mb": usage.ru_maxrss / 1024}


def add_shared_options(parser):
    parser.add_argument("--repeats", type=int, default=3, help="runs of each job; medians are printed")
    parser.add_argument("--json", help="file for all measurements")
    parser.add_argument("--work_dir", help="folder for scratch data; default: the system's")


# -------------------------------------------------------------------------------------------------------------- convert

# Both are timed alike: from the call that starts the conversion to its end, without starting Python and importing.
CONVERTER_SCRIPT = """
import importlib, json, sys, time
sys.path.insert(0, sys.argv[1])
tool = importlib.import_module(sys.argv[2])
start = time.perf_counter()
code = tool.main(sys.argv[3:])
print(json.dumps({"seconds": time.perf_counter() - start}))
sys.exit(code)
"""

# FuxiCTR's own feature processing of Criteo_x4; two names that FuxiCTR 2.3 uses are gone from newer polars.
FUXICTR_SCRIPT = """
import json, logging, sys, time
import polars
if not hasattr(polars.Expr, "apply"):
    polars.Expr.apply = lambda self, function: self.map_elements(function, return_dtype=polars.Int64)
    scan_csv = polars.scan_csv
    polars.scan_csv = lambda dtypes, **options: scan_csv(schema_overrides=dtypes, **options)
from fuxictr.datasets.criteo import CustomizedFeatureProcessor
from fuxictr.preprocess import build_dataset

def main(folder, data_root, min_count):
    columns = [
        {"name": [f"I{i}" for i in range(1, 14)], "active": True, "dtype": "float", "type": "categorical",
         "preprocess": "convert_to_bucket", "fill_na": 0},
        {"name": [f"C{i}" for i in range(1, 27)], "active": True, "dtype": "str", "type": "categorical"},
    ]
    start = time.perf_counter()
    processor = CustomizedFeatureProcessor(feature_cols=columns, label_col={"name": "Label", "dtype": "float"},
                                           dataset_id="fuxictr", data_root=data_root)
    build_dataset(processor, train_data=f"{folder}/train.csv", valid_data=f"{folder}/valid.csv",
                  test_data=f"{folder}/test.csv", min_categr_count=int(min_count), data_block_size=0)
    print(json.dumps({"seconds": time.perf_counter() - start}))

if __name__ == "__main__":
    main(*sys.argv[1:])
"""


def make_raw(folder, num_rows):
    """Synthetic raw Criteo as train.csv, valid.csv, test.csv (80/10/10 in the order of the rows), in folder."""
    subprocess.run(
        [sys.executable, TOOLS / "make_criteo_sample.py", "--output_dir", folder, "--num_rows", str(num_rows)],
        check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    names = ["Label"] + [f"I{i}" for i in range(1, 14)] + [f"C{i}" for i in range(1, 27)]
    ends = {"train": num_rows * 8 // 10, "valid": num_rows * 9 // 10, "test": num_rows}
    with open(folder / "train.txt") as raw:
        done = 0
        for split, end in ends.items():
            with open(folder / f"{split}.csv", "w") as file:
                file.write(",".join(names) + "\n")
                for _ in range(end - done):
                    file.write(next(raw).replace("\t", ","))
            done = end
    (folder / "train.txt").unlink()


def make_h5(dataset_dir, folder):
    """The dataset that criteo_parquet.py made, as the h5 files of FuxiCTR 2.0 (one array per column, local ids)."""
    import h5py
    import pyarrow.parquet as pq

    info = json.loads((dataset_dir / "dataset_info.json").read_text())
    folder.mkdir()
    for split, name in zip(("train", "val", "test"), ("train", "valid", "test")):
        table = pq.read_table(dataset_dir / split)
        with h5py.File(folder / f"{name}.h5", "w") as file:
            file.create_dataset("Label", data=table["Label"].to_numpy().astype("float64"))
            for field in info["fields"]:
                column = table[field["name"]].to_numpy().astype("int64")
                file.create_dataset(field["name"], data=column - field["offset"])
    sizes = {field["name"]: field["table_size"] for field in info["fields"]}
    features = [{name: {"source": "", "type": "categorical", "vocab_size": size}} for name, size in sizes.items()]
    feature_map = {
        "dataset_id": "h5", "num_fields": len(features), "labels": ["Label"], "features": features,
        "total_features": sum(sizes.values()),
    }  # fmt: skip
    (folder / "feature_map.json").write_text(json.dumps(feature_map))


def convert_jobs(work, num_rows, args):
    """The jobs of one number of rows: {(tool, rows): function}."""
    folder = work / f"raw-{num_rows}"
    folder.mkdir()
    make_raw(folder, num_rows)
    dataset, h5 = work / f"dataset-{num_rows}", work / f"h5-{num_rows}"

    def run_tool(name, input_dir, output_dir):
        return run_measured([
            sys.executable, "-c", CONVERTER_SCRIPT, TOOLS, name, "--input_dir", input_dir, "--output_dir", output_dir,
            "--overwrite", "--spark_tmp_dir", work / "tmp", "--memory_gb", str(args.memory_gb),
        ])  # fmt: skip

    def run_h5():
        if not h5.exists():
            make_h5(dataset, h5)
        return run_tool("h5_to_parquet", h5, work / f"from-h5-{num_rows}")

    def run_fuxictr():
        with tempfile.TemporaryDirectory(dir=work) as data_root:
            return run_measured([args.peer, "-c", FUXICTR_SCRIPT, folder, data_root, "10"])

    jobs = {("criteo_parquet.py", num_rows): lambda: run_tool("criteo_parquet", folder, dataset)}
    jobs["h5_to_parquet.py", num_rows] = run_h5
    if args.peer:
        jobs["FuxiCTR", num_rows] = run_fuxictr
    return jobs


def convert(args):
    """Rows per second and peak memory of the converters, and of FuxiCTR on the same files when --peer is given."""
    with tempfile.TemporaryDirectory(dir=args.work_dir) as work:
        jobs = {}
        for num_rows in args.num_rows:
            jobs.update(convert_jobs(Path(work), num_rows, args))
        results = take_turns(jobs, args.repeats)
    seconds = {job: median(runs, "seconds") for job, runs in results.items()}
    rows = []
    for (tool, num_rows), runs in results.items():
        peer = seconds.get(("FuxiCTR", num_rows))
        rows.append([
            tool, num_rows, f"{seconds[tool, num_rows]:.2f}", f"{num_rows / seconds[tool, num_rows]:.0f}",
            f"{median(runs, 'process_seconds'):.2f}", f"{median(runs, 'peak_mb'):.0f}",
            f"{peer / seconds[tool, num_rows]:.1f}" if peer else "",
        ])  # fmt: skip
    print_table(["job", "rows", "s", "rows/s", "s with imports", "peak MB", "times FuxiCTR"], rows)
    write_json(args.json, [{"job": tool, "rows": num, "runs": runs} for (tool, num), runs in results.items()])


# ----------------------------------------------------------------------------------------------------------------- main


def int_list(text):
    try:
        values = [int(value) for value in text.split(",")]
    except ValueError:
        values = []
    if not values or min(values) < 1:
        raise argparse.ArgumentTypeError(f"'{text}', expected whole numbers of at least 1, separated by commas")
    return values


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Measure the parts of this package on this machine.")
    commands = parser.add_subparsers(dest="command", required=True)

    command = commands.add_parser("convert", help="the converters", description=convert.__doc__,
                                  formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    command.set_defaults(work=convert)
    command.add_argument("--num_rows", type=int_list, default=[500_000], help="raw rows; several are measured in turns")
    command.add_argument("--memory_gb", type=float, default=1, help="--memory_gb of the converters")
    command.add_argument("--peer", help="a Python that has fuxictr 2.3, to be measured on the same files")
    add_shared_options(command)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    try:
        args.work(args)
    except (RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
