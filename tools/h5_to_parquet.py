#!/usr/bin/env python3
"""Convert the preprocessed output of FuxiCTR to the parquet dataset that deepfm_train_eval.py reads.

    python tools/h5_to_parquet.py --input_dir=criteo_x4 --output_dir=deepfm_parquet --spark_tmp_dir=scratch \\
        --export_dataset_info

prints what was found, one line per split when it is done, then dataset_info.json and README.md of the dataset:

    criteo_x4/criteo_x4_001: FuxiCTR 1.0-1.2 output, 39 fields
    train: 36672493 rows in criteo_x4/criteo_x4_001/train.h5
    val: 4584062 rows in criteo_x4/criteo_x4_001/valid.h5
    test: 4584062 rows in criteo_x4/criteo_x4_001/test.h5

Reads every generation of FuxiCTR files, recognised by what is in them:

    1.0-1.2  train.h5 or train_part_N.h5            one 2-D float64 table, columns by index, label last
    2.0-2.1  train.h5 or train/part_N.h5            one 1-D dataset per column
    2.2      train.npz or train/part_N.npz          one array per column
    2.3      train.parquet or train/part_N.parquet  columns by name (2.3.0: the parquet file is called `train`)

and the same for valid and test, beside feature_map.json. Any data set of categorical features will do. Every id gets
its field's offset (running sum of vocab_size), val and test keep their row order, train is shuffled with --seed.
Files are read in slices, so memory does not grow with their size. Spark is not needed.

FuxiCTR 2.x writes its vocabulary beside the data (feature_vocab.json): it is taken over into vocabulary/, so that
tools/encode_rows.py can encode new rows. Their values must look as FuxiCTR's `preprocess` functions left them; for its
convert_to_bucket (the integers of Criteo_x4) name the columns, --buckets I1,I2,..., and raw integers are right. FuxiCTR
1.x has a pickle only, which is not opened; only its digest is kept.

    python tools/h5_to_parquet.py --like data/criteo_x4 --input_dir new_rows --output_dir new_ids

converts one split that FuxiCTR encoded later with the same vocabulary (--split says which, where there are several) to
shards with the ids of the dataset data/criteo_x4.
"""

import os
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `tools` is found from any folder
from tools.trainer import cli

if __name__ == "__main__":
    cli.start_script()  # imports take seconds

import hashlib
import struct
import zipfile
import zlib
from collections import namedtuple
from contextlib import ExitStack

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tools.converter import convert, info, publish
from tools.converter.encoders import LARGEST_TABLE, Bucket, Category, Encoder, Foreign
from tools.converter.names import shard_names
from tools.converter.progress import Progress
from tools.converter.raw import natural_key
from tools.converter.spool import RowLayout, RowSpool
from tools.converter.vocabulary import Vocabulary, keys_of_texts
from tools.converter.writer import SplitWriter, rows_digest
from tools.trainer.cli import UserError, brief, first_line, name_list, shorten
from tools.trainer.dataset_info import LABEL, digest_of, digests_of, parquet_files
from tools.trainer.files import count, read_json
from tools.trainer.places import is_url

FILE_NAMES = {"train": ["train"], "val": ["valid", "val"], "test": ["test"]}  # of each split
MAGIC = {b"\x89HDF": "h5", b"PK\x03\x04": "npz", b"PAR1": "parquet"}
CHUNK_ROWS = 16384  # rows read at a time: 5 MB for 39 int64 columns and a label
MIN_BUCKET_BYTES = 64 * 2**20  # smaller buckets of the shuffle gain nothing, larger ones miss the caches more
MAX_BUCKETS = 256  # few enough for every bucket to get some rows of each block

FeatureMap = namedtuple("FeatureMap", "path fields vocab_sizes label skipped shared by_name")
FeatureMap.__doc__ = """What feature_map.json says.

fields: names in order; vocab_sizes: int per field; label: column name, None in 1.x where it is the last column;
skipped: columns that are not model inputs (type meta); shared: fields that share a table in FuxiCTR;
by_name: True for 2.x (columns have names), False for 1.x (columns have positions).
"""
Part = namedtuple("Part", "path kind num_rows")


