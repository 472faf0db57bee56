"""run.json in the log folder: what a run was made of, so that runs can be compared years later."""

import hashlib
import os
import platform
from datetime import datetime
from importlib import metadata

import psutil

from tools.trainer.cli import UserError
from tools.trainer.files import read_json, write_json
from tools.trainer.processes import world_size

PACKAGES = ("oneflow", "numpy", "petastorm", "pyarrow")
MARK = {"run_id": str}  # of a file that we made; without --log_dir's own folder it is also the checkpoints' run.json


def write_record(args, dataset, run_id, resumed_step, gpus):
    """Write the record of a run, or note its restart in the record; on the first process, nothing without --log_dir.

    resumed_step: where it goes on, None for a new run; gpus: of the device's `machine`.
    Raises: UserError for a run.json that is not ours.
    """
    if args.log_dir is None:
        return
    os.makedirs(args.log_dir, exist_ok=True)
    path, known = os.path.join(args.log_dir, "run.json"), {}
    if os.path.lexists(path):
        known = read_json(path, MARK, "move it away, or give another --log_dir")
        if "options" not in known and "model_load_dir" not in known:
            raise UserError(f"{path} is not a run's record; move it away, or give another --log_dir")
    record = describe_run(args, dataset, run_id, gpus)
    if known.get("run_id") == run_id and "options" in known and resumed_step is not None:
        restart = {name: record[name] for name in ("started", "processes", "machine")}
        changed = {name: value for name, value in record["options"].items() if known["options"].get(name) != value}
        restarts = [*known.get("restarts", []), {"step": resumed_step, **restart, "options": changed}]
        record = {**known, "restarts": restarts}
    elif known.get("run_id") == run_id:  # --log_dir is --model_save_dir, whose run.json must keep what it says
        record = {**known, **record}
    write_json(path, record)


def describe_run(args, dataset, run_id, gpus):
    options = {name: value for name, value in sorted(vars(args).items()) if name != "given"}
    rows = {name: split.num_rows for name, split in dataset.splits.items()}
    return {
        "run_id": run_id, "options": options, "seed": args.seed,
        "data": {"dir": os.path.abspath(args.data_dir), "fingerprint": fingerprint(dataset), "rows": rows},
        "versions": {"python": platform.python_version(), **{name: metadata.version(name) for name in PACKAGES}},
        "machine": {"host": platform.node(), "cpu": cpu_name(), "cores": len(os.sched_getaffinity(0)),
                    "memory_gb": round(psutil.virtual_memory().total / 2**30), **gpus},
        "monitor": args.monitor, "processes": world_size(), "device": args.device,
        "started": datetime.now().isoformat(timespec="seconds"),
    }


def fingerprint(dataset):
    """What dataset_info.json says of the encoding; without it a digest of the rows of all splits."""
    if dataset.fingerprint:
        return dataset.fingerprint
    digests = "".join(split.digest(dataset.columns) for split in dataset.splits.values())
    return hashlib.blake2b(digests.encode(), digest_size=8).hexdigest()


def cpu_name():
    """The model of the first core, as Linux tells it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()
