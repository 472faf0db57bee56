"""Which split a row belongs to: by its file, by folds, by chance, by time, or by group.

A rule has `columns` (raw columns that it looks at) and `splits(table, first_row, file_split)`: int8 array (n) with the
index into SPLITS of each row of a block, or one number for all. first_row: number of the block's first row over all
inputs; file_split: the split of its file, or None.
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tools.converter.spool import shares_of, shuffle_keys
from tools.converter.values import BadValue, as_numbers, as_text, as_time, is_text, one_array
from tools.converter.vocabulary import string_keys
from tools.trainer.cli import UserError

TRAIN = 0

NUM_FOLDS = 10
FOLD_SEED = 2018
FOLD_SPLITS = [2, 1] + [0] * (NUM_FOLDS - 2)  # fold 0 is test, fold 1 val, the rest train


class ByFile:
    """Every file belongs to one split."""

    columns = ()

    def splits(self, table, first_row, file_split):
        return file_split


class ByFold:
    """Ten stratified folds, as scikit-learn deals them; splits of all rows: int8 (rows of all inputs)."""

    columns = ()

    def __init__(self, labels, rule):
        self.all = np.take(np.array(FOLD_SPLITS, np.int8), stratified_folds(labels, rule))

    def splits(self, table, first_row, file_split):
        return self.all[first_row : first_row + table.num_rows]


class ByChance:
    """A share of the rows for val, one for test; which ones depends on the seed and the number of the row."""

    columns = ()

    def __init__(self, seed, val_share, test_share):
        self.seed, self.shares = seed, np.array([1 - val_share - test_share, 1 - test_share])

    def splits(self, table, first_row, file_split):
        return self.of_rows(first_row, table.num_rows)

    def of_rows(self, first_row, count):
        return self._of_keys(shuffle_keys(np.arange(first_row, first_row + count), self.seed))

    def _of_keys(self, keys):
        return np.searchsorted(self.shares, shares_of(keys), side="right").astype(np.int8)


class ByGroup(ByChance):
    """The same for groups: all rows with one value of a column are in one split."""

    def __init__(self, column, seed, val_share, test_share):
        super().__init__(seed, val_share, test_share)
        self.columns = (column,)

    def splits(self, table, first_row, file_split):
        keys, _ = string_keys(as_text(table.column(self.columns[0])))
        return self._of_keys(shuffle_keys(keys.view(np.int64), self.seed))


class ByTime:
    """Rows before val_from are train, those before test_from val, the rest test.

    The bounds are given as text. Columns of numbers are compared as numbers, texts as texts (so ISO dates come in
    order), dates and times as such.
    """

    def __init__(self, column, val_from, test_from):
        self.columns, self.bounds = (column,), (val_from, test_from)
        # a text file's cells are numbers where the bounds are
        self.numbers = all(is_float(bound) for bound in self.bounds)

    def splits(self, table, first_row, file_split):
        column = one_array(table.column(self.columns[0]))
        if pa.types.is_temporal(column.type):
            bounds = self._times(column.type)
            self._ordered(pc.less(*bounds).as_py())
            self._check(column.is_null(), column)
            steps = [pc.cast(pc.greater_equal(column, bound), pa.int8()) for bound in bounds]
            return np.asarray(steps[0]) + np.asarray(steps[1])
        if is_text(column.type) and not self.numbers:
            column = as_text(column)
            self._check(pc.equal(column, ""), column)
            self._ordered(self.bounds[0] < self.bounds[1])
            steps = [np.asarray(pc.greater_equal(column, bound)) for bound in self.bounds]
            return steps[0].astype(np.int8) + steps[1]
        if not self.numbers:
            raise BadValue(0, f"a value of type {column.type}", "numbers as --val_from and --test_from")
        values = as_numbers(column)
        self._check(np.isnan(values), column)
        bounds = [float(bound) for bound in self.bounds]
        self._ordered(bounds[0] < bounds[1])
        return np.searchsorted(bounds, values, side="right").astype(np.int8)

    def _times(self, kind):
        """The bounds as scalars of a type of times."""
        try:
            return [as_time(bound, kind) for bound in self.bounds]
        except pa.ArrowException:
            advice = ("; give --val_from and --test_from as 2024-01-31 or 2024-01-31 12:00:00"
                      if pa.types.is_timestamp(kind) or pa.types.is_date(kind) else ": a date, a number or a text")
            raise BadValue(0, f"a value of type {kind}", f"one that compares with {' and '.join(self.bounds)}"
                                                         f"{advice}") from None

    def _ordered(self, ordered):
        if not ordered:
            raise UserError(f"--val_from {self.bounds[0]} is not before --test_from {self.bounds[1]}; val are the rows "
                            "from the one up to the other")

    @staticmethod
    def _check(missing, column):
        rows = np.flatnonzero(np.asarray(missing))
        if len(rows):
            raise BadValue(int(rows[0]), "missing", "a time, by which the rows are split")


def is_float(text):
    try:
        return float(text) == float(text)
    except ValueError:
        return False


def stratified_folds(labels, rule):
    """Fold 0..9 of each row, int8, as scikit-learn's StratifiedKFold(10, shuffle=True, random_state=2018) gives it.

    rule "sklearn": versions since 0.22. rule "sklearn-0.19": versions up to 0.21, of which 0.19.1 made the published
    Criteo_x4 files. Written out because scikit-learn holds several 8-byte numbers per row (a test compares the two).
    """
    random = np.random.RandomState(FOLD_SEED)
    folds = np.empty(len(labels), np.int8)
    numbers = np.arange(NUM_FOLDS, dtype=np.int8)
    start = 0
    classes = [0, 1] if rule == "sklearn-0.19" else [int(labels[0]), 1 - int(labels[0])]
    for label in classes:
        members = labels == label
        count = int(np.count_nonzero(members))
        if rule == "sklearn-0.19":
            # per class: shuffle the rows (at least one per fold), cut them into equal runs, larger ones first
            order = np.arange(max(count, NUM_FOLDS), dtype=np.int32 if count < 1 << 31 else np.int64)
            random.shuffle(order)
            sizes = len(order) // NUM_FOLDS + (numbers < len(order) % NUM_FOLDS)
            shuffled = np.empty(len(order), np.int8)
            shuffled[order] = np.repeat(numbers, sizes)
            shuffled = shuffled[:count]
        else:
            # deal all rows, sorted by class, round the folds; then shuffle the folds within the class
            dealt = [range(start + (fold - start) % NUM_FOLDS, start + count, NUM_FOLDS) for fold in range(NUM_FOLDS)]
            sizes = [len(rows) for rows in dealt]
            shuffled = np.repeat(numbers, sizes)
            random.shuffle(shuffled)
        folds[members] = shuffled
        start += count
    assert start == len(labels), "a label is neither 0 nor 1"
    return folds
