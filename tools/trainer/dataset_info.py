"""dataset_info.json, and the files that it describes: what converters write and the trainer and tools read.

Needs nothing beyond the standard library, so that score_onnx.py runs where there is no OneFlow.
"""

import keyword
import re
import unicodedata

from tools.trainer.cli import UserError, shorten
from tools.trainer.files import checksum, count, read_json
from tools.trainer.places import as_place, is_url

LABEL = "Label"
SPLITS = ("train", "val", "test")
INFO, ROWS_INFO = "dataset_info.json", "_dataset_info.json"  # of a dataset; of rows that encode_rows.py made
ADVICE = "convert the data again"


def size(value):
    """A schema: a number of rows that can be meant."""
    return count(value) and 0 < value <= 2**40


def is_readable(name):
    """Whether petastorm can read a column of this name: an identifier of Python, which takes names as NFKC has them."""
    return (name.isidentifier() and unicodedata.normalize("NFKC", name) == name and not keyword.iskeyword(name)
            and not name.startswith("_"))


def field_name(value):
    """A schema: it is part of a file's name."""
    return isinstance(value, str) and value.isprintable() and value not in ("", ".", "..") and "/" not in value


def vocabulary_name(value):
    """A schema: a path that does not lead out of the dataset."""
    return isinstance(value, str) and value.isprintable() and re.fullmatch("vocabulary/[^/]+", value) is not None


def positive(value):
    """A schema: a whole number from 1 to 2^60."""
    return count(value) and value > 0


def border(value):
    """A schema: a number that is not NaN or infinite."""
    return type(value) in (int, float) and abs(value) <= 1.8e308


ENCODING = {  # of a field in format 2; each kind has some of these
    "kind": str, "first_id?": count, "missing?": {"id": (count, None)}, "oov?": (count, None), "min_count?": positive,
    "num_tokens?": count, "vocabulary?": vocabulary_name, "own_missing?": bool, "num_bins?": positive,
    "borders?": [border], "modulus?": positive, "base?": lambda base: base in (10, 16), "table_size?": size,
    "list?": {"length": lambda length: count(length) and 0 < length <= 1000,
              "separator": (lambda text: isinstance(text, str) and text != "", None)}}
FIELD = {"name": field_name, "table_size": size, "offset": count, "columns?": [str], "raw_column?": str,
         "fingerprint?": str, "encoding?": ENCODING}
RAW = {"columns?": [str], "label?": (str, None), "carried?": ({"*": str}, None), "header?": (bool, None),
       "separator?": (str, None), "quotes?": bool}  # how raw rows look
GROWN = {"fingerprint": str, "fields": {"*": {"table_size": size, "fingerprint": str, "num_tokens": (count, None)}}}
SCHEMA = {  # what all versions have; format 2 also says how raw values become ids
    "format_version?": lambda version: version in (1, 2), "fingerprint?": (str, None), "fields": [FIELD],
    "raw?": RAW, "grown_from?": [GROWN],
    "files?": {"*": {"bytes": count, "crc32": count}}}  # by path within DATA_DIR
OF_SPLITS = {**SCHEMA, "num_samples": dict.fromkeys(SPLITS, size)}  # of a dataset that is trained on


def refuse_rows(folder):
    """Raise a UserError where a dataset is expected and the folder holds rows of encode_rows.py."""
    if (as_place(folder) / ROWS_INFO).exists() and not (as_place(folder) / INFO).exists():
        raise UserError(f"{folder} holds rows that tools/encode_rows.py encoded, not a dataset with train/, val/ and "
                        f"test/; score them with deepfm_train_eval.py --predict {folder}, or give the dataset's folder")


def read_info(folder, name=INFO, schema=SCHEMA):
    """Contents of a dataset_info.json, checked as far as the schema and the offsets go. Raises: UserError"""
    path = as_place(folder) / name
    if not path.exists():
        refuse_rows(folder)
        raise UserError(f"no {name} in {folder}; give a folder that a converter made")
    info = read_json(path, schema, ADVICE)
    names, offset = [field["name"] for field in info["fields"]], 0
    for field in info["fields"]:
        if field["offset"] != offset:
            raise UserError(f"{path} gives {field['name']} the offset {field['offset']}, but the tables before it have "
                            f"{offset} rows; {ADVICE}")
        offset += field["table_size"]
    if not names or len(set(names)) < len(names) or LABEL in names:
        raise UserError(f"{path} names the fields {shorten(names)}, expected names that differ, none of them {LABEL}; "
                        f"{ADVICE}")
    return info


def parquet_files(folder):
    """The *.parquet files in a folder (a path or a place), in order of their names: list of places.

    Raises: UserError when there is none, or one of that name is no file.
    """
    folder = as_place(folder)
    found = {path.name: path for path in (folder.iterdir() if folder.is_dir() else ())}
    paths = [found[name] for name in sorted(found) if name.endswith(".parquet") and name[0] not in "._"]
    for path in paths:
        if not path.is_file():
            raise UserError(f"{path} is {'a folder' if path.is_dir() else 'not a regular file'}, expected a "
                            f"parquet file; put the files that Spark wrote into such a folder directly into {folder}")
    if not paths:
        raise UserError(f"no *.parquet files in {folder}; convert data with tools/table_to_parquet.py, say, or check "
                        "--data_dir")
    return paths


def digest_of(path):
    """A file's entry under "files"."""
    return {"bytes": as_place(path).stat().st_size, "crc32": checksum(path)}


def digests_of(data_dir):
    """The entry "files": of all shards and vocabularies of a dataset.

    They are read once more, from memory if they were just written.
    """
    data_dir = as_place(data_dir)
    names = [f"{split}/{path.name}" for split in SPLITS for path in parquet_files(data_dir / split)]
    if (data_dir / "vocabulary").is_dir():
        names += sorted(f"vocabulary/{path.name}" for path in (data_dir / "vocabulary").iterdir())
    return {name: digest_of(data_dir / name) for name in names}


def check_file(folder, name, files):
    """Raise a UserError where a file of a dataset is not the one that "files" of dataset_info.json speaks of.

    A file that it does not know passes, and all in a store, which has checksums of its own.
    """
    path = as_place(folder) / name
    if name not in (files or {}) or is_url(path):
        return
    try:
        if digest_of(path) == files[name]:
            return
        problem = "was changed or damaged since dataset_info.json was written"
    except OSError as error:
        problem = f"cannot be read ({error.strerror})"
    raise UserError(f"{path} {problem}; copy or convert the data again")
