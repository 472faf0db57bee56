"""Probabilities of rows of any form: into a file, or from Python. `trainer` is a Trainer with a checkpoint's model."""

from contextlib import ExitStack, closing

import numpy as np
import pyarrow as pa

from tools.converter.values import BadValue
from tools.serving.output import prediction_file
from tools.serving.rows import Model, load_encoder, open_rows, outside
from tools.trainer import checkpoints
from tools.trainer.batches import Batch, RowStream, no_rows, share_of
from tools.trainer.cli import UserError
from tools.trainer.processes import from_rank0, print_rank0, progress_bar, rank, world_size
from tools.trainer.startup import check_thread


def model_of(trainer):
    """What rows have to fit."""
    folder, dataset = trainer.args.model_load_dir, trainer.dataset
    fingerprint = from_rank0(checkpoints.read_checkpoint, folder).get("data", {}).get("fingerprint")
    return Model(folder, dataset.fields, dataset.columns, np.array(dataset.field_of), dataset.offsets, fingerprint,
                 not trainer.args.skip_checksums)


def batches_of(blocks, dataset, batch_size):
    """Yield (this process's Batch, Table of the kept columns or None) for blocks (ids (n, C)[, Table])."""
    stream = RowStream(blocks)
    while stream.fill(1):
        parts = stream.take(batch_size)
        rows = [(ids, np.zeros(len(ids), np.float32)) for ids, *_ in parts]
        kept = pa.concat_tables([block[1] for block in parts]) if len(parts[0]) > 1 else None
        count = sum(len(ids) for ids, _ in rows)
        local = share_of(rows, batch_size, rank(), world_size()) or [no_rows(dataset)]
        yield Batch(local, batch_size // world_size(), count, dataset.num_ids), kept


def write_predictions(trainer):
    """Score the rows of --predict, in their order and as they come, and write the probabilities to --predict_output."""
    args = trainer.args
    rows = open_rows(args.predict, model_of(trainer), args.keep_columns or [], args.unknown_ids)
    done = 0
    with ExitStack() as stack:
        bar = stack.enter_context(closing(progress_bar(None, " rows", "predict")))
        file = stack.enter_context(prediction_file(args.predict_output, rows.kept)) if rank() == 0 else None
        for probs, kept in trainer.probabilities(batches_of(rows.blocks(), trainer.dataset, args.batch_size)):
            if file:
                file.write(probs, kept)
            done += len(probs)
            bar.update(len(probs))
    print_rank0(rows.summary())
    print_rank0(f"Wrote {done} probabilities to {args.predict_output}")


class Predictor:
    """A trained model for use from Python; `deepfm_train_eval.load` makes one.

    Attributes: columns (names of the columns of ids, in order), raw_columns (names of the raw columns, None where the
    model does not know how its data was encoded).
    """

    def __init__(self, trainer):
        self.trainer, self.model = trainer, model_of(trainer)
        self.encoder = load_encoder(self.model.folder, self.model.checksums)
        self.columns = self.model.columns
        self.raw_columns = list(self.encoder.raw_columns) if self.encoder else None

    def predict(self, rows):
        """Probabilities float32 (n,), equal to those of --predict.

        rows: ids, integers (n, C), or raw columns: a pandas DataFrame, a pyarrow Table or {name: values}.
        It works in the thread that imported OneFlow only. Raises: ValueError for ids outside their tables and values
        that a column cannot have; UserError where columns are missing or raw rows cannot be encoded.
        """
        check_thread()
        raw = isinstance(rows, (dict, pa.Table, pa.RecordBatch)) or hasattr(rows, "columns")
        ids = self.encode(rows) if raw else self.checked(np.asarray(rows))
        batches = batches_of([(ids,)] if len(ids) else [], self.trainer.dataset, self.trainer.args.batch_size)
        parts = [probs for probs, _ in self.trainer.probabilities(batches)]
        return np.concatenate(parts) if parts else np.empty(0, np.float32)

    def encode(self, rows):
        """Raw rows -> ids int64 (n, C)"""
        if self.encoder is None:
            raise UserError(f"{self.model.folder} does not know how to encode raw rows: its data was made by an older "
                            "version; give ids")
        try:
            return self.encoder.encode(rows).astype(np.int64)
        except BadValue as error:
            raise ValueError(f"row {error.row}: {error.column} is {error.value}, expected {error.expected}") from None

    def checked(self, ids):
        if ids.ndim != 2 or ids.shape[1] != len(self.columns) or ids.dtype.kind not in "iu":
            raise ValueError(f"ids of shape {ids.shape} and type {ids.dtype}, expected integers of shape (n, "
                             f"{len(self.columns)})")
        ids = ids.astype(np.int64)
        wrong = outside(ids, self.model)
        if wrong.any():
            row, column = np.argwhere(wrong)[0]
            low, high = self.model.offsets[self.model.field_of[column]:][:2]
            raise ValueError(f"row {row}: {self.columns[column]} is {ids[row, column]}, expected [{low}, {high})")
        return ids
