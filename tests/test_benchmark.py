"""tools/benchmark.py: the synthetic data, the numbers it takes from a run, and every subcommand on tiny sizes."""

import json
import subprocess
import sys
import time
from types import SimpleNamespace

import benchmark
import benchmark_workers
import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import ROOT

TINY = ["--fields", "5", "--dnn", "8,8", "--table_rows", "100", "--repeats", "1"]


def test_dataset_is_what_the_trainer_reads(tmp_path):
    benchmark.make_dataset(tmp_path / "data", (100, 20, 20), 3, 11)
    info = json.loads((tmp_path / "data" / "dataset_info.json").read_text())
    assert [field["table_size"] for field in info["fields"]] == [4, 4, 3]
    file = pq.ParquetFile(tmp_path / "data" / "train" / "part-00000.parquet")
    assert file.num_row_groups == 8 and file.metadata.num_rows == info["num_samples"]["train"] >= 100
    for field in info["fields"]:
        ids = file.read([field["name"]])[0].to_numpy()
        assert ids.min() >= field["offset"] and ids.max() < field["offset"] + field["table_size"]
    assert set(file.read(["Label"])[0].to_pylist()) == {0.0, 1.0}


def test_ids_are_skewed_and_reach_all_of_a_small_table(tmp_path):
    benchmark.make_dataset(tmp_path / "data", (8000, 20, 20), 1, 20)
    counts = np.bincount(pq.read_table(tmp_path / "data" / "train")["f0"].to_numpy(), minlength=20)
    # log-uniform: id k has the share log((k + 2) / (k + 1)) / log(20)
    assert counts[0] / counts.sum() == pytest.approx(np.log(2) / np.log(20), abs=0.03)
    assert counts[:19].min() > 0


def test_more_fields_than_rows_is_one_clear_line(capsys):
    assert benchmark.main(["loader", "--fields", "5", "--table_rows", "4"]) == 1
    expected = "error: --table_rows 4 is below --fields 5; every field needs a row"
    assert capsys.readouterr().err.splitlines() == [expected]


def test_floor_multiplies_all_matrices_of_a_step(monkeypatch, tmp_path):
    """Forward, weight gradient and input gradient of each layer, in row-major storage (order 101)."""
    calls = []

    class Library:
        @staticmethod
        def cblas_sgemm(order, transpose_a, transpose_b, m, n, k, one, a, lda, b, ldb, zero, c, ldc):
            calls.append((order, transpose_a, transpose_b, m, n, k, lda, ldb, ldc))

    monkeypatch.setattr(benchmark_workers, "import_startup", lambda: SimpleNamespace(BLAS="test"))
    monkeypatch.setattr(benchmark_workers.ctypes, "CDLL", lambda path: Library)
    spec = {"rows": 10, "sizes": [6, 4, 1], "steps": 1, "processes": 1, "process": 0, "folder": str(tmp_path)}
    benchmark_workers.floor_worker(spec)
    plain, transposed = 111, 112
    assert calls[:3] == [
        (101, plain, transposed, 10, 4, 6, 6, 6, 4),  # x (10, 6) times W (4, 6) transposed
        (101, transposed, plain, 4, 6, 10, 4, 6, 6),  # dy (10, 4) transposed times x
        (101, plain, plain, 10, 6, 4, 4, 6, 6),  # dy times W
    ]
    assert [call[3:6] for call in calls[3:6]] == [(10, 1, 4), (1, 4, 10), (10, 4, 1)]
    assert len(calls) == 12  # the warm-up and one step


def test_scale_varies_one_setting_at_a_time():
    args = benchmark.parse_args(["scale", "--table_rows", "1,2", "--fields", "3,4", "--batch_size", "5,6"])
    assert benchmark.scale_settings(args) == [(1, 3, 5), (2, 3, 5), (1, 4, 5), (1, 3, 6)]


