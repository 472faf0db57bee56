"""tools/setup_env.sh with a stub interpreter, pip and uv; the lists of packages with the packages themselves."""

import os
import re
import shutil
import signal
import time
from importlib import metadata

import pytest
from conftest import ROOT
from packaging.requirements import Requirement
from stub_project import SETUP, STUB_PYTHON, STUB_UV, Project, Terminal, wait_for, write_executable

GROUPS = ("spark", "onnx", "tests")
LISTS = {"training": "requirements.txt", "spark": "tools/requirements_spark.txt",
         "onnx": "tools/requirements_onnx.txt", "tests": "tests/requirements.txt"}  # fmt: skip
USED_PROGRAMS = ("awk", "bash", "basename", "cat", "cp", "cut", "dirname", "du", "env", "flock", "grep", "ls", "mkdir",
                 "mktemp", "mv", "rm", "sed", "sha256sum", "sleep", "tail", "touch", "uname", "wc")  # fmt: skip


@pytest.fixture
def project(tmp_path):
    return Project(tmp_path)


@pytest.fixture
def bare_project(project, tmp_path):
    """Without an interpreter that OneFlow has a wheel for; with a newer python3."""
    script = (project.folder / SETUP).read_text()
    # the folders that are searched beside PATH may hold a Python on this machine
    (project.folder / SETUP).write_text(re.sub(r"\{/usr,/usr/local\}/|/opt/", "/nowhere/", script))
    (tmp_path / "programs").mkdir()
    for name in USED_PROGRAMS:
        (tmp_path / "programs" / name).symlink_to(shutil.which(name))
    write_executable(tmp_path / "programs" / "python3", STUB_PYTHON)
    project.env["PATH"] = str(tmp_path / "programs")
    return project


def installs(project):
    return project.python_calls("-m pip install")


def packages(name):
    """{package: requirement} of a list."""
    lines = [line.strip() for line in (ROOT / name).read_text().splitlines()]
    return {re.split("[=<>]", line)[0]: line for line in lines if line and line[0] not in "#-"}


# ------------------------------------------------------------------------------------------------------------- installs


def test_setup_installs_once(project):
    first, second = project.set_up(), project.set_up()
    assert first.out == second.out == f"{project.folder}/.venv/bin/python\n", first.err
    assert first.err and second.err == ""
    count = len(installs(project))
    with open(project.folder / "requirements.txt", "a") as file:
        file.write("another==1\n")
    assert project.set_up().err
    assert len(installs(project)) == 2 * count


def test_a_stage_is_a_line_and_pip_talks_to_the_log(project):
    done = project.set_up()
    venv = project.folder / ".venv"
    expected = [
        rf"Setting up {venv}: up to 2\.3 GB to download and 4\.8 GB on disk; the log is {venv}-setup\.log",
        rf"Making it with Python 3\.10\.0, {project.records.parent}/bin/python3\.10 \.\.\. \d+ s",
        r"OneFlow 0\.9\.0 and the CUDA libraries that it needs, 2\.1 GB \.\.\. \d+ s",
        r"NumPy, pyarrow, petastorm and others, 0\.2 GB \.\.\. \d+ s",
        r"Trying it: import oneflow \.\.\. \d+ s",
        r"Ready after \d+ s, \S+ on disk",
    ]
    lines = done.err.splitlines()
    assert len(lines) == len(expected)
    for line, pattern in zip(lines, expected):
        assert re.fullmatch(pattern, line), line
    assert (project.folder / ".venv-setup.log").read_text().count("Collecting things") == 3


def test_nothing_is_started_but_one_python_when_all_is_there(project):
    """The launcher asks each time."""
    project.set_up()
    (project.records / "python").unlink()
    project.set_up()
    assert len(project.python_calls()) == 1


def test_a_terminal_shows_the_seconds(project):
    terminal = Terminal(["bash", SETUP], project.folder, project.environment({"PIP_SECONDS": "1.5"}))
    shown = terminal.read_until()
    assert terminal.close() == 0
    assert re.search("OneFlow 0.9.0 .* ...\x1b7 1 s\x1b8 [12] s\r\n", shown)


@pytest.mark.parametrize("group, package", [("spark", "pyspark"), ("onnx", "onnxruntime"), ("tests", "pytest")])
def test_more_packages_when_they_are_asked_for(project, group, package):
    project.set_up()
    assert package not in (project.records / "lists").read_text()
    count = len(installs(project))
    for _ in range(2):
        assert project.set_up(group).returncode == 0
        assert len(installs(project)) == count + 1
    assert re.search(rf"^asked for {package}==", (project.records / "lists").read_text(), re.M)
    assert project.set_up(*GROUPS).returncode == project.set_up(*GROUPS).returncode == 0
    assert len(installs(project)) == count + len(GROUPS)


def test_an_unknown_group(project):
    done = project.set_up("spark", "all")
    expected = "error: 'all' is no group of packages; expected spark, onnx or tests (see --help)\n"
    assert (done.returncode, done.out, done.err) == (2, "", expected)
    assert not (project.records / "python").exists()


