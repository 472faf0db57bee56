"""Warm-up, Adam's betas and epsilon, Adagrad, weights in the loss: step by step against the numpy reference."""

import json

import numpy as np
import oneflow as flow
import pytest
from conftest import ROWS, batch_of, make_trainer, random_batches, values_of
from reference import Reference

import deepfm_train_eval as trainer_module
from tools.trainer.checkpoints import prepare_new_run
from tools.trainer.cli import UserError
from tools.trainer.schedule import TRAIN_STEP, BiasCorrection, Factors, WarmUp

DENSE = ["--embedding_l2", "0.05", "--max_grad_norm", "0.1"]


def assert_equal(trainer, reference):
    for name, value in values_of(trainer.model).items():
        assert np.abs(value - reference.values[name]).max() < 1e-5, name


def reference_of(trainer):
    args = trainer.args
    return Reference(values_of(trainer.model), args.learning_rate, args.embedding_l2, args.max_grad_norm,
                     args.adam_betas, args.adam_epsilon, args.optimizer == "adagrad")


@pytest.mark.parametrize("options", [
    ["--adam_betas", "0.8,0.95"], ["--adam_betas", "0.8,0.95", *DENSE], ["--adam_epsilon", "1e-3"],
    ["--adam_epsilon", "1e-3", *DENSE], ["--optimizer", "adagrad"], ["--optimizer", "adagrad", *DENSE],
    ["--optimizer", "adagrad", "--batch_norm"],
], ids=" ".join)
def test_twenty_steps(shared_dataset_dir, tmp_path, options):
    trainer = make_trainer(shared_dataset_dir, tmp_path, "--net_dropout", "0", "--learning_rate", "0.01", *options)
    reference = reference_of(trainer)
    for ids, labels in random_batches(trainer.dataset, 20):
        loss = trainer.train_step(batch_of(trainer.dataset, ids, labels))
        assert float(loss.to_local().numpy()) == pytest.approx(reference.train(ids, labels), abs=1e-5)
    assert_equal(trainer, reference)


@pytest.mark.parametrize("options", [[], DENSE, ["--optimizer", "adagrad"]], ids=["lazy", "dense", "adagrad"])
@pytest.mark.parametrize("cut", [4, 12], ids=["cut while warming up", "cut afterwards"])
def test_warm_up_step_by_step(shared_dataset_dir, tmp_path, options, cut):
    """Through a new graph: the count of steps goes on in it, and so do warm-up and bias correction."""
    trainer = make_trainer(shared_dataset_dir, tmp_path, "--net_dropout", "0", "--warmup_batches", "8", *options)
    reference = reference_of(trainer)
    for step, (ids, labels) in enumerate(random_batches(trainer.dataset, 20), 1):
        if step == cut:
            trainer.plateau.learning_rate = 2e-4
        reference.learning_rate = trainer.plateau.learning_rate * min(1, step / 8)
        trainer.train_step(batch_of(trainer.dataset, ids, labels))
        reference.train(ids, labels)
        assert trainer.learning_rate() == pytest.approx(reference.learning_rate)  # what the log says
        assert_equal(trainer, reference)


def test_warm_up_of_a_run_that_starts_from_a_checkpoint(shared_dataset_dir, tmp_path):
    """The optimizer counts the loaded steps for its bias correction, the warm-up only those of the new run."""
    options = ["--net_dropout", "0", "--warmup_batches", "4"]
    first = make_trainer(shared_dataset_dir, tmp_path, "--net_dropout", "0")
    batches = list(random_batches(first.dataset, 12))
    reference = reference_of(first)
    for ids, labels in batches[:5]:
        first.train_step(batch_of(first.dataset, ids, labels))
        reference.train(ids, labels)
    prepare_new_run(first.checkpointer.save_dir, first.checkpointer.stores, str(shared_dataset_dir))
    first.checkpointer.save(first, ["end"])
    args = trainer_module.parse_args([*first_options(first), *options])
    second, _ = trainer_module.start_trainer(args, first.dataset, f"{first.checkpointer.save_dir}/end")
    second.step = 0
    for step, (ids, labels) in enumerate(batches[5:], 1):
        reference.learning_rate = args.learning_rate * min(1, step / 4)
        second.train_step(batch_of(second.dataset, ids, labels))
        reference.train(ids, labels)
        assert_equal(second, reference)
    assert second.current_optimizer_state()[TRAIN_STEP].to_local().numpy().item() == 12


