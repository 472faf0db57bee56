"""How the trainer ends when its surroundings are odd: signals, closed streams, encodings, launch variables."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pyarrow.parquet as pq
import pytest
from conftest import ROOT, make_dataset, trainer_command

NARROW = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii", "PYTHONCOERCECLOCALE": "0"}


def run(command, environment=None, shell=""):
    """Finished process; shell: redirections."""
    if shell:
        command = ["bash", "-c", f'"$@" {shell}', "bash", *command]
    return subprocess.run(command, env={**os.environ, **(environment or {})}, capture_output=True, timeout=120)


def test_letters_beyond_ascii_in_paths_and_names_under_an_ascii_locale(tmp_path):
    data = make_dataset(tmp_path / "dä ta", digests=False)
    for path in data.glob("*/*.parquet"):
        pq.write_table(pq.read_table(path).rename_columns(["Label", "fä", "日本", "f2"]), path)
    info = json.loads((data / "dataset_info.json").read_text())
    for field, name in zip(info["fields"], ("fä", "日本", "f2")):
        field["name"] = name
    (data / "dataset_info.json").write_text(json.dumps(info))
    work = tmp_path / "ŝ"
    result = run(trainer_command(data, work, "--model_save_dir", work / "save", "--train_batches", "2"), NARROW)
    assert result.returncode == 0 and result.stderr == b"", result.stderr
    line = next(line for line in result.stdout.splitlines() if line.startswith(b"Predict with: "))
    result = run(["bash", "-c", b"cd " + os.fsencode(tmp_path) + b" && " + line[len(b"Predict with: "):]], NARROW)
    assert result.returncode == 0 and pq.read_metadata(tmp_path / "predictions.parquet").num_rows == 97, result.stderr
    (data / "test" / "part-00000.parquet").unlink()
    result = run(trainer_command(data, tmp_path / "other"), NARROW)
    assert result.returncode == 1 and result.stderr.decode().startswith(f"error: no *.parquet files in {data}/test")


@pytest.mark.parametrize("shell", ["1>&- 2>&-", "0<&- 1>&-", "2>&-"])
def test_closed_streams(shared_dataset_dir, tmp_path, shell):
    options = ["--model_save_dir", tmp_path / "save", "--train_batches", "2"]
    result = run(trainer_command(shared_dataset_dir, tmp_path, *options), shell=shell)
    assert result.returncode == 0 and b"Traceback" not in result.stdout + result.stderr
    assert (tmp_path / "save" / "best_checkpoint" / "state.json").exists()
    written = sorted(path.name for path in tmp_path.rglob("*") if path.is_file() and b"Rank[0]" in path.read_bytes())
    assert not written  # no file took the place of a stream


def test_output_that_cannot_be_written_is_one_line(shared_dataset_dir, tmp_path):
    result = run(trainer_command(shared_dataset_dir, tmp_path), shell=">/dev/full")
    assert result.returncode == 1 and result.stderr.startswith(b"error: no space left on the disk")
    result = run(trainer_command(shared_dataset_dir, tmp_path / "other"), shell="| true; exit ${PIPESTATUS[0]}")
    assert (result.returncode, result.stderr) == (1, b"error: nobody reads the output any more\n")


@pytest.mark.parametrize("command", [
    ["deepfm_train_eval.py", "--help"], ["tools/table_to_parquet.py", "--help"], ["tools/inspect_dataset.py", "DATA"],
    ["tools/make_criteo_sample.py", "--num_rows", "9", "--output_dir", "OUT"],
], ids=lambda command: command[0])
def test_all_output_that_cannot_be_written_ends_alike(shared_dataset_dir, tmp_path, command):
    """No traceback of the interpreter's own end either."""
    names = {"DATA": str(shared_dataset_dir), "OUT": str(tmp_path / "out")}
    command = [sys.executable, str(ROOT / command[0]), *(names.get(word, word) for word in command[1:])]
    reader, closed = os.pipe()
    os.close(reader)
    with open("/dev/full", "wb") as full:
        for output, text in ((closed, "nobody reads the output any more"), (full, "no space left on the disk; .*")):
            result = subprocess.run(command, stdout=output, stderr=subprocess.PIPE, text=True, timeout=120)
            assert result.returncode == 1 and re.fullmatch(f"error: {text}\n", result.stderr), result.stderr
    os.close(closed)


