"""OneEmbedding and the CUDA path. One command settles it on a machine with a GPU: bash tests/run.sh tests/test_cuda.py

Needs a OneFlow with kernels for the GPU: PyPI's 0.9.0 has them for sm_60 to sm_86, 0.8.0 for sm_60 to sm_75 and PTX.
"""

import os

import numpy as np
import oneflow as flow
import pytest
from conftest import enlarge_rows, metrics_lines, run_trainer, values_of
from reference import Reference

import deepfm_train_eval as trainer_module
from deepfm_train_eval import Cuda, OneEmbedding, OneEmbeddingTable, parse_args, read_dataset, start_trainer, to_split
from tools.trainer.batches import Batch
from tools.trainer.checkpoints import prepare_new_run
from tools.trainer.tables import TableStore

pytestmark = pytest.mark.skipif(not flow.cuda.is_available(), reason="OneFlow sees no CUDA device")

# products of TF32, which OneFlow takes where a GPU has it, are too rough to compare with those of a CPU
os.environ["ONEFLOW_EP_CUDA_ENABLE_TF32_EXECUTION"] = "0"
STORES = ("device_mem", "cached_host_mem", "cached_ssd")
CUDA = ("--device", "cuda", "--loss_print_interval", "10")


def train_then_evaluate(data_dir, work, train_options, eval_options):
    """Train 50 steps, then score the best checkpoint in a fresh process -> val and test metrics of both"""
    save = work / "save"
    trained, _ = run_trainer(data_dir, work, *train_options, "--train_batches", "50", "--model_save_dir", save,
                             timeout=1800)
    scored, _ = run_trainer(data_dir, work, *eval_options, "--eval_only", "--model_load_dir", save / "best_checkpoint",
                            timeout=1800)
    return [[*metrics_lines(output, "val")[-1], *metrics_lines(output, "test")[-1]] for output in (trained, scored)]


@pytest.mark.parametrize("store_type", STORES)
def test_train_save_load_evaluate(distinct_dataset_dir, tmp_path, store_type):
    options = [*CUDA, "--store_type", store_type, "--cache_memory_budget_mb", "64"]
    trained, scored = train_then_evaluate(distinct_dataset_dir, tmp_path, options, options)
    assert scored == pytest.approx(trained, abs=1e-5)
    assert trained[0] > 0.6  # it has learned the planted interaction


@pytest.mark.parametrize("options", [
    ["--amp"], ["--amp", "--loss_scale_policy", "dynamic"], ["--disable_fusedmlp", "False", "--net_dropout", "0.2"],
    ["--disable_fusedmlp", "False", "--amp"], ["--batch_norm"], ["--embedding_l2", "1e-5", "--max_grad_norm", "10"]])
def test_variants_train_and_load(distinct_dataset_dir, tmp_path, options):
    trained, scored = train_then_evaluate(distinct_dataset_dir, tmp_path, [*CUDA, *options], [*CUDA, *options])
    assert scored == pytest.approx(trained, abs=1e-4)
    assert np.isfinite(trained).all()


@pytest.mark.parametrize("first, second", [("cpu", "cuda"), ("cuda", "cpu")])
def test_checkpoints_move_between_devices(distinct_dataset_dir, tmp_path, first, second):
    trained, scored = train_then_evaluate(distinct_dataset_dir, tmp_path, ["--device", first], ["--device", second])
    assert scored == pytest.approx(trained, abs=1e-4)


@pytest.mark.parametrize("store_type", STORES)
def test_lookups_return_the_initial_distribution(tmp_path, store_type):
    """Fresh rows come from N(0, 1e-4), and the same id gives the same row."""
    device = Cuda()
    store = TableStore(f"lookup_{store_type}", "persistent_path", str(tmp_path), 8, 5000)
    table = OneEmbedding(device, device.make_table(store, 0, 0, store_type, 64), 8)

    class Lookup(flow.nn.Graph):
        def __init__(self):
            super().__init__()
            self.table = table

        def build(self, ids):
            return self.table(ids)

    ids = np.tile(np.arange(5000).reshape(-1, 2), (2, 1))
    rows = Lookup()(to_split(ids, device.placement)).to_local().numpy()
    assert rows.shape == (5000, 2, 8) and rows.std() == pytest.approx(1e-4, rel=0.05)
    assert (rows[:2500] == rows[2500:]).all()


@pytest.mark.parametrize("store_type, clip", [*((store_type, "0") for store_type in STORES), ("device_mem", "0.1")])
def test_steps_equal_the_reference(shared_dataset_dir, tmp_path, monkeypatch, store_type, clip):
    """From a CPU checkpoint with its moments, so that both start from the same rows."""
    common = ["--data_dir", str(shared_dataset_dir), "--dnn", "8,6", "--embedding_vec_size", "4", "--batch_size", "32",
              "--net_dropout", "0", "--persistent_path", str(tmp_path / "t"), "--persistent_path_fm",
              str(tmp_path / "f"), "--model_save_dir", str(tmp_path / "save"), "--store_type", store_type,
              "--max_grad_norm", clip]

    def trainer_on(device, checkpoint=None):
        args = parse_args([*common, "--device", device])
        return start_trainer(args, read_dataset(args.data_dir), checkpoint, run_id="test")

    on_cpu, saver = trainer_on("cpu")
    enlarge_rows(on_cpu.model)
    reference = Reference(values_of(on_cpu.model), on_cpu.args.learning_rate, max_grad_norm=float(clip))
    reference.lazy = True  # on CUDA also with clipping
    prepare_new_run(saver.save_dir, saver.stores, str(shared_dataset_dir))
    saver.save(on_cpu, ["start"])

    # OneFlow keeps a table until the process ends, and takes no second one of its name
    monkeypatch.setattr(trainer_module, "OneEmbeddingTable",
                        lambda name, *args: OneEmbeddingTable(f"{name}_{store_type}_{clip}", *args))
    on_cuda, saver = trainer_on("cuda", str(tmp_path / "save" / "start"))
    rng = np.random.default_rng(3)
    for _ in range(10):
        dataset = on_cuda.dataset
        ids = np.stack([rng.integers(low, high, 32) for low, high in zip(dataset.offsets, dataset.offsets[1:])], 1)
        labels = (rng.random(32) < 0.4).astype(np.float32)
        loss = on_cuda.train_step(Batch([(ids, labels)], 32, 32, dataset.num_ids))
        assert float(loss.to_local().numpy()) == pytest.approx(reference.train(ids, labels), abs=1e-4)
    saver.save(on_cuda, ["end"])

    back, _ = trainer_on("cpu", str(tmp_path / "save" / "end"))  # the rows that OneEmbedding saved, read on CPU
    for name, value in values_of(back.model).items():
        assert np.abs(value - reference.values[name]).max() < 1e-4, name
