"""The house: files and functions of readable size, imports that go one way, CUDA in one place, a true code map."""

import ast
import os
import re
import signal
import subprocess
import sys

import pytest
from conftest import ROOT

SOURCES = sorted(path for path in [ROOT / "deepfm_train_eval.py", *(ROOT / "tools").rglob("*.py"),
                                   *(ROOT / "tests").rglob("*.py")])
NAMES = [str(path.relative_to(ROOT)) for path in SOURCES]


def functions(tree):
    return [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


@pytest.mark.parametrize("name", NAMES)
def test_files_and_functions_are_short(name):
    text = (ROOT / name).read_text()
    assert text.count("\n") <= 1200
    for function in functions(ast.parse(text)):
        assert function.end_lineno - function.lineno < 60, function.name


def imported(path):
    """Modules of this project that a file imports anywhere, as tools.trainer.x or deepfm_train_eval."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] in ("tools", "deepfm_train_eval")}


def test_imports_go_one_way():
    """Modules in folders know neither the trainer nor the tools above them, and there is no circle."""
    modules = {f"tools.{path.parent.name}.{path.stem}": path for path in (ROOT / "tools").glob("*/*.py")}
    uses = {name: imported(path) & set(modules) for name, path in modules.items()}
    for name, path in modules.items():
        assert "deepfm_train_eval" not in imported(path), name
        if name.startswith("tools.trainer."):
            assert all(other.startswith("tools.trainer.") for other in uses[name]), name
    while uses:
        leaves = [name for name, others in uses.items() if not others & set(uses)]
        assert leaves, f"a circle among {sorted(uses)}"
        for name in leaves:
            del uses[name]


def lines_of(text, *names):
    """Line numbers of classes and functions at the top level."""
    found = set()
    for node in ast.parse(text).body:
        if getattr(node, "name", "") in names:
            found |= set(range(node.lineno, node.end_lineno + 1))
    return found


def test_cuda_stands_in_one_place():
    text = (ROOT / "deepfm_train_eval.py").read_text()
    cuda = lines_of(text, "make_store_options", "OneEmbeddingTable", "Cuda", "decay_tables")
    assert len(cuda) < 120
    allowed = cuda | lines_of(text, "add_storage_options")
    for path in [ROOT / "deepfm_train_eval.py", *(ROOT / "tools" / "trainer").glob("*.py")]:
        for number, line in enumerate(path.read_text().split("\n"), 1):
            if path.name == "deepfm_train_eval.py" and number in allowed or path.name in ("startup.py", "arguments.py"):
                continue  # startup.py tells harmless messages on a missing driver from others
            assert not re.search(r"placement\.type|on_cuda|[\"']cuda[\"']|\.is_cuda", line), f"{path}:{number}: {line}"


IMPORT = """
import os, signal, sys
sys.path.insert(0, {root!r})
signal.signal(signal.SIGINT, signal.default_int_handler)  # also where a shell runs the tests in the background
before = dict(os.environ), signal.getsignal(signal.SIGINT), os.getpriority(os.PRIO_PROCESS, 0), os.sched_getscheduler(0)
import deepfm_train_eval
after = dict(os.environ), signal.getsignal(signal.SIGINT), os.getpriority(os.PRIO_PROCESS, 0), os.sched_getscheduler(0)
changed = {{name for name in {{*before[0], *after[0]}} if before[0].get(name) != after[0].get(name)}}
assert not changed, changed
assert before[1:] == after[1:], (before[1:], after[1:])
threads = [int(thread) for thread in os.listdir("/proc/self/task")]
assert {{os.getpriority(os.PRIO_PROCESS, thread) for thread in threads}} == {{before[2]}}
assert {{os.sched_getscheduler(thread) for thread in threads}} == {{before[3]}}
try:
    os.kill(os.getpid(), signal.SIGINT)
    import time
    time.sleep(5)
except KeyboardInterrupt:
    print("interrupted as usual")
"""


def test_import_is_quiet_and_changes_nothing():
    result = subprocess.run([sys.executable, "-c", IMPORT.format(root=str(ROOT))], capture_output=True, text=True,
                            timeout=60)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "interrupted as usual\n"
    if not any(name.startswith("nvidia") for name in os.listdir("/dev")):
        assert result.stderr == ""


def test_ctrl_c_while_importing_is_one_line():
    """At any time from the first statement on."""
    for delay in (0.15, 0.4, 0.6, 0.8, 1.1):
        process = subprocess.Popen([sys.executable, ROOT / "deepfm_train_eval.py", "--data_dir", "/nowhere"],
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        try:
            process.wait(delay)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
        assert (process.returncode, output, errors) in (
            (130, "", "error: interrupted\n"), (2, "", errors)), (delay, errors)
        assert errors.count("\n") == 1 and "Traceback" not in errors
