"""Rows on which an exported model is compared with the trainer: ids, and raw values that become these ids."""

import numpy as np
import pyarrow as pa

from tools.converter.raw import RawParquet
from tools.serving.onnx_graph import steps_of
from tools.serving.rows import IdRows, dataset_info_of
from tools.trainer import checkpoints
from tools.trainer.cli import UserError, first_line
from tools.trainer.dataset_info import parquet_files
from tools.trainer.places import as_place

UNKNOWN = "\x7fnot in any vocabulary"


def rows_to_compare(predictor, data_dir, encoder, limit):
    """(ids int64 (n, C), Table of raw columns or None without an encoder, text on where they are from)

    data_dir: dataset, or None for the one of the training run, where it is still there.
    """
    model = predictor.model
    place = data_dir or checkpoints.read_checkpoint(model.folder).get("data", {}).get("dir")
    try:
        ids = first_rows(as_place(place) / "val", model, limit) if place else None
        where = f"{len(ids)} rows of {as_place(place) / 'val'}" if place else None
    except (UserError, OSError) as error:
        if data_dir:
            raise UserError(f"--data_dir {data_dir} cannot be compared on: {first_line(error)}") from None
        ids = None  # moved, or replaced since
    if ids is None:
        rng = np.random.default_rng(0)
        low, high = model.offsets[model.field_of], model.offsets[model.field_of + 1]
        ids = rng.integers(low, high, (min(limit, 10000), len(low)))
        where = f"{len(ids)} rows drawn at random"
    if encoder is None:
        return ids, None, where
    table = raw_values(encoder, ids)
    return encoder.encode(table).astype(np.int64), table, where


def first_rows(folder, model, limit):
    """Ids int64 (at most limit, C) of shards. Raises: UserError where they are none of the model's data."""
    raws = [RawParquet(path) for path in parquet_files(folder)]
    parts, rows = [], 0
    for ids, *_ in IdRows(raws, dataset_info_of(folder), None, model, (), "error").blocks():
        parts.append(ids)
        rows += len(ids)
        if rows >= limit:
            break
    if not rows:
        raise UserError(f"{folder} has no rows")
    return np.concatenate(parts)[:limit]


def raw_values(encoder, ids):
    """Table of raw columns with values that have the ids, where their field has one for them; (n, C) global ids."""
    columns, place, rng = {}, 0, np.random.default_rng(0)
    for field in encoder.fields:
        local = ids[:, place:place + len(field.columns)] - encoder.offsets[field.name]
        place += len(field.columns)
        columns[field.raw_column] = VALUES[field.kind](field, local, rng)
    return pa.table(columns)


def texts(field, local, rng):
    known = np.array([UNKNOWN] * field.first_id + field.vocabulary.texts.to_pylist() + [UNKNOWN], object)[local]
    if field.length is None:
        return pa.array(known[:, 0], pa.string())
    lists = [[text for text, number in zip(row, numbers) if number] for row, numbers in zip(known, local)]
    return pa.array([field.separator.join(row) for row in lists] if field.separator else lists)


def numbers(field, local, rng):
    """A value of the step of each id, the first, the last or one between; missing values where no step has the id."""
    borders, step_ids = steps_of(field)
    borders = borders[np.isfinite(borders)]
    step_ids = step_ids[:len(borders) + 1]
    low = np.concatenate([[(borders[0] if len(borders) else 0) - 5], borders])
    high = np.concatenate([borders, [(borders[-1] if len(borders) else 0) + 5]])
    order = np.argsort(step_ids, kind="stable")
    places = np.searchsorted(step_ids[order], local[:, 0]).clip(max=len(order) - 1)
    step = order[places]
    found = step_ids[step] == local[:, 0]
    last = np.nextafter(high, -np.inf) if field.kind == "quantile" else high - 1
    between = rng.integers(0, 3, len(step))
    values = np.choose(between, [low[step], last[step], np.floor((low[step] + last[step]) / 2)])
    values = np.where(values < low[step], low[step], values)
    if field.kind == "bucket" and not field.own_missing:
        return pa.array(values.astype(np.int64), mask=~found)
    return pa.array(values, mask=~found)


def remainders(field, local, rng):
    return pa.array(local[:, 0] + field.modulus * rng.integers(0, 5, len(local)))


VALUES = {"category": texts, "bucket": numbers, "quantile": numbers, "modulus": remainders}
