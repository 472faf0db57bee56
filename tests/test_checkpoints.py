"""Checkpoints: format, resume after a kill, half ones, disk space, other numbers of processes, use of the model."""

import contextlib
import json
import os
import pickle
import re
import shutil
import subprocess
from collections import namedtuple
from pathlib import Path

import conftest
import host_embedding
import numpy as np
import oneflow as flow
import pyarrow.parquet as pq
import pytest
from conftest import (
    ROOT,
    TABLE_SIZES,
    assert_same,
    make_dataset,
    make_trainer,
    metrics_lines,
    run_trainer,
    train_here,
    trainer_command,
)
from sklearn.metrics import log_loss, roc_auc_score

import deepfm_train_eval as trainer_module
from tools.trainer import checkpoints
from tools.trainer.chunks import chunk_files, chunk_numbers
from tools.trainer.cli import UserError
from tools.trainer.files import hold
from tools.trainer.tables import TableStore

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # petastorm uses pyarrow's old interfaces
NUM_ROWS = sum(TABLE_SIZES)
DIM = 4


def final_metrics(output):
    return metrics_lines(output, "val")[-1] + metrics_lines(output, "test")[-1]


def table_rows(path, snapshot, dim, processes=1):
    """{id: row} read with OneFlow's own reader."""
    folders = [f"{path}/{process}-{processes}" for process in range(processes)]
    reader = flow.one_embedding.make_persistent_table_reader(
        folders, snapshot, flow.int64, flow.float, 3 * dim, physical_block_size=4096)
    return {int(key): row.copy() for keys, rows in reader for key, row in zip(keys, rows)}


def everything(work, checkpoint, processes=1):
    """All numbers of a checkpoint: {name: array}"""
    folder = work / "save" / checkpoint
    state = json.loads((folder / "state.json").read_text())
    values = checkpoints.read_dense(str(folder), state)
    for table, path, dim in (("embedding", "tables", DIM), ("embedding_fm", "tables_fm", 1)):
        rows = table_rows(work / path, state["tables"][table]["snapshot"], dim, processes)
        values[table] = np.stack([rows[key] for key in range(NUM_ROWS)])
        assert len(rows) == NUM_ROWS
    return values


@pytest.fixture(scope="module")
def shared_dataset_dir(distinct_dataset_dir):
    return distinct_dataset_dir


@pytest.fixture(scope="module")
def finished(shared_dataset_dir, tmp_path_factory):
    """(folder, log) of a run with every kind of checkpoint."""
    work = tmp_path_factory.mktemp("finished")
    output = train_here(shared_dataset_dir, work, "--model_save_dir", work / "save", "--save_initial_model",
                        "--save_model_after_each_eval", "--train_batches", "14")
    return work, output


def copy_of(work, target):
    shutil.copytree(work, target, dirs_exist_ok=True)
    return target


def test_folders_are_named_as_promised(finished):
    work, output = finished
    aucs = metrics_lines(output, "val")
    names = {path.name for path in (work / "save").iterdir() if (path / "state.json").exists()}
    assert names == {"initial_checkpoint", "best_checkpoint", "step_7", "step_14",
                     *(f"step_{step}_val_auc_{auc:0.5f}" for step, (auc, _) in zip((7, 14), aucs))}


def test_snapshot_is_read_by_oneflow_row_by_row(finished):
    work, _ = finished
    start, end = everything(work, "initial_checkpoint"), everything(work, "best_checkpoint")
    for table, dim in (("embedding", DIM), ("embedding_fm", 1)):
        assert start[table].shape == end[table].shape == (NUM_ROWS, 3 * dim)
        assert not start[table][:, dim:].any() and start[table][:, :dim].std() < 3e-4
        assert (end[table][:, dim:].any(axis=1) == (end[table] != start[table]).any(axis=1)).all()  # moved: has moments
    assert end["System-Train-TrainStep"].item() in (7, 14)


def test_evaluation_and_prediction_of_a_checkpoint(run_here, finished, shared_dataset_dir, tmp_path):
    work, output = finished
    best = work / "save" / "best_checkpoint"
    scored = run_here(shared_dataset_dir, work, "--eval_only", "--model_load_dir", best)
    assert final_metrics(scored) == final_metrics(output)
    table = pq.read_table(shared_dataset_dir / "test")
    unlabelled = tmp_path / "split"
    unlabelled.mkdir()
    pq.write_table(table.drop(["Label"]), unlabelled / "rows.parquet", row_group_size=17)
    labels, probs = table["Label"].to_numpy(), []
    for split in (shared_dataset_dir / "test", unlabelled):
        target = tmp_path / "probs" / split.name
        run_here(shared_dataset_dir, work, "--predict", split, "--predict_output", target, "--model_load_dir", best)
        assert pq.read_table(target).column_names == ["probability"]
        probs.append(pq.read_table(target)["probability"].to_numpy())
    assert np.array_equal(*probs)
    probs = probs[0]
    auc, logloss = final_metrics(output)[2:]
    assert roc_auc_score(labels, probs) == pytest.approx(auc, abs=1e-6)
    assert log_loss(labels, probs.astype(float)) == pytest.approx(logloss, abs=2e-6)


def test_printed_prediction_command_runs(tmp_path):
    """With blanks in the paths, without dataset_info.json, and outside the folder of the script."""
    data = make_dataset(tmp_path / "my data", info=False)
    work = tmp_path / "my run"
    output, _ = run_trainer(data, work, "--model_save_dir", work / "save", "--train_batches", "7", "--batch_norm",
                            "--table_size_array", "7,11,40", "--num_train_samples", "403", "--num_val_samples", "101",
                            "--num_test_samples", "97")
    command = re.search("^Predict with: (.+)$", output, re.M).group(1)
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    subprocess.run(command, shell=True, check=True, cwd=folder, timeout=120)
    assert pq.read_metadata(folder / "predictions.parquet").num_rows == 97


RESUME = ["--train_batches", "20", "--loss_print_interval", "1", "--net_dropout", "0.3", "--patience", "1",
          "--lr_factor", "0.5", "--min_delta", "1", "--early_stop_patience", "0"]  # every epoch but the first cuts

