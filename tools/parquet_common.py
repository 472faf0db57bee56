"""What the two converters share: field names, id offsets, the shuffle, the split writer, and publishing a dataset.

A dataset is a folder with dataset_info.json, README.md and {train,val,test}/part-00000.parquet ...: a float32 label
column, then one integer column of global ids per field (global id = local id + offset of the field, offset = running
sum of the table sizes). Train rows are in a seeded random order, val and test rows in the order of the input.

Typical use (both converters look like this):

    with published_folder(args.output_dir, args.input_dir, args.overwrite) as folder, \
            scratch_folder(args.spark_tmp_dir, folder) as tmp:
        spool = RowSpool(tmp / "train", row_dtype, num_rows, memory_bytes, seed=args.seed)
        for rows in source:                               # structured numpy arrays of row_dtype, in input order
            spool.append(rows)
        with SplitWriter(folder, "train", fields, num_rows) as writer:
            for rows in spool.read():                     # the same rows, shuffled
                writer.write(rows["label"], [rows[name] for name in names])     # local ids
        info = dataset_info(fields, {"train": num_rows, ...}, source)
        write_info(folder, info)
"""

import argparse
import contextlib
import errno
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

LABEL = "Label"
INTEGER_FIELDS = [f"I{i}" for i in range(1, 14)]
CATEGORICAL_FIELDS = [f"C{i}" for i in range(1, 27)]
SPLITS = ["train", "val", "test"]

FORMAT_VERSION = 1
LANES = 8  # the trainer deals row group i to lane i % 8, so a split has a multiple of 8 row groups
MAX_GROUP_ROWS = 50_000
GROUPS_PER_FILE = 16  # 800,000 rows, some 50-100 MB
READ_ROWS = 1 << 15  # rows that RowSpool hands out at a time
LOG_SECONDS = 10
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


class DataError(Exception):
    """The input (or the output folder) is not as it must be; the message is shown to the user as one line."""


# ---------------------------------------------------------------------------------------------------- fields and info


def make_fields(names, table_sizes):
    """List of {name, table_size, offset}, offset = sum of the table sizes before it."""
    offsets = np.cumsum([0] + list(table_sizes))
    return [
        {"name": name, "table_size": int(size), "offset": int(offset)}
        for name, size, offset in zip(names, table_sizes, offsets)
    ]


def id_dtype(fields):
    """numpy int32 when every global id fits, else int64."""
    num_ids = sum(field["table_size"] for field in fields)
    return np.dtype(np.int32 if num_ids <= np.iinfo(np.int32).max else np.int64)


def parquet_schema(fields):
    """Label (float32), then one integer column per field."""
    ids = pa.from_numpy_dtype(id_dtype(fields))
    return pa.schema([pa.field(LABEL, pa.float32())] + [pa.field(field["name"], ids) for field in fields])


def dataset_info(fields, num_samples, source):
    """Contents of dataset_info.json; source is {"tool", "options", "encoding"}."""
    return {
        "format_version": FORMAT_VERSION,
        "label": LABEL,
        "fields": fields,
        "num_samples": {split: int(num_samples[split]) for split in SPLITS},
        "source": source,
    }


def info_text(info):
    """README.md of a dataset: the same facts for people, with the flags that the trainer takes."""
    sizes = [field["table_size"] for field in info["fields"]]
    samples = info["num_samples"]
    rows = "\n".join(f"| {f['name']} | {f['table_size']} | {f['offset']} |" for f in info["fields"])
    options = "\n".join(f"- {key}: {value}" for key, value in info["source"]["options"].items())
    return f"""# Dataset

Made by {info["source"]["tool"]}, encoding: {info["source"]["encoding"]}.

| split | samples |
| --- | --- |
| train | {samples["train"]} |
| val | {samples["val"]} |
| test | {samples["test"]} |

Columns: `{info["label"]}` (float32), then {len(sizes)} columns of ids. Id = number within the field + offset of the
field, so the ids of all fields lie in 0 ... {sum(sizes) - 1}.

Flags for the trainer (it reads them from dataset_info.json when they are not given):

```
--num_train_samples {samples["train"]} --num_val_samples {samples["val"]} --num_test_samples {samples["test"]} \\
--table_size_array {",".join(map(str, sizes))}
```

| field | table size | offset |
| --- | --- | --- |
{rows}

Options:

{options}
"""


