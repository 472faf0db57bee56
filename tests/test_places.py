"""Datasets and raw rows behind URLs: fsspec's store in memory, and a real S3 server where there is one to start."""

import contextlib
import gzip
import io
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request

import criteo_parquet
import encode_rows
import fsspec
import h5_to_parquet
import inspect_dataset
import make_click_log
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import table_to_parquet
from conftest import (
    ROOT,
    at_the_same_time,
    free_port,
    main_here,
    make_dataset,
    metrics_lines,
    run_trainer,
    trainer_command,
)

from deepfm_train_eval import read_rows
from tools.converter import publish
from tools.converter.encoders import Encoder
from tools.trainer import checkpoints, places
from tools.trainer.cli import UserError
from tools.trainer.dataset import read_dataset
from tools.trainer.places import Remote, as_place

OPTIONS = ["--label", "clicked", "--categorical", "user_id,device", "--numeric", "price", "--list", "genres",
           "--keep", "item_id", "--drop", "ts"]  # fmt: skip
NASTY = "a b%20c [1]*#x"  # as part of a path


@pytest.fixture(scope="module")
def clicks(tmp_path_factory):
    """Folder with clicks.csv, its dataset `data`, another day day2.csv, and what --base makes of it, `grown`."""
    folder = tmp_path_factory.mktemp("clicks")
    for day, name in ((1, "clicks.csv"), (2, "day2.csv")):
        assert make_click_log.main(["--output", str(folder / name), "--num_rows", "3000", "--day", str(day)]) == 0
    assert convert(folder / "clicks.csv", folder / "data") == 0
    assert convert(folder / "day2.csv", folder / "grown", "--base", str(folder / "data")) == 0
    return folder


@pytest.fixture
def store():
    """fsspec's store in memory, empty."""
    files = fsspec.filesystem("memory")
    files.store.clear()
    files.pseudo_dirs[:] = [""]
    yield files
    files.store.clear()


def convert(source, output, *options):
    options = options if "--base" in options else (*OPTIONS, *options)
    return table_to_parquet.main(["--input", str(source), "--output_dir", str(output), *options])


def contents(folder):
    """{path within a folder: bytes}; dataset_info.json without the places of the run."""
    root = as_place(folder)
    paths = root.files() if isinstance(root, Remote) else [path for path in root.rglob("*") if path.is_file()]
    found = {str(path)[len(str(root)) + 1:]: path.read_bytes() for path in paths}
    for name in ("dataset_info.json", "_dataset_info.json"):
        if name in found:
            found[name] = json.loads(found[name])
            for place in ("base", "dataset"):
                found[name]["source"]["options"].pop(place, None)
    found.pop("README.md", None)  # has the same options in it
    return found


def one_error(capsys):
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    return error


# ------------------------------------------------------------------------------------------------------------- places


def test_local_paths_stay_paths(tmp_path):
    assert as_place("a/b") == as_place(as_place("a/b")) and not places.is_url("c:/x") and not places.is_url("./s3:/x")
    assert str(as_place("file:///a b%20c")) == "/a b%20c"
    path = tmp_path / NASTY / "é"
    assert places.of_name(places.as_name(path)[len("file://"):]) == path
    assert "/" not in places.as_name(path)[len("file:///"):]


def test_arrow_reads_local_files_by_itself(tmp_path):
    """A file of Python's that Arrow's threads still hold when Python ends aborts one in ten short runs."""
    path = tmp_path / os.fsdecode(b"\xff ?[1]#%41.parquet")
    with open(path, "wb") as file:
        pq.write_table(pa.table({"a": [1, 2]}), file)
    assert type(places.arrow_file(path)) is pa.OSFile
    assert pq.read_table(places.arrow_file(path))["a"].to_pylist() == [1, 2]
    with places.parquet_file(path) as file:
        assert file.metadata.num_rows == 2
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "."):
        with pytest.raises(OSError, match="not a regular file") as raised:
            places.arrow_file(tmp_path / name)
        assert raised.value.filename == str(tmp_path / name)


