"""The CUDA path: trained, saved, loaded, scored. One command: bash tests/run.sh tests/test_cuda.py

On a machine with a GPU it runs there; elsewhere with OneEmbedding's store in host memory (host_embedding.py), which is
the same code up to the kernels. All that the selected tests do runs in two processes (cuda_jobs.py), and what needs a
fresh one runs in two more. A job that ends its process fails alone: those behind it go on in another.

Needs a OneFlow with kernels for the GPU: PyPI's 0.9.0 has them for sm_60 to sm_86, 0.8.0 for sm_60 to sm_75 and PTX.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import pytest
from benchmark_workers import last_words, output_lines
from conftest import make_dataset

from tools.trainer.startup import flow

WORKER = Path(__file__).with_name("cuda_jobs.py")
STORES = ("device_mem", "cached_host_mem", "cached_ssd")
TRAINED = STORES if flow.cuda.is_available() else STORES[:1]  # a new table takes all options; the stand-in is one store
FIELDS = ["f0", "f1", "f2"]
NEW = ["--overwrite_tables"]  # of a new run: there may have been a try before


class Case(NamedTuple):
    """Jobs [function of cuda_jobs.py, *arguments] of one process, and of a fresh one behind it.

    In arguments DATA and WORK stand for the dataset's folder and one of the case's own.
    """

    name: str
    first: list
    second: list = ()


def run(*options):
    return ["run", "DATA", "WORK", ["--model_save_dir", "WORK/save", *options]]


def trained_and_scored(name, first, second):
    """Two epochs, at their end the best checkpoint's scores; then these scores in a fresh process."""
    best = ["--eval_only", "--model_load_dir", "WORK/save/best_checkpoint"]
    return Case(name, [run("--train_batches", "50", *NEW, *first)], [run(*best, *second)])


def on_cuda(*options):
    return ["--device", "cuda", *options]


def variants():
    """Cases options0 to options6."""
    for number, options in enumerate([
            ["--amp"], ["--amp", "--loss_scale_policy", "dynamic"], ["--disable_fusedmlp", "False"],
            ["--disable_fusedmlp", "False", "--amp"], ["--batch_norm"],
            ["--embedding_l2", "1e-5", "--max_grad_norm", "10"],
            ["--optimizer", "adagrad", "--warmup_batches", "5", "--eval_interval", "20", "--monitor", "auc"]]):
        yield trained_and_scored(f"options{number}", on_cuda(*options), on_cuda(*options))


def resumed():
    """Five epochs without a stop; a stop in the fourth, then on from the middle of the third in a fresh process."""
    # no epoch is a gain after the first, so the learning rate is cut at the end of the third
    options = on_cuda("--net_dropout", "0", "--min_delta", "1", "--early_stop_patience", "0", "--batch_size", "320",
                      "--train_batches", "25", "--checkpoint_interval", "13")
    whole = ["run", "DATA", "WORK", ["--model_save_dir", "WORK/whole", *NEW, *options]]
    _, *arguments, stopped = run(*NEW, *options)
    return Case("resumed", [whole, ["run_to_step", *arguments, 16, stopped]], [run(*options, "--resume")])


def cases(cases):
    return pytest.mark.parametrize("case", list(cases), ids=lambda case: case.name)


# -------------------------------------------------------------------------------------------------------- running them


