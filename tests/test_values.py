"""Columns of any type as text and as numbers, and as a vocabulary writes them."""

from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from conftest import at_the_same_time

from tools.converter.encoders import Category
from tools.converter.raw import RawFormat, open_raw
from tools.converter.values import BadValue, as_labels, as_numbers, as_text, is_whole_number
from tools.converter.vocabulary import Vocabulary

ROWS = 40


def times(unit, zone=None):
    seconds = pa.array(1_700_000_000 + 900 * np.arange(ROWS), pa.timestamp("s"))
    return seconds.cast(pa.timestamp(unit)).cast(pa.timestamp(unit, zone))


def texts(values):
    return pc.cast(values, pa.string())


FLAGS, DAYS = pa.array((np.arange(ROWS) % 3 > 0).tolist()), pa.array(np.arange(ROWS, dtype=np.int32)).cast(pa.date32())
PYTHON_FLAGS = pa.array([str(flag) for flag in FLAGS.to_pylist()])
FORMS = {  # a column as it is in the train rows, and as it comes later
    "flags as pandas writes them": (PYTHON_FLAGS, FLAGS), "as R writes them": (pc.utf8_upper(PYTHON_FLAGS), FLAGS),
    "finer": (times("us"), times("ns")), "coarser": (times("ns"), times("s")), "milder": (times("ns"), times("ms")),
    "times of text": (texts(times("s")), times("ns")), "days of text": (texts(DAYS), DAYS.cast(pa.timestamp("ns"))),
    "offset": (times("us", "+02:00"), times("s", "+02:00")), "UTC": (times("ms", "UTC"), times("ns", "UTC")),
    "of the day": (times("us").cast(pa.time64("us")), times("s").cast(pa.time32("s"))),
}


def fitted(field, column):
    """Make the field's vocabulary of a column, as an earlier conversion; returns the tokens."""
    field.vocabulary = None
    tokens, long_texts = field.tokens(column)
    field.fit(*field.count_tokens(tokens, long_texts))
    field.vocabulary.known = len(field.vocabulary)
    return tokens


@pytest.mark.parametrize("kind", FORMS)
@pytest.mark.parametrize("listed", [False, True])
def test_the_form_of_a_column_does_not_change_its_ids(kind, listed):
    columns = [pa.array([[value] for value in column.to_pylist()], pa.list_(column.type)) if listed else column
               for column in FORMS[kind]]
    field = Category("v", length=1 if listed else None)
    tokens = fitted(field, columns[0])
    ids, size = field.local_ids(tokens[0]), len(field.vocabulary)
    assert size == len(pc.unique(FORMS[kind][0])) and (ids < field.oov).all()
    tokens, long_texts = field.tokens(columns[1])
    assert (field.local_ids(tokens[0]) == ids).all()
    field.rare = None
    field.fit(*field.count_tokens(tokens, long_texts))  # as a dataset that grows
    assert len(field.vocabulary) == size


def test_values_that_a_vocabulary_does_not_have_stay_unknown():
    field = Category("v")
    for known, new in ((times("s"), times("s").cast(pa.int64())), (pa.array(["True", "maybe"]), pa.array(["true"])),
                       (texts(times("s")), pa.array([1_700_000_000_500], pa.timestamp("ms"))),
                       (pa.array(["yes"]), FLAGS), (texts(DAYS), pa.array([1], pa.timestamp("s"))),
                       (FLAGS, PYTHON_FLAGS)):
        fitted(field, known)
        tokens, _ = field.tokens(new)
        assert field.unknown(tokens[0], field.local_ids(tokens[0])) == len(new)
    both = pa.array(["2024-01-01 00:00:00.000000", "2024-01-01 00:00:00"])  # each keeps its id
    fitted(field, both)
    ids = [field.local_ids(field.tokens(pa.array([1_704_067_200], pa.timestamp("s")).cast(pa.timestamp(unit)))[0][0])
           for unit in ("us", "s")]
    assert ids == [field.local_ids(field.tokens(both.slice(i, 1))[0][0]) for i in range(2)]


def test_a_conversion_reads_its_rows_alike_before_and_behind_its_vocabulary():
    """Rows are read twice on Spark; what the vocabulary leaves out must not change how they are written."""
    seconds, micros = times("s").cast(pa.string()), times("us").cast(pa.string())
    for column, later in ((pa.array(["True"] * 3 + ["false"]), FLAGS), (seconds, times("ms")), (micros, times("ms"))):
        field = Category("v", min_count=2)
        fitted(field, pa.concat_arrays([column, column]))
        field.vocabulary.known = 0
        assert field.tokens(later)[0][0].tolist() == Category("v").tokens(later)[0][0].tolist()


def test_times_with_an_offset_are_printed_as_those_of_a_zone():
    for zone, offset in (("Africa/Lagos", "+01:00"), ("Asia/Kolkata", "+05:30"), ("Pacific/Pitcairn", "-08:00")):
        assert as_text(times("us", zone)).equals(as_text(times("us", offset)))
    with pytest.raises(BadValue, match="a time in the time zone Foo/Bar, expected a zone that this machine knows"):
        as_text(times("us", "Foo/Bar"))


@pytest.mark.parametrize("text, whole", [("7", True), (" 7.0", True), ("7.5", False), ("x", False), ("nan", True),
                                         ("nan(ind)", True)])  # fmt: skip
def test_whole_numbers_as_arrow_reads_them(text, whole):
    assert is_whole_number(text) == whole


def test_threads_that_look_up_at_once():
    """As in encode_rows.py, where nothing has looked into a vocabulary before the first block of each thread."""
    keys = np.arange(1, 200_001, dtype=np.uint64) << np.uint64(8)
    for _ in range(5):
        known = Vocabulary(keys, pa.array([""] * len(keys)), np.ones(len(keys)))
        places = at_the_same_time(*[partial(known.positions, keys[:1000])] * 8)
        assert all((found == np.arange(1000)).all() for found in places)


def test_half_precision():
    halves = pa.array(np.array([0, 1, 0.5, 2], np.float16), mask=np.array([False, False, False, True]))
    assert as_text(halves).to_pylist() == ["0", "1", "0.5", ""]
    assert np.array_equal(as_numbers(halves), [0, 1, 0.5, np.nan], equal_nan=True)
    assert as_labels(halves.slice(0, 2)).tolist() == [0, 1]


@pytest.mark.parametrize("line", ["0,17,3", "0,1,2", "a,b,c"])
def test_numbers_are_no_names_of_columns(tmp_path, line):
    """Of files without header whose columns were called by their numbers."""
    (tmp_path / "rows.csv").write_text(line + "\n0,x,5\n")
    raw = open_raw(tmp_path / "rows.csv", RawFormat(["0", "1", "2"], None, label="0", needed=["1", "2"]))
    assert not raw.has_header and raw.columns == ["0", "1", "2"]


def test_a_cell_longer_than_csv_takes_by_itself(tmp_path):
    long = '"' + "x" * (1 << 18) + '"'
    (tmp_path / "rows.csv").write_text(f"{long},b,c\n")
    assert open_raw(tmp_path / "rows.csv", RawFormat(None, True)).columns == [long[1:-1], "b", "c"]