def test_parts_of_a_url():
    url = Remote("s3://bucket/a/b.csv/")
    assert (str(url), url.name, str(url.parent), str(url / "c")) == (
        "s3://bucket/a/b.csv", "b.csv", "s3://bucket/a", "s3://bucket/a/b.csv/c")
    assert [str(parent) for parent in url.parents] == ["s3://bucket/a", "s3://bucket"]
    assert url == as_place("s3://bucket/a/b.csv") == places.of_name(places.as_name(url)[len("file://"):])


def test_remote_file_reads_like_any_file(store):
    data = np.random.default_rng(0).bytes(200_000)
    store.pipe_file("/f", data)
    remote, local = io.BufferedReader(places.RemoteFile(Remote("memory://f")), 4096), io.BytesIO(data)
    rng = np.random.default_rng(1)
    for _ in range(300):
        offset, size = int(rng.integers(0, 210_000)), int(rng.integers(0, 20_000))
        assert remote.seek(offset) == local.seek(offset)
        assert remote.read(size) == local.read(size) and remote.tell() == local.tell()
    assert remote.seek(-5, io.SEEK_END) == local.seek(-5, io.SEEK_END) and remote.read() == data[-5:]
    assert remote.read(1) == b""


def test_what_stores_raise_is_one_line(monkeypatch):
    class Strange(Exception):
        pass

    for error, text in ((PermissionError("Access\nDenied"), "(PermissionError: Access)"),
                        (Strange("no route"), r"\(Strange: no route\); check the address, the network and your cred"),
                        (ImportError("Install s3fs to access S3"), "without another Python package .Install s3fs to")):
        with pytest.raises(UserError, match=text) as found, places.told("s3://b/x"):
            raise error
        assert str(found.value).startswith("s3://b/x cannot be used") and "\n" not in str(found.value)
    with pytest.raises(FileNotFoundError), places.told("s3://b/x"):
        raise FileNotFoundError
    with pytest.raises(KeyboardInterrupt), places.told("s3://b/x"):
        raise KeyboardInterrupt


def test_missing_package_is_named(clicks, monkeypatch, tmp_path, capsys):
    from fsspec.registry import known_implementations

    monkeypatch.setitem(known_implementations, "no", {"class": "no_such_package.FS", "err": "Install nowherefs"})
    capsys.readouterr()
    for run in (lambda: inspect_dataset.main(["no://b/data"]), lambda: convert("no://b/x.csv", tmp_path / "out"),
                lambda: convert(clicks / "clicks.csv", "no://b/data")):
        assert run() == 1
        assert "cannot be used without another Python package (Install nowherefs)" in one_error(capsys)


# --------------------------------------------------------------------------------------------------------- converters


@pytest.mark.parametrize("folder", ["runs/x", NASTY])
def test_tables_from_url_to_url(clicks, store, folder, capsys):
    """Text, packed text and folders; growth; new rows: byte for byte what local paths give."""
    store.pipe_file(f"/{folder}/raw/clicks.csv", (clicks / "clicks.csv").read_bytes())
    store.pipe_file(f"/{folder}/day2.csv.gz", gzip.compress((clicks / "day2.csv").read_bytes()))
    root = f"memory://{folder}"
    assert convert(f"{root}/raw", f"{root}/data") == 0
    assert convert(f"{root}/day2.csv.gz", f"{root}/grown", "--base", f"{root}/data") == 0
    for name in ("data", "grown"):
        assert contents(f"{root}/{name}") == contents(clicks / name)
    assert Encoder.load(f"{root}/grown").fingerprint == Encoder.load(clicks / "grown").fingerprint
    for source, output in ((f"{root}/data", f"{root}/ids"), (clicks / "data", clicks / "ids")):
        assert encode_rows.main(["--dataset", str(source), "--input", str(clicks / "day2.csv"), "--output_dir",
                                 str(output), "--overwrite"]) == 0
    assert contents(f"{root}/ids") == contents(clicks / "ids")
    capsys.readouterr()
    assert inspect_dataset.main([f"{root}/data"]) == 0
    there = capsys.readouterr().out
    assert inspect_dataset.main([str(clicks / "data")]) == 0
    assert there == capsys.readouterr().out


