"""Columns of any type as text (categories) or as numbers: one rule for text files, parquet files and data frames.

As text: strings as they are, whole numbers in decimal digits, floats that are whole numbers as if they were integers
(pandas turns integers with gaps into floats), other floats in their shortest form, booleans as true and false, dates,
times and decimals as Arrow prints them. What is missing is the empty text. Where there is a vocabulary, booleans and
times are written as its tokens are (Spelling).
"""

import re
from collections import namedtuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

BLANKS = " \t"  # around a number, as Arrow's reader of CSV leaves them out
WHOLE = 1 << 53  # floats below it hold every whole number
MIN_INTEGER, MAX_INTEGER = -(1 << 31), WHOLE  # of whole numbers that are not categories
WHOLE_NUMBER = f"a whole number from {MIN_INTEGER} to {MAX_INTEGER}, or nothing"

BOOLEANS = (("false", "true"), ("False", "True"), ("FALSE", "TRUE"))  # Arrow's words first
TIME = (r"^(?:\d{4}-\d\d-\d\d)?(?P<time>(?:^| )\d\d:\d\d:\d\d(?P<fraction>\.\d+)?(?:Z|[+-]\d{4})?)?$")
UNIT_DIGITS = {"s": 0, "ms": 3, "us": 6, "ns": 9}  # behind the seconds, as Arrow prints times of a unit
DATE_ONLY = -1

Spelling = namedtuple("Spelling", "words digits")
Spelling.__doc__ = """How a vocabulary writes booleans and times, which differ between files and data frames.

words: what stands for False and for True; digits: how many its times have behind the seconds (DATE_ONLY: there are
dates without a time), in the order of its tokens."""
PLAIN = Spelling(BOOLEANS[0], ())


class BadValue(ValueError):
    """A value that its column cannot have. Attributes: row (within the column), value (as text), expected."""

    def __init__(self, row, value, expected):
        super().__init__(f"{value}, expected {expected}")
        self.row, self.value, self.expected = row, value, expected


def one_array(column):
    """A pyarrow Array of a column (Array or ChunkedArray): dictionaries decoded, half-precision floats as float32."""
    if isinstance(column, pa.ChunkedArray):
        column = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
        if isinstance(column, pa.ChunkedArray):  # no chunks at all, in some versions
            column = pa.array([], column.type)
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if isinstance(column, pa.ExtensionArray):
        column = column.storage
    if pa.types.is_float16(column.type):  # which Arrow computes nothing with
        column = pa.array(column.to_numpy(zero_copy_only=False).astype(np.float32), mask=np.asarray(pc.is_null(column)))
    return column


def is_text(kind):
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def as_text(column, spelling=PLAIN):
    """string Array without nulls. Raises: BadValue (bytes that are not UTF-8, or a type that is no single value)."""
    column = one_array(column)
    kind = column.type
    if pa.types.is_null(kind):
        return pa.array([""] * len(column), pa.string())
    if pa.types.is_nested(kind):
        raise BadValue(0, str(kind), "one value a row; a column of lists can be given to --list")
    if pa.types.is_boolean(kind):
        column = pc.if_else(column, *(pa.scalar(word, pa.string()) for word in reversed(spelling.words)))
    elif pa.types.is_floating(kind):
        column = _floats_as_text(column)
    elif pa.types.is_timestamp(kind) or pa.types.is_time(kind):
        column = _same_digits(_times_as_text(column), UNIT_DIGITS[kind.unit], spelling.digits)
    elif not is_text(kind):
        column = _printed(column)
    return column.fill_null("") if column.null_count else column


def _printed(column):
    """Values of any other type as Arrow prints them."""
    try:
        return pc.cast(column, pa.string())
    except pa.ArrowInvalid:
        row = next(i for i, value in enumerate(column) if not _is_utf8(value.as_py()))
        raise BadValue(row, repr(column[row].as_py()), "text in UTF-8") from None
    except pa.ArrowNotImplementedError:
        raise BadValue(0, f"a value of type {column.type}", "text or a number") from None


def _is_utf8(value):
    try:
        return value is None or bool(value.decode("utf-8")) or True
    except UnicodeDecodeError:
        return False


