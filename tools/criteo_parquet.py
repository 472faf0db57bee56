#!/usr/bin/env python3
"""Convert raw Criteo text into the parquet dataset that deepfm_train_eval.py reads.

    python tools/criteo_parquet.py --input_dir=/path/to/criteo --output_dir=data/criteo_x4

--input_dir holds either Kaggle's `train.txt` (tab-separated, no header), which is split 80/10/10 here, or the three
files `train.csv`, `valid.csv`, `test.csv` of Criteo_x4 (comma, header); each may be gzipped. Separator, header and
compression are found by looking into the files. Expected output for the sample of 5,000 rows that
`python tools/make_criteo_sample.py --output_dir data/raw --num_rows 5000` makes:

    counting data/raw/train.txt: 5000 rows, ... rows/s, ... s
    reading train.txt: 5000 rows, ... rows/s, ... s
    writing train, val, test: 5000 rows, ... rows/s, ... s
    wrote data/criteo_x4: 4000 train, 500 val, 500 test rows, 39 fields, ... ids

Encodings (--encoding):
    x4    FuxiCTR's encoding of Criteo_x4. An integer v becomes the token floor(ln(v)^2) if v > 2, else v; a missing one
          becomes 0, which is never in the vocabulary. A category is its string. The vocabulary of a field has the
          tokens that the train rows hold at least --min_categr_count times. Ids as in FuxiCTR 2.x: 0 is padding
          (unused), tokens from 1, all others share the last id, so a table has tokens + 2 rows. More frequent tokens
          have smaller ids, ties in the order of the tokens (those of more than 8 bytes, which Criteo has not, last).
    hash  id = value mod --mod_idx, the value being the integer, or the hexadecimal number of a category; a missing
          value is 0. No vocabulary, --mod_idx rows per table.

Engines (--engine): `arrow` works on one machine in bounded memory; `spark` gives the same dataset, row by row, from as
many machines as --spark_master has. Both folders and the scratch folder must be visible on all of them.
"""

import contextlib
import errno
import gzip
import hashlib
import logging
import os
import re
import shutil
import signal
import sys
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
from parquet_common import (
    CATEGORICAL_FIELDS,
    INTEGER_FIELDS,
    LABEL,
    SPLITS,
    DataError,
    Parser,
    Progress,
    RowSpool,
    SplitWriter,
    add_common_options,
    dataset_info,
    make_fields,
    plan_files,
    positive_int,
    published_folder,
    run_tool,
    scratch_folder,
    shuffle_keys,
    write_info,
)

FIELDS = INTEGER_FIELDS + CATEGORICAL_FIELDS
COLUMNS = [LABEL] + FIELDS
NUM_INTEGERS = len(INTEGER_FIELDS)

# A parsed row on its way to the dataset: a token per field, as a number.
ROW = np.dtype([("label", "i1"), ("ints", "<i4", len(INTEGER_FIELDS)), ("cats", "<u8", len(CATEGORICAL_FIELDS))])

GIGABYTE = 10**9
BLOCK_BYTES = 8 << 20  # raw text parsed at a time, about 33,000 rows
BLOCK_MEMORY = 5  # memory that parsing a block takes, in blocks
MIN_INTEGER, MAX_INTEGER = -(1 << 31), 1 << 53
NUM_FOLDS = 10
FOLD_SEED = 2018
FOLD_SPLITS = [2, 1] + [0] * (NUM_FOLDS - 2)  # index into SPLITS: fold 0 is test, fold 1 val, the rest train

X4_ROWS = {"train": 36672493, "val": 4584062, "test": 4584062}
X4_MIN_COUNT = 10
X4_TABLE_SIZES = [
    44, 99, 122, 41, 220, 112, 80, 69, 92, 6, 27, 37, 72,
    1446, 554, 157339, 117822, 306, 18, 11882, 630, 5, 39530, 5131, 156656, 3176, 28,
    11043, 148913, 12, 4560, 2003, 5, 154564, 18, 17, 53031, 82, 40955,
]  # fmt: skip


# ------------------------------------------------------------------------------------------------------ input files


class RawFile:
    """One raw text file: its path, separator (bytes), whether it has a header, and whether it is gzipped."""

    def __init__(self, path):
        self.path = Path(path)
        with open(self.path, "rb") as file:
            self.gzipped = file.read(2) == b"\x1f\x8b"
        try:
            with self.open() as file:
                line = file.readline(1 << 20).rstrip(b"\r\n")
        except (EOFError, gzip.BadGzipFile) as error:
            raise DataError(f"{self.path} is not a whole gzip file ({error}); get it again") from None
        if not line:
            raise DataError(f"{self.path} is empty or begins with an empty line, expected {len(COLUMNS)} columns")
        self.separator = b"\t" if b"\t" in line else b","
        cells = line.decode("utf-8", "replace").split(self.separator.decode())
        self.has_header = any(cell.strip().lower() == LABEL.lower() for cell in cells)
        if self.has_header and cells != COLUMNS:
            raise DataError(f"{self.path} has the header {','.join(cells)}, expected {','.join(COLUMNS)}")

    def open(self):
        opener = gzip.open if self.gzipped else open
        return opener(self.path, "rb")

    def blocks(self):
        """Yield blocks of whole lines without the header: (first line number, byte offset, bytes).

        Sets share_read to the share of the file that has been read, for the time left.
        """
        with self.open() as file:
            on_disk = file.fileobj if self.gzipped else file
            size = self.path.stat().st_size
            offset = len(file.readline()) if self.has_header else 0
            line = 2 if self.has_header else 1
            rest = b""
            while True:
                try:
                    read = file.read(BLOCK_BYTES)
                except (EOFError, gzip.BadGzipFile) as error:
                    raise DataError(f"{self.path} is not a whole gzip file ({error}); get it again") from None
                self.share_read = on_disk.tell() / size
                data = rest + read
                if not read:
                    if data:
                        yield line, offset, data + b"\n"  # the last line had no line end
                    return
                end = data.rfind(b"\n") + 1
                block, rest = data[:end], data[end:]
                if block:
                    yield line, offset, block
                    line += block.count(b"\n")
                    offset += len(block)


