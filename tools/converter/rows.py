"""A block of raw rows -> rows of tokens, or of ids: the work that both engines hand to their workers."""

from collections import namedtuple

import numpy as np
import pyarrow as pa

from tools.converter.splits import TRAIN
from tools.converter.spool import RowLayout, shares_of, shuffle_keys
from tools.converter.values import LABELS, BadValue, as_labels, number_problem
from tools.trainer.dataset_info import SPLITS

SAMPLE_ROWS = 1 << 18  # rows of which quantiles are taken
SAMPLE_SEED = 7  # any number; not the user's, so that borders do not depend on the order of the train rows

Rows = namedtuple("Rows", "rows splits carried counted")
Rows.__doc__ = """A parsed block. rows (n): see RowLayout; splits: int8 (n), or one number for all; carried: Table (n)
or None; counted: per counted field (tokens, counts, texts) of its train rows, or None."""


class RowMaker:
    """What becomes of a raw row. Workers get a copy of it.

    Args:
        fields: list of Field. label: raw column, or None. carried: {name in the shards: raw column}.
        rule: see splits.py. num_rows: rows of all inputs (sets the share that is sampled for quantiles).
        counting: whether tokens are to be counted.
    """

    def __init__(self, fields, label, carried, rule, counting):
        self.fields, self.label, self.carried, self.rule = fields, label, carried, rule
        self.counting, self.num_rows = counting, 0
        self.layout = RowLayout([field.dtype for field in fields for _ in field.columns])

    def types(self, labelled=True):
        """{raw column: type in which a text file's cells are read}"""
        types = {self.label: pa.string()} if self.label is not None and labelled else {}
        for field in self.fields:
            # fields that read one column in two ways start from its text
            types[field.raw_column] = field.raw_type if types.get(field.raw_column, field.raw_type) == field.raw_type \
                else pa.string()
        types.update({column: pa.string() for column in self.carried.values()})
        return {**{column: pa.string() for column in self.rule.columns}, **types}

    def problem(self, cells):
        """What is wrong with the cells {raw column: text} of a line, or None."""
        if self.label in cells and cells[self.label] not in LABELS:
            return f"label {cells[self.label]!r}, expected 0 or 1"
        for field in self.fields:
            found = cell_problem(field, cells[field.raw_column])
            if found:
                return f"{field.raw_column} is {cells[field.raw_column]!r}, expected {found}"
        return None

    def read(self, raw, block):
        """(Table of the columns that are needed, labels int8 or None). Raises: UserError"""
        labelled = self.label in raw.columns
        table = raw.table(block, self.types(labelled), self.problem)
        return table, self._checked(raw, block, self.label, as_labels, table.column(self.label)) if labelled else None

    def _checked(self, raw, block, column, convert, *values):
        """convert(*values); a value that it refuses is named with its place."""
        try:
            return convert(*values)
        except BadValue as error:
            raw.check_lines(block, self.problem)  # has the text as it stands in the file
            error.column = column
            raise raw.bad_value(block, error) from None

    def _tokens(self, raw, block, field, table):
        return self._checked(raw, block, field.raw_column, field.tokens, table.column(field.raw_column))

    def splits(self, raw, block, table, first_row, file_split):
        """Index into SPLITS of each row: int8 (n), or one number for all."""
        column = self.rule.columns[0] if self.rule.columns else None
        return self._checked(raw, block, column, self.rule.splits, table, first_row, file_split)

    def count_splits(self, raw, block, first_row, file_split):
        """Rows of each split in a block, by looking at what the rule needs only: int64 (splits)."""
        types = {column: self.types()[column] for column in self.rule.columns}
        table = raw.table(block, types, lambda cells: None)
        splits = self.splits(raw, block, table, first_row, file_split)
        return np.bincount(np.broadcast_to(splits, block.rows), minlength=len(SPLITS))

    def make(self, raw, block, first_row, file_split):
        """Rows of a block; first_row: number of its first row over all inputs."""
        table, labels = self.read(raw, block)
        splits = self.splits(raw, block, table, first_row, file_split)
        train = splits == TRAIN if np.ndim(splits) else np.full(len(labels), splits == TRAIN)
        columns, counted = [], []
        for field in self.fields:
            tokens, texts = self._tokens(raw, block, field, table)
            columns += tokens
            if self.counting and field.counted:
                chosen = train & self.sampled(first_row, len(labels)) if field.sampled else train
                counted.append(field.count_tokens([column[chosen] for column in tokens], texts))
        rows = self.layout.pack(labels, columns)
        return Rows(rows, splits, self.carried_of(table), counted if train.any() else None)

    def encode(self, raw, block, unknown, first=0, end=None):
        """(labels or None, local ids per column, carried) of a block (its rows from first to end) with known fields."""
        table, labels = self.read(raw, block)
        if first or end is not None:
            end = table.num_rows if end is None else end
            table, labels = table.slice(first, end - first), None if labels is None else labels[first:end]
        ids = []
        for number, field in enumerate(self.fields):
            for tokens in self._tokens(raw, block, field, table)[0]:
                ids.append(field.local_ids(tokens))
                unknown[number] += field.unknown(tokens, ids[-1])
        return labels, ids, self.carried_of(table)

    def sampled(self, first_row, count):
        """Which rows are looked at for quantiles; it depends on the rows' numbers only."""
        if self.num_rows <= SAMPLE_ROWS:
            return np.ones(count, bool)
        keys = shuffle_keys(np.arange(first_row, first_row + count), SAMPLE_SEED)
        return shares_of(keys) < SAMPLE_ROWS / self.num_rows

    def carried_of(self, table):
        if not self.carried:
            return None
        return pa.table({name: table.column(column) for name, column in self.carried.items()})

    def unpack(self, rows):
        """Rows as RowLayout has them -> (labels, local ids per column)."""
        labels, columns = self.layout.unpack(rows)
        fields = [field for field in self.fields for _ in field.columns]
        return labels, [field.local_ids(column) for field, column in zip(fields, columns)]


def cell_problem(field, text):
    """What was expected instead of a cell's text, or None where it is right."""
    if field.raw_type != pa.string():
        return number_problem(field.raw_type, text)
    try:
        field.tokens(pa.array([text]))
        return None
    except BadValue as error:
        return error.expected