# --- what is in the folder -----------------------------------------------------------------------------------------

def find_data_dir(input_dir):
    """Folder that holds feature_map.json: `input_dir` itself or one folder below it (FuxiCTR's dataset_id folder)."""
    if is_url(input_dir):
        raise UserError(f"--input_dir {input_dir} is a URL, expected a folder; copy it to a local disk first")
    if not os.path.isdir(input_dir):
        raise UserError(f"--input_dir {input_dir} is not a folder; give the folder that FuxiCTR wrote")
    below = sorted(entry.path for entry in os.scandir(input_dir) if entry.is_dir())
    found = [folder for folder in [input_dir] + below if os.path.isfile(os.path.join(folder, "feature_map.json"))]
    if not found:
        raise UserError(f"no feature_map.json in {input_dir} or one folder below; "
                                "expected it beside the files that FuxiCTR's preprocessing wrote")
    if found[0] != input_dir and len(found) > 1:
        raise UserError(f"{len(found)} data sets below {input_dir}: {', '.join(map(os.path.basename, found))}; "
                         "give the folder of one of them as --input_dir")
    return found[0]


AGAIN = "run FuxiCTR's preprocessing again"
SPECS = {"*": {"type?": str}}
MAP_SCHEMA = ({"feature_specs": SPECS, "features?": lambda _: False},
              {"features": [SPECS], "labels?": [str], "feature_specs?": lambda _: False})


def read_feature_map(path, label=None):
    """FeatureMap of a feature_map.json, both styles. UserError says what is wrong."""
    content = read_json(path, dict, AGAIN)
    read_json(path, MAP_SCHEMA, "it is of no known FuxiCTR version; expected either the key `feature_specs` (1.x) or "
                                "the key `features` (2.x)")
    by_name = "features" in content
    if by_name:
        specs = [item for feature in content["features"] for item in feature.items()]
        label = choose_label(path, content.get("labels", []), label)
    else:
        specs = in_index_order(path, content["feature_specs"])
        if label is not None:
            raise UserError(f"--label {label} was given, but {path} is of FuxiCTR 1.x, which knows one label only; "
                             "leave --label out")
    check_features(path, specs)
    fields = [(name, spec) for name, spec in specs if spec["type"] == "categorical"]
    return FeatureMap(path, [name for name, _ in fields], [spec["vocab_size"] for _, spec in fields], label,
                      [name for name, spec in specs if spec["type"] == "meta"],
                      [name for name, spec in fields if "share_embedding" in spec], by_name)


def choose_label(path, labels, wanted):
    if wanted is not None and wanted not in labels:
        raise UserError(f"--label {wanted} is not a label in {path}; expected one of {', '.join(labels)}")
    if wanted is None and len(labels) != 1:
        raise UserError(f"{path} has {len(labels)} labels ({', '.join(labels)}), expected 1; choose one with --label")
    return labels[0] if wanted is None else wanted


def in_index_order(path, specs):
    """1.x features sorted by their column in the 2-D table; a sequence owns a list of columns."""
    def columns(spec):
        index = spec.get("index")
        return index if isinstance(index, list) and index else [index]
    used = [column for spec in specs.values() for column in columns(spec)]
    if not all(count(column) for column in used) or sorted(used) != list(range(len(used))):
        raise UserError(f"{path}: the feature indexes are not 0..{len(used) - 1}, each once; "
                         "run FuxiCTR's preprocessing again")
    return sorted(specs.items(), key=lambda item: columns(item[1])[0])