def test_parquet_input(clicks, store):
    frame = pd.read_csv(clicks / "clicks.csv")
    frame.to_parquet(clicks / "clicks.parquet", row_group_size=700)
    store.pipe_file("/raw/clicks.parquet", (clicks / "clicks.parquet").read_bytes())
    assert convert("memory://raw/clicks.parquet", "memory://data") == 0
    assert convert(clicks / "clicks.parquet", clicks / "from_parquet") == 0
    assert contents("memory://data") == contents(clicks / "from_parquet")


def test_criteo_days_from_a_url(tmp_path, store):
    from make_criteo_sample import main as make_sample

    assert make_sample(["--output_dir", str(tmp_path), "--num_rows", "900"]) == 0
    lines = (tmp_path / "train.txt").read_bytes().splitlines(keepends=True)
    (tmp_path / "days").mkdir()
    for day in range(3):
        data = gzip.compress(b"".join(lines[300 * day : 300 * day + 300]))
        store.pipe_file(f"/days/day_{day}.gz", data)
        (tmp_path / "days" / f"day_{day}.gz").write_bytes(data)
    for root in ("memory://", f"{tmp_path}/"):
        assert criteo_parquet.main(["--input_dir", f"{root}days", "--output_dir", f"{root}out"]) == 0
    assert contents("memory://out") == contents(tmp_path / "out")


@pytest.mark.parametrize("problem, message", [
    (lambda store: "memory://no/x.csv", "memory://no/x.csv cannot be read (No such file or directory); check the path"),
    (lambda store: store.pipe_file("/empty.csv", b"") or "memory://empty.csv", "memory://empty.csv is empty"),
    (lambda store: store.pipe_file("/raw/x.doc", b"x") or "memory://raw", "memory://raw holds x.doc (1) beside data"),
    (lambda store: store.pipe_file("/cut.csv.gz", gzip.compress(b"a,b\n" * 99)[:18]) or "memory://cut.csv.gz",
     "memory://cut.csv.gz is not a whole gzip file"),
    (lambda store: store.pipe_file("/cut.parquet", b"PAR1xxxxxxxx") or "memory://cut.parquet",
     "memory://cut.parquet is not a readable parquet file"),
])
def test_bad_input_behind_a_url(store, tmp_path, capsys, problem, message):
    assert convert(problem(store), tmp_path / "out") == 1
    assert message in one_error(capsys)


def test_fuxictr_data_are_read_from_local_folders(capsys, tmp_path):
    assert h5_to_parquet.main(["--input_dir", "s3://b/x", "--output_dir", str(tmp_path / "out")]) == 1
    assert "--input_dir s3://b/x is a URL, expected a folder" in one_error(capsys)


# ---------------------------------------------------------------------------------------------------------- publishing


def test_a_url_is_replaced_only_with_overwrite(clicks, store, capsys):
    assert convert(clicks / "clicks.csv", "memory://data") == 0
    before = contents("memory://data")
    capsys.readouterr()
    assert convert(clicks / "day2.csv", "memory://data") == 1
    assert "memory://data exists already; choose another folder or add --overwrite" in one_error(capsys)
    store.pipe_file("/data/train/part-00007.parquet", b"of an earlier, larger dataset")
    assert convert(clicks / "clicks.csv", "memory://data", "--overwrite") == 0
    assert contents("memory://data") == before
    store.pipe_file("/data/notes.txt", b"mine")
    capsys.readouterr()
    assert convert(clicks / "day2.csv", "memory://data", "--overwrite") == 1
    assert "holds notes.txt (1) beside the dataset" in one_error(capsys)
    store.pipe_file("/other/notes.txt", b"mine")
    assert convert(clicks / "day2.csv", "memory://other", "--overwrite") == 1
    assert "memory://other is no dataset: it holds notes.txt (1)" in one_error(capsys)
    assert store.cat_file("/other/notes.txt") == store.cat_file("/data/notes.txt") == b"mine"


