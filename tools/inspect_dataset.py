#!/usr/bin/env python3
"""Show what is in a dataset before training on it, and check every row.

    python tools/inspect_dataset.py data/criteo_sample

prints a line per split, a line per field and what is wrong, if anything is:

    split     rows  label 1 %  files  row groups
    train  200,000      24.85      1           8
    val     25,000      24.85      1           8
    test    25,000      24.85      1           8

    field  table size   seen  seen %  top id %  OOV % train    val   test  new % val  test  outside
    I1             26     25   96.15     70.61        70.61  70.58  70.20       0.00  0.00        0
    I2             82     81   98.78     13.58         5.14   5.16   5.18       0.00  0.00        0
    ...
    C26           740    739   99.86     54.49        54.49  55.27  55.30       0.00  0.00        0

    39 fields, encoding: x4
    tables: 21,451 rows, 21,407 seen in train; 4.2 MiB with Adam's moments and --embedding_vec_size 16
    nothing wrong

Columns: `seen` counts the distinct ids of the train split, `top id` is the share of the most frequent one of them,
`OOV` the share of rows with the id that the encoding gives to all values outside its vocabulary (- where it has none),
`new` the share of rows with an id that no train row has (its table row is never trained), `outside` counts the rows of
all splits with an id outside the field's table. Shares are in per cent.

One column is read at a time in slices; memory grows with the largest table only (4 bytes per row of it). Columns that
are no fields, by dataset_info.json, are left alone. Where the dataset has vocabularies, they are compared with their
fingerprints. Exit status: 0 when the trainer can use the dataset, 1 when something is wrong (one line for each thing),
2 for wrong arguments.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `tools` is found from any folder
from tools.trainer import cli

if __name__ == "__main__":
    cli.start_script()  # imports take seconds

import json

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from tools.converter.encoders import Encoder
from tools.trainer.cli import UserError, first_line, int_list, one_line, shorten
from tools.trainer.dataset import columns_of_fields, read_dataset_info
from tools.trainer.dataset_info import LABEL, SPLITS, check_file, is_readable, parquet_files, read_info, refuse_rows
from tools.trainer.places import as_place, parquet_file

SLICE_ROWS = 1 << 18  # rows of one column in memory
VECTOR = 16 + 1  # floats per id with the trainer's default --embedding_vec_size, first-order weight included
ADAM = 3  # floats kept per float: itself and its two moments
LONGEST_NAME = 16  # characters of a field's name in the table


class Split:
    """The readable parquet files of one split.

    Attributes: name, paths (of all files), files (those that can be read), num_rows, row_groups, columns {name: type},
    complete (no file had to be left out).
    """

    def __init__(self, folder, name, problems):
        self.name, self.problems, self.files, self.columns = name, problems, [], {}
        self.num_rows = self.row_groups = 0
        self.complete = True
        try:
            self.paths = parquet_files(folder)
        except UserError as error:
            problems.append(str(error))
            self.paths, self.complete = [], False
        for path in self.paths:
            self.add(path)
        if self.complete and self.num_rows == 0:
            problems.append(f"the {name} split in {folder} has no rows; convert the data again")

    def add(self, path):
        try:
            with parquet_file(path) as file:
                metadata = file.metadata
            schema = metadata.schema.to_arrow_schema()
        except READ_ERRORS as error:
            self.problems.append(unreadable(path, error))
            self.complete = False
            return
        columns = dict(zip(schema.names, schema.types))
        if len(columns) < len(schema.names):
            self.problems.append(f"{path} has several columns of one name: {shorten(schema.names)}")
        if self.files and list(columns.items()) != list(self.columns.items()):
            different = sorted({name for name, _ in columns.items() ^ self.columns.items()}) or columns
            self.problems.append(f"{path} has other columns, types or order than {self.files[0]}: {shorten(different)}")
            self.complete = False
            return
        self.columns = columns
        self.files.append(path)
        self.num_rows += metadata.num_rows
        self.row_groups += metadata.num_row_groups

    def slices(self, column):
        """Yield the column's values, up to SLICE_ROWS at a time, without missing ones. A broken file is left out."""
        missing = 0
        for path in list(self.files):
            try:
                with parquet_file(path) as file:
                    rows = 0
                    for batch in file.iter_batches(SLICE_ROWS, columns=[column]):
                        values = batch.column(0)
                        missing += values.null_count
                        rows += len(values)
                        yield values.drop_null().to_numpy(zero_copy_only=False)
                    if rows != file.metadata.num_rows:
                        raise ValueError(f"column {column} has {rows} rows, the file says {file.metadata.num_rows}")
            except READ_ERRORS as error:
                self.problems.append(unreadable(path, error))
                self.files.remove(path)
        if missing:
            self.problems.append(f"column {column} of the {self.name} split lacks {missing} values; convert it again")