# --------------------------------------------------------------------------------------------------------------- times


def fixed_offset(zone):
    """Seconds that a time zone such as +02:00, which no database has, is ahead of UTC; None for names, and for none."""
    found = re.fullmatch(r"([+-])(\d\d):?(\d\d)?", zone or "")
    return found and int(f"{found[1]}1") * (3600 * int(found[2]) + 60 * int(found[3] or 0))


def _times_as_text(column):
    """Timestamps and times of the day as Arrow prints them; with a fixed offset, as it prints those of other zones."""
    zone = getattr(column.type, "tz", None)
    offset = fixed_offset(zone)
    try:
        if offset is None:
            return pc.cast(column, pa.string())
    except pa.ArrowInvalid:
        raise BadValue(0, f"a time in the time zone {zone}", "a zone that this machine knows; write the column again "
                                                             "in UTC") from None
    unit = column.type.unit
    local = pc.add(column.cast(pa.timestamp(unit)), pa.scalar(offset, pa.duration("s")).cast(pa.duration(unit)))
    return pc.binary_join_element_wise(pc.cast(local, pa.string()), zone.replace(":", ""), "")


def as_time(text, kind):
    """Scalar of a type of dates or times; a text without a zone means that of the type. Raises: pa.ArrowException"""
    zone = getattr(kind, "tz", None)
    try:
        return pa.scalar(text).cast(kind)
    except pa.ArrowInvalid:
        if zone is None:
            raise
    naive, offset = pa.scalar(text).cast(pa.timestamp(kind.unit)), fixed_offset(zone)
    if offset is None:
        return pc.assume_timezone(naive, zone)
    return pc.subtract(naive, pa.scalar(offset, pa.duration("s")).cast(pa.duration(kind.unit))).cast(kind)


def _same_digits(texts, own, digits):
    """Times as texts, whose unit has `own` digits behind the seconds, with those of a vocabulary (see Spelling).

    Where that would need another time, one with a fraction as a whole second say, the text stays.
    """
    if not digits or own in digits:
        return texts
    wanted = digits[0]
    if wanted == DATE_ONLY:
        return pc.replace_substring_regex(texts, r" 00:00:00(\.0+)?$", "")
    if wanted > own:
        return pc.replace_substring_regex(texts, r"(\d\d:\d\d:\d\d(?:\.\d+)?)",
                                          r"\1" + "." * (own == 0) + "0" * (wanted - own))
    kept = rf"(\.\d{{{wanted}}})" if wanted else r"(\d\d:\d\d:\d\d)\."
    return pc.replace_substring_regex(texts, kept + f"0{{{own - wanted}}}", r"\1")


def time_digits(texts):
    """Digits of the times among the texts of a vocabulary, see Spelling."""
    for part in (texts.slice(0, 1000), texts):  # where there are times, nearly all tokens are
        found = pc.extract_regex(part, TIME)
        found = found.filter(pc.is_valid(found))
        if not len(found):
            return ()
    time, fraction = (pc.binary_length(pc.struct_field(found, [i])).to_numpy(zero_copy_only=False) for i in (0, 1))
    digits = np.where(time == 0, DATE_ONLY, np.maximum(fraction - 1, 0))
    return tuple(dict.fromkeys(digits.tolist()))


# ------------------------------------------------------------------------------------------------------------- numbers


def _floats_as_text(column):
    values = column.to_numpy(zero_copy_only=False)  # nulls become NaN
    with np.errstate(invalid="ignore"):
        whole = (np.abs(values) < WHOLE) & (values == np.floor(values))
    integers = pc.cast(pa.array(np.where(whole, values, 0).astype(np.int64)), pa.string())
    others = pc.cast(pa.array(values, column.type, from_pandas=True), pa.string())  # NaN becomes null
    return pc.if_else(pa.array(whole), integers, others)


def as_numbers(column):
    """float64 array (n), NaN where a value is missing (null, NaN or empty text). Raises: BadValue"""
    column = one_array(column)
    kind = column.type
    if pa.types.is_null(kind):
        return np.full(len(column), np.nan)
    if is_text(kind):
        return _parse_numbers(column)
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)
            or pa.types.is_decimal(kind)):
        raise BadValue(0, f"a value of type {kind}", "a number; use it as a category, or drop it")
    if pa.types.is_boolean(kind):
        column = pc.cast(column, pa.int8())
    if not pa.types.is_float64(kind):
        column = pc.cast(column, pa.float64(), safe=False)
    return column.to_numpy(zero_copy_only=False)


