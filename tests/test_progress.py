"""How long a run goes, when it evaluates, what it says and records meanwhile."""

import json
import re
import shutil
import time
from types import SimpleNamespace

import numpy as np
import oneflow as flow
import pyarrow.parquet as pq
import pytest
from conftest import make_dataset, make_trainer, metrics_lines, run_trainer, train_here

import deepfm_train_eval as trainer_module
from tools.trainer import run_log
from tools.trainer.cli import UserError
from tools.trainer.progress import Progress
from tools.trainer.run_log import MeanLoss

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # petastorm uses pyarrow's old interfaces


def events(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def evaluations(steps_per_epoch, **options):
    """[(epoch of the next step, step)] at which a run evaluates, from its first step to its last."""
    defaults = dict(vars(trainer_module.make_parser().parse_args([])), train_batches=1000)
    progress, found = Progress(SimpleNamespace(**{**defaults, **options}), steps_per_epoch), []
    while not progress.is_finished():
        progress.step += 1
        progress.step_in_epoch += 1
        if progress.is_epoch_over():
            progress.begin_epoch()
        if progress.is_evaluation_due():
            found.append((progress.epoch, progress.step))
    return found


@pytest.mark.parametrize("options, expected", [
    ({"train_batches": 17}, [(2, 7), (3, 14), (3, 17)]),
    ({"train_batches": 14}, [(2, 7), (3, 14)]),
    ({"epochs": 2}, [(2, 7), (3, 14)]),
    ({"epochs": 2, "train_batches": 9}, [(2, 7), (2, 9)]),  # whichever ends first
    ({"epochs": 2, "eval_interval": 5}, [(1, 5), (2, 10), (3, 14)]),
    ({"train_batches": 15, "eval_interval": 5}, [(1, 5), (2, 10), (3, 15)]),
    ({"train_batches": 12, "eval_interval": 100}, [(2, 12)]),  # always at the end
])
def test_when_a_run_evaluates(options, expected):
    assert evaluations(7, **options) == expected


def test_epochs_end_a_run(run_here, shared_dataset_dir, tmp_path):
    output = run_here(shared_dataset_dir, tmp_path, "--epochs", "2", "--log_dir", tmp_path / "logs",
                            "--loss_print_interval", "5")
    assert [(line["event"], line["step"]) for line in events(tmp_path / "logs")] == [
        ("train", 5), ("val", 7), ("train", 10), ("train", 14), ("val", 14),
        ("test", events(tmp_path / "logs")[-1]["step"])]
    lines = output.splitlines()
    [first] = [line for line in lines if line.startswith("First step")]
    assert re.fullmatch(r"First step after \d+\.\d s, \d+\.\d s of it to compile the graph; a line follows every "
                        "5 steps", first)
    found = [re.fullmatch(r"Rank\[0\], Step (\d+)/14, Loss .*, Time \S+ \S+, ETA epoch (\S+), run (\S+)", line)
             for line in lines if ", Latency " in line]
    assert [match[1] for match in found] == ["5", "10", "14"] and found[-1][2] == found[-1][3] == "0:00:00"


def test_estimates_of_the_time_left():
    trainer = SimpleNamespace(steps_per_epoch=100, step_in_epoch=40, step=340, steps_left=lambda: 1260)
    assert run_log.estimates(trainer, 2000) == "ETA epoch 0:02:00, run 0:42:00"
    trainer.steps_left = lambda: 10  # the run ends before the epoch
    assert run_log.estimates(trainer, 2000) == "ETA epoch 0:00:20, run 0:00:20"


@pytest.mark.parametrize("monitor, best", [("auc-logloss", 1), ("auc", 2), ("logloss", 1)])
def test_the_monitor_decides(shared_dataset_dir, tmp_path, monkeypatch, monitor, best):
    """The second evaluation has the larger AUC and the larger logloss, by more."""
    trainer = make_trainer(shared_dataset_dir, tmp_path, "--monitor", monitor, "--patience", "1")
    scores = iter([(0.70, 0.50), (0.75, 0.60)])
    monkeypatch.setattr(trainer, "evaluate", lambda *_: dict(zip(("auc", "logloss"), next(scores))))
    checkpointer = SimpleNamespace(save=lambda *_: None)
    for epoch in (2, 3):
        trainer.epoch = epoch
        trainer_module.evaluate_and_save(trainer, checkpointer, None)
    assert trainer.best["epoch"] == best
    assert trainer.plateau.learning_rate == pytest.approx(1e-3 if best == 2 else 1e-4)


def test_monitor_in_log_and_checkpoint(run_here, shared_dataset_dir, tmp_path):
    save = tmp_path / "save"
    output = run_here(shared_dataset_dir, tmp_path, "--monitor", "logloss", "--model_save_dir", save,
                            "--train_batches", "14", "--seed", "1")
    lines = [line for line in events(save / "logs") if line["event"] == "val"]
    assert [line["monitor"] for line in lines] == [-line["logloss"] for line in lines]
    assert f"Epoch 1, val LogLoss {lines[0]['logloss']:.6f}, the best so far; learning rate 0.01" in output
    assert json.loads((save / "step_14" / "state.json").read_text())["run"]["monitor"] == "logloss"
    assert json.loads((save / "logs" / "run.json").read_text())["monitor"] == "logloss"


# ------------------------------------------------------------------------------------------------- the mean of the loss


def test_mean_loss_is_weighted_and_read_one_step_late():
    losses = MeanLoss(" or something else")

    def as_of_a_graph(value):
        return flow.tensor(value).to_global(flow.placement("cpu", [0]), flow.sbp.broadcast)

    for loss, weight, step in ((0.5, 100, 1), (as_of_a_graph(0.25), 300, 2), (0.125, as_of_a_graph(200.0), 3)):
        before = list(losses.sums)
        losses.add(loss, weight, step)
        assert (losses.sums == before) == (step == 1)
    assert losses.sums == [0.5 * 100 + 0.25 * 300, 400]
    losses.read()
    losses.read()  # nothing is counted twice
    assert losses.take() == pytest.approx((50 + 75 + 25) / 600) and losses.sums == [0, 0] and losses.take() == 0
    losses.add(float("nan"), 3, 17)
    with pytest.raises(UserError, match="the loss is nan in step 17; use a lower --learning_rate .* or something else"):
        losses.read()


def test_logged_loss_is_the_mean_of_the_interval(run_here, distinct_dataset_dir, tmp_path):
    """7 steps an epoch, the last one of fewer rows; weighted by rows."""
    for interval in (1, 5):
        run_here(distinct_dataset_dir, tmp_path / str(interval), "--train_batches", "14", "--loss_print_interval",
                 interval, "--log_dir", tmp_path / str(interval))
    single, mean = ([line["loss"] for line in events(tmp_path / str(interval)) if line["event"] == "train"]
                    for interval in (1, 5))
    dataset = trainer_module.read_dataset(str(distinct_dataset_dir))
    rows = [batch.num_global for epoch in (1, 2) for batch in trainer_module.train_batches(
        trainer_module.read_rows, dataset, 64, seed=0, epoch=epoch, rank=0, world_size=1)]
    assert sum(rows) == 2 * 403 and min(rows) < 32
    expected = [np.average(single[start:start + 5], weights=rows[start:start + 5]) for start in (0, 5, 10)]
    assert mean == pytest.approx(expected, abs=1e-6)


# ------------------------------------------------------------------------------------------------------------- resuming


@pytest.fixture(scope="module")
def saved(shared_dataset_dir, tmp_path_factory):
    """A run of 9 steps that can be resumed."""
    work = tmp_path_factory.mktemp("saved")
    train_here(shared_dataset_dir, work, "--train_batches", "9", "--model_save_dir", work / "save")
    return work


@pytest.mark.parametrize("options, message", [
    (["--monitor", "auc"], "was trained with --monitor auc-logloss, now it is auc; use the same value"),
    (["--warmup_batches", "3"], "was trained with --warmup_batches 0, now it is 3"),
    (["--adam_betas", "0.9,0.99"], "was trained with --adam_betas 0.9,0.999, now it is 0.9,0.99"),
    (["--adam_epsilon", "1e-6"], "was trained with --adam_epsilon 1e-08, now it is 1e-06"),
    (["--negative_sampling_rate", "0.5"], "was trained with --negative_sampling_rate 1.0, now it is 0.5"),
    (["--optimizer", "adagrad"], "was saved with --optimizer adam, now it is adagrad"),
])
@pytest.mark.parametrize("old", [False, True], ids=["this version", "earlier version"])
def test_resume_with_other_options_is_refused(fails, saved, shared_dataset_dir, tmp_path, options, message, old):
    """A checkpoint of a version that did not have the options was trained with their defaults."""
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    if old:
        for path in (tmp_path / "save").glob("*/state.json"):
            state = json.loads(path.read_text())
            for name in ("monitor", "warmup_batches", "adam_betas", "adam_epsilon", "negative_sampling_rate"):
                del state["run"][name]
            del state["model"]["optimizer"], state["model"]["negative_sampling_rate"], state["losses"]
            path.write_text(json.dumps({**state, "digest": trainer_module.checkpoints.digest(state)}))
    assert message in fails(shared_dataset_dir, tmp_path, "--resume", "--model_save_dir", tmp_path / "save", *options)


def test_a_resumed_run_has_the_rate_that_it_took_from_a_checkpoint(run_here, saved, shared_dataset_dir, tmp_path):
    """With --model_load_dir a run may have taken over a rate that its command line does not give."""
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    for path in (tmp_path / "save").glob("*/state.json"):
        state = json.loads(path.read_text())
        state["run"]["negative_sampling_rate"] = state["model"]["negative_sampling_rate"] = 0.5
        path.write_text(json.dumps({**state, "digest": trainer_module.checkpoints.digest(state)}))
    output = run_here(shared_dataset_dir, tmp_path, "--resume", "--model_save_dir", tmp_path / "save",
                      "--train_batches", "10")
    assert "a share of 0.5 of the rows" in output and "Resuming" in output


def test_resume_with_weights_is_refused(fails, saved, weighted_dataset_dir, tmp_path):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    options = ["--resume", "--model_save_dir", tmp_path / "save", "--weight_column", "w"]
    assert "with --weight_column None, now it is w" in fails(weighted_dataset_dir, tmp_path, *options)


def label_of(row):
    def change(rows):
        rows.loc[row, "Label"] = 1 - rows.loc[row, "Label"]
        return rows
    return change


@pytest.mark.parametrize("change", [
    lambda rows: rows[::-1].reset_index(drop=True), label_of(200), lambda rows: rows.assign(f2=rows.f2.clip(upper=20)),
], ids=["another order", "one label", "other ids"])
def test_resume_on_other_rows_of_the_same_number_is_refused(fails, saved, shared_dataset_dir, tmp_path, change):
    work, data = tmp_path / "work", tmp_path / "data"
    shutil.copytree(saved, work)
    shutil.copytree(shared_dataset_dir, data)
    path = data / "train" / "part-00000.parquet"
    rows = pq.read_table(path)
    pq.write_table(rows.from_pandas(change(rows.to_pandas()), rows.schema), path, row_group_size=51)
    options = ["--resume", "--model_save_dir", work / "save", "--train_batches", "10"]
    assert "was trained on other rows than those of --data_dir" in fails(data, work, *options)


def test_resume_on_the_same_rows_elsewhere(run_here, saved, tmp_path):
    """The same rows, made again and in another place."""
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    data = make_dataset(tmp_path / "again")
    output = run_here(data, tmp_path, "--resume", "--model_save_dir", tmp_path / "save", "--train_batches", "10")
    assert "step 9\n" in output and ", Step 10, val AUC" in output


# --------------------------------------------------------------------------------------------------- record of the run


def test_record_of_a_run_and_of_its_restarts(run_here, saved, shared_dataset_dir, tmp_path):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "save" / "logs" / "run.json"
    first = json.loads(path.read_text())
    assert list(first)[:5] == ["run_id", "options", "seed", "data", "versions"]
    assert first["run_id"] == json.loads((tmp_path / "save" / "run.json").read_text())["run_id"]
    options = vars(trainer_module.make_parser().parse_args([]))
    assert set(first["options"]) == set(options) and first["options"]["adam_betas"] == [0.9, 0.999]
    assert (first["options"]["train_batches"], first["options"]["dnn"], first["seed"]) == (9, [8, 8], 2022)
    assert first["data"]["rows"] == {"train": 403, "val": 101, "test": 97} and re.fullmatch(
        "[0-9a-f]{16}", first["data"]["fingerprint"])
    assert first["versions"]["oneflow"].startswith(flow.__version__[:5]) and first["machine"]["cores"] > 0
    assert (first["monitor"], first["processes"], first["device"]) == ("auc-logloss", 1, "cpu")
    for batches in (11, 12):
        run_here(shared_dataset_dir, tmp_path, "--resume", "--model_save_dir", tmp_path / "save", "--train_batches",
                    batches)
    record = json.loads(path.read_text())
    assert {name: value for name, value in record.items() if name != "restarts"} == first
    changed = [{**restart["options"], "step": restart["step"]} for restart in record["restarts"]]
    known = {"model_save_dir": str(tmp_path / "save"), "log_dir": str(tmp_path / "save" / "logs"), "resume": True,
             "persistent_path": str(tmp_path / "tables"), "persistent_path_fm": str(tmp_path / "tables_fm")}
    assert changed == [{**known, "train_batches": 11, "step": 9}, {**known, "train_batches": 12, "step": 11}]


def test_record_beside_checkpoints_and_of_a_new_run(run_here, saved, shared_dataset_dir, tmp_path):
    """--log_dir may be --model_save_dir, where run.json already says what --resume needs."""
    save = tmp_path / "save"
    options = ["--model_save_dir", save, "--log_dir", save, "--train_batches"]
    run_here(shared_dataset_dir, tmp_path, *options, "2")
    record = json.loads((save / "run.json").read_text())
    assert record["saved"] is True and record["options"]["train_batches"] == 2 and record["model_load_dir"] is None
    run_here(shared_dataset_dir, tmp_path, *options, "3", "--resume")
    again = json.loads((save / "run.json").read_text())
    assert [restart["step"] for restart in again.pop("restarts")] == [2]
    assert set(again.pop("checkpoints")) >= set(record.pop("checkpoints")) and again == record
    logs = tmp_path / "logs"
    shutil.copytree(saved / "save" / "logs", logs)  # of a finished run: replaced, as its metrics are
    run_here(shared_dataset_dir, tmp_path / "new", "--train_batches", "1", "--log_dir", logs, "--seed", "3")
    assert json.loads((logs / "run.json").read_text())["seed"] == 3


@pytest.mark.parametrize("content", ['{"mine": 1}', '{"run_id": "mine"}', "{", "[]"])
def test_a_run_json_of_somebody_else_is_left_alone(fails, shared_dataset_dir, tmp_path, content):
    (tmp_path / "run.json").write_text(content)
    assert "run.json" in fails(shared_dataset_dir, tmp_path, "--train_batches", "1", "--log_dir", tmp_path)
    assert (tmp_path / "run.json").read_text() == content


def test_fingerprint_of_the_data(shared_dataset_dir, dataset_dir):
    """What dataset_info.json says, else a digest of the rows."""
    from tools.trainer.run_record import fingerprint

    plain = trainer_module.read_dataset(str(dataset_dir))
    assert fingerprint(plain) == fingerprint(trainer_module.read_dataset(str(shared_dataset_dir)))
    other = trainer_module.read_dataset(str(make_dataset(dataset_dir.parent / "other", seed=1)))
    assert fingerprint(plain) != fingerprint(other)
    path = dataset_dir / "dataset_info.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": 2, "fingerprint": "f00d"}))
    assert fingerprint(trainer_module.read_dataset(str(dataset_dir))) == "f00d"