KILLER = """
import os, signal, sys
sys.path.insert(0, {root!r})
import deepfm_train_eval as module
owner, name, count, when = {kill}
owner = eval(owner)
original, calls = getattr(owner, name), []
def wrapper(*args, **kwargs):
    calls.append(name)
    if len(calls) == count and when == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    result = original(*args, **kwargs)
    if len(calls) == count:
        os.kill(os.getpid(), signal.SIGKILL)
    return result
setattr(owner, name, wrapper)
module.main(sys.argv[1:])
"""
KILLS = [  # (where, what, which call, when), last complete checkpoint
    (("module.Trainer", "train_step", 2, "after"), None),
    (("module.checkpoints.Checkpointer", "write", 1, "before"), None),  # step 3: rows are saved, the checkpoint is not
    (("module.TableStore", "prune", 7, "before"), "step_7"),  # step 7: an old checkpoint is gone, its rows are not
    (("module.os", "rename", 1, "after"), "step_7"),  # step 9: a key chunk is in place, its values are not
    (("module.checkpoints", "publish", 1, "after"), "step_9"),  # step 9: saved, not yet pruned
    (("module.Trainer", "train_step", 6, "after"), "step_14"),  # step 15: in the epoch behind the learning-rate cut
]


@pytest.fixture(scope="module")
def uninterrupted(shared_dataset_dir, tmp_path_factory):
    """A run that saves after each of its 20 steps."""
    work = tmp_path_factory.mktemp("uninterrupted")
    train_here(shared_dataset_dir, work, "--model_save_dir", work / "save", "--checkpoint_interval", "1", *RESUME)
    return work


def run_with_kills(data_dir, work, options, kills):
    """Start a run, kill and resume it again and again; the last start, in this process, goes to the end.

    Returns the output of that.
    """
    for kill, last in kills:
        killer = work / "killer.py"
        killer.write_text(KILLER.format(root=str(ROOT), kill=kill))
        run_trainer(data_dir, work, *options, status=-9, script=killer)
        steps = [json.loads(path.read_text())["progress"]["step"] for path in (work / "save").glob("[!.]*/state.json")]
        assert (f"step_{max(steps)}" if steps else None) == last, kill
        options = ["--resume"] + [option for option in options if option != "--resume"]
    return train_here(data_dir, work, *options)


def logged(work):
    """[(event, step, what was measured)] of metrics.jsonl"""
    names = ("loss", "lr", "monitor", *trainer_module.METRICS)
    lines = [json.loads(line) for line in (work / "save/logs/metrics.jsonl").read_text().splitlines()]
    return [(line["event"], line["step"], {name: line[name] for name in names if name in line}) for line in lines]


def test_killed_and_resumed_run_equals_the_other_bit_for_bit(uninterrupted, shared_dataset_dir, tmp_path):
    save = tmp_path / "save"
    options = ["--model_save_dir", save, "--checkpoint_interval", "3", *RESUME]
    run_with_kills(shared_dataset_dir, tmp_path, options, KILLS)
    assert_same(everything(tmp_path, "step_20"), everything(uninterrupted, "step_20"))
    assert_same(everything(tmp_path, "best_checkpoint"), everything(uninterrupted, "best_checkpoint"))
    known = [logged(work) for work in (tmp_path, uninterrupted)]
    assert known[0] == known[1]  # nothing twice, nothing missing
    assert [step for event, step, _ in known[0] if event == "train"] == list(range(1, 21))
    assert {values["lr"] for event, _, values in known[0] if event == "train"} == {0.01, 0.005}
    assert not list(tmp_path.glob("tables*/.*")) and not list(save.glob(".*"))  # nothing half-done stays


INSIDE = [  # (where, what, which call, when), last complete checkpoint; evaluations every 3 steps, epochs of 7
    (("module.Trainer", "train_step", 5, "after"), "step_3"),  # step 5: between two evaluations of one epoch
    (("module.Trainer", "train_step", 5, "after"), "step_6"),  # step 8: the epoch has changed in between
    (("module.checkpoints.Checkpointer", "write", 1, "before"), "step_6"),  # step 9: evaluated, not yet saved
    (("module.Trainer", "train_step", 8, "after"), "step_12"),  # step 14: at the end of an epoch without evaluation
]


def test_killed_between_evaluations_inside_an_epoch(shared_dataset_dir, tmp_path):
    """Rates are cut at every evaluation but the first, warm-up goes on, losses are means over 4 steps."""
    options = ["--train_batches", "20", "--eval_interval", "3", "--loss_print_interval", "4", "--warmup_batches", "10",
               "--net_dropout", "0.3", "--patience", "1", "--lr_factor", "0.5", "--min_delta", "1",
               "--early_stop_patience", "0", "--model_save_dir"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for work in (whole, killed):
        work.mkdir()
    output = train_here(shared_dataset_dir, whole, *options, whole / "save")
    end = run_with_kills(shared_dataset_dir, killed, [*options, killed / "save"], INSIDE)
    assert_same(everything(killed, "step_20"), everything(whole, "step_20"))
    assert_same(everything(killed, "best_checkpoint"), everything(whole, "best_checkpoint"))
    assert logged(killed) == logged(whole)
    steps = {event: [step for found, step, _ in logged(whole) if found == event] for event in ("train", "val")}
    assert steps == {"train": [4, 8, 12, 16, 20], "val": [3, 6, 9, 12, 15, 18, 20]}
    epochs = [(1, 3), (1, 6), (2, 9), (2, 12), (3, 15), (3, 18), (3, 20)]
    assert re.findall(r"Epoch (\d+), Step (\d+), val AUC", output)[:7] == [(str(one), str(two)) for one, two in epochs]
    rates = [values["lr"] for event, _, values in logged(whole) if event == "train"]
    assert rates == pytest.approx([0.01 * 4 / 10, 0.005 * 8 / 10, 0.01 / 2**2, 0.01 / 2**4, 0.01 / 2**5])
    assert final_metrics(end) == final_metrics(output)


def test_twenty_saves_take_the_space_of_three(uninterrupted):
    """Two periodic checkpoints and the best one stay, and of the tables just their chunks."""
    names = {path.name for path in (uninterrupted / "save").iterdir() if (path / "state.json").exists()}
    assert names == {"best_checkpoint", "step_19", "step_20"}
    for table, path in (("embedding", "tables"), ("embedding_fm", "tables_fm")):
        states = [json.loads(path.read_text()) for path in (uninterrupted / "save").glob("*/state.json")]
        needed = {state["tables"][table]["snapshot"] for state in states}
        folder = uninterrupted / path / "0-1"
        assert {path.name for path in (folder / "snapshots").iterdir()} == needed and len(needed) == 3
        assert len(list((folder / "values").iterdir())) == len(list((folder / "keys").iterdir())) == 3


@pytest.mark.parametrize("renames", [0, 1, 2, 3])
def test_replaced_checkpoint_is_never_half(monkeypatch, tmp_path, renames):
    """A kill before the n-th rename leaves the old or the new checkpoint, whole."""
    for name, text in (("best", "old"), (checkpoints.STAGING, "new")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "state.json").write_text(text)
        (tmp_path / name / "dense.npz").write_text(text)
    rename, done = os.rename, []

    def stopping(source, target):
        if len(done) == renames:
            raise KeyboardInterrupt
        done.append(source)
        rename(source, target)

    monkeypatch.setattr(os, "rename", stopping)
    with contextlib.suppress(KeyboardInterrupt):
        checkpoints.publish(str(tmp_path / checkpoints.STAGING), ["best"], str(tmp_path))
    monkeypatch.setattr(os, "rename", rename)
    found = Path(checkpoints.find_folder(str(tmp_path / "best")))  # what --eval_only uses, also without cleaning
    assert (found / "state.json").read_text() == ("new" if renames == 3 else "old")
    checkpoints.clean_save_dir(str(tmp_path))
    contents = {path.name: path.read_text() for path in (tmp_path / "best").iterdir()}
    assert contents == dict.fromkeys(("state.json", "dense.npz"), "new" if renames == 3 else "old")
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


def test_all_is_flushed_before_it_gets_its_name(monkeypatch, tmp_path):
    """Files and folders of a snapshot or checkpoint before the rename that makes it count, the new name afterwards."""
    fsync, rename, flushed, names, late = os.fsync, os.rename, set(), set(), []

    def watched_fsync(descriptor):
        fsync(descriptor)
        flushed.add(os.fstat(descriptor).st_ino)
        names.discard(os.fstat(descriptor).st_ino)

    def watched_rename(source, target):
        folder = os.path.dirname(target)
        if os.path.isdir(source) and not os.path.basename(target).startswith("."):
            names.add(os.stat(folder).st_ino)
            parts = [source] + [f"{folder}/../{kind}" for kind in ("keys", "values")] * folder.endswith("snapshots")
            late.extend(path for part in map(Path, parts) for path in [part, *part.rglob("*")]
                        if path.stat().st_ino not in flushed)
        rename(source, target)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "rename", watched_rename)
    store = TableStore("embedding", "persistent_path", str(tmp_path / "tables"), 2, 9)
    for name in ("first", "second"):
        (tmp_path / "tables").mkdir(exist_ok=True)
        store.write_snapshot(name, [(np.arange(9), np.ones((9, 6), np.float32))])
        (tmp_path / checkpoints.STAGING).mkdir()
        (tmp_path / checkpoints.STAGING / "dense.npz").write_text(name)
        checkpoints.publish(str(tmp_path / checkpoints.STAGING), ["best"], str(tmp_path))
    assert len(flushed) > 10 and not late and not names


