"""What test_cuda.py does on a GPU, many jobs in one process: python tests/cuda_jobs.py JSON, a list of jobs.

A job is [name, function of this module, arguments]. When one has ended, a line "RESULT {name, seconds, value}" goes to
stdout. Without a GPU the store of host_embedding.py takes OneEmbedding's place.
"""

import contextlib
import gc
import io
import itertools
import json
import os
import shutil
import sys
import time
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tools.trainer.startup import flow, prepare_run

# isort: split
import numpy as np
from conftest import ROWS, batch_of, enlarge_rows, metrics_lines, trainer_command, values_of
from reference import Reference
from test_model import MaskGraph, correlation
from test_serving import USERS, convert, rows_of, write_rows

import deepfm_train_eval as trainer_module
from deepfm_train_eval import DNN, OneEmbedding, parse_args, read_dataset, start_trainer, to_split
from tools.converter.encoders import Encoder
from tools.trainer.checkpoints import prepare_new_run
from tools.trainer.tables import TableStore

# --------------------------------------------------------------------------------------------------- the trainer's runs


def arguments_of(data_dir, work, options):
    return trainer_command(data_dir, work, "--learning_rate", "0.03", "--loss_print_interval", "10", *options)[2:]


def run(data_dir, work, options):
    """The trainer as a user runs it -> {split: [AUC, logloss] of each of its lines, "output": all lines}"""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        trainer_module.main(arguments_of(data_dir, work, options))
    lines = output.getvalue()
    return {**{split: metrics_lines(lines, split) for split in ("val", "test")}, "output": lines}


def run_to_step(data_dir, work, step, options):
    """The same until a step, at which it stops as if it were killed."""
    train_step = trainer_module.Trainer.train_step

    def stop(trainer, batch):
        if trainer.step == step:
            raise InterruptedError
        return train_step(trainer, batch)

    with mock.patch.object(trainer_module.Trainer, "train_step", stop), contextlib.suppress(InterruptedError):
        trainer_module.run(parse_args(arguments_of(data_dir, work, options)))


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
    prepare_new_run(turns.saver.save_dir, turns.saver.stores, data_dir, overwrite=True)
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


# --------------------------------------------------------------------------------------------------------- growing data


def run_on_day(work, day, users, base, options):
    """Train on the rows of a day, data that grew out of those in `base`; returns the folder of its checkpoints."""
    folder = Path(work) / f"day{day}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    convert(folder / "data", write_rows(folder / "rows.csv", 1500, day, users), base=base)
    run(folder / "data", folder, ["--device", "cuda", "--model_save_dir", f"{folder}/save", *options])
    return folder / "save"


def train_on_first_day(work):
    run_on_day(work, 1, USERS, None, ["--train_batches", "15"])


def train_on_second_day(work):
    """From the first day's checkpoint; does every row go to its new id, and begin a new one as its field's OOV row?

    Returns {"rows": of the first day's tables, "kept": whether they are the same, value, m and v, "new": rows of tokens
    that came on the second day, "as_oov": whether they are as they should be}.
    """
    best = Path(work) / "day1" / "save" / "best_checkpoint"
    start = run_on_day(work, 2, [*USERS, *(f"new{i}" for i in range(20))], Path(work) / "day1" / "data",
                       ["--model_load_dir", str(best), "--save_initial_model", "--train_batches", "1"])
    before, after = rows_of(best), rows_of(start / "initial_checkpoint")
    old, new = (Encoder.load(Path(work) / day / "data") for day in ("day1", "day2"))
    pairs, fresh = [], []
    for table, rows in before.items():
        for was, now in zip(old.fields, new.fields):
            first, second = old.offsets[was.name], new.offsets[now.name]
            oov = rows.get(first + was.oov) if was.oov is not None else None  # CUDA saves rows that were looked up
            pairs += [(rows.get(first + local), after[table].get(second + (now.oov if local == was.oov else local)))
                      for local in range(was.table_size)]
            fresh += [(oov, after[table][second + local]) for local in range(was.oov or 0, now.oov or 0)
                      if oov is not None]
    pairs = [(was, now) for was, now in pairs if was is not None]
    fresh = [(np.where(np.arange(len(oov)) < len(oov) // 3, oov, 0), row) for oov, row in fresh]
    return {"rows": len(pairs), "kept": all(np.array_equal(*pair) for pair in pairs),
            "new": len(fresh), "as_oov": all(np.array_equal(*pair) for pair in fresh)}


def main():
    results = os.fdopen(os.dup(1), "w", buffering=1)
    if not flow.cuda.is_available():
        import host_embedding

        host_embedding.install()
    prepare_run(on_cpu=False)
    for name, function, arguments in json.loads(sys.argv[1]):
        start = time.perf_counter()
        value = globals()[function](*arguments)
        gc.collect()  # graphs go now, and not in the middle of the next job
        result = {"name": name, "seconds": round(time.perf_counter() - start, 1), "value": value}
        results.write(f"RESULT {json.dumps(result)}\n")
    results.flush()
    os._exit(0)  # nothing is to be learned from OneFlow's end


if __name__ == "__main__":
    main()
