"""Raw columns or ids as the inputs of an ONNX model; needs numpy and pyarrow only."""

import json

import numpy as np
import pyarrow as pa

from tools.converter.raw import format_again, list_files, open_raw
from tools.converter.values import (
    PLAIN,
    BadValue,
    Spelling,
    as_lists,
    as_numbers,
    as_text,
    number_problem,
    whole_numbers,
)
from tools.serving.onnx_file import check_checksums
from tools.trainer.cli import UserError, brief, shorten
from tools.trainer.places import open_regular

KINDS = {"tensor(int64)": pa.int64(), "tensor(double)": pa.float64(), "tensor(string)": pa.string()}


class OnnxModel:
    """An exported model in ONNX Runtime.

    Attributes: session, described (what the file says of itself), inputs {name: (type, elements in a row)}.
    """

    def __init__(self, path, threads=0, checksums=True):
        """threads: 0 for as many as there are cores. Raises: UserError for what is no model of export_onnx.py."""
        import onnxruntime

        try:
            open_regular(path).close()  # ONNX Runtime would wait at a pipe
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror}); give a file that tools/export_onnx.py "
                            "made") from None
        if checksums:
            check_checksums(path)
        self.path, options = path, onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 4  # what else it says is in the exceptions
        try:
            self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
            props = self.session.get_modelmeta().custom_metadata_map
            self.described = {key: props[key] if key == "inputs" else json.loads(props[key])
                              for key in ("inputs", "columns", "raw", "separators", "spellings", "limits")
                              if key in props}
            self.raw = self.described["inputs"] == "raw"
            self.spellings = {name: Spelling(*spelling)
                              for name, spelling in self.described.get("spellings", {}).items()}
            self.inputs = {node.name: (KINDS[node.type], node.shape[1]) for node in self.session.get_inputs()}
        except Exception as error:  # ONNX Runtime raises kinds of its own
            text = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"{path} cannot be used ({brief(text, 200)}); give a file that tools/export_onnx.py "
                            "made") from None

    def run(self, feed):
        """{name: array} -> probabilities float32 (n,)"""
        probs = self.session.run(None, feed)[0]
        if not np.isfinite(probs).all():
            raise UserError(f"{self.path} gives numbers that are not finite; export it again")
        return probs

    def feed(self, table):
        """Inputs for a pyarrow Table of raw columns, or of columns of ids. Raises: BadValue"""
        if not self.raw:
            names = self.described["columns"]
            limits = self.described.get("limits") or [[0, None]] * len(names)
            return {"ids": np.stack([of_column(name, ids_of, column_of(table, name), *limit)
                                     for name, limit in zip(names, limits)], axis=1)}
        feed = {}
        for name, (kind, length) in self.inputs.items():
            column, spelling = column_of(table, name), self.spellings.get(name, PLAIN)
            if name in self.described["separators"]:
                feed[name] = of_column(name, lists, column, self.described["separators"][name], spelling, length)
            elif kind == pa.int64():
                feed[name] = of_column(name, whole_numbers, column)[:, None]
            elif kind == pa.float64():
                feed[name] = of_column(name, as_numbers, column)[:, None]
            else:
                feed[name] = of_column(name, as_text, column, spelling).to_numpy(zero_copy_only=False)[:, None]
        return feed

    def types(self):
        """{column: type in which a text file's cells are read}"""
        if not self.raw:
            return dict.fromkeys(self.described["columns"], pa.int64())
        return {name: kind for name, (kind, _) in self.inputs.items()}

    def open(self, path):
        """Raw files of an input, which have all columns of the model."""
        form = format_again(self.described.get("raw", {}), self.types(), unlabelled=True)
        raws = [open_raw(file, form) for file in list_files(path)]
        for raw in raws:
            raw.check_columns(list(self.types()))
        return raws

    def blocks(self, raw, keep=()):
        """Yield (probabilities (n,), Table of the kept columns or None) of a raw file. Raises: UserError"""
        types = {**self.types(), **dict.fromkeys(keep, pa.string())}  # what is kept stays as it stands in the file
        for block in raw.blocks(None if raw.is_text else list(types)):
            table = raw.table(block, types, self.problem)
            try:
                yield self.run(self.feed(table)), table.select(list(keep)) if keep else None
            except BadValue as error:
                raw.check_lines(block, self.problem)  # has the text as it stands in the file
                raise raw.bad_value(block, error) from None

    def problem(self, cells):
        """What is wrong with the cells {raw column: text} of a line, or None."""
        for name, kind in self.types().items():
            expected = number_problem(kind, cells[name]) if kind != pa.string() else None
            if expected:
                return f"{name} is {cells[name]!r}, expected {expected}"
        return None


def column_of(table, name):
    if name not in table.column_names:
        raise UserError(f"the rows have no column {name}; they have {shorten(table.column_names)}")
    return table.column(name)


def of_column(name, convert, column, *values):
    """convert(column, *values); a value that it refuses is named with its column."""
    try:
        return convert(column, *values)
    except BadValue as error:
        error.column = name
        raise


def ids_of(column, low, high):
    """int64 (n) of a column of ids from low to below high (None: no limit is known). Raises: BadValue"""
    values = as_numbers(column)
    known = (values >= low) & (values < (np.inf if high is None else high)) & (values == np.floor(values))
    if not known.all():
        row = int(np.flatnonzero(~known)[0])
        value = "missing" if np.isnan(values[row]) else repr(values[row].item())
        raise BadValue(row, value, f"an id in [{low}, {'...' if high is None else high})")
    return values.astype(np.int64)


def lists(column, separator, spelling, length):
    """Texts (n, length) of a column of lists; absent elements are empty, elements beyond are left out."""
    elements, lengths = as_lists(column, separator, spelling)
    texts = elements.to_numpy(zero_copy_only=False)
    result = np.full((len(lengths), length), "", object)
    ends = np.cumsum(lengths)
    for row, (start, end) in enumerate(zip(ends - lengths, ends)):
        own = [text for text in texts[start:end] if text][:length]
        result[row, :len(own)] = own
    return result
