"""What test_cuda.py does on a GPU, many jobs in one process: python tests/cuda_jobs.py, a JSON list of jobs on stdin.

A job is [name, function of this module, arguments]. When one has ended, a line "RESULT {name, seconds, value}" goes to
stdout. Without a GPU the store of host_embedding.py takes OneEmbedding's place. Tables live until the process ends, and
no two may have one name, so each gets a number.
"""

import contextlib
import io
import itertools
import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tools.trainer.startup import flow, prepare_run

# isort: split
import numpy as np
from conftest import ROWS, batch_of, enlarge_rows, metrics_lines, trainer_command, values_of
from reference import Reference
from test_model import MaskGraph, correlation

import deepfm_train_eval as trainer_module
from deepfm_train_eval import DNN, OneEmbedding, parse_args, read_dataset, start_trainer, to_split
from tools.trainer.checkpoints import prepare_new_run
from tools.trainer.tables import TableStore


def number_tables():
    make_table, number = trainer_module.OneEmbeddingTable, itertools.count()
    trainer_module.OneEmbeddingTable = lambda name, *args: make_table(f"{name}_{next(number)}", *args)


# --------------------------------------------------------------------------------------------------- the trainer's runs


def run(data_dir, work, options):
    """The trainer as a user runs it -> {split: [AUC, logloss] of each of its lines, "output": all lines}"""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        trainer_module.main(trainer_command(data_dir, work, "--loss_print_interval", "10", *options)[2:])
    lines = output.getvalue()
    return {**{split: metrics_lines(lines, split) for split in ("val", "test")}, "output": lines}


# ---------------------------------------------------------------------------------------------------------- one by one


def look_up_fresh_rows(work, store_type):
    """{"shape", "mean", "std" of the rows of 5000 ids in a new table, "repeats": whether an id gives one row}"""
    device = trainer_module.DEVICES["cuda"]()
    store = TableStore(f"lookup_{store_type}", "persistent_path", work, 8, 5000)
    table = OneEmbedding(device, device.make_table(store, 3, 0, store_type, 64), 8)

    class Lookup(flow.nn.Graph):
        def __init__(self):
            super().__init__()
            self.table = table

        def build(self, ids):
            return self.table(ids)

    ids = np.tile(np.arange(5000).reshape(-1, 2), (2, 1))
    rows = Lookup()(to_split(ids, device.placement)).to_local().numpy()
    return {"shape": rows.shape, "mean": float(rows.mean()), "std": float(rows.std()),
            "repeats": bool((rows[:2500] == rows[2500:]).all())}


def draw_masks():
    """{"means": of two steps' masks of two layers, "correlation": the largest between two of them}"""
    device = trainer_module.DEVICES["cuda"]()
    graph = MaskGraph(DNN(device, 4, [300, 300], 0.3, seed=7))
    x = flow.ones(200, 4).to_global(device.placement, flow.sbp.split(0))
    masks = [mask.to_local().numpy().copy() for _ in range(2) for mask in graph(x)]
    return {"means": [float(mask.mean()) for mask in masks],
            "correlation": float(max(correlation(a, b) for a, b in itertools.combinations(masks, 2)))}


