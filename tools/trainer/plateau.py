"""What --monitor makes of an evaluation; learning-rate cuts and early stopping."""

from typing import NamedTuple


class Monitor(NamedTuple):
    """What decides: the sum of signs times metrics, the larger the better. title: how the log calls it."""

    title: str
    signs: dict

    def value(self, metrics):
        """metrics: {name: value}"""
        return sum(sign * metrics[name] for name, sign in self.signs.items())

    def text(self, value):
        """A value as the log shows it: logloss by itself is not negative."""
        return f"{value if max(self.signs.values()) > 0 else -value:.6f}"


MONITORS = {
    "auc-logloss": Monitor("AUC - LogLoss", {"auc": 1, "logloss": -1}),
    "auc": Monitor("AUC", {"auc": 1}),
    "logloss": Monitor("LogLoss", {"logloss": -1}),
}


class Plateau:
    """Decides by a monitor that should grow, once per evaluation.

    No gain of more than min_delta for `patience` evaluations: the rate is multiplied by lr_factor, down to min_lr, and
    the counter starts again. No gain for `early_stop_patience` evaluations (0: never): `stopped`.
    Attributes that a checkpoint keeps: learning_rate, best (the largest monitor, or None), epochs_to_cut and
    epochs_to_stop (evaluations without gain, as counted for the cut and for the stop; an evaluation was an epoch when
    they got their names), stopped (on loading by the early_stop_patience of now).
    """

    STATE = ("learning_rate", "best", "epochs_to_cut", "epochs_to_stop", "stopped")

    def __init__(self, *, learning_rate, patience, min_delta, lr_factor, min_lr, early_stop_patience):
        self.learning_rate, self.best = learning_rate, None
        self.epochs_to_cut = self.epochs_to_stop = 0
        self.stopped = False
        self.patience, self.min_delta, self.early_stop_patience = patience, min_delta, early_stop_patience
        self.lr_factor, self.min_lr = lr_factor, min_lr

    def update(self, monitor):
        """Count one evaluation. Returns whether it is the best so far."""
        if self.best is None or monitor > self.best + self.min_delta:
            self.best, self.epochs_to_cut, self.epochs_to_stop = monitor, 0, 0
            return True
        self.epochs_to_cut += 1
        self.epochs_to_stop += 1
        if self.epochs_to_cut >= self.patience:
            self.epochs_to_cut = 0
            self.learning_rate = max(self.learning_rate * self.lr_factor, self.min_lr)
        self.stopped = self.is_to_stop()
        return False

    def counts(self):
        """What is counted, in words; empty after a gain."""
        if self.epochs_to_stop == 0:
            return ""
        stop = "the run stops" + ("" if self.stopped else f" at {self.early_stop_patience}")
        stop = stop if self.early_stop_patience else "none stops the run"
        return (f"Evaluations without gain: {self.epochs_to_stop}, {stop}; since the last cut: {self.epochs_to_cut}, "
                f"the rate is cut at {self.patience}")

    def state(self):
        return {name: getattr(self, name) for name in self.STATE}

    def load(self, state):
        for name in self.STATE:
            setattr(self, name, state[name])
        self.stopped = self.is_to_stop()

    def is_to_stop(self):
        return 0 < self.early_stop_patience <= self.epochs_to_stop