def test_step(tmp_path, capsys):
    """Trainer, products, start-up and plot in one run; the printed ratios follow from the file's numbers."""
    out, picture = tmp_path / "step.json", tmp_path / "step.png"
    assert benchmark.main(["step", *TINY, "--batch_size", "64", "--steps", "4", "--updates", "lazy", "--processes", "1",
                           "--json", str(out), "--plot", str(picture)]) == 0
    result = json.loads(out.read_text())
    run = result["runs"]["trainer lazy"][0]
    lines = run["lines"]
    assert [line["step"] for line in lines if line["event"] == "train"] == [1, 2, 3, 4, 5]
    assert run["ms_per_step"] == pytest.approx(np.mean([line["ms_per_step"] for line in lines[1:5]]))
    assert run["samples_per_second"] == pytest.approx(64_000 / run["ms_per_step"], rel=0.01)
    assert run["peak_mb"] > 200 and result["processes"] == 1  # one Python with OneFlow
    assert 1 < result["runs"]["start-up lazy"][0]["seconds"] < 100
    floor = result["runs"]["matrix products"][0]["ms_per_step"]
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| trainer"))
    assert f"{run['ms_per_step'] / floor:.2f}" in row
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_the_plot_shows_the_median_and_every_run(tmp_path, monkeypatch):
    import matplotlib.pyplot as plt

    times = {"trainer recipe": [10.0, 12.5, 20.0], "matrix products": [5.0, 4.0, 8.0]}  # ms for 100 samples
    runs = {name: [{"ms_per_step": ms} for ms in values] for name, values in times.items()}
    runs["start-up recipe"] = [{"seconds": 8.0}] * 3
    monkeypatch.setattr(plt, "close", lambda figure: None)
    benchmark.plot_step({"settings": {"batch_size": 100, "fields": 5}, "runs": runs}, tmp_path / "step.png")
    [axes] = plt.gcf().axes
    monkeypatch.undo()
    plt.close("all")
    assert [bar.get_height() for bar in axes.patches] == [8000, 20000]
    assert [list(dots.get_ydata()) for dots in axes.lines] == [[10000, 8000, 5000], [20000, 25000, 12500]]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["trainer\nrecipe", "matrix products"]
    assert axes.get_ylim()[0] == 0 and axes.get_ylim()[1] > 25000


def test_a_failing_run_shows_the_trainers_words(capsys):
    assert benchmark.main(["step", *TINY, "--batch_size", "64", "--net_dropout", "2", "--processes", "2"]) == 1
    error = capsys.readouterr().err
    assert "error: the training run failed" in error and "--net_dropout: 2.0 must be at most 0.99" in error


@pytest.mark.parametrize("arguments, message", [
    ([], "required: command"),
    (["stop"], "invalid choice: 'stop'"),
    (["step", "--repeats", "0"], "--repeats: 0 must be at least 1"),
    (["scale", "--fields", "5,x"], "--fields: '5,x' is not a comma-separated list of whole numbers"),
    (["step", "--updates", "dense"], "--updates: 'dense', expected recipe, lazy or recipe,lazy"),
])
def test_mistakes_in_arguments_end_in_one_line(capsys, arguments, message):
    with pytest.raises(SystemExit) as ended:
        benchmark.main(arguments)
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1 and message in error


@pytest.mark.parametrize("part", sorted(path.name for path in (ROOT / "tools").glob("*_*.py")
                                        if path.name != "__init__.py" and "def parse_args" not in path.read_text()))
def test_a_part_of_a_tool_names_the_command_that_it_is_for(part):
    result = subprocess.run([sys.executable, str(ROOT / "tools" / part), "--help"], capture_output=True, text=True)
    words = {"conversion": "convert", "serving": "serve"}.get(part[len("benchmark_"):-3], "--help")
    expected = f"error: this is a part of tools/benchmark.py; run: python tools/benchmark.py {words}\n"
    assert (result.returncode, result.stdout, result.stderr) == (1, "", expected)


def test_loader(tmp_path):
    out = tmp_path / "loader.json"
    assert benchmark.main(["loader", *TINY, "--batch_size", "64", "--num_rows", "2000", "--json", str(out)]) == 0
    run = json.loads(out.read_text())["runs"]["loader"][0]
    assert run["rows"] == 2000 and run["rows_per_second"] > 0 and run["masks_per_second"] > 0


def test_metrics_memory():
    result = benchmark.worker("metrics", {"rows": 200_000})
    assert result["held_bytes"] == 8 and result["extra_bytes"] > 0 and result["seconds"] > 0


