"""What a run tells while it runs: its lines, metrics.jsonl, time per step, memory."""

import json
import math
import os
import shlex
import shutil
import sys
import threading
import time
from contextlib import contextmanager
from datetime import datetime, timedelta

import psutil

from tools.trainer.cli import UserError
from tools.trainer.files import check_json, count
from tools.trainer.places import open_regular
from tools.trainer.plateau import MONITORS
from tools.trainer.processes import print_rank0, rank, world_size
from tools.trainer.startup import BLAS, flow
from tools.trainer.tables import OPTIMIZERS

LINE = {"event": str, "step": count}


class MetricsLog:
    """metrics.jsonl (one JSON object per line) and TensorBoard events in `folder`, written by the first process.

    A resumed run appends; first it drops lines behind the step it resumes from and the test line of an earlier end, so
    that nothing appears twice. A new run replaces what an earlier run of this trainer left, and nothing else.
    """

    def __init__(self, folder, resumed_step=None):
        self.file = self.events = None
        if folder is None or rank() != 0:
            return
        from tools.trainer.events import Events  # a tenth of the time of a start, which other commands do not need

        os.makedirs(folder, exist_ok=True)
        path = os.path.join(folder, "metrics.jsonl")
        lines = read_metrics(path) if os.path.exists(path) else []
        if resumed_step is None:
            lines = []
        kept = [line for line, entry in lines if entry["step"] <= resumed_step and entry["event"] != "test"]
        with open(path + ".tmp", "w", encoding="utf-8") as file:
            file.writelines(kept)
        os.replace(path + ".tmp", path)
        self.file = open(path, "a", buffering=1, encoding="utf-8")  # noqa: SIM115 - open as long as the run
        self.events = Events(folder, resumed_step)

    def write(self, event, step, **values):
        """event: "train" or an evaluated split, e.g. "val"."""
        if self.file is None:
            return
        self.file.write(json.dumps({"event": event, "step": step, **values}) + "\n")
        self.events.write(step, {f"{event}/{name}": value for name, value in values.items()})

    def close(self):
        if self.file is not None:
            self.file.close()
            self.events.close()


def read_metrics(path):
    """[(line, its content)] of a metrics.jsonl without an unfinished last line.

    Raises: UserError for a file that the trainer did not write.
    """
    lines = []
    with open_regular(path) as file:
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

    @contextmanager
    def paused(self, losses):
        """Stand still, from the end of the last step on, which reading its loss waits for. losses: MeanLoss"""
        losses.read()
        self.stop()
        yield
        self.start()

    def count(self, samples):
        self.samples += samples
        self.steps += 1

    def since_last_call(self):
        """(ms per step, samples per second); the clock must be stopped"""
        now = (self.seconds, self.samples, self.steps)
        seconds, samples, steps = (new - old for new, old in zip(now, self.mark))
        self.mark = now
        return 1000 * seconds / steps, samples / seconds


class MeanLoss:
    """Mean loss since the last log line, weighted by the samples, or the sum of their weights.

    The loss of a step is read one step late, so that the next one's input is prepared meanwhile. sums: [losses times
    weights, weights]; a checkpoint keeps them, so an interval that began before it is logged as if nothing had been.
    """

    def __init__(self, advice=""):
        self.sums, self.pending, self.advice = [0.0, 0.0], None, advice

    def add(self, loss, weight, step):
        """loss: tensor (); weight: number or tensor (); step: of the run"""
        self.read()
        self.pending = loss, weight, step

    def read(self):
        """Wait for the last step. Raises: UserError when its loss is not finite."""
        if self.pending is None:
            return
        loss, weight, step = self.pending
        self.pending = None
        loss, weight = (float(x.to_local().numpy()) if isinstance(x, flow.Tensor) else x for x in (loss, weight))
        if not math.isfinite(loss):
            raise UserError(f"the loss is {loss} in step {step}; use a lower --learning_rate or --max_grad_norm"
                            f"{self.advice}")
        self.sums[0] += loss * weight
        self.sums[1] += weight

    def take(self):
        """The mean, which begins anew. 0 where all weights were 0."""
        total, weights = self.sums
        self.sums = [0.0, 0.0]
        return total / weights if weights else 0.0


# -------------------------------------------------------------------------------------------------------------- lines


def announced(what, function, *args, patience=1.0):
    """Call a function, say what goes on when it takes longer than a second; returns the seconds."""
    started = time.perf_counter()
    timer = threading.Timer(patience, print_rank0, [f"{what} ..."])
    timer.start()
    try:
        function(*args)
    finally:
        timer.cancel()
    return time.perf_counter() - started


def first_step_text(trainer, clock):
    return (f"First step after {clock.seconds:.1f} s, {trainer.compile_seconds:.1f} s of it to compile the graph; "
            f"a line follows every {counted(trainer.args.loss_print_interval, 'step')}")


