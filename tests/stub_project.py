"""A copy of the launcher and the set-up with stubs around them: trainer, tools, interpreter, pip and uv."""

import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time

from conftest import ROOT

LAUNCHER, SETUP = "train_deepfm_criteo_x4.sh", "tools/setup_env.sh"
STUB_TRAINER = """
import json, os, signal, sys, time
rank = os.environ.get("RANK", "0")
def interrupted(number, frame):
    if rank == "0":
        print("error: interrupted; continue with --resume", file=sys.stderr, flush=True)
    with open(os.path.join(os.environ["RECORDS"], "signals"), "a") as file:
        file.write(f"{rank} {signal.Signals(number).name}\\n")
    os._exit(130)
signal.signal(signal.SIGINT, signal.SIG_IGN if "IGNORE" in os.environ else interrupted)
record = {"argv": sys.argv[1:], "pid": os.getpid(), "threads": os.environ["OMP_NUM_THREADS"]}
path = os.path.join(os.environ["RECORDS"], "rank" + rank)
with open(path + ".part", "w") as file:
    json.dump(record, file)
os.rename(path + ".part", path)
if "--wrong" in sys.argv:
    if rank == "0":
        print("error: unrecognized arguments: --wrong", file=sys.stderr, flush=True)
    sys.exit(2)
sys.stdout.write("out of the trainer\\n")
if sys.stderr.isatty():
    sys.stderr.write(f"\\rbar 1 of {os.get_terminal_size(2).columns} columns\\rbar 2\\r     \\r")
sys.stderr.write("err of the trainer\\n")
time.sleep(float(os.environ.get("SECONDS_TO_SLEEP", "0")))
status = int(os.environ.get("STATUS", "0"))
if status < 0:  # the first process is killed, the others would wait for it
    if rank == "0":
        os.kill(os.getpid(), -status)
    time.sleep(100)
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
# An interpreter whose venv is a copy of itself, whose oneflow is always there, and whose pip installs nothing but uv.
# As "python3" it is one that OneFlow has no wheel for.
STUB_PYTHON = f"""#!{shutil.which("bash")}
case $* in *-ISc*) ;; *) echo "$*" >>"$RECORDS/python" ;; esac
case $* in
  *ensurepip*) [[ $0 != *python3 ]] ;;
  "-m pip --version") ;;
  "-m pip install "*)
    echo "Collecting things"
    [[ ! $* =~ \\ -r\\ ([^ ]+) ]] || sed 's/^/asked for /' "${{BASH_REMATCH[1]}}" >>"$RECORDS/lists"
    [[ -z ${{PIP_SECONDS:-}} ]] || {{ touch "$RECORDS/sleeping"; sleep "$PIP_SECONDS"; }}
    ((${{PIP_STATUS:-0}} == 0)) || {{ echo "ERROR: no such package"; echo "more words"; exit "$PIP_STATUS"; }}
    folder=${{0%/*}}
    [[ $* != *--target* ]] || {{ [[ $* =~ --target\\ ([^ ]+) ]]; folder=${{BASH_REMATCH[1]}}/bin; }}
    [[ $* != *" uv" ]] || {{ mkdir -p "$folder"; cp "$RECORDS/../uv" "$folder/uv"; }} ;;
  "-c import oneflow") [[ -z ${{ONEFLOW_SIGNAL:-}} ]] || kill -s "$ONEFLOW_SIGNAL" $$ ;;
  "-m venv "*)
    [[ -z ${{NO_VENV:-}} || $0 != *python3 ]] || {{ echo "ensurepip is not available"; exit 1; }}
    mkdir -p "${{@: -1}}/bin"; touch "${{@: -1}}/pyvenv.cfg"; cp "$0" "${{@: -1}}/bin/python" ;;
  -V) echo Python 3.10.0 ;;
  *) exec {sys.executable} "$@" ;;
esac
"""
STUB_UV = f"""#!{shutil.which("bash")}
echo "uv $* into $UV_PYTHON_INSTALL_DIR" >>"$RECORDS/python"
[[ $* == "python install 3.10" ]] || exit 2
[[ -z ${{UV_ERROR:-}} ]] || {{ printf 'error: no\\n  cause: %s\\n' "$UV_ERROR"; exit 1; }}
mkdir -p "$UV_PYTHON_INSTALL_DIR/cpython-3.10.9-linux/bin"
cp "$RECORDS/../bin/python3.10" "$UV_PYTHON_INSTALL_DIR/cpython-3.10.9-linux/bin/python3.10"
"""
STUB_DF = f"""#!{shutil.which("bash")}
echo "Filesystem 1024-blocks Used Available Capacity Mounted on"
echo "/dev/a disk 99999999 999 ${{FREE_KB:-90000000}} 1% /a folder"
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


def wait_for(condition, seconds=60):
    """Poll until it is true; returns whether it became so in time."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return bool(condition())


class Project:
    """The copy: `folder`, what the stubs write down in `records`, an empty `data` folder."""

    def __init__(self, folder):
        self.folder, self.records = folder / "project", folder / "records"
        self.records.mkdir()
        write_executable(folder / "bin" / "python3.10", STUB_PYTHON)
        write_executable(folder / "bin" / "df", STUB_DF)
        write_executable(folder / "uv", STUB_UV)
        (self.folder / "tools").mkdir(parents=True)
        (self.folder / "tests").mkdir()
        for name in (LAUNCHER, SETUP, "requirements.txt", "tools/requirements_spark.txt", "tools/requirements_onnx.txt",
                     "tests/requirements.txt"):  # fmt: skip
            shutil.copy(ROOT / name, self.folder / name)
        (self.folder / "deepfm_train_eval.py").write_text(STUB_TRAINER)
        (self.folder / "tools" / "make_criteo_sample.py").write_text(STUB_SAMPLE)
        (self.folder / "tools" / "criteo_parquet.py").write_text(STUB_CONVERTER)
        self.data = folder / "data"
        self.data.mkdir()
        self.env = {"PATH": f"{folder / 'bin'}:/usr/bin:/bin", "HOME": str(folder), "RECORDS": str(self.records),
                    "CUDA_VISIBLE_DEVICES": "", "DEVICE_NUM_PER_NODE": "1"}  # fmt: skip

    def environment(self, env):
        return {key: value for key, value in {**self.env, **env}.items() if value is not None}

    def start(self, *arguments, script=LAUNCHER, cwd=None, **env):
        return subprocess.Popen(["bash", script, *arguments], cwd=cwd or self.folder, env=self.environment(env),
                                text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL,
                                start_new_session=True)  # fmt: skip

    def run(self, *arguments, **options):
        process = self.start(*arguments, **options)
        process.out, process.err = process.communicate(timeout=60)
        return process

    def set_up(self, *groups, **options):
        return self.run(*groups, script=SETUP, **options)

    def record(self, rank=0):
        return json.loads((self.records / f"rank{rank}").read_text())

    def have_started(self, processes):
        return all((self.records / f"rank{rank}").exists() for rank in range(processes))

    def python_calls(self, start=""):
        calls = (self.records / "python").read_text().splitlines()
        return [call for call in calls if call.startswith(start)]


class Terminal:
    """A program in a pseudo-terminal of its own, as a user sees it."""

    def __init__(self, command, cwd, env, columns=77):
        self.pid, self.file = pty.fork()
        if self.pid == 0:
            os.chdir(cwd)
            subprocess.run(["stty", "cols", str(columns)], check=True)
            os.execvpe(command[0], command, env)
        self.shown = b""

    def read_until(self, condition=lambda shown: False, seconds=60):
        """Collect what it shows until the condition on it holds, or until its end. Returns it as text."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not condition(self.shown.decode()):
            if select.select([self.file], [], [], 0.1)[0]:
                try:
                    self.shown += os.read(self.file, 1 << 16)
                except OSError:  # closed
                    break
        return self.shown.decode()

    def press_ctrl_c(self):
        os.write(self.file, b"\x03")

    def close(self):
        """Returns its exit status; None when it went on and had to be killed."""
        deadline, (ended, status) = time.monotonic() + 20, (0, 0)
        while not ended and time.monotonic() < deadline:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            time.sleep(0.02)
        if not ended:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self.file)
        return os.WEXITSTATUS(status) if ended else None