def write_info(folder, info, show=False):
    """Write README.md and, last of all files of a dataset, dataset_info.json. Returns nothing; show also prints."""
    text = info_text(info)
    (Path(folder) / "README.md").write_text(text)
    (Path(folder) / "dataset_info.json").write_text(json.dumps(info, indent=2) + "\n")
    if show:
        print(json.dumps(info, indent=2))
        print(text, flush=True)


# ------------------------------------------------------------------------------------------------------------ shuffle


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


class RowSpool:
    """Rows of one split on disk, to be read back in a seeded random order, or as they came when seed is None.

    Shuffling is out of core: rows are scattered over bucket files by the high bits of their shuffle key; reading sorts
    one bucket at a time. The order depends on the seed and the number of the row only, not on memory_bytes.

    Args:
        folder: scratch folder of this spool, made here, removed by close() or together with its parent.
        dtype: numpy dtype of a row, usually structured.
        num_rows: how many rows will come (sets the number of buckets; RowSpool does not check it).
        memory_bytes: size of a bucket, which is read as a whole.
    """

    def __init__(self, folder, dtype, num_rows, memory_bytes, seed=None):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True)
        self.seed = seed
        self.dtype = np.dtype([("key", "<i8"), ("row", dtype)]) if seed is not None else np.dtype(dtype)
        size = num_rows * self.dtype.itemsize
        self.num_buckets = max(1, -(-size // max(1, memory_bytes)))
        self.rows = 0

    def _file(self, bucket):
        return self.folder / f"bucket-{bucket:06d}.bin"

    def append(self, rows):
        """Add rows (array of the dtype); they are numbered in the order in which they come."""
        first, self.rows = self.rows, self.rows + len(rows)
        if self.seed is None:
            with open(self._file(0), "ab") as file:
                file.write(np.ascontiguousarray(rows, dtype=self.dtype).data)
            return
        keys = shuffle_keys(np.arange(first, self.rows), self.seed)
        high = (keys.view(np.uint64) ^ np.uint64(1 << 63)) >> np.uint64(32)
        bucket = ((high * np.uint64(self.num_buckets)) >> np.uint64(32)).astype(np.int32)
        order = np.argsort(bucket, kind="stable")
        keyed = np.empty(len(rows), self.dtype)
        keyed["key"] = keys[order]
        keyed["row"] = rows[order]
        ends = np.cumsum(np.bincount(bucket, minlength=self.num_buckets))
        for index in np.unique(bucket):
            start = ends[index - 1] if index else 0
            with open(self._file(index), "ab") as file:
                file.write(keyed[start : ends[index]].data)

    def read(self):
        """Yield all rows as arrays of the dtype; each file is removed when it has been read."""
        if self.seed is None:
            yield from self._read_in_order()
            return
        for bucket in range(self.num_buckets):
            if self._file(bucket).exists():
                keyed = np.fromfile(self._file(bucket), self.dtype)
                self._file(bucket).unlink()
                order = np.argsort(keyed["key"])
                for start in range(0, len(order), READ_ROWS):
                    yield keyed["row"][order[start : start + READ_ROWS]]
                del keyed  # before the next bucket is read

    def _read_in_order(self):
        if not self._file(0).exists():
            return
        with open(self._file(0), "rb") as file:
            while True:
                rows = np.fromfile(file, self.dtype, count=READ_ROWS)
                if not len(rows):
                    break
                yield rows
        self._file(0).unlink()


# ------------------------------------------------------------------------------------------------------- split writer


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


def parquet_writer(path, schema):
    """ParquetWriter for Label and id columns.

    Delta-packed integers are smaller than with pyarrow's default (dictionaries, Snappy) and read 2 to 5 times as fast.
    """
    packed = {name: "DELTA_BINARY_PACKED" for name in schema.names if name != LABEL}
    return pq.ParquetWriter(str(path), schema, compression="none", use_dictionary=False, column_encoding=packed)


class SplitWriter:
    """Writes one split of a known number of rows as FOLDER/<split>/part-*.parquet with equal row groups.

    Takes local ids and adds the offsets of the fields. Use it as a context manager: a normal exit checks that exactly
    num_rows rows came. files narrows the plan to some of its files (the Spark engine writes files in parallel).
    """

    def __init__(self, folder, split, fields, num_rows, files=None):
        self.folder = Path(folder) / split
        self.folder.mkdir(parents=True, exist_ok=True)
        self.offsets = [field["offset"] for field in fields]
        self.schema = parquet_schema(fields)
        self.id_dtype = id_dtype(fields)
        files = plan_files(num_rows) if files is None else files
        self.plan = [(name, size, i == len(sizes) - 1) for name, sizes in files for i, size in enumerate(sizes)]
        self.num_rows = sum(size for _, size, _ in self.plan)
        self.rows = 0
        self.group = 0
        self.filled = 0
        self.file = None
        self.pool = ThreadPoolExecutor(1)  # writes a row group while the next one is being filled
        self.pending = None
        self._new_group()

    def _new_group(self):
        size = self.plan[self.group][1] if self.group < len(self.plan) else 0
        self.labels = np.empty(size, np.float32)
        self.ids = np.empty((len(self.offsets), size), self.id_dtype)
        self.filled = 0

    def write(self, labels, local_ids):
        """Add rows: labels (n), local_ids: one integer array (n) per field."""
        done, count = 0, len(labels)
        if self.rows + count > self.num_rows:
            raise DataError(f"{self.folder.name} has more than the {self.num_rows} rows that were counted; "
                            "did the input change?")
        while done < count:
            take = min(count - done, len(self.labels) - self.filled)
            to, come = slice(self.filled, self.filled + take), slice(done, done + take)
            self.labels[to] = labels[come]
            for ids, local, offset in zip(self.ids, local_ids, self.offsets):
                np.add(local[come], offset, out=ids[to], dtype=self.id_dtype, casting="unsafe")
            self.filled += take
            done += take
            if self.filled == len(self.labels):
                self._flush_group()
        self.rows += count

    def _flush_group(self):
        self._wait()
        name, _, last = self.plan[self.group]
        arrays = [pa.array(self.labels)] + [pa.array(ids) for ids in self.ids]
        self.pending = self.pool.submit(self._write_group, name, pa.Table.from_arrays(arrays, schema=self.schema), last)
        self.group += 1
        self._new_group()

    def _write_group(self, name, table, last):
        if self.file is None:
            self.file = parquet_writer(self.folder / name, self.schema)
        self.file.write_table(table, row_group_size=table.num_rows)
        if last:
            self.file.close()
            self.file = None

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
                    raise DataError(f"{self.folder.name} has {self.rows} rows, expected the {self.num_rows} that were "
                                    "counted; did the input change?")
        finally:
            self.pool.shutdown()
            if self.file is not None:
                with contextlib.suppress(OSError):  # the disk may be full, which is already being reported
                    self.file.close()


# ----------------------------------------------------------------------------------------------- publishing a dataset


@contextlib.contextmanager
def published_folder(output_dir, input_dir, overwrite=False):
    """Context manager: a hidden folder beside output_dir, renamed to output_dir on a normal exit, else removed.

    Whatever ends the program, output_dir is either absent, the old dataset, or a complete new one. A folder that holds
    input_dir is refused, because replacing it would delete the input.
    """
    output, source = Path(output_dir).resolve(), Path(input_dir).resolve()  # a link stays, its target is replaced
    if output.exists() and not overwrite:
        raise DataError(f"--output_dir {output_dir} exists already; choose another folder or add --overwrite")
    if output.exists() and not output.is_dir():
        raise DataError(f"--output_dir {output_dir} is a file, expected a folder; choose another name")
    if output in [source, *source.parents]:
        raise DataError(f"--output_dir {output_dir} holds the input; choose another folder")
    if output in [Path.cwd(), *Path.cwd().parents]:
        raise DataError(f"--output_dir {output_dir} holds the current folder; choose another folder")
    if os.path.ismount(output):
        raise DataError(f"--output_dir {output_dir} is a mount point, which cannot be replaced; choose a folder in it")
    folder = _new_folder("--output_dir", output_dir, output.parent, f".{output.name}.partial-")
    try:
        folder.chmod(0o777 & ~_umask())  # mkdtemp makes it private
        yield folder
        if output.exists():
            retired = folder.with_name(folder.name.replace(".partial-", ".old-"))
            output.rename(retired)
            folder.rename(output)
            shutil.rmtree(retired)
        else:
            folder.rename(output)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _new_folder(option, value, parent, prefix):
    """A fresh folder in parent (made if missing) for what option asks for; says what killed runs have left there."""
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for old in sorted(path for path in parent.iterdir() if path.name.startswith(prefix)):
            print(f"note: {old} belongs to another run, or was left by one that was killed: then delete it",
                  file=sys.stderr)
        return Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    except OSError as error:
        if error.errno in NO_SPACE:
            raise
        raise DataError(f"{option} {value}: cannot make a folder in {parent} ({error.strerror}); "
                        "choose a folder that you may write to") from None


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextlib.contextmanager
def scratch_folder(spark_tmp_dir, folder):
    """Context manager: a fresh scratch folder in spark_tmp_dir (made if missing), or in the unpublished dataset."""
    scratch = _new_folder("--spark_tmp_dir", spark_tmp_dir, Path(spark_tmp_dir or folder).resolve(), "parquet-scratch-")
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


# ---------------------------------------------------------------------------------- options, progress, errors, signals


def positive_int(text):
    value = int(text) if text.lstrip("+-").isdigit() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"'{text}', expected a whole number of at least 1")
    return value


def seed_int(text):
    value = int(text) if text.isdigit() else -1
    if not 0 <= value < 1 << 32:
        raise argparse.ArgumentTypeError(f"'{text}', expected a whole number from 0 to 4294967295")
    return value


def gigabytes(text):
    try:
        value = float(text)
    except ValueError:
        value = 0
    if not 0.1 <= value < 1e6:
        raise argparse.ArgumentTypeError(f"'{text}', expected a number of at least 0.1")
    return value


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Defaults behind the help texts, where there is one."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """Defaults in the help; one line per mistake, and exit status 2."""

    def __init__(self, description, **options):
        super().__init__(description=description, formatter_class=HelpFormatter, **options)

    def error(self, message):
        sys.stderr.write(f"error: {message} (see --help)\n")
        sys.exit(2)


def add_common_options(parser, input_help):
    """The options that both converters have."""
    parser.add_argument("--input_dir", required=True, help=input_help)
    parser.add_argument("--output_dir", required=True, help="folder of the dataset to be made")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output folder")
    parser.add_argument("--spark_tmp_dir", help="folder for scratch files; default: beside the output folder")
    parser.add_argument("--export_dataset_info", action="store_true",
                        help="print dataset_info.json and README.md of the dataset as well")
    parser.add_argument("--memory_gb", type=gigabytes, default=4, help="memory to stay within, in GB")
    parser.add_argument("--seed", type=seed_int, default=2018, help="seed of the order of the train rows")


class Progress:
    """Progress of long work in rows: a bar on a terminal, else a line every LOG_SECONDS.

    total: rows to come; None when it is not known, then update() is told the share of the work that is done.
    """

    def __init__(self, what, total=None):
        self.what, self.total, self.done = what, total, 0
        self.start = self.logged = time.monotonic()
        self.bar = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=total, desc=what, unit="row", unit_scale=True)

    def update(self, rows, share=None):
        self.done += rows
        total = self.total or (round(self.done / share) if share else None)
        if self.bar is not None:
            self.bar.total = total
            self.bar.update(rows)
        elif time.monotonic() - self.logged >= LOG_SECONDS:
            self.logged = time.monotonic()
            rate = self.done / (self.logged - self.start)
            left = f", {(total - self.done) / rate:.0f} s left" if total and rate else ""
            of = f" of {self.total}" if self.total else ""
            print(f"{self.what}: {self.done} rows{of}{left}, {rate:.0f} rows/s", flush=True)

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        seconds = max(time.monotonic() - self.start, 1e-9)
        if self.bar is not None:
            self.bar.close()
        if kind is None:
            print(f"{self.what}: {self.done} rows, {self.done / seconds:.0f} rows/s, {seconds:.1f} s", flush=True)


def _terminated(*_):
    raise SystemExit(143)


def run_tool(work, output_dir):
    """Call work() and return the exit code; user mistakes, full disks and signals end in one line, not a traceback."""
    signal.signal(signal.SIGTERM, _terminated)
    try:
        work()
        return 0
    except DataError as error:
        message, code = str(error), 1
    except OSError as error:
        message, code = _os_error_text(error), 1
    except MemoryError:
        message, code = "out of memory; give a smaller --memory_gb", 1
    except KeyboardInterrupt:
        message, code = f"interrupted; nothing was written to {output_dir}", 130
    except SystemExit as error:
        message, code = f"terminated; nothing was written to {output_dir}", error.code
    print(f"error: {message}", file=sys.stderr, flush=True)
    return code


def _os_error_text(error):
    where = f" ({error.filename})" if error.filename else ""
    if error.errno in NO_SPACE or "No space left on device" in str(error):
        return f"no space left on the disk{where}; free some, or choose another --output_dir or --spark_tmp_dir"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"no permission{where}: {error.strerror}; choose a folder that you may read and write"
    return " ".join(str(error).split())
