"""The processes of a run: who this one is, waiting for each other, one voice to the user, one end for all."""

import os
import sys
import time
from contextlib import suppress

from tqdm import tqdm

from tools.trainer.cli import UserError
from tools.trainer.startup import flow


def world_size():
    return flow.env.get_world_size()


def rank():
    return flow.env.get_rank()


def print_rank0(*values):
    """Print a log line on the first process only; tqdm.write keeps progress bars whole."""
    if rank() == 0:
        tqdm.write(" ".join(str(value) for value in values), file=sys.stdout)
        sys.stdout.flush()


def progress_bar(total, unit, what, done=0):
    """A bar on the first process's terminal; nothing where there is none."""
    hidden = rank() != 0 or not sys.stderr.isatty()
    return tqdm(total=total, initial=done, unit=unit, desc=what, leave=False, disable=hidden)


def to_split(array, placement):
    """This process's rows as a global tensor that is split over the processes."""
    return flow.from_numpy(array).to_global(placement, flow.sbp.split(0))


def sum_over_processes(value):
    """Sum of a number over all processes; also a barrier."""
    placement = flow.placement("cpu", list(range(world_size())))
    total = flow.tensor([float(value)], dtype=flow.float64).to_global(placement, flow.sbp.partial_sum)
    return float(total.to_global(sbp=flow.sbp.broadcast).to_local().numpy()[0])


def barrier():
    """Nobody returns before all processes have come here."""
    sum_over_processes(0)


def all_agree(function, *args):
    """Run a function on every process, each with its own result; a failure in one ends all."""
    result = failure = None
    try:
        result = function(*args)
    except (OSError, UserError) as error:
        failure = error
    if sum_over_processes(failure is not None):
        raise failure or UserError("stopped, because another process failed")
    return result


def on_rank0(function, *args):
    """Run a function on the first process while the others wait; a failure there ends all."""
    return all_agree(function if rank() == 0 else lambda *_: None, *args)


def give_up(message, status, patience=5):
    """Say why in one line and end, without waiting for the collective calls of other processes.

    Most mistakes meet every process. Only the first one of a node speaks at once; when it ends, the launcher ends too.
    The others wait for that in silence, since OneFlow prints a stack trace in them when one is gone.
    """
    with suppress(OSError):  # perhaps nobody reads any more
        if int(os.environ.get("LOCAL_RANK", "0")) > 0:
            launcher, end, stderr = os.getppid(), time.monotonic() + patience, os.dup(2)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            while os.getppid() == launcher and time.monotonic() < end:
                time.sleep(0.1)
            if os.getppid() == launcher:  # the first process has not met it
                os.dup2(stderr, 2)
        sys.stderr.write(message + "\n")
        sys.stderr.flush()
        sys.stdout.flush()
    os._exit(status)