def first_options(trainer):
    args = trainer.args
    return ["--data_dir", args.data_dir, "--persistent_path", args.persistent_path, "--persistent_path_fm",
            args.persistent_path_fm, "--device", "cpu", "--dnn", "8,6", "--embedding_vec_size", "4", "--batch_size",
            str(ROWS)]


LONG_RUN = range(1, 10**6)


class Conf:
    """In place of OneFlow's message."""

    def __init__(self):
        self.piecewise_scaling_conf = self
        self.scales, self.boundaries = [], []

    def SetInParent(self):  # noqa: N802 - protobuf's name
        pass


def table_of_factors(*parts, steps=LONG_RUN):
    conf = Conf()
    Factors(flow.optim.Adam([flow.nn.Parameter(flow.zeros(1))]), parts, steps)._generate_conf_for_graph(conf)
    return conf.scales, conf.boundaries


def test_the_table_of_factors():
    scales, boundaries = table_of_factors(WarmUp(4))
    assert (scales, boundaries) == ([0.25, 0.5, 0.75, 1.0, 1.0], [0, 1, 2, 3])
    # steps that are done, or behind the end of the run, need no entry
    scales, boundaries = table_of_factors(WarmUp(4, before=2), steps=range(4, 99))
    assert (scales, boundaries) == ([0.5, 0.75, 1.0, 1.0], [3, 4, 5])
    assert table_of_factors(WarmUp(4), steps=range(10, 99)) == ([1.0], [])
    assert table_of_factors(WarmUp(4), steps=range(1, 3)) == ([0.25, 0.5, 1.0], [0, 1])
    both, _ = table_of_factors(WarmUp(4), BiasCorrection((0.9, 0.999)))
    alone, _ = table_of_factors(BiasCorrection((0.9, 0.999)))
    assert len(both) == len(alone) == 10001 and alone[-1] == 1 and alone[-2] == pytest.approx(1, abs=5e-5)
    for t in (1, 2, 100, 9999):
        assert alone[t - 1] == pytest.approx(np.sqrt(1 - 0.999**t) / (1 - 0.9**t))
    assert both[:3] == pytest.approx([0.25 * alone[0], 0.5 * alone[1], 0.75 * alone[2]]) and both[4:] == alone[4:]
    assert len(table_of_factors(BiasCorrection((0.9, 0.9999)))[0]) == 100001  # it lasts as long as the larger beta says


def test_adagrad_leaves_other_rows_alone(shared_dataset_dir, tmp_path):
    trainer = make_trainer(shared_dataset_dir, tmp_path, "--net_dropout", "0", "--optimizer", "adagrad")
    before = values_of(trainer.model)
    ids = np.tile([0, 7, 18], (ROWS, 1))  # the same three rows in every sample
    for _ in range(3):
        trainer.train_step(batch_of(trainer.dataset, ids, np.ones(ROWS, np.float32)))
    state = trainer.current_optimizer_state()
    for name in ("embedding", "embedding_fm"):
        moved = (values_of(trainer.model)[name] != before[name]).any(axis=1)
        kept = state[f"model.{name}.weight-sum"].to_local().numpy()
        assert np.flatnonzero(moved).tolist() == np.flatnonzero(kept.any(axis=1)).tolist() == [0, 7, 18]