def log_step(trainer, clock, log):
    """Print and write what happened since the last call."""
    loss, rate = trainer.losses.take(), trainer.learning_rate()
    latency, throughput = clock.since_last_call()
    print_rank0(f"Rank[{rank()}], Step {trainer.step}/{trainer.step + trainer.steps_left()}, Loss {loss:.6f}, "
                f"Latency {latency:.3f} ms, Throughput {throughput:.1f} samples/s, LR {rate:g}, "
                f"Time {datetime.now():%Y-%m-%d %H:%M:%S}, {estimates(trainer, latency)}")
    if rank() == 0:
        log.write("train", trainer.step, epoch=trainer.epoch, loss=loss, lr=rate,
                  samples_per_second=round(throughput, 1), ms_per_step=round(latency, 3),
                  host_memory_mb=host_memory(), **trainer.device.memory())


def estimates(trainer, ms_per_step):
    """'ETA epoch 0:02:03, run 1:02:03': steps that are left, without evaluations and early stopping"""
    run = trainer.steps_left()
    epoch = min(run, trainer.steps_per_epoch - trainer.step_in_epoch)
    epoch, run = (timedelta(seconds=round(steps * ms_per_step / 1000)) for steps in (epoch, run))
    return f"ETA epoch {epoch}, run {run}"


def decision_text(trainer, epoch, values, old_rate):
    """What an evaluation decided; values: {metric: value}, old_rate: learning rate before it."""
    monitor, plateau, best = MONITORS[trainer.args.monitor], trainer.plateau, trainer.best
    where = f"step {best['step']}" if trainer.args.eval_interval else f"epoch {best['epoch']}"
    result = "the best so far" if plateau.epochs_to_stop == 0 else f"best {monitor.text(plateau.best)} ({where})"
    rate = f"{old_rate:g}" + (f" -> {plateau.learning_rate:g}" if plateau.learning_rate != old_rate else "")
    line = f"Epoch {epoch}, val {monitor.title} {monitor.text(monitor.value(values))}, {result}; learning rate {rate}"
    return "\n  ".join(filter(None, [line, plateau.counts()]))


def predict_command(args, checkpoint):
    """A shell command that works in the current folder."""
    # python as the user calls it, if that is this one: the launcher uses an environment that is not activated
    python = "python" if shutil.which("python") == sys.executable else sys.executable
    return shlex.join([python, sys.argv[0], "--model_load_dir", checkpoint, "--predict",
                       os.path.join(args.data_dir, "test"), "--predict_output", "predictions.parquet"])


def host_memory():
    """Resident memory of this process in MB."""
    return psutil.Process().memory_info().rss >> 20


def describe(trainer, trained_with=None):
    """Print a few lines on what will run; trained_with: options of the run whose checkpoint is evaluated."""
    args, dataset = trainer.args, trainer.dataset
    threads = os.environ.get("OPENBLAS_NUM_THREADS") or os.environ.get("OMP_NUM_THREADS") or "all"
    print_rank0(f"OneFlow {flow.__version__}, device {args.device}, {counted(world_size(), 'process')}, "
                f"{counted(threads, 'thread')} each, {counted(len(os.sched_getaffinity(0)), 'core')}, "
                f"BLAS: {BLAS or 'OneFlow built-in'}")
    if dataset.splits:
        counts = ", ".join(f"{name} {split.num_rows}" for name, split in dataset.splits.items())
        print_rank0(f"Data {args.data_dir}: {len(dataset.fields)} fields, rows {counts}, "
                    f"{trainer.steps_per_epoch} batches of {args.batch_size} per epoch")
    weights = (trained_with or {}).get("weight_column")
    if weights and args.weight_column is None:
        print_rank0(f"All rows count alike; the run that trained this had --weight_column {weights}")
    if args.group_column in dataset.columns:
        print_rank0(f"GAUC by the field {args.group_column}: all its values outside the vocabulary are one group; the "
                    "raw column, kept by the converter (--keep), tells them apart")
    if args.negative_sampling_rate < 1:
        print_rank0("Predictions are corrected for a train split with a share of "
                    f"{args.negative_sampling_rate:g} of the rows with label 0")
    width, dense = args.embedding_vec_size + 1, sum(p.numel() for p in trainer.model.dense_parameters())
    kept = OPTIMIZERS[args.optimizer]
    print_rank0(f"Tables: {dataset.num_ids} rows x ({args.embedding_vec_size} + 1), "
                f"{dataset.num_ids * width * 4 * (1 + len(kept)) / 2**20:.1f} MiB with {args.optimizer.capitalize()}'s "
                f"{' and '.join(kept)}; parameters {dataset.num_ids * width + dense} ({dataset.num_ids} x {width} + "
                f"{dense})")
    for line in trainer.device.notes(args, len(dataset.columns)):
        print_rank0(line)
    paths = f"tables on disk: {args.persistent_path}, {args.persistent_path_fm}"
    if args.predict or args.eval_only:
        print_rank0(f"Checkpoint: {args.model_load_dir}; {paths}")
    else:
        print_rank0(f"Checkpoints: {args.model_save_dir or 'none kept'}; {paths}; logs: {args.log_dir or 'none'}")


def counted(number, name):
    """'1 process', '2 processes', 'all threads'"""
    return f"{number} {name}" if str(number) == "1" else f"{number} {name}{'es' if name.endswith('s') else 's'}"