def test_checkpoint(tmp_path):
    out = tmp_path / "save.json"
    assert benchmark.main(["scale", "--fields", "5", "--save_rows", "20000", "--repeats", "1", "--json", str(out)]) == 0
    run = json.loads(out.read_text())["runs"][0]
    # value, m and v, 16 + 1 wide, float32, and two keys and two index entries of 8 bytes
    assert 17 * 3 * 4 + 32 < run["bytes_per_row"] < 2 * (17 * 3 * 4 + 32)


def test_peer_trains(tmp_path):
    pytest.importorskip("torch")
    spec = {"data_dir": None, "batches": str(tmp_path / "batches.npz"), "updates": "recipe", "warmup": 1, "steps": 1,
            "table_rows": 100, "fields": 5, "dnn": [8], "net_dropout": 0.2}
    benchmark.make_dataset(tmp_path / "data", (64, 20, 20), 5, 100)
    benchmark.save_batches(tmp_path / "data", spec["batches"], 32)
    assert benchmark_workers.peer_worker(spec)["ms_per_step"] > 0


def test_peer_gets_the_training_rows(tmp_path):
    benchmark.make_dataset(tmp_path / "data", (64, 20, 20), 5, 100)
    benchmark.save_batches(tmp_path / "data", tmp_path / "batches.npz", 24)
    batches = np.load(tmp_path / "batches.npz")
    table = pq.read_table(tmp_path / "data" / "train")
    assert batches["ids"].shape == (2, 24, 5) and batches["labels"].shape == (2, 24, 1)
    np.testing.assert_array_equal(batches["ids"][1, :, 3], table["f3"].to_numpy()[24:48])
    np.testing.assert_array_equal(batches["labels"][0, :, 0], table["Label"].to_numpy()[:24])


def test_cuda_is_skipped_with_one_line_where_there_is_none(capsys):
    import oneflow

    if oneflow.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert benchmark.main(["step", "--device", "cuda"]) == 0
    assert capsys.readouterr().out == "OneFlow sees no CUDA device: nothing measured\n"


GPU_WORKER = """
import json, os, sys
sys.path[:0] = {paths}
options = json.loads(sys.argv[2])["options"]
if "cached_ssd" in options:  # a stand-in that OneFlow ends in the middle
    found = {{"data": "from parquet", "ms_per_step": 5.0, "samples_per_second": 12800.0, "gpu_memory_mb": 77}}
    print(json.dumps(found))
    print("F1126 07:12:03 22531 lru_cache.cu:40] Check failed: size <= capacity (3 vs. 2) ")
    print(*["    @     0x7f21e90c5b3d  oneflow::Maybe<>::error()"] * 40, sep="\\n", flush=True)
    os.abort()
if "--amp" in options:
    sys.exit("RuntimeError: no half for you")
import host_embedding
host_embedding.install()
import benchmark_workers
benchmark_workers.main()
"""


def test_step_on_cuda_goes_on_after_failures(tmp_path, monkeypatch):
    """On a store in host memory, but for stores that fail; what is known is printed and written at once."""
    script, out = tmp_path / "worker.py", tmp_path / "step.json"
    script.write_text(GPU_WORKER.format(paths=[str(ROOT), str(ROOT / "tools"), str(ROOT / "tests")]))
    monkeypatch.setattr(benchmark, "WORKERS", script)
    monkeypatch.setattr(benchmark, "count_gpus", lambda: 1)
    monkeypatch.setattr(benchmark, "STORES", ("device_mem", "cached_ssd"))
    known = []

    def print_row(cells, widths):
        known.append((cells, out.read_text() if out.exists() else None))

    monkeypatch.setattr(benchmark, "print_row", print_row)
    assert benchmark.main(["step", "--device", "cuda", *TINY, "--batch_size", "64", "--steps", "4", "--json",
                           str(out)]) == 0
    rows = [cells for cells, _ in known[2:]]
    assert [row[:3] for row in rows] == [
        [store, amp, data] for store in ("device_mem", "cached_ssd") for amp in ("no", "yes")
        for data in ("from parquet", "same batch")]
    runs = json.loads(out.read_text())["runs"]
    for row, data in zip(rows[:2], ("from parquet", "same batch")):
        [run] = runs[f"device_mem {data}"]
        assert run["samples_per_second"] == pytest.approx(64_000 / run["ms_per_step"], rel=0.01)
        assert row[3:] == [f"{run['ms_per_step']:.2f}", f"{run['samples_per_second']:.0f}", "123"]
    assert [row[3:] for row in rows[2:4]] == [["failed: RuntimeError: no half for you (ended with status 1)"]] * 2
    for row, again in zip(rows[4:6], rows[6:]):
        assert row[3:] == again[3:]
    assert rows[4][3:] == ["5.00", "12800", "77"]
    assert rows[5][3].startswith("failed: F1126") and "(3 vs. 2)" in rows[5][3] and rows[5][3].endswith("status -6)")
    for number, (_, text) in enumerate(known[2:], 1):  # the file has what is printed
        assert len(json.loads(text)["runs"]) == number