def check_features(path, specs):
    """Refuse features that are not a single id per row, and ids without a vocabulary size."""
    names = [name for name, _ in specs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"{path}: feature {twice[0]} is listed twice; expected every feature once")
    refused = [f"{name} ({spec.get('type')})" for name, spec in specs
               if spec.get("type") not in ("categorical", "meta")]
    if refused:
        raise UserError(f"{path}: {', '.join(refused)}: expected categorical features only, one id per row; "
                         "make them categorical (numbers: bucketed) or inactive in FuxiCTR's dataset_config")
    sizes = {name: spec.get("vocab_size") for name, spec in specs if spec["type"] == "categorical"}
    if not sizes:
        raise UserError(f"{path} names no categorical feature; expected at least one")
    for name, size in sizes.items():
        if not count(size) or not 1 <= size <= LARGEST_TABLE:
            raise UserError(f"{path}: feature {name} has vocab_size {brief(size)}, expected a whole number from 1 to "
                            f"{LARGEST_TABLE}; {AGAIN}")


def file_kind(path):
    """h5, npz or parquet by the first bytes; None for other files. An .h5 that is not one is an error."""
    with open(path, "rb") as file:
        kind = MAGIC.get(file.read(4))
    extension = os.path.splitext(path)[1][1:]
    if kind is None and extension in MAGIC.values():
        raise UserError(f"{path} is not a {extension} file (damaged, or a Git LFS pointer); make or fetch it again")
    return kind


def data_files(folder, pattern):
    """Data files in `folder` whose name without extension matches `pattern`, part_10 after part_9."""
    return sorted((entry.path for entry in os.scandir(folder)
                   if entry.is_file() and re.fullmatch(pattern, os.path.splitext(entry.name)[0])
                   and file_kind(entry.path)), key=lambda path: natural_key(os.path.basename(path)))


def find_split(folder, split):
    """Files of one split in reading order: one file, or the numbered parts; none when there is no such split.

    Raises: UserError where there are two of them, or a file whose name is not FuxiCTR's (a copy, say).
    """
    choices = []
    for name in FILE_NAMES[split]:
        choices += [[path] for path in data_files(folder, name)]
        choices.append(data_files(folder, rf"{name}_part_\d+"))
        inside = os.path.join(folder, name)
        if os.path.isdir(inside):
            choices.append(data_files(inside, r"part_\d+"))
            refuse_strangers(data_files(inside, r".*"), choices[-1])
    if not any(choices):  # FuxiCTR 1.0 names its files after the csv files: train_sample.h5
        choices = [[path] for name in FILE_NAMES[split] for path in data_files(folder, rf"{name}[_-].*")]
    choices = [choice for choice in choices if choice]
    if len(choices) > 1:
        raise UserError(f"more than one {split} split in {folder} ({' and '.join(choice[0] for choice in choices)}); "
                         "remove the one that is out of date")
    for name in FILE_NAMES[split] if choices else ():
        refuse_strangers(data_files(folder, rf"{name}\b.*|{name}_.*"), choices[0])
    check_part_numbers(choices[0] if choices else [])
    return choices[0] if choices else []


def refuse_strangers(paths, known):
    strangers = [path for path in paths if path not in known]
    if strangers:
        raise UserError(f"{shorten(strangers)}: not a name that FuxiCTR gives its files; a copy? remove it, or move it "
                        "elsewhere")


def check_part_numbers(paths):
    """A hole in FuxiCTR's numbering (part_0, part_1, ...) means that rows are missing, a number twice that they are
    double."""
    numbers = [int(re.search(r"part_(\d+)\.", os.path.basename(path)).group(1)) for path in paths if "part_" in path
               and re.search(r"part_(\d+)\.", os.path.basename(path))]
    if len(numbers) < len(paths):
        return  # files of other names
    missing = sorted(set(range(len(paths))) - set(numbers))
    if missing:
        raise UserError(f"part_{missing[0]} is missing in {os.path.dirname(paths[0])} ({len(paths)} parts found, "
                         f"the last is {os.path.basename(paths[-1])}); {AGAIN}")


# --- the columns of a file ------------------------------------------------------------------------------------------

