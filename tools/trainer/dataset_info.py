"""dataset_info.json, and the files that it describes: what converters write and the trainer and tools read.

Needs nothing beyond the standard library, so that score_onnx.py runs where there is no OneFlow.
"""

from tools.trainer.cli import UserError, shorten
from tools.trainer.files import checksum, count, read_json
from tools.trainer.places import as_place

LABEL = "Label"
SPLITS = ("train", "val", "test")
INFO, ROWS_INFO = "dataset_info.json", "_dataset_info.json"  # of a dataset; of rows that encode_rows.py made
ADVICE = "convert the data again"


def size(value):
    """A schema: a number of rows that can be meant."""
    return count(value) and 0 < value <= 2**40


SCHEMA = {  # what all versions have; format 2 also says how raw values become ids
    "format_version?": lambda version: version in (1, 2), "fingerprint?": (str, None),
    "fields": [{"name": str, "table_size": size, "offset": count, "columns?": [str]}],
    "files?": {"*": {"bytes": count, "crc32": count}}}  # by path within DATA_DIR
OF_SPLITS = {**SCHEMA, "num_samples": dict.fromkeys(SPLITS, size)}  # of a dataset that is trained on


def read_info(folder, name=INFO, schema=SCHEMA):
    """Contents of a dataset_info.json, checked as far as the schema and the offsets go. Raises: UserError"""
    path = as_place(folder) / name
    if not path.exists():
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
    """The entry "files": of all shards of a dataset. They are read once more, from memory if they were just written."""
    shards = {f"{split}/{path.name}": path for split in SPLITS for path in parquet_files(as_place(data_dir) / split)}
    return {name: digest_of(path) for name, path in shards.items()}
