"""dataset_info.json and README.md of a dataset; growth: which dataset came out of which, and where its rows went."""

import json
from pathlib import Path

import numpy as np

from tools.converter.encoders import fingerprint
from tools.trainer.cli import UserError
from tools.trainer.dataset_info import INFO, LABEL, ROWS_INFO

FORMAT_VERSION = 2


def fields_info(fields):
    """Entries of dataset_info.json for Fields; offset = sum of the table sizes before it."""
    offsets = np.cumsum([0] + [field.table_size for field in fields])
    entries = []
    for field, offset in zip(fields, offsets):
        entry = {"name": field.name, "table_size": int(field.table_size), "offset": int(offset)}
        if field.columns != [field.name]:
            entry["columns"] = field.columns
        entries.append({**entry, "raw_column": field.raw_column, "encoding": field.encoding(),
                        "fingerprint": field.digest()})
    return entries


def dataset_info(fields, num_samples, raw, source, carried=(), digests=None, grown_from=(), files=None):
    """Contents of dataset_info.json.

    Args: fields: Fields; num_samples: {split: rows}; raw: how raw rows look; source: {"tool", "options", "encoding"};
    carried: columns that are not fields; digests: {split: digest of its rows}; grown_from: see `grown`; files: see
    `digests_of`.
    """
    return {
        "format_version": FORMAT_VERSION,
        "label": LABEL,
        "num_samples": {split: int(rows) for split, rows in num_samples.items()},
        "carried": list(carried),
        "fingerprint": fingerprint(fields),
        "digests": digests or {},
        "files": files or {},
        "grown_from": list(grown_from),
        "source": source,
        "raw": raw,
        "fields": fields_info(fields),
    }


def info_text(info):
    """README.md of a dataset: the same facts for people, with the flags that the trainer takes."""
    sizes = [field["table_size"] for field in info["fields"]]
    samples = info["num_samples"]
    columns = sum(len(field.get("columns", [1])) for field in info["fields"])
    splits = "\n".join(f"| {split} | {rows} |" for split, rows in samples.items())
    rows = "\n".join(f"| {f['name']} | {f['encoding']['kind']} | {f['table_size']} | {f['offset']} |"
                     for f in info["fields"])
    options = "\n".join(f"- {key}: {value}" for key, value in info["source"]["options"].items())
    flags = " ".join(f"--num_{split}_samples {rows}" for split, rows in samples.items())
    carried = f"\nCarried along, not used as features: {', '.join(info['carried'])}.\n" if info["carried"] else ""
    return f"""# Dataset

Made by {info["source"]["tool"]}, encoding: {info["source"]["encoding"]}.

| split | samples |
| --- | --- |
{splits}

Columns: `{info["label"]}` (float32), then {columns} columns of ids. Id = number within the field + offset of the
field, so the ids of all fields lie in 0 ... {sum(sizes) - 1}. How a raw value becomes an id stands in
dataset_info.json (fields, encoding); the tokens of a field with their ids and counts in vocabulary/FIELD.parquet.
{carried}
Flags for the trainer (it reads them from dataset_info.json when they are not given):

```
{flags} \\
--table_size_array {",".join(map(str, sizes))}
```

| field | kind | table size | offset |
| --- | --- | --- | --- |
{rows}

Options:

{options}
"""


def write_info(folder, info, show=False):
    """Write README.md and, last of all files of a dataset, dataset_info.json. Returns nothing; show also prints."""
    text = info_text(info)
    (Path(folder) / "README.md").write_text(text, encoding="utf-8")
    (Path(folder) / INFO).write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")
    if show:
        print(json.dumps(info, indent=2))
        print(text, flush=True)


def rows_info(info, num_samples, digests, label, carried, source, unknown=None, files=None):
    """Contents of _dataset_info.json of rows that were encoded as a dataset is: its own, with what is theirs."""
    source = {**source, "encoding": info["source"]["encoding"]}
    return {**info, "label": label, "num_samples": num_samples, "digests": digests, "files": files or {},
            "carried": list(carried), "unknown": unknown or {}, "source": source}


def write_rows_info(folder, content):
    (Path(folder) / ROWS_INFO).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


# -------------------------------------------------------------------------------------------------------------- growth


def grown(info):
    """The entry `grown_from` of a dataset that grows out of the one with this dataset_info.json: oldest first."""
    fields = {entry["name"]: {"table_size": entry["table_size"], "fingerprint": entry["fingerprint"],
                              "num_tokens": entry["encoding"].get("num_tokens")} for entry in info["fields"]}
    return [*info["grown_from"], {"fingerprint": info["fingerprint"], "fields": fields}]


def check_growth(old_info, encoder):
    """Raise a UserError unless the Encoder is a growth of the dataset that old_info (dataset_info.json) describes.

    Proven from the vocabularies: cut to as many tokens as it had then, every field has the fingerprint it had then.
    """
    if old_info["fingerprint"] == encoder.fingerprint:
        return
    chain = [entry["fingerprint"] for entry in encoder.info["grown_from"]]
    if old_info["fingerprint"] not in chain:
        raise UserError(f"the dataset with the fingerprint {encoder.fingerprint[:12]} did not grow out of the one with "
                        f"{old_info['fingerprint'][:12]}; make it with --base")
    fields = {field.name: field for field in encoder.fields}
    if [entry["name"] for entry in old_info["fields"]] != list(fields):
        raise UserError("the two datasets have other fields; a growth has the same fields in the same order")
    for entry in old_info["fields"]:
        if fields[entry["name"]].digest(entry["encoding"].get("num_tokens")) != entry["fingerprint"]:
            raise UserError(f"field {entry['name']} did not keep its ids: its vocabulary does not begin with the old "
                            "one; make the dataset again with --base")


def row_map(old_info, new_info):
    """Where the rows of the old tables are in the tables of a dataset that grew out of it.

    Args: contents of two dataset_info.json (see check_growth). Returns: int64 (ids of the old dataset): new global id
    of each old one. Out of vocabulary goes to out of vocabulary; all other ids keep their number within the field.
    """
    new_fields = {entry["name"]: entry for entry in new_info["fields"]}
    parts = []
    for old in old_info["fields"]:
        new = new_fields[old["name"]]
        ids = np.arange(old["table_size"], dtype=np.int64)
        if old["encoding"]["oov"] is not None:
            ids[old["encoding"]["oov"]] = new["encoding"]["oov"]
        parts.append(ids + new["offset"])
    return np.concatenate(parts)
