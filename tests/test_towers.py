"""A further tower: it takes a class and another `build_model`, and trains, saves, resumes and loads like the rest."""

import re

import numpy as np
from conftest import ROOT, assert_same, at_the_same_time, metrics_lines, run_trainer

from tools.trainer import checkpoints

# what somebody who adds a cross network (arXiv:1708.05123, one layer) writes, and where the process is to be killed
PROGRAM = """
import os, sys
sys.path.insert(0, {root!r})
import deepfm_train_eval as module
flow, nn = module.flow, module.nn

class Cross(nn.Module):
    def __init__(self, device, width):
        super().__init__()
        def parameter(*shape):
            start = flow.ones(*shape) * 0.1
            return nn.Parameter(start.to_global(device.placement, flow.sbp.broadcast))
        self.weight, self.bias, self.out = parameter(width, 1), parameter(width), parameter(width, 1)

    def forward(self, x):
        return flow.matmul(x * flow.matmul(x, self.weight) + self.bias + x, self.out)

build = module.build_model
def build_model(args, device, tables, dataset):
    model = build(args, device, tables, dataset)
    towers = {{"cross": Cross(device, len(dataset.fields) * args.embedding_vec_size)}}
    return module.DeepFM(device, model.embedding, model.embedding_fm, model.dnn, towers)
module.build_model = build_model

step, last = module.Trainer.train_step, {kill}
def killed_after(self, batch):
    loss = step(self, batch)
    if self.step == last:
        os.kill(os.getpid(), 9)
    return loss
module.Trainer.train_step = killed_after
module.main(sys.argv[1:])
"""


def run(data_dir, work, *options, kill=None):
    work.mkdir(exist_ok=True)
    (work / "program.py").write_text(PROGRAM.format(root=str(ROOT), kill=kill))
    output, _ = run_trainer(data_dir, work, "--model_save_dir", work / "save", "--train_batches", "14",
                            "--checkpoint_interval", "2", *options, status=-9 if kill else 0,
                            script=work / "program.py")
    return output


def dense(work, checkpoint):
    folder = str(work / "save" / checkpoint)
    return checkpoints.read_dense(folder, checkpoints.read_checkpoint(folder))


def test_cross_network(distinct_dataset_dir, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"

    def run_with_a_kill():
        run(distinct_dataset_dir, killed, kill=5)
        return run(distinct_dataset_dir, killed, "--resume")

    output, rest = at_the_same_time(lambda: run(distinct_dataset_dir, whole, "--save_initial_model"), run_with_a_kill)
    names = [f"model.towers.cross.{name}" for name in ("weight", "bias", "out")]
    first, last = dense(whole, "initial_checkpoint"), dense(whole, "step_14")
    for name in names:
        assert (first[name] == np.float32(0.1)).all() and (last[name] != first[name]).any(), name
        assert last[f"{name}-m"].any() and last[f"{name}-v"].any()
    assert "Resuming from" in rest
    assert_same(dense(killed, "step_14"), last)
    best = ["--eval_only", "--model_load_dir", whole / "save" / "best_checkpoint"]
    scored = run(distinct_dataset_dir, tmp_path / "fresh", *best, "--persistent_path", whole / "tables",
                 "--persistent_path_fm", whole / "tables_fm")
    for split in ("val", "test"):
        assert metrics_lines(scored, split)[-1] == metrics_lines(output, split)[-1]
    counted = re.search(r"parameters \d+ \(58 x 5 \+ (\d+)\)", output).group(1)
    assert int(counted) == sum(last[name].size for name in last if name.startswith("model.") and name[-2] != "-")
