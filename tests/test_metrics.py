"""AUC, logloss, GAUC, calibration, monitors, learning-rate cuts and stopping, the metrics log."""

import json
import time

import numpy as np
import pytest
from sklearn.metrics import log_loss, roc_auc_score
from tensorboardX.proto.event_pb2 import Event

from deepfm_train_eval import METRICS, compute_metrics
from tools.trainer import metrics
from tools.trainer.cli import UserError
from tools.trainer.metrics import Scores
from tools.trainer.plateau import MONITORS, Plateau
from tools.trainer.run_log import MetricsLog


def auc_and_logloss(labels, probs):
    values = compute_metrics(Scores(probs, labels))
    assert list(values) == [name for name in METRICS if "gauc" not in name]
    return values["auc"], values["logloss"]


@pytest.mark.parametrize("levels", [0, 5])
def test_auc_and_logloss_equal_scikit_learns(levels):
    """levels: number of different scores, so that there are ties; 0: all differ."""
    rng = np.random.default_rng(levels)
    labels = (rng.random(5000) < 0.3).astype(np.float32)
    probs = np.clip(0.3 + 0.2 * labels + 0.2 * rng.normal(size=5000), 0.01, 0.99)
    probs = (np.ceil(probs * levels) / (levels + 1) if levels else probs).astype(np.float32)
    auc, logloss = auc_and_logloss(labels, probs)
    positives, negatives = probs[labels == 1], probs[labels == 0]
    by_pairs = np.mean(positives[:, None] > negatives) + 0.5 * np.mean(positives[:, None] == negatives)
    assert auc == pytest.approx(by_pairs, abs=1e-9) and auc == pytest.approx(roc_auc_score(labels, probs), abs=1e-9)
    assert logloss == pytest.approx(log_loss(labels, probs.astype(np.float64)), abs=1e-9)


def test_certain_and_wrong_costs_a_finite_amount():
    auc, logloss = auc_and_logloss(np.float32([0, 1]), np.float32([1, 0]))
    assert auc == 0 and logloss == pytest.approx(-np.log(1e-7), rel=0.01)


@pytest.mark.parametrize("early_stop_patience, stopped", [(0, False), (3, False), (2, True)])
def test_a_resumed_run_stops_by_the_patience_of_now(early_stop_patience, stopped):
    settings = {"learning_rate": 1, "patience": 9, "min_delta": 0, "lr_factor": 0.1, "min_lr": 0}
    plateau = Plateau(early_stop_patience=2, **settings)
    assert [plateau.update(0) or plateau.stopped for _ in range(3)] == [True, False, True]
    resumed = Plateau(early_stop_patience=early_stop_patience, **settings)
    resumed.load(plateau.state())
    assert resumed.stopped == stopped


def test_one_class_has_no_auc():
    auc, logloss = auc_and_logloss(np.ones(4, np.float32), np.full(4, 0.5, np.float32))
    assert np.isnan(auc) and logloss == pytest.approx(np.log(2))


def random_scores(count=3000, groups=250, levels=0, seed=0, weighted=False):
    """Scores with ties (levels), groups of very different sizes, among them many of one row or one class."""
    rng = np.random.default_rng(seed)
    numbers = rng.integers(-2**62, 2**62, groups)[np.minimum(rng.zipf(1.4, count), groups) - 1]
    labels = (rng.random(count) < 0.15).astype(np.float32)
    probs = (0.2 + 0.1 * labels + 0.2 * rng.random(count) + 0.1 * (numbers > 0)).astype(np.float32)
    probs = np.float32(np.ceil(probs * levels) / levels) if levels else probs
    weights = np.float32(rng.exponential(size=count) * (rng.random(count) < 0.8)) if weighted else None
    return Scores(probs, labels, weights, numbers)


def gauc_by_definition(scores):
    """(GAUC, share of the impressions that is left out), group by group with scikit-learn's AUC"""
    weights = np.ones(len(scores.probs)) if scores.weights is None else scores.weights.astype(np.float64)
    values, impressions = [], []
    for group in np.unique(scores.groups):
        rows = (scores.groups == group) & (weights > 0)
        if len(np.unique(scores.labels[rows])) == 2:
            values.append(roc_auc_score(scores.labels[rows], scores.probs[rows], sample_weight=weights[rows]))
            impressions.append(weights[rows].sum())
    return np.average(values, weights=impressions), 1 - sum(impressions) / weights.sum()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("levels", [0, 12])
def test_gauc_equals_its_definition(levels, weighted):
    scores = random_scores(levels=levels, weighted=weighted)
    expected, left_out = gauc_by_definition(scores)
    assert metrics.gauc(scores) == pytest.approx(expected, abs=1e-12) and 0.05 < left_out < 0.9
    assert metrics.left_out(scores) == pytest.approx(left_out, abs=1e-9)
    assert abs(expected - metrics.auc(scores)) > 1e-4  # it is another number than AUC