def test_a_failing_conversion_leaves_the_old_dataset(clicks, store, tmp_path, capsys):
    assert convert(clicks / "clicks.csv", "memory://data") == 0
    before = contents("memory://data")
    (tmp_path / "bad.csv").write_bytes((clicks / "clicks.csv").read_bytes() + b"7,a,b,c,d,e,f\n")
    capsys.readouterr()
    assert convert(tmp_path / "bad.csv", "memory://data", "--overwrite", "--spark_tmp_dir", str(tmp_path / "tmp")) == 1
    assert "bad.csv, line 3002: label '7'" in one_error(capsys)
    assert contents("memory://data") == before and os.listdir(tmp_path / "tmp") == []


def test_dataset_info_comes_last_and_goes_first(clicks, store, monkeypatch):
    """At no time is there a dataset_info.json beside files that are not all of its dataset."""
    seen = []

    def watched(name, change):
        def method(remote, *args):
            change(remote, *args)
            present = {path.name for path in Remote("memory://data").files()}
            seen.append((name, remote.name, "dataset_info.json" in present, publish.MARK in present))
        return method

    assert convert(clicks / "clicks.csv", "memory://data") == 0
    for name in ("write_bytes", "unlink", "upload"):
        monkeypatch.setattr(Remote, name, watched(name, getattr(Remote, name)))
    monkeypatch.setattr(publish, "TRANSFERS", 1)
    assert convert(clicks / "clicks.csv", "memory://data", "--overwrite") == 0
    assert seen[0] == ("write_bytes", publish.MARK, True, True)
    assert seen[1] == ("unlink", "dataset_info.json", False, True)
    assert seen[-2:] == [("upload", "dataset_info.json", True, True), ("unlink", publish.MARK, True, False)]
    assert len(seen) > 20 and {line[2:] for line in seen[2:-2]} == {(False, True)}


@contextlib.contextmanager
def broken_upload(monkeypatch, after):
    """Uploads fail after so many files."""
    done, upload = [], Remote.upload

    def failing(remote, local):
        done.append(remote)
        if len(done) > after:
            with places.told(remote.url):
                raise ConnectionError("the network is gone")
        upload(remote, local)

    with monkeypatch.context() as patched:
        patched.setattr(Remote, "upload", failing)
        yield


def test_what_a_broken_upload_leaves_is_no_dataset(clicks, store, monkeypatch, capsys):
    assert convert(clicks / "clicks.csv", "memory://data") == 0
    capsys.readouterr()
    with broken_upload(monkeypatch, after=4):
        assert convert(clicks / "day2.csv", "memory://data", "--overwrite") == 1
    assert "(ConnectionError: the network is gone)" in one_error(capsys)
    assert store.exists("/data/" + publish.MARK) and not store.exists("/data/dataset_info.json")
    with pytest.raises(UserError, match="required, because there is no dataset_info.json|no .*parquet files in"):
        read_dataset("memory://data")
    with pytest.raises(UserError, match="no dataset_info.json in memory://data"):
        Encoder.load("memory://data")
    assert convert(clicks / "clicks.csv", "memory://data") == 1
    assert "holds what a run has left that did not end; choose another folder or add --overwrite" in one_error(capsys)
    assert convert(clicks / "clicks.csv", "memory://data", "--overwrite") == 0
    assert contents("memory://data") == contents(clicks / "data")