class Turns:
    """One model, trained on CPU and CUDA by turns, beside its numpy reference.

    Attributes: losses, [[here, in the reference], ...] of all steps; seen, bool (rows of a table,): ids of this turn.
    """

    def __init__(self, data_dir, work, store_type, clip):
        self.options = ["--data_dir", data_dir, "--dnn", "8,6", "--embedding_vec_size", "4", "--batch_size", str(ROWS),
                        "--net_dropout", "0", "--persistent_path", f"{work}/t", "--persistent_path_fm", f"{work}/f",
                        "--model_save_dir", f"{work}/save", "--store_type", store_type, "--max_grad_norm", clip]
        self.losses, self.rng = [], np.random.default_rng(3)

    def start(self, device, checkpoint=None):
        args = parse_args([*self.options, "--device", device])
        folder = checkpoint and os.path.join(args.model_save_dir, checkpoint)
        self.trainer, self.saver = start_trainer(args, read_dataset(args.data_dir), folder, run_id="test")
        self.seen = np.zeros(self.trainer.dataset.num_ids, bool)

    def train(self, steps, share):
        """share: how much of each field's table the ids come from."""
        dataset = self.trainer.dataset
        for _ in range(steps):
            ids = np.stack([self.rng.integers(low, low + int(share * (high - low)), ROWS)
                            for low, high in zip(dataset.offsets, dataset.offsets[1:])], axis=1)
            labels = (self.rng.random(ROWS) < 0.4).astype(np.float32)
            loss = self.trainer.train_step(batch_of(dataset, ids, labels))
            self.losses.append([float(loss.to_local().numpy()), float(self.reference.train(ids, labels))])
            self.seen[ids] = True

    def save(self, name):
        """{table: rows [value | m | v] in the order of ids} that were saved"""
        self.saver.save(self.trainer, [name])
        saved = {}
        for store in self.saver.stores:
            saved[store.name] = np.full((store.num_ids, 3 * store.dim), np.nan, np.float32)
            for ids, rows in store.read_snapshot(f"test-step_{self.trainer.step}", 1):
                saved[store.name][ids] = rows
        return saved

    def difference(self, values, m=None, v=None):
        """Largest difference from the reference; arguments: {name: array}, tables without the padding row too"""
        pairs = [(self.reference.values, values), (self.reference.m, m or {}), (self.reference.v, v or {})]
        return float(max(np.abs(array - expected[name][:len(array)]).max()
                         for expected, own in pairs for name, array in own.items()))


def train_by_turns(data_dir, work, store_type, clip):
    """Three steps on CPU, ten on CUDA with half of the ids, two on CPU; a turn begins with the last one's checkpoint.

    Returns {"losses", "difference": from the reference, of the rows with moments after CUDA and of all values at the
    end, "untouched": number of ids that CUDA did not look up, "kept": whether their rows are the same, value, m and v,
    "moments": whether they had moments at all, "memory"}.
    """
    turns = Turns(data_dir, work, store_type, clip)
    turns.start("cpu")
    enlarge_rows(turns.trainer.model)
    turns.reference = Reference(values_of(turns.trainer.model), turns.trainer.args.learning_rate,
                                max_grad_norm=float(clip))
    prepare_new_run(turns.saver.save_dir, turns.saver.stores)
    turns.train(3, share=1)
    before = turns.save("before")

    turns.start("cuda", "before")
    turns.reference.lazy, turns.reference.efficient = True, False  # with clipping too
    turns.train(10, share=0.5)
    after, rest = turns.save("after"), ~turns.seen
    value, m, v = ({name: np.split(rows, 3, axis=1)[i] for name, rows in after.items()} for i in range(3))
    result = {"untouched": int(rest.sum()), "memory": turns.trainer.device.memory(),
              "kept": all((before[name][rest] == after[name][rest]).all() for name in after),
              "moments": all(before[name][rest, rows.shape[1] // 3:].any() for name, rows in after.items())}
    after_cuda = turns.difference(value, m, v)

    turns.start("cpu", "after")
    turns.reference.lazy, turns.reference.efficient = turns.trainer.args.max_grad_norm == 0, True
    turns.train(2, share=1)
    at_the_end = turns.difference(values_of(turns.trainer.model))
    return {**result, "losses": turns.losses, "difference": [after_cuda, at_the_end]}


def main():
    results = os.fdopen(os.dup(1), "w", buffering=1)
    if not flow.cuda.is_available():
        import host_embedding

        host_embedding.install()
    prepare_run(on_cpu=False)
    number_tables()
    for name, function, arguments in json.load(sys.stdin):
        start = time.perf_counter()
        value = globals()[function](*arguments)
        result = {"name": name, "seconds": round(time.perf_counter() - start, 1), "value": value}
        results.write(f"RESULT {json.dumps(result)}\n")
    results.flush()
    os._exit(0)  # nothing is to be learned from OneFlow's end


if __name__ == "__main__":
    main()
