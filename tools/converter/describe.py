"""What a table's columns look like, and which options of table_to_parquet.py they ask for."""

import math
import re
import shlex
from collections import namedtuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tools.converter.values import LABELS, BadValue, as_numbers, as_text, is_lists, one_array
from tools.trainer.cli import UserError, brief, join_names

LOOK_ROWS = 1 << 18  # rows that are looked at
FEW_NUMBERS = 100  # whole numbers with at most so many values are categories
MANY_TOKENS = 1 << 20  # a column that has more of them in all rows, by a guess, is better hashed
LABEL_NAME = re.compile(r"(is_?)?(click(ed)?|label|target|y|conver(ted|sion)|buy|purchased?|installed?)", re.I)
TIME_NAME = re.compile(r"(.*_)?(ts|time|timestamp|date|datetime|day|hour_?stamp|created(_at)?)", re.I)
ID_NAME = re.compile(r".*(_?id|key|code|hash)s?", re.I)
TIME_TEXT = re.compile(r"\d{4}-\d\d-\d\d.*")
LIST_SEPARATORS = "|;^, "
NO_FEATURE = "a type that cannot be a feature"

Column = namedtuple("Column", "name looks distinct missing examples kind note value", defaults=(None,))
Column.__doc__ = """What was seen: distinct values and share of missing ones among the rows looked at, examples; kind:
option that it is proposed for; note: why, or what else the option needs; value: of --hash, or a --list_separator."""


def look(raw):
    """(Table of the first rows as they are, rows of the file or None)."""
    types = {name: pa.string() for name in raw.columns}
    tables, rows = [], 0
    for block in raw.blocks(raw.columns):
        tables.append(raw.table(block, types, lambda cells: None))
        rows += block.rows
        if rows >= LOOK_ROWS:
            break
    if not rows:
        raise UserError(f"{raw.path} has {'a header but ' if raw.is_text else ''}no rows")
    return pa.concat_tables(tables).slice(0, LOOK_ROWS), rows < LOOK_ROWS


def columns_of(raw, label=None):
    """(list of Column, rows looked at, whether that is all); label: name of the label, where it is known."""
    if label is not None:
        raw.check_columns([label])
    table, complete = look(raw)
    columns = [describe(name, one_array(table.column(name)), raw.is_text) for name in table.column_names]
    columns = [column if column.name else column._replace(kind="drop", note="no name, as the index that pandas writes")
               for column in columns]
    columns = [column._replace(kind="label", note="as you say") if column.name == label else column
               for column in columns]
    labels = [i for i, column in enumerate(columns) if column.kind == "label" and label in (None, column.name)]
    best = next((i for i in labels if LABEL_NAME.fullmatch(columns[i].name)), labels[0] if labels else None)
    for i, column in enumerate(columns):
        if column.kind == "label" and i != best:
            columns[i] = column._replace(kind="categorical")
    lists = [i for i, column in enumerate(columns) if column.kind == "list" and column.value]
    for i in lists:
        first, own = columns[lists[0]].value, columns[i].value
        if own != first:
            note = f"or write its lists with {first!r} for {own!r}: --list_separator is one for all"
            columns[i] = columns[i]._replace(kind="drop", note=note)
    return columns, table.num_rows, complete


def describe(name, column, is_text):
    """The Column of some rows; is_text: whether the values were text in the file, whatever they look like."""
    if is_lists(column.type):
        return list_column(name, column)
    try:
        texts = as_text(column)
    except BadValue:
        return Column(name, str(column.type), 0, 0.0, [], "drop", NO_FEATURE)
    present = texts.filter(pc.not_equal(texts, ""))
    missing = 1 - len(present) / max(1, len(texts))
    counts = pc.value_counts(present)
    values = counts.field(0) if len(counts) else present
    order = np.argsort(-np.asarray(counts.field(1)), kind="stable") if len(counts) else np.empty(0, int)
    examples = [values[int(i)].as_py() for i in order[:3]]
    common = (len(values), missing, examples)
    if not len(present):
        return Column(name, "empty", *common, "drop", "no values")
    if pa.types.is_duration(column.type):
        return Column(name, "durations", *common, "drop", "or write it as a number, of seconds say")
    numbers = numbers_of(column if not is_text else present)
    looks = "text" if numbers is None else "whole numbers" if (numbers == np.floor(numbers)).all() else "numbers"
    if pa.types.is_temporal(column.type) or looks == "text" and all(TIME_TEXT.fullmatch(text) for text in examples):
        return Column(name, "times", *common, "drop", f"or split by it: --split_by {name} --val_from ... --test_from "
                                                      "...")
    return Column(name, looks, *common, *kind_of(name, looks, values, present, missing))


def numbers_of(column):
    """float64 array of the present values, or None where they are no numbers."""
    try:
        numbers = as_numbers(column)
    except BadValue:
        return None
    numbers = numbers[np.isfinite(numbers)]
    return numbers if len(numbers) else None