def test_places_that_cannot_be(clicks, store, capsys, tmp_path):
    store.pipe_file("/data/raw/clicks.csv", (clicks / "clicks.csv").read_bytes())
    assert convert("memory://data/raw/clicks.csv", "memory://data", "--overwrite") == 1
    assert "--output_dir memory://data holds the input" in one_error(capsys)
    assert convert("memory://data/raw/clicks.csv", "memory://data/raw/clicks.csv/out", "--overwrite") != 0
    capsys.readouterr()
    store.pipe_file("/file", b"x")
    assert convert(clicks / "clicks.csv", "memory://file", "--overwrite") == 1
    assert "memory://file is a file, expected a folder" in one_error(capsys)
    for output in ("memory://new", tmp_path / "new"):
        assert convert(clicks / "clicks.csv", output, "--spark_tmp_dir", "memory://tmp") == 1
        assert "--spark_tmp_dir memory://tmp is a URL, expected a folder" in one_error(capsys)
    assert os.listdir(tmp_path) == [] and not store.exists("/new")


# -------------------------------------------------------------------------------------------------------------- trainer


def put(store, folder, url):
    for path in folder.rglob("*"):
        if path.is_file():
            store.pipe_file(f"{url}/{path.relative_to(folder)}", path.read_bytes())


@pytest.mark.parametrize("folder", ["data", NASTY])
def test_trainer_reads_the_same_rows(clicks, store, folder, tmp_path):
    put(store, clicks / "data", f"/{folder}")
    here, there = read_dataset(str(clicks / "data")), read_dataset(f"memory://{folder}")
    assert (there.folder, here.folder) == (f"memory://{folder}", str(clicks / "data"))
    assert (here.fields, here.table_sizes, here.fingerprint) == (there.fields, there.table_sizes, there.fingerprint)
    for split in here.splits:
        for seed in (None, 5):
            rows = [list(read_rows(data, data.splits[split], 1, 2, seed)) for data in (here, there)]
            assert len(rows[0]) == len(rows[1]) == 4
            for one, two in zip(*rows):
                assert all(np.array_equal(a, b) for a, b in zip(one, two))
    checkpoints.keep_encoder(f"memory://{folder}", str(tmp_path))
    assert Encoder.load(tmp_path / ".deepfm-encoder").fingerprint == here.fingerprint


def test_damaged_shards_behind_a_url(store, tmp_path):
    put(store, make_dataset(tmp_path / "data"), "/data")
    whole = store.cat_file("/data/val/part-00000.parquet")
    store.pipe_file("/data/val/part-00000.parquet", whole[:-50])
    with pytest.raises(UserError, match="memory://data/val/part-00000.parquet is not a readable parquet file"):
        read_dataset("memory://data")
    with pytest.raises(UserError, match="--data_dir memory://nothing is not a folder"):
        read_dataset("memory://nothing")


# ------------------------------------------------------------------------------------------------------------------- s3


@pytest.fixture(scope="module")
def s3():
    """A bucket on an S3 server of this machine: its s3fs file system. The environment says where it is."""
    s3fs = pytest.importorskip("s3fs", reason="S3 needs the package s3fs")
    pytest.importorskip("moto.server", reason="there is no S3 server without the package moto[server]")
    port = free_port()
    server = subprocess.Popen([sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}"), ("AWS_DEFAULT_REGION", "us-east-1"),
                            ("AWS_ACCESS_KEY_ID", "user"), ("AWS_SECRET_ACCESS_KEY", "secret"),
                            ("NO_PROXY", "127.0.0.1"), ("no_proxy", "127.0.0.1")):
            patch.setenv(name, value)
        try:
            for _ in range(300):
                with contextlib.suppress(OSError):
                    urllib.request.urlopen(os.environ["AWS_ENDPOINT_URL"] + "/moto-api/", timeout=5)
                    break
                time.sleep(0.1)
            places.open_store.cache_clear()
            files = s3fs.S3FileSystem(skip_instance_cache=True, use_listings_cache=False)
            files.mkdir("bucket")
            yield files
        finally:
            server.kill()
            server.wait()
            places.open_store.cache_clear()