def inspect_part(path, feature_map):
    """Part of one file after a check of its columns, without reading them; UserError names file and column."""
    kind = file_kind(path)
    if (kind, feature_map.by_name) not in VERSIONS:
        raise UserError(f"{path} is a {kind} file, but feature_map.json is of FuxiCTR 1.x, which writes h5; "
                        "they are not of one run: run FuxiCTR's preprocessing again")
    try:
        columns = COLUMNS[kind](path, feature_map)
    except READ_ERRORS as error:
        raise unreadable(path, error) from None
    wanted = column_names(feature_map)
    missing = [name for name in wanted if name not in columns]
    if missing:
        raise UserError(f"{path} has no column {missing[0]} ({len(missing)} of {len(wanted)} columns are missing); "
                        "expected the label and all features of feature_map.json")
    (num_rows, *_), _ = columns[wanted[0]]
    for name in wanted:
        shape, dtype = columns[name]
        if shape != (num_rows,):
            raise UserError(f"{path}: column {name} has shape {shape}, expected ({num_rows},) like {wanted[0]}")
        if dtype.kind not in "iufb":
            raise UserError(f"{path}: column {name} has values of type {dtype}, expected numbers")
    return Part(path, kind, num_rows)


def unreadable(path, error):
    return UserError(f"{path} cannot be read ({first_line(error)}); it may be cut short or damaged: make or fetch it "
                     "again")


def column_names(feature_map):
    """Columns of a file in the order in which the readers give them: the label, then the fields."""
    return [feature_map.label, *feature_map.fields]


def h5_columns(path, feature_map):
    """{column: (shape, dtype)} of an h5 file; the 2-D table of 1.x appears as its columns."""
    with h5py.File(path, "r") as file:
        if feature_map.by_name:
            return {name: (file[name].shape, file[name].dtype) for name in column_names(feature_map) if name in file}
        shapes = {name: data.shape for name, data in file.items() if isinstance(data, h5py.Dataset)}
        if [len(shape) for shape in shapes.values()] != [2]:
            raise UserError(f"{path} holds the columns {', '.join(file)}; expected one 2-D table, because "
                            "feature_map.json is of FuxiCTR 1.x: run FuxiCTR's preprocessing again")
        (name, (num_rows, width)), = shapes.items()
        names = column_names(feature_map)
        if width != len(names):
            raise UserError(f"{path}: the table `{name}` has {width} columns, expected {len(names)} "
                            f"({len(names) - 1} features of feature_map.json and the label)")
        return {column: ((num_rows,), file[name].dtype) for column in names}


def npz_columns(path, feature_map):
    with zipfile.ZipFile(path) as archive:
        members = set(archive.namelist())
        columns = {}
        for name in column_names(feature_map):
            if name + ".npy" in members:
                with archive.open(name + ".npy") as stream:
                    columns[name] = npy_header(stream)
        return columns


def npy_header(stream):
    """(shape, dtype) from the head of an .npy stream; leaves the stream at the first value."""
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    shape, _, dtype = readers[np.lib.format.read_magic(stream)](stream)
    return shape, dtype


def parquet_columns(path, feature_map):
    file = pq.ParquetFile(path)
    types = {field.name: field.type for field in file.schema_arrow}
    return {name: ((file.metadata.num_rows,), arrow_dtype(types[name]))
            for name in column_names(feature_map) if name in types}


def arrow_dtype(arrow_type):
    try:
        return np.dtype(arrow_type.to_pandas_dtype())
    except (NotImplementedError, TypeError):
        return np.dtype(object)


# --- reading: blocks of rows, each a list of 1-D arrays in the order of column_names ---------------------------------

def read_part(part, feature_map):
    """Yield (first row, block) over one file; UserError when it is damaged or not as long as it said."""
    start = 0
    try:
        for block in READERS[part.kind](part.path, feature_map):
            yield start, block
            start += len(block[0])
    except READ_ERRORS as error:
        raise unreadable(part.path, error) from None
    if start != part.num_rows:
        raise UserError(f"{part.path} gave {start} rows, expected {part.num_rows}; is another program writing to it?")


