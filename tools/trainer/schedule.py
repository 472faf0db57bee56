"""Learning rates that change with every step inside one graph: warm-up, and Adam's bias correction on CPU.

A rate is compiled into a graph. A table of factors, one a step, is compiled in beside it and looked up by the step
that the optimizer counts (System-Train-TrainStep), on every device. It goes on through a new graph, after a cut say.
"""

import math

from tools.trainer.startup import flow

TRAIN_STEP = "System-Train-TrainStep"  # name of the count in a graph's state
LONGEST = 10**5  # entries of a table, which OneFlow goes through from the front in every step


class Factors(flow.optim.lr_scheduler._LRScheduler):
    """Step t, from 1, has the learning rate times the product of what the parts say of t.

    parts: objects with steps (from the next on, the factor is 1) and factor(t); steps: range of those that the graph
    will take, for no others are in the table, which OneFlow writes out as text when it compiles.
    """

    def __init__(self, optimizer, parts, steps):
        self.parts, self.steps = parts, steps
        super().__init__(optimizer)

    def get_lr(self, base_lr, step):
        return base_lr  # only the graph's schedule is used

    def _generate_conf_for_graph(self, lr_conf):
        lr_conf.piecewise_scaling_conf.SetInParent()
        conf = lr_conf.piecewise_scaling_conf
        for t in range(self.steps.start, min(self.steps.stop, max(part.steps for part in self.parts) + 1)):
            conf.scales.append(math.prod(part.factor(t) for part in self.parts if t <= part.steps))
            conf.boundaries.append(t - 1)  # last step, from 0, that has the scale
        conf.scales.append(1.0)


class BiasCorrection:
    """Adam's bias correction sqrt(1 - b2^t) / (1 - b1^t), for the lazy update of the tables on CPU.

    OneFlow's graph pass for sparse gradients (indexed_slices_optimizer_rewrite_pass.cpp) drops the correction. It is 1
    to float accuracy after 10,000 steps of the usual betas. Adam's epsilon is then added to an uncorrected sqrt(v); for
    the usual epsilon the difference is below 1 % for gradients above 1e-5.
    """

    def __init__(self, betas):
        self.betas = betas
        self.steps = round(10 / (1 - max(betas)))

    def factor(self, t):
        beta1, beta2 = self.betas
        return math.sqrt(1 - beta2**t) / (1 - beta1**t)


class WarmUp:
    """A rate that grows linearly: in step s = 1 ... batches of a run it is s / batches of what it is later.

    before: steps that the optimizer had counted when the run began, those of --model_load_dir.
    """

    def __init__(self, batches, before=0):
        self.batches, self.before = batches, before
        self.steps = before + batches

    def factor(self, t):
        return min(1.0, max(t - self.before, 1) / self.batches)
