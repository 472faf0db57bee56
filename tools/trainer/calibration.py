"""Calibration of click probabilities: bins of equal mass and the expected calibration error (ECE) over them."""

from typing import NamedTuple

import numpy as np

BINS = 20


class Bins(NamedTuple):
    """Arrays of one length, a bin an element, by rising prediction.

    rows, clicks: int, rows and rows with label 1; low, high: smallest and largest prediction; mass: sum of
    weights; predicted, actual: weighted means of prediction and label; effective: (sum of weights)^2 / sum of squares,
    the number of equally weighted rows whose mean is as certain.
    """

    rows: np.ndarray
    clicks: np.ndarray
    low: np.ndarray
    high: np.ndarray
    mass: np.ndarray
    predicted: np.ndarray
    actual: np.ndarray
    effective: np.ndarray

    @property
    def mean_predicted(self):
        """Predicted CTR of all rows."""
        return float(np.average(self.predicted, weights=self.mass))

    @property
    def mean_actual(self):
        """Actual CTR of all rows."""
        return float(np.average(self.actual, weights=self.mass))

    @property
    def ece(self):
        """Expected calibration error: mean distance of predicted and actual CTR, weighted by the bins' masses."""
        return float(np.average(abs(self.predicted - self.actual), weights=self.mass))


def equal_mass_bins(labels, probs, weights=None, bins=BINS):
    """Rows sorted by prediction and cut into `bins` bins of equal mass; Bins.

    Equal predictions stay in one bin, so that the order of the rows does not matter: bins may then differ in mass, and
    be fewer. Rows of weight 0 do not count.
    Args: labels 0 or 1, probs, weights (None: all 1, their sum above 0): arrays (n,) with n > 0.
    """
    labels, probs = np.asarray(labels, dtype=np.float64), np.asarray(probs)
    if weights is None:
        weights = np.ones(len(probs))
    else:
        weights = np.asarray(weights, dtype=np.float64)
        kept = weights > 0
        labels, probs, weights = labels[kept], probs[kept], weights[kept]
    values, place = np.unique(probs, return_inverse=True)
    mass = np.bincount(place, weights)
    centre = np.cumsum(mass) - mass / 2
    number = np.minimum((centre * (bins / mass.sum())).astype(np.int64), bins - 1)  # of each value's bin
    _, first, number = np.unique(number, return_index=True, return_inverse=True)
    place, last = number[place], np.append(first[1:], len(values)) - 1  # of a bin among the values
    total = np.bincount(place, weights)
    return Bins(rows=np.bincount(place), clicks=np.bincount(place, labels).astype(np.int64), low=values[first],
                high=values[last], mass=total, predicted=np.bincount(place, weights * probs) / total,
                actual=np.bincount(place, weights * labels) / total,
                effective=total * total / np.bincount(place, weights * weights))