def find_inputs(input_dir):
    """The raw files: {"train": RawFile, "val": ..., "test": ...}, or {"all": RawFile} for one yet to be split."""
    folder = Path(input_dir)
    if not folder.is_dir():
        raise DataError(f"--input_dir {input_dir} is not a folder")

    def find(name):
        return next((folder / (name + end) for end in ("", ".gz") if (folder / (name + end)).is_file()), None)

    for kind in (".csv", ".txt"):
        paths = {split: find(name + kind) for split, name in zip(SPLITS, ("train", "valid", "test"))}
        if kind == ".txt" and paths["train"] and not paths["val"]:
            return {"all": RawFile(paths["train"])}  # Kaggle's; its test.txt has no labels and is left alone
        if any(paths.values()):
            missing = [name + kind for name, path in zip(("train", "valid", "test"), paths.values()) if not path]
            if missing:
                raise DataError(f"{input_dir} has no {' and no '.join(missing)} (nor .gz of it); expected train{kind}, "
                                f"valid{kind} and test{kind}, or Kaggle's train.txt alone")
            return {split: RawFile(path) for split, path in paths.items()}
    raise DataError(f"{input_dir} has neither train.txt nor train.csv, valid.csv, test.csv (nor .gz of them)")


class Source:
    """The raw files and how their rows fall into splits, known after one quick look at all lines.

    files: list of RawFile. splits: for each file an int8 array with the split (index into SPLITS) of each row, or one
    number for all its rows. blocks: for each file a list of (line, offset, rows). num_rows: {split: rows}.
    """

    def __init__(self, input_dir, fold_rule):
        self.files, self.splits, self.blocks = [], [], []
        counts = np.zeros(len(SPLITS), np.int64)
        for split, raw in find_inputs(input_dir).items():
            labels, blocks = scan(raw, with_labels=split == "all")
            if split == "all":
                splits = np.take(np.array(FOLD_SPLITS, np.int8), stratified_folds(labels, fold_rule))
                counts += np.bincount(splits, minlength=len(SPLITS))
            else:
                splits = SPLITS.index(split)
                counts[splits] += sum(rows for _, _, rows in blocks)
            self.files.append(raw)
            self.splits.append(splits)
            self.blocks.append(blocks)
        self.num_rows = dict(zip(SPLITS, counts.tolist()))


def scan(raw, with_labels):
    """Look at all lines: returns (labels as int8 or None, list of (line, offset, rows) of the blocks)."""
    labels, blocks = [], []
    with Progress(f"counting {raw.path.name}") as progress:
        for line, offset, block in raw.blocks():
            if with_labels:
                data = np.frombuffer(block, np.uint8)
                ends = np.flatnonzero(data == ord("\n"))
                part = data[np.concatenate([[0], ends[:-1] + 1])] - ord("0")
                if (part > 1).any():
                    check_lines(raw, line, block)
                labels.append(part.astype(np.int8))
            blocks.append((line, offset, block.count(b"\n")))
            progress.update(blocks[-1][2], raw.share_read)
    if not progress.done:
        raise DataError(f"{raw.path} has a header but no rows")
    if with_labels and progress.done < NUM_FOLDS:
        raise DataError(f"{raw.path} has {progress.done} rows, expected at least {NUM_FOLDS} to split them")
    return np.concatenate(labels) if with_labels else None, blocks


def stratified_folds(labels, rule):
    """Fold 0..9 of each row, int8, as scikit-learn's StratifiedKFold(10, shuffle=True, random_state=2018) gives it.

    rule "sklearn": versions since 0.22. rule "sklearn-0.19": versions up to 0.21, of which 0.19.1 made the published
    Criteo_x4 files. Written out because scikit-learn holds several 8-byte numbers per row (a test compares the two).
    """
    random = np.random.RandomState(FOLD_SEED)
    folds = np.empty(len(labels), np.int8)
    numbers = np.arange(NUM_FOLDS, dtype=np.int8)
    start = 0
    classes = [0, 1] if rule == "sklearn-0.19" else [int(labels[0]), 1 - int(labels[0])]
    for label in classes:
        members = labels == label
        count = int(np.count_nonzero(members))
        if rule == "sklearn-0.19":
            # per class: shuffle the rows (at least one per fold), cut them into equal runs, larger ones first
            order = np.arange(max(count, NUM_FOLDS), dtype=np.int32 if count < 1 << 31 else np.int64)
            random.shuffle(order)
            sizes = len(order) // NUM_FOLDS + (numbers < len(order) % NUM_FOLDS)
            shuffled = np.empty(len(order), np.int8)
            shuffled[order] = np.repeat(numbers, sizes)
            shuffled = shuffled[:count]
        else:
            # deal all rows, sorted by class, round the folds; then shuffle the folds within the class
            dealt = [range(start + (fold - start) % NUM_FOLDS, start + count, NUM_FOLDS) for fold in range(NUM_FOLDS)]
            sizes = [len(rows) for rows in dealt]
            shuffled = np.repeat(numbers, sizes)
            random.shuffle(shuffled)
        folds[members] = shuffled
        start += count
    return folds


