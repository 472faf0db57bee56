"""A file of predictions, written as the rows come, that has its name only when it is whole."""

import os
from contextlib import contextmanager

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from tools.converter.raw import kept_type
from tools.trainer.cli import UserError
from tools.trainer.files import replaced_file

PROBABILITY = "probability"  # name of the first column


def kept_schema(raws, keep):
    """pyarrow schema of the columns `keep` of raw files, which are written behind the probability. Raises: UserError"""
    names = [PROBABILITY, *keep]
    twice = [name for name in keep if names.count(name) > 1]
    if twice:
        raise UserError(f"--keep_columns: the output would have two columns {twice[0]}; name each column once, none of "
                        f"them {PROBABILITY}")
    for raw in raws:
        raw.check_columns(keep)
    return pa.schema([(name, kept_type(raws, name, "--keep_columns", similar=True)) for name in keep])


def prediction_schema(kept):
    return pa.schema([pa.field(PROBABILITY, pa.float32()), *kept])


def rows_table(schema, probs, kept):
    """Table of probs float32 (n,) and of kept, a Table (n) or None."""
    return pa.Table.from_arrays([pa.array(probs), *(kept.columns if kept is not None else [])], schema=schema)


def csv_writer(file, schema, name):
    """pyarrow's CSVWriter to a path or file that messages call `name`. Raises: UserError for lists, say."""
    try:
        return pa_csv.CSVWriter(file, schema, write_options=pa_csv.WriteOptions(quoting_style="needed"))
    except pa.ArrowException as error:
        raise UserError(f"{name} is CSV, which cannot take the columns to keep ({error}); write parquet") from None


class PredictionFile:
    """What prediction_file gives. Attributes: schema, rows (written so far)."""

    def __init__(self, writer, schema):
        self.writer, self.schema, self.rows = writer, schema, 0

    def write(self, probs, kept):
        """probs float32 (n,); kept: Table (n) or None."""
        self.writer.write_table(rows_table(self.schema, probs, kept))
        self.rows += len(probs)


@contextmanager
def prediction_file(path, kept):
    """Context manager: a PredictionFile, which has its name when it is whole.

    Parquet, or CSV where the name ends in .csv: column `probability` (float32), then the columns that are kept.
    """
    schema = prediction_schema(kept)
    with replaced_file(path) as part, (csv_writer(part, schema, path) if path.lower().endswith(".csv")
                                       else pq.ParquetWriter(part, schema)) as writer:
        yield PredictionFile(writer, schema)


def check_suffix(path, option="--predict_output"):
    """Raise a UserError for a name that promises another format than CSV or parquet."""
    suffix = os.path.splitext(path)[1]
    if suffix.lower() not in ("", ".csv", ".parquet", ".pq"):
        raise UserError(f"{option} {path} ends in {suffix}; end it in .csv or in .parquet")


def check_output(path, overwrite, option="--predict_output", inputs=()):
    """Raise a UserError where a file cannot be written under a name. inputs: files or folders that are read."""
    if path != path.encode("utf-8", "replace").decode("utf-8"):
        raise UserError(f"{option} {path} has bytes that are not UTF-8; use a name without them")
    if os.path.isdir(path):
        raise UserError(f"{option} {path} is a folder; name a file in it")
    if os.path.lexists(path) and not overwrite:
        raise UserError(f"{option} {path} exists already; name another file or add --overwrite")
    place = os.path.realpath(path)
    for read in map(str, inputs):
        if os.path.lexists(path) and os.path.commonpath([os.path.realpath(read), place]) == os.path.realpath(read):
            raise UserError(f"{option} {path} is part of the input {read}; name another file")
