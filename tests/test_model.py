"""Model mathematics against independent definitions, initial values, dropout masks."""

import numpy as np
import oneflow as flow
import pytest
from host_embedding import CudaOnCpu
from reference import second_order_by_loops

from deepfm_train_eval import DNN, FM, build_model, make_tables, parse_args
from tools.trainer.batches import draw_masks, keep_probability
from tools.trainer.cpu import Cpu, initial_rows
from tools.trainer.dataset import Dataset

CPU = Cpu()


@pytest.mark.parametrize("device", [CPU, CudaOnCpu()])
def test_second_order_is_the_sum_over_pairs_of_fields(device):
    embeddings = np.random.default_rng(0).normal(size=(5, 7, 3)).astype(np.float32)
    split = flow.tensor(embeddings.reshape(5, 21)).to_global(CPU.placement, flow.sbp.split(0))
    assert np.allclose(device.sum_over_fields(split, 3).to_local().numpy(), embeddings.sum(axis=1), atol=1e-5)
    result = FM(device, 3).second_order(split).to_local().numpy()
    assert result.shape == (5, 1)
    assert np.allclose(result[:, 0], second_order_by_loops(embeddings), atol=1e-4)


def test_parameter_count_of_the_published_network():
    """BARS DeepFM_criteo_x4_001: 20,112,037 parameters, 910,708 x 17 of them in the tables."""
    args = parse_args(["--predict", "x", "--predict_output", "y", "--model_load_dir", "z", "--device", "cpu"])
    tables = make_tables(args, 910_708)
    model = build_model(args, CPU, tables, Dataset({}, [f"f{f}" for f in range(39)], [910_708] + [0] * 38))
    dense = sum(parameter.numel() for parameter in model.dense_parameters())
    rows = [table.weight.shape for table in model.tables().values()]
    assert rows == [(910_709, 16), (910_709, 1)]  # with a padding row that is no parameter of the model
    assert dense + sum((rows - 1) * width for rows, width in rows) == 20_112_037


def test_initial_values():
    rows = initial_rows(0, 20_000, 4, seed=1, table=0)
    assert rows.std() == pytest.approx(1e-4, rel=0.01) and abs(rows.mean()) < 2e-6
    assert (initial_rows(100, 300, 4, seed=1, table=0) == rows[100:300]).all()  # any split of the rows
    assert (initial_rows(0, 20_000, 4, seed=1, table=1) != rows).any()
    assert (initial_rows(0, 20_000, 4, seed=2, table=0) != rows).any()
    dnn = DNN(CPU, 300, [200], 0.0, seed=1)
    assert dnn.weight_0.to_local().numpy().std() == pytest.approx(np.sqrt(2 / 500), rel=0.02)
    assert not dnn.bias_0.to_local().numpy().any()


def correlation(a, b):
    return abs(np.corrcoef(a.ravel(), b.ravel())[0, 1])


def test_masks_are_independent_of_each_other_and_keyed():
    first = draw_masks([500, 500, 500], 400, 0.2, seed=1, step=0, rank=0)
    assert [mask.shape for mask in first] == [(400, 500)] * 3 and first[0].dtype == np.int8
    dropped = 1 - keep_probability(0.2)
    assert dropped == pytest.approx(0.2, abs=1 / 512)
    keys = [(2, 0, 0), (1, 1, 0), (1, 0, 1)]  # another seed, step, process
    others = [draw_masks([500], 400, 0.2, *key)[0] for key in keys]
    masks = [*first, *others]
    for i, mask in enumerate(masks):
        assert mask.mean() == pytest.approx(-dropped, abs=0.005) and set(np.unique(mask)) == {-1, 0}
        for other in masks[:i]:
            assert correlation(mask, other) < 0.01
    again = draw_masks([500, 500, 500], 400, 0.2, seed=1, step=0, rank=0)
    assert all((a == b).all() for a, b in zip(first, again))


class MaskGraph(flow.nn.Graph):
    def __init__(self, dnn):
        super().__init__()
        self.dnn = dnn

    def build(self, x):
        masks = self.dnn.device.draw_masks(self.dnn.hidden_units, x.shape[0], self.dnn.dropout, self.dnn.generator)
        return [mask.to(flow.float32) for mask in masks]


def test_masks_drawn_in_the_graph_are_independent():
    graph = MaskGraph(DNN(CudaOnCpu(), 4, [300, 300], 0.3, seed=7))
    x = flow.ones(200, 4).to_global(CPU.placement, flow.sbp.split(0))
    masks = [mask.to_local().numpy().copy() for _ in range(2) for mask in graph(x)]
    for i, mask in enumerate(masks):
        assert mask.shape == (200, 300) and mask.mean() == pytest.approx(keep_probability(0.3), abs=0.01)
        for other in masks[:i]:
            assert correlation(mask, other) < 0.02
