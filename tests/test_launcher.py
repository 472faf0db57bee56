"""train_deepfm_criteo_x4.sh in a copy of the project with a stub trainer, tools and pip."""

import os
import re
import shutil
import signal
import subprocess
import time

import pytest
from conftest import ROOT
from stub_project import LAUNCHER, Project, Terminal, is_running, wait_for


@pytest.fixture
def project(tmp_path):
    return Project(tmp_path)


def test_real_job_passes_on_environment_and_arguments(project):
    done = project.run("--seed", "7", "--dnn", "8, 8", DATA_DIR=str(project.data), MODEL_SAVE_DIR="saved",
                       PERSISTENT_PATH="rows", OMP_NUM_THREADS="3")  # fmt: skip
    assert done.returncode == 0, done.err
    record = project.record()
    options = " ".join(record["argv"])
    assert f"--data_dir {project.data} --persistent_path rows --persistent_path_fm saved/tables_fm" in options
    assert "--model_save_dir saved" in options
    assert "--patience 1 --early_stop_patience 2 --embedding_l2 1e-5 --max_grad_norm 10" in options
    assert record["argv"][-4:] == ["--seed", "7", "--dnn", "8, 8"]  # last, so that they win
    assert "--overwrite_tables" not in options
    assert record["threads"] == "3"


def test_output_goes_to_run_log_too_and_the_status_is_kept(project):
    done = project.run(DATA_DIR=str(project.data), STATUS="7")
    assert done.returncode == 7
    assert "out of the trainer" in done.out
    assert "err of the trainer" in done.out
    assert (project.folder / "run.log").read_text() == done.out


def test_the_log_is_complete_when_nobody_reads_the_output(project):
    project.set_up()
    launcher = project.start(DATA_DIR=str(project.data), STATUS="7", SECONDS_TO_SLEEP="1")
    launcher.stdout.close()
    launcher.stderr.close()
    assert launcher.wait(timeout=60) == 7
    log = (project.folder / "run.log").read_text()
    assert "out of the trainer" in log and "err of the trainer" in log


def test_closed_output(project):
    (project.folder / "closed.sh").write_text(f"exec bash {LAUNCHER} >&- 2>&-\n")
    done = project.run(script="closed.sh", DATA_DIR=str(project.data), STATUS="7")
    assert (done.returncode, done.out, done.err) == (7, "", "")
    assert "out of the trainer" in (project.folder / "run.log").read_text()


def test_a_log_that_cannot_be_written_is_said(project):
    (project.folder / "run.log").mkdir()
    done = project.run(DATA_DIR=str(project.data))
    assert done.returncode == 0
    assert done.out.splitlines()[0] == "note: cannot write run.log: Is a directory"
    assert "out of the trainer" in done.out


def test_a_link_to_the_launcher_from_another_folder(project, tmp_path):
    (tmp_path / "else where").mkdir()
    (tmp_path / "else where" / "link").symlink_to(project.folder / LAUNCHER)
    done = project.run(script="link", cwd=tmp_path / "else where", DATA_DIR="../data")
    assert done.returncode == 0, done.err
    assert (tmp_path / "else where" / "run.log").read_text() == done.out
    assert "--data_dir ../data" in " ".join(project.record()["argv"])
    assert "DATA_DIR " in project.run("--help", script="link", cwd=tmp_path / "else where").out


@pytest.mark.parametrize("arguments, env", [(("--data_dir", "mine"), {}), (("--data_dir=mine",), {"DATA_DIR": "other"}),
                                            ((), {"DATA_DIR": "s3://mine"})])
def test_data_may_be_named_by_an_argument_or_a_url(project, arguments, env):
    (project.folder / "mine").mkdir()
    done = project.run(*arguments, **env)
    assert done.returncode == 0 and "demo" not in done.out, done.err
    argv = project.record()["argv"]
    assert argv[argv.index("--data_dir") + 1] == env.get("DATA_DIR", "mine").replace("other", "mine")
    assert "--overwrite_tables" not in argv


@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_data_folder_with_any_name(project, tmp_path, processes):
    data = tmp_path / "a  b'c \"d\" [e]* $f; #g"
    data.mkdir()
    done = project.run(DATA_DIR=str(data), DEVICE_NUM_PER_NODE=processes)
    assert done.returncode == 0, done.err
    argv = project.record()["argv"]
    assert argv[argv.index("--data_dir") + 1] == str(data)


