"""Learning-rate cuts and early stopping."""


class Plateau:
    """Decides by a monitor that should grow, once per evaluation.

    No gain of more than min_delta for `patience` epochs: the rate is multiplied by lr_factor, down to min_lr, and the
    counter starts again. No gain for `early_stop_patience` epochs (0: never): `stopped`.
    Attributes that a checkpoint keeps: learning_rate, best (the largest monitor, or None), epochs_to_cut and
    epochs_to_stop (epochs without gain, as counted for the cut and for the stop), stopped.
    """

    STATE = ("learning_rate", "best", "epochs_to_cut", "epochs_to_stop", "stopped")

    def __init__(self, *, learning_rate, patience, min_delta, lr_factor, min_lr, early_stop_patience):
        self.learning_rate, self.best = learning_rate, None
        self.epochs_to_cut = self.epochs_to_stop = 0
        self.stopped = False
        self.patience, self.min_delta, self.early_stop_patience = patience, min_delta, early_stop_patience
        self.lr_factor, self.min_lr = lr_factor, min_lr

    def update(self, monitor):
        """Count one epoch. Returns whether it is the best so far."""
        if self.best is None or monitor > self.best + self.min_delta:
            self.best, self.epochs_to_cut, self.epochs_to_stop = monitor, 0, 0
            return True
        self.epochs_to_cut += 1
        self.epochs_to_stop += 1
        if self.epochs_to_cut >= self.patience:
            self.epochs_to_cut = 0
            self.learning_rate = max(self.learning_rate * self.lr_factor, self.min_lr)
        self.stopped = 0 < self.early_stop_patience <= self.epochs_to_stop
        return False

    def state(self):
        return {name: getattr(self, name) for name in self.STATE}

    def load(self, state):
        for name in self.STATE:
            setattr(self, name, state[name])
