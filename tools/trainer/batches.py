"""From rows to batches: shuffling in a pool, equal shares for the processes, dropout masks, reading ahead.

Rows come from a function `read_rows(dataset, split, lane, num_lanes, seed)`, the seam for other file formats. It yields
blocks, tuples of arrays with one row per sample: (ids int32 or int64 (n, C), labels float32 (n,), *extras (n,)), the
extras being those of the split (`dataset.use_columns`); in train that can only be the rows' weights. A lane is every
num_lanes-th row group; seed: None reads them in order, a positive number in a random order of its own.
Batches know nothing of OneFlow. rank and world_size: number of this process, number of processes.
"""

import math
import queue
import threading
from collections import deque
from contextlib import contextmanager, suppress

import numpy as np

SHUFFLE_ROWS = 1 << 19  # training rows held in memory for shuffling, over all processes
MAX_LANES = 8  # the converters make a multiple of 8 row groups


class Batch:
    """What one process feeds for one step. b = B / number of processes; rows behind `num_valid` are padding.

    Attributes: ids int64 (b, C), labels float32 (b, 1), weights float32 (b, 1): 1 / valid rows of the global batch, 0
    for padding; row_weights float32 (b, 1): the rows' own weights, 0 for padding, None where rows have none; num_valid:
    valid rows of this process; num_global: valid rows over all; masks: dropout masks, see `draw_masks`.
    """

    __slots__ = ("ids", "labels", "weights", "row_weights", "num_valid", "num_global", "masks")

    def __init__(self, parts, size, num_global, pad_id):
        """parts: blocks (ids, labels) or (ids, labels, row weights)"""
        self.ids = np.full((size, parts[0][0].shape[1]), pad_id, np.int64)
        self.labels = np.zeros((size, 1), np.float32)
        self.weights = np.zeros((size, 1), np.float32)
        self.row_weights = np.zeros((size, 1), np.float32) if len(parts[0]) > 2 else None
        position = 0
        for ids, labels, *extras in parts:
            self.ids[position:position + len(ids)] = ids
            self.labels[position:position + len(ids), 0] = labels
            if extras:
                self.row_weights[position:position + len(ids), 0] = extras[0]
            position += len(ids)
        self.weights[:position] = 1.0 / num_global
        self.num_valid, self.num_global, self.masks = position, num_global, ()


class RowStream:
    """Takes rows out of blocks, tuples of arrays of equal length, in portions of any size."""

    def __init__(self, blocks):
        self.blocks = iter(blocks)
        self.parts, self.available = deque(), 0

    def fill(self, count):
        """Read on until `count` rows are available, or fewer at the end of the stream; returns how many are."""
        while self.available < count:
            block = next(self.blocks, None)
            if block is None:
                break
            self.parts.append(block)
            self.available += len(block[0])
        return self.available

    def take(self, count):
        """A list of blocks with `count` rows together, fewer at the end of the stream."""
        self.fill(count)
        taken = []
        while count > 0 and self.parts:
            block = self.parts.popleft()
            if len(block[0]) > count:
                self.parts.appendleft(tuple(array[count:] for array in block))
                block = tuple(array[:count] for array in block)
            taken.append(block)
            count -= len(block[0])
            self.available -= len(block[0])
        return taken

    def skip(self, count):
        while count > 0:
            skipped = sum(len(block[0]) for block in self.take(min(count, 1 << 16)))
            if skipped == 0:
                return
            count -= skipped


def shuffled(blocks, pool_rows, rng):
    """Yield the rows of `blocks` in random order: each new row takes the place of a random one of a pool."""
    stream = RowStream(blocks)
    first = stream.take(pool_rows)
    if not first:
        return
    pool = [np.concatenate(arrays) for arrays in zip(*first)]
    size = len(pool[0])
    while stream.available or stream.fill(1):
        for block in stream.take(min(stream.available, size)):
            places = rng.permutation(size)[:len(block[0])]
            yield tuple(array.take(places, axis=0) for array in pool)  # twice as fast as array[places]
            for array, new in zip(pool, block):
                array[places] = new
    order = rng.permutation(size)
    yield tuple(array.take(order, axis=0) for array in pool)


# --------------------------------------------------------------------------------------------- shares of the processes


def lane_sizes(split, num_lanes):
    """Rows in each lane."""
    return [sum(split.row_groups[lane::num_lanes]) for lane in range(num_lanes)]


def choose_lanes(split, batch_size, world_size):
    """Number of lanes in which training rows are read; every batch takes the same share from each lane.

    With 8 lanes 1, 2, 4 or 8 processes read disjoint row groups and still see the same global batches, so results do
    not depend on the number of processes. Where the files do not allow equal lanes, every process reads all rows and
    takes its share of each batch (1 lane).
    """
    lanes = math.gcd(batch_size, MAX_LANES)
    lanes = lanes if lanes % world_size == 0 else world_size
    if len(split.row_groups) < lanes:
        return 1
    sizes = lane_sizes(split, lanes)
    return lanes if max(sizes) - min(sizes) <= batch_size // lanes else 1