def test_help_names_the_groups_and_variables(project):
    done = project.set_up("--help")
    assert done.returncode == 0 and not (project.records / "python").exists()
    for name in (*GROUPS, "VENV", "PYTHON", "ONEFLOW_VERSION", "UV_PYTHON_INSTALL_MIRROR"):
        assert name in done.out


def test_petastorm_comes_without_pyspark(project):
    project.set_up()
    assert [call for call in installs(project) if call.endswith("--no-deps petastorm==0.13.1")]
    asked_for = (project.records / "lists").read_text()
    assert "asked for numpy==" in asked_for and "asked for dill==" in asked_for
    assert "asked for petastorm" not in asked_for and "pyspark" not in asked_for


def test_setup_can_take_another_oneflow(project):
    done = project.set_up(ONEFLOW_VERSION="0.8.0")
    assert done.out == f"{project.folder}/.venv-0.8.0/bin/python\n", done.err
    assert "up to 1.0 GB to download" in done.err
    requirements = (project.folder / ".venv-0.8.0" / "requirements.txt").read_text()
    assert "oneflow==0.8.0\n" in requirements and "nvidia" not in requirements  # it brings its own
    assert project.set_up(ONEFLOW_VERSION="latest").err == (
        "error: ONEFLOW_VERSION=latest is not a version; expected one like 0.9.0\n")


# ------------------------------------------------------------------------------------------- failures and interruptions


def test_setup_starts_again_after_a_failure(project):
    failed = project.set_up(PIP_STATUS="1")
    assert (failed.returncode, failed.out) == (1, "")
    log = project.folder / ".venv-setup.log"
    assert failed.err.splitlines()[-2].startswith("OneFlow 0.9.0 ") and " failed after " in failed.err
    assert failed.err.splitlines()[-1] == ("error: pip could not install that (ERROR: no such package), see "
                                           f"{log}; run the same command again to continue")
    assert "more words" in log.read_text() and "more words" not in failed.err
    assert project.set_up().returncode == 0


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interruption_is_a_line_and_the_same_command_continues(project, number, status):
    process = project.start(script=SETUP, PIP_SECONDS="100")
    assert wait_for(lambda: (project.records / "sleeping").exists())
    time.sleep(0.2)
    os.killpg(process.pid, number)  # as Ctrl-C in a terminal
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (status, "")
    lines = err.splitlines()
    assert lines[-2].startswith("OneFlow 0.9.0 ") and lines[-2].endswith(" ...")
    assert lines[-1] == "error: interrupted; run the same command again to continue"
    assert project.set_up().returncode == 0


def test_packages_that_were_being_unpacked_are_installed_again(project):
    """pip takes a package for installed that it had begun when it was killed."""
    project.set_up(PIP_STATUS="1")
    packages = project.folder / ".venv" / "lib" / "python3.10" / "site-packages"
    for name, file in (("begun-1.dist-info", "METADATA"), ("done-1.dist-info", "INSTALLER")):
        (packages / name).mkdir(parents=True)
        (packages / name / file).touch()
    project.set_up()
    assert [path.name for path in packages.iterdir()] == ["done-1.dist-info"]


def test_an_import_that_crashes(project):
    done = project.set_up(ONEFLOW_SIGNAL="BUS")
    assert done.returncode == 1
    venv = project.folder / ".venv"
    assert done.err.splitlines()[-1] == (f"error: oneflow is installed in {venv} but cannot be imported (ended by BUS)"
                                         f", see {venv}-setup.log")


def test_a_folder_that_is_no_environment_is_left_alone(project, tmp_path):
    (project.records / "something").touch()
    done = project.set_up(VENV=str(project.records))
    assert done.returncode == 1
    assert done.err == (f"error: VENV={project.records} exists and is not a virtual environment; remove it or set VENV "
                        "to another path\n")
    assert os.listdir(project.records) == ["something"] and "records-setup.log" not in os.listdir(tmp_path)


def test_a_disk_without_room(project):
    """Before anything is fetched; what is there already needs no room."""
    done = project.set_up(FREE_KB="3000000")
    venv = project.folder / ".venv"
    assert (done.returncode, done.out) == (1, "")
    assert done.err == (f"error: {project.folder} has 2.9 GB free, the environment needs 4.8 GB; free some, or set "
                        "VENV to a folder on another disk\n")
    assert not venv.exists() and not (project.records / "python").exists()
    assert project.set_up(FREE_KB="3000000", ONEFLOW_VERSION="0.8.0").returncode == 0
    assert project.set_up(PIP_STATUS="1").returncode == 1  # interrupted, with a part of it there
    with open(venv / "part", "wb") as file:
        os.posix_fallocate(file.fileno(), 0, 10 << 20)
    free = 48 * 2**20 // 10 - (5 << 10)
    done = project.set_up(FREE_KB=str(free - (6 << 10)))
    assert done.returncode == 1 and done.err.startswith(f"error: {venv} has 4.8 GB free, the environment needs 4.8 GB")
    assert project.set_up(FREE_KB=str(free)).returncode == 0
    assert project.set_up("onnx", FREE_KB="300000").returncode == 0


