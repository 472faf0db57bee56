"""Files of OneEmbedding's table format: written and read here, against OneFlow's own reader and writer."""

import os
from subprocess import CalledProcessError
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import locked
from host_embedding import CudaOnCpu

from tools.trainer import chunks, tables
from tools.trainer.chunks import chunk_files
from tools.trainer.cli import UserError
from tools.trainer.startup import flow
from tools.trainer.tables import TableStore

WIDTHS = [3, 12, 48, 1024, 1500]  # 341, 85, 21 and 1 rows in a block of 4 KiB; one row in two blocks


def some_rows(count, width, seed=0):
    rng = np.random.default_rng(seed)
    return rng.permutation(count * 3)[:count].astype(np.int64), rng.standard_normal((count, width), np.float32)


def read_by_oneflow(folder, name, width):
    reader = flow.one_embedding.make_persistent_table_reader([folder], name, flow.int64, flow.float, width,
                                                             physical_block_size=4096)
    return {int(key): row.copy() for keys, rows in reader for key, row in zip(keys, rows)}


def as_dict(blocks):
    found = {}
    for keys, rows in blocks:
        assert not found.keys() & set(keys.tolist())
        found.update(zip(keys.tolist(), rows))
    return found


def assert_equal(first, second):
    assert first.keys() == second.keys() and all(np.array_equal(first[key], second[key]) for key in first)


def write(folder, name, width, blocks):
    scratch = folder + ".scratch"
    os.makedirs(scratch)
    writer = chunks.ChunkWriter(scratch, width)
    for keys, rows in blocks:
        writer.write(keys, rows)
    writer.close()
    if not os.path.exists(folder):
        chunks.make_empty_table(folder, width, f"{scratch}/empty")
    known = chunks.add_snapshot(folder, name, writer)
    os.rmdir(scratch)
    return known


@pytest.mark.parametrize("width", WIDTHS)
def test_oneflow_reads_what_is_written_here(tmp_path, width):
    """In portions that do not fill blocks, and a second snapshot behind the first."""
    folder, expected = str(tmp_path / "0-1"), {}
    for number, name in enumerate(("first", "second")):
        keys, rows = some_rows(1000, width, number)
        expected[name] = dict(zip(keys.tolist(), rows))
        cuts = [0, 1, 1, 500, 507, 1000]
        known = write(folder, name, width, [(keys[a:b], rows[a:b]) for a, b in zip(cuts, cuts[1:])])
        for path, (size, value) in known.items():
            assert (size, value) == (os.path.getsize(path), chunks.checksum(path))
    for name in expected:
        assert_equal(read_by_oneflow(folder, name, width), expected[name])
        assert_equal(as_dict(chunks.read_rows(folder, name, width)), expected[name])
        chunks.check_folder(folder, width, 1)
        assert sum(chunks.count_chunk(folder, name, index, width)
                   for index in chunks.listed(f"{folder}/snapshots/{name}")) == 1000


@pytest.mark.parametrize("width", WIDTHS)
def test_what_oneflow_writes_is_read_here_also_in_small_portions(tmp_path, monkeypatch, width):
    """A snapshot of some rows of a chunk, in any order, as OneEmbedding leaves it when it goes on appending."""
    folder, keys_and_rows = str(tmp_path / "0-1"), some_rows(2000, width)
    writer = flow.one_embedding.make_persistent_table_writer([folder], "all", flow.int64, flow.float, width,
                                                             physical_block_size=4096)
    writer.write(*keys_and_rows)
    writer.close()
    [index] = chunks.listed(f"{folder}/snapshots/all")
    positions = np.fromfile(f"{folder}/snapshots/all/{index}", np.uint64)
    some = np.concatenate([np.sort(positions)[:30], np.random.default_rng(1).permutation(positions)[:200]])
    os.makedirs(f"{folder}/snapshots/some")
    np.unique(some)[::-1].tofile(f"{folder}/snapshots/some/{index}")
    (tmp_path / "0-1" / "snapshots" / "some" / "LIST").write_text(f"{index}\n")
    for portion in (chunks.READ_BYTES, 5000, 1):
        monkeypatch.setattr(chunks, "READ_BYTES", portion)
        for name in ("all", "some"):
            assert_equal(as_dict(chunks.read_rows(folder, name, width)), read_by_oneflow(folder, name, width))