# ---------------------------------------------------------------------------------------------------------- parsing


def parse_block(raw, line, block, encoding):
    """Parse whole lines of text into an array of ROW; line is the number of the first one, for messages."""
    if b"\0" in block:  # string_keys takes it for the end of a string
        check_lines(raw, line, block, encoding)
    try:
        table = read_csv(raw, block, pa.int64())
    except pa.ArrowInvalid:
        try:
            table = read_csv(raw, block, pa.float64())  # "1.0", as pandas writes integers when some are missing
        except pa.ArrowInvalid as error:
            check_lines(raw, line, block, encoding)
            raise DataError(f"{raw.path}, near line {line}: {' '.join(str(error).split())}") from None
    if table.num_rows != block.count(b"\n"):
        check_lines(raw, line, block, encoding)
    rows = np.empty(table.num_rows, ROW)
    labels = table.column(LABEL).combine_chunks().fill_null(-1).to_numpy()
    valid = bool(((labels == 0) | (labels == 1)).all())
    rows["label"] = labels
    for index, name in enumerate(INTEGER_FIELDS):
        values, whole = as_integers(table.column(name).combine_chunks().fill_null(0).to_numpy())
        valid &= whole
        rows["ints"][:, index] = encoding.integer_tokens(values)
    for index, name in enumerate(CATEGORICAL_FIELDS):
        tokens, known = encoding.category_tokens(string_keys(table.column(name).combine_chunks()))
        valid &= known
        rows["cats"][:, index] = tokens
    if not valid:
        check_lines(raw, line, block, encoding)
        raise DataError(f"{raw.path}, near line {line}: a value that cannot be read")
    return rows


def read_csv(raw, block, number_type):
    types = {name: number_type for name in [LABEL] + INTEGER_FIELDS}
    types.update({name: pa.binary() for name in CATEGORICAL_FIELDS})
    return pa_csv.read_csv(
        pa.BufferReader(block),
        # one chunk per column; blocks are already parsed in parallel
        pa_csv.ReadOptions(column_names=COLUMNS, use_threads=False, block_size=len(block) + 1),
        pa_csv.ParseOptions(delimiter=raw.separator.decode(), quote_char=False, ignore_empty_lines=False),
        pa_csv.ConvertOptions(column_types=types, null_values=[""], strings_can_be_null=False, check_utf8=False),
    )


def as_integers(values):
    """(int64 array, whether all are whole numbers in range) of an int64 or float64 array."""
    in_range = len(values) == 0 or (values.min() >= MIN_INTEGER and values.max() <= MAX_INTEGER)
    if not in_range:  # or NaN
        return np.zeros(len(values), np.int64), False
    integers = values.astype(np.int64, copy=False)
    return integers, bool((integers == values).all())


def string_keys(column):
    """A number for each string of a pyarrow binary array: uint64, equal exactly when the strings are.

    Up to 8 bytes (all of Criteo) it is the string itself, "" being 0; a longer one is hashed to 56 bits, with a mark
    in the first byte that no UTF-8 text has.
    """
    offsets = np.frombuffer(column.buffers()[1], np.int32)[: len(column) + 1]
    data = np.frombuffer(column.buffers()[2] or b"", np.uint8)
    lengths = np.diff(offsets)
    keys = np.zeros(len(column), np.uint64)
    present = lengths > 0
    if (lengths[present] == 8).all():
        keys[present] = data[offsets[0] : offsets[-1]].view(np.uint64)
        return keys
    characters = keys.view(np.uint8).reshape(-1, 8)
    for position in range(8):
        longer = lengths > position
        characters[longer, position] = data[offsets[:-1][longer] + position]
    for row in np.flatnonzero(lengths > 8):
        digest = hashlib.blake2b(data[offsets[row] : offsets[row + 1]].tobytes(), digest_size=7).digest()
        characters[row] = np.frombuffer(b"\xff" + digest, np.uint8)
    return keys


def check_lines(raw, line, block, encoding=None):
    """Raise a DataError for the first bad line of a block; return if there is none."""
    for number, text in enumerate(block.decode("utf-8", "replace").split("\n")[:-1], line):
        text = text[:-1] if text.endswith("\r") else text
        problem = line_problem(text.split(raw.separator.decode()), encoding)
        for character, name in (("\r", "a carriage return inside the line"), ("\0", "a zero byte")):
            if character in text:
                problem = f"{name}; the file is damaged, or not plain text of one byte per character"
        if problem:
            raise DataError(f"{raw.path}, line {number}: {problem}")