READ_ERRORS = (pa.ArrowException, OSError, ValueError, KeyError, OverflowError)


def unreadable(path, error):
    return f"{path} is not a readable parquet file ({first_line(error)}); convert or copy it again"


# -------------------------------------------------------------------------------------------------------- descriptions


def read_description(data_dir, problems):
    """What dataset_info.json says: {fields, num_samples, encoding, files}; {} where it is missing or wrong.

    fields: {name, table_size, offset, columns, oov (id within the field, or None)}.
    """
    if not (data_dir / "dataset_info.json").exists():
        return {}
    try:
        known = read_dataset_info(data_dir)
        info = read_info(data_dir)
        if info.get("label", LABEL) != LABEL:
            raise UserError(f"{data_dir}/dataset_info.json names the label {info['label']}, the trainer reads {LABEL}")
    except UserError as error:
        problems.append(str(error))
        return {}
    source = info["source"] if isinstance(info.get("source"), dict) else {}
    encoding = source.get("encoding")
    if info.get("format_version") == 2:
        try:
            Encoder.load(data_dir)
        except UserError as error:
            problems.append(str(error))
    fields = [{key: field[key] for key in ("name", "table_size", "offset")} for field in info["fields"]]
    for field, entry in zip(fields, info["fields"]):
        described = entry.get("encoding")
        field["columns"] = entry.get("columns") or [entry["name"]]
        field["oov"] = described.get("oov") if isinstance(described, dict) else oov_id(encoding, entry["table_size"])
    return {"fields": fields, "num_samples": known["num_samples"], "encoding": encoding, "files": known["files"]}


def check_digests(data_dir, files, splits, problems):
    """Compare the shards with what dataset_info.json says of their files."""
    shards = {name for name in files or () if name.split("/")[0] in SPLITS}
    found = {f"{split.name}/{path.name}" for split in splits.values() for path in split.paths}
    if shards and found - shards:
        problems.append(f"dataset_info.json does not know the files {shorten(sorted(found - shards))}; move them "
                        "elsewhere, or convert the data again")
    for name in sorted(shards):
        try:
            check_file(data_dir, name, files)
        except UserError as error:
            problems.append(str(error))


def find_fields(info, splits, table_sizes, problems):
    """[{name, table_size, offset, columns, oov}] of the fields, from dataset_info.json, or the files and
    --table_size_array."""
    readable = [split for split in splits.values() if split.files]
    if not readable:
        return info.get("fields", [])
    names = [name for field in info.get("fields", ()) for name in field["columns"]] or columns_of_fields(readable[0])
    unusable = [name for name in names if not is_readable(name)]
    if unusable:
        problems.append(f"the trainer's reader, petastorm, cannot read the columns {shorten(unusable)}; rename them")
    for split in readable:
        lacking = [name for name in [LABEL, *names] if name not in split.columns]
        if lacking:
            problems.append(f"the {split.name} split lacks the columns {shorten(lacking)}; it has "
                            f"{shorten(split.columns)}")
    if info:
        if table_sizes and table_sizes != [field["table_size"] for field in info["fields"]]:
            problems.append("--table_size_array differs from the table sizes in dataset_info.json; leave it out")
        return info["fields"]
    if not table_sizes:
        problems.append("there is no usable dataset_info.json; give --table_size_array, the rows of each field's table")
        return []
    if len(table_sizes) != len(names):
        problems.append(f"--table_size_array has {len(table_sizes)} values, expected {len(names)}: {shorten(names)}")
        return []
    offsets = np.cumsum([0, *table_sizes]).tolist()
    return [{"name": name, "table_size": size, "offset": offset, "columns": [name], "oov": None}
            for name, size, offset in zip(names, table_sizes, offsets)]


