"""The processes of a run: who this one is, exchanging numbers, one voice to the user.

No folder needs to be shared by the nodes of a run: what the first process reads or decides comes to the others over the
network.
"""

import json
import sys
import zlib

import numpy as np
from tqdm import tqdm

from tools.trainer.cli import UserError, os_error_text
from tools.trainer.startup import flow

MESSAGE_BYTES = 2048  # of an error that the other processes are told


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


# ---------------------------------------------------------------------------------------------------------- exchanging


def placement_of_all():
    """All processes, on their CPUs."""
    return flow.placement("cpu", list(range(world_size())))


def to_split(array, placement):
    """This process's rows as a global tensor that is split over the processes."""
    return flow.from_numpy(array).to_global(placement, flow.sbp.split(0))


def replicate(array, placement):
    """The first process's array as a global tensor that all have; of the others only shape and type count."""
    return flow.tensor(array).to_global(placement, flow.sbp.broadcast)


def gather(array):
    """Arrays of equal shape, one of each process -> one array with a first axis for the processes; also a barrier."""
    array = np.ascontiguousarray(array)[None]
    if world_size() == 1:
        return array
    return to_split(array, placement_of_all()).to_global(sbp=flow.sbp.broadcast).to_local().numpy()


def exchange(array):
    """(number of processes, ...), a part for each -> the parts for this process, in the order of the senders."""
    if world_size() == 1:
        return array
    parts = to_split(np.ascontiguousarray(array)[None], placement_of_all())
    return parts.to_global(sbp=flow.sbp.split(1)).to_local().numpy()[:, 0]


def sum_over_processes(value):
    """Sum of a whole number over all processes; also a barrier."""
    return int(gather(np.int64(value)).sum())


def barrier():
    """Nobody returns before all processes have come here."""
    sum_over_processes(0)


def all_agree(function, *args):
    """Run a function on every process, each with its own result; a failure in one ends all, with the same words."""
    result, failure, text = None, None, b""
    try:
        result = function(*args)
    except (OSError, UserError) as error:
        failure = error
        text = (os_error_text(error) if isinstance(error, OSError) else str(error)).encode("utf-8", "replace")
    failed = gather(np.int64(failure is not None))
    if failed.any():
        texts = gather(np.frombuffer(text[:MESSAGE_BYTES].ljust(MESSAGE_BYTES, b"\0"), np.int64))
        first = int(failed.argmax())
        text = texts[first].tobytes().rstrip(b"\0").decode("utf-8", "replace")
        raise failure or UserError(f"{text} (process {first})")
    return result


def on_rank0(function, *args):
    """Run a function on the first process while the others wait; a failure there ends all."""
    return all_agree(function if rank() == 0 else lambda *_: None, *args)


def from_rank0(function, *args):
    """What a function returns on the first process, on all of them, by way of JSON; a failure there ends all."""
    result = on_rank0(function, *args)
    if world_size() == 1:
        return result
    text = json.dumps(result).encode() if rank() == 0 else b""
    size = int(gather(np.int64(len(text)))[0])
    text = np.frombuffer(text.ljust(size, b"\0"), np.int8)
    return json.loads(replicate(text, placement_of_all()).to_local().numpy().tobytes())


def share_arrays(function, *args):
    """{name: array} that a function returns on the first process, on all of them; a failure there ends all."""
    arrays = on_rank0(function, *args)
    shapes = from_rank0(lambda: {name: (array.dtype.str, array.shape) for name, array in arrays.items()})
    arrays = arrays or {name: np.zeros(shape, kind) for name, (kind, shape) in shapes.items()}
    return {name: replicate(array, placement_of_all()).to_local().numpy() if array.size else array
            for name, array in arrays.items()}


def check_same_data(dataset, data_dir):
    """Raise a UserError unless all processes, perhaps on nodes with disks of their own, see the same row groups."""
    layout = [dataset.fields, dataset.table_sizes, {name: split.row_groups for name, split in dataset.splits.items()}]
    seen = gather(np.int64(zlib.crc32(json.dumps(layout).encode())))
    if (seen != seen[0]).any():
        raise UserError(f"--data_dir {data_dir} of process {int((seen != seen[0]).argmax())} has other fields or row "
                        "groups than that of the first; copy the same files to every node")
