"""tools/trainer/calibration.py against definitions in plain Python."""

import numpy as np
import pytest

from tools.trainer.calibration import equal_mass_bins


def ece_by_definition(labels, probs, bins):
    """Rows in order of their prediction, cut into bins of equally many."""
    order = np.argsort(probs, kind="stable")
    total = 0.0
    for rows in np.array_split(order, bins):
        total += len(rows) / len(probs) * abs(probs[rows].mean() - labels[rows].mean())
    return total


@pytest.mark.parametrize("count, bins", [(400, 20), (1000, 8), (20, 20)])
def test_bins_and_ece_without_ties(count, bins):
    rng = np.random.default_rng(count)
    probs = rng.random(count)
    labels = (rng.random(count) < probs**2).astype(float)
    found = equal_mass_bins(labels, probs, bins=bins)
    assert list(found.rows) == [count // bins] * bins
    assert found.ece == pytest.approx(ece_by_definition(labels, probs, bins))
    assert found.mean_predicted == pytest.approx(probs.mean())
    assert found.mean_actual == pytest.approx(labels.mean())
    assert found.clicks.sum() == labels.sum()
    assert (found.low[1:] > found.high[:-1]).all() and found.low[0] == probs.min() and found.high[-1] == probs.max()


def test_the_order_of_the_rows_does_not_matter():
    """Most predictions are equal: they stay together."""
    rng = np.random.default_rng(0)
    probs = rng.choice([0.1, 0.2, 0.7], 300, p=[0.6, 0.3, 0.1])
    labels = (rng.random(300) < 0.3).astype(float)
    found = equal_mass_bins(labels, probs)
    assert list(found.predicted) == pytest.approx([0.1, 0.2, 0.7])
    for value, rate, rows in zip((0.1, 0.2, 0.7), found.actual, found.rows):
        assert rate == pytest.approx(labels[probs == value].mean()) and rows == (probs == value).sum()
    order = rng.permutation(300)
    for one, other in zip(found, equal_mass_bins(labels[order], probs[order])):
        np.testing.assert_allclose(one, other)


def test_a_weight_is_a_number_of_equal_rows():
    rng = np.random.default_rng(1)
    probs, weights = rng.random(200), rng.integers(0, 4, 200)
    labels = (rng.random(200) < probs).astype(float)
    weighted = equal_mass_bins(labels, probs, weights, bins=7)
    repeated = equal_mass_bins(np.repeat(labels, weights), np.repeat(probs, weights), bins=7)
    for name in ("mass", "predicted", "actual", "low", "high"):
        np.testing.assert_allclose(getattr(weighted, name), getattr(repeated, name))
    assert weighted.ece == pytest.approx(repeated.ece)
    assert (weighted.rows <= repeated.rows).all()
    np.testing.assert_allclose(equal_mass_bins(labels, probs, np.full(200, 0.3)).effective, 10)  # 20 bins of 10 rows


def test_one_prediction_and_one_row():
    constant = equal_mass_bins([0, 0, 1, 0], [0.5] * 4)
    assert (list(constant.rows), list(constant.actual), constant.ece) == ([4], [0.25], 0.25)
    assert equal_mass_bins([1], [1.0]).ece == 0
