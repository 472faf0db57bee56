"""Shards: parquet files with equal row groups, which the trainer's processes share."""

import contextlib
import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tools.trainer.cli import UserError
from tools.trainer.dataset_info import LABEL

LANES = 8  # the trainer deals row group i to lane i % 8, so a split has a multiple of 8 row groups
MAX_GROUP_ROWS = 50_000
GROUPS_PER_FILE = 16  # 800,000 rows, some 50-100 MB


def plan_row_groups(num_rows):
    """Sizes of the row groups of a split: equal (plus or minus one row), at most MAX_GROUP_ROWS, a multiple of LANES
    of them; one group when there are fewer rows than lanes."""
    if num_rows < LANES:
        return [num_rows] if num_rows else []
    groups = LANES * -(-num_rows // (LANES * MAX_GROUP_ROWS))
    size, extra = divmod(num_rows, groups)
    return [size + (i < extra) for i in range(groups)]


def plan_files(num_rows):
    """Row groups of each file of a split: a list of (file name, list of row group sizes), in row order."""
    groups = plan_row_groups(num_rows)
    starts = range(0, len(groups), GROUPS_PER_FILE)
    return [(f"part-{i:05d}.parquet", groups[s : s + GROUPS_PER_FILE]) for i, s in enumerate(starts)]


def parquet_writer(path, schema, ids=None):
    """ParquetWriter for a label, columns of ids (their names; default: all but the label) and carried columns.

    Delta-packed integers are smaller than with pyarrow's default (dictionaries, Snappy) and read 2 to 5 times as fast.
    """
    ids = [name for name in schema.names if name != LABEL] if ids is None else ids
    packed = dict.fromkeys(ids, "DELTA_BINARY_PACKED")
    others = {name: "snappy" if name not in packed and name != LABEL else "none" for name in schema.names}
    return pq.ParquetWriter(str(path), schema, compression=others, use_dictionary=False, column_encoding=packed)


class SplitWriter:
    """Writes the rows of one split, whose number is known, as FOLDER/part-*.parquet with equal row groups.

    Takes local ids and adds the offsets of the fields. Use it as a context manager: a normal exit checks that exactly
    num_rows rows came, and sets `digest`: one hex digest per file of its labels and ids (without what is carried).

    Args: columns: [(name, offset)] of the id columns; dtype: numpy type of ids; labelled: whether there are labels;
    carried: pyarrow schema of further columns, or None; files: some of the plan's files, instead of num_rows (the Spark
    engine writes files in parallel).
    """

    def __init__(self, folder, columns, dtype, num_rows, labelled=True, carried=None, files=None):
        self.folder, self.columns, self.dtype, self.labelled = Path(folder), columns, dtype, labelled
        self.folder.mkdir(parents=True, exist_ok=True)
        ids = pa.from_numpy_dtype(dtype)
        label = [pa.field(LABEL, pa.float32())] * labelled
        self.schema = pa.schema(label + [pa.field(name, ids) for name, _ in columns])
        self.carried = carried
        if carried is not None:
            self.schema = pa.schema([*self.schema, *carried])
        files = plan_files(num_rows) if files is None else files
        self.plan = [(name, size, i == len(sizes) - 1) for name, sizes in files for i, size in enumerate(sizes)]
        self.num_rows = sum(size for _, size, _ in self.plan)
        self.rows = self.group = self.filled = 0
        self.file = self.hash = None
        self.digests = []
        self.pool = ThreadPoolExecutor(1)  # writes a row group while the next one is being filled
        self.pending = None
        self._new_group()

    def _new_group(self):
        size = self.plan[self.group][1] if self.group < len(self.plan) else 0
        self.labels = np.zeros(size, np.float32)
        self.ids = np.empty((len(self.columns), size), self.dtype)
        self.tables = []  # carried columns of the group
        self.filled = 0

    def write(self, labels, local_ids, carried=None):
        """Add rows: labels (n) or None, local_ids: one integer array (n) per column, carried: Table (n) or None."""
        done, count = 0, len(local_ids[0])
        if self.rows + count > self.num_rows:
            raise UserError(f"{self.folder.name} has more than the {self.num_rows} rows that were counted; "
                            "did the input change?")
        if carried is not None:
            carried = carried.cast(self.carried)
        while done < count:
            take = min(count - done, len(self.labels) - self.filled)
            to, come = slice(self.filled, self.filled + take), slice(done, done + take)
            if self.labelled:
                self.labels[to] = labels[come]
            for ids, local, (_, offset) in zip(self.ids, local_ids, self.columns):
                np.add(local[come], offset, out=ids[to], dtype=self.dtype, casting="unsafe")
            if carried is not None:
                self.tables.append(carried.slice(done, take))
            self.filled += take
            done += take
            if self.filled == len(self.labels):
                self._flush_group()
        self.rows += count

    def _flush_group(self):
        self._wait()
        name, _, last = self.plan[self.group]
        arrays = [self.labels] * self.labelled + list(self.ids)
        self.pending = self.pool.submit(self._write_group, name, arrays, self.tables, last)
        self.group += 1
        self._new_group()

    def _write_group(self, name, arrays, tables, last):
        if self.file is None:
            self.file = parquet_writer(self.folder / name, self.schema, [name for name, _ in self.columns])
            self.hash = hashlib.sha256()
        for array in arrays:
            self.hash.update(array.data)
        columns = [pa.array(array) for array in arrays]
        if self.carried is not None:
            columns += pa.concat_tables(tables).combine_chunks().columns
        self.file.write_table(pa.Table.from_arrays(columns, schema=self.schema), row_group_size=len(arrays[0]))
        if last:
            self.file.close()
            self.file = None
            self.digests.append(self.hash.hexdigest())

    def _wait(self):
        if self.pending is not None:
            self.pending.result()
            self.pending = None

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        try:
            if kind is None:
                self._wait()
                if self.rows != self.num_rows:
                    raise UserError(f"{self.folder.name} has {self.rows} rows, expected the {self.num_rows} that were "
                                    "counted; did the input change?")
        finally:
            self.pool.shutdown()
            if self.file is not None:
                with contextlib.suppress(OSError):  # the disk may be full, which is already being reported
                    self.file.close()


def rows_digest(digests):
    """One digest of a split, of those of its files in order."""
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()
