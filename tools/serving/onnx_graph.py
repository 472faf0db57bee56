"""A trained DeepFM as an ONNX graph: raw columns or ids in, probabilities out.

With raw inputs the encoder is part of the graph: vocabularies are LabelEncoders (ai.onnx.ml), numbers go through their
borders. All numeric fields are encoded together. Letters: N rows, F fields, D embedding size.
"""

import json
import math
from collections import namedtuple

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from tools.converter.encoders import BORDERS, MAX_INTEGER, MIN_INTEGER
from tools.trainer.cli import UserError

OPSETS = (("", 17), ("ai.onnx.ml", 3))
IR_VERSION = 8  # what goes with them; newer ones older runtimes refuse
INTEGER, REAL, TEXT = TensorProto.INT64, TensorProto.DOUBLE, TensorProto.STRING

Column = namedtuple("Column", "name type length")
Column.__doc__ = """An input of the graph: name, ONNX type, number of elements in a row (more than 1 for lists)."""


class Builder:
    """Nodes and constants of a graph; `add` returns the name of a node's output."""

    def __init__(self):
        self.nodes, self.constants, self.inputs, self.count = [], [], [], 0

    def name(self, what):
        self.count += 1
        return f"{what}_{self.count}"

    def constant(self, array, what="constant"):
        array = np.asarray(array)
        name = self.name(what)
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def add(self, kind, *inputs, domain="", **attributes):
        output = self.name(kind.lower())
        self.nodes.append(helper.make_node(kind, list(inputs), [output], name=output, domain=domain, **attributes))
        return output

    def input(self, column):
        self.inputs.append(helper.make_tensor_value_info(column.name, column.type, ["rows", column.length]))
        return column.name

    def concat(self, names, axis=1):
        return names[0] if len(names) == 1 else self.add("Concat", *names, axis=axis)


# ------------------------------------------------------------------------------------------------------------- encoding


def steps_of(field):
    """A numeric field as a step function of a whole or real number: (borders float64 (k), local ids int64 (k + 1)).

    The id of a value v is ids[number of borders <= v].
    """
    if field.kind == "quantile":
        return field.borders, np.arange(len(field.borders) + 1) + field.first_id
    steps = []  # (first value, value behind the last one, id)
    for place, token in enumerate(field.vocabulary.keys.tolist()):
        if token <= 2:  # such values are their own bucket
            steps.append((token, token + 1, field.first_id + place))
        if token >= 1:
            end = BORDERS[token] if token < len(BORDERS) else np.inf
            steps.append((BORDERS[token - 1], end, field.first_id + place))
    borders, ids = [], [field.oov]
    for begin, end, local_id in sorted(steps):
        if borders and borders[-1] == begin:  # the step before ends here
            ids.pop()
        else:
            borders.append(begin)
        borders.append(end)
        ids += [local_id, field.oov]
    return np.array(borders, np.float64), np.array(ids, np.int64)


def add_numbers(graph, fields, offsets):
    """Inputs of bucket and quantile fields -> global ids int64 (N, len(fields)), by comparing with all borders."""
    whole = [field for field in fields if input_of(field).type == INTEGER]
    real = [field for field in fields if input_of(field).type == REAL]
    parts = []
    if whole:
        parts.append(graph.add("Cast", graph.concat([graph.input(input_of(field)) for field in whole]), to=REAL))
    if real:
        parts.append(graph.concat([graph.input(input_of(field)) for field in real]))
    values, fields = graph.concat(parts), whole + real
    steps = [steps_of(field) for field in fields]
    width = max(len(borders) for borders, _ in steps)
    borders = np.full((len(fields), width), np.inf)
    table = np.zeros((len(fields), width + 1), np.int64)
    for row, (field, (own, ids)) in enumerate(zip(fields, steps)):
        borders[row, :len(own)] = own
        table[row] = ids[-1] + offsets[field.name]  # also of infinity, which reaches the borders that only fill up
        table[row, :len(ids)] = ids + offsets[field.name]
    missing = graph.add("IsNaN", values) if real else None
    cut = [[MIN_INTEGER + 1, MAX_INTEGER] if field.kind == "bucket" and field.own_missing else [-np.inf, np.inf]
           for field in fields]
    if real and any(np.isfinite(low) for low, _ in cut):
        low, high = (graph.constant(np.array([pair], np.float64), "cut") for pair in zip(*cut))
        values = graph.add("Min", graph.add("Max", values, low), high)
    values = truncated(graph, values, [field.kind == "bucket" and field.own_missing for field in fields])
    column = graph.add("Unsqueeze", values, graph.constant(np.array([2])))
    reached = graph.add("GreaterOrEqual", column, graph.constant(borders[None], "borders"))
    number = graph.add("ReduceSum", graph.add("Cast", reached, to=TensorProto.FLOAT), graph.constant(np.array([2])),
                       keepdims=0)
    number = graph.add("Cast", number, to=INTEGER)
    first = graph.constant(np.arange(len(fields), dtype=np.int64)[None] * (width + 1))
    ids = graph.add("Gather", graph.constant(table.ravel(), "ids_of_steps"), graph.add("Add", number, first))
    if missing:
        own = graph.constant(np.array([[field.missing_id + offsets[field.name] for field in fields]], np.int64))
        ids = graph.add("Where", missing, own, ids)
    return ids, fields


