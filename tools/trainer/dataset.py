"""What is in a dataset folder: parquet files of the splits, dataset_info.json, fields, tables; checked before training.

    DATA_DIR/dataset_info.json            fields, table sizes, numbers of rows
    DATA_DIR/{train,val,test}/*.parquet   a Label column and integer columns of global ids, one per field

A global id is the id within the field's table plus the sizes of the tables before it. A field of lists has several
columns that share its table; the first id of the table stands for an absent element. Without dataset_info.json every
column is a field but Label and those that --weight_column and --group_column name. DATA_DIR may be a URL (places.py).
"""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import pyarrow as pa
from pyarrow.filesystem import FileSystem

from tools.trainer.cli import UserError, brief, first_line, shorten
from tools.trainer.dataset_info import (
    INFO,
    LABEL,
    OF_SPLITS,
    SPLITS,
    check_file,
    is_readable,
    parquet_files,
    read_info,
    refuse_rows,
)
from tools.trainer.places import as_name, as_place, of_name, open_regular, parquet_file


class QuotedPaths(FileSystem):
    """All places as one file system for petastorm, which takes a path for a URL and does not unquote it."""

    pathsep = "/"

    def open(self, path, mode="rb"):
        return of_name(path).open(mode)

    def exists(self, path):
        return of_name(path).exists()

    def isfile(self, path):
        return of_name(path).is_file()

    def isdir(self, path):
        return of_name(path).is_dir()


class Split:
    """The parquet files of one split: where they are, how many rows every row group has, which columns.

    Attributes: name, labelled (whether the labels are read), files (places, sorted), metadata (one per file),
    row_groups (row counts, in reading order), num_rows, schemas (one per file), columns (names in file order), extras
    ({name of a part of `metrics.Scores`: column that is read for it}, see `use_columns`), digests ({file: its entry of
    dataset_info.json} of those that are still to be compared with it).
    """

    def __init__(self, folder, name, labelled=True):
        self.name, self.labelled, self.extras = name, labelled, {}
        self.files, self.digests = parquet_files(folder), {}
        with ThreadPoolExecutor(16) as pool:  # a store answers after a while
            self.metadata = list(pool.map(read_metadata, self.files))
        self.row_groups = [m.row_group(i).num_rows for m in self.metadata for i in range(m.num_row_groups)]
        self.num_rows = sum(self.row_groups)
        if self.num_rows == 0:
            raise UserError(f"the {name} split in {folder} has no rows; convert the data again")
        self.schemas = [m.schema.to_arrow_schema() for m in self.metadata]
        self.columns = self.schemas[0].names
        if len(set(self.columns)) < len(self.columns):
            raise UserError(f"{self.files[0]} has several columns of one name: {shorten(self.columns)}")
        for path, schema in zip(self.files, self.schemas):
            if schema.names != self.columns:
                raise UserError(f"{path} has columns {shorten(schema.names)}, but {self.files[0]} has "
                                f"{shorten(self.columns)}; convert the data again")

    def urls(self):
        """The files for petastorm, to be opened with `QuotedPaths`."""
        return [as_name(path) for path in self.files]

    def check_files(self):
        """Before rows are read: raise a UserError when a file is not the one that was written with dataset_info.json.

        Parquet's own checks miss most of what damages a page.
        """
        while self.digests:
            path, known = self.digests.popitem()
            check_file(path.parent, path.name, {path.name: known})

    def column_range(self, column):
        """(min, max) of a column from the files' statistics; None where a file has none."""
        low, high = [], []
        for metadata in self.metadata:
            # leaves of nested columns are counted too, so a position in the schema would not do
            paths = [metadata.schema.column(i).path for i in range(metadata.num_columns)]
            index = paths.index(column)
            for i in range(metadata.num_row_groups):
                statistics = metadata.row_group(i).column(index).statistics
                if statistics is None or not statistics.has_min_max:
                    return None
                low.append(statistics.min)
                high.append(statistics.max)
        return min(low), max(high)

    def digest(self, columns):
        """16 hexadecimal digits that change with the rows, in a second for 40 columns of 40 million rows.

        Covers the stored labels byte by byte, and of every row group the number of rows and each column's size on disk
        and extremes. So rows that were added, dropped, put in another order or encoded by other tables are seen, and
        nearly every change of values; not seen is one that leaves a column's sizes, extremes and labels as they were.
        The same rows written by another program, or with another compression, have another digest.
        """
        found = hashlib.blake2b(digest_size=8)
        for path, metadata in zip(self.files, self.metadata):
            places = {metadata.schema.column(i).path: i for i in range(metadata.num_columns)}
            with open_regular(path) as file:
                for i in range(metadata.num_row_groups):
                    group = metadata.row_group(i)
                    found.update(json.dumps(["rows", group.num_rows]).encode())
                    for name in columns:
                        chunk = group.column(places[name])
                        known = chunk.statistics if chunk.is_stats_set else None
                        extremes = [str(known.min), str(known.max)] if known is not None and known.has_min_max else []
                        found.update(json.dumps([name, chunk.total_compressed_size, *extremes]).encode())
                    label = group.column(places[LABEL])
                    file.seek(min(filter(None, (label.dictionary_page_offset, label.data_page_offset))))
                    found.update(file.read(label.total_compressed_size))
        return found.hexdigest()