def oov_id(encoding, table_size):
    """The id within a field that stands for all values outside the vocabulary, in datasets that do not say it; None
    where there is no such id.

    FuxiCTR 1.x has 0 for it (fuxictr/preprocess.py), 2.x the last id (fuxictr/preprocess/tokenizer.py).
    """
    if encoding and encoding.startswith("FuxiCTR 1"):
        return 0
    return table_size - 1 if encoding and encoding.startswith(("x4", "FuxiCTR 2")) else None


# ------------------------------------------------------------------------------------------------------------ counting


def inspect_split(split, info, problems):
    """{"rows", "files", "row_groups", "label_rate"}; reads the labels."""
    expected = info["num_samples"][split.name] if info else split.num_rows
    if split.complete and split.num_rows != expected:
        problems.append(f"the {split.name} split has {split.num_rows} rows, dataset_info.json says {expected}")
    ones = zeros = wrong = 0
    for labels in split.slices(LABEL) if LABEL in split.columns else ():
        ones += int(np.count_nonzero(labels == 1))
        zeros += int(np.count_nonzero(labels == 0))
        bad = labels[(labels != 0) & (labels != 1)]
        if len(bad) and not wrong:
            problems.append(f"the {split.name} split has a label {bad[0]}, expected only 0 and 1")
        wrong += len(bad)
    if not wrong and (ones == 0) != (zeros == 0):
        problems.append(f"all labels of the {split.name} split are {int(ones > 0)}; AUC needs both 0 and 1")
    return {"rows": split.num_rows, "files": len(split.files), "row_groups": split.row_groups,
            "label_rate": ones / (ones + zeros) if ones + zeros else None}


def inspect_field(field, splits, problems):
    """Statistics of one field as --json shows them; the columns of a list are counted together."""
    size, offset, oov = field["table_size"], field["offset"], field["oov"]
    counts = np.zeros(size, np.int32)  # by id, over train
    result = {"name": field["name"], "table_size": size, "offset": offset, "oov": {}, "new": {}, "outside": 0}
    for split in splits.values():
        if not usable_type(field, split, problems):
            continue
        rows = num_oov = num_new = 0
        low, high = offset, offset + size - 1
        for ids in (ids for column in field["columns"] for ids in split.slices(column)):
            low, high = min(low, int(ids.min(initial=low))), max(high, int(ids.max(initial=high)))
            local = ids.astype(np.int64) - offset
            inside = local[(local >= 0) & (local < size)]
            result["outside"] += len(local) - len(inside)
            if split.name == "train":
                add_counts(counts, inside)
            rows += len(inside)
            num_oov += int(np.count_nonzero(inside == oov)) if oov is not None else 0
            num_new += int(np.count_nonzero(counts[inside] == 0))
        if (low, high) != (offset, offset + size - 1):
            problems.append(f"field {field['name']} of the {split.name} split has ids from {low} to {high}, expected "
                            f"[{offset}, {offset + size})")
        result["oov"][split.name] = num_oov / rows if rows and oov is not None else None
        if split.name != "train":
            result["new"][split.name] = num_new / rows if rows else None
    total = int(counts.sum(dtype=np.int64))
    result["seen"] = int(np.count_nonzero(counts))
    result["top"] = int(counts.max(initial=0)) / total if total else None
    return result


def usable_type(field, split, problems):
    """Whether the field's columns are there and of a type that the trainer's reader keeps; says where it does not."""
    kinds = {split.columns[column] for column in field["columns"] if column in split.columns}
    wrong = [kind for kind in kinds if not (pa.types.is_signed_integer(kind) or pa.types.is_uint8(kind))]
    if wrong:
        problems.append(f"field {field['name']} of the {split.name} split is of type {wrong[0]}, expected signed "
                        f"integers (petastorm drops unsigned ones); convert the data again")
    return bool(kinds) and not wrong and all(column in split.columns for column in field["columns"])