def test_gauc_of_one_group_is_auc_and_of_one_class_nothing():
    scores = random_scores()._replace(groups=np.zeros(3000, np.int64))
    assert metrics.gauc(scores) == metrics.auc(scores)
    alone = scores._replace(groups=np.arange(3000))
    assert metrics.gauc(alone) is None and metrics.left_out(alone) == 1
    assert "gauc" not in compute_metrics(scores._replace(groups=None))


def test_weights_count_rows_several_times():
    """Whole weights are the same as repeated rows, weight 0 is the same as no row."""
    rng = np.random.default_rng(2)
    scores = random_scores(levels=200)._replace(weights=rng.integers(0, 4, 3000).astype(np.float32))
    times = scores.weights.astype(int)
    repeated = Scores(*(None if array is scores.weights else np.repeat(array, times) for array in scores))
    first, second = compute_metrics(scores), compute_metrics(repeated)
    assert list(first) == list(METRICS) and first == pytest.approx(second, abs=1e-9)
    unweighted = compute_metrics(scores._replace(weights=None))
    assert all(abs(first[name] - unweighted[name]) > 1e-5 for name in first)
    assert compute_metrics(scores._replace(weights=np.full(3000, 0.5, np.float32))) == pytest.approx(unweighted)


@pytest.mark.parametrize("weighted", [False, True])
def test_weighted_auc_and_logloss_equal_scikit_learns(weighted):
    scores = random_scores(levels=40, weighted=weighted)
    values, options = compute_metrics(scores), {"sample_weight": scores.weights}
    assert values["auc"] == pytest.approx(roc_auc_score(scores.labels, scores.probs, **options), abs=1e-9)
    assert values["logloss"] == pytest.approx(log_loss(scores.labels, scores.probs.astype(float), **options), abs=1e-9)


def test_calibration_and_ece_by_hand():
    """20 bins of 50 rows; in bin b 2 b rows are clicked, and 0.02 more of them are predicted."""
    labels = np.concatenate([np.arange(50) < 2 * number for number in range(20)]).astype(np.float32)
    probs = np.repeat(np.float32(0.04 * np.arange(20) + 0.02), 50)
    order = np.random.default_rng(0).permutation(1000)
    values = compute_metrics(Scores(probs[order], labels[order]))
    assert values["calibration"] == pytest.approx(0.40 / 0.38, abs=1e-6)
    assert values["ece"] == pytest.approx(0.02, abs=1e-6)
    assert np.isnan(metrics.calibration(Scores(probs, np.zeros(1000, np.float32))))


def test_a_large_split_is_measured_in_seconds():
    """A twentieth of 4.6 million rows, so that a busy machine does not fail it."""
    scores = random_scores(230_000, 25_000)
    start = time.perf_counter()
    compute_metrics(scores)
    assert time.perf_counter() - start < 2


@pytest.mark.parametrize("name, value, text", [("auc-logloss", 0.7 - 0.5, "0.200000"), ("auc", 0.7, "0.700000"),
                                               ("logloss", -0.5, "0.500000")])
def test_monitors(name, value, text):
    monitor = MONITORS[name]
    assert monitor.value({"auc": 0.7, "logloss": 0.5, "ece": 9}) == value and monitor.text(value) == text


def test_what_is_counted_in_words():
    plateau = Plateau(learning_rate=1e-3, patience=2, min_delta=0, lr_factor=0.1, min_lr=0, early_stop_patience=3)
    texts = []
    for monitor in (0.5, 0.4, 0.4, 0.4):
        plateau.update(monitor)
        texts.append(plateau.counts())
    assert texts == [
        "", "Evaluations without gain: 1, the run stops at 3; since the last cut: 1, the rate is cut at 2",
        "Evaluations without gain: 2, the run stops at 3; since the last cut: 0, the rate is cut at 2",
        "Evaluations without gain: 3, the run stops; since the last cut: 1, the rate is cut at 2"]
    assert max(map(len, texts)) <= 98  # with its two blanks within 100 columns
    plateau = Plateau(learning_rate=1, patience=9, min_delta=0, lr_factor=0.1, min_lr=0, early_stop_patience=0)
    plateau.update(0.5)
    plateau.update(0.4)
    assert "Evaluations without gain: 1, none stops the run; since" in plateau.counts()


def run_plateau(monitors, patience=2, early_stop_patience=4, **options):
    """[(learning rate behind the epoch, improved, stopped), ...] until it stops"""
    settings = {"learning_rate": 1e-3, "min_delta": 1e-6, "lr_factor": 0.1, "min_lr": 1e-6, **options}
    plateau = Plateau(patience=patience, early_stop_patience=early_stop_patience, **settings)
    states = []
    for monitor in monitors:
        improved = plateau.update(monitor)
        states.append((pytest.approx(plateau.learning_rate), improved, plateau.stopped))
        if plateau.stopped:
            break
    return states


