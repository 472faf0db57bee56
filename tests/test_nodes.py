"""Two nodes, as two network namespaces with a cable between them, and processes that die.

Every node has folders of its own for tables and checkpoints; only the data is the same.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest
from conftest import ROOT, TABLE_SIZES, free_port, metrics_lines, run_trainer, train_here, trainer_command

from tools.trainer import checkpoints
from tools.trainer.chunks import read_rows

ADDRESSES = ("10.213.0.1", "10.213.0.2")


def ip(*words):
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture(scope="module")
def nodes():
    """Names of the two namespaces."""
    if not shutil.which("ip") or os.geteuid() != 0:
        pytest.skip("two nodes need root and the program ip (Debian: iproute2) to make network namespaces")
    names = [f"deepfm{os.getpid()}{end}" for end in "ab"]
    with contextlib.ExitStack() as made:
        try:
            for name in names:
                ip("netns", "add", name)
                made.callback(ip, "netns", "del", name)
            ip("link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1])
            for name, address in zip(names, ADDRESSES):
                ip("-n", name, "addr", "add", f"{address}/24", "dev", "cable")
                ip("-n", name, "link", "set", "lo", "up")
                ip("-n", name, "link", "set", "cable", "up")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"this machine makes no network namespaces: {error.stderr.decode().strip()}")
        yield names


def start(nodes, data_dir, folder, *options):
    """A trainer process on each node, as a launcher starts it."""
    port, processes = str(free_port()), []
    for number, node in enumerate(nodes):
        work = folder / node[-1]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MASTER_ADDR": ADDRESSES[0],
                       "MASTER_PORT": port, "WORLD_SIZE": "2", "RANK": str(number), "LOCAL_RANK": "0"}
        command = trainer_command(data_dir, work, "--model_save_dir", work / "save", "--net_dropout", "0", *options)
        processes.append(subprocess.Popen(["ip", "netns", "exec", node, *command], env=environment, text=True,
                                          stdout=subprocess.PIPE, stderr=subprocess.PIPE))
    return processes


def wait_for(process, text):
    lines = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return "".join(lines)
    raise AssertionError(f"{text} did not come: {''.join(lines)}{process.stderr.read()}")


def rows_on_two_disks(folder, state, table, path):
    """{id: row} of a snapshot of which each node has one folder."""
    saved, found = state["tables"][table], {}
    for process, node in enumerate("ab"):
        [only] = (folder / node / path).glob("*-2")
        assert only.name == f"{process}-2"
        for keys, rows in read_rows(str(only), saved["snapshot"], 12 if table == "embedding" else 3):
            assert not found.keys() & set(keys.tolist())
            found.update(zip(keys.tolist(), rows))
    return found


def test_two_nodes_without_a_shared_disk_train_resume_and_end_together(nodes, distinct_dataset_dir, tmp_path):
    train_here(distinct_dataset_dir, tmp_path / "one", "--train_batches", "7", "--net_dropout", "0",
               "--model_save_dir", tmp_path / "one" / "save")
    first, second = start(nodes, distinct_dataset_dir, tmp_path, "--train_batches", "7")
    output, errors = first.communicate(timeout=120)
    assert (first.returncode, second.wait(60)) == (0, 0), errors + second.stderr.read()
    assert "another process" not in errors + second.stderr.read()
    assert not (tmp_path / "b" / "save").exists()  # checkpoints are the first process's
    state = checkpoints.read_checkpoint(str(tmp_path / "a" / "save" / "step_7"))
    for table, path in (("embedding", "tables"), ("embedding_fm", "tables_fm")):
        rows = rows_on_two_disks(tmp_path, state, table, path)
        assert sorted(rows) == list(range(sum(TABLE_SIZES)))
        [name] = {path.name for path in (tmp_path / "one" / path / "0-1" / "snapshots").iterdir()}
        for keys, one in read_rows(str(tmp_path / "one" / path / "0-1"), name, 12 if table == "embedding" else 3):
            assert np.abs(np.stack([rows[key] for key in keys.tolist()]) - one).max() < 1e-5 and one.max() > 0.01

    first, second = start(nodes, distinct_dataset_dir, tmp_path, "--train_batches", "9999", "--early_stop_patience",
                          "0", "--loss_print_interval", "1", "--resume")
    resumed = wait_for(first, "Step 16/")
    assert "step 7\n" in resumed and len(metrics_lines(output, "val")) == 2
    second.send_signal(signal.SIGKILL)
    before = time.monotonic()
    _, errors = first.communicate(timeout=60)
    assert first.returncode != 0 and time.monotonic() - before < 5
    lines = [line for line in errors.splitlines() if line]
    assert len(lines) == 1 and "has ended, or cannot be reached" in lines[0], errors


def test_nodes_with_other_data_are_told_apart(nodes, distinct_dataset_dir, tmp_path):
    other = shutil.copytree(distinct_dataset_dir, tmp_path / "other")
    shutil.rmtree(other / "val")
    link = tmp_path / "data"
    link.symlink_to(distinct_dataset_dir)
    environment = {**os.environ, "DEEPFM_OTHER": str(other)}
    script = tmp_path / "other_disk.py"  # the second node sees another folder under the same name
    script.write_text(f"import os, sys\nsys.path.insert(0, {str(ROOT)!r})\n"
                      "if os.environ['RANK'] == '1': sys.argv[sys.argv.index('--data_dir') + 1] = "
                      f"{str(other)!r}\nimport deepfm_train_eval as module\nmodule.main(sys.argv[1:])\n")
    port, processes = str(free_port()), []
    for number, node in enumerate(nodes):
        command = trainer_command(link, tmp_path / node[-1], script=script)
        processes.append(subprocess.Popen(
            ["ip", "netns", "exec", node, *command], text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            env={**environment, "MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": port, "WORLD_SIZE": "2",
                 "RANK": str(number), "LOCAL_RANK": "0", "OMP_NUM_THREADS": "1"}))
    for process in processes:
        errors = process.communicate(timeout=120)[1]
        lines = [line for line in errors.splitlines() if line.startswith("error: ")]
        assert process.returncode == 1 and len(lines) == 1 and f"no *.parquet files in {other}/val" in lines[0], errors
        assert "Check failure" not in errors


@pytest.mark.parametrize("victim, number", [(1, signal.SIGKILL), (0, signal.SIGKILL), (1, signal.SIGTERM)])
def test_a_process_that_dies_ends_the_other_on_its_node(distinct_dataset_dir, tmp_path, victim, number):
    port, processes = str(free_port()), []
    for process in (0, 1):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
                       "WORLD_SIZE": "2", "RANK": str(process), "LOCAL_RANK": str(process)}
        command = trainer_command(distinct_dataset_dir, tmp_path, "--train_batches", "9999", "--early_stop_patience",
                                  "0", "--loss_print_interval", "1", "--model_save_dir", tmp_path / "save")
        processes.append(subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE,
                                          stderr=subprocess.PIPE))
    wait_for(processes[0], "Step 9/")
    processes[victim].send_signal(number)
    other = processes[1 - victim]
    _, errors = other.communicate(timeout=60)
    assert other.returncode != 0 and "Check failure" not in errors and "Traceback" not in errors
    expected = "terminated; continue with --resume" if number == signal.SIGTERM else "has ended, or cannot be reached"
    assert errors.count("\n") == 1 and expected in errors, errors
    processes[victim].communicate(timeout=60)


LATE = """
import os, sys, time
sys.path.insert(0, {root!r})
import deepfm_train_eval
from tools.trainer import peers
barrier, leave, left = peers.barrier, os._exit, {left!r}