def add_counts(counts, ids):
    if len(counts) <= 8 * len(ids):
        counts += np.bincount(ids, minlength=len(counts)).astype(counts.dtype)
    else:  # a count of every id of a large table would take longer than sorting the few that are here
        found, times = np.unique(ids, return_counts=True)
        counts[found] += times.astype(counts.dtype)


def inspect(data_dir, table_sizes=None):
    """Everything that --json shows."""
    data_dir, problems = as_place(data_dir), []
    result = {"data_dir": str(data_dir), "problems": problems, "encoding": None, "splits": {}, "fields": []}
    if not data_dir.is_dir():
        problems.append(f"{data_dir} is not a folder; it should hold train/, val/ and test/")
        return result
    try:
        refuse_rows(data_dir)
    except UserError as error:
        problems.append(str(error))
        return result
    info = read_description(data_dir, problems)
    result["encoding"] = info.get("encoding")
    splits = {name: Split(data_dir / name, name, problems) for name in SPLITS}
    check_digests(data_dir, info.get("files"), splits, problems)
    fields = find_fields(info, splits, table_sizes, problems)
    result["splits"] = {name: inspect_split(split, info, problems) for name, split in splits.items()}
    for field in tqdm(fields, unit=" fields", leave=False, disable=not sys.stderr.isatty()):
        result["fields"].append(inspect_field(field, splits, problems))
    return result


# -------------------------------------------------------------------------------------------------------------- output


def percent(share):
    return "-" if share is None else f"{100 * share:.2f}"


def aligned(rows):
    """Lines of a table: the first column to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]


def field_row(field):
    name = field["name"] if len(field["name"]) <= LONGEST_NAME else field["name"][:LONGEST_NAME - 3] + "..."
    return [name, f"{field['table_size']:,}", f"{field['seen']:,}", percent(field["seen"] / field["table_size"]),
            percent(field["top"]), *(percent(field["oov"].get(split)) for split in SPLITS),
            *(percent(field["new"].get(split)) for split in SPLITS[1:]), f"{field['outside']:,}"]


def text_of(result):
    splits, fields = result["splits"], result["fields"]
    lines = aligned([["split", "rows", "label 1 %", "files", "row groups"]] + [
        [name, f"{split['rows']:,}", percent(split["label_rate"]), str(split["files"]), str(split["row_groups"])]
        for name, split in splits.items()]) if splits else []
    if fields:
        heads = ["field", "table size", "seen", "seen %", "top id %", "OOV % train", "val", "test", "new % val", "test",
                 "outside"]
        lines += ["", *aligned([heads, *map(field_row, fields)])]
        size, seen = (sum(field[name] for field in fields) for name in ("table_size", "seen"))
        lines += ["", f"{len(fields)} fields, encoding: {result['encoding'] or 'not known'}",
                  f"tables: {size:,} rows, {seen:,} seen in train; {size * VECTOR * ADAM * 4 / 2**20:,.1f} MiB "
                  f"with Adam's moments and --embedding_vec_size {VECTOR - 1}"]
    return "\n".join(lines)


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    parser.add_argument("data_dir", metavar="DATA_DIR", help="folder (or URL) with train/, val/ and test/ shards")
    parser.add_argument("--table_size_array", type=int_list,
                        help="rows of every field's table, comma-separated; only needed without dataset_info.json")
    parser.add_argument("--json", action="store_true", help="print a JSON object (with shares from 0 to 1) instead")
    return parser.parse_args(argv)


def show(args):
    """Print what was found; returns the exit status."""
    result = inspect(args.data_dir, args.table_size_array)
    text = json.dumps(result, indent=1) if args.json else text_of(result)
    if text:
        print(text, flush=True)
    for problem in result["problems"]:
        sys.stderr.write(f"error: {one_line(problem)}\n")
    if not args.json and not result["problems"]:
        print("nothing wrong")
    return 1 if result["problems"] else 0


def main(argv=None):
    args = parse_args(argv)
    return cli.run_tool(lambda: show(args))


if __name__ == "__main__":
    sys.exit(main())
