"""Formulas of the metrics: functions of `Scores` that give a number.

Weights count a row several times, or in part: sums over rows become sums of weights everywhere.
"""

from typing import NamedTuple

import numpy as np

from tools.trainer.calibration import equal_mass_bins
from tools.trainer.cli import UserError


class Scores(NamedTuple):
    """The rows of a split: probabilities and labels float32 (n,), and where options name their columns, weights float32
    (n,) and numbers of groups int64 (n,), else None."""

    probs: np.ndarray
    labels: np.ndarray
    weights: np.ndarray = None
    groups: np.ndarray = None


def with_both_labels(scores, split_name):
    """The scores, unless all labels are equal; files made elsewhere may not say so before. Raises: UserError"""
    if scores.labels.min() == scores.labels.max():
        raise UserError(f"all labels of the {split_name} split are {scores.labels[0]:g}; AUC needs both 0 and 1")
    return scores


def clipped(scores):
    """Probabilities that are certain, and wrong, would have an infinite logloss; the bound is FuxiCTR's."""
    return scores._replace(probs=np.clip(scores.probs, 1e-7, 1 - 1e-7))


def aucs(scores, groups=None):
    """(AUC of each group, float64 (g,), its sum of weights) of those groups whose labels are not all equal.

    AUC is the share of pairs of a click and another row in which the click has the larger score; a tie is half of one.
    groups: integers (n,); None: one for all rows.
    """
    order = np.argsort(scores.probs) if groups is None else np.lexsort((scores.probs, groups))
    probs, positive = scores.probs[order], scores.labels[order].astype(np.float64)
    weights = 1.0 if scores.weights is None else scores.weights[order].astype(np.float64)
    positive *= weights
    negative = weights - positive
    new_group = np.zeros(len(order), bool)
    new_group[0] = True
    if groups is not None:
        new_group[1:] = np.diff(groups[order]) != 0
    new_score = new_group.copy()
    new_score[1:] |= np.diff(probs) != 0
    tie = np.flatnonzero(new_score)  # first rows of equal scores in a group
    first = np.flatnonzero(new_group[tie])  # of these, the first in a group
    positive, negative = np.add.reduceat(positive, tie), np.add.reduceat(negative, tie)
    clicks, others = np.add.reduceat(positive, first), np.add.reduceat(negative, first)
    below = np.cumsum(negative) - negative  # also in the groups before
    below -= np.repeat(below[first], np.diff(np.append(first, len(tie))))
    won = np.add.reduceat(positive * (below + 0.5 * negative), first)
    both = (clicks > 0) & (others > 0)
    return won[both] / (clicks * others)[both], (clicks + others)[both]


def auc(scores):
    """Area under the ROC curve; NaN when all labels are equal."""
    value, _ = aucs(scores)
    return float(value[0]) if len(value) else float("nan")


def logloss(scores):
    """Mean negative log-likelihood in nats; scikit-learn's takes more than five times as long."""
    likelihood = np.where(scores.labels == 1, scores.probs, 1 - scores.probs.astype(np.float64))
    return float(-np.average(np.log(likelihood, out=likelihood), weights=scores.weights))


def calibration(scores):
    """Predicted over actual CTR; above 1 the model promises too many clicks. NaN without a click."""
    predicted, actual = (np.average(values.astype(np.float64), weights=scores.weights)
                         for values in (scores.probs, scores.labels))
    return float(predicted / actual) if actual > 0 else float("nan")


def ece(scores):
    """Expected calibration error: mean distance of predicted and actual CTR over 20 bins of equal mass."""
    return equal_mass_bins(scores.labels, scores.probs, scores.weights).ece


def gauc(scores):
    """Mean of the groups' AUC, weighted by their impressions; groups with labels of one class only are left out.

    As in the DIN paper (arXiv:1706.06978, section 6.3), FuxiCTR (`gAUC`, fuxictr/metrics.py) and EasyRec (`gauc` with
    mean_by_sample_num, easy_rec/python/core/metrics.py). None without groups, or when none of them has both classes.
    """
    if scores.groups is None:
        return None
    values, impressions = aucs(scores, scores.groups)
    return float(np.average(values, weights=impressions)) if len(values) else None


def left_out(scores):
    """Share of the impressions that GAUC leaves out; None without groups."""
    if scores.groups is None:
        return None
    _, group = np.unique(scores.groups, return_inverse=True)
    weights = np.ones(len(group)) if scores.weights is None else scores.weights
    total, clicks = np.bincount(group, weights), np.bincount(group, weights * scores.labels)
    return float(total[(clicks == 0) | (clicks == total)].sum() / total.sum())
