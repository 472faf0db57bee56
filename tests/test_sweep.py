"""tools/sweep.py with a stand-in for the trainer, and once with the real one."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import sweep
from conftest import ROOT, trainer_command

# writes what the trainer writes; a learning rate of 1 fails, of 2 waits until `go` lies in the current folder
FAKE_TRAINER = """
import argparse, json, os, signal, sys, time
parser = argparse.ArgumentParser()
for name in ("data_dir", "dnn", "learning_rate", "net_dropout", "seed", "model_save_dir", "persistent_path",
             "persistent_path_fm", "log_dir"):
    parser.add_argument("--" + name)
parser.add_argument("--resume", action="store_true")
parser.add_argument("--batch_norm", action="store_true")
args = parser.parse_args()
with open("calls", "a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
for folder in (args.model_save_dir, args.persistent_path, args.persistent_path_fm, args.log_dir):
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, "rows"), "w") as file:
        file.write("1")
with open(os.path.join(args.model_save_dir, "run.json"), "w") as file:
    file.write("{}")
with open(os.path.join(args.log_dir, "run.json"), "w") as file:
    json.dump({"options": vars(args), "data": {"fingerprint": "x"}}, file)
print("this is the trainer", flush=True)
rate = float(args.learning_rate or 0.001)
if rate == 2:
    def end(*_):
        with open("signals", "a") as file:
            file.write("x")
        time.sleep(0.3)
        os._exit(130)
    signal.signal(signal.SIGINT, end)
    with open("waiting", "w") as file:
        file.write(str(os.getpid()))
    while not os.path.exists("go"):
        time.sleep(0.02)
if rate == 1 and not os.path.exists("mended"):
    print("error: the loss is nan near step 7; use a lower --learning_rate")
    print("and more words")
    sys.exit(3)
auc = 0.5 + rate + int(args.seed or 0) / 1000
with open(os.path.join(args.log_dir, "metrics.jsonl"), "w") as file:
    for event in ("val", "test"):
        file.write(json.dumps({"event": event, "step": 9, "epoch": 1, "auc": auc, "logloss": 0.4}) + "\\n")
"""
DRIVER = """
import sys
sys.path.insert(0, sys.argv.pop(1))
from tools import sweep
sys.exit(sweep.main(command=[sys.executable, "trainer.py"]))
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    (tmp_path / "trainer.py").write_text(FAKE_TRAINER)
    (tmp_path / "driver.py").write_text(DRIVER)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_sweep(*arguments):
    return sweep.main(["--output_dir", "out", *arguments], command=[sys.executable, "trainer.py"])


def start_sweep(*arguments):
    """In a process and session of its own, also where nohup runs the tests; waits until its trainer waits."""
    process = subprocess.Popen([sys.executable, "driver.py", str(ROOT), "--output_dir", "out", *arguments],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
                               preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL))
    wait_for(lambda: os.path.exists("waiting") or process.poll() is not None)
    assert process.poll() is None, process.communicate()
    return process


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def waiting_trainer():
    with open("waiting") as file:
        return int(file.read())


def calls():
    """Arguments of each start of the trainer."""
    if not os.path.exists("calls"):
        return []
    with open("calls") as file:
        return [json.loads(line) for line in file]


def state():
    with open("out/sweep.json") as file:
        return {name: run["state"] for name, run in json.load(file)["runs"].items()}