def line_problem(cells, encoding):
    """What is wrong with the cells of a line, or None."""
    if len(cells) != len(COLUMNS):
        return f"{len(cells)} columns, expected {len(COLUMNS)} (label, I1..I13, C1..C26)"
    if not is_integer(cells[0]) or float(cells[0]) not in (0, 1):
        return f"label {cells[0]!r}, expected 0 or 1"
    for name, cell in zip(INTEGER_FIELDS, cells[1:]):
        if cell and not is_integer(cell):
            return f"{name} is {cell!r}, expected a whole number from {MIN_INTEGER} to {MAX_INTEGER}, or nothing"
    for name, cell in zip(CATEGORICAL_FIELDS, cells[1 + NUM_INTEGERS :]):
        if encoding is not None and encoding.hexadecimal and not re.fullmatch("[0-9a-fA-F]{0,8}", cell):
            return f"{name} is {cell!r}, expected up to 8 hexadecimal digits (--encoding x4 takes any string)"
    return None


def is_integer(text):
    if not re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", text):
        return False
    value = float(text)
    return value.is_integer() and MIN_INTEGER <= value <= MAX_INTEGER


# ---------------------------------------------------------------------------------------------------------- encodings


def bucket_borders():
    """Smallest integer of each bucket: borders[k-1] is the first v with floor(ln(v)^2) >= k."""
    borders = []
    for bucket in range(1, int(np.log(MAX_INTEGER) ** 2) + 1):
        value = round(np.exp(np.sqrt(bucket)))
        while np.floor(np.log(value) ** 2) >= bucket:
            value -= 1
        while np.floor(np.log(value) ** 2) < bucket:
            value += 1
        borders.append(value)
    return np.array(borders, np.int64)


BORDERS = bucket_borders()
SMALL_BUCKETS = np.searchsorted(BORDERS, np.arange(1 << 16), side="right").astype(np.int32)
SMALL_BUCKETS[:3] = [0, 1, 2]  # up to 2 the value is its own bucket


def buckets(values):
    """floor(ln(v)^2) for v > 2, else v. int64 (n) in, int32 (n) out; by table, which is faster than the formula."""
    result = SMALL_BUCKETS[np.clip(values, 0, len(SMALL_BUCKETS) - 1)]
    large = values >= len(SMALL_BUCKETS)
    if large.any():
        result[large] = np.searchsorted(BORDERS, values[large], side="right")
    return np.where(values < 0, values, result).astype(np.int32)


def field_tokens(rows):
    """The 39 token columns of an array of ROW: int32 for the integers, uint64 for the categories."""
    return [*rows["ints"].T, *rows["cats"].T]


class X4Encoding:
    """FuxiCTR's Criteo_x4 encoding with the ids of FuxiCTR 2.x (see the head of this file)."""

    hexadecimal = False

    def __init__(self, min_count):
        self.min_count = min_count
        self.vocabularies = None  # one pandas Index of tokens per field, the token at position p having id p + 1

    def integer_tokens(self, values):
        return buckets(values)

    def category_tokens(self, keys):
        return keys, True

    def count(self, rows):
        """[(distinct tokens, counts)] per field."""
        counted = []
        for tokens in field_tokens(rows):
            codes, distinct = pd.factorize(np.ascontiguousarray(tokens))
            counted.append((distinct, np.bincount(codes, minlength=len(distinct))))
        return counted

    def set_counts(self, counted):
        """Make the vocabularies of [(distinct tokens, counts)] per field over all train rows."""
        self.vocabularies = []
        for tokens, counts in counted:
            keep = (counts >= self.min_count) & (tokens != 0)  # 0 is the missing value
            tokens, counts = tokens[keep], counts[keep]
            text_order = tokens.byteswap() if tokens.dtype == np.uint64 else tokens
            tokens = tokens[np.lexsort((text_order, -counts))]
            self.vocabularies.append(pd.Index(tokens.astype(np.int64 if tokens.dtype != np.uint64 else np.uint64)))

    @property
    def table_sizes(self):
        return [len(vocabulary) + 2 for vocabulary in self.vocabularies]

    def local_ids(self, field, tokens):
        """Ids within the field: 1 for the first token of the vocabulary, the last id for unknown ones."""
        vocabulary = self.vocabularies[field]
        ids = vocabulary.get_indexer(tokens.astype(vocabulary.dtype)) + 1
        ids[ids == 0] = len(vocabulary) + 1
        return ids


HEX_DIGIT = np.full(256, 255, np.uint8)
for _digit in "0123456789abcdefABCDEF":
    HEX_DIGIT[ord(_digit)] = int(_digit, 16)


class HashEncoding:
    """id = value mod mod_idx: no vocabulary, mod_idx rows per table."""

    hexadecimal = True

    def __init__(self, mod_idx):
        self.mod_idx = mod_idx
        self.table_sizes = [mod_idx] * len(FIELDS)

    def integer_tokens(self, values):
        return values % self.mod_idx

    def category_tokens(self, keys):
        """(value mod mod_idx, whether all are hexadecimal) of string_keys."""
        characters = keys.view(np.uint8).reshape(-1, 8)
        values = np.zeros(len(keys), np.uint64)
        valid = True
        for position in range(8):
            digit = HEX_DIGIT[characters[:, position]]
            present = characters[:, position] != 0
            valid &= not (digit[present] == 255).any()
            values = np.where(present, values * np.uint64(16) + digit, values)
        return values % np.uint64(self.mod_idx), bool(valid)

    def local_ids(self, field, tokens):
        return tokens.astype(np.int64)