def leave_late():
    barrier()
    if os.environ["RANK"] == {late!r}:
        time.sleep(1)
        open(left, "w").close()

def leave_early(status):
    if not os.path.exists(left):
        open(left + " too early", "w").close()
    leave(status)

peers.barrier, os._exit = leave_late, leave_early
deepfm_train_eval.main(sys.argv[1:])
"""


@pytest.mark.parametrize("late", ["0", "1"])
def test_no_process_ends_before_all_have_left_the_barrier(distinct_dataset_dir, tmp_path, late):
    """OneFlow aborts a process that is in it when another one is gone."""
    left = tmp_path / "left"
    (tmp_path / "program.py").write_text(LATE.format(root=str(ROOT), left=str(left), late=late))
    run_trainer(distinct_dataset_dir, tmp_path, "--train_batches", "1", processes=2, script=tmp_path / "program.py")
    assert left.exists() and not (tmp_path / "left too early").exists()


def test_rows_are_dealt_as_oneembedding_does(tmp_path):
    """Against OneFlow's own writer, for several numbers of processes."""
    from tools.trainer.startup import flow
    from tools.trainer.tables import owners

    keys = np.concatenate([np.arange(500), 2**40 + np.arange(500) * 977])
    for processes in (2, 3, 8):
        paths = [str(tmp_path / f"{processes}" / f"{process}-{processes}") for process in range(processes)]
        writer = flow.one_embedding.make_persistent_table_writer(paths, "name", flow.int64, flow.float, 6,
                                                                 physical_block_size=4096)
        writer.write(keys, np.repeat(keys[:, None], 6, axis=1).astype(np.float32))
        writer.close()
        for process, path in enumerate(paths):
            [(found, rows)] = read_rows(path, "name", 6)
            assert sorted(found) == sorted(keys[owners(keys, processes) == process]) and len(found) > 50
            assert (rows == found[:, None].astype(np.float32)).all()