def has_ended(pid):
    """Also when nobody has asked for its status yet."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_every_combination_is_trained_in_a_folder_of_its_own(capsys):
    assert run_sweep("--grid", "learning_rate=1e-3,3e-4", "--grid", "net_dropout=0,0.2", "--seeds", "1,2", "--",
                     "--data_dir", "some data") == 0
    options = [(rate, dropout, seed) for seed in "12" for dropout in ("0", "0.2") for rate in ("1e-3", "3e-4")]
    names = [f"learning_rate_{rate},net_dropout_{dropout},seed_{seed}" for rate, dropout, seed in options]
    assert calls() == [
        ["--data_dir", "some data", f"--learning_rate={rate}", f"--net_dropout={dropout}", f"--seed={seed}",
         f"--model_save_dir=out/{name}/model", f"--persistent_path=out/{name}/tables",
         f"--persistent_path_fm=out/{name}/tables_fm", f"--log_dir=out/{name}/logs"]
        for name, (rate, dropout, seed) in zip(names, options)]
    assert state() == dict.fromkeys(names, "finished")
    with open(f"out/{names[0]}/output.log") as file:
        assert file.read() == "this is the trainer\n"
    printed = capsys.readouterr().out
    assert f"[2/8] {names[1]}: 0 s, val AUC 0.501300, test AUC 0.501300" in printed
    assert re.search(r"^2 +1e-3 +0.2 +0.502500 \+- 0.000707", printed, re.M)


def test_finished_runs_are_skipped_and_another_grid_adds_runs(capsys):
    assert run_sweep("--seeds", "1,2", "--", "--data_dir", "d") == 0
    assert run_sweep("--seeds", "1,2", "--", "--data_dir", "d") == 0
    assert len(calls()) == 2
    assert run_sweep("--seeds", "2,3", "--grid", "learning_rate=1e-2", "--", "--data_dir", "d") == 0
    assert run_sweep("--seeds", "2,3", "--", "--data_dir", "d") == 0
    assert [call[-5] for call in calls()[2:]] == ["--seed=2", "--seed=3", "--seed=3"]
    assert list(state()) == ["seed_1", "seed_2", "learning_rate_1e-2,seed_2", "learning_rate_1e-2,seed_3", "seed_3"]
    assert capsys.readouterr().out.splitlines()[-1].startswith("largest val AUC - logloss: 0.113000, learning_rate_1e")


def test_a_failing_run_is_noted_and_the_others_go_on(capsys):
    grid = ["--grid", "learning_rate=1,1e-2", "--seeds", "1,2", "--", "--data_dir", "d"]
    assert run_sweep(*grid) == 1
    out, error = capsys.readouterr()
    assert "learning_rate_1,seed_1: 0 s, failed with status 3: error: the loss is nan near step 7; use a lower" in out
    assert error == ("error: 2 of 4 runs failed: learning_rate_1,seed_1, learning_rate_1,seed_2 (2); mend the cause "
                     "and start the same command again\n")
    assert list(state().values()) == ["failed", "finished"] * 2
    open("mended", "w").close()
    assert run_sweep(*grid) == 0
    assert len(calls()) == 6 and all(call[-1] == "--resume" for call in calls()[4:])


def test_a_sweep_of_failures_says_so(capsys):
    assert run_sweep("--grid", "learning_rate=1", "--", "--data_dir", "d") == 1
    assert "1 of 1 run failed" in capsys.readouterr().err


def test_switches_lists_and_odd_values():
    assert run_sweep("--grid", "batch_norm=on,off", "--grid", "dnn=400,300;8", "--", "--data_dir", "d") == 0
    assert [call[2:-4] for call in calls()] == [["--batch_norm", "--dnn=400,300"], ["--dnn=400,300"],
                                                ["--batch_norm", "--dnn=8"], ["--dnn=8"]]
    assert list(state())[0] == "batch_norm_on,dnn_400-300"
    long, other = sweep.name_of({"data_dir": "/a/" + "x" * 300}), sweep.name_of({"data_dir": "/a/" + "x" * 301})
    assert len(long) == sweep.LONGEST_NAME and long != other and sweep.is_folder_name(long)


def test_other_arguments_for_a_run_are_refused(capsys):
    assert run_sweep("--seeds", "1", "--", "--data_dir", "d", "--dnn", "8") == 0
    capsys.readouterr()
    assert run_sweep("--seeds", "1,2", "--", "--data_dir", "d", "--dnn", "16") == 1
    assert capsys.readouterr().err == ("error: out/seed_1 was made with other arguments, 8 instead of 16; use another "
                                       "--output_dir\n")
    assert len(calls()) == 1


def test_a_folder_of_somebody_else_is_not_used(capsys):
    os.makedirs("out/seed_1/model")
    for _ in range(2):
        assert run_sweep("--seeds", "1", "--keep", "none", "--", "--data_dir", "d") == 1
        assert "out/seed_1 is there, but not of this sweep" in capsys.readouterr().err
    assert calls() == [] and os.path.exists("out/seed_1/model")


def test_a_resumed_run_knows_what_it_started_from():
    """--resume and --model_load_dir do not go together."""
    runs = sweep.Sweep("out", ["train"])
    [name] = runs.plan([("seed", ["1"])], ["--model_load_dir", "best", "--dnn", "8", "--model_load_dir=other"])
    assert runs.command_of(name)[1:5] == ["--model_load_dir", "best", "--dnn", "8"]
    os.makedirs("out/seed_1/model")
    with open("out/seed_1/model/run.json", "w"):
        pass
    assert runs.command_of(name)[1:4] == ["--dnn", "8", "--seed=1"] and runs.command_of(name)[-1] == "--resume"


def test_a_run_whose_folder_was_removed_is_trained_again():
    assert run_sweep("--seeds", "1", "--", "--data_dir", "d") == 0
    subprocess.run(["rm", "-r", "out/seed_1"], check=True)
    assert run_sweep("--seeds", "1", "--", "--data_dir", "e") == 0  # also with other arguments
    assert len(calls()) == 2 and "--resume" not in calls()[1]


@pytest.mark.parametrize("content", [
    "", "{", "[]", '{"runs": {}}', '{"tool": "tools/sweep.py", "runs": []}',
    '{"tool": "tools/sweep.py", "runs": {"../x": {"arguments": [], "state": "finished"}}}',
    '{"tool": "tools/sweep.py", "runs": {"x": {"arguments": [1], "state": "finished"}}}',
    '{"tool": "tools/sweep.py", "runs": {"x": {"arguments": [], "state": ["finished"]}}}',
    '{"tool": "tools/sweep.py", "runs": {"x": {"arguments": [], "state": "failed", "seconds": "1"}}}',
])
def test_a_damaged_state_is_one_line(folder, capsys, content):
    os.makedirs("out")
    os.makedirs("x/model")
    (folder / "out" / "sweep.json").write_text(content)
    assert run_sweep("--seeds", "1", "--keep", "none") == 1
    error = capsys.readouterr().err
    assert error.startswith("error: out/sweep.json cannot be used (") and error.count("\n") == 1
    assert os.path.exists("x/model") and calls() == []


def test_keep_best_and_none():
    grid = ["--grid", "learning_rate=1e-3,1e-2,1", "--", "--data_dir", "d"]

    def heavy(rate):
        return [part for part in sweep.HEAVY if os.path.exists(f"out/learning_rate_{rate}/{part}")]

    assert run_sweep("--keep", "best", *grid) == 1
    assert heavy("1e-3") == [] and heavy("1e-2") == heavy("1") == list(sweep.HEAVY)  # what failed may be resumed
    assert os.path.exists("out/learning_rate_1e-3/logs/metrics.jsonl")
    assert run_sweep("--keep", "none", *grid) == 1
    assert heavy("1e-2") == [] and heavy("1") == list(sweep.HEAVY)
    assert len(calls()) == 4  # what was removed stays finished; the failed one was tried again


@pytest.mark.parametrize("number, status, word", [(signal.SIGINT, 130, "interrupted"),
                                                  (signal.SIGTERM, 143, "terminated"),
                                                  (signal.SIGHUP, 129, "terminated")])
def test_a_stopped_sweep_goes_on_where_it_was(number, status, word):
    arguments = ["--grid", "learning_rate=1e-2,2,1e-3", "--", "--data_dir", "d"]
    process = start_sweep(*arguments)
    os.killpg(process.pid, number)  # as a terminal does
    _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (status, f"error: {word}; the same command goes on where it was\n")
    assert has_ended(waiting_trainer())
    with open("signals") as file:
        assert file.read() == "x"  # a second one would end it without care
    assert list(state().values()) == ["finished", "started", "new"]
    open("go", "w").close()
    assert run_sweep(*arguments) == 0
    assert [call[-1] == "--resume" for call in calls()] == [False, False, True, False]
    assert set(state().values()) == {"finished"}


def test_a_killed_sweep_leaves_no_trainer_and_goes_on():
    process = start_sweep("--grid", "learning_rate=2", "--", "--data_dir", "d")
    process.kill()
    process.communicate()
    wait_for(lambda: has_ended(waiting_trainer()))
    open("go", "w").close()
    assert run_sweep("--grid", "learning_rate=2", "--", "--data_dir", "d") == 0
    assert calls()[1][-1] == "--resume"


def test_two_sweeps_in_one_folder_are_refused(capsys):
    process = start_sweep("--grid", "learning_rate=2", "--", "--data_dir", "d")
    assert run_sweep("--seeds", "1", "--", "--data_dir", "d") == 1
    assert capsys.readouterr().err == "error: another sweep runs in out; wait for its end or stop it\n"
    open("go", "w").close()
    process.communicate(timeout=60)
    assert process.returncode == 0 and list(state()) == ["learning_rate_2"]


def test_a_trainer_that_does_not_stop_is_killed(monkeypatch):
    monkeypatch.setattr(sweep, "PATIENCE", 0.2)
    stubborn = subprocess.Popen(["bash", "-c", "trap '' INT; echo ready; while :; do sleep 0.05; done"],
                                stdout=subprocess.PIPE, start_new_session=True)
    stubborn.stdout.readline()
    monkeypatch.setattr(sweep, "MORE_PATIENCE", 0.2)
    sweep.stop(stubborn)
    assert stubborn.returncode == -signal.SIGKILL


def test_the_launcher_and_its_data_are_part_of_what_a_run_is(monkeypatch, capsys):
    monkeypatch.setattr(sweep, "LAUNCHER", [sys.executable, "trainer.py"])
    monkeypatch.setenv("DATA_DIR", "one")
    assert sweep.main(["--output_dir", "out", "--launcher", "--seeds", "1"]) == 0
    assert calls()[0][0] == "--seed=1"
    monkeypatch.setenv("DATA_DIR", "two")
    assert sweep.main(["--output_dir", "out", "--launcher", "--seeds", "1"]) == 1
    assert "out/seed_1 was made with other arguments, DATA_DIR=one instead of DATA_DIR=two" in capsys.readouterr().err


@pytest.mark.parametrize("arguments, message", [
    (["--seeds", "1", "--", "--model_save_dir", "x"], "--model_save_dir is not for a sweep, which trains each run"),
    (["--seeds", "1", "--", "--resume"], "--resume is not for a sweep"),
    (["--seeds", "1", "--", "--seed=3"], "--seed is both varied and among the trainer's arguments"),
    (["--grid", "seed=1", "--seeds", "1"], "seed is varied twice"),
    (["--grid", "dnn=8", "--grid", "dnn=9"], "dnn is varied twice"),
    (["--grid", "dnn"], "--grid: 'dnn' is not NAME=VALUE,VALUE"),
    (["--grid", "--dnn=8"], "expected one argument"),
    (["--grid", "log_dir=a,b"], "--grid: log_dir is no option for a grid"),
    (["--grid", "net_dropout=0,,1"], "--grid: 'net_dropout=0,,1' has an empty value"),
    (["--grid", "net_dropout=0,0"], "--grid: 'net_dropout=0,0' has 0 twice"),
    (["--seeds", "1,x"], "--seeds: 'x' is not a whole number"),
    (["--seeds", "-1"], "--seeds"),
    ([], "nothing to vary; give --grid or --seeds"),
    (["--seeds", "1", "--data_dir", "d"], "unrecognized arguments: --data_dir d"),
])
def test_mistakes_in_arguments(capsys, arguments, message):
    with pytest.raises(SystemExit) as end:
        run_sweep(*arguments)
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1 and message in error


def test_the_trainers_options_are_known():
    """Lists are those of its parser, and no option has the values that stand for switches."""
    from deepfm_train_eval import make_parser

    actions = {action.dest: action for action in make_parser()._actions}
    assert set(sweep.OURS + sweep.NOT_TRAINING) <= set(actions)
    lists = {name for name, action in actions.items() if getattr(action.type, "__name__", "").endswith("_list")}
    assert lists - set(sweep.NOT_TRAINING) == set(sweep.LISTS)
    assert not {"on", "off"} & {choice for action in actions.values() for choice in action.choices or ()}


def test_the_real_trainer_is_interrupted_and_resumed(shared_dataset_dir, capsys):
    trainer = trainer_command(shared_dataset_dir, "unused")
    settings = [argument for option, argument in zip(trainer[2::2], trainer[3::2])
                if option not in ("--persistent_path", "--persistent_path_fm") for argument in (option, argument)]
    arguments = ["--output_dir", "out", "--seeds", "1,2", "--keep", "none", "--", *settings, "--train_batches", "140",
                 "--early_stop_patience", "0", "--patience", "10"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, str(ROOT / "tools" / "sweep.py"), *arguments], env=environment,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: process.poll() is not None or os.path.isdir("out/seed_1/model")
             and any(name.startswith("step_") for name in os.listdir("out/seed_1/model")), 120)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (130, "error: interrupted; the same command goes on where it was\n")
    # on a busy machine OneFlow's race may end a run of so tiny a network; the same command then goes on
    assert any(sweep.main(arguments) == 0 for _ in range(3)), capsys.readouterr()
    with open("out/seed_1/output.log") as file:
        assert "Resuming from out/seed_1/model/step_" in file.read()
    blocks = capsys.readouterr().out.split("\n\n")
    rows = [line.split() for line in [block for block in blocks if block.startswith("run ")][-1].splitlines()]
    assert [row[0] for row in rows] == ["run", "seed_1", "seed_2"]
    assert [row[rows[0].index("steps")] for row in rows[1:]] == ["140", "140"]
    assert sorted(os.listdir("out/seed_1")) == ["logs", "output.log"]