def test_a_silent_process_is_killed_with_its_children():
    script = "import os; print('a', flush=True); os.system('sleep 60; echo b'); print('c')"
    start = time.monotonic()
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True,
                               start_new_session=True)
    assert list(benchmark_workers.output_lines(process, 2)) == ["a"]
    assert process.returncode == -9 and time.monotonic() - start < 30


PEER = """#!/bin/sh
echo "$3" >>'{log}'
cd "$(echo "$3" | sed 's/.*"folder": "\\([^"]*\\)".*/\\1/')"
ls embeddings.parquet model/initial_checkpoint/dense.npz >&2 || exit 1
echo '{{"auc": 0.75, "logloss": 0.4, "epochs": 3, "seconds": 1, "fuxictr": "2.3.9", "torch": "2.13"}}'
"""


def test_accuracy(shared_dataset_dir, tmp_path, capsys):
    """A stand-in for FuxiCTR's Python gets the recipe that the trainer runs with, and what its model began with."""
    peer, out = tmp_path / "python", tmp_path / "accuracy.json"
    peer.write_text(PEER.format(log=tmp_path / "specs"))
    peer.chmod(0o755)
    options = ["--dnn", "8,4", "--batch_size", "64", "--epochs", "2", "--monitor", "auc", "--batch_norm", "--seeds",
               "1,2"]
    assert benchmark.main(["accuracy", "--data", str(shared_dataset_dir), "--peer", str(peer), *options, "--json",
                           str(out)]) == 0
    specs = [json.loads(line) for line in (tmp_path / "specs").read_text().splitlines()]
    assert [spec["seed"] for spec in specs] == [1, 2]
    assert specs[0] == {**specs[0], "dnn": [8, 4], "batch_size": 64, "epochs": 2, "monitor": "auc", "batch_norm": True,
                        "data": str(shared_dataset_dir), "embedding_l2": 1e-5, "max_grad_norm": 10.0}
    runs = json.loads(out.read_text())["runs"]
    assert set(runs) == {"here 1", "here 2", "FuxiCTR 1", "FuxiCTR 2"} and runs["here 1"][0]["epochs"] == 2
    assert 0.3 < runs["here 1"][0]["auc"] < 1 and runs["here 1"] != runs["here 2"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "FuxiCTR 2.3.9, PyTorch 2.13; monitor auc"
    assert [line.split("|")[1].strip() for line in lines[1:]] == ["seed", "-" * 14, "1", "2", "mean", "standard error"]


def test_table_of_accuracy_by_hand():
    runs = {("here", 1): (0.80, 0.45), ("here", 2): (0.84, 0.43),
            ("FuxiCTR", 1): (0.81, 0.44), ("FuxiCTR", 2): (0.79, 0.44)}
    runs = {job: {"auc": auc, "logloss": logloss} for job, (auc, logloss) in runs.items()}
    rows = benchmark.accuracy_rows(runs, [1, 2])
    assert rows == [
        [1, "0.800000", "0.810000", "-0.010000", "0.450000", "0.440000", "+0.010000"],
        [2, "0.840000", "0.790000", "+0.050000", "0.430000", "0.440000", "-0.010000"],
        ["mean", "0.820000", "0.800000", "+0.020000", "0.440000", "0.440000", "+0.000000"],
        ["standard error", "0.020000", "0.010000", "0.030000", "0.010000", "0.000000", "0.010000"]]
    assert [row[0] for row in benchmark.accuracy_rows(runs, [1])] == [1, "mean"]