def test_last_step_is_saved_with_its_evaluation_only(monkeypatch, run_here, shared_dataset_dir, tmp_path):
    """A kill between the two would leave a checkpoint with nothing to train and the last epoch not evaluated.

    Of an evaluation's checkpoints the best comes first, since the others say that it is the best, the one to resume
    from last.
    """
    saved, save = [], checkpoints.Checkpointer.save
    monkeypatch.setattr(checkpoints.Checkpointer, "save",
                        lambda self, trainer, names: (saved.append(names), save(self, trainer, names)))
    run_here(shared_dataset_dir, tmp_path, "--model_save_dir", tmp_path / "save", "--checkpoint_interval", "2",
             "--train_batches", "4", "--save_model_after_each_eval")
    first, names = saved
    assert first == ["step_2"] and [name[:15] for name in names] == ["best_checkpoint", "step_4_val_auc_", "step_4"]
    scored = run_here(shared_dataset_dir, tmp_path, "--eval_only", "--model_load_dir", tmp_path / "save" / "step_4")
    assert "Epoch 1, Step 4, val" in scored and f"Checkpoint: {tmp_path}/save/step_4; tables on disk: " in scored


def run_patched(patch, data_dir, work, *options):
    """Run the trainer after a line of Python that changes it, in a process of its own -> finished process"""
    script = work.parent / f"patched-{work.name}.py"
    script.write_text(f"import os, shutil, sys\nsys.path.insert(0, {str(ROOT)!r})\n"
                      f"import deepfm_train_eval as module\n{patch}\nmodule.main(sys.argv[1:])\n")
    command = trainer_command(data_dir, work, *options, script=script)
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def run_killed_before_evaluation(*arguments):
    assert run_patched("module.evaluate_and_save = lambda *_: os.kill(os.getpid(), 9)", *arguments).returncode == -9


def test_resume_with_nothing_left_to_train(fails, run_here, shared_dataset_dir, tmp_path):
    work = tmp_path / "work"
    options = [shared_dataset_dir, work, "--model_save_dir", work / "save", "--train_batches"]
    run_killed_before_evaluation(*options, "6", "--checkpoint_interval", "3")
    assert "more --train_batches than 2" in fails(*options, "2", "--resume")
    state_file = work / "save" / "step_3" / "state.json"
    state = json.loads(state_file.read_text())
    state["progress"]["step_in_epoch"] = 8  # as of a number of processes that has more steps per epoch
    state_file.write_text(json.dumps({**state, "digest": checkpoints.digest(state)}))
    shutil.copytree(work, tmp_path / "again")
    assert "Epoch 1, Step 3, val" in run_here(*options, "4", "--resume")
    # the end of a run is evaluated, whatever the interval
    options = [shared_dataset_dir, tmp_path / "again", "--model_save_dir", tmp_path / "again" / "save"]
    assert "Epoch 1, Step 3, val" in run_here(*options, "--train_batches", "3", "--resume", "--eval_interval", "2")


def test_resume_before_the_first_checkpoint_starts_from_the_loaded_model(run_here, finished, shared_dataset_dir,
                                                                         tmp_path):
    load = ["--model_load_dir", finished[0] / "save" / "best_checkpoint"]
    options = ["--train_batches", "4", "--model_save_dir"]
    run_here(shared_dataset_dir, tmp_path / "whole", *options, tmp_path / "whole" / "save", *load)
    killed = [shared_dataset_dir, tmp_path / "killed", *options, tmp_path / "killed" / "save"]
    run_killed_before_evaluation(*killed, *load)
    assert "starting from the beginning" in run_here(*killed, "--resume")
    assert_same(everything(tmp_path / "killed", "step_4"), everything(tmp_path / "whole", "step_4"))


def test_checkpoint_in_use_is_not_written_again(shared_dataset_dir, tmp_path):
    """A resume at step 0 saves the initial model once more; its rows stay in place meanwhile."""
    options = [shared_dataset_dir, tmp_path, "--model_save_dir", tmp_path / "save", "--save_initial_model",
               "--train_batches", "1"]
    run_killed_before_evaluation(*options)
    start = everything(tmp_path, "initial_checkpoint")
    chunks = {path: path.stat().st_ino for path in tmp_path.glob("tables*/0-1/*s/*")}
    run_killed_before_evaluation(*options, "--resume")
    assert chunks == {path: path.stat().st_ino for path in tmp_path.glob("tables*/0-1/*s/*")}
    assert_same(everything(tmp_path, "initial_checkpoint"), start)


