"""Rows to score, of any form: shards of ids, or raw rows (text or parquet), which are encoded on the way.

What is what: text is raw. Parquet files are ids where a converter left dataset_info.json or _dataset_info.json with
them, or where all columns of ids are there and hold ids of their tables, if they have rows; else raw.
"""

import os
from collections import namedtuple

import numpy as np
import pyarrow as pa
import pyarrow.types as kinds

from tools.converter.convert import format_of
from tools.converter.encoders import Encoder
from tools.converter.info import check_growth, row_map
from tools.converter.raw import RawFormat, list_files, open_raw
from tools.converter.rows import RowMaker
from tools.converter.splits import ByFile
from tools.serving.output import kept_schema
from tools.trainer import checkpoints
from tools.trainer.checkpoints import ENCODER, find_folder
from tools.trainer.cli import UserError, shorten
from tools.trainer.dataset_info import INFO, ROWS_INFO, SPLITS, check_file, read_info
from tools.trainer.places import as_place

ANY_TEXT = RawFormat(None, True)  # enough to tell text from parquet

Model = namedtuple("Model", "folder fields columns field_of offsets fingerprint checksums")
Model.__doc__ = """What rows have to fit: a checkpoint's folder, its fields, its columns of ids with the number of the
field of each (int64 (C)), offsets of the tables, fingerprint or None; checksums: whether files are compared with
them."""


def load_encoder(folder, checksums=True):
    """The Encoder in a checkpoint, or None where its data had none. Raises: UserError where it is not whole."""
    state, path = checkpoints.read_checkpoint(folder), os.path.join(find_folder(folder), ENCODER)
    if checksums:
        checkpoints.check_encoder(folder, state)
    if not os.path.isdir(path):
        return None
    encoder, model = Encoder.load(path), state["model"]
    sizes = [field.table_size for field in encoder.fields]
    lists = {field.name: field.columns for field in encoder.fields if field.columns != [field.name]}
    if ([field.name for field in encoder.fields], sizes, lists) != (
            model["fields"], model["table_sizes"], model.get("lists", {})) or (
            encoder.fingerprint != state.get("data", {}).get("fingerprint", encoder.fingerprint)):
        raise UserError(f"{path} does not encode rows as the data of the checkpoint was encoded; "
                        f"{checkpoints.USE_ANOTHER}")
    return encoder


def open_rows(path, model, keep=(), unknown=None):
    """IdRows or RawRows of a file or folder.

    keep: names of columns to hand through; unknown: "error" or "oov" for values that the model does not know, None for
    what is usual: an error for ids, out of vocabulary for raw values. Raises: UserError
    """
    files = list_files(path)
    found = find_info(path)
    info = read_info(*found) if found else None
    if found and model.checksums:
        check_rows(files, info, found[0])
    encoder = load_encoder(model.folder, model.checksums)
    form = format_of(encoder.info, unlabelled=True) if encoder else ANY_TEXT
    raws = [open_raw(file, form) for file in files]
    if any(raw.is_text for raw in raws) or info is None and not all(holds_ids(raw, model) for raw in raws):
        return RawRows(raws, encoder, model, keep, unknown or "oov")
    return IdRows(raws, info, encoder, model, keep, unknown or "error")


def find_info(path):
    """(folder, name) of the dataset_info.json of the dataset that shards of ids belong to, or None."""
    path = as_place(path).absolute()
    folder = path if path.is_dir() else path.parent
    there = [(folder, ROWS_INFO), (folder, INFO)]
    there += [(folder.parent, INFO)] if folder.name in SPLITS else []  # another folder there may hold anything
    return next(((folder, name) for folder, name in there if (folder / name).exists()), None)


def dataset_info_of(path):
    """Contents of that dataset_info.json, or None where there is none."""
    found = find_info(path)
    return read_info(*found) if found else None


def check_rows(files, info, there):
    """Compare files of ids with what the dataset_info.json in the folder `there` says of them. Raises: UserError"""
    for file in files:
        name = str(file.absolute())[len(str(there)) + 1:]
        check_file(there, name, info.get("files"))


def holds_ids(raw, model):
    """Whether the columns of ids are there, of integers, and the first rows hold ids of their tables."""
    if raw.is_text or not all(name in raw.columns and kinds.is_integer(raw.types[name]) for name in model.columns):
        return False
    block = next(raw.blocks(model.columns), None)
    return block is None or not outside(ids_of(block.data, model), model).any()


def ids_of(batch, model):
    """int64 (n, C) of a RecordBatch; what is missing is -1."""
    columns = [batch.column(name) for name in model.columns]
    columns = [column.cast(pa.int64(), safe=False) for column in columns]  # what is beyond is negative then
    return np.stack([(column.fill_null(-1) if column.null_count else column).to_numpy() for column in columns], axis=1)


def outside(ids, model):
    """bool (n, C): which ids are not of their field's table."""
    return (ids < model.offsets[model.field_of]) | (ids >= model.offsets[model.field_of + 1])


