"""The CPU as a device: what OneFlow does not do there, tables in host memory, or not fast enough, some arithmetic.

Each function of the arithmetic says the plain formula that it stands for.
"""

import numpy as np

from tools.trainer.cli import UserError
from tools.trainer.processes import rank, to_split, world_size
from tools.trainer.startup import flow
from tools.trainer.tables import OPTIMIZERS

INIT_STD = 1e-4  # standard deviation of new embedding rows
MASK_SHRINK = 2.0**-40
CHUNK_ROWS = 1 << 18  # rows that are initialised, saved or loaded at a time


# --------------------------------------------------------------------------------------------------------- table rows


def local_range(num_rows):
    """[start, end) of the rows that OneFlow's split(0) puts on this process."""
    share, rest = divmod(num_rows, world_size())
    start = rank() * share + min(rank(), rest)
    return start, start + share + (rank() < rest)


def initial_rows(start, end, dim, seed, table):
    """Rows [start, end) of a new table, float32 (end - start, D), N(0, 1e-4); the same on any number of processes."""
    rows = np.empty((end - start, dim), np.float32)
    for chunk in range(start // CHUNK_ROWS, -(-end // CHUNK_ROWS)):
        rng = np.random.Generator(np.random.SFC64(np.random.SeedSequence((seed, table, chunk))))
        values = rng.standard_normal((CHUNK_ROWS, dim), np.float32) * np.float32(INIT_STD)
        first, last = max(start, chunk * CHUNK_ROWS), min(end, (chunk + 1) * CHUNK_ROWS)
        rows[first - start:last - start] = values[first - chunk * CHUNK_ROWS:last - chunk * CHUNK_ROWS]
    return rows


def new_table(num_ids, dim, placement, seed, table):
    """A table as a global tensor (num_ids + 1, D) split over the processes; the last row, for padding, is 0."""
    start, end = local_range(num_ids + 1)
    rows = initial_rows(start, end, dim, seed, table)
    if end == num_ids + 1 and end > start:
        rows[-1] = 0
    return flow.from_numpy(rows).to_global(placement, flow.sbp.split(0))


def look_up(table, ids):
    """table[ids]: int64 (B, F) -> float (B, F, D), samples split over the processes.

    Every process looks up its own rows of the table for the whole batch; the partial sums are then dealt out.
    """
    embeddings = flow._C.gather(table, ids.to_global(sbp=flow.sbp.broadcast), axis=0)
    return embeddings.to_global(sbp=flow.sbp.split(0))


def blocks_of_rows(arrays, num_ids):
    """Yield (ids, rows [value | m | v]) of this process's share of a table, a chunk at a time.

    arrays: value, m, v of this process, or what another optimizer keeps, float32 (n, D); None stands for zeros.
    """
    start, end = local_range(num_ids + 1)
    end = min(end, num_ids)  # without the padding row
    for first in range(start, end, CHUNK_ROWS):
        part = slice(first - start, min(first + CHUNK_ROWS, end) - start)
        parts = [array[part] if array is not None else np.zeros_like(arrays[0][part]) for array in arrays]
        yield np.arange(first, first + len(parts[0])), np.concatenate(parts, axis=1)


def fill_rows(arrays, num_ids, blocks):
    """Put this process's share of (ids, rows [value | m | v]) into arrays (value, or value, m, v), float32 (n, D).

    Raises: UserError when an id comes twice.
    """
    start, end = local_range(num_ids + 1)
    dim, seen, count = arrays[0].shape[1], np.zeros(end - start, bool), 0
    for ids, rows in blocks:
        mine = (ids >= start) & (ids < end)
        places = ids[mine] - start
        seen[places] = True
        count += len(places)
        for i, array in enumerate(arrays):
            array[places] = rows[mine, i * dim:(i + 1) * dim]
    if count > np.count_nonzero(seen):
        raise UserError("the table snapshot has an id twice; use another checkpoint")


# ---------------------------------------------------------------------------------------------------------- arithmetic


def sum_over_fields(x, dim):
    """x.reshape(B, F, D).sum(dim=1): (B, F*D) -> (B, D)

    As a product with F identity matrices, because OneFlow's sums and their gradients are slow on CPU.
    """
    identities = flow.cat([flow.eye(dim, placement=x.placement, sbp=flow.sbp.broadcast)] * (x.shape[1] // dim))
    return flow._C.matmul(x, identities)


def repeat_rows(vector, x):
    """vector.expand(B, H): (H,) -> (B, H) for x (B, H)

    As a lookup of row 0 for every sample: the gradient of a lookup is a segment sum, which OneFlow computes faster than
    the sum over rows that is the gradient of a broadcast.
    """
    rows = flow._C.global_constant((x.shape[0],), 0, dtype=flow.int64, placement=x.placement, sbp=[flow.sbp.split(0)])
    return flow._C.gather(vector.reshape(1, -1), rows, axis=0)


def masked_relu(x, offset, mask):
    """relu(x + offset) * (1 + mask), all shrunk by MASK_SHRINK: x (B, H) and offset come shrunk, mask is 0 or -1.

    On top of numbers shrunk by a power of two, which is exact, -1 leaves a unit below 0 whatever it was: two passes
    over memory less than a product with a mask, forward and backward. The next product multiplies by 1 / MASK_SHRINK.
    """
    return flow.relu(x + (mask.to(x.dtype) + offset))


def sum_of_squares(x):
    """(x * x).sum(): (N, D) -> ()

    As the trace of x^T x, which is only D x D: x * x, its sum and their gradients take more passes over a table.
    """
    gram = flow._C.matmul(x, x, transpose_a=True)
    return (gram * flow.eye(x.shape[1], placement=x.placement, sbp=flow.sbp.broadcast)).sum()


# -------------------------------------------------------------------------------------------------------------- device


class Cpu:
    """One or several processes without a GPU; the methods are those of `Cuda` in deepfm_train_eval.py."""

    name = "cpu"
    one_embedding = False
    feeds_masks = True
    look_up = staticmethod(look_up)
    sum_over_fields = staticmethod(sum_over_fields)
    repeat_rows = staticmethod(repeat_rows)

    def __init__(self):
        self.placement = flow.placement(self.name, list(range(world_size())))

    def make_table(self, store, seed, number, *_):
        return flow.nn.Parameter(new_table(store.num_ids, store.dim, self.placement, seed, number))

    def save_rows(self, table, store, snapshot, moments):
        """moments: what the optimizer keeps, as tensors like the table, None before the first step."""
        arrays = [None if tensor is None else tensor.detach().to_local().numpy() for tensor in (table, *moments)]
        store.write_snapshot(snapshot, blocks_of_rows(arrays, store.num_ids))

    def load_rows(self, table, store, snapshot, blocks, with_moments):
        """Fill this process's rows from blocks of (ids, rows) of the table; returns {"m": tensor, "v": tensor}."""
        value, names = table.detach().to_local().numpy(), OPTIMIZERS[store.optimizer] if with_moments else ()
        moments = [np.zeros_like(value) for _ in names]
        fill_rows([value, *moments], store.num_ids, blocks)
        return {name: to_split(array, self.placement) for name, array in zip(names, moments)}

    def draw_masks(self, *_):
        """Masks are fed: `batches.draw_masks`."""
        return ()

    def machine(self):
        return {}

    def memory(self):
        return {}

    def notes(self, args, columns):
        yield f"Without CUDA the tables live in host memory; --store_type {args.store_type} has no effect"
        if args.embedding_l2 > 0 or args.max_grad_norm > 0:
            yield "With --embedding_l2 or --max_grad_norm every table row is updated in each step, as in FuxiCTR"
        elif args.optimizer == "adagrad":
            yield "With --optimizer adagrad each step goes through every table row; those that are not looked up stay"