def remove(path):
    path.unlink()


def zero(path):
    path.write_bytes(bytes(path.stat().st_size))


def flip(path):
    """One bit in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def reverse(path):
    np.fromfile(path, np.uint64)[::-1].tofile(path)


def double(path):
    path.write_text(path.read_text().strip() * 2)


def clip(path):
    """Ends within a number."""
    path.write_bytes(path.read_bytes()[:-3])


def pipe(path):
    """Reading it would wait for ever."""
    path.unlink()
    os.mkfifo(path)


def halve(path):
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


@pytest.mark.parametrize("damage, pattern, message", [
    (remove, "save/best_checkpoint/state.json", "not a complete checkpoint"),
    (halve, "save/best_checkpoint/state.json", "state.json cannot be used"),
    (halve, "save/best_checkpoint/dense.npz", "dense.npz cannot be read (it was changed or damaged"),
    (remove, "save/best_checkpoint/dense.npz", "dense.npz cannot be read"),
    (flip, "save/best_checkpoint/dense.npz", "dense.npz cannot be read (it was changed or damaged"),
    (flip, "save/best_checkpoint/state.json", "best_checkpoint/state.json"),
    (zero, "tables/0-1/keys/*", "was changed or damaged since the checkpoint was saved"),
    (flip, "tables/0-1/keys/*", "was changed or damaged since the checkpoint was saved"),
    (flip, "tables/0-1/values/*", "was changed or damaged since the checkpoint was saved"),
    (flip, "tables_fm/0-1/values/*", "was changed or damaged since the checkpoint was saved"),
    (zero, "tables/0-1/snapshots/*/index-*", "missing or incomplete"),
    (reverse, "tables/0-1/snapshots/*/index-*", "was changed or damaged since the checkpoint was saved"),
    (flip, "tables/0-1/snapshots/*/CHECKSUMS", "use another checkpoint"),
    (remove, "tables/0-1/snapshots/*/CHECKSUMS", "is not the one that was saved with the checkpoint"),
    (zero, "tables/0-1/snapshots/*/LIST", "LIST is missing or damaged"),
    (zero, "tables/0-1/KEY_SIZE", "KEY_SIZE is missing or damaged"),
    (zero, "tables/0-1/VALUE_SIZE", "VALUE_SIZE is missing or damaged"),
    (double, "tables/0-1/PHYSICAL_BLOCK_SIZE", "PHYSICAL_BLOCK_SIZE is 40964096, expected 4096"),
    (double, "tables/0-1/NUM_LOGICAL_BLOCKS_PER_CHUNK", "NUM_LOGICAL_BLOCKS_PER_CHUNK is 10485761048576, expected"),
    (halve, "tables/0-1/values/*", "missing or incomplete"),
    (remove, "tables_fm/0-1/keys/*", "missing or incomplete"),
    (remove, "tables/0-1/snapshots/*/LIST", "table snapshot"),
    (halve, "tables/0-1/snapshots/*/index-*", "was changed or damaged since the checkpoint was saved"),
    (clip, "tables/0-1/snapshots/*/index-*", "missing or incomplete"),
    (pipe, "save/best_checkpoint/state.json", "not a complete checkpoint"),
    (pipe, "save/best_checkpoint/dense.npz", "dense.npz cannot be read ([Errno 22] not a regular file"),
    (pipe, "tables/0-1/keys/*", "is missing or not a file"),
    (pipe, "tables/0-1/snapshots/*/CHECKSUMS", "CHECKSUMS is damaged"),
])
def test_half_checkpoints_are_refused(fails, finished, shared_dataset_dir, tmp_path, damage, pattern, message):
    work = copy_of(finished[0], tmp_path)
    for path in work.glob(pattern):
        damage(path)
    error = fails(shared_dataset_dir, work, "--eval_only", "--model_load_dir", work / "save" / "best_checkpoint")
    assert message in error


def test_missing_tensor_is_refused(fails, finished, shared_dataset_dir, tmp_path):
    work = copy_of(finished[0], tmp_path)
    best = work / "save" / "best_checkpoint"
    saved = dict(np.load(best / "dense.npz"))
    bias = saved.pop("model.dnn.bias_1")
    evaluate = ["--eval_only", "--model_load_dir", best, "--skip_checksums"]
    for change, message in (({}, "lacks the tensors model.dnn.bias_1 (1)"),
                            ({"model.dnn.bias_1": bias.astype("U8")}, "has <U8 (8,) for model.dnn.bias_1, expected"),
                            ({"model.dnn.bias_1": bias, "model.cross.weight": bias}, "also has the tensors model.cr"),
                            ({"model.dnn.bias_1": bias[:3]}, "has float32 (3,) for model.dnn.bias_1, expected float")):
        np.savez(best / "dense.npz", **saved, **change)
        assert message in fails(shared_dataset_dir, work, *evaluate)


def test_dense_part_of_another_checkpoint_is_refused(fails, finished, shared_dataset_dir, tmp_path):
    work = copy_of(finished[0], tmp_path)
    best = work / "save" / "best_checkpoint"
    shutil.copy(work / "save" / "initial_checkpoint" / "dense.npz", best)
    assert "changed or damaged" in fails(shared_dataset_dir, work, "--eval_only", "--model_load_dir", best)


def test_an_id_that_comes_twice_is_refused_also_without_checksums(fails, finished, shared_dataset_dir, tmp_path):
    work = copy_of(finished[0], tmp_path)
    state = json.loads((work / "save" / "best_checkpoint" / "state.json").read_text())
    [index] = (work / "tables" / "0-1" / "snapshots" / state["tables"]["embedding"]["snapshot"]).glob("index-*")
    positions = np.fromfile(index, np.uint64)
    positions[3] = positions[4]
    positions.tofile(index)
    options = ["--eval_only", "--model_load_dir", work / "save" / "best_checkpoint", "--skip_checksums"]
    assert "has an id twice" in fails(shared_dataset_dir, work, *options)


def test_a_dynamic_loss_scale_is_left_where_nothing_is_scaled(run_here, finished, shared_dataset_dir, tmp_path):
    """As of a run with --amp --loss_scale_policy dynamic, continued on a CPU."""
    best = copy_of(finished[0], tmp_path / "work") / "save" / "best_checkpoint"
    np.savez(best / "dense.npz", **np.load(best / "dense.npz"), **{"this-graph-LossScale": np.float32([1024])})
    output = run_here(shared_dataset_dir, tmp_path / "new", "--model_load_dir", best, "--skip_checksums",
                      "--train_batches", "2")
    assert "Step 2, test AUC" in output


def test_moments_of_another_shape_are_refused(shared_dataset_dir, tmp_path):
    trainer = make_trainer(shared_dataset_dir, tmp_path)
    for part in ("m", "sum"):
        saved = {**trainer.dense_tensors(), f"model.dnn.weight_0-{part}": np.ones(3, np.float32)}
        with pytest.raises(UserError, match=rf"has float32 \(3,\) for model.dnn.weight_0-{part}, expected"):
            trainer.load_dense(saved, "x", to_train=True)


def test_numbers_that_are_not_finite_are_refused(fails, finished, shared_dataset_dir, tmp_path):
    work = copy_of(finished[0], tmp_path)
    best = work / "save" / "best_checkpoint"
    saved = dict(np.load(best / "dense.npz"))
    saved["model.dnn.bias_1"][2] = np.nan
    np.savez(best / "dense.npz", **saved)
    options = ["--model_load_dir", best, "--skip_checksums"]
    assert "numbers in model.dnn.bias_1 that are not finite" in fails(shared_dataset_dir, work, "--eval_only", *options)
    saved["model.dnn.bias_1"][2] = 0
    saved["model.dnn.bias_0"][:], saved["model.dnn.weight_1"][:] = 1000, 3e38  # overflows: infinite minus infinite
    saved["model.dnn.weight_2"][:] = [[1, -1] * 4]
    np.savez(best / "dense.npz", **saved)
    error = fails(shared_dataset_dir, work, "--eval_only", *options)
    assert re.search(r"(\d+) of \1 probabilities are not numbers", error)
    target = tmp_path / "out.parquet"
    predict = ["--predict", shared_dataset_dir / "test", "--predict_output", target]
    assert "are not numbers" in fails(shared_dataset_dir, work, *predict, *options) and not target.exists()


def old_checkpoint(folder):
    """Rewrite a checkpoint as versions before checksums wrote it."""
    state = json.loads((folder / "state.json").read_text())
    dense = checkpoints.read_dense(str(folder), state)
    flow.save({name: flow.tensor(array) for name, array in dense.items()}, str(folder / "dense"))
    (folder / "dense.npz").unlink()
    state["format_version"] = 1
    del state["digest"], state["files"]
    for table in state["tables"].values():
        del table["checksum"]
    (folder / "state.json").write_text(json.dumps(state))


@pytest.fixture(scope="module")
def old_format(finished, tmp_path_factory):
    """The same run as versions before checksums wrote it."""
    work = copy_of(finished[0], tmp_path_factory.mktemp("old_format"))
    for path in (work / "save").glob("*/state.json"):
        old_checkpoint(path.parent)
    for path in work.glob("tables*/0-1/snapshots/*/CHECKSUMS"):
        path.unlink()
    return work


def test_checkpoints_of_earlier_versions_load(run_here, old_format, finished, shared_dataset_dir, tmp_path):
    work = copy_of(old_format, tmp_path)
    scored = run_here(shared_dataset_dir, work, "--eval_only", "--model_load_dir", work / "save" / "best_checkpoint")
    assert final_metrics(scored) == final_metrics(finished[1])
    assert "Resuming from" in run_here(shared_dataset_dir, work, "--resume", "--model_save_dir", work / "save",
                                       "--train_batches", "15")
    assert checkpoints.read_checkpoint(work / "save" / "step_15")["format_version"] == 2


class Command:
    """A pickle that runs a command when it is loaded."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch '{self.target}'",)