def test_adagrads_checkpoint(shared_dataset_dir, tmp_path):
    """Rows of [value | sum]; it goes on from there bit for bit; the checkpoint says which optimizer it is of."""
    trainer = make_trainer(shared_dataset_dir, tmp_path, "--net_dropout", "0", "--optimizer", "adagrad")
    batches = [batch_of(trainer.dataset, *batch) for batch in random_batches(trainer.dataset, 8)]
    for batch in batches[:5]:
        trainer.train_step(batch)
    saver = trainer.checkpointer
    prepare_new_run(saver.save_dir, saver.stores, str(shared_dataset_dir))
    saver.save(trainer, ["five"])
    folder = f"{saver.save_dir}/five"
    state = json.loads((tmp_path / "t" / ".deepfm-best" / "five" / "state.json").read_text())
    assert state["model"]["optimizer"] == "adagrad"
    rows = {}
    reader = flow.one_embedding.make_persistent_table_reader(
        [f"{tmp_path}/t/0-1"], state["tables"]["embedding"]["snapshot"], flow.int64, flow.float, 8,
        physical_block_size=4096)
    for keys, values in reader:
        rows.update(zip(keys.tolist(), values.copy()))
    reader.close()
    value = trainer.model.embedding.weight.to_local().numpy()
    kept = trainer.current_optimizer_state()["model.embedding.weight-sum"].to_local().numpy()
    for number in range(trainer.dataset.num_ids):
        assert np.array_equal(rows[number], np.concatenate([value[number], kept[number]]))
    args = trainer_module.parse_args(first_options(trainer) + ["--net_dropout", "0"])
    trainer_module.adopt_model(args, folder)
    assert args.optimizer == "adagrad"
    again, _ = trainer_module.start_trainer(args, trainer.dataset, folder)
    for batch in batches[5:]:
        trainer.train_step(batch)
        again.train_step(batch)
    for name, value in values_of(trainer.model).items():
        assert np.array_equal(value, values_of(again.model)[name]), name
    args = trainer_module.parse_args(first_options(trainer) + ["--optimizer", "adam"])
    with pytest.raises(UserError, match="saved with --optimizer adagrad, now it is adam"):
        trainer_module.adopt_model(args, folder)


def test_rows_of_another_optimizer_are_refused(shared_dataset_dir, tmp_path):
    trainer = make_trainer(shared_dataset_dir, tmp_path, "--optimizer", "adagrad")
    saver = trainer.checkpointer
    prepare_new_run(saver.save_dir, saver.stores, str(shared_dataset_dir))
    saver.save(trainer, ["start"])
    [store, _] = trainer_module.make_tables(trainer_module.parse_args(first_options(trainer)), trainer.dataset.num_ids)
    with pytest.raises(UserError, match="rows of 8 floats, expected 3 x 4; check --embedding_vec_size, --optimizer"):
        store.check_snapshot("test-step_0", 1)


@pytest.mark.parametrize("options", [[], ["--batch_norm"], DENSE, ["--optimizer", "adagrad"]])
def test_weights_in_the_loss(weighted_dataset_dir, tmp_path, options):
    """Mean over the weights of the batch; batch normalisation does not know them."""
    trainer = make_trainer(weighted_dataset_dir, tmp_path, "--net_dropout", "0", "--weight_column", "w", *options)
    reference, rng = reference_of(trainer), np.random.default_rng(1)
    for ids, labels in random_batches(trainer.dataset, 12):
        weights = (rng.exponential(size=len(ids)) * (rng.random(len(ids)) < 0.8)).astype(np.float32)
        loss = trainer.train_step(batch_of(trainer.dataset, ids, labels, weights))
        assert float(loss.to_local().numpy()) == pytest.approx(reference.train(ids, labels, weights=weights), abs=1e-5)
        assert float(trainer.step_weight.to_local().numpy()) == pytest.approx(weights.sum(), rel=1e-6)
    assert_equal(trainer, reference)


def test_a_batch_without_weight_changes_nothing_by_itself(weighted_dataset_dir, tmp_path):
    trainer = make_trainer(weighted_dataset_dir, tmp_path, "--net_dropout", "0", "--weight_column", "w")
    before = values_of(trainer.model)
    [(ids, labels)] = random_batches(trainer.dataset, 1)
    trainer.losses.add(trainer.train_step(batch_of(trainer.dataset, ids, labels, np.zeros(len(ids), np.float32))),
                       trainer.step_weight, 1)
    trainer.losses.read()
    assert trainer.losses.take() == 0
    for name, value in values_of(trainer.model).items():
        assert np.array_equal(value, before[name]), name
