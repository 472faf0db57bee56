"""The numbers of a checkpoint as arrays, for everything that uses a model without OneFlow's graphs."""

from collections import namedtuple

import numpy as np

from tools.serving.rows import load_encoder
from tools.trainer import checkpoints
from tools.trainer.cli import UserError, shorten

BATCH_NORM_EPSILON = 1e-5  # of DNN.normalise

Weights = namedtuple("Weights", "state embedding first_order layers")
Weights.__doc__ = """A trained DeepFM. state: of state.json; embedding float32 (ids, D), first_order float32 (ids,);
layers: [(weight float32 (in, out), bias float32 (out,))] of the DNN, the last one linear, batch norm folded in."""


def read_weights(folder, checksums=True):
    """Weights of a checkpoint. Raises: UserError where it is not whole."""
    state = checkpoints.read_checkpoint(folder)
    dense = checkpoints.read_dense(folder, state, checksums)
    stores = {store.name: store for store in checkpoints.saved_tables(folder, state, checksums)}
    if set(stores) != {"embedding", "embedding_fm"}:
        raise UserError(f"{folder} has the tables {shorten(stores)}; it is the checkpoint of another model")
    embedding, first_order = (read_table(stores[name], state["tables"][name]) for name in ("embedding", "embedding_fm"))
    return Weights(state, embedding, first_order[:, 0], layers_of(state, dense, folder))


def read_table(store, saved):
    """Values of a table's rows, float32 (ids, D); rows that a table on CUDA has never looked up are 0."""
    values = np.zeros((store.num_ids, store.dim), np.float32)
    for ids, rows in store.read_snapshot(saved["snapshot"], saved["processes"]):
        values[ids] = rows[:, :store.dim]
    return values


def layers_of(state, dense, folder):
    """The DNN's layers as products and additions only."""
    layers, width = [], len(state["model"]["dnn"])
    towers = sorted(name for name in dense if name.startswith("model.") and not name.startswith("model.dnn.")
                    and not name.endswith(("-m", "-v")))
    if towers:
        raise UserError(f"{folder} has a tower that is not known here ({towers[0]}); add it to tools/serving")
    try:
        for i in range(width + 1):
            weight = dense[f"model.dnn.weight_{i}"].T.astype(np.float64)
            if state["model"]["batch_norm"] and i < width:
                scale = dense[f"model.dnn.gamma_{i}"] / np.sqrt(
                    dense[f"model.dnn.running_var_{i}"].astype(np.float64) + BATCH_NORM_EPSILON)
                weight = weight * scale
                bias = dense[f"model.dnn.beta_{i}"] - dense[f"model.dnn.running_mean_{i}"] * scale
            else:
                bias = dense[f"model.dnn.bias_{i}"]
            layers.append((np.ascontiguousarray(weight, np.float32), bias.astype(np.float32)))
        return layers
    except KeyError as error:
        raise UserError(f"{folder} lacks the tensor {error}; {checkpoints.USE_ANOTHER}") from None


def encoder_of(folder, checksums=True):
    """The Encoder in a checkpoint. Raises: UserError where there is none."""
    encoder = load_encoder(folder, checksums)
    if encoder is None:
        raise UserError(f"{folder} does not know how to encode raw rows: its data was made by an older version; "
                        "convert the raw data again and train on it, or use --inputs ids")
    return encoder