def test_no_checkpoint_runs_code(fails, old_format, finished, shared_dataset_dir, tmp_path):
    ran = tmp_path / "ran"
    work = copy_of(old_format, tmp_path / "old")
    best = work / "save" / "best_checkpoint"
    (best / "dense" / "pickled_data").write_bytes(pickle.dumps({"protocol_version": 1, "data": Command(ran)}))
    error = fails(shared_dataset_dir, work, "--eval_only", "--model_load_dir", best)
    assert "it asks for posix.system, which no checkpoint needs" in error and not ran.exists()
    work = copy_of(finished[0], tmp_path / "new")
    best = work / "save" / "best_checkpoint"
    np.savez(best / "dense.npz", **{"model.dnn.bias_1": np.array([Command(ran)], object)})
    error = fails(shared_dataset_dir, work, "--eval_only", "--model_load_dir", best, "--skip_checksums")
    assert "dense.npz cannot be read" in error and not ran.exists()


STATE_CHANGES = [
    lambda state: state.pop("tables"), lambda state: state["tables"].pop("embedding"),
    lambda state: state.update(format_version="2"), lambda state: state.update(model=[]),
    lambda state: state["model"].update(fields="f0"), lambda state: state["model"].update(dnn=None),
    lambda state: state["model"].update(embedding_vec_size=10**30), lambda state: state["progress"].update(step=-1),
    lambda state: state["model"].update(batch_norm="no"), lambda state: state["progress"].update(best=3),
    lambda state: state["plateau"].update(learning_rate=float("nan")), lambda state: state["run"].pop("batch_size"),
    lambda state: state["tables"]["embedding"].update(snapshot="../../elsewhere"),
    lambda state: state["tables"]["embedding"].update(processes=0),
    lambda state: state["tables"]["embedding"].update(rows="58"), lambda state: state.pop("digest"),
]


@pytest.mark.parametrize("number", range(len(STATE_CHANGES)))
def test_state_that_does_not_fit_is_one_line(fails, finished, shared_dataset_dir, tmp_path, number):
    work = copy_of(finished[0], tmp_path)
    path = work / "save" / "best_checkpoint" / "state.json"
    state = json.loads(path.read_text())
    STATE_CHANGES[number](state)
    if "digest" in state:  # as if somebody had written it so
        state["digest"] = checkpoints.digest(state)
    path.write_text(json.dumps(state))
    error = fails(shared_dataset_dir, work, "--eval_only", "--model_load_dir", path.parent)
    assert "best_checkpoint" in error and "use another checkpoint" in error or "another model" in error


@pytest.mark.parametrize("options, message", [
    (["--dnn", "8,9"], "--dnn 8,8, now it is 8,9"),
    (["--embedding_vec_size", "5"], "--embedding_vec_size 4, now it is 5"),
    (["--batch_norm"], "--batch_norm False, now it is True"),
])
def test_other_networks_are_refused(fails, finished, shared_dataset_dir, options, message):
    work, _ = finished
    best = work / "save" / "best_checkpoint"
    assert message in fails(shared_dataset_dir, work, "--eval_only", "--model_load_dir", best, *options)


def test_swapped_tables_are_refused(fails, finished, shared_dataset_dir):
    work, _ = finished
    assert "rows of 3 floats, expected 3 x 4" in fails(
        shared_dataset_dir, work, "--eval_only", "--model_load_dir", work / "save" / "best_checkpoint",
        "--persistent_path", work / "tables_fm", "--persistent_path_fm", work / "tables")