def read_metadata(path):
    try:
        with parquet_file(path) as file:
            return file.metadata
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is not a readable parquet file ({first_line(error)}); "
                        "it may be truncated: convert or copy it again") from None


class Dataset:
    """Splits with the same fields.

    Attributes: splits {name: Split}, fields (names), table_sizes (rows per field), offsets int64 (F+1): field f owns
    the ids [offsets[f], offsets[f + 1]); columns: names of the C columns of ids, by field; field_of: number of each
    column's field; fingerprint of the encoding, or None where it is not known; folder: absolute path or URL, or None.
    """

    folder = None

    def __init__(self, splits, fields, table_sizes, lists=None, fingerprint=None):
        """lists: {field: its columns} of the fields of lists."""
        self.splits, self.known_digest = splits, None
        self.fields = fields
        self.table_sizes = table_sizes
        self.lists = lists or {}
        self.fingerprint = fingerprint
        self.offsets = np.concatenate([[0], np.cumsum(table_sizes)]).astype(np.int64)
        groups = [self.lists.get(field, [field]) for field in fields]
        self.columns = [column for group in groups for column in group]
        self.field_of = [f for f, group in enumerate(groups) for _ in group]

    def list_columns(self):
        """[(first column, last column + 1, id of an absent element)] of the fields of lists"""
        starts = [self.columns.index(columns[0]) for columns in self.lists.values()]
        return [(start, start + len(columns), int(self.offsets[self.field_of[start]]))
                for start, columns in zip(starts, self.lists.values())]

    @property
    def num_ids(self):
        """Rows of all tables together; also the id of the padding row behind them."""
        return int(self.offsets[-1])

    def train_digest(self):
        """Of the rows that are trained on, see `Split.digest`."""
        if self.known_digest is None:
            train = self.splits["train"]
            self.known_digest = train.digest([*self.columns, *train.extras.values()])
        return self.known_digest


# ------------------------------------------------------------------------------------------------------------- reading


