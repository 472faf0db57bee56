"""train_deepfm_criteo_x4.sh and tools/setup_env.sh, run in a copy of the project with a stub trainer, tools and pip."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

LAUNCHER = "train_deepfm_criteo_x4.sh"
STUB_TRAINER = """
import json, os, sys, time
record = {"argv": sys.argv[1:], "pid": os.getpid(), "threads": os.environ["OMP_NUM_THREADS"]}
path = os.path.join(os.environ["RECORDS"], "rank" + os.environ.get("RANK", "0"))
with open(path + ".part", "w") as file:
    json.dump(record, file)
os.rename(path + ".part", path)
print("out of the trainer", flush=True)
print("err of the trainer", file=sys.stderr, flush=True)
time.sleep(float(os.environ.get("SECONDS_TO_SLEEP", "0")))
status = int(os.environ.get("STATUS", "0"))
if status < 0 and os.environ.get("RANK", "0") == "0":
    os.kill(os.getpid(), -status)
sys.exit(status)
"""
STUB_SAMPLE = """
import json, os, sys
os.makedirs(sys.argv[2])
json.dump({"best_auc": 0.75}, open(sys.argv[2] + "/sample_info.json", "w"))
"""
STUB_CONVERTER = """
import os, sys
os.makedirs(sys.argv[4])
open(sys.argv[4] + "/dataset_info.json", "w").close()
"""
# an interpreter whose venv is a copy of itself, and whose pip and oneflow are always there
STUB_PYTHON = f"""#!/usr/bin/env bash
echo "$*" >>"$RECORDS/python"
case $* in
  "-m pip "*) [[ $2 != pip || $3 == --version ]] || exit "${{PIP_STATUS:-0}}" ;;
  "-c import oneflow") ;;
  "-m venv "*) mkdir -p "${{@: -1}}/bin"; touch "${{@: -1}}/pyvenv.cfg"; cp "$0" "${{@: -1}}/bin/python" ;;
  *) exec {sys.executable} "$@" ;;
esac
"""


def write_executable(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def is_running(pid):
    """False when the process has ended, also when its new parent has not asked for its status yet."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(") ")[2][0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


class Project:
    """A copy of the launcher with stubs around it."""

    def __init__(self, folder):
        self.folder, self.records = folder / "project", folder / "records"
        self.records.mkdir()
        write_executable(folder / "bin" / "python3.10", STUB_PYTHON)
        (self.folder / "tools").mkdir(parents=True)
        for name in (LAUNCHER, "tools/setup_env.sh", "requirements.txt"):
            shutil.copy(ROOT / name, self.folder / name)
        (self.folder / "deepfm_train_eval.py").write_text(STUB_TRAINER)
        (self.folder / "tools" / "make_criteo_sample.py").write_text(STUB_SAMPLE)
        (self.folder / "tools" / "criteo_parquet.py").write_text(STUB_CONVERTER)
        self.data = folder / "data"
        self.data.mkdir()
        self.env = {"PATH": f"{folder / 'bin'}:/usr/bin:/bin", "HOME": str(folder), "RECORDS": str(self.records),
                    "CUDA_VISIBLE_DEVICES": "", "DEVICE_NUM_PER_NODE": "1"}  # fmt: skip

    def start(self, *arguments, script=LAUNCHER, **env):
        env = {key: value for key, value in {**self.env, **env}.items() if value is not None}
        return subprocess.Popen(["bash", script, *arguments], cwd=self.folder, env=env, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL)  # fmt: skip

    def run(self, *arguments, **env):
        process = self.start(*arguments, **env)
        process.out, process.err = process.communicate(timeout=60)
        return process

    def record(self, rank=0):
        return json.loads((self.records / f"rank{rank}").read_text())

    def python_calls(self):
        return (self.records / "python").read_text().splitlines()


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
    project.run(script="tools/setup_env.sh")
    launcher = project.start(DATA_DIR=str(project.data), STATUS="7", SECONDS_TO_SLEEP="1")
    launcher.stdout.close()
    launcher.stderr.close()
    assert launcher.wait(timeout=60) == 7
    log = (project.folder / "run.log").read_text()
    assert "out of the trainer" in log and "err of the trainer" in log


def test_a_link_to_the_launcher(project, tmp_path):
    (tmp_path / "elsewhere").symlink_to(project.folder / LAUNCHER)
    done = project.run(script=str(tmp_path / "elsewhere"), DATA_DIR=str(project.data))
    assert done.returncode == 0, done.err


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
     "error: DATA_DIR=nowhere is not a folder; make it with tools/criteo_parquet.py or tools/h5_to_parquet.py"),
    ({"NUM_NODES": "2"}, 2, "error: NUM_NODES=2 needs MASTER_ADDR, the address of node 0"),
    ({"NODE_RANK": "1"}, 2, "error: NODE_RANK=1 is not below NUM_NODES=1; count nodes from 0"),
    ({"DEVICE_NUM_PER_NODE": "all"}, 2, "error: DEVICE_NUM_PER_NODE=all is not a whole number of at least 1"),
])  # fmt: skip
def test_a_mistake_is_one_clear_line(project, env, status, message):
    done = project.run(**env)
    assert (done.returncode, done.out, done.err) == (status, "", message + "\n")
    assert not (project.records / "python").exists()  # before anything is installed


