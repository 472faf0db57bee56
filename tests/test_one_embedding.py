"""What OneFlow's compiler makes of OneEmbedding, without a GPU: the graph is built up to the choice of kernels."""

import json

import conftest
import oneflow as flow
import pytest
from conftest import batch_of, make_trainer, random_batches
from host_embedding import CudaOnCpu

import deepfm_train_eval as trainer_module
from deepfm_train_eval import STORE_TYPES, OneEmbeddingTable, make_store_options, to_split
from tools.trainer.tables import TableStore


class Handler:
    """In place of OneFlow's, which owns memory of a GPU."""

    def __init__(self, *args):
        pass


@pytest.mark.parametrize("store_type", STORE_TYPES)
def test_what_oneembedding_is_given(monkeypatch, tmp_path, store_type):
    monkeypatch.setattr(flow.one_embedding, "OneEmbeddingHandler", Handler)
    store = TableStore("fm", "persistent_path_fm", str(tmp_path), 12, 500)
    options = make_store_options(store_type, store, 501, 64)
    table = OneEmbeddingTable("fm", 12, flow.placement("cpu", [0]), options, seed=5)
    store = json.loads(table.key_value_store_options)
    assert (store["name"], store["storage_dim"], store["kv_store"]["persistent_table"]["path"]) == (
        "fm", 36, str(tmp_path))
    assert (table.key_type, table.dtype, table.embedding_dim, table.seed) == (flow.int64, flow.float, 12, 5)
    [column] = json.loads(table.embedding_tables)["tables"][0]["columns"]
    assert column["initializer"] == {"type": "normal", "mean": 0.0, "std": 1e-4}
    assert [parameter.is_global for parameter in table.parameters()] == [True]


@pytest.fixture
def updates(shared_dataset_dir, tmp_path, monkeypatch):
    """{table or "": [(L2 weight, names of the inputs) of its update operators]} of the training graph on CUDA"""
    monkeypatch.setattr(flow.one_embedding, "OneEmbeddingHandler", Handler)

    monkeypatch.setitem(trainer_module.DEVICES, "cpu", CudaOnCpu)
    monkeypatch.setattr(conftest, "enlarge_rows", lambda model: None)

    def build(*options, kind_of_update="adam"):
        trainer = make_trainer(shared_dataset_dir, tmp_path, "--seed", "5", *options)
        [(ids, labels)] = random_batches(trainer.dataset, 1)
        batch, placement = batch_of(trainer.dataset, ids, labels), trainer.device.placement
        trainer.make_train_graph()
        inputs = [to_split(array, placement) for array in (batch.ids, batch.labels, batch.weights)]
        trainer.train_graph.build_graph(*inputs)
        found = {}
        for op in trainer.train_graph._full_job_proto.net.op:
            kind = op.user_conf.op_type_name
            if kind == "embedding_lookup" and not flow.__version__.startswith("0.8."):
                assert op.user_conf.attr["seed"].at_int64 == (11 if "embedding_fm" in op.name else 10)
            if kind.endswith("_update"):
                assert kind_of_update in kind
                table = op.name.split(".")[1] if "embedding" in kind else ""  # model.embedding.weight-...
                if table:  # the kernels check it
                    size, line = (op.user_conf.attr[name].at_int64 for name in ("embedding_size", "line_size"))
                    assert line == size * (2 if kind_of_update == "adagrad" else 3)
                update = pytest.approx(op.user_conf.attr["l2"].at_float), set(op.user_conf.input)
                found.setdefault(table, []).append(update)
        rates = [op.learning_rate_schedule_conf for op in trainer.train_graph._full_job_proto.net.op
                 if op.HasField("learning_rate_schedule_conf")]
        return found, rates

    return build


def test_tables_are_updated_by_adam(updates):
    found, _ = updates("--net_dropout", "0.2")
    for table in ("embedding", "embedding_fm"):
        [(l2, inputs)] = found[table]
        assert l2 == 0 and {"bias_correction1", "bias_correction2", "embedding_grad"} <= inputs


def test_decay_of_tables_and_clipping_of_all_gradients(updates):
    found, _ = updates("--net_dropout", "0", "--batch_norm", "--embedding_l2", "0.05", "--max_grad_norm", "10")
    for table in ("embedding", "embedding_fm"):
        [(l2, inputs)] = found[table]
        assert l2 == 0.05 and "scale_by_tensor" in inputs  # the factor of the clipping
    assert all(l2 == 0 for l2, _ in found[""])


def test_adagrad_decays_and_clips_like_adam(updates):
    decay_and_clip = ["--embedding_l2", "0.05", "--max_grad_norm", "10"]
    found, _ = updates("--net_dropout", "0", "--optimizer", "adagrad", *decay_and_clip, kind_of_update="adagrad")
    for table in ("embedding", "embedding_fm"):
        [(l2, inputs)] = found[table]
        assert l2 == 0.05 and {"train_step", "scale_by_tensor", "embedding_grad"} <= inputs
    assert all(l2 == 0 for l2, _ in found[""])


def test_warm_up_is_in_the_rate_that_tables_and_dense_parameters_share(updates):
    found, [rate] = updates("--net_dropout", "0", "--warmup_batches", "4")
    assert list(rate.learning_rate_decay.piecewise_scaling_conf.scales) == [0.25, 0.5, 0.75, 1, 1]
    assert rate.learning_rate == pytest.approx(1e-3)
    assert all("learning_rate" in inputs for table in found for _, inputs in found[table])


@pytest.mark.parametrize("batch_size, columns, warns", [(10_000, 39, False), (26_886, 39, False), (26_887, 39, True)])
def test_batches_beyond_oneembeddings_sizes_are_noted(batch_size, columns, warns):
    args = trainer_module.parse_args(["--predict=x", "--predict_output=y", "--model_load_dir=z",
                                      f"--batch_size={batch_size}"])
    assert any("OneEmbedding may end the process" in note for note in CudaOnCpu().notes(args, columns)) == warns
