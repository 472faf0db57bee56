"""The whole training step against the numpy reference, and one process against two."""

import gc
import json
import os
import socket
import subprocess
import sys
import threading
import time
import weakref
from functools import partial
from types import SimpleNamespace

import numpy as np
import oneflow as flow
import pytest
from conftest import ROOT, ROWS, batch_of, make_trainer, random_batches, run_trainer, train_here, values_of
from reference import Reference, sigmoid

import deepfm_train_eval as trainer_module
from tools.trainer.batches import draw_masks, keep_probability
from tools.trainer.checkpoints import prepare_new_run
from tools.trainer.startup import wait_for_first_process

STEPS = 20


VARIANTS = {
    "plain": [],
    "embedding_l2": ["--embedding_l2", "0.05"],
    "clipping": ["--max_grad_norm", "0.1"],
    "l2 and clipping": ["--embedding_l2", "0.05", "--max_grad_norm", "0.1"],
    "batch_norm": ["--batch_norm"],
    "batch_norm, l2 and clipping": ["--batch_norm", "--embedding_l2", "0.05", "--max_grad_norm", "0.1"],
    "dropout": ["--net_dropout", "0.3"],
    "batch_norm and dropout": ["--batch_norm", "--net_dropout", "0.3"],
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_twenty_steps_equal_the_reference(shared_dataset_dir, tmp_path, variant):
    dropout = [] if "dropout" in variant else ["--net_dropout", "0"]
    trainer = make_trainer(shared_dataset_dir, tmp_path, "--train_batches", str(STEPS), *dropout, *VARIANTS[variant])
    args = trainer.args
    reference = Reference(values_of(trainer.model), args.learning_rate, args.embedding_l2, args.max_grad_norm)
    keep = keep_probability(args.net_dropout)
    for step, (ids, labels) in enumerate(random_batches(trainer.dataset, STEPS)):
        batch = batch_of(trainer.dataset, ids, labels)
        masks = draw_masks(args.dnn, ROWS, args.net_dropout, args.seed, step, 0) if args.net_dropout else None
        batch.masks = masks or ()
        loss = float(trainer.train_step(batch).to_local().numpy())
        expected = reference.train(ids, labels, masks and [1 + mask[:len(ids)] for mask in masks], keep)
        assert loss == pytest.approx(expected, abs=1e-5)
    for name, value in values_of(trainer.model).items():
        assert np.abs(value - reference.values[name]).max() < 1e-5, name
    assert not values_of(trainer.model)["embedding"][-1].any()  # the padding row never moves


def test_an_earlier_graph_is_not_collected_while_one_compiles(shared_dataset_dir, tmp_path, monkeypatch):
    """Its end would take the variables of the new one: "... must be a variable created in nn.Graph"."""
    earlier, trainer = (make_trainer(shared_dataset_dir, tmp_path / name) for name in ("earlier", "new"))
    earlier.predict(earlier.dataset.splits["val"])
    unreachable = [earlier]
    unreachable.append(unreachable)  # only a garbage collection ends it
    ended, empty = weakref.ref(earlier.eval_graph), flow.empty
    del earlier

    def make_garbage(*args, **options):
        """For what a graph calls between the list of its variables and the end of its compilation."""
        nonlocal unreachable
        unreachable = None
        assert len([[] for _ in range(100_000)])  # enough for an automatic collection
        return empty(*args, **options)

    monkeypatch.setattr(flow, "empty", make_garbage)
    trainer.predict(trainer.dataset.splits["val"])
    assert unreachable is None and gc.isenabled()
    gc.collect()
    assert ended() is None


def test_learning_rate_cut_keeps_the_optimizer_state(shared_dataset_dir, tmp_path):
    trainer = make_trainer(shared_dataset_dir, tmp_path, "--net_dropout", "0")
    reference = Reference(values_of(trainer.model), trainer.args.learning_rate)
    for step, (ids, labels) in enumerate(random_batches(trainer.dataset, STEPS)):
        if step == 10:
            trainer.plateau.learning_rate = reference.learning_rate = 2e-4
        trainer.train_step(batch_of(trainer.dataset, ids, labels))
        reference.train(ids, labels)
    for name, value in values_of(trainer.model).items():
        assert np.abs(value - reference.values[name]).max() < 1e-5, name


def test_lazy_update_leaves_other_rows_alone(shared_dataset_dir, tmp_path):
    trainer = make_trainer(shared_dataset_dir, tmp_path, "--net_dropout", "0")
    before = values_of(trainer.model)
    ids = np.tile([0, 7, 18], (ROWS, 1))  # the same three rows in every sample
    for _ in range(3):
        trainer.train_step(batch_of(trainer.dataset, ids, np.ones(ROWS, np.float32)))
    state = trainer.current_optimizer_state()
    for name in ("embedding", "embedding_fm"):
        moved = (values_of(trainer.model)[name] != before[name]).any(axis=1)
        assert np.flatnonzero(moved).tolist() == [0, 7, 18]
        for moment in "mv":
            array = state[f"model.{name}.weight-{moment}"].to_local().numpy()
            assert np.flatnonzero(array.any(axis=1)).tolist() == [0, 7, 18]


def test_seed_of_the_initial_values(shared_dataset_dir, tmp_path):
    runs = []
    for seed in ("1", "1", "2"):
        trainer = make_trainer(shared_dataset_dir, tmp_path, "--seed", seed)
        tables = trainer_module.make_tables(trainer.args, trainer.dataset.num_ids)
        runs.append(values_of(trainer_module.build_model(trainer.args, trainer.device, tables, trainer.dataset)))
    for name, values in runs[0].items():
        assert (values == runs[1][name]).all()
        assert ("bias" in name) == (values == runs[2][name]).all(), name
    assert len(runs[0]) == 8


def test_masks_of_a_run_are_keyed_by_seed_step_and_process(shared_dataset_dir, tmp_path, monkeypatch):
    trainer = make_trainer(shared_dataset_dir, tmp_path, "--net_dropout", "0.3", "--seed", "7")
    trainer.step = 5  # as after a resume
    monkeypatch.setattr(trainer_module, "world_size", lambda: 2)
    for process in (0, 1):
        monkeypatch.setattr(trainer_module, "rank", lambda process=process: process)
        for step, batch in enumerate(trainer_module.batches_of_epoch(trainer), 5):
            expected = draw_masks([8, 6], ROWS // 2, 0.3, 7, step, process)
            assert all((mask == other).all() for mask, other in zip(batch.masks, expected)) and len(batch.masks) == 2


def test_val_auc_minus_logloss_decides(shared_dataset_dir, tmp_path, monkeypatch, capsys):
    trainer = make_trainer(shared_dataset_dir, tmp_path, "--model_save_dir", str(tmp_path), "--patience", "1")
    saved, scores = [], iter([(0.70, 0.50), (0.75, 0.60), (0.69, 0.40)])  # the second has more AUC, the third less
    checkpointer = SimpleNamespace(save=lambda trainer, names: saved.append(names))
    monkeypatch.setattr(trainer, "evaluate", lambda split, epoch, log: dict(zip(("auc", "logloss"), next(scores))))
    rates = []
    for step, epoch in ((13, 2), (26, 3), (39, 4)):
        trainer.step, trainer.epoch = step, epoch
        trainer_module.evaluate_and_save(trainer, checkpointer, None)
        rates.append(trainer.plateau.learning_rate)
    assert rates == pytest.approx([1e-3, 1e-4, 1e-4])
    assert saved == [["best_checkpoint", "step_13"], ["step_26"], ["best_checkpoint", "step_39"]]
    assert trainer.best == {"epoch": 3, "step": 39, "auc": 0.69, "logloss": 0.40} and trainer.epoch == 4
    assert capsys.readouterr().out.splitlines() == [
        "Epoch 1, val AUC - LogLoss 0.200000, the best so far; learning rate 0.001",
        "Epoch 2, val AUC - LogLoss 0.150000, best 0.200000 (epoch 1); learning rate 0.001 -> 0.0001",
        "  Evaluations without gain: 1, the run stops at 4; since the last cut: 0, the rate is cut at 1",
        "Epoch 3, val AUC - LogLoss 0.290000, the best so far; learning rate 0.0001"]


@pytest.mark.parametrize("batch_norm", [False, True])
def test_evaluation_equals_the_reference(shared_dataset_dir, tmp_path, batch_norm):
    trainer = make_trainer(shared_dataset_dir, tmp_path, *(["--batch_norm"] if batch_norm else []))
    for i in range(2 if batch_norm else 0):
        getattr(trainer.model.dnn, f"running_mean_{i}").to_local().numpy()[:] = 0.1 * (i + 1)
        getattr(trainer.model.dnn, f"running_var_{i}").to_local().numpy()[:] = 0.5 + i
    probs, labels, *extras = trainer.predict(trainer.dataset.splits["val"])
    rows = list(trainer_module.read_rows(trainer.dataset, trainer.dataset.splits["val"]))
    ids = np.concatenate([ids for ids, _ in rows])
    logits, _ = Reference(values_of(trainer.model), 1.0).logits(ids)
    assert np.abs(probs - sigmoid(logits)).max() < 1e-6
    assert (labels == np.concatenate([labels for _, labels in rows])).all() and len(labels) == 101
    assert extras == [None, None]


def metrics(folder):
    lines = [json.loads(line) for line in (folder / "logs" / "metrics.jsonl").read_text().splitlines()]
    return [(line["event"], line["step"], line.get("loss", line.get("logloss")), line.get("auc", 0)) for line in lines]


def train_and_read(data_dir, work, *options, train=run_trainer):
    """(metrics of a run without dropout, its output)"""
    output = train(data_dir, work, "--net_dropout", "0", "--log_dir", work / "logs", "--loss_print_interval", "1",
                   *options)
    return metrics(work), output


def assert_close(first, second):
    assert len(first) == len(second) > 8
    for one, two in zip(first, second):
        assert one[:2] == two[:2] and one[2:] == pytest.approx(two[2:], abs=1e-5)


@pytest.mark.parametrize("options", [[], ["--batch_norm", "--embedding_l2", "0.01", "--max_grad_norm", "1"]])
def test_two_processes_equal_one(distinct_dataset_dir, tmp_path, options):
    """Also behind a cut of the learning rate, which makes a new graph."""
    cut = ["--eval_interval", "4", "--min_delta", "1", "--patience", "1"]
    (one, _), (two, (output, _)) = (
        train_and_read(distinct_dataset_dir, tmp_path / name, "--train_batches", "12", *cut, *options, train=train)
        for name, train in (("1", train_here), ("2", partial(run_trainer, processes=2))))
    assert_close(one, two)
    assert "learning rate 0.01 -> 0.001" in output


def test_the_blas_of_choice_gives_the_same_results(distinct_dataset_dir, tmp_path, monkeypatch):
    runs = {}
    for blas in ("scipy", "oneflow"):
        monkeypatch.setenv("DEEPFM_BLAS", blas)
        options = ["--dnn", "200,200", "--train_batches", "9"]
        runs[blas], (output, _) = train_and_read(distinct_dataset_dir, tmp_path / blas, *options)
        assert ("BLAS: OneFlow built-in" in output) == (blas == "oneflow")
    assert_close(runs["scipy"], runs["oneflow"])


def test_loss_that_is_not_finite_stops_the_run(shared_dataset_dir, tmp_path):
    _, errors = run_trainer(shared_dataset_dir, tmp_path, "--learning_rate", "1e30", "--train_batches", "9", status=1)
    assert "error: the loss is " in errors and "lower --learning_rate" in errors and "Traceback" not in errors


def test_other_processes_wait_until_the_first_listens(monkeypatch):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                            "MASTER_PORT": server.getsockname()[1]}.items():
            monkeypatch.setenv(name, str(value))
        start = time.monotonic()
        wait_for_first_process(patience=0.2)  # nobody listens
        assert time.monotonic() - start >= 0.2
        threading.Timer(0.5, server.listen).start()
        wait_for_first_process()
        assert 0.6 < time.monotonic() - start < 10
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("MASTER_PORT", "1")
        wait_for_first_process()  # the first waits for nobody
        assert time.monotonic() - start < 10


def test_polling_thread_gives_way():
    """Only the thread that polls while operators run has a lower priority than the others."""
    code = """
import os, time
from tools.trainer import startup
startup.calm_scheduler()
before = startup.thread_times()
for _ in range(100):
    startup.flow.zeros(1)
    time.sleep(0.002)
worked = {thread: times - before.get(thread, 0) for thread, times in startup.thread_times().items()}
busiest = max(worked, key=worked.get)
priorities = {thread: os.getpriority(os.PRIO_PROCESS, thread) for thread in (*worked, os.getpid())}
print(priorities.pop(busiest), *priorities.values())
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    busiest, *others = result.stdout.splitlines()[-1].split()
    assert busiest == "10" and set(others) == {str(os.getpriority(os.PRIO_PROCESS, 0))}


def test_learning_rate_cut_and_checkpoint_keep_the_dynamic_loss_scale(shared_dataset_dir, tmp_path, monkeypatch):
    """OneFlow names it after the graph, which is another one after a cut and in another process."""
    class Scaled(trainer_module.TrainGraph):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self.set_grad_scaler(flow.amp.GradScaler(2.0**10, growth_factor=2.0, backoff_factor=0.5, growth_interval=3))

    monkeypatch.setattr(trainer_module, "TrainGraph", Scaled)
    options = ["--net_dropout", "0", "--max_grad_norm", "1"]
    trainer = make_trainer(shared_dataset_dir, tmp_path, *options)
    batches = [batch_of(trainer.dataset, ids, labels)
               for ids, labels in random_batches(trainer.dataset, 7)]
    for step, batch in enumerate(batches):
        if step == 4:
            trainer.plateau.learning_rate = 2e-4
        trainer.train_step(batch)
    [scale] = [value for name, value in trainer.current_optimizer_state().items() if name.endswith("-LossScale")]
    assert scale.to_local().numpy() == 2.0**12  # doubled twice, once in each graph
    prepare_new_run(trainer.checkpointer.save_dir, trainer.checkpointer.stores, str(shared_dataset_dir))
    trainer.checkpointer.save(trainer, ["checkpoint"])
    folder = f"{trainer.checkpointer.save_dir}/checkpoint"
    resumed, _ = trainer_module.start_trainer(trainer.args, trainer.dataset, folder)
    resumed.train_step(batches[0])
    [scale] = [value for name, value in resumed.current_optimizer_state().items() if name.endswith("-LossScale")]
    assert scale.to_local().numpy() == 2.0**12