# ------------------------------------------------------------------------------------------------------ signs of life


def test_long_compilation_is_announced(capsys):
    assert run_log.announced("Compiling", time.sleep, 0.15, patience=0.05) >= 0.15
    assert capsys.readouterr().out == "Compiling ...\n"
    run_log.announced("Compiling", time.sleep, 0.01, patience=5)
    with pytest.raises(ValueError):
        run_log.announced("Compiling", int, "x", patience=0.05)
    time.sleep(0.1)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("options", [[], ["--eval_interval", "1"]])
def test_divergence_in_the_last_step_is_one_line(shared_dataset_dir, tmp_path, options):
    """The loss of a run's only step is finite; what it leaves is not."""
    output, errors = run_trainer(shared_dataset_dir, tmp_path, "--learning_rate", "1e38", "--train_batches", "1",
                                 *options, status=1)
    [error] = [line for line in errors.splitlines() if line]
    assert re.match(r"error: \d+ of 64 probabilities are not numbers: the model's parameters are not", error)
    assert ", Step 1/1, Loss 0.69" in output and not metrics_lines(output, "val")


def test_what_the_driver_says_of_a_gpu(tmp_path, monkeypatch):
    """Stand-ins for nvidia-smi, without which no name is said, and for the driver."""
    device = trainer_module.Cuda.__new__(trainer_module.Cuda)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert device.machine() == {}
    script = tmp_path / "nvidia-smi"
    script.write_text('#!/bin/sh\n[ "$1 $2" = "--id=3 --query-gpu=name" ] && echo "NVIDIA X"\n')
    script.chmod(0o755)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,4")
    monkeypatch.setattr(flow._oneflow_internal, "GetCUDAMemoryUsed", lambda: 123.4)
    assert (device.machine(), device.memory()) == ({"gpu": "NVIDIA X"}, {"gpu_memory_mb": 123})