def test_demo_makes_the_sample_once_and_starts_afresh_each_time(project):
    first, second = project.run(), project.run()
    assert first.returncode == second.returncode == 0, first.err + second.err
    assert "making a synthetic Criteo sample" in first.out
    assert "using the sample in" in second.out
    assert "best test AUC any model could reach is about 0.7500" in second.out
    assert f"--data_dir {project.folder}/data/criteo_sample" in " ".join(project.record()["argv"])
    assert "--overwrite_tables" in project.record()["argv"]


@pytest.mark.parametrize("arguments, env", [
    ((), {"PERSISTENT_PATH_FM": "mine"}), ((), {"MODEL_SAVE_DIR": "mine"}), (("--model_save_dir=mine",), {}),
    (("--persistent_path", "mine"), {}),
])  # fmt: skip
def test_demo_never_overwrites_folders_that_the_user_named(project, arguments, env):
    assert project.run(*arguments, **env).returncode == 0
    assert "mine" in " ".join(project.record()["argv"])
    assert "--overwrite_tables" not in project.record()["argv"]


@pytest.mark.parametrize("cores, batch_size, processes", [
    (4, "10000", 4), (3, "10000", 2), (64, "10000", 8), (4, "7", 1),
])  # fmt: skip
def test_processes_divide_the_batch(project, cores, batch_size, processes):
    script = (project.folder / LAUNCHER).read_text()
    functions = script[: script.rindex('\nmain "$@"')]
    (project.folder / LAUNCHER).write_text(
        f'{functions}\ncount_cores() {{ echo {cores}; }}\npython=none\nchoose_processes --batch_size 10 "$@"\n'
        'echo "$processes $OMP_NUM_THREADS"\n'
    )
    done = project.run(f"--batch_size={batch_size}", "--device", "cpu", DEVICE_NUM_PER_NODE=None)
    assert done.out.splitlines()[-1] == f"{processes} {cores // processes}", done.err


@pytest.mark.parametrize("env, status, message", [
    ({"DATA_DIR": "nowhere"}, 1,
     "error: DATA_DIR=nowhere is not a folder; make it with tools/criteo_parquet.py or another converter"),
    ({"NUM_NODES": "2"}, 2, "error: NUM_NODES=2 needs MASTER_ADDR, the address of node 0"),
    ({"NODE_RANK": "1"}, 2, "error: NODE_RANK=1 is not below NUM_NODES=1; count nodes from 0"),
    ({"NODE_RANK": "08"}, 2, "error: NODE_RANK=8 is not below NUM_NODES=1; count nodes from 0"),
    ({"NODE_RANK": "a[0]"}, 2, "error: NODE_RANK=a[0] is not a whole number from 0 to 4095"),
    ({"NUM_NODES": "0"}, 2, "error: NUM_NODES=0 is not a whole number from 1 to 4096"),
    ({"DEVICE_NUM_PER_NODE": "abc"}, 2, "error: DEVICE_NUM_PER_NODE=abc is not a whole number from 1 to 256"),
    ({"MASTER_PORT": "9" * 30}, 2, f"error: MASTER_PORT={'9' * 30} is not a whole number from 1 to 65535"),
    ({"DEVICE_NUM_PER_NODE": "257"}, 2, "error: DEVICE_NUM_PER_NODE=257 is not a whole number from 1 to 256"),
    ({"MASTER_PORT": "65536"}, 2, "error: MASTER_PORT=65536 is not a whole number from 1 to 65535"),
    ({"OMP_NUM_THREADS": "all"}, 2, "error: OMP_NUM_THREADS=all is not a whole number from 1 to 1024"),
])  # fmt: skip
def test_a_mistake_is_one_clear_line(project, env, status, message):
    done = project.run(**env)
    assert (done.returncode, done.out, done.err) == (status, "", message + "\n")
    assert not (project.records / "python").exists()  # before anything is installed


def test_numbers_are_decimal_and_those_of_another_launcher_do_not_count(project):
    done = project.run(DATA_DIR=str(project.data), NUM_NODES="9", NODE_RANK="08", MASTER_ADDR="127.0.0.1",
                       MASTER_PORT="029500", RANK="abc", WORLD_SIZE="x")  # fmt: skip
    assert done.returncode == 0, done.out + done.err
    assert done.out.startswith("1 process with ") and "no GPU, node 8 of 9 (from 0)\n" in done.out
    assert (project.records / "rank8").exists()
    assert (project.folder / "run_node8.log").read_text() == done.out
    assert project.run(DATA_DIR=str(project.data), RANK="abc").returncode == 0
    assert (project.records / "rank0").exists()