class IdRows:
    """Rows that are ids already. kept: pyarrow schema of the columns to keep."""

    def __init__(self, raws, info, encoder, model, keep, unknown):
        self.raws, self.encoder, self.model, self.keep, self.unknown = raws, encoder, model, list(keep), unknown
        for raw in raws:
            raw.check_columns(model.columns)
            wrong = [name for name in model.columns if not kinds.is_integer(raw.types[name])]
            if wrong:
                raise UserError(f"column {wrong[0]} of {raw.path} is of type {raw.types[wrong[0]]}, expected integers")
        self.kept = kept_schema(raws, keep)
        self.places = self.old_ids(info)

    def old_ids(self, info):
        """int64 (ids of the rows' dataset): id for the model, where the dataset grew since; None where it is the same.

        Raises: UserError where the rows were encoded with another vocabulary.
        """
        known = self.model.fingerprint
        if info is None or None in (known, info.get("fingerprint")) or info["fingerprint"] == known:
            return None
        if known not in [entry["fingerprint"] for entry in info.get("grown_from", [])]:
            raise UserError(f"{self.raws[0].path} was encoded with another vocabulary than the rows that the model was "
                            "trained on; encode the raw rows with tools/encode_rows.py and the model's dataset, or "
                            "give the raw rows")
        if self.unknown == "error":
            raise UserError(f"{self.raws[0].path} is of a dataset that has grown since the model was trained; add "
                            "--unknown_ids oov to score its new tokens as out-of-vocabulary")
        folder, name = find_info(self.raws[0].path)
        if name == INFO and (folder / "vocabulary").is_dir():  # encode_rows.py leaves none with its rows
            check_growth(self.encoder.info, Encoder.load(folder))
        places = np.full(sum(field["table_size"] for field in info["fields"]), -1, np.int64)
        moved = row_map(self.encoder.info, info)
        places[moved] = np.arange(len(moved))
        return places

    def blocks(self):
        """Yield (ids (n, C)[, Table of the kept columns]). Raises: UserError for ids that the model does not know."""
        row = 0
        for raw in self.raws:
            for block in raw.blocks([*self.model.columns, *self.keep]):
                ids = ids_of(block.data, self.model)
                if self.places is not None:
                    ids = np.where((ids >= 0) & (ids < len(self.places)), self.places[ids % len(self.places)], -1)
                yield (self.known(ids, raw, row), *self.kept_of(block))
                row += block.rows

    def summary(self):
        return "Rows of ids"

    def kept_of(self, block):
        return [pa.Table.from_batches([block.data]).select(self.keep).cast(self.kept)] if self.keep else []

    def known(self, ids, raw, row):
        """ids with those outside their tables made out-of-vocabulary, or refused."""
        wrong = outside(ids, self.model)
        if not wrong.any():
            return ids
        place, column = np.argwhere(wrong)[0]
        oov = [field.oov for field in self.encoder.fields] if self.encoder else [None] * len(self.model.fields)
        replaceable = all(oov[self.model.field_of[c]] is not None for c in np.flatnonzero(wrong.any(axis=0)))
        if self.unknown == "error" or not replaceable:
            advice = "add --unknown_ids oov, or give the raw rows" if replaceable else "give rows of the model's data"
            raise UserError(f"{raw.path}: column {self.model.columns[column]} has ids outside its table, the first in "
                            f"row {row + place} (counted from 0); {advice}")
        fields = self.model.field_of
        filled = self.model.offsets[fields] + np.array([oov[field] or 0 for field in fields])
        return np.where(wrong, filled, ids)


class RawRows:
    """Raw rows, encoded as the model's data was. kept: pyarrow schema; unknown values are counted as they pass."""

    def __init__(self, raws, encoder, model, keep, unknown):
        if encoder is None:
            raise UserError(f"{raws[0].path} has raw rows, but {model.folder} does not know how to encode them: its "
                            "data was made by an older version; give shards of ids")
        self.raws, self.encoder, self.keep, self.unknown = raws, encoder, list(keep), unknown
        self.maker = RowMaker(encoder.fields, None, {name: name for name in keep}, ByFile(), counting=False)
        for raw in raws:
            raw.check_columns(list(encoder.raw_columns))
        self.kept = kept_schema(raws, keep)
        self.unknown_counts = np.zeros(len(encoder.fields), np.int64)
        self.offsets = np.array([encoder.offsets[field.name] for field in encoder.fields for _ in field.columns])

    def blocks(self):
        """Yield (ids (n, C)[, Table of the kept columns]). Raises: UserError"""
        self.unknown_counts[:] = 0
        for raw in self.raws:
            for block in raw.blocks(None if raw.is_text else [*self.encoder.raw_columns, *self.keep]):
                _, ids, kept = self.maker.encode(raw, block, self.unknown_counts)
                if self.unknown == "error" and self.unknown_counts.any():
                    raise UserError(f"{raw.path} has values that the model does not know ({self.unknown_text()}); "
                                    "leave --unknown_ids out to score them as out-of-vocabulary")
                yield (np.stack(ids, axis=1) + self.offsets, *([kept.cast(self.kept)] if self.keep else []))

    def unknown_text(self):
        """'user_id 31, item_id 2 (2)', of the fields that have any"""
        found = [f"{field.name} {number}" for field, number in zip(self.encoder.fields, self.unknown_counts) if number]
        return shorten(found) if found else "none"

    def summary(self):
        return f"Raw rows, encoded as the model's data was; values that it does not know: {self.unknown_text()}"