def read_dataset(data_dir, table_sizes=None, num_samples=None, weight_column=None, group_column=None, checksums=True):
    """Find the splits and check them against what the user and dataset_info.json say.

    Args: table_sizes: rows of every field's table; num_samples {split: rows}: None for what dataset_info.json says;
    weight_column, group_column: to be read beside labels and ids, see `use_columns`; checksums: whether files are
    compared with dataset_info.json before their rows are read.
    Raises: UserError with one line for what cannot be trained on.
    """
    data_dir = as_place(data_dir)
    if not data_dir.is_dir():
        raise UserError(f"--data_dir {data_dir} is not a folder; it should hold train/, val/ and test/")
    info = read_dataset_info(data_dir)
    splits = {name: Split(data_dir / name, name) for name in SPLITS}
    fields, lists = find_fields(info, splits, data_dir, {weight_column, group_column})
    table_sizes = agreed(table_sizes, info.get("table_sizes"), "--table_size_array")
    if len(table_sizes) != len(fields):
        raise UserError(f"--table_size_array has {len(table_sizes)} values, expected {len(fields)}: {shorten(fields)}")
    for name, split in splits.items():
        option = f"--num_{name}_samples"
        expected = agreed((num_samples or {}).get(name), info.get("num_samples", {}).get(name), option)
        if expected != split.num_rows:
            raise UserError(f"{option} is {expected}, but the files in {data_dir}/{name} have {split.num_rows} rows; "
                            "correct the number or check --data_dir")
    if info.get("files"):
        add_digests(splits, info["files"], data_dir, checksums)
    dataset = Dataset(splits, fields, table_sizes, lists, info.get("fingerprint"))
    dataset.folder = str(data_dir.absolute())
    for split in splits.values():
        check_columns(dataset, split)
        use_columns(dataset, split, weight_column, group_column)
    return dataset


def add_digests(splits, known, data_dir, checksums=True):
    """Raise a UserError unless the files of the splits are those of dataset_info.json."""
    found = {f"{name}/{path.name}": (split, path)
             for name, split in splits.items() for path in split.files}
    shards = {name for name in known if name.split("/")[0] in splits}
    if set(found) != shards:
        different = shorten(sorted(set(found) ^ shards))
        raise UserError(f"{data_dir} and its dataset_info.json do not have the same files, different: {different}; "
                        "copy or convert the data again")
    for name, (split, path) in found.items():
        if checksums:
            split.digests[path] = known[name]


def read_dataset_info(data_dir):
    """What the trainer needs of dataset_info.json; {} where there is none.

    Returns: {"fields": names, "table_sizes", "lists": {field: columns}, "num_samples": {split: rows}, "fingerprint",
    "files": digests}.
    Raises: UserError when the file is not what a converter writes.
    """
    refuse_rows(data_dir)
    if not (as_place(data_dir) / INFO).exists():
        return {}
    info = read_info(data_dir, schema=OF_SPLITS)
    names, sizes = ([field[key] for field in info["fields"]] for key in ("name", "table_size"))
    lists = {field["name"]: field["columns"] for field in info["fields"] if field.get("columns")}
    return {"fields": names, "table_sizes": sizes, "lists": lists, "num_samples": info["num_samples"],
            "fingerprint": info.get("fingerprint"), "files": info.get("files")}


def find_fields(info, splits, data_dir, others):
    """(names of the fields, {field of lists: its columns}); every split must have their columns, and the label.

    others: columns that are no fields, if no dataset_info.json says so.
    """
    fields, lists = info.get("fields") or columns_of_fields(splits["train"], others), info.get("lists", {})
    wanted = [column for field in fields for column in lists.get(field, [field])]
    for split in splits.values():
        missing = [name for name in (LABEL, *wanted) if name not in split.columns]
        if missing:
            raise UserError(f"{split.files[0]} lacks the column{'s' * (len(missing) > 1)} {shorten(missing)}; its "
                            f"columns are {shorten(split.columns)}")
        if not info and set(columns_of_fields(split, others)) != set(fields):
            different = sorted(set(columns_of_fields(split, others)) ^ set(fields))
            raise UserError(f"the {split.name} split has columns {shorten(split.columns)}, but train has "
                            f"{shorten(splits['train'].columns)}; not in both: {shorten(different)}")
    if not fields:
        raise UserError(f"{splits['train'].files[0]} has no column but {LABEL}; convert the data again")
    unusable = [name for name in (*wanted, *others & set(splits["train"].columns)) if not is_readable(name)]
    if unusable:
        raise UserError(f"petastorm cannot read the columns {shorten(unusable)}; rename them in {data_dir}: "
                        "letters, digits, underscores; no digit or underscore first, no Python keyword")
    return fields, lists