def run_jobs(jobs, patience=120):
    """{name: {"value", "seconds"} or {"error": last words of the process}} of [[name, function, arguments], ...]

    patience: seconds that a job may take. A crash or a halt may be OneFlow's race at the start of a tiny graph
    (startup.py), so there is one more try, unless OneFlow says what it does not like.
    """
    results, tried = {}, set()
    # products of TF32, which OneFlow takes where a GPU has it, are too rough to compare with those of a CPU
    environment = {**os.environ, "ONEFLOW_EP_CUDA_ENABLE_TF32_EXECUTION": "0"}
    while len(results) < len(jobs):
        left = jobs[len(results):]
        process = subprocess.Popen([sys.executable, WORKER, json.dumps(left)], env=environment, text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
        words = []
        for line in output_lines(process, patience):
            if line.startswith("RESULT "):
                result = json.loads(line[len("RESULT "):])
                results[result["name"]] = result
            else:
                words.append(line)
        if len(results) < len(jobs):
            name, text = jobs[len(results)][0], "\n".join(last_words(words, 40))
            if process.returncode > 0 or "Check failed" in text or name in tried:
                results[name] = {"error": f"the process ended with status {process.returncode}\n{text}"}
            tried.add(name)
    return results


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Rows to score are all different, and have no id that is new.

    Equal rows get scores that differ in the last bit between processes, and with OneFlow 0.8.0 a new id gets a random
    row each time: AUC would differ.
    """
    folder = make_dataset(tmp_path_factory.mktemp("cuda") / "data", rows=(1600, 300, 300))
    known = pd.read_parquet(folder / "train")
    info = json.loads((folder / "dataset_info.json").read_text())
    for split in ("val", "test"):
        path = folder / split / "part-00000.parquet"
        rows = pd.read_parquet(path).drop_duplicates(FIELDS)
        for field in FIELDS:
            rows = rows[rows[field].isin(known[field])]
        rows.to_parquet(path, index=False)
        info["num_samples"][split] = len(rows)
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return folder


@pytest.fixture(scope="module")
def results(request, data_dir, tmp_path_factory):
    """{name of a job, "CASE first 0" say: its result} of all selected tests"""
    cases = {item.callspec.params["case"].name: item.callspec.params["case"] for item in request.session.items
             if item.fspath == request.node.fspath}
    work = tmp_path_factory.mktemp("work")

    def run_cases(names):
        found = {}
        for turn in ("first", "second"):
            jobs = []
            for name in names:
                if not any(name == job.split()[0] and "error" in result for job, result in found.items()):
                    text = json.dumps(getattr(cases[name], turn)).replace("DATA", str(data_dir))
                    jobs += [[f"{name} {turn} {number}", function, arguments] for number, (function, *arguments)
                             in enumerate(json.loads(text.replace("WORK", str(work / name))))]
            found.update(run_jobs(jobs))
        return found

    names = list(cases)
    with ThreadPoolExecutor(2) as pool:  # a job waits for its disk or GPU for half of its time
        first, second = pool.map(run_cases, (names[::2], names[1::2]))
    return {**first, **second}


@pytest.fixture
def values(case, results, capsys):
    """What the case's jobs returned, in their order; prints how long they took."""
    own = {job: result for job, result in results.items() if job.split()[0] == case.name}
    for job, result in own.items():
        assert "error" not in result, f"{job}: {result['error']}"
    with capsys.disabled():
        print(f"\n{case.name}: " + ", ".join(f"{job.split()[1]} process {result['seconds']} s"
                                             for job, result in own.items()), end=" ")
    return [result["value"] for result in own.values()]


# --------------------------------------------------------------------------------------------------------------- tests


@cases(trained_and_scored(store, *[on_cuda("--store_type", store, "--cache_memory_budget_mb", "64")] * 2)
       for store in TRAINED)
def test_train_save_load(values):
    """A fresh process gives the scores of the one that trained; the model has learned the planted interaction."""
    check_scores(*values, tolerance=1e-5, auc=0.75)


def check_scores(trained, scored, tolerance, auc):
    """auc: that must be reached"""
    for split in ("val", "test"):
        assert scored[split] == [pytest.approx(trained[split][-1], abs=tolerance)]
        assert trained[split][-1][0] > auc


@cases(variants())
def test_variants_train_and_load(case, values):
    # a dynamic loss scale begins with a dozen steps that overflow and are left out; batch norm begins slowly
    check_scores(*values, tolerance=1e-4, auc={"options1": 0.6, "options4": 0.5}.get(case.name, 0.7))


@cases([trained_and_scored("cpu_to_cuda", ["--device", "cpu"], on_cuda()),
        trained_and_scored("cuda_to_cpu", on_cuda(), ["--device", "cpu"])])
def test_checkpoints_move_between_devices(values):
    check_scores(*values, tolerance=1e-4, auc=0.75)


@cases(Case(f"turns_{store}_{clip}", [["train_by_turns", "DATA", "WORK", store, clip]])
       for store, clip in [*((store, "0") for store in TRAINED), ("device_mem", "0.1")])
def test_steps_equal_the_reference_on_both_devices_by_turns(values):
    """CPU, CUDA, CPU, each from the last one's checkpoint: values, Adam's moments and step come along."""
    [value] = values
    assert len(value["losses"]) == 15
    for here, reference in value["losses"]:
        assert here == pytest.approx(reference, abs=1e-5)
    assert max(value["difference"]) < 2e-5
    assert value["untouched"] > 20 and value["moments"]  # rows that CUDA did not look up, and that had moments
    assert value["kept"]
    assert value["memory"]["gpu_memory_mb"] > 0


@cases([resumed()])
def test_resume_in_a_fresh_process(values):
    """Rows, moments, step, order of the data and learning rate go on as without the stop."""
    whole, _, rest = values
    assert "epoch 3, step 13" in rest["output"] and "0.03 -> 0.003" in rest["output"]
    assert rest["val"] == [pytest.approx(line, abs=1e-3) for line in whole["val"][2:]]


@cases([Case("grown", [["train_on_first_day", "WORK"]], [["train_on_second_day", "WORK"]])])
def test_tables_grow_with_the_data(values):
    _, value = values
    assert value["rows"] > 150 and value["kept"]
    assert value["new"] > 30 and value["as_oov"]  # of both tables


@cases(Case(f"rows_{store}", [["look_up_fresh_rows", "WORK", store]]) for store in STORES)
def test_lookups_return_the_initial_distribution(values):
    """Fresh rows come from N(0, 1e-4), and the same id gives the same row."""
    [value] = values
    assert value["shape"] == [5000, 2, 8] and value["repeats"]
    assert value["std"] == pytest.approx(1e-4, rel=0.05) and abs(value["mean"]) < 2e-6


@cases([Case("masks", [["draw_masks"]])])
def test_masks_drawn_on_the_device_are_independent(values):
    [value] = values
    assert len(value["means"]) == 4
    assert value["means"] == pytest.approx([0.7] * 4, abs=0.01) and value["correlation"] < 0.02