def test_two_processes_keep_the_trainers_status_without_a_traceback(project):
    done = project.run(DATA_DIR=str(project.data), DEVICE_NUM_PER_NODE="2", STATUS="7")
    assert done.returncode == 7, done.out + done.err
    assert project.record(0)["argv"] == project.record(1)["argv"]
    assert "Traceback" not in done.out + done.err
    assert "err of the trainer" in done.out


@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_killed_process_is_named(project, processes):
    """As the kernel does when memory runs out."""
    done = project.run(DATA_DIR=str(project.data), DEVICE_NUM_PER_NODE=processes, STATUS="-9", SECONDS_TO_SLEEP="0.5")
    assert done.returncode == 128 + signal.SIGKILL
    assert "Killed" in done.out and "Traceback" not in done.out


@pytest.mark.parametrize("processes", [1, 2])
def test_a_signal_ends_all_processes(project, processes):
    launcher = project.start(DATA_DIR=str(project.data), DEVICE_NUM_PER_NODE=str(processes), SECONDS_TO_SLEEP="100")
    files = [project.records / f"rank{rank}" for rank in range(processes)]
    deadline = time.monotonic() + 60
    while not all(file.exists() for file in files) and time.monotonic() < deadline:
        time.sleep(0.05)
    launcher.send_signal(signal.SIGTERM)
    out, err = launcher.communicate(timeout=60)
    assert launcher.returncode == 128 + signal.SIGTERM
    assert "stopping; once more to stop at once" in out + err
    assert [rank for rank in range(processes) if is_running(project.record(rank)["pid"])] == []


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
    assert {name for name in used if name not in done.out} == set()
    assert {"DATA_DIR", "PERSISTENT_PATH", "MODEL_SAVE_DIR", "MASTER_ADDR"} <= used


def test_setup_installs_once(project):
    for _ in range(2):
        done = project.run(script="tools/setup_env.sh")
        assert done.out == f"{project.folder}/.venv/bin/python\n", done.err
    installs = [call for call in project.python_calls() if call.startswith("-m pip install")]
    assert len(installs) == 1
    with open(project.folder / "requirements.txt", "a") as file:
        file.write("another==1\n")
    project.run(script="tools/setup_env.sh")
    assert len([call for call in project.python_calls() if call.startswith("-m pip install")]) == 2


def test_setup_starts_again_after_a_failure(project):
    failed = project.run(script="tools/setup_env.sh", PIP_STATUS="1")
    assert (failed.returncode, failed.out) == (1, "")
    assert failed.err.splitlines()[-1].startswith("error: pip could not install requirements.txt")
    assert project.run(script="tools/setup_env.sh").returncode == 0
    assert len([call for call in project.python_calls() if call.startswith("-m pip install")]) == 2


def test_setup_passes_over_an_interpreter_that_does_not_run(project, tmp_path):
    write_executable(tmp_path / "shims" / "python3.10", "#!/bin/sh\nexit 127\n")
    done = project.run(script="tools/setup_env.sh", PATH=f"{tmp_path / 'shims'}:{project.env['PATH']}")
    assert done.returncode == 0, done.err
    assert f"with {tmp_path / 'bin' / 'python3.10'}" in done.err


def test_setup_can_take_another_oneflow(project):
    done = project.run(script="tools/setup_env.sh", ONEFLOW_VERSION="0.8.0")
    assert done.out == f"{project.folder}/.venv-0.8.0/bin/python\n", done.err
    assert "oneflow==0.8.0\n" in (project.folder / ".venv-0.8.0" / "requirements.txt").read_text()


def test_setup_leaves_a_folder_that_is_no_environment_alone(project):
    done = project.run(script="tools/setup_env.sh", VENV=str(project.records.parent))
    assert done.returncode == 1
    assert re.fullmatch(r"error: VENV=\S+ exists and is not a virtual environment; remove it or .*\n", done.err)


def test_setup_says_what_to_do_without_a_python(project, tmp_path):
    for name in ("bash", "cat", "dirname", "flock", "ls", "mkdir", "mv", "rm", "sed", "sha256sum"):
        (tmp_path / "tools").mkdir(exist_ok=True)
        (tmp_path / "tools" / name).symlink_to(shutil.which(name))
    script = (project.folder / "tools" / "setup_env.sh").read_text()
    # the folders that are searched beside PATH may hold a Python on this machine
    (project.folder / "tools" / "setup_env.sh").write_text(re.sub(r"\{/usr,/usr/local\}/|/opt/", "/nowhere/", script))
    done = project.run(script="tools/setup_env.sh", PATH=str(tmp_path / "tools"))
    assert (done.returncode, done.out) == (1, "")
    assert done.err.startswith("error: no CPython 3.8, 3.9 or 3.10 ") and "or set PYTHON to its path" in done.err


def test_run_sh_runs_the_tests_that_are_named(project):
    (project.folder / "tests").mkdir()
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