KILLED = """
import os, signal, sys, table_to_parquet
from tools.trainer.places import Remote
done, upload = [], Remote.upload
def dying(remote, local):
    upload(remote, local)
    done.append(remote)
    if len(done) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
Remote.upload = dying
sys.exit(table_to_parquet.main(sys.argv[1:]))
"""


def test_s3_conversion_killed_and_done_again(clicks, s3, capsys, tmp_path):
    """After a kill there is no dataset, with --overwrite there is; other files with a similar name stay."""
    s3.pipe_file("bucket/raw/clicks.csv", (clicks / "clicks.csv").read_bytes())
    s3.pipe_file("bucket/data/clicks2/mine", b"mine")
    scratch = tmp_path / "scratch"
    options = ["--input", "s3://bucket/raw/clicks.csv", "--output_dir", "s3://bucket/data/clicks", *OPTIONS,
               "--spark_tmp_dir", str(scratch)]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tools'}"}
    assert table_to_parquet.main(options) == 0
    done = subprocess.run([sys.executable, "-c", KILLED, *options, "--overwrite"], env=environment, capture_output=True)
    assert done.returncode == -signal.SIGKILL
    assert s3.exists(f"bucket/data/clicks/{publish.MARK}") and len(s3.find("bucket/data/clicks")) >= 4
    assert not s3.exists("bucket/data/clicks/dataset_info.json")
    with pytest.raises(UserError, match="required, because there is no dataset_info.json|no .*parquet files in"):
        read_dataset("s3://bucket/data/clicks")
    assert len(os.listdir(scratch)) == 1  # what the killed run has left on the local disk
    capsys.readouterr()
    assert table_to_parquet.main(options) == 1
    assert "s3://bucket/data/clicks holds what a run has left that did not end" in one_error(capsys)
    assert table_to_parquet.main([*options, "--overwrite"]) == 0
    assert contents("s3://bucket/data/clicks") == contents(clicks / "data")
    assert s3.cat_file("bucket/data/clicks2/mine") == b"mine" and os.listdir(scratch) == []


def test_s3_names_are_no_patterns(clicks, s3, capsys):
    for folder in ("other/run1", f"other/{NASTY}"):
        s3.pipe_file(f"bucket/{folder}/clicks.csv", (clicks / "clicks.csv").read_bytes())
    for _ in range(2):
        assert convert(f"s3://bucket/other/{NASTY}/clicks.csv", "s3://bucket/other/run[1]", "--overwrite") == 0
    assert contents("s3://bucket/other/run[1]") == contents(clicks / "data")
    assert s3.find("bucket/other/run1") == ["bucket/other/run1/clicks.csv"]


def test_trainer_on_s3(clicks, s3, tmp_path):
    """Two processes train, stop, and predict as from the local disk."""
    put(s3, clicks / "data", "bucket/trained")

    def train(name, data_dir):
        output, _ = run_trainer(data_dir, tmp_path / name, "--train_batches", "30", "--seed", "3", "--model_save_dir",
                                tmp_path / name / "m", processes=2)
        return metrics_lines(output, "test")

    here, there = at_the_same_time(lambda: train("here", clicks / "data"),
                                   lambda: train("there", "s3://bucket/trained"))
    assert here and here == there
    folder = tmp_path / "there" / "m" / "best_checkpoint"
    assert json.loads((folder / "state.json").read_text())["data"]["dir"] == "s3://bucket/trained"
    scores = {}
    for name, rows in (("ids", "s3://bucket/trained/test"), ("local", clicks / "data" / "test")):
        main_here("--model_load_dir", folder, "--device", "cpu", "--predict", rows, "--predict_output",
                  tmp_path / f"{name}.parquet")
        scores[name] = pd.read_parquet(tmp_path / f"{name}.parquet")
    assert scores["ids"].equals(scores["local"]) and len(scores["ids"]) > 200


def test_s3_that_does_not_answer(s3, tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    done = subprocess.run(trainer_command("s3://bucket/trained", tmp_path), capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: s3://bucket/trained cannot be used (EndpointConnectionError: ")
