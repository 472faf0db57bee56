"""Columns of any type as text and as numbers, and as a vocabulary writes them."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from tools.converter.encoders import Category
from tools.converter.values import BadValue, as_labels, as_numbers, as_text

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
    "flags that become text": (FLAGS, PYTHON_FLAGS), "text that becomes text": (PYTHON_FLAGS, texts(FLAGS)),
    "finer": (times("us"), times("ns")), "coarser": (times("ns"), times("s")), "milder": (times("ns"), times("ms")),
    "times of text": (texts(times("s")), times("ns")), "days of text": (texts(DAYS), DAYS.cast(pa.timestamp("ns"))),
    "offset": (times("us", "+02:00"), times("s", "+02:00")), "UTC": (times("ms", "UTC"), times("ns", "UTC")),
    "of the day": (times("us").cast(pa.time64("us")), times("s").cast(pa.time32("s"))),
}


@pytest.mark.parametrize("kind", FORMS)
@pytest.mark.parametrize("listed", [False, True])
def test_the_form_of_a_column_does_not_change_its_ids(kind, listed):
    columns = [pa.array([[value] for value in column.to_pylist()], pa.list_(column.type)) if listed else column
               for column in FORMS[kind]]
    field = Category("v", length=1 if listed else None)
    tokens, long_texts = field.tokens(columns[0])
    field.fit(*field.count_tokens(tokens, long_texts))
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
                       (pa.array(["yes"]), FLAGS), (texts(DAYS), pa.array([1], pa.timestamp("s")))):
        field.vocabulary = None
        field.fit(*field.count_tokens(*field.tokens(known)))
        tokens, _ = field.tokens(new)
        assert field.unknown(tokens[0], field.local_ids(tokens[0])) == len(new)
    both = pa.array(["2024-01-01 00:00:00.000000", "2024-01-01 00:00:00"])  # each keeps its id
    field.vocabulary = None
    field.fit(*field.count_tokens(*field.tokens(both)))
    ids = [field.local_ids(field.tokens(pa.array([1_704_067_200], pa.timestamp("s")).cast(pa.timestamp(unit)))[0][0])
           for unit in ("us", "s")]
    assert ids == [field.local_ids(field.tokens(both.slice(i, 1))[0][0]) for i in range(2)]


def test_times_with_an_offset_are_printed_as_those_of_a_zone():
    for zone, offset in (("Africa/Lagos", "+01:00"), ("Asia/Kolkata", "+05:30"), ("Pacific/Pitcairn", "-08:00")):
        assert as_text(times("us", zone)).equals(as_text(times("us", offset)))
    with pytest.raises(BadValue, match="a time in the time zone Foo/Bar, expected a zone that this machine knows"):
        as_text(times("us", "Foo/Bar"))


def test_half_precision():
    halves = pa.array(np.array([0, 1, 0.5, 2], np.float16), mask=np.array([False, False, False, True]))
    assert as_text(halves).to_pylist() == ["0", "1", "0.5", ""]
    assert np.array_equal(as_numbers(halves), [0, 1, 0.5, np.nan], equal_nan=True)
    assert as_labels(halves.slice(0, 2)).tolist() == [0, 1]