def test_rows_of_another_run_are_not_touched(run_here, fails, finished, shared_dataset_dir, tmp_path):
    work = copy_of(finished[0], tmp_path)
    before = everything(work, "best_checkpoint")
    assert "--overwrite_tables" in fails(shared_dataset_dir, work, "--train_batches", "1")
    assert "--resume" in fails(shared_dataset_dir, work, "--train_batches", "1", "--model_save_dir", work / "save")
    assert "not the folder of a run" in fails(shared_dataset_dir, work, "--resume", "--model_save_dir", work / "other")
    resume = ["--resume", "--model_save_dir", work / "save"]
    for option, value in (("seed", 1), ("batch_size", 32), ("net_dropout", 0.5), ("learning_rate", 0.02),
                          ("embedding_l2", 0.1), ("max_grad_norm", 10)):
        assert f"was trained with --{option}" in fails(shared_dataset_dir, work, *resume, f"--{option}", value)
    fewer = make_dataset(tmp_path / "fewer", rows=(303, 300, 300))
    assert "was trained on 403 rows" in fails(fewer, work, *resume)
    assert_same(before, everything(work, "best_checkpoint"))
    run_here(shared_dataset_dir, work, "--train_batches", "1", "--overwrite_tables", "--model_save_dir", work / "save")
    assert not (work / "save" / "initial_checkpoint").exists()


def test_overwriting_deletes_neither_the_model_to_load_nor_other_files(run_here, fails, finished, shared_dataset_dir,
                                                                       tmp_path):
    work = copy_of(finished[0], tmp_path / "work")
    (work / "save").rename(work / "old")
    for kept in ("tables/2024-01/notes", "tables_fm/3-4/notes", "save/2024/notes", "tables/.writing-0/notes",
                 "save/.staging/notes", "save/.old-x/notes", "save/.new-x/notes", "save/logs/events.out.tfevents.1"):
        (work / kept).parent.mkdir(parents=True, exist_ok=True)
        (work / kept).write_text("mine")
        (work / kept).with_name("LOCK").touch()  # RocksDB has one too
    options = ["--train_batches", "1", "--overwrite_tables"]
    load = ["--model_load_dir", work / "old" / "best_checkpoint"]
    swapped = ["--persistent_path", work / "tables_fm", "--persistent_path_fm", work / "tables"]
    files = sorted(work.rglob("*"))
    for places in ([], swapped):  # the tables were copied: the checkpoint names another path
        assert "delete the tables" in fails(shared_dataset_dir, work, *options, *load, *places)
    assert "would delete --model_load_dir" in fails(shared_dataset_dir, tmp_path / "new", *options, *load,
                                                    "--model_save_dir", work / "old")
    other = copy_of(finished[0], tmp_path / "other")  # its rows stay when the model to load is found not to fit
    theirs = sorted(other.rglob("*"))
    assert "was saved with --embedding_vec_size 4" in fails(
        shared_dataset_dir, other, *options, *load, "--model_save_dir", other / "save", "--embedding_vec_size", "8")
    assert sorted(other.rglob("*")) == theirs
    assert sorted(work.rglob("*")) == files
    run_here(shared_dataset_dir, work, *options, "--model_save_dir", work / "save")
    for name in ("notes", "LOCK", "events.out.tfevents.1"):
        assert set(work.rglob(name)) >= {path for path in files if path.name == name and "0-1" not in path.parts}


