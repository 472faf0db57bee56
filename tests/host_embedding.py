"""OneEmbedding where there is no GPU: its own Python classes, on a store that keeps the rows in host memory.

`install` puts stand-ins in place of what has no CPU kernels: the store behind OneEmbeddingHandler, the lookup, the
update of looked-up rows alone. All else of the CUDA path runs as it is, on CPU tensors: class Cuda with its tables,
masks and optimizer, checkpoints with snapshots in OneEmbedding's format. The rules are those of OneFlow's sources: no
two tables of one name in a process, a table locks its folder and opens its files at once and lives until the process
ends, a snapshot that is missing is passed over. A row is kept from the first training step that looks it up, as with
OneFlow 0.8.0 and device_mem; with 0.9.0 and the two cached stores an evaluation makes rows too. For one process.
"""

import fcntl
import json
import os
import shutil

import numpy as np

import deepfm_train_eval as trainer_module
from deepfm_train_eval import Cuda, OneEmbeddingTable, Trainer
from tools.trainer.chunks import BLOCK_SIZE
from tools.trainer.startup import flow
from tools.trainer.tables import OPTIMIZERS

INIT_STD = 1e-4
GPU_MEMORY_MB = 123.4


class CudaOnCpu(Cuda):
    """The CUDA path with tensors on the CPU; --device still calls it cuda."""

    name = "cpu"


class Handler:
    """In place of OneFlow's OneEmbeddingHandler, which owns memory of a GPU.

    Attributes: kept, bool (R,): rows that a training step has looked up; moments: what the optimizer keeps, Adam's m
    and v say, float32 (parts, R, D); parts: their names; values: a function that returns the rows of the table's
    parameter, float32 (R, D), to write to.
    """

    names = set()

    def __init__(self, options, local_rank, rank_id, world_size):
        options = json.loads(options)
        store = options["kv_store"]
        assert options["name"] not in self.names, f"OneFlow would abort: a second table {options['name']}"
        assert world_size == 1 and store["persistent_table"]["physical_block_size"] == BLOCK_SIZE
        self.names.add(options["name"])
        self.folder, self.width = os.path.join(store["persistent_table"]["path"], "0-1"), options["storage_dim"]
        self.rows = store["persistent_table"]["capacity_hint"]
        self.write("opened", [], np.empty((0, self.width), np.float32))  # makes an empty table, or checks what is there
        shutil.rmtree(os.path.join(self.folder, "snapshots", "opened"))

    def begin(self, dim, values):
        """dim: D, which OneFlow tells the lookup alone."""
        [self.parts] = [parts for parts in OPTIMIZERS.values() if 1 + len(parts) == self.width // dim]
        self.kept, self.moments = np.zeros(self.rows, bool), np.zeros((len(self.parts), self.rows, dim), np.float32)
        self.values = values

    def arguments(self, name):
        return [self.folder], name, flow.int64, flow.float, self.width

    def write(self, name, keys, rows):
        """A snapshot of the rows; OneFlow's writer opens the folder as the table does, and gives up its lock."""
        writer = flow.one_embedding.make_persistent_table_writer(*self.arguments(name), physical_block_size=BLOCK_SIZE)
        if len(keys):
            writer.write(keys, rows)
        writer.close()
        self.lock()

    def lock(self):
        fcntl.lockf(os.open(os.path.join(self.folder, "LOCK"), os.O_RDWR), fcntl.LOCK_EX | fcntl.LOCK_NB)

    def new_rows(self, seed=0):
        return np.random.default_rng(seed).normal(0, INIT_STD, self.moments[0].shape).astype(np.float32)

    def SaveSnapshot(self, name):
        [keys] = np.nonzero(self.kept)
        rows = np.concatenate([self.values(), *self.moments], axis=1)
        self.write(name, keys, rows[keys])

    def LoadSnapshot(self, name):
        if not os.path.exists(os.path.join(self.folder, "snapshots", name, "LIST")):
            return  # OneFlow logs that, and goes on
        self.kept[:], self.moments[:], self.values()[:] = False, 0, self.new_rows()
        reader = flow.one_embedding.make_persistent_table_reader(*self.arguments(name), physical_block_size=BLOCK_SIZE)
        for keys, rows in reader:
            self.kept[keys] = True
            value, *moments = np.split(rows, 1 + len(self.parts), axis=1)
            self.values()[keys], self.moments[:, keys] = value, moments
        reader.close()
        self.lock()  # the reader of 0.8.0 gives it up


class HostTable(OneEmbeddingTable):
    """`shadow`, which stands for the table in a graph, is the table itself."""

    def __init__(self, name, dim, placement, store_options, seed):
        super().__init__(name, dim, placement, store_options, seed)
        assert [tuple(parameter.shape) for parameter in self.parameters()] == [(1,)]
        self.handler.begin(dim, lambda: self.shadow.detach().to_local().numpy())
        rows = flow.tensor(self.handler.new_rows(seed)).to_global(placement, flow.sbp.broadcast)
        self.shadow = flow.nn.Parameter(rows)


def look_up(shadow, ids, *_, **__):
    """In place of the lookup operator: int64 (B, F) -> float (B, F, D)"""
    return flow._C.gather(shadow, ids, axis=0)


def handlers(trainer):
    """{name of the optimizer's state of a table in a graph without -m, -v: Handler}"""
    return {f"model.{name}.weight.shadow": table.weight.handler for name, table in trainer.model.tables().items()}


class HostTrainer(Trainer):
    """Here the graph's optimizer moves every row; what was not looked up is put back."""

    def make_train_graph(self):
        super().make_train_graph()
        if not self.device.one_embedding:
            return
        self.train_graph.load_state_dict({
            f"{name}-{part}": flow.tensor(array).to_global(self.device.placement, flow.sbp.broadcast)
            for name, handler in handlers(self).items() for part, array in zip(handler.parts, handler.moments)})

    def train_step(self, batch):
        if not self.device.one_embedding:
            return super().train_step(batch)
        before = {name: (handler.values().copy(), *handler.moments.copy())
                  for name, handler in handlers(self).items()}
        loss = super().train_step(batch)
        state = self.train_graph.state_dict()  # waits for the step
        for name, handler in handlers(self).items():
            moments = [state[f"{name}-{part}"].to_local().numpy() for part in handler.parts]
            untouched = np.ones(len(handler.kept), bool)
            untouched[batch.ids] = False
            for array, old in zip((handler.values(), *moments), before[name]):
                array[untouched] = old[untouched]
            handler.moments[:] = moments
            handler.kept |= ~untouched
        return loss


def install(replace=setattr):
    """Let --device cuda be the CPU. replace: monkeypatch.setattr, for a part of a process."""
    replace(flow.one_embedding, "OneEmbeddingHandler", Handler)
    replace(flow._C, "one_embedding_lookup" if flow.__version__.startswith("0.8.") else "one_embedding_fused_lookup",
            look_up)
    replace(flow._oneflow_internal, "GetCUDAMemoryUsed", lambda: GPU_MEMORY_MB)
    replace(flow.cuda, "is_available", lambda: True)
    replace(trainer_module, "DEVICES", {**trainer_module.DEVICES, "cuda": CudaOnCpu})
    replace(trainer_module, "OneEmbeddingTable", HostTable)
    replace(trainer_module, "Trainer", HostTrainer)
