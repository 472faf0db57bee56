"""What a run tells while it runs: metrics.jsonl, TensorBoard events, time per step, memory of this process."""

import json
import os
import time

import psutil
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from tools.trainer.batches import steps_per_epoch
from tools.trainer.cli import UserError
from tools.trainer.files import check_json, count, list_folder
from tools.trainer.processes import print_rank0, rank, world_size
from tools.trainer.startup import BLAS, flow
from tools.trainer.tables import SIZE_FACTOR

EVENTS = "deepfm.out.tfevents."  # TensorBoard looks for "tfevents"; the rest is our mark
LINE = {"event": str, "step": count}


class MetricsLog:
    """metrics.jsonl (one JSON object per line) and TensorBoard events in `folder`, written by the first process.

    A resumed run appends; first it drops lines behind the step it resumes from and the test line of an earlier end, so
    that nothing appears twice. A new run replaces what an earlier run of this trainer left, and nothing else.
    """

    def __init__(self, folder, resumed_step=None):
        self.file = self.writer = None
        if folder is None or rank() != 0:
            return
        os.makedirs(folder, exist_ok=True)
        path = os.path.join(folder, "metrics.jsonl")
        lines = read_metrics(path) if os.path.exists(path) else []
        if resumed_step is None:
            lines = []
            for name in list_folder(folder):
                if name.startswith(EVENTS):
                    os.remove(os.path.join(folder, name))
        kept = [line for line, entry in lines if entry["step"] <= resumed_step and entry["event"] != "test"]
        with open(path + ".tmp", "w", encoding="utf-8") as file:
            file.writelines(kept)
        os.replace(path + ".tmp", path)
        self.file = open(path, "a", buffering=1, encoding="utf-8")  # noqa: SIM115 - open as long as the run
        # not SummaryWriter: its thread may still hold the last event when the process is killed
        self.writer = EventsWriter(os.path.join(folder, "deepfm"))
        if resumed_step is not None:  # TensorBoard then hides what earlier starts logged behind that step
            self.write_event(resumed_step + 1, session_log=SessionLog(status=SessionLog.START))

    def write(self, event, step, **values):
        """event: "train" or an evaluated split, e.g. "val"."""
        if self.file is None:
            return
        self.file.write(json.dumps({"event": event, "step": step, **values}) + "\n")
        scalars = [Summary.Value(tag=f"{event}/{name}", simple_value=value) for name, value in values.items()]
        self.write_event(step, summary=Summary(value=scalars))

    def write_event(self, step, **content):
        self.writer.write_event(Event(step=step, wall_time=time.time(), **content))
        self.writer.flush()

    def close(self):
        if self.file is not None:
            self.file.close()
            self.writer.close()


def read_metrics(path):
    """[(line, its content)] of a metrics.jsonl without an unfinished last line.

    Raises: UserError for a file that the trainer did not write.
    """
    lines = []
    with open(path, "rb") as file:
        for number, raw in enumerate(file, 1):
            if not raw.endswith(b"\n"):
                break  # a killed run was writing it
            try:
                line = raw.decode("utf-8")
                entry = json.loads(line)
                check_json(entry, LINE)
            except (ValueError, RecursionError):
                raise UserError(f"{path}, line {number} is not a line of the trainer's log; move the file away, or "
                                "give another --log_dir") from None
            lines.append((line, entry))
    return lines


class StepClock:
    """Seconds spent on training (not on evaluation or saving), with the steps and samples in them."""

    def __init__(self):
        self.seconds, self.samples, self.steps, self.started = 0.0, 0, 0, None
        self.mark = (0.0, 0, 0)

    def start(self):
        self.started = time.perf_counter()

    def stop(self):
        self.seconds += time.perf_counter() - self.started

    def count(self, samples):
        self.samples += samples
        self.steps += 1

    def since_last_call(self):
        """(ms per step, samples per second); the clock must be stopped"""
        now = (self.seconds, self.samples, self.steps)
        seconds, samples, steps = (new - old for new, old in zip(now, self.mark))
        self.mark = now
        return 1000 * seconds / steps, samples / seconds


def host_memory():
    """Resident memory of this process in MB."""
    return psutil.Process().memory_info().rss >> 20


def describe(trainer):
    """Print a few lines on what will run."""
    args, dataset = trainer.args, trainer.dataset
    threads = os.environ.get("OPENBLAS_NUM_THREADS") or os.environ.get("OMP_NUM_THREADS") or "all"
    print_rank0(f"OneFlow {flow.__version__}, device {args.device}, {counted(world_size(), 'process')}, "
                f"{counted(threads, 'thread')} each, {counted(len(os.sched_getaffinity(0)), 'core')}, "
                f"BLAS: {BLAS or 'OneFlow built-in'}")
    if dataset.splits:
        counts = ", ".join(f"{name} {split.num_rows}" for name, split in dataset.splits.items())
        steps = steps_per_epoch(dataset.splits["train"], args.batch_size, world_size())
        print_rank0(f"Data {args.data_dir}: {len(dataset.fields)} fields, rows {counts}, "
                    f"{steps} batches of {args.batch_size} per epoch")
    width, dense = args.embedding_vec_size + 1, sum(p.numel() for p in trainer.model.dense_parameters())
    print_rank0(f"Tables: {dataset.num_ids} rows x ({args.embedding_vec_size} + 1), "
                f"{dataset.num_ids * width * 4 * SIZE_FACTOR / 2**20:.1f} MiB with Adam's moments; parameters "
                f"{dataset.num_ids * width + dense} ({dataset.num_ids} x {width} + {dense})")
    for line in trainer.device.notes(args):
        print_rank0(line)
    print_rank0(f"Checkpoints: {args.model_save_dir or 'none kept'}; tables on disk: {args.persistent_path}, "
                f"{args.persistent_path_fm}; logs: {args.log_dir or 'none'}")


def counted(number, name):
    """'1 process', '2 processes', 'all threads'"""
    return f"{number} {name}" if str(number) == "1" else f"{number} {name}{'es' if name.endswith('s') else 's'}"
