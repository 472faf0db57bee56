"""benchmark.py convert: the converters beside each other, another version of them, FuxiCTR, and Spark on some cores."""

import os
import statistics
import sys
import tempfile
import threading
from pathlib import Path

if __name__ == "__main__":
    sys.exit("error: this is a part of tools/benchmark.py; run: python tools/benchmark.py convert")

from benchmark_workers import make_h5, make_raw

TOOLS = Path(__file__).resolve().parent
FIELDS = [f"I{i}" for i in range(1, 14)] + [f"C{i}" for i in range(1, 27)]
TERABYTE_ROWS = 4_373_472_329  # Criteo's 1 TB logs, day_0 to day_23
SAMPLE_SECONDS = 0.2
KINDS = ("driver", "Java", "workers")  # of the processes of a run

# All are timed alike: from the call that starts the conversion to its end, without starting Python and importing.
TOOL_SCRIPT = """
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


# ----------------------------------------------------------------------------------------------------- what a run takes


class ProcessTree:
    """Context manager: looks at a process and all below it while they run.

    measured(): {"peak_mb": largest sum of their memory, "driver_mb", "Java_mb", "workers_mb": largest of the process
    itself, of all Java processes and of all others below it, "cpu_seconds"}. Memory that processes share is counted
    once (proportional set size).
    """

    def __init__(self, pid):
        self.pid, self.ended = pid, threading.Event()
        self.peaks = dict.fromkeys(("all", *KINDS), 0.0)
        self.cpu = {}  # seconds by process
        self.watcher = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self):
        self.watcher.start()
        return self

    def __exit__(self, *_):
        self.ended.set()
        self.watcher.join()

    def _watch(self):
        while not self.ended.wait(SAMPLE_SECONDS):
            now = dict.fromkeys(KINDS, 0.0)
            for pid in self._processes(self.pid):
                try:
                    kind = self._kind(pid)
                    now[kind] += memory_of(pid)
                    self.cpu[pid] = cpu_of(pid)
                except (OSError, ValueError, IndexError):
                    pass  # it has ended
            for kind, value in {**now, "all": sum(now.values())}.items():
                self.peaks[kind] = max(self.peaks[kind], value)

    def _processes(self, pid):
        yield pid
        try:
            tasks = os.listdir(f"/proc/{pid}/task")
            children = [child for task in tasks for child in read(f"/proc/{pid}/task/{task}/children").split()]
        except OSError:
            return
        for child in children:
            yield from self._processes(int(child))

    def _kind(self, pid):
        if pid == self.pid:
            return "driver"
        return "Java" if read(f"/proc/{pid}/comm").strip() == "java" else "workers"

    def measured(self):
        return {"peak_mb": self.peaks["all"], **{f"{kind}_mb": self.peaks[kind] for kind in KINDS},
                "cpu_seconds": sum(self.cpu.values())}


def read(path):
    with open(path) as file:
        return file.read()


def memory_of(pid):
    """Proportional set size of a process, in MB."""
    return int(read(f"/proc/{pid}/smaps_rollup").split("\nPss:")[1].split()[0]) / 1024


def cpu_of(pid):
    """Seconds of CPU time that a process has taken."""
    fields = read(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# --------------------------------------------------------------------------------------------------------------- jobs


def jobs_of(work, num_rows, args, run_measured, apart):
    """The jobs of one number of rows: {(name, rows): function}; the first one makes what the others need."""
    raw, dataset, h5 = (work / f"{name}-{num_rows}" for name in ("raw", "dataset", "h5"))
    raw.mkdir()
    apart(make_raw, raw, num_rows)
    files = [raw / name for name in ("train.csv", "valid.csv", "test.csv")]

    def measure(command):
        return run_measured(list(map(str, command)), watch=ProcessTree)

    def tool(name, output, *options, tools=TOOLS):
        return measure([sys.executable, "-c", TOOL_SCRIPT, tools, name, *options, "--output_dir", output, "--overwrite",
                        "--spark_tmp_dir", work / "tmp", "--memory_gb", args.memory_gb])

    def criteo(name="other", *options, tools=TOOLS):
        return tool("criteo_parquet", work / f"{name}-{num_rows}", "--input_dir", raw, *options, tools=tools)

    def table():
        options = ["--label", "Label", "--numeric", ",".join(FIELDS[:13]), "--categorical", ",".join(FIELDS[13:]),
                   "--min_count", "10", "--input", files[0], "--val_input", files[1], "--test_input", files[2]]
        return tool("table_to_parquet", work / f"table-{num_rows}", *options)

    def encode():
        return tool("encode_rows", work / f"ids-{num_rows}", "--dataset", dataset, *(
            part for file in files for part in ("--input", file)))

    def from_h5():
        if not h5.exists():
            apart(make_h5, dataset, h5)
        return tool("h5_to_parquet", work / f"from-h5-{num_rows}", "--input_dir", h5)

    def fuxictr():
        with tempfile.TemporaryDirectory(dir=work) as data_root:
            return measure([args.peer, "-c", FUXICTR_SCRIPT, raw, data_root, "10"])

    jobs = {"criteo_parquet.py": lambda: criteo("dataset")}
    if args.against:
        jobs["criteo_parquet.py of --against"] = lambda: criteo(tools=args.against)
    if args.engine == "spark":
        for cores in args.spark_cores:
            jobs[f"criteo_parquet.py, Spark, cores: {cores}"] = lambda cores=cores: criteo(
                "spark", "--engine", "spark", "--spark_master", f"local[{cores}]")
    else:
        jobs.update({"table_to_parquet.py": table, "encode_rows.py": encode, "h5_to_parquet.py": from_h5})
    if args.peer:
        jobs["FuxiCTR"] = fuxictr
    return {(name, num_rows): job for name, job in jobs.items()}


# -------------------------------------------------------------------------------------------------------------- tables

HEADS = ["job", "rows", "s", "rows/s", "times criteo_parquet.py", "times FuxiCTR", "CPU s", "s with imports", "peak MB",
         "driver", "Java", "workers"]  # fmt: skip


def medians(results):
    """{job: {name of a number: median over the runs}}"""
    return {job: {name: statistics.median(run[name] for run in runs) for name in runs[0]}
            for job, runs in results.items()}


def table_of(results):
    """Rows of cells under HEADS."""
    found, rows = medians(results), []
    for (name, num_rows), one in found.items():
        others = [found.get((other, num_rows)) for other in ("criteo_parquet.py", "FuxiCTR")]
        rows.append([name, num_rows, f"{one['seconds']:.2f}", f"{num_rows / one['seconds']:.0f}",
                     *(f"{other['seconds'] / one['seconds']:.2f}" if other else "" for other in others),
                     f"{one['cpu_seconds']:.1f}", f"{one['process_seconds']:.2f}", f"{one['peak_mb']:.0f}",
                     *(f"{one[f'{kind}_mb']:.0f}" if one[f"{kind}_mb"] else "" for kind in KINDS)])
    return rows


def estimates_of(results):
    """Lines on how long each job takes for Criteo's 1 TB, from its smallest and largest number of rows."""
    found, lines = medians(results), []
    for name in dict.fromkeys(name for name, _ in found):
        sizes = sorted(num_rows for other, num_rows in found if other == name)
        if len(sizes) < 2:
            continue
        low, high = found[name, sizes[0]]["seconds"], found[name, sizes[-1]]["seconds"]
        slope = (high - low) / (sizes[-1] - sizes[0])  # seconds a row
        lines.append(f"{name}: {1e6 * slope:.2f} s per million rows from {sizes[0]} to {sizes[-1]} rows; at that rate "
                     f"Criteo's 1 TB ({TERABYTE_ROWS} rows) would take {slope * TERABYTE_ROWS / 3600:.1f} h (an "
                     "estimate)")
    return lines
