"""One machine: one pass reads, counts and spools all rows, a second one encodes and writes them. Memory is bounded."""

import ctypes
import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import numpy as np
import pyarrow as pa

from tools.converter import raw as raw_files
from tools.converter.progress import Progress
from tools.converter.source import count_rows
from tools.converter.spool import RowSpool
from tools.converter.vocabulary import TokenCounter
from tools.converter.writer import SplitWriter, rows_digest
from tools.trainer.dataset_info import SPLITS

BLOCK_MEMORY = 5  # memory that parsing a block takes, in blocks


class ArrowEngine:
    """See the head of this file. args: options; scratch: folder for temporary files."""

    def __init__(self, args, scratch):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def count(self, raws, labels_of):
        """Per file (rows, labels or None, None); see Source."""
        return [count_rows(raw, labels_of) for raw in raws]

    def convert(self, job):
        """Make the shards of all splits. Returns ({split: rows}, {split: digest of its rows})."""
        return convert(job)

    def encode(self, job, unknown):
        """Write the ids of all rows in the order of the input, as `convert` for one split; adds to unknown (fields)."""
        return encode(job, unknown)


def convert(job):
    memory, maker, source = job.memory_bytes, job.maker, job.source
    carried_bytes = source.bytes_per_row() if maker.carried else 0
    expected = source.rows_of_splits(len(SPLITS))
    spools = [
        RowSpool(job.scratch / split, maker.layout.dtype, rows, memory // 12, job.seed if split == "train" else None,
                 job.carried_schema, carried_bytes)
        for split, rows in zip(SPLITS, expected)
    ]
    spool_and_count(job, spools)
    return_freed_memory()
    return write_splits(job, spools)


def spool_and_count(job, spools):
    """Read all rows into the spools of their splits, and make what the ids depend on of the counts of the train rows.

    The counts are freed at the end: writing needs their memory.
    """
    counter = make_counter(job)
    for part in job.source.parts:
        with Progress(f"reading {part.raw.path.name}", part.rows) as progress:
            for block in worked_blocks(job, part, job.maker.make):
                for index, spool in enumerate(spools):
                    spool.append(*of_split(block, index, job.carried_schema))
                progress.update(len(block.rows))
                if counter is not None and block.counted:
                    counter.add(block.counted)
    if counter is not None:
        job.fit(counter.results())


def return_freed_memory():
    """Give the system back what the threads that parsed have freed: glibc keeps it for each of them."""
    with suppress(AttributeError):  # of another C library
        ctypes.CDLL(None).malloc_trim(0)


def write_splits(job, spools):
    """Encode and write the rows of all splits; vocabularies are written beside it."""
    num_rows = dict(zip(SPLITS, (spool.rows for spool in spools)))
    job.check_splits(num_rows)
    digests = {}
    with ThreadPoolExecutor(1) as pool, Progress("writing", sum(num_rows.values())) as progress:
        vocabularies = pool.submit(job.write_vocabularies)
        for split, spool in zip(SPLITS, spools):
            with SplitWriter(job.folder / split, job.id_columns(), job.id_dtype(), num_rows[split],
                             carried=job.carried_schema) as writer:
                for rows, carried in spool.read():
                    labels, ids = job.maker.unpack(rows)
                    writer.write(labels, ids, carried)
                    progress.update(len(rows))
            digests[split] = rows_digest(writer.digests)
        vocabularies.result()
    return num_rows, digests


def encode(job, unknown):
    labelled = job.maker.label in job.source.parts[0].raw.columns

    def work(raw, block, first_row, split):
        counts = np.zeros(len(unknown), np.int64)
        return (*job.maker.encode(raw, block, counts), counts)

    rows = job.source.num_rows
    with SplitWriter(job.folder, job.id_columns(), job.id_dtype(), rows, labelled, job.carried_schema) as writer:
        for part in job.source.parts:
            with Progress(f"encoding {part.raw.path.name}", part.rows) as progress:
                for labels, ids, carried, counts in worked_blocks(job, part, work):
                    writer.write(labels, ids, carried)
                    unknown += counts
                    progress.update(len(ids[0]))
    return {"rows": rows}, {"rows": rows_digest(writer.digests)}


def make_counter(job):
    """TokenCounter with the counts of the dataset that is to grow, or None where the fields need no counts."""
    fields = job.counted_fields()
    if not fields:
        return None
    counter = TokenCounter(job.scratch / "counts", job.memory_bytes // 8, [field.min_count for field in fields],
                           [field.dtype for field in fields])
    if job.base is not None:
        counter.add([field.count_old() for field in fields])
    return counter


def worked_blocks(job, part, work):
    """Yield work(raw, block, first row, split) per block, in file order; several blocks are worked on at a time."""
    limit = job.memory_bytes // 2
    workers = max(1, min(num_cpus(), limit // (BLOCK_MEMORY * raw_files.BLOCK_BYTES) - 1))
    waiting, row = deque(), part.first_row
    with ThreadPoolExecutor(workers) as pool:
        for block in part.raw.blocks(list(job.maker.types(job.maker.label in part.raw.columns))):
            waiting.append(pool.submit(work, part.raw, block, row, part.split))
            row += block.rows
            if len(waiting) > workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def of_split(block, split, schema):
    """(rows, carried columns) of a block that belong to a split (index into SPLITS)."""
    carried = None if schema is None else block.carried.cast(schema)
    if np.ndim(block.splits) == 0:
        end = len(block.rows) if block.splits == split else 0
        return block.rows[:end], None if carried is None else carried.slice(0, end)
    chosen = block.splits == split
    return block.rows[chosen], None if carried is None else carried.filter(pa.array(chosen))


def num_cpus():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