def test_cuts_and_stop_with_the_defaults():
    assert run_plateau([0.1, 0.3, 0.2, 0.2, 0.4, 0.3, 0.3, 0.3, 0.3, 0.9]) == [
        (1e-3, True, False), (1e-3, True, False), (1e-3, False, False), (1e-4, False, False), (1e-4, True, False),
        (1e-4, False, False), (1e-5, False, False), (1e-5, False, False), (1e-6, False, True)]


def test_fuxictrs_recipe_cuts_at_once_and_stops_at_the_second():
    assert run_plateau([0.3, 0.2, 0.4, 0.39, 0.38, 0.5], patience=1, early_stop_patience=2) == [
        (1e-3, True, False), (1e-4, False, False), (1e-4, True, False), (1e-5, False, False), (1e-6, False, True)]


def test_small_gains_do_not_count_and_the_rate_has_a_floor():
    states = run_plateau([0.3, 0.3 + 5e-7, 0.3 + 9e-7, 0.3 + 3e-6], patience=1, early_stop_patience=0, min_lr=5e-5)
    assert states == [(1e-3, True, False), (1e-4, False, False), (5e-5, False, False), (5e-5, True, False)]


def test_a_gain_is_larger_than_min_delta():
    states = run_plateau([0.25, 0.75, 0.75 + 2**-20], patience=1, min_delta=0.5)
    assert [improved for _, improved, _ in states] == [True, False, True]


def test_without_early_stopping_it_goes_on():
    assert len(run_plateau([0.5] + [0.1] * 50, early_stop_patience=0)) == 51


def test_plateau_state_survives(tmp_path):
    settings = {"learning_rate": 1e-3, "min_delta": 0, "lr_factor": 0.1, "min_lr": 0, "patience": 2}
    first, second = (Plateau(early_stop_patience=4, **settings) for _ in range(2))
    for monitor in (0.3, 0.2, 0.1):
        first.update(monitor)
    second.load(json.loads(json.dumps(first.state())))
    for monitor in (0.2, 0.1, 0.1):
        assert first.update(monitor) == second.update(monitor) and first.state() == second.state()
    assert second.stopped


def scalars(folder):
    """{(tag, step), ...} of the TensorBoard events, read from their records: length, 4 bytes, event, 4 bytes."""
    found = set()
    for path in folder.glob("deepfm.out.tfevents.*"):
        content, position = path.read_bytes(), 0
        while position < len(content):
            length = int.from_bytes(content[position:position + 8], "little")
            event = Event.FromString(content[position + 12:position + 12 + length])
            found |= {(value.tag, event.step) for value in event.summary.value}
            position += 16 + length
    return found


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_metrics_log_and_its_resumption(tmp_path):
    log = MetricsLog(tmp_path)
    for step in (1, 2, 3):
        log.write("train", step, loss=1.0 / step, epoch=1)
    log.write("val", 3, auc=0.7)
    log.write("test", 2, auc=0.6)  # at the end, with the best model: the next end writes it again
    assert len(lines(tmp_path)) == 5  # readable while the run goes on, and there after a kill
    assert {("train/loss", 3), ("val/auc", 3)} <= scalars(tmp_path)
    log.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"event": "train", "st')  # a killed process
    time.sleep(1.1)  # event files are named after the second
    log = MetricsLog(tmp_path, resumed_step=2)
    log.write("train", 3, loss=9.0)
    log.close()
    assert [(line["event"], line["step"], line["loss"]) for line in lines(tmp_path)] == [
        ("train", 1, 1.0), ("train", 2, 0.5), ("train", 3, 9.0)]
    assert {("train/loss", 1), ("train/loss", 3), ("val/auc", 3)} <= scalars(tmp_path)


def test_a_new_run_does_not_keep_an_old_runs_lines(tmp_path):
    for loss in (1.0, 2.0):
        log = MetricsLog(tmp_path)
        log.write("train", 1, loss=loss)
        log.close()
    assert [line["loss"] for line in lines(tmp_path)] == [2.0] and len(list(tmp_path.glob("*tfevents*"))) == 1


def test_files_of_other_programs_are_left_alone(tmp_path):
    (tmp_path / "events.out.tfevents.1.host").write_text("of another program")
    MetricsLog(tmp_path).close()
    assert (tmp_path / "events.out.tfevents.1.host").read_text() == "of another program"
    for content in (b'{"mine": 1}\n', b"\xff\n", b"[" * 100000 + b"\n", b'{"event": "train", "step": 1}\n7\n'):
        (tmp_path / "metrics.jsonl").write_bytes(content)
        for resumed_step in (None, 5):
            with pytest.raises(UserError, match="metrics.jsonl, line . is not a line of the trainer's log; move"):
                MetricsLog(tmp_path, resumed_step)
        assert (tmp_path / "metrics.jsonl").read_bytes() == content


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    log = MetricsLog(None)
    log.write("train", 1, loss=1.0)
    log.close()
    assert not list(tmp_path.iterdir())
