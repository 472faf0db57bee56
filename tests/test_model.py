"""Model mathematics against independent definitions, initial values, dropout masks."""

import numpy as np
import oneflow as flow
import pytest
from reference import second_order_by_loops

from deepfm_train_eval import DNN, draw_masks, initial_rows, keep_probability, second_order, sum_over_fields

CPU = flow.placement("cpu", [0])


def test_second_order_is_the_sum_over_pairs_of_fields():
    embeddings = np.random.default_rng(0).normal(size=(5, 7, 3)).astype(np.float32)
    split = flow.tensor(embeddings.reshape(5, 21)).to_global(CPU, flow.sbp.split(0))
    assert np.allclose(sum_over_fields(split, 3).to_local().numpy(), embeddings.sum(axis=1), atol=1e-5)
    result = second_order(split, 3).to_local().numpy()
    assert result.shape == (5, 1)
    assert np.allclose(result[:, 0], second_order_by_loops(embeddings), atol=1e-4)


def test_parameter_count_of_the_published_network():
    dnn = DNN(39 * 16, [1000] * 5, 0.2, CPU)
    assert sum(parameter.numel() for parameter in dnn.parameters()) == 4_630_001
    assert 910_708 * 17 + 4_630_001 == 20_112_037  # BARS DeepFM_criteo_x4_001


def test_initial_values():
    rows = initial_rows(0, 20_000, 4, seed=1, table=0)
    assert rows.std() == pytest.approx(1e-4, rel=0.01) and abs(rows.mean()) < 2e-6
    assert (initial_rows(100, 300, 4, seed=1, table=0) == rows[100:300]).all()  # any split of the rows
    assert (initial_rows(0, 20_000, 4, seed=1, table=1) != rows).any()
    assert (initial_rows(0, 20_000, 4, seed=2, table=0) != rows).any()
    dnn = DNN(300, [200], 0.0, CPU, seed=1)
    assert dnn.weight_0.to_local().numpy().std() == pytest.approx(np.sqrt(2 / 500), rel=0.02)
    assert not dnn.bias_0.to_local().numpy().any()


def correlation(a, b):
    return abs(np.corrcoef(a.ravel(), b.ravel())[0, 1])


def test_masks_are_independent_of_each_other_and_keyed():
    first = draw_masks([500, 500, 500], 400, 0.2, seed=1, step=0, process=0)
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
    again = draw_masks([500, 500, 500], 400, 0.2, seed=1, step=0, process=0)
    assert all((a == b).all() for a, b in zip(first, again))


class MaskGraph(flow.nn.Graph):
    def __init__(self, dnn):
        super().__init__()
        self.dnn = dnn

    def build(self, x):
        return [mask.to(flow.float32) for mask in self.dnn.draw_masks_in_graph(x.shape[0])]


def test_masks_drawn_in_the_graph_are_independent():
    """What runs on CUDA, here on the CPU device."""
    graph = MaskGraph(DNN(4, [300, 300], 0.3, CPU, seed=7))
    x = flow.ones(200, 4).to_global(CPU, flow.sbp.split(0))
    masks = [mask.to_local().numpy().copy() for _ in range(2) for mask in graph(x)]
    for i, mask in enumerate(masks):
        assert mask.shape == (200, 300) and mask.mean() == pytest.approx(keep_probability(0.3), abs=0.01)
        for other in masks[:i]:
            assert correlation(mask, other) < 0.02