def truncated(graph, values, which):
    """Numbers of the columns `which` cut to their whole part, as a conversion to integers does."""
    if not any(which):
        return values
    whole = graph.add("Mul", graph.add("Sign", values), graph.add("Floor", graph.add("Abs", values)))
    return whole if all(which) else graph.add("Where", graph.constant(np.array([which])), whole, values)


def add_remainders(graph, fields, offsets):
    """Inputs of modulus fields -> global ids int64 (N, len(fields))."""
    values = graph.concat([graph.input(input_of(field)) for field in fields])
    rest = graph.add("Mod", values, graph.constant(np.array([[field.modulus for field in fields]], np.int64)))
    return graph.add("Add", rest, graph.constant(np.array([[offsets[field.name] for field in fields]], np.int64)))


def add_category(graph, field, offset):
    """Input of a category -> global ids int64 (N, columns)."""
    texts = field.vocabulary.texts.to_pylist()
    ids = (np.arange(len(texts)) + field.first_id + offset).tolist()
    if field.length is not None:
        texts, ids = [*texts, ""], [*ids, offset]  # absent elements
    elif not texts:
        texts, ids = [""], [field.oov + offset]  # the operator wants one
    return graph.add("LabelEncoder", graph.input(input_of(field)), domain="ai.onnx.ml", keys_strings=texts,
                     values_int64s=ids, default_int64=field.oov + offset)


def input_of(field):
    """The Column of a field's raw values. Raises: UserError for what has no ONNX operator."""
    length = getattr(field, "length", None) or 1
    if field.kind == "category":
        return Column(field.raw_column, TEXT, length)
    if field.kind == "quantile" or field.kind == "bucket" and field.own_missing:
        return Column(field.raw_column, REAL, 1)
    if field.kind == "bucket" or field.kind == "modulus" and field.base == 10:
        return Column(field.raw_column, INTEGER, 1)
    raise UserError(f"field {field.name} is of the kind {field.kind}, for which ONNX has no operator; use --inputs ids "
                    "and encode the rows with tools/encode_rows.py")


def add_encoder(graph, encoder):
    """Raw inputs -> (global ids int64 (N, scalar fields) or None, names of these fields, {list field: ids (N, L)})."""
    for field in encoder.fields:
        input_of(field)
    names = [field.raw_column for field in encoder.fields]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"several fields read the raw column {twice[0]}, which one input cannot serve; use --inputs "
                        "ids")
    parts, order, lists = [], [], {}
    numeric = [field for field in encoder.fields if field.kind in ("bucket", "quantile")]
    if numeric:
        ids, numeric = add_numbers(graph, numeric, encoder.offsets)
        parts.append(ids)
        order += [field.name for field in numeric]
    remainders = [field for field in encoder.fields if field.kind == "modulus"]
    if remainders:
        parts.append(add_remainders(graph, remainders, encoder.offsets))
        order += [field.name for field in remainders]
    for field in encoder.fields:
        if field.kind == "category":
            ids = add_category(graph, field, encoder.offsets[field.name])
            if field.length is None:
                parts.append(ids)
                order.append(field.name)
            else:
                lists[field.name] = ids
    return graph.concat(parts) if parts else None, order, lists


def add_id_input(graph, fields, lists, columns):
    """The same for one input `ids` (N, C)."""
    ids = graph.input(Column("ids", INTEGER, len(columns)))
    places = {column: place for place, column in enumerate(columns)}
    if not lists:
        return ids, fields, {}

    def pick(names):
        return graph.add("Gather", ids, graph.constant(np.array([places[name] for name in names])), axis=1)

    scalar = [field for field in fields if field not in lists]
    return pick(scalar) if scalar else None, scalar, {field: pick(names) for field, names in lists.items()}


# ---------------------------------------------------------------------------------------------------------------- model


def add_vectors(graph, weights, ids, lists, absent):
    """(embeddings (N, F, D), first-order weights (N, F, 1)) of scalar fields, then of fields of lists.

    One table holds both, because one lookup takes a tenth less of a request's time than two.
    """
    both = np.concatenate([weights.embedding, weights.first_order[:, None]], axis=1)
    table, dim, last = graph.constant(both, "embedding_and_first_order"), both.shape[1] - 1, np.array([2])

    def look_up(places):
        rows = graph.add("Gather", table, places)
        return [graph.add("Slice", rows, *map(graph.constant, (np.array([start]), np.array([end]), last)))
                for start, end in ((0, dim), (dim, dim + 1))]

    vectors, sums = [], []
    if ids is not None:
        vectors, sums = ([part] for part in look_up(ids))
    for field, list_ids in lists.items():
        there = graph.add("Equal", list_ids, graph.constant(np.array(absent[field], np.int64)))
        present = graph.add("Cast", graph.add("Not", there), to=TensorProto.FLOAT)  # (N, L)
        one = graph.constant(np.array([1], np.int64))
        number = graph.add("Max", graph.add("ReduceSum", present, one, keepdims=1), graph.constant(np.float32([1])))
        for parts, part, share in zip((vectors, sums), look_up(list_ids), (graph.add("Div", present, number), present)):
            weighted = graph.add("Mul", part, graph.add("Unsqueeze", share, graph.constant(last)))
            parts.append(graph.add("ReduceSum", weighted, one, keepdims=1))
    return graph.concat(vectors), graph.concat(sums)