class TokenCounter:
    """Counts of all tokens per field, in bounded memory: what exceeds it is put on disk, parted by token.

    Args: folder: scratch folder, made when needed. memory_bytes: for the counts in memory (16 bytes per token).
    """

    PARTS = 64

    def __init__(self, folder, memory_bytes, min_count):
        self.folder, self.min_count = Path(folder), min_count
        self.limit = memory_bytes // 16
        self.parts = [[] for _ in FIELDS]  # (tokens, counts) per field, not yet merged
        self.size = self.merged_size = 0
        self.spilled = False

    def add(self, counted):
        for parts, (tokens, counts) in zip(self.parts, counted):
            parts.append((tokens, counts))
            self.size += len(tokens)
        if self.size > max(2 * self.merged_size, self.limit // 4):
            self._merge()
            if self.size > self.limit // 2:
                self._spill()

    def _merge(self):
        self.parts = [[merge_counts(parts)] if parts else [] for parts in self.parts]
        self.size = self.merged_size = sum(len(parts[0][0]) for parts in self.parts if parts)

    def _file(self, field, part):
        return self.folder / f"{field}-{part}.bin"

    def _spill(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        for field, parts in enumerate(self.parts):
            if not parts:
                continue
            tokens, counts = parts[0]
            part = (shuffle_keys(tokens.astype(np.int64, copy=False), 0) % self.PARTS).astype(np.int8)
            record = np.empty(len(tokens), [("token", tokens.dtype), ("count", np.int64)])
            record["token"], record["count"] = tokens, counts
            for index in np.unique(part):
                with open(self._file(field, index), "ab") as file:
                    file.write(record[part == index].data)
        self.parts = [[] for _ in FIELDS]
        self.size = self.merged_size = 0
        self.spilled = True

    def result(self):
        """[(tokens, counts)] per field of the tokens seen at least min_count times."""
        self._merge()
        if not self.spilled:
            return [parts[0] for parts in self.parts]
        self._spill()
        return [self._read_field(field) for field in range(len(FIELDS))]

    def _read_field(self, field):
        dtype = np.dtype(np.int32 if field < NUM_INTEGERS else np.uint64)
        kept = [(np.empty(0, dtype), np.empty(0, np.int64))]
        for path in sorted(self.folder.glob(f"{field}-*.bin")):
            record = np.fromfile(path, [("token", dtype), ("count", np.int64)])
            tokens, counts = merge_counts([(record["token"], record["count"])])
            kept.append((tokens[counts >= self.min_count], counts[counts >= self.min_count]))
        return merge_counts(kept)


def merge_counts(parts):
    """Sum [(tokens, counts)] by token."""
    codes, distinct = pd.factorize(np.concatenate([tokens for tokens, _ in parts]))
    counts = np.concatenate([counts for _, counts in parts])
    return distinct, np.bincount(codes, weights=counts, minlength=len(distinct)).astype(np.int64)


# ------------------------------------------------------------------------------------------------------- arrow engine


def convert_arrow(args, source, encoding, folder, scratch):
    """Read, count and spool all rows in one pass; then encode and write them. Returns the fields."""
    memory = int(args.memory_gb * GIGABYTE)
    spools = [
        RowSpool(scratch / split, ROW, source.num_rows[split], memory // 12, args.seed if split == "train" else None)
        for split in SPLITS
    ]
    counter = TokenCounter(scratch / "counts", memory // 8, args.min_categr_count)
    for raw, splits, blocks in zip(source.files, source.splits, source.blocks):
        with Progress(f"reading {raw.path.name}", sum(rows for _, _, rows in blocks)) as progress:
            for rows, counted in parsed_blocks(raw, splits, encoding, memory // 2):
                for spool, part in zip(spools, rows):
                    spool.append(part)
                    progress.update(len(part))
                if counted:
                    counter.add(counted)
    if isinstance(encoding, X4Encoding):
        encoding.set_counts(counter.result())
    del counter
    fields = make_fields(FIELDS, encoding.table_sizes)
    with Progress("writing", sum(source.num_rows.values())) as progress:
        for split, spool in zip(SPLITS, spools):
            with SplitWriter(folder, split, fields, source.num_rows[split]) as writer:
                for rows in spool.read():
                    ids = [encoding.local_ids(field, tokens) for field, tokens in enumerate(field_tokens(rows))]
                    writer.write(rows["label"], ids)
                    progress.update(len(rows))
    return fields


def parsed_blocks(raw, splits, encoding, memory_bytes):
    """Yield, per block in file order, a list of ROW arrays (one per split) and the counts of its train rows or None.

    memory_bytes limits how many blocks are parsed at a time.
    """

    def parse(line, block, splits):
        rows = split_rows(parse_block(raw, line, block, encoding), splits)
        counted = encoding.count(rows[0]) if isinstance(encoding, X4Encoding) and len(rows[0]) else None
        return rows, counted

    workers = max(1, min(num_cpus(), memory_bytes // (BLOCK_MEMORY * BLOCK_BYTES) - 1))
    waiting, first = deque(), 0
    with ThreadPoolExecutor(workers) as pool:
        for line, _, block in raw.blocks():
            count = block.count(b"\n")
            part = splits if np.isscalar(splits) else splits[first : first + count]
            waiting.append(pool.submit(parse, line, block, part))
            first += count
            if len(waiting) > workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def split_rows(rows, splits):
    """The rows of each split; splits is an array, or one number for all rows."""
    if np.isscalar(splits):
        return [rows if index == splits else rows[:0] for index in range(len(SPLITS))]
    return [rows[splits == index] for index in range(len(SPLITS))]


def num_cpus():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


# ------------------------------------------------------------------------------------------------------- spark engine
# Spark deals blocks of lines to its workers, adds up the counts and sorts the train rows. Lines are parsed, encoded and
# written by the same functions as above, so that both engines give the same rows.


# log4j2's settings; without an appender Spark would put its own settings in place of these
NO_LOG = """
appender.none.type = Null
appender.none.name = none
rootLogger.level = off
rootLogger.appenderRef.none.ref = none
logger.gateway.name = org.apache.spark.api.python.PythonGatewayServer
logger.gateway.level = off
"""


def convert_spark(args, source, encoding, folder, scratch):
    """The same as convert_arrow, on Spark. Returns the fields."""
    places, num_rows, spark = block_places(source, scratch), sum(source.num_rows.values()), None
    try:
        with signals_held():
            spark = start_spark(args, scratch)
        blocks = spark.range(0, len(places), 1, numPartitions=len(places))
        if isinstance(encoding, X4Encoding):
            counted = blocks.mapInArrow(count_blocks(places, encoding), "field long, token long, count long")
            counted = counted.groupBy("field", "token").agg({"count": "sum"}).withColumnRenamed("sum(count)", "count")
            with spark_progress(spark, "counting tokens", num_rows):
                counted.filter(counted["count"] >= encoding.min_count).write.parquet(str(scratch / "counts"))
            counted = pq.read_table(scratch / "counts").to_pandas()
            encoding.set_counts([field_counts(counted, field) for field in range(len(FIELDS))])
        fields = make_fields(FIELDS, encoding.table_sizes)
        columns = ", ".join(f"`{name}` int" for name in FIELDS)
        encoded = blocks.mapInArrow(
            encode_blocks(places, spark.sparkContext.broadcast(encoding), args.seed),
            f"split int, key long, label int, {columns}",
        )
        with spark_progress(spark, "encoding", num_rows):
            encoded.write.parquet(str(scratch / "encoded"))  # sorting looks at its input twice
        with spark_progress(spark, "sorting", num_rows):
            encoded = spark.read.parquet(str(scratch / "encoded"))
            encoded.orderBy("split", "key").drop("split", "key").write.parquet(str(scratch / "sorted"))
        files = file_tasks(scratch / "sorted", source.num_rows)
        tasks = spark.sparkContext.parallelize(files, len(files))
        with spark_progress(spark, "writing", num_rows):
            tasks.foreach(lambda file: write_file(folder, fields, *file))
    except DataError:
        raise
    except Exception as error:  # Py4JJavaError, PythonException, ...: a worker's error comes as the text of a traceback
        raise worker_error(error) from None
    finally:
        if spark is not None:
            with contextlib.suppress(Exception):  # it may have gone already, which is not what to report
                spark.stop()
    return fields


@contextlib.contextmanager
def signals_held():
    """Context manager: Ctrl-C and SIGTERM wait for its end, and find the handlers that were there before it.

    A start of Spark that is broken off leaves a Java process that waits for ever; and Spark's own handler of Ctrl-C,
    which it sets when it starts, ends in a traceback.
    """
    came = []
    handlers = {n: signal.signal(n, lambda *which: came.append(which)) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if came:
        handlers[came[0][0]](*came[0])


@contextlib.contextmanager
def spark_progress(spark, what, num_rows):
    """Context manager: Progress of the Spark jobs in it, by the share of their tasks that are done."""
    spark.sparkContext.setJobGroup(what, what)
    tracker, ended = spark.sparkContext.statusTracker(), threading.Event()

    def watch():
        with contextlib.suppress(Exception):  # Spark has gone
            while not ended.wait(1):
                done = int(num_rows * share_of_tasks(tracker, what))
                progress.update(max(0, done - progress.done))

    with Progress(what, num_rows) as progress:
        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            ended.set()
            watcher.join(10)
        progress.update(num_rows - progress.done)


def share_of_tasks(tracker, group):
    """Share of the tasks of a job group, as far as Spark has planned them, that are done."""
    jobs = [tracker.getJobInfo(job) for job in tracker.getJobIdsForGroup(group)]
    stages = [tracker.getStageInfo(stage) for job in jobs if job for stage in job.stageIds]
    tasks = sum(stage.numTasks for stage in stages if stage)
    return sum(stage.numCompletedTasks for stage in stages if stage) / max(1, tasks)


def start_spark(args, scratch):
    if not (shutil.which("java") or os.environ.get("JAVA_HOME")):
        raise DataError("--engine spark needs Java (8, 11 or 17), which is not here; install it or use --engine arrow")
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    if args.spark_master.startswith("local"):
        os.environ.setdefault("SPARK_LOCAL_IP", "127.0.0.1")  # no look-up of the machine's name
    from pyspark.sql import SparkSession

    logging.disable()  # on Ctrl-C py4j logs a traceback
    log_settings = scratch / "log4j2.properties"
    log_settings.write_text(NO_LOG)  # errors are reported by worker_error
    builder = SparkSession.builder.master(args.spark_master).appName("criteo_parquet")
    settings = {
        "spark.driver.memory": f"{int(args.memory_gb * 1024)}m",
        "spark.local.dir": str(scratch / "spark"),
        "spark.ui.enabled": "false",
        "spark.ui.showConsoleProgress": "false",
        "spark.driver.extraJavaOptions": f"-Dlog4j2.configurationFile={log_settings.absolute().as_uri()}",
        "spark.sql.execution.arrow.pyspark.enabled": "true",
    }
    for key, value in settings.items():
        builder = builder.config(key, value)
    spark = builder.getOrCreate()
    for module in ("parquet_common.py", "criteo_parquet.py"):
        spark.sparkContext.addPyFile(str(Path(__file__).with_name(module)))
    return spark


def block_places(source, scratch):
    """Where the workers find each block: list of (RawFile, path, line, offset, bytes, splits, first row per split)."""
    places, firsts = [], np.zeros(len(SPLITS), np.int64)
    for number, (raw, splits, blocks) in enumerate(zip(source.files, source.splits, source.blocks)):
        path = raw.path.absolute()
        if raw.gzipped:  # workers start in the middle of the file
            path = scratch / f"raw-{number}.txt"
            with raw.open() as packed, open(path, "wb") as plain:
                shutil.copyfileobj(packed, plain, BLOCK_BYTES)
        row = 0
        ends = [offset for _, offset, _ in blocks[1:]] + [path.stat().st_size]
        for (line, offset, rows), end in zip(blocks, ends):
            part = splits if np.isscalar(splits) else splits[row : row + rows]
            places.append((raw, path, line, offset, end - offset, part, firsts.copy()))
            firsts += np.bincount(np.broadcast_to(part, rows), minlength=len(SPLITS))
            row += rows
    return places


def read_place(place, encoding):
    """List of ROW arrays of a block, one per split."""
    raw, path, line, offset, size, splits, _ = place
    with open(path, "rb") as file:
        file.seek(offset)
        block = file.read(size)
    if not block.endswith(b"\n"):
        block += b"\n"
    return split_rows(parse_block(raw, line, block, encoding), splits)


def count_blocks(places, encoding):
    """Function for mapInArrow: block numbers -> (field, token, count) of their train rows."""

    def work(batches):
        for batch in batches:
            for number in batch.column(0).to_pylist():
                for field, (tokens, counts) in enumerate(encoding.count(read_place(places[number], encoding)[0])):
                    tokens = tokens.view(np.int64) if tokens.dtype == np.uint64 else tokens.astype(np.int64)
                    arrays = [np.full(len(tokens), field), tokens, counts]
                    yield pa.RecordBatch.from_arrays([pa.array(a) for a in arrays], ["field", "token", "count"])

    return work


def field_counts(counted, field):
    """(tokens, counts) of a field out of the table of all counts."""
    counted = counted[counted["field"] == field]
    tokens = counted["token"].to_numpy(np.int64)
    tokens = tokens.astype(np.int32) if field < NUM_INTEGERS else tokens.view(np.uint64)
    return tokens, counted["count"].to_numpy(np.int64)


def encode_blocks(places, encoding, seed):
    """Function for mapInArrow: block numbers -> (split, sort key, label, local ids); encoding is a broadcast."""
    names = ["split", "key", "label"] + FIELDS

    def work(batches):
        for batch in batches:
            for number in batch.column(0).to_pylist():
                for split, rows in enumerate(read_place(places[number], encoding.value)):
                    first = places[number][-1][split]
                    keys = np.arange(first, first + len(rows))
                    keys = shuffle_keys(keys, seed) if SPLITS[split] == "train" else keys
                    ids = [encoding.value.local_ids(*pair).astype(np.int32) for pair in enumerate(field_tokens(rows))]
                    arrays = [np.full(len(rows), split, np.int32), keys, rows["label"].astype(np.int32), *ids]
                    yield pa.RecordBatch.from_arrays([pa.array(a) for a in arrays], names)

    return work


def file_tasks(folder, num_rows):
    """How to write each file of the dataset out of the sorted rows, which lie in folder in the order of the splits.

    Returns a list of (split, file name, row group sizes, list of (path, first row, rows) to read).
    """
    parts = [(path, pq.ParquetFile(path).metadata.num_rows) for path in sorted(folder.glob("part-*.parquet"))]
    starts = np.cumsum([0] + [rows for _, rows in parts])
    if starts[-1] != sum(num_rows.values()):
        raise DataError(f"{starts[-1]} rows after sorting, expected {sum(num_rows.values())}; did the input change?")
    start, tasks = 0, []
    for split in SPLITS:
        for name, sizes in plan_files(num_rows[split]):
            end = start + sum(sizes)
            pieces = []
            for (path, rows), first in zip(parts, starts):
                begin, stop = max(start, first), min(end, first + rows)
                if begin < stop:
                    pieces.append((path, int(begin - first), int(stop - begin)))
            tasks.append((split, name, sizes, pieces))
            start = end
    return tasks


def write_file(folder, fields, split, name, sizes, pieces):
    """Write one file of the dataset (runs on a worker)."""
    with SplitWriter(folder, split, fields, None, files=[(name, sizes)]) as writer:
        for path, skip, count in pieces:
            for batch in pq.ParquetFile(path).iter_batches(batch_size=1 << 16):
                wanted = batch.slice(min(skip, len(batch)), count)
                skip = max(0, skip - len(batch))
                count -= len(wanted)
                label, *ids = (column.to_numpy() for column in wanted.columns)
                writer.write(label, ids)


def worker_error(error):
    """The one line worth showing of an error that Spark passed on."""
    text = str(error)
    known = re.findall(r"DataError: (.+)", text)
    if known:
        return DataError(known[0].strip())
    if "No space left on device" in text:
        return OSError(errno.ENOSPC, "No space left on device")
    causes = re.findall(r"^(?:Caused by: .+|: .+|\w*(?:Error|Exception): .+)", text, re.MULTILINE)
    cause = causes[-1].lstrip(": ") if causes else text.splitlines()[0]
    return DataError(f"Spark failed: {cause}; check Java and --spark_master, or use --engine arrow")


# --------------------------------------------------------------------------------------------------------------- main


def parse_args(argv=None):
    parser = Parser("Convert raw Criteo text into a parquet dataset.")
    add_common_options(parser, "folder with train.txt, or with train.csv, valid.csv and test.csv; .gz of them too")
    parser.add_argument("--encoding", choices=["x4", "hash"], default="x4",
                        help="x4: FuxiCTR's vocabularies; hash: value mod --mod_idx")
    parser.add_argument("--min_categr_count", type=positive_int, default=X4_MIN_COUNT,
                        help="times that a token must occur in the train rows to have an id of its own (x4)")
    parser.add_argument("--mod_idx", type=positive_int, default=40000000, help="rows per table (hash)")
    parser.add_argument("--fold_rule", choices=["sklearn", "sklearn-0.19"], default="sklearn",
                        help="how the rows of train.txt are dealt to ten folds: as scikit-learn does since 0.22, or as "
                             "0.19 did, with which the published Criteo_x4 files were made")
    parser.add_argument("--engine", choices=["arrow", "spark"], default="arrow", help="what does the work")
    parser.add_argument("--spark_master", default="local[*]", help="Spark master (--engine spark)")
    args = parser.parse_args(argv)
    if not re.fullmatch(r"local(\[.+\])?|yarn|(spark|k8s|mesos)://.+", args.spark_master):
        parser.error(f"argument --spark_master: '{args.spark_master}', expected local[*], local[2], yarn, "
                     "spark://HOST:PORT, k8s://... or mesos://...")
    if args.mod_idx >= 1 << 31:
        parser.error(f"argument --mod_idx: {args.mod_idx}, expected less than {1 << 31}")
    return args


def convert(args):
    """Make the dataset that args (see parse_args) asks for; returns the contents of dataset_info.json."""
    encoding = X4Encoding(args.min_categr_count) if args.encoding == "x4" else HashEncoding(args.mod_idx)
    engine = convert_spark if args.engine == "spark" else convert_arrow
    with published_folder(args.output_dir, args.input_dir, args.overwrite) as folder:
        with scratch_folder(args.spark_tmp_dir, folder) as scratch:
            source = Source(args.input_dir, args.fold_rule)
            fields = engine(args, source, encoding, folder, scratch)
        info = dataset_info(fields, source.num_rows, source_info(args, source))
        write_info(folder, info, show=args.export_dataset_info)
    rows = ", ".join(f"{info['num_samples'][split]} {split}" for split in SPLITS)
    print(f"wrote {args.output_dir}: {rows} rows, {len(fields)} fields, {sum(encoding.table_sizes)} ids")
    if args.encoding == "x4" and source.num_rows == X4_ROWS and args.min_categr_count == X4_MIN_COUNT:
        print(compare_with_published(encoding.table_sizes))
    return info


def source_info(args, source):
    """The source entry of dataset_info.json: what a user needs in order to make the same dataset again."""
    options = {"engine": args.engine, "seed": args.seed}
    if args.encoding == "x4":
        options["min_categr_count"] = args.min_categr_count
    else:
        options["mod_idx"] = args.mod_idx
    if len(source.files) == 1:
        options["fold_rule"] = args.fold_rule
    return {"tool": "tools/criteo_parquet.py", "options": options, "encoding": args.encoding}


def compare_with_published(table_sizes):
    """One line on whether the table sizes are those of the published Criteo_x4 (FuxiCTR 2.x vocab_size)."""
    different = [name for name, ours, theirs in zip(FIELDS, table_sizes, X4_TABLE_SIZES) if ours != theirs]
    if not different:
        return "the table sizes are those published for Criteo_x4"
    return (f"the table sizes of {len(different)} of {len(FIELDS)} fields differ from those published for Criteo_x4 "
            f"({', '.join(different)}): same number of rows, but another split")


def main(argv=None):
    args = parse_args(argv)
    return run_tool(lambda: convert(args), args.output_dir)


if __name__ == "__main__":
    import criteo_parquet  # under this name Spark's workers find the classes that are sent to them

    sys.exit(criteo_parquet.main())
