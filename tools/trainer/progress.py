"""Where a run is: its counters, what is due, what is left; all that a resume takes from a checkpoint but tensors."""

from tools.trainer.plateau import Plateau
from tools.trainer.run_log import MeanLoss
from tools.trainer.schedule import WarmUp

COUNTERS = ("step", "epoch", "step_in_epoch", "best")
PLATEAU_OPTIONS = ("learning_rate", "patience", "min_delta", "lr_factor", "min_lr", "early_stop_patience")


class Progress:
    """What a trainer knows of its run.

    Attributes that survive in a checkpoint: step (steps taken), epoch (from 1, that of the next step), step_in_epoch,
    best (epoch, step and metrics of the best evaluation, or None), plateau, losses (since the last log line).
    """

    def __init__(self, args, steps_per_epoch):
        """args: options of the trainer; steps_per_epoch: None where nothing is trained"""
        self.args, self.steps_per_epoch = args, steps_per_epoch
        self.plateau = Plateau(**{name: getattr(args, name) for name in PLATEAU_OPTIONS})
        self.step, self.epoch, self.step_in_epoch, self.best = 0, 1, 0, None
        self.losses = MeanLoss(" or --loss_scale_policy dynamic" if args.amp else "")

    def steps_left(self):
        """Steps to the end of the run, should it not stop early; 0 or less at its end."""
        left = self.args.train_batches - self.step
        if self.args.epochs is None:
            return left
        return min(left, (self.args.epochs - self.epoch + 1) * self.steps_per_epoch - self.step_in_epoch)

    def is_finished(self):
        return self.plateau.stopped or self.steps_left() <= 0

    def is_epoch_over(self):
        """Of another number of processes an epoch may have had more steps."""
        return self.step_in_epoch >= self.steps_per_epoch

    def begin_epoch(self):
        self.epoch, self.step_in_epoch = self.epoch + 1, 0

    def is_evaluation_due(self):
        """At the end of an epoch, or every --eval_interval steps; always at the end of the run."""
        interval = self.args.eval_interval
        return (self.step % interval if interval else self.step_in_epoch) == 0 or self.steps_left() <= 0

    def learning_rate(self):
        """Of the last step."""
        batches = self.args.warmup_batches
        return self.plateau.learning_rate * (WarmUp(batches).factor(self.step) if batches else 1)

    def progress_state(self):
        """Parts of state.json."""
        return {"progress": {name: getattr(self, name) for name in COUNTERS}, "plateau": self.plateau.state(),
                "losses": self.losses.sums}

    def load_progress(self, state):
        """Continue where the checkpoint's run was, rather than begin a new run with its parameters."""
        for name in COUNTERS:
            setattr(self, name, state["progress"][name])
        self.plateau.load(state["plateau"])
        self.losses.sums = state.get("losses", self.losses.sums)


def trained_epoch(progress):
    """The epoch of the last step; progress: of a state.json."""
    return progress["epoch"] - 1 if progress["step_in_epoch"] == 0 else progress["epoch"]