def add_model(graph, weights, vectors, sums, order):
    """Embeddings and first-order weights in the given order of fields -> probabilities (N,)."""
    model = weights.state["model"]
    one = graph.constant(np.array([1], np.int64))
    first_order = graph.add("ReduceSum", sums, one, keepdims=0)
    total = graph.add("ReduceSum", vectors, one, keepdims=0)
    square_of_sum = graph.add("ReduceSum", graph.add("Mul", total, total), one, keepdims=1)
    x = graph.add("Flatten", vectors, axis=1)
    sum_of_square = graph.add("ReduceSum", graph.add("Mul", x, x), one, keepdims=1)
    pairs = graph.add("Mul", graph.add("Sub", square_of_sum, sum_of_square), graph.constant(np.float32([0.5])))
    for number, (weight, bias) in enumerate(weights.layers):
        if number == 0:  # rows in the order of the fields here
            dim = model["embedding_vec_size"]
            places = [model["fields"].index(name) for name in order]
            weight = weight.reshape(len(places), dim, -1)[places].reshape(weight.shape)
        x = graph.add("Gemm", x, graph.constant(weight, "weight"), graph.constant(bias, "bias"))
        if number < len(weights.layers) - 1:
            x = graph.add("Relu", x)
    logits = graph.add("Add", graph.add("Add", first_order, pairs), x)
    rate = model.get("negative_sampling_rate") or 1
    if rate != 1:  # as EvalGraph does it: p / (p + (1 - p) / rate) of probabilities loses digits near 1
        logits = graph.add("Add", logits, graph.constant(np.float32([math.log(rate)])))
    # in double precision: ONNX Runtime's sigmoid of floats is off by up to 1e-7, which is much for rare clicks
    probs = graph.add("Sigmoid", graph.add("Cast", graph.add("Squeeze", logits, one), to=REAL))
    return graph.add("Cast", probs, to=TensorProto.FLOAT)


def build(weights, encoder, raw, folder):
    """The onnx.ModelProto of a checkpoint.

    Args: encoder: Encoder or None; raw: whether the inputs are raw columns; folder: the checkpoint, for the metadata.
    """
    graph, model = Builder(), weights.state["model"]
    lists = model.get("lists", {})
    columns = [column for field in model["fields"] for column in lists.get(field, [field])]
    if raw:
        ids, order, list_ids = add_encoder(graph, encoder)
    else:
        ids, order, list_ids = add_id_input(graph, model["fields"], lists, columns)
    offsets = dict(zip(model["fields"], np.cumsum([0, *model["table_sizes"]]).tolist()))
    vectors, sums = add_vectors(graph, weights, ids, list_ids, offsets)
    probs = add_model(graph, weights, vectors, sums, [*order, *list_ids])
    graph.nodes.append(helper.make_node("Identity", [probs], ["probability"]))
    output = helper.make_tensor_value_info("probability", TensorProto.FLOAT, ["rows"])
    proto = helper.make_graph(graph.nodes, "DeepFM", graph.inputs, [output], graph.constants)
    opsets = [helper.make_opsetid(domain, version) for domain, version in OPSETS]
    result = helper.make_model(proto, opset_imports=opsets, producer_name="deepfm_train_eval", ir_version=IR_VERSION)
    helper.set_model_props(result, metadata(weights, encoder, raw, columns, folder))
    return result


def metadata(weights, encoder, raw, columns, folder):
    """Texts that the file carries; tools/score_onnx.py reads `raw`."""
    state = weights.state
    model, ends = state["model"], np.cumsum([0, *state["model"]["table_sizes"]]).tolist()
    limits = [ends[place:place + 2] for place, field in enumerate(model["fields"])
              for _ in model.get("lists", {}).get(field, [field])]
    described = {"inputs": "raw" if raw else "ids", "fields": model["fields"], "columns": columns, "limits": limits,
                 "fingerprint": state.get("data", {}).get("fingerprint"), "checkpoint": str(folder),
                 "metrics": state["progress"]["best"], "step": state["progress"]["step"]}
    if raw:
        described["raw"] = encoder.info["raw"]
        described["separators"] = {field.raw_column: field.separator for field in encoder.fields
                                   if getattr(field, "length", None)}
        described["spellings"] = {field.raw_column: field.vocabulary.spelling for field in encoder.fields
                                  if field.kind == "category"}
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in described.items()}