def kind_of(name, looks, values, present, missing):
    """(kind, note[, value]) of a column that is no time and no list."""
    distinct = len(values)
    if distinct <= 2 and not missing and all(value in LABELS for value in values.to_pylist()):
        return "label", "0 and 1 only"
    if distinct == 1:
        return "drop", "one value only"
    if TIME_NAME.fullmatch(name) and distinct > FEW_NUMBERS:
        return "drop", f"a time, by its name; or split by it: --split_by {name} --val_from ... --test_from ..."
    unique = distinct == len(present) and distinct > FEW_NUMBERS
    if looks == "numbers":
        return "numeric", "fractions: --numeric_bins 50"
    if looks == "whole numbers" and pc.any(pc.match_substring(values, ".")).as_py():
        return "numeric", "whole numbers written as fractions; as texts 4.0 and 4 would be two categories"
    if looks == "whole numbers" and distinct > FEW_NUMBERS and not ID_NAME.fullmatch(name):
        return "numeric", "logarithmic buckets"
    if unique:
        return "drop", "another value in every row; or carry it along: --keep"
    if looks == "text":
        separator = likely_separator(values)
        if separator:
            return "list", f"--list_separator {shlex.quote(separator)}", separator
    if distinct > len(present) / 2 and distinct > MANY_TOKENS / 8:
        value = f"{name}={1 << math.ceil(math.log2(2 * distinct))}"
        return "hash", f"{value}: most values are rare", value
    return "categorical", ""


def likely_separator(values):
    """The separator of texts that look like lists: in a third of the values, with parts that come back."""
    values = values.slice(0, 2000)
    for separator in LIST_SEPARATORS[:3]:
        lists = [text.split(separator) for text in values.to_pylist()]
        several = sum(len(parts) > 1 for parts in lists)
        parts = [part for items in lists for part in items]
        if several * 3 > len(lists) and len(set(parts)) * 2 < len(parts):
            return separator
    return None


def list_column(name, column):
    lengths = pc.list_value_length(column).fill_null(0).to_numpy(zero_copy_only=False)
    try:
        distinct = len(pc.unique(as_text(pc.list_flatten(column))))
    except BadValue:
        return Column(name, str(column.type), 0, 0.0, [], "drop", NO_FEATURE)
    examples = [str(value) for value in column.slice(0, 3).to_pylist()]
    return Column(name, "lists", distinct, float((lengths == 0).mean()), examples, "list",
                  f"up to {lengths.max(initial=0)} values, 9 of 10 rows have at most {int(np.quantile(lengths, 0.9))}")


def text_of(raw, args):
    """What was seen and the proposed command, as text."""
    columns, rows, complete = columns_of(raw, args.label)
    heads = ("column", "looks like", "distinct", "missing %", "examples", "proposed", "")
    lines = [heads] + [(column.name or '""', column.looks, str(column.distinct), f"{100 * column.missing:.2f}",
                        brief([brief(example, 16) for example in column.examples], 40),
                        "" if column.kind == "drop" else f"--{column.kind}", column.note or "") for column in columns]
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads) - 1)]
    table = "\n".join("  ".join([*(cell.ljust(width) for cell, width in zip(line, widths)), line[-1]]).rstrip()
                      for line in lines)
    seen = f"{rows} rows" if complete else f"the first {rows} rows"
    how = f", separator {raw.separator!r}" if raw.is_text else ""
    return f"{raw.path}: {seen} looked at{how}\n\n{table}\n\n{command_of(columns, args)}"


def command_of(columns, args):
    """The proposed command, in lines of a shell."""
    names = {}
    for column in columns:
        names.setdefault(column.kind, []).append(column.name)
    options = [("input", path) for path in args.input] + [("val_input", path) for path in args.val_input or ()]
    options += [("test_input", path) for path in args.test_input or ()] + [("output_dir", "DATA_DIR")]
    options.append(("label", names["label"][0] if "label" in names else "LABEL_COLUMN"))
    options += [(kind, join_names(names[kind])) for kind in ("categorical", "numeric", "list", "drop") if kind in names]
    bins = [f"{column.name}=50" for column in columns if column.kind == "numeric" and column.looks == "numbers"]
    hashes = [column.value for column in columns if column.kind == "hash"]
    options += [(name, join_names(values)) for name, values in (("numeric_bins", bins), ("hash", hashes)) if values]
    options += [("list_separator", column.value) for column in columns if column.kind == "list" and column.value][:1]
    if args.separator:
        options.append(("separator", {"\t": "tab"}.get(args.separator, args.separator)))
    if args.columns:
        options.append(("columns", join_names(args.columns)))
    options = [(name, str(value)) for name, value in options]
    words = [f"--{name}{'=' if value.startswith('-') else ' '}{shlex.quote(value)}" for name, value in options]
    return "python tools/table_to_parquet.py " + " \\\n    ".join(words + ["--no_quotes"] * args.no_quotes)