def test_another_machine(project):
    write_executable(project.records.parent / "bin" / "uname", "#!/bin/sh\necho Darwin arm64\n")
    done = project.set_up()
    assert (done.returncode, done.err) == (1, "error: OneFlow has wheels for x86-64 Linux only; this is Darwin arm64\n")


# --------------------------------------------------------------------------------------------------------- interpreters


def test_an_interpreter_that_does_not_run_is_passed_over(project, tmp_path):
    write_executable(tmp_path / "shims" / "python3.10", "#!/bin/sh\nexit 127\n")
    done = project.set_up(PATH=f"{tmp_path / 'shims'}:{project.env['PATH']}", PYTHON="/nowhere/python")
    assert done.returncode == 0, done.err
    assert f"Making it with Python 3.10.0, {tmp_path / 'bin' / 'python3.10'} ..." in done.err
    assert "PYTHON=/nowhere/python is no CPython 3.8 to 3.10 that can make environments" in done.err


@pytest.mark.parametrize("env", [{}, {"NO_VENV": "1"}])
def test_uv_fetches_an_interpreter_where_there_is_none(bare_project, env):
    """uv itself comes from PyPI, with whatever python3 there is, by venv or by pip alone."""
    done = bare_project.set_up(**env)
    assert done.out == f"{bare_project.folder}/.venv/bin/python\n", done.err
    lines, fetched = done.err.splitlines(), f"{bare_project.folder}/.venv-python"
    assert lines[1] == "No CPython 3.8, 3.9 or 3.10 on PATH, in pyenv, conda or uv, and OneFlow has wheels for no other"
    assert lines[2].startswith("Fetching uv, 18 MB to download ... ")
    assert lines[3].startswith(f"Fetching CPython 3.10 with uv into {fetched} ... ")
    assert lines[4].startswith(f"Making it with Python 3.10.0, {fetched}/cpython-3.10.9-linux/")
    assert f"uv python install 3.10 into {fetched}" in bare_project.python_calls()
    # it is found again
    shutil.rmtree(bare_project.folder / ".venv")
    assert "Fetching" not in bare_project.set_up().err


def test_uv_on_path_is_used(bare_project, tmp_path):
    write_executable(tmp_path / "programs" / "uv", STUB_UV)
    done = bare_project.set_up()
    assert done.returncode == 0, done.err
    assert "Fetching uv" not in done.err and "Fetching CPython 3.10" in done.err


def test_the_message_when_uv_cannot_fetch_one(bare_project):
    done = bare_project.set_up(UV_ERROR="dns error")
    assert (done.returncode, done.out) == (1, "")
    assert done.err.splitlines()[-1] == (
        f"error: uv could not fetch CPython 3.10 (dns error), see {bare_project.folder}/.venv-setup.log; run the same "
        "command again, with UV_PYTHON_INSTALL_MIRROR where GitHub cannot be reached, or make one with "
        "'conda create -n py310 python=3.10' or 'pyenv install 3.10', or set PYTHON to its path")


@pytest.mark.parametrize("has_python, why", [(True, "no such package"), (False, "there is no python3 on PATH")])
def test_the_message_when_uv_cannot_be_had(bare_project, tmp_path, has_python, why):
    if not has_python:
        (tmp_path / "programs" / "python3").unlink()
    done = bare_project.set_up(PIP_STATUS="1")
    assert (done.returncode, done.out) == (1, "")
    last = done.err.splitlines()[-1]
    assert last.startswith(f"error: uv, which fetches CPython 3.10, could not be installed from PyPI (ERROR: {why})")
    assert last.endswith("or set PYTHON to its path") and "apt-get" not in last


# ---------------------------------------------------------------------------------------------------------------- lists


def test_every_package_is_pinned_once():
    names = [name for path in LISTS.values() for name in packages(path)]
    assert len(names) == len(set(names)) and len(names) > 20
    loose = {line for path in LISTS.values() for line in packages(path).values() if "==" not in line}
    assert loose == {"setuptools<70"}  # comes with the interpreter


def test_plain_pip_gets_all_that_training_needs():
    """`pip install -r requirements.txt`: petastorm would otherwise bring another PySpark."""
    assert "\n-r tools/requirements_spark.txt\n" in (ROOT / "requirements.txt").read_text()


def test_what_petastorm_declares_is_listed():
    lines = [line for line in metadata.requires("petastorm") if "extra ==" not in line]
    declared = {re.split(r"[^\w.-]", line)[0].lower() for line in lines}
    assert declared - set(packages("requirements.txt")) == {"pyspark"}


@pytest.mark.parametrize("group", LISTS)
def test_the_environment_has_what_the_lists_say(group):
    """The tests ask for all groups; a version that cannot be installed, or beside the others, shows here."""
    for wanted in map(Requirement, packages(LISTS[group]).values()):
        depends_on_version = wanted.name.startswith(("oneflow", "nvidia"))  # ONEFLOW_VERSION
        if not depends_on_version and (wanted.marker is None or wanted.marker.evaluate()):
            assert metadata.version(wanted.name) in wanted.specifier, wanted