def steps_per_epoch(split, batch_size, world_size):
    lanes = choose_lanes(split, batch_size, world_size)
    return math.ceil(max(lane_sizes(split, lanes)) / (batch_size // lanes))


def train_batches(read_rows, dataset, batch_size, *, seed, epoch, rank, world_size, first_step=0,
                  shuffle_rows=SHUFFLE_ROWS):
    """Yield this process's `Batch`es of one epoch from `first_step` on: every training row once over all processes.

    Order: row groups, then rows within a pool, are shuffled by (seed, epoch); the last batch is padded.
    """
    split = dataset.splits["train"]
    lanes = choose_lanes(split, batch_size, world_size)
    share = batch_size // lanes
    seeds = np.random.SeedSequence((seed, epoch))
    reader_seed = int(seeds.generate_state(1)[0] >> 1) + 1  # petastorm takes 0 for "no seed"

    def lane_stream(lane):
        rng = np.random.Generator(np.random.SFC64(np.random.SeedSequence((seed, epoch, lane))))
        blocks = read_rows(dataset, split, lane, lanes, reader_seed)
        stream = RowStream(shuffled(blocks, shuffle_rows // lanes, rng))
        stream.skip(first_step * share)
        return stream

    mine = range(lanes)[rank * lanes // world_size:(rank + 1) * lanes // world_size] if lanes > 1 else [0]
    streams = [lane_stream(lane) for lane in mine]
    sizes = lane_sizes(split, lanes)
    for step in range(first_step, steps_per_epoch(split, batch_size, world_size)):
        counts = [min(share, max(0, size - step * share)) for size in sizes]
        parts = [part for stream, lane in zip(streams, mine) for part in stream.take(counts[lane])]
        if lanes == 1:
            parts = share_of(parts, batch_size, rank, world_size)
        yield Batch(parts or [no_rows(dataset, split)], batch_size // world_size, sum(counts), dataset.num_ids)


def eval_batches(read_rows, dataset, split, batch_size, *, rank, world_size):
    """Yield (this process's `Batch`, [labels, *extras] (n,) of the whole global batch) in row order, every row once.

    Every process reads all rows: all of them need all labels, and the order of rows must not depend on their number.
    """
    stream = RowStream(read_rows(dataset, split))
    for start in range(0, split.num_rows, batch_size):
        parts = stream.take(min(batch_size, split.num_rows - start))
        columns = [np.concatenate(arrays) for arrays in list(zip(*parts))[1:]]
        rows = [part[:2] for part in parts]  # a score does not depend on weights or groups
        local = share_of(rows, batch_size, rank, world_size) or [no_rows(dataset)]
        yield Batch(local, batch_size // world_size, len(columns[0]), dataset.num_ids), columns


def share_of(parts, batch_size, rank, world_size):
    """Rows [rank * b, (rank + 1) * b) of a global batch."""
    stream, local = RowStream(parts), batch_size // world_size
    stream.skip(rank * local)
    return stream.take(local)


def no_rows(dataset, split=None):
    """A block without rows, with as many arrays as the split's blocks have."""
    extras = [np.empty(0, np.float32) for _ in split.extras] if split else []
    return (np.empty((0, len(dataset.columns)), np.int64), np.empty(0, np.float32), *extras)


# ------------------------------------------------------------------------------------------------------- dropout masks


def draw_masks(hidden_units, rows, dropout, seed, step, rank):
    """Dropout masks, int8 (rows, H) per hidden layer: -1 drops a unit, 0 keeps it.

    Drawn from a stream of its own for every (seed, step, rank), so they differ between layers, steps and processes
    and come back the same after a resume. OneFlow's own dropout in a graph gives layers of equal size equal masks.
    A byte decides, so the rate is a multiple of 1/256; see `keep_probability`.
    """
    rng = np.random.Generator(np.random.SFC64(np.random.SeedSequence((seed, step, rank))))
    threshold = np.uint8(round(256 * (1 - keep_probability(dropout))))
    masks = []
    for units in hidden_units:
        size = rows * units
        # 64 bits at a time, and compared in place: four times as fast as rng.bytes and a new array
        noise = rng.integers(0, 2**64 - 1, -(-size // 8), np.uint64, endpoint=True).view(np.uint8)[:size]
        np.less(noise, threshold, out=noise.view(bool))
        masks.append(np.negative(noise.view(np.int8), out=noise.view(np.int8)).reshape(rows, units))
    return masks


def keep_probability(dropout):
    """Share of units that `draw_masks` keeps: 1 - dropout, rounded to a multiple of 1/256."""
    return 1 - round(256 * dropout) / 256


# ------------------------------------------------------------------------------------------------------- reading ahead


@contextmanager
def prefetched(generator, depth=2):
    """Run a generator in a thread, `depth` items ahead, so that reading overlaps with training."""
    items, stop, end = queue.Queue(maxsize=depth), threading.Event(), object()

    def put(item):
        while not stop.is_set():
            with suppress(queue.Full):
                items.put(item, timeout=0.1)
                return

    def produce():
        try:
            for item in generator:
                put((item, None))
                if stop.is_set():
                    break
            put((end, None))
        except BaseException as error:  # handed to the consumer, which raises it
            put((end, error))
        finally:
            generator.close()

    def consume():
        while True:
            item, error = items.get()
            if error is not None:
                raise error
            if item is end:
                return
            yield item

    thread = threading.Thread(target=produce, daemon=True)
    thread.start()
    try:
        yield consume()
    finally:
        stop.set()
        thread.join()