def columns_of_fields(split, others=()):
    """All columns but the label, the index that pandas may have added and `others`."""
    return [name for name in split.columns
            if name != LABEL and name not in others and not name.startswith("__index_level_")]


def agreed(argument, from_info, name):
    """The value of an option that dataset_info.json may give too. Raises: UserError when neither or both differ."""
    if argument is None and from_info is None:
        raise UserError(f"{name} is required, because there is no dataset_info.json in --data_dir")
    if argument is not None and from_info is not None and argument != from_info:
        raise UserError(f"{name} is {brief(argument)}, but dataset_info.json says {brief(from_info)}; "
                        "leave the argument out or check --data_dir")
    return from_info if argument is None else argument


# -------------------------------------------------------------------------------------------------------------- checks


def check_columns(dataset, split):
    """Check ids and labels by the files' types and statistics, before rows are read, which are checked once more."""
    for path, schema in zip(split.files, split.schemas):
        for name in dataset.columns + ([LABEL] if split.labelled else []):
            kind = schema.field(name).type
            is_id = pa.types.is_signed_integer(kind) or pa.types.is_uint8(kind)  # petastorm drops the other unsigned
            if not (is_id or name == LABEL and (pa.types.is_floating(kind) or pa.types.is_boolean(kind))):
                raise UserError(f"column {name} of {path} is of type {kind}, expected "
                                f"{'numbers' if name == LABEL else 'signed integers'}; convert the data again")
    for column in range(len(dataset.columns)):
        bounds = split.column_range(dataset.columns[column])
        if bounds:
            check_ids(dataset, split, column, *bounds)
    bounds = split.column_range(LABEL) if split.labelled else None
    if bounds and not 0 <= bounds[0] <= bounds[1] <= 1:
        raise UserError(f"the labels of the {split.name} split go from {bounds[0] + 0:g} to {bounds[1]:g}, "
                        "expected only 0 and 1; convert the data again")
    if bounds and bounds[0] == bounds[1]:
        raise UserError(f"all labels of the {split.name} split are {bounds[1]:g}; AUC needs both 0 and 1")


def check_ids(dataset, split, column, low, high):
    """Raise a UserError unless low and high, the extremes of the column of that number, are ids of its field."""
    field = dataset.field_of[column]
    if low >= dataset.offsets[field] and high < dataset.offsets[field + 1]:
        return
    name = dataset.columns[column]
    if np.isnan(low):  # a missing id is read as NaN
        raise UserError(f"field {name} of the {split.name} split has rows without an id; convert the data again")
    raise UserError(f"field {name} of the {split.name} split has ids from {low} to {high}, expected "
                    f"[{dataset.offsets[field]}, {dataset.offsets[field + 1]}); check --table_size_array, or convert "
                    "again")


def check_labels(split, labels):
    """Raise a UserError unless all labels, float32 (n,), are 0 or 1."""
    wrong = labels[(labels != 0) & (labels != 1)]
    if len(wrong):
        raise UserError(f"the {split.name} split has a label {wrong[0]:g}, expected only 0 and 1")


# ------------------------------------------------------------------------------------ columns beside labels and fields


WHOLE_FLOATS = 2**53  # above, floats cannot tell whole numbers apart