def read_h5(path, feature_map):
    with h5py.File(path, "r") as file:
        if feature_map.by_name:
            data = [file[name] for name in column_names(feature_map)]
            for start in range(0, len(data[0]), CHUNK_ROWS):
                yield [column[start:start + CHUNK_ROWS] for column in data]
        else:
            table, = file.values()
            for start in range(0, len(table), CHUNK_ROWS):
                columns = np.ascontiguousarray(table[start:start + CHUNK_ROWS].T)
                yield [columns[-1], *columns[:-1]]


def read_npz(path, feature_map):
    """np.load would read whole columns; this reads all columns side by side, a slice at a time."""
    with zipfile.ZipFile(path) as archive, ExitStack() as stack:
        streams = [stack.enter_context(archive.open(name + ".npy")) for name in column_names(feature_map)]
        headers = [npy_header(stream) for stream in streams]
        (num_rows,), _ = headers[0]
        for start in range(0, num_rows, CHUNK_ROWS):
            count = min(CHUNK_ROWS, num_rows - start)
            yield [np.frombuffer(stream.read(count * dtype.itemsize), dtype, count)
                   for stream, (_, dtype) in zip(streams, headers)]


def read_parquet(path, feature_map):
    names = column_names(feature_map)
    for batch in pq.ParquetFile(path).iter_batches(batch_size=CHUNK_ROWS, columns=names):
        yield [batch.column(name).to_numpy(zero_copy_only=False) for name in names]  # an empty value becomes NaN


COLUMNS = {"h5": h5_columns, "npz": npz_columns, "parquet": parquet_columns}
READERS = {"h5": read_h5, "npz": read_npz, "parquet": read_parquet}
# what h5py, zipfile, NumPy's reader of headers and Arrow raise for damaged files
READ_ERRORS = (OSError, ValueError, LookupError, EOFError, TypeError, AttributeError, RuntimeError, ArithmeticError,
               SyntaxError, MemoryError, struct.error, zipfile.BadZipFile, zlib.error, pa.ArrowException)
VERSIONS = {("h5", False): "1.0-1.2", ("h5", True): "2.0-2.1", ("npz", True): "2.2", ("parquet", True): "2.3"}


# --- checks ----------------------------------------------------------------------------------------------------------

def id_type(vocab_size):
    """Smallest unsigned type of a field's local ids: what the shuffle has to carry."""
    return np.min_scalar_type(vocab_size - 1)


def to_ids(values, vocab_size, place):
    """Ids as FuxiCTR stores them (whole numbers of any type) as the field's id_type.

    Args:   values: 1-D array; place: (path, field, first row of the block), for the message.
    Errors: UserError with the first value that is not whole or not in 0..vocab_size-1.
    """
    if len(values) == 0:
        return values.astype(id_type(vocab_size))
    if values.min() >= 0 and values.max() < vocab_size:  # both False when there is a NaN
        ids = values.astype(id_type(vocab_size))
        if values.dtype.kind != "f" or np.array_equal(ids, values):
            return ids
    bad = ~((values >= 0) & (values < vocab_size) & (values == np.floor(values)))
    raise bad_value(values, bad, place, f"a whole number from 0 to {vocab_size - 1} (vocab_size {vocab_size})")


def to_labels(values, place):
    bad = ~((values == 0) | (values == 1))
    if bad.any():
        raise bad_value(values, bad, place, "0 or 1")
    return values.astype(np.uint8)


def bad_value(values, bad, place, expected):
    path, name, start = place
    row = int(np.flatnonzero(bad)[0])
    return UserError(f"{path}: row {start + row} (counted from 0): {name} is {values[row]}, expected {expected}; "
                     "this file and feature_map.json are not of one FuxiCTR run, or it is damaged")


# --- what FuxiCTR knows about the raw values -------------------------------------------------------------------------

SAVED = ("feature_vocab.json", "feature_processor.pkl", "feature_encoder.pkl")


