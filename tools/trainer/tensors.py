"""The tensors of a model between its graphs and its checkpoints, as arrays by name.

In a checkpoint a parameter or buffer is called "model.<its name in the model>", Adam's moments "<that>-m", "<that>-v",
Adagrad's sum of squares "<that>-sum".
A table is a module of the model; what belongs to one goes to its snapshots instead, see tables.py.
"""

import numpy as np

from tools.trainer.checkpoints import USE_ANOTHER
from tools.trainer.cli import UserError, shorten
from tools.trainer.processes import replicate
from tools.trainer.startup import flow
from tools.trainer.tables import OPTIMIZERS

THIS_GRAPH = "this-graph"  # for the graph's name in that of a dynamic loss scale: each graph has another one


def is_of_table(name, tables):
    """Whether a tensor of a checkpoint belongs to a table; tables: their names."""
    return name.startswith(tuple(f"model.{table}." for table in tables))


def graph_state(graph):
    """{"model.<parameter>-m", "...-v", "System-Train-TrainStep", ...: tensor} of a training graph's optimizer."""
    return {name.replace(graph.name, THIS_GRAPH): value
            for name, value in graph.state_dict().items() if not isinstance(value, dict)}


def load_graph_state(graph, state):
    graph.load_state_dict({name.replace(THIS_GRAPH, graph.name): value for name, value in state.items()})


def without_loss_scale(state):
    """Names of a state but those of a dynamic loss scale, which only --amp with that policy has."""
    return {name for name in state if THIS_GRAPH not in name}


def dense_model(model, tables):
    """{name in a checkpoint: tensor} of every parameter and buffer that is not a table's."""
    named = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    return {name: tensor for name, tensor in named.items() if not is_of_table(name, tables)}


def dense_arrays(model, optimizer_state, tables):
    """{name: array} of all tensors but the tables': parameters, buffers, Adam's moments and step, loss scale.

    All processes take part.
    """
    tensors = {**dense_model(model, tables), **optimizer_state}
    return {name: to_numpy(tensor) for name, tensor in tensors.items() if not is_of_table(name, tables)}


def finite_probabilities(output, count):
    """The first `count` probabilities of a batch as float32 (count,); waits for its graph. Raises: UserError"""
    probs = output.to_local().numpy()[:count, 0].copy()
    if not np.isfinite(probs).all():
        raise UserError(f"{np.count_nonzero(~np.isfinite(probs))} of {count} probabilities are not numbers: the "
                        "model's parameters are not finite; use an earlier checkpoint, or train with a lower "
                        "--learning_rate or --max_grad_norm")
    return probs


def to_numpy(tensor):
    if tensor.is_global:
        tensor = tensor.to_global(sbp=flow.sbp.broadcast).to_local()
    return tensor.numpy()


def load_dense(model, saved, tables, placement, folder):
    """Put a checkpoint's arrays into a model; returns the rest, the optimizer's state, as tensors.

    Raises: UserError when an array is missing, left over, of another shape or type, or not finite.
    """
    own = dense_model(model, tables)
    rest = {name: array for name, array in saved.items() if name not in own}
    kept = {f"{name}-{part}" for name in own for parts in OPTIMIZERS.values() for part in parts}
    strange = sorted(name for name in rest if not (name in kept or name.startswith("System-") or THIS_GRAPH in name))
    missing = sorted(own.keys() - saved.keys())
    if strange or missing:
        raise UserError(f"{folder} {'lacks' if missing else 'also has'} the tensors {shorten(missing or strange)}: "
                        "another model saved it; use the version of the code that it was trained with")
    for name, array in saved.items():
        parameter = own.get(name, own.get(name.rpartition("-")[0]))
        shape, kinds = (array.shape, "fi") if parameter is None else (tuple(parameter.shape), "f")
        if array.shape != shape or array.dtype.kind not in kinds or array.dtype.itemsize not in (4, 8):
            raise UserError(f"{folder} has {array.dtype} {array.shape} for {name}, expected float32 {shape}; "
                            f"{USE_ANOTHER}")
        if array.size == 0 or not np.isfinite(array).all():
            raise UserError(f"{folder} has numbers in {name} that are not finite; use an earlier checkpoint")
    with flow.no_grad():
        for name, tensor in own.items():
            tensor.copy_(replicate(saved[name], placement))
    return {name: replicate(array, placement) for name, array in rest.items()}
