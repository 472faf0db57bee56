"""Raw columns or ids as the inputs of an ONNX model; needs numpy and pyarrow only."""

import json

import numpy as np
import pyarrow as pa

from tools.converter.raw import RawFormat, list_files, open_raw
from tools.converter.values import BadValue, as_lists, as_numbers, as_text
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

        open_regular(path).close()  # ONNX Runtime would wait at a pipe
        if checksums:
            check_checksums(path)
        self.path, options = path, onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 4  # what else it says is in the exceptions
        try:
            self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
            props = self.session.get_modelmeta().custom_metadata_map
            self.described = {key: props[key] if key == "inputs" else json.loads(props[key])
                              for key in ("inputs", "columns", "raw", "separators") if key in props}
            self.raw = self.described["inputs"] == "raw"
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
            return {"ids": np.stack([whole(column_of(table, name), name) for name in names], axis=1)}
        feed = {}
        for name, (kind, length) in self.inputs.items():
            column = column_of(table, name)
            if length > 1:
                feed[name] = lists(column, self.described["separators"][name], length)
            elif kind == pa.int64():
                feed[name] = whole(column, name)[:, None]
            elif kind == pa.float64():
                feed[name] = as_numbers(column)[:, None]
            else:
                feed[name] = as_text(column).to_numpy(zero_copy_only=False)[:, None]
        return feed

    def types(self):
        """{column: type in which a text file's cells are read}"""
        if not self.raw:
            return dict.fromkeys(self.described["columns"], pa.int64())
        return {name: pa.string() if length > 1 else kind for name, (kind, length) in self.inputs.items()}

    def open(self, path):
        """Raw files of an input, which have all columns of the model."""
        described = self.described.get("raw", {})
        header = None if described.get("header") is False else True
        form = RawFormat(described.get("columns"), header, None, described.get("quotes", True),
                         described.get("label"), True)
        raws = [open_raw(file, form) for file in list_files(path)]
        for raw in raws:
            raw.check_columns(list(self.types()))
        return raws

    def blocks(self, raw, keep=()):
        """Yield (probabilities (n,), Table of the kept columns or None) of a raw file. Raises: UserError"""
        types = {**dict.fromkeys(keep, pa.string()), **self.types()}
        for block in raw.blocks(None if raw.is_text else list(types)):
            table = raw.table(block, types, lambda cells: None)
            try:
                yield self.run(self.feed(table)), table.select(list(keep)) if keep else None
            except BadValue as error:
                error.column = getattr(error, "column", "a column")
                raise raw.bad_value(block, error) from None


def column_of(table, name):
    if name not in table.column_names:
        raise UserError(f"the rows have no column {name}; they have {shorten(table.column_names)}")
    return table.column(name)


def whole(column, name):
    """int64 (n) of a column of whole numbers; what is missing is 0, as in Criteo's encoding. Raises: BadValue"""
    values = as_numbers(column)
    values = np.where(np.isnan(values), 0, values)
    wrong = np.flatnonzero(values != np.floor(values))
    if len(wrong):
        error = BadValue(int(wrong[0]), repr(values[wrong[0]].item()), "a whole number, or nothing")
        error.column = name
        raise error
    return values.astype(np.int64)


def lists(column, separator, length):
    """Texts (n, length) of a column of lists; absent elements are empty, elements beyond are left out."""
    elements, lengths = as_lists(column, separator)
    texts = elements.to_numpy(zero_copy_only=False)
    result = np.full((len(lengths), length), "", object)
    ends = np.cumsum(lengths)
    for row, (start, end) in enumerate(zip(ends - lengths, ends)):
        own = [text for text in texts[start:end] if text][:length]
        result[row, :len(own)] = own
    return result