@pytest.mark.parametrize("number, twice, text", [(signal.SIGINT, True, "interrupted"),
                                                 (signal.SIGTERM, False, "terminated")])
def test_signals_end_in_one_line_also_while_oneflow_has_the_thread(shared_dataset_dir, tmp_path, number, twice, text):
    """As when it waits for another process."""
    script = tmp_path / "waits.py"
    script.write_text(f"""
import ctypes, sys
sys.path.insert(0, {str(ROOT)!r})
import deepfm_train_eval as module
def wait(*_):
    print("waiting", flush=True)
    ctypes.CDLL(None).sleep(60)  # not a call that a signal's handler in Python ends
module.train_epoch = wait
module.main(sys.argv[1:])
""")
    command = trainer_command(shared_dataset_dir, tmp_path, "--model_save_dir", tmp_path / "save", script=script)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while "waiting" not in process.stdout.readline():
        assert process.poll() is None
    started = time.monotonic()
    for _ in range(1 + twice):
        process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert time.monotonic() - started < 5
    assert (process.returncode, errors) == (128 + number, f"error: {text}; continue with --resume\n")


def test_a_signal_behind_the_work_changes_nothing():
    """While the interpreter ends, which takes its handlers away first."""
    script = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from tools.trainer import cli
class Late:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
late = Late()
sys.exit(cli.run_tool(lambda: print("done")))
"""
    result = run([sys.executable, "-c", script, str(ROOT)])
    assert (result.returncode, result.stdout, result.stderr) == (0, b"done\n", b"")


@pytest.mark.parametrize("change, text", [
    ({"RANK": "abc"}, "the environment variable RANK is 'abc', expected a whole number"),
    ({"RANK": "2"}, "RANK 2, WORLD_SIZE 2 and MASTER_PORT 29500 do not fit together"),
    ({"WORLD_SIZE": "0"}, "do not fit together"),
    ({"MASTER_PORT": "65536"}, "do not fit together"),
    ({"LOCAL_RANK": "-1"}, "the environment variable LOCAL_RANK is '-1'"),
])
def test_odd_launch_variables_are_one_line(change, text):
    launched = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}
    result = run([sys.executable, str(ROOT / "deepfm_train_eval.py")], {**launched, **change})
    errors = result.stderr.decode()
    assert result.returncode == 2 and errors.startswith("error: ") and text in errors and errors.count("\n") == 1


@pytest.mark.parametrize("script, package", [
    ("deepfm_train_eval.py", "oneflow"), ("tools/export_onnx.py", "onnx"), ("tools/table_to_parquet.py", "numpy"),
    ("tools/score_onnx.py", "pyarrow"),
])
def test_missing_package_is_one_line(tmp_path, script, package):
    """As with the system's Python, when nobody has activated the environment."""
    hidden = tmp_path / "sitecustomize.py"
    hidden.write_text(f"import sys\nsys.modules[{package!r}] = None\n")
    result = subprocess.run([sys.executable, str(ROOT / script), "--help"], capture_output=True, text=True,
                            env={**os.environ, "PYTHONPATH": str(tmp_path)}, timeout=60)
    assert result.returncode == 1
    advice = ("run `bash tools/setup_env.sh onnx`, or install it" if package == "onnx" else
              "install it, or use .venv/bin/python of the environment that `bash tools/setup_env.sh` makes")
    assert re.fullmatch(rf"error: \S+ has no package {package}; {advice}\n", result.stderr), result.stderr


def test_the_thread_that_starts_graphs_goes_first(monkeypatch):
    """Where the system allows it; where not, a graph runs all the same."""
    from tools.trainer import startup

    assert startup.LAUNCHERS  # conftest.py has prepared this process
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
        assert {os.sched_getscheduler(int(thread)) for thread in startup.LAUNCHERS} == {os.SCHED_FIFO}
    except PermissionError:
        assert os.SCHED_FIFO not in {os.sched_getscheduler(int(thread)) for thread in startup.LAUNCHERS}

    def refuse(_, policy, parameters):
        if policy == os.SCHED_FIFO:
            raise PermissionError

    monkeypatch.setattr(startup, "LAUNCHERS", set())
    monkeypatch.setattr(os, "sched_setscheduler", refuse)
    startup.put_launcher_first()
    assert os.sched_getscheduler(0) != os.SCHED_FIFO
