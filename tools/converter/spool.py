"""The shuffle: rows on disk, read back in a seeded random order that depends on the seed and the row numbers only."""

from pathlib import Path

import numpy as np
import pyarrow as pa

READ_ROWS = 1 << 15  # rows that RowSpool hands out at a time


def _rotate_left(x, bits):
    return (x << np.uint64(bits)) | (x >> np.uint64(64 - bits))


def shuffle_keys(row_numbers, seed):
    """Sort keys of a shuffle: xxHash64 of the row number. int64 in, int64 out (array of the same length).

    One-to-one for a given seed, so no two rows tie, and the order does not depend on memory, blocks or engine.
    """
    prime = [np.uint64(p) for p in (0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9,
                                    0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5)]  # fmt: skip
    x = np.asarray(row_numbers, dtype=np.int64).view(np.uint64)
    with np.errstate(over="ignore"):
        h = np.uint64(seed) + prime[4] + np.uint64(8)
        h = h ^ (_rotate_left(x * prime[1], 31) * prime[0])
        h = _rotate_left(h, 27) * prime[0] + prime[3]
        h = (h ^ (h >> np.uint64(33))) * prime[1]
        h = (h ^ (h >> np.uint64(29))) * prime[2]
        h = h ^ (h >> np.uint64(32))
    return h.view(np.int64)


def shares_of(keys):
    """Numbers in [0, 1) of shuffle keys, to compare with a share of the rows."""
    return (keys.view(np.uint64) >> np.uint64(11)).astype(np.float64) / (1 << 53)


class RowLayout:
    """A row of tokens as bytes: the label, then the columns, those of one type side by side.

    Args: dtypes: numpy type of each column. Rows are arrays of plain bytes, which numpy moves many times faster than
    rows of fields; pack and unpack turn columns into rows and back.
    """

    def __init__(self, dtypes):
        groups = {}
        self.places = []  # (type, number among the columns of that type) of each column
        for dtype in map(np.dtype, dtypes):
            members = groups.setdefault(dtype.str, [])
            self.places.append((dtype.str, len(members)))
            members.append(dtype)
        self.fields = np.dtype([("label", "i1")] + [(name, name, (len(group),)) for name, group in groups.items()])
        self.dtype = np.dtype((np.void, self.fields.itemsize))

    def pack(self, labels, columns):
        """labels (n), columns: one array (n) each -> rows (n)"""
        rows = np.empty(len(labels), self.fields)
        rows["label"] = labels
        for (group, index), column in zip(self.places, columns):
            rows[group][:, index] = column
        return rows.view(self.dtype)

    def unpack(self, rows):
        """rows (n) -> labels (n), list of columns (n), which are views"""
        rows = rows.view(self.fields)
        return rows["label"], [rows[group][:, index] for group, index in self.places]


class RowSpool:
    """Rows of one split on disk, to be read back in a seeded random order, or as they came when seed is None.

    Shuffling is out of core: rows are scattered over bucket files by the high bits of their shuffle key; reading sorts
    one bucket at a time. The order depends on the seed and the number of the row only, not on memory_bytes.

    Args:
        folder: scratch folder of this spool, made here, removed together with its parent.
        dtype: numpy dtype of a row.
        num_rows: how many rows will come at most (sets the number of buckets).
        memory_bytes: size of a bucket, which is read as a whole.
        carried: pyarrow schema of columns that travel with the rows, or None; carried_bytes: what they take per row.
    """

    def __init__(self, folder, dtype, num_rows, memory_bytes, seed=None, carried=None, carried_bytes=0):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True)
        self.seed, self.carried = seed, carried
        self.dtype = np.dtype([("key", "<i8"), ("row", dtype)]) if seed is not None else np.dtype(dtype)
        size = num_rows * (self.dtype.itemsize + carried_bytes)
        self.num_buckets = max(1, -(-size // max(1, memory_bytes))) if seed is not None else 1
        self.rows = 0

    def _file(self, bucket, kind="bin"):
        return self.folder / f"bucket-{bucket:06d}.{kind}"

    def append(self, rows, carried=None):
        """Add rows (array of the dtype) and a table of their carried columns; they are numbered as they come."""
        first, self.rows = self.rows, self.rows + len(rows)
        if not len(rows):
            return
        if self.seed is None:
            self._write(0, np.ascontiguousarray(rows, dtype=self.dtype), carried)
            return
        keys = shuffle_keys(np.arange(first, self.rows), self.seed)
        high = (keys.view(np.uint64) ^ np.uint64(1 << 63)) >> np.uint64(32)
        bucket = ((high * np.uint64(self.num_buckets)) >> np.uint64(32)).astype(np.int32)
        order = np.argsort(bucket, kind="stable")
        keyed = np.empty(len(rows), self.dtype)
        keyed["key"] = keys[order]
        keyed["row"] = rows[order]
        if carried is not None:
            carried = carried.take(pa.array(order))
        ends = np.cumsum(np.bincount(bucket, minlength=self.num_buckets))
        for index in np.unique(bucket):
            start = ends[index - 1] if index else 0
            part = carried.slice(start, ends[index] - start) if carried is not None else None
            self._write(index, keyed[start : ends[index]], part)

    def _write(self, bucket, rows, carried):
        with open(self._file(bucket), "ab") as file:
            file.write(rows.data)
        if self.carried is not None:
            append_table(self._file(bucket, "arrow"), carried.combine_chunks())

    def read(self):
        """Yield all rows as (array of the dtype, table of the carried columns or None); files go as they are read."""
        for bucket in range(self.num_buckets):
            if self._file(bucket).exists():
                yield from self._read_in_order() if self.seed is None else self._read_bucket(bucket)
                self._file(bucket).unlink()
                if self.carried is not None:
                    self._file(bucket, "arrow").unlink()

    def _read_bucket(self, bucket):
        keyed = np.fromfile(self._file(bucket), self.dtype)
        carried = pa.concat_tables(read_tables(self._file(bucket, "arrow"))) if self.carried is not None else None
        order = np.argsort(keyed["key"])
        for start in range(0, len(order), READ_ROWS):
            part = order[start : start + READ_ROWS]
            yield keyed["row"][part], carried.take(pa.array(part)) if carried is not None else None

    def _read_in_order(self):
        tables = read_tables(self._file(0, "arrow")) if self.carried is not None else None
        with open(self._file(0), "rb") as file:
            while True:
                # rows come in the portions in which their carried columns were written
                carried = next(tables, None) if tables is not None else None
                count = READ_ROWS if tables is None else 0 if carried is None else carried.num_rows
                rows = np.fromfile(file, self.dtype, count=count)
                if not len(rows):
                    break
                yield rows, carried


# ------------------------------------------------------------------------------------------------------ tables on disk


def append_table(path, table):
    """Add a table to a file. It is not kept open: there may be more files than a process may have open."""
    with open(path, "ab") as file, pa.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table)


def read_tables(path):
    """Yield the tables that were added to a file; without the file, none."""
    if not path.exists():
        return
    size = path.stat().st_size
    with open(path, "rb") as file:
        while file.tell() < size:  # one stream after the other
            yield pa.ipc.open_stream(file).read_all()