@pytest.mark.parametrize("processes, threads, cores, gpus, expected", [
    (1, 1, 1, 0, "1 process with 1 thread on 1 CPU core, no GPU"),
    (2, 1, 2, 0, "2 processes with 1 thread each on 2 CPU cores, no GPU"),
    (1, 16, 16, 1, "1 process with 16 threads on 16 CPU cores and 1 GPU"),
    (8, 12, 96, 8, "8 processes with 12 threads each on 96 CPU cores and 8 GPUs"),
])  # fmt: skip
def test_the_layout_in_plain_english(project, processes, threads, cores, gpus, expected):
    script = (project.folder / LAUNCHER).read_text()
    functions = script[: script.rindex('\nmain "$@"')]
    (project.folder / LAUNCHER).write_text(
        f"{functions}\nprocesses={processes} OMP_NUM_THREADS={threads}\ndescribe_layout {cores} {gpus}\n")
    assert project.run().out == expected + "\n"
    found = re.search(r"(\d+) process(?:es)? with (\d+) thread", expected)  # as benchmark.py does
    assert (int(found[1]), int(found[2])) == (processes, threads)


@pytest.mark.parametrize("processes, data", [("1", True), ("2", True), ("1", False)])
def test_a_wrong_argument_is_one_line(project, processes, data):
    env = {"DEVICE_NUM_PER_NODE": processes, "DATA_DIR": str(project.data) if data else None}
    project.run(**{**env, "DEVICE_NUM_PER_NODE": "1"})  # makes environment and sample
    done = project.run("--wrong", **env)
    assert (done.returncode, done.out, done.err) == (2, "error: unrecognized arguments: --wrong\n", "")
    assert (project.folder / "run.log").read_text() == done.out


def test_two_processes_keep_the_trainers_status_without_a_traceback(project):
    done = project.run(DATA_DIR=str(project.data), DEVICE_NUM_PER_NODE="2", STATUS="7")
    assert done.returncode == 7, done.out + done.err
    assert project.record(0)["argv"] == project.record(1)["argv"]
    lines = ["err of the trainer"] * 2 + ["out of the trainer"] * 2
    assert sorted(done.out.splitlines()[1:]) == lines and done.out[0] == "2"


@pytest.mark.parametrize("processes", ["1", "2"])
@pytest.mark.parametrize("number, message", [
    (signal.SIGKILL, "error: process 0 was killed (SIGKILL); the system does that when memory runs out"),
    (signal.SIGSEGV, "error: process 0 crashed (SIGSEGV)"),
])  # fmt: skip
def test_a_killed_process_is_named(project, processes, number, message):
    """As the kernel does when memory runs out."""
    env = {"STATUS": str(-number), "SECONDS_TO_SLEEP": "0.3"}
    done = project.run(DATA_DIR=str(project.data), DEVICE_NUM_PER_NODE=processes, **env)
    assert done.returncode == 128 + number
    assert done.out.splitlines()[-1] == message
    assert "Traceback" not in done.out and LAUNCHER not in done.out


@pytest.mark.parametrize("processes", [1, 2])
def test_a_signal_ends_all_processes(project, processes):
    launcher = project.start(DATA_DIR=str(project.data), DEVICE_NUM_PER_NODE=str(processes), SECONDS_TO_SLEEP="100")
    assert wait_for(lambda: project.have_started(processes))
    launcher.send_signal(signal.SIGTERM)
    out, err = launcher.communicate(timeout=60)
    assert launcher.returncode == 128 + signal.SIGTERM
    assert out.splitlines()[-1] == "stopping; once more to stop at once"
    assert [rank for rank in range(processes) if is_running(project.record(rank)["pid"])] == []


def test_a_second_signal_kills(project):
    launcher = project.start(DATA_DIR=str(project.data), SECONDS_TO_SLEEP="100", IGNORE="1")
    assert wait_for(lambda: project.have_started(1))
    for _ in range(2):
        launcher.send_signal(signal.SIGINT)
        time.sleep(0.3)
    out, err = launcher.communicate(timeout=60)
    assert launcher.returncode == 128 + signal.SIGINT
    assert out.splitlines()[-1] == "stopping; once more to stop at once"