def test_half_removed_checkpoint_does_not_stay(monkeypatch, tmp_path):
    (tmp_path / "step_3").mkdir()
    (tmp_path / "step_3" / "state.json").write_text("")

    def killed(path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", killed)
        checkpoints.remove_checkpoint(str(tmp_path), "step_3")
    assert len(list(tmp_path.iterdir())) == 1 and not checkpoints.find_checkpoints(str(tmp_path))
    checkpoints.clean_save_dir(str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_a_killed_run_without_a_save_dir_can_be_resumed(run_here, fails, finished, shared_dataset_dir, tmp_path):
    work = copy_of(finished[0], tmp_path)
    best = work / "tables" / ".deepfm-best"
    shutil.copytree(work / "save", best)
    error = fails(shared_dataset_dir, work, "--train_batches", "1")
    assert f"continue it with --model_save_dir {best} --resume" in error
    output = run_here(shared_dataset_dir, work, "--train_batches", "16", "--model_save_dir", best, "--resume")
    assert "Resuming from" in output


def test_best_epoch_without_a_save_dir(shared_dataset_dir, tmp_path):
    output = train_here(shared_dataset_dir, tmp_path, "--train_batches", "28", "--learning_rate", "0.3",
                        "--net_dropout", "0", "--early_stop_patience", "2")
    aucs = metrics_lines(output, "val")
    best = int(np.argmax([auc - logloss for auc, logloss in aucs[:-1]]))
    assert best < len(aucs) - 2 and aucs[-1] == aucs[best] and "the checkpoint is not kept" in output
    assert not (tmp_path / "tables" / ".deepfm-best").exists()
    assert not list((tmp_path / "tables" / "0-1" / "values").iterdir())
    assert not list((tmp_path / "tables_fm" / "0-1" / "keys").iterdir())


@pytest.fixture(scope="module")
def finished_by_two(shared_dataset_dir, tmp_path_factory):
    work = tmp_path_factory.mktemp("finished_by_two")
    output, _ = run_trainer(shared_dataset_dir, work, "--model_save_dir", work / "save", "--train_batches", "7",
                            processes=2)
    return work, output


@pytest.mark.parametrize("first, second, start", [(1, 2, 14), (2, 1, 7)])
def test_other_number_of_processes(finished, finished_by_two, shared_dataset_dir, tmp_path, first, second, start):
    """The resumed run goes on for two steps and ends with the metrics of the best checkpoint, saved by the first."""
    saved, output = finished if first == 1 else finished_by_two
    work, end = copy_of(saved, tmp_path), start + 2
    options = ["--train_batches", end, "--min_delta", "1", "--resume", "--model_save_dir", work / "save"]
    if second == 1:
        resumed = train_here(shared_dataset_dir, work, *options)
    else:
        resumed, _ = run_trainer(shared_dataset_dir, work, *options, processes=second)
    assert re.search(rf"Resuming from .* step {start}\n", resumed) and f", Step {end}," in resumed
    one, other = final_metrics(output), final_metrics(resumed)
    assert one == pytest.approx(other, abs=1.1e-6)
    before, after = everything(work, f"step_{start}", first), everything(work, f"step_{end}", second)
    assert after["System-Train-TrainStep"].item() == end
    change = np.abs(after["embedding"] - before["embedding"])
    assert 0 < change[:, :DIM].max() < 0.05  # two steps of Adam at 0.01, from the rows and moments that were saved
    looked_up = rows_of_steps(shared_dataset_dir, range(start, end))
    assert 5 < len(looked_up) < NUM_ROWS - 5
    for table, dim in (("embedding", DIM), ("embedding_fm", 1)):
        assert before[table][:, dim:].any(axis=1).sum() > NUM_ROWS // 2
        for row in range(NUM_ROWS):  # m decays in the rows that were looked up, and v grows; others stay bit for bit
            assert (row in looked_up) != np.array_equal(before[table][row], after[table][row]), row
        moved = sorted(looked_up)
        m, new_m = (values[table][moved, dim:2 * dim] for values in (before, after))
        v, new_v = (values[table][moved, 2 * dim:] for values in (before, after))
        assert (new_v >= 0.999**2 * v - 1e-12).all() and np.abs(new_m - m).max() < 1


def rows_of_steps(data_dir, steps, batch_size=64, seed=2022):
    """Ids that the training batches of some steps look up."""
    dataset, found = trainer_module.read_dataset(str(data_dir)), set()
    per_epoch = trainer_module.steps_per_epoch(dataset.splits["train"], batch_size, 1)
    for step in steps:
        epoch, first = divmod(step, per_epoch)
        batch = next(trainer_module.train_batches(trainer_module.read_rows, dataset, batch_size, seed=seed,
                                                  epoch=epoch + 1, rank=0, world_size=1, first_step=first))
        found |= set(batch.ids[:batch.num_valid].ravel().tolist())
    return found


SLOW = """
import sys, time
sys.path.insert(0, {root!r})
import deepfm_train_eval as module
original = module.cpu.blocks_of_rows
def slow(*args):
    time.sleep(module.rank())
    yield from original(*args)
module.cpu.blocks_of_rows = slow
module.main(sys.argv[1:])
"""


def test_snapshot_waits_for_the_slowest_process(shared_dataset_dir, tmp_path):
    script = tmp_path / "slow.py"
    script.write_text(SLOW.format(root=str(ROOT)))
    run_trainer(shared_dataset_dir, tmp_path, "--model_save_dir", tmp_path / "save", "--train_batches", "2",
                processes=2, script=script)
    everything(tmp_path, "step_2", processes=2)  # with every row


def test_interrupt_ends_in_one_line(shared_dataset_dir, tmp_path):
    command = trainer_command(shared_dataset_dir, tmp_path, "--loss_print_interval", "1", "--early_stop_patience", "0",
                              "--model_save_dir", tmp_path / "save")
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if "Step 3/" in line:
            process.send_signal(2)
            break
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "interrupted; continue with --resume" in errors
    assert "Traceback" not in errors


def test_folders_are_named_as_oneembedding_names_them():
    store = TableStore("embedding", "persistent_path", "t", 8, 100)
    assert store.folders(2) == ["t/0-2", "t/1-2"]
    assert store.folders(10) == [f"t/0{process}-10" for process in range(10)]


def test_full_disk_stops_before_anything_is_written(monkeypatch, fails, run_here, finished, shared_dataset_dir,
                                                    tmp_path):
    """Rows of both tables and a dense part per name, counted together where one disk has them."""
    work = copy_of(finished[0], tmp_path / "work")
    usage, free = namedtuple("usage", "total used free"), [0]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, free[0]))
    options = [shared_dataset_dir, work, "--resume", "--model_save_dir", work / "save", "--train_batches", "15"]
    before = sorted(path for path in work.rglob("*") if "logs" not in path.parts)
    error = fails(*options)
    needed = float(re.search(r"saving a checkpoint needs ([\d.]+) MiB on the disk of .* only 0.0 MiB are free; the "
                             "earlier ones are whole", error).group(1))
    assert sorted(path for path in work.rglob("*") if "logs" not in path.parts) == before
    free[0] = int((needed + 0.05) * 2**20)
    run_here(*options)
    new = [path for path in work.rglob("*") if path.is_file() and path not in before]
    assert sum(path.stat().st_size for path in new) < needed * 2**20


@pytest.fixture
def cuda_trainer(shared_dataset_dir, tmp_path, monkeypatch):
    """A new model on the stand-in for OneEmbedding, which saved its start: tables without rows."""
    host_embedding.install(monkeypatch.setattr)
    monkeypatch.setattr(conftest, "enlarge_rows", lambda model: None)
    (tmp_path / "save").mkdir()
    trainer = make_trainer(shared_dataset_dir, tmp_path, "--device", "cuda", "--model_save_dir", tmp_path / "save")
    trainer.checkpointer.save(trainer, ["first"])
    return trainer


def test_full_disk_on_cuda_is_one_line(cuda_trainer, tmp_path, monkeypatch):
    """OneFlow would abort in the middle of a snapshot."""
    before, cuda_trainer.step = sorted(tmp_path.rglob("*")), 1
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("usage", "total used free")(0, 0, 0))
    with pytest.raises(UserError, match="saving a checkpoint needs .* MiB on the disk of .* only 0.0 MiB are free"):
        cuda_trainer.checkpointer.save(cuda_trainer, ["second"])
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("step, left", [(0, [1, 2]), (1, [2])])
def test_what_an_evaluation_appended_stays_until_it_is_in_a_snapshot(cuda_trainer, step, left):
    """A second checkpoint of one step makes no snapshot, but OneEmbedding may have rows that are in none."""
    folder, cuda_trainer.step = cuda_trainer.checkpointer.stores[0].own_folder(), step
    for path in [path for chunk in (1, 2) for path in chunk_files(folder, chunk)]:
        Path(path).touch()
    cuda_trainer.checkpointer.save(cuda_trainer, ["second"])
    assert sorted(chunk_numbers(folder)) == left


def test_needed_space_is_what_is_written(tmp_path):
    """Keys and positions of 8 bytes, and blocks of 4 KiB with 42 rows of 96 bytes."""
    store = TableStore("embedding", "persistent_path", str(tmp_path), 8, 42 * 100)
    assert store.bytes_to_save() == 42 * 100 * 16 + 100 * 4096
    store.write_snapshot("name", [(np.arange(4200), np.ones((4200, 24), np.float32))])
    store.write_checksums("name")
    assert store.check_snapshot("name", 1)[0] == 4200
    written = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert written < store.bytes_to_save() + 1000


def write_to_a_full_disk(*_, **__):
    with open("/dev/full", "wb", buffering=0) as full:
        full.write(b" ")


def copy_to_a_full_disk(*_, **__):
    """shutil.copytree raises one error with a list of all its files."""
    raise shutil.Error([("from", "to", "No space left on device")] * 9)


@pytest.mark.parametrize("owner, name, fail", [
    (checkpoints.np, "savez", write_to_a_full_disk), (shutil, "copytree", copy_to_a_full_disk),
    (trainer_module.chunks, "write_all", write_to_a_full_disk)])