def use_columns(dataset, split, weight_column, group_column):
    """Have `read_rows` read the columns that options name: weights of the rows, and groups in val and test.

    Raises: UserError when a column is missing, of a type that cannot be read, or its weights cannot be used.
    """
    named = {"weights": weight_column, "groups": group_column if split.name != "train" else None}
    split.extras = {part: column for part, column in named.items() if column}
    for part, column in split.extras.items():
        option = f"--{part[:-1]}_column {column}"
        if column not in split.columns:
            raise UserError(f"{option} is not a column of {split.files[0]}; its columns are {shorten(split.columns)}")
        kinds = {schema.field(column).type for schema in split.schemas}
        usable = (pa.types.is_signed_integer, pa.types.is_uint8, pa.types.is_float32, pa.types.is_float64,
                  pa.types.is_string)  # of what petastorm reads
        wrong = [kind for kind in kinds if not any(is_usable(kind) for is_usable in usable)]
        if wrong:
            raise UserError(f"{option} is of type {wrong[0]} in {split.files[0]}, expected "
                            f"signed integers, floats or text{'' if part == 'groups' else ' that is a number'}")
    if weight_column:
        if weight_column in (LABEL, *dataset.columns):
            raise UserError(f"--weight_column {weight_column} is {'the label' if weight_column == LABEL else 'a field'}"
                            "; name a column of weights")
        check_weights(split, weight_column)


def check_weights(split, column):
    """Read all weights of a split, before hours of training rely on them. Raises: UserError"""
    totals = np.zeros(2)  # of the labels 0 and 1
    for values, labels in read_columns(split, [column, LABEL]):
        weights = weight_numbers(values, column, split)
        wrong = weights[~(np.isfinite(weights) & (weights >= 0))]
        if len(wrong):
            raise UserError(f"--weight_column {column} of the {split.name} split has the weight {wrong[0]:g}, "
                            "expected finite numbers from 0 on")
        totals += np.bincount(labels == 1, weights, 2)
    if not totals.all():
        which = "all rows" if not totals.any() else f"all rows with label {0 if totals[1] else 1}"
        raise UserError(f"--weight_column {column} gives {which} of the {split.name} split the weight 0; AUC needs "
                        "both labels")


def read_columns(split, names):
    """Yield some columns of a split, an array (n,) each, a million rows at a time. Raises: UserError"""
    split.check_files()
    for path in split.files:
        try:
            for rows in parquet_file(path).iter_batches(1 << 20, columns=names):
                yield [rows.column(name).to_numpy(zero_copy_only=False) for name in names]
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{path} cannot be read ({first_line(error)}); it may be truncated: convert or copy it "
                            "again") from None


def weight_numbers(values, column, split):
    """float32 (n,) of numbers, or of texts that are numbers: kept columns of text files stay text. Raises: UserError"""
    try:
        return values.astype(np.float32)
    except (TypeError, ValueError) as error:  # an empty text, or a missing one
        raise UserError(f"--weight_column {column} of the {split.name} split has text that is no number "
                        f"({first_line(error)}), expected finite numbers from 0 on") from None


def extra_columns(split, rows):
    """What a block has behind ids and labels: an array for each of the split's extras; rows: has the columns."""
    return [weight_numbers(getattr(rows, column), column, split) if part == "weights" else
            group_numbers(getattr(rows, column)) for part, column in split.extras.items()]


def group_numbers(column):
    """Groups in a column as int64 (n,): whole numbers stay, text is hashed to 64 bits, the same in every run.

    A missing value, which petastorm reads as NaN or as the text None, makes a group like any other.
    Raises: UserError for floats that do not tell the groups apart.
    """
    if column.dtype.kind in "iu":
        return column.astype(np.int64)
    if column.dtype.kind == "f":  # also whole numbers beside missing ones
        if np.abs(column[np.isfinite(column)]).max(initial=0) >= WHOLE_FLOATS:
            raise UserError("--group_column has numbers of 2^53 and more as floats, or beside missing ones, so that "
                            "groups cannot be told apart; store them as text, or fill the missing ones")
        values = column.astype(np.float64)
        values[np.isnan(values)] = np.nan  # there are many, and one group
        whole = values == np.floor(values, where=np.isfinite(values), out=np.full_like(values, np.nan))
        return np.where(whole, np.where(whole, values, 0).astype(np.int64), values.view(np.int64))
    return pd.util.hash_array(column.astype(object)).view(np.int64)