def _parse_numbers(column):
    filled = pc.ascii_trim(pc.if_else(pc.equal(column, ""), pa.scalar(None, column.type), column), BLANKS)
    try:
        return pc.cast(filled, pa.float64()).to_numpy(zero_copy_only=False)
    except pa.ArrowInvalid:
        row = next(i for i, text in enumerate(filled.to_pylist()) if text is not None and not is_number(text))
        raise BadValue(row, repr(column[row].as_py()), "a number, or nothing") from None


def is_number(text):
    """Whether Arrow reads the text as a number."""
    try:
        pa.scalar(text.strip(BLANKS)).cast(pa.float64())
        return True
    except pa.ArrowInvalid:
        return False


def whole_numbers(column):
    """int64 (n) of a column, missing values 0. Raises: BadValue for what is not whole or out of range."""
    column = one_array(column)
    if pa.types.is_int64(column.type):
        values = (column.fill_null(0) if column.null_count else column).to_numpy()
    else:
        values = as_numbers(column)
        values = np.where(np.isnan(values), 0, values) if np.isnan(values).any() else values
    if len(values) and not (values.min() >= MIN_INTEGER and values.max() <= MAX_INTEGER):
        raise _not_whole(values, (values < MIN_INTEGER) | (values > MAX_INTEGER))
    integers = values.astype(np.int64, copy=False)
    if values.dtype != np.int64 and not (integers == values).all():
        raise _not_whole(values, integers != values)
    return integers


def _not_whole(values, bad):
    row = int(np.flatnonzero(bad)[0])
    return BadValue(row, repr(values[row].item()), WHOLE_NUMBER)


def is_whole_number(text):
    """Whether whole_numbers reads the text, also as NaN, which is missing."""
    value = pa.scalar(text.strip(BLANKS)).cast(pa.float64()).as_py() if is_number(text) else np.inf
    return value != value or value == np.floor(value) and MIN_INTEGER <= value <= MAX_INTEGER


def number_problem(kind, text):
    """What was expected instead of a cell's text where numbers are read as `kind` (int64 or float64), or None."""
    if kind == pa.int64():
        return None if not text or is_whole_number(text) else WHOLE_NUMBER
    return None if not text or is_number(text) else "a number, or nothing"


LABELS = {"0": 0, "1": 1, "0.0": 0, "1.0": 1, "false": 0, "true": 1, "False": 0, "True": 1}


def as_labels(column):
    """int8 array (n) of 0 and 1. Raises: BadValue"""
    column = one_array(column)
    if pa.types.is_integer(column.type) or pa.types.is_floating(column.type):
        values = as_numbers(column)
    elif is_text(column.type) or pa.types.is_boolean(column.type):
        column = as_text(column)
        codes = np.array(list(LABELS.values()) + [np.nan])
        found = pc.index_in(column, value_set=pa.array(list(LABELS), column.type))
        values = codes[found.fill_null(len(LABELS)).to_numpy(zero_copy_only=False)]
    else:
        raise BadValue(0, f"a value of type {column.type}", "0 or 1")
    wrong = (values != 0) & (values != 1)
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        value = column[row].as_py()
        raise BadValue(row, "missing" if value is None else repr(value), "0 or 1")
    return values.astype(np.int8)


def is_lists(kind):
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def as_lists(column, separator, spelling=PLAIN):
    """(text Array of all elements, lengths int64 (n)) of a column of lists, or of texts with a separator."""
    column = one_array(column)
    if pa.types.is_fixed_size_list(column.type):
        column = column.cast(pa.list_(column.type.value_type))
    if not is_lists(column.type):
        if separator is None:
            raise BadValue(0, f"a value of type {column.type}", "lists, or a --list_separator")
        column = pc.split_pattern(as_text(column), separator)
    lengths = pc.list_value_length(column).fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
    return as_text(pc.list_flatten(column), spelling), lengths