def test_full_disk_while_writing_is_one_clear_line(monkeypatch, fails, finished, shared_dataset_dir, tmp_path, owner,
                                                   name, fail):
    work = copy_of(finished[0], tmp_path / "work")
    monkeypatch.setattr(owner, name, fail)
    error = fails(shared_dataset_dir, work, "--resume", "--model_save_dir", work / "save", "--train_batches", "15")
    assert len(error) < 300 and "No space left on device); the earlier ones are whole" in error
    assert not list(work.glob("tables*/.deepfm*"))  # the space is given back


def test_second_run_with_the_same_tables_is_refused(fails, run_here, shared_dataset_dir, tmp_path):
    options = [shared_dataset_dir, tmp_path, "--model_save_dir", tmp_path / "save", "--train_batches", "2"]
    with contextlib.ExitStack() as held:
        for folder in ("tables", "tables_fm", "save"):
            hold(str(tmp_path / folder), held, "held already")
        for more in ([], ["--resume"], ["--overwrite_tables"]):
            assert "another run is training with the tables" in fails(*options, *more)
        other = ["--persistent_path", tmp_path / "t", "--persistent_path_fm", tmp_path / "f"]
        assert "another run is saving to" in fails(*options, *other)
        assert not (tmp_path / "save" / "run.json").exists()
    run_here(*options)


def test_another_way_from_an_earlier_checkpoint_keeps_its_own_rows(shared_dataset_dir, tmp_path):
    """Not those of a checkpoint of the same step that the run had made before, and somebody moved."""
    options = ["--eval_interval", "3", "--min_delta", "1", "--patience", "1", "--keep_checkpoints", "9",
               "--early_stop_patience", "0", "--model_save_dir"]
    for name, steps in (("there", 9), ("new", 3)):
        work = tmp_path / name
        train_here(shared_dataset_dir, work, *options, work / "save", "--train_batches", steps)
        for step in (6, 9):
            shutil.rmtree(work / "save" / f"step_{step}", ignore_errors=True)
        train_here(shared_dataset_dir, work, *options, work / "save", "--train_batches", "9", "--resume", "--lr_factor",
                   "0.9")
    assert_same(everything(tmp_path / "there", "step_9"), everything(tmp_path / "new", "step_9"))


def test_a_model_with_batch_norm_is_not_for_the_fused_mlp(finished, tmp_path):
    folder = copy_of(finished[0], tmp_path) / "save" / "best_checkpoint"
    args = trainer_module.parse_args(["--eval_only", "--model_load_dir", str(folder), "--data_dir", "x", "--device",
                                      "cpu"])
    args.disable_fusedmlp = False  # as on CUDA
    trainer_module.adopt_model(args, str(folder))
    state = json.loads((folder / "state.json").read_text())
    state["model"]["batch_norm"] = True
    (folder / "state.json").write_text(json.dumps({**state, "digest": checkpoints.digest(state)}))
    with pytest.raises(UserError, match="has batch normalisation, which the fused MLP has not"):
        trainer_module.adopt_model(args, str(folder))


def test_resume_after_checkpoints_were_moved_keeps_the_rows(run_here, fails, finished, shared_dataset_dir, tmp_path):
    work = copy_of(finished[0], tmp_path)
    names = [path.parent.name for path in (work / "save").glob("*/state.json")]
    (work / "backup").mkdir()
    for name in names:
        (work / "save" / name).rename(work / "backup" / name)
    rows = sorted(work.glob("tables*/0-1/*/*"))
    for marked in (True, False):  # as run.json of this version and of earlier ones
        if not marked:
            run = json.loads((work / "save" / "run.json").read_text())
            del run["saved"], run["checkpoints"]
            (work / "save" / "run.json").write_text(json.dumps(run))
        error = fails(shared_dataset_dir, work, "--resume", "--model_save_dir", work / "save")
        assert "had checkpoints, but they are gone; put them back" in error
        assert sorted(work.glob("tables*/0-1/*/*")) == rows
    scored = run_here(shared_dataset_dir, work, "--eval_only", "--model_load_dir", work / "backup" / "best_checkpoint")
    assert final_metrics(scored) == final_metrics(finished[1])


def test_rows_of_checkpoints_that_were_moved_stay(run_here, fails, finished, shared_dataset_dir, tmp_path):
    """As long as the run goes on with others."""
    work = copy_of(finished[0], tmp_path)
    save, resume = work / "save", ["--resume", "--model_save_dir", work / "save", "--train_batches", "28"]
    for name in ("best_checkpoint", "step_7"):
        (save / name).rename(work / name)
    before = sorted(work.glob("tables*/0-1/*/*"))
    assert "best_checkpoint is gone" in fails(shared_dataset_dir, work, *resume)
    assert sorted(work.glob("tables*/0-1/*/*")) == before
    (work / "best_checkpoint").rename(save / "best_checkpoint")
    run_here(shared_dataset_dir, work, *resume)
    assert not (save / "step_14").exists()
    scored = run_here(shared_dataset_dir, work, "--eval_only", "--model_load_dir", work / "step_7")
    assert final_metrics(scored)[:2] == metrics_lines(finished[1], "val")[0]
    snapshots = {path.name.split("-")[1] for path in (work / "tables" / "0-1" / "snapshots").iterdir()}
    assert "step_7" in snapshots and {"step_21", "step_28"} <= snapshots


@pytest.mark.parametrize("content", ["", "{", "[]", '{"run_id": 5, "model_load_dir": null}', "\xff"])
def test_damaged_run_file_is_one_line(fails, finished, shared_dataset_dir, tmp_path, content):
    work = copy_of(finished[0], tmp_path)
    (work / "save" / "run.json").write_text(content, encoding="latin-1")
    error = fails(shared_dataset_dir, work, "--resume", "--model_save_dir", work / "save")
    assert "run.json cannot be used" in error and "begin a new run" in error


def test_adams_moments_are_not_in_memory_when_nothing_is_trained(monkeypatch, run_here, finished, shared_dataset_dir,
                                                                tmp_path):
    states, evaluate = [], trainer_module.Trainer.evaluate

    def watched(self, split, *rest):
        states.append((split, self.train_graph is None, len(self.optimizer_state)))
        return evaluate(self, split, *rest)

    monkeypatch.setattr(trainer_module.Trainer, "evaluate", watched)
    load = ["--model_load_dir", finished[0] / "save" / "best_checkpoint"]
    run_here(shared_dataset_dir, finished[0], "--eval_only", *load)
    run_here(shared_dataset_dir, tmp_path, "--train_batches", "1", *load)
    assert states == [("val", True, 0), ("test", True, 0), ("val", False, 0), ("val", True, 0), ("test", True, 0)]