def test_rows_go_on_in_the_next_chunk_file(tmp_path, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 3 * 4096)
    folder, (keys, rows) = str(tmp_path / "0-1"), some_rows(1000, 12)
    write(folder, "name", 12, [(keys[:400], rows[:400]), (keys[400:], rows[400:])])
    assert sorted(chunks.chunk_numbers(folder)) == [0, 1, 2, 3]  # 3 x 85 rows each
    assert_equal(as_dict(chunks.read_rows(folder, "name", 12)), dict(zip(keys.tolist(), rows)))


@pytest.mark.parametrize("is_open", [True, False])
def test_chunks_that_no_snapshot_needs_give_their_space_back(tmp_path, monkeypatch, is_open):
    """On CUDA too, where OneEmbedding has them open. What has a second name, in a copy of links say, is left whole."""
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 4096)
    folder, (keys, rows) = str(tmp_path / "0-1"), some_rows(300, 12)  # 85 in a chunk
    write(folder, "old", 12, [(keys[:170], rows[:170])])
    write(folder, "new", 12, [(keys[170:], rows[170:])])
    files = [os.open(path, os.O_RDONLY) for number in range(4) for path in chunk_files(folder, number)]
    os.link(chunk_files(folder, 1)[1], tmp_path / "second name")
    removed = chunks.remove_unneeded(folder, ["old"], keep_last_chunk=is_open)
    assert sorted(removed) == sorted(path for number in (0, 1) for path in chunk_files(folder, number))
    sizes = [os.fstat(file).st_size for file in files]
    assert (sizes[:3] == [0, 0, 0]) == is_open and min(sizes[3:]) > 0
    for file in files:
        os.close(file)
    assert_equal(as_dict(chunks.read_rows(folder, "new", 12)), dict(zip(keys[170:].tolist(), rows[170:])))


def test_a_share_without_rows(tmp_path):
    store = TableStore("embedding", "persistent_path", str(tmp_path), 2, 9)
    store.write_snapshot("none", [])
    store.write_checksums("none")
    rows, checksum = store.check_snapshot("none", 1)
    assert rows == 0 and checksum and list(store.read_snapshot("none", 1)) == []


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    store = TableStore("embedding", "persistent_path", str(tmp_path), 2, 9)
    blocks = [(np.arange(9), np.ones((9, 6), np.float32))]
    store.write_snapshot("first", blocks)
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(chunks, "write_all", lambda *_: os.write(os.open("/dev/full", os.O_WRONLY), b" "))
    with pytest.raises(OSError, match="No space left"):
        store.write_snapshot("second", blocks)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_table_on_cuda_is_locked_until_the_process_ends(tmp_path):
    """Also after its rows were saved, where each file is opened and closed."""
    store = TableStore("embedding", "persistent_path", str(tmp_path), 2, 9)
    assert len({store.claim() for _ in range(2)}) == 2
    store.write_snapshot("first", [(np.arange(9), np.ones((9, 6), np.float32))])
    CudaOnCpu().save_rows(SimpleNamespace(save_snapshot=lambda name: None), store, "first", [])
    with pytest.raises(CalledProcessError), locked(f"{store.own_folder()}/LOCK"):
        pass


def test_a_table_that_cannot_be_written_to_is_one_line(tmp_path, monkeypatch):
    def refuse(path):
        raise OSError(30, "Read-only file system", path)

    store = TableStore("embedding", "persistent_path", str(tmp_path), 2, 9)
    monkeypatch.setattr(tables, "lock_for_good", refuse)
    with pytest.raises(UserError, match=r"0-1 cannot be opened for writing and locked \(Read-only file system\), as"):
        store.claim()