def make_fields(feature_map, version, buckets):
    """Fields with FuxiCTR's own vocabularies where they can be read; prints a line about the others."""
    folder = Path(feature_map.path).parent
    names, _ = shard_names(feature_map.fields, {}, [])
    unknown = [name for name in buckets if name not in names]
    if unknown:
        raise UserError(f"--buckets: there is no feature {unknown[0]}; the features are {shorten(feature_map.fields)}")
    tokens = read_vocab(folder / SAVED[0]) if (folder / SAVED[0]).exists() and feature_map.by_name else {}
    digest = saved_digest(folder)
    fields, foreign = [], []
    for column, size in zip(feature_map.fields, feature_map.vocab_sizes):
        field = own_field(names[column], column, size, tokens.get(column), column in buckets)
        if field is None:
            foreign.append(column)
            oov = size - 1 if feature_map.by_name else 0
            field = Foreign(names[column], column, size, {"by": f"FuxiCTR {version}", "oov": oov, "missing": oov,
                                                          "digest": digest})
        fields.append(field)
    if foreign:
        print(f"no vocabulary that can be read ({SAVED[0]} of FuxiCTR 2.x) for {shorten(foreign)}: rows can be trained "
              f"on, but new raw rows not encoded")
    return fields


def read_vocab(path):
    """{feature: {token: id}} of feature_vocab.json. Raises: UserError"""
    return read_json(path, {"*": {"*": count}}, AGAIN)


def saved_digest(folder):
    """Digest of what FuxiCTR saved of its encoder, which is not opened where it is a pickle; None where there is
    nothing."""
    for name in SAVED:
        if (folder / name).is_file():
            with open(folder / name, "rb") as file:
                digest = hashlib.sha256()
                for block in iter(lambda: file.read(1 << 20), b""):
                    digest.update(block)
            return digest.hexdigest()
    return None


def own_field(name, column, size, tokens, bucketed):
    """Category or Bucket with FuxiCTR's tokens; None unless their ids are 1, 2, ..., out-of-vocabulary."""
    if tokens is None:
        return None
    words = sorted((number, token) for token, number in tokens.items() if token not in ("__PAD__", "__OOV__"))
    in_order = [number for number, _ in words] == list(range(1, len(words) + 1))
    if not in_order or tokens.get("__OOV__") != len(words) + 1 or size != len(words) + 2:
        return None
    texts = [token for _, token in words]
    field = Bucket(name, column) if bucketed else Category(name, column)
    try:
        if bucketed:  # FuxiCTR writes 12 or 12.0
            texts = [str(int(float(text))) for text in texts]
        texts = pa.array(texts, pa.string())
        field.vocabulary = Vocabulary(keys_of_texts(texts, field.dtype), texts, np.zeros(len(texts), np.int64))
    except (ValueError, OverflowError, UnicodeEncodeError):
        wrong = "whole numbers; leave it out of --buckets" if bucketed else f"text in UTF-8; {AGAIN}"
        raise UserError(f"feature {column}: its tokens in {SAVED[0]} are no {wrong}") from None
    return field


# --- converting ------------------------------------------------------------------------------------------------------

def checked_blocks(parts, feature_map):
    """Yield (labels, list of local ids per field) over the files of a split, in order."""
    for part in parts:
        for start, (labels, *columns) in read_part(part, feature_map):
            ids = [to_ids(values, size, (part.path, name, start))
                   for values, name, size in zip(columns, feature_map.fields, feature_map.vocab_sizes)]
            yield to_labels(labels, (part.path, feature_map.label or "the label", start)), ids