@pytest.mark.parametrize("processes", [1, 2])
def test_kill_9_of_the_launcher_leaves_no_process(project, processes):
    project.set_up()
    launcher = project.start(DATA_DIR=str(project.data), DEVICE_NUM_PER_NODE=str(processes), SECONDS_TO_SLEEP="100")
    assert wait_for(lambda: project.have_started(processes))
    launcher.kill()
    launcher.communicate(timeout=10)  # ends when all that hold its output have ended
    assert [rank for rank in range(processes) if is_running(project.record(rank)["pid"])] == []


@pytest.mark.parametrize("processes", [1, 2])
def test_ctrl_c_in_a_terminal(project, processes):
    """All processes are interrupted, and one of them says what to do, between the launcher's words and the end."""
    project.set_up()
    env = project.environment({"DATA_DIR": str(project.data), "DEVICE_NUM_PER_NODE": str(processes),
                               "SECONDS_TO_SLEEP": "100"})  # fmt: skip
    terminal = Terminal(["bash", LAUNCHER], project.folder, env)
    terminal.read_until(lambda shown: shown.count("err of the trainer") == processes)
    before = len(terminal.shown)
    terminal.press_ctrl_c()
    lines = terminal.read_until()[before:].replace("^C", "").replace("\x1b[2K\r", "").split("\r\n")
    assert terminal.close() == 128 + signal.SIGINT
    said = ["stopping; once more to stop at once", "error: interrupted; continue with --resume"]
    assert lines == [*said, ""]
    assert (project.folder / "run.log").read_text().splitlines()[-2:] == said
    received = sorted((project.records / "signals").read_text().splitlines())
    assert received == [f"{rank} SIGINT" for rank in range(processes)]


@pytest.mark.parametrize("processes", [1, 2])
def test_progress_bars_in_a_terminal(project, processes):
    project.set_up()
    env = project.environment({"DATA_DIR": str(project.data), "DEVICE_NUM_PER_NODE": str(processes)})
    terminal = Terminal(["bash", LAUNCHER], project.folder, env, columns=77)
    shown = terminal.read_until()
    assert terminal.close() == 0
    assert "\rbar 1 of 77 columns\rbar 2\r" in shown
    log = (project.folder / "run.log").read_text()
    assert sorted(log.splitlines()[1:]) == ["err of the trainer"] * processes + ["out of the trainer"] * processes
    assert "process" in log.splitlines()[0] and shown.startswith(log.splitlines()[0])
    assert "bar" not in project.run(DATA_DIR=str(project.data)).out  # no terminal


def test_the_trainer_takes_all_options_of_the_launcher(project):
    trainer = pytest.importorskip("deepfm_train_eval")
    for env in ({}, {"DATA_DIR": str(project.data), "MODEL_SAVE_DIR": "saved"}):
        assert project.run(**env).returncode == 0
        given = {word[2:] for word in project.record()["argv"] if word.startswith("--")}
        parsed = vars(trainer.parse_args(project.record()["argv"]))
        assert given <= set(parsed)
    assert (parsed["batch_size"], parsed["patience"], parsed["early_stop_patience"]) == (10000, 1, 2)
    assert (parsed["embedding_l2"], parsed["max_grad_norm"], parsed["lr_factor"]) == (1e-5, 10.0, 0.1)


def test_help_names_every_environment_variable(project):
    done = project.run("--help")
    script = (ROOT / LAUNCHER).read_text().split("set -euo pipefail")[1]
    used = set(re.findall(r"\$\{([A-Z_]{4,}):-", script))
    assert done.returncode == 0
    assert {name for name in used if name not in done.out} == set(), done.out
    assert {"DATA_DIR", "PERSISTENT_PATH", "MODEL_SAVE_DIR", "MASTER_ADDR"} <= used


def test_run_sh_runs_the_tests_that_are_named(project):
    shutil.copy(ROOT / "tests" / "run.sh", project.folder / "tests")
    for name in ("one", "two"):
        (project.folder / "tests" / f"test_{name}.py").write_text("def test(): pass\n")
    (project.folder / "test_elsewhere.py").write_text("assert False\n")
    assert "2 passed" in project.run(script="tests/run.sh").out
    assert "1 passed" in project.run("tests/test_two.py", script="tests/run.sh").out


@pytest.mark.parametrize("name", [LAUNCHER, "tools/setup_env.sh", "tests/run.sh", ".ci/run"])
def test_scripts_are_sound(name):
    subprocess.run(["bash", "-n", ROOT / name], check=True)
    assert os.access(ROOT / name, os.X_OK)
    text = (ROOT / name).read_text()
    assert text.startswith("#!/usr/bin/env bash\n") and "\nset -euo pipefail\n" in text