def shuffled_blocks(blocks, vocab_sizes, num_rows, folder, memory_bytes, seed):
    """The same rows in a seeded order, through files in `folder`."""
    layout = RowLayout([id_type(size) for size in vocab_sizes])
    bucket_bytes = min(memory_bytes // 4, max(MIN_BUCKET_BYTES, num_rows * layout.dtype.itemsize // MAX_BUCKETS))
    spool = RowSpool(folder, layout.dtype, num_rows, bucket_bytes, seed)
    for labels, ids in blocks:
        spool.append(layout.pack(labels, ids))
    for rows, _ in spool.read():
        yield layout.unpack(rows)


def convert_split(split, parts, feature_map, encoder, folder, scratch, args):
    """Write one split to folder; returns (number of rows, digest)."""
    num_rows = sum(part.num_rows for part in parts)
    blocks = checked_blocks(parts, feature_map)
    if split == "train" and not args.like:
        blocks = shuffled_blocks(blocks, feature_map.vocab_sizes, num_rows, scratch / split,
                                 int(args.memory_gb * 2**30), args.seed)
    columns = list(encoder.offsets.items())
    with Progress(split, num_rows) as progress, SplitWriter(folder, columns, encoder.id_dtype, num_rows) as writer:
        for labels, ids in blocks:
            writer.write(labels, [values.astype(encoder.id_dtype) for values in ids])
            progress.update(len(labels))
    return num_rows, rows_digest(writer.digests)


def inspect_input(input_dir, label, wanted):
    """(FeatureMap, {split: list of Part}, FuxiCTR version) of a folder, all checked except the values.

    wanted: the splits that must be there; None for one of them, whichever it is.
    """
    folder = find_data_dir(input_dir)
    feature_map = read_feature_map(os.path.join(folder, "feature_map.json"), label)
    found = {split: find_split(folder, split) for split in wanted or FILE_NAMES}
    if wanted is None:
        found = {split: paths for split, paths in found.items() if paths}
        if len(found) != 1:
            raise UserError(f"{folder} has {' and '.join(found) or 'no split'}, expected one of train, valid and test; "
                            "choose one with --split")
    for split, paths in found.items():
        if not paths:
            name = FILE_NAMES[split][0]
            raise UserError(f"no {name} split in {folder}; expected {name}.h5, .npz or .parquet, {name}_part_N.h5 or "
                            f"{name}/part_N.*; the trainer needs train, val and test: give FuxiCTR all three")
    splits = {split: [inspect_part(path, feature_map) for path in paths] for split, paths in found.items()}
    kinds = {part.kind: part.path for parts in splits.values() for part in parts}
    if len(kinds) > 1:
        raise UserError(f"files of different FuxiCTR versions ({', '.join(kinds.values())}); keep those of one run")
    for split, parts in splits.items():
        if not any(part.num_rows for part in parts):
            raise UserError(f"the {split} split ({parts[0].path}) has no rows; {AGAIN}")
    version = VERSIONS[next(iter(kinds)), feature_map.by_name]
    show_input(folder, feature_map, splits, version)
    return feature_map, splits, version


def show_input(folder, feature_map, splits, version):
    print(f"{folder}: FuxiCTR {version} output, {len(feature_map.fields)} fields")
    for split, parts in splits.items():
        files = parts[0].path if len(parts) == 1 else f"{len(parts)} files, {parts[0].path} to {parts[-1].path}"
        print(f"{split}: {sum(part.num_rows for part in parts)} rows in {files}")
    if feature_map.skipped:
        print(f"left out, because meta columns are no model input: {', '.join(feature_map.skipped)}")
    if feature_map.shared:
        print(f"given tables of their own (shared in FuxiCTR): {', '.join(feature_map.shared)}", flush=True)


def check_like(encoder, feature_map, version, like):
    """Raise a UserError unless rows with this feature map have the ids of the dataset `like`."""
    sizes = {field.raw_column: field.table_size for field in encoder.fields}
    if dict(zip(feature_map.fields, feature_map.vocab_sizes)) != sizes:
        other = [name for name, size in zip(feature_map.fields, feature_map.vocab_sizes) if sizes.get(name) != size]
        raise UserError(f"{feature_map.path} has other features or vocab_sizes than --like {like}: "
                        f"{shorten(other or [name for name in sizes if name not in feature_map.fields])}; encode the "
                        "rows with the vocabulary that the dataset was made with")
    if saved_digest(Path(feature_map.path).parent) is None:
        print(f"note: {' or '.join(SAVED[:2])} is not beside the rows, so only the sizes of the vocabularies were "
              f"compared")
        return
    buckets = [field.raw_column for field in encoder.fields if isinstance(field, Bucket)]
    fields = {field.raw_column: field.digest() for field in make_fields(feature_map, version, buckets)}
    other = [field.name for field in encoder.fields if field.digest() != fields[field.raw_column]]
    if other:
        raise UserError(f"the vocabularies beside {feature_map.path} are not those of --like {like}: {shorten(other)}; "
                        "encode the rows with the vocabulary that the dataset was made with")


def convert_data(args):
    """Make a dataset of all three splits."""
    feature_map, splits, version = inspect_input(args.input_dir, args.label, list(FILE_NAMES))
    encoder = Encoder({}, make_fields(feature_map, version, args.buckets or []))
    inputs = [Path(feature_map.path).parent]
    with publish.published_folder(args.output_dir, inputs, args.overwrite, args.spark_tmp_dir) as folder, \
            publish.scratch_folder(args.spark_tmp_dir, folder) as scratch:
        done = {split: convert_split(split, parts, feature_map, encoder, folder / split, scratch, args)
                for split, parts in splits.items()}
        (folder / "vocabulary").mkdir()
        for field in encoder.fields:
            if field.vocabulary is not None:
                field.write(folder)
        label = feature_map.label or LABEL
        raw = {"format": "text", "columns": [label, *feature_map.fields], "label": label, "carried": {}, "header": True,
               "separator": None, "quotes": True}
        options = {"input_dir": args.input_dir, "label": feature_map.label or "last column", "seed": args.seed}
        content = info.dataset_info(
            encoder.fields, {split: rows for split, (rows, _) in done.items()}, raw,
            {"tool": "tools/h5_to_parquet.py", "options": options, "encoding": f"FuxiCTR {version}"},
            digests={split: digest for split, (_, digest) in done.items()}, files=digests_of(folder))
        info.write_info(folder, content, show=args.export_dataset_info)


def convert_like(args):
    """Make shards of one split with the ids of a dataset."""
    encoder = Encoder.load(args.like)
    label = args.label or (encoder.label if encoder.info["source"]["encoding"] > "FuxiCTR 2" else None)
    wanted = [args.split] if args.split else None
    feature_map, splits, version = inspect_input(args.input_dir, label, wanted)
    check_like(encoder, feature_map, version, args.like)
    (split, parts), = splits.items()
    # the dataset's order of fields, which need not be that of the file
    names = [field.raw_column for field in encoder.fields]
    feature_map = feature_map._replace(fields=names, vocab_sizes=[field.table_size for field in encoder.fields])
    inputs = [Path(feature_map.path).parent, args.like]
    with publish.published_folder(args.output_dir, inputs, args.overwrite, args.spark_tmp_dir) as folder:
        rows, digest = convert_split(split, parts, feature_map, encoder, folder, None, args)
        made = {"tool": "tools/h5_to_parquet.py", "options": {"like": args.like}}
        files = {path.name: digest_of(path) for path in parquet_files(folder)}
        content = info.rows_info(encoder.info, {"rows": rows}, {"rows": digest}, LABEL, {}, made, files=files)
        info.write_rows_info(folder, content)


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    parser.add_argument("--input_dir", required=True,
                        help="folder that FuxiCTR wrote, with feature_map.json in it or one folder below")
    convert.add_common_options(parser, engines=False)
    parser.add_argument("--label", help="label column, needed when the FuxiCTR data has several")
    parser.add_argument("--buckets", type=name_list, help="features of integers that convert_to_bucket has changed, "
                                                          "I1,I2,...")
    parser.add_argument("--like", help="dataset whose ids the rows have: only one split is converted")
    parser.add_argument("--split", choices=list(FILE_NAMES), help="which one, with --like")
    args = parser.parse_args(argv)
    if args.split and not args.like:
        parser.error("--split needs --like: a dataset has all three splits")
    if args.like and args.buckets:
        parser.error("--buckets does not go with --like, whose fields are known")
    return args


def main(argv=None):
    args = parse_args(argv)
    work = convert_like if args.like else convert_data
    return cli.run_tool(lambda: work(args), convert.ending(args.output_dir))


if __name__ == "__main__":
    sys.exit(main())
