"""tools/field_importance.py: against an independent computation, planted fields, and error lines."""

import os
import subprocess
import sys

import field_importance
import matplotlib.pyplot as plt
import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, make_dataset, train_here
from sklearn.metrics import log_loss, roc_auc_score

import deepfm_train_eval as trainer_module
from tools.trainer import checkpoints
from tools.trainer.cli import UserError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of pyparsing, inside matplotlib
TABLE_SIZES = [7, 11, 40, 1]  # the label follows f0 and f1; f2 is noise, f3 always the same
ROWS = 1201  # of val: a full batch and a part
CHECKPOINT = "run/best_checkpoint"


@pytest.fixture(scope="module")
def work_dir(tmp_path_factory):
    """A dataset and a trained model."""
    folder = tmp_path_factory.mktemp("importance")
    make_dataset(folder / "data", rows=(5000, ROWS, 200), table_sizes=TABLE_SIZES, row_group_rows=500)
    train_here(folder / "data", folder, "--model_save_dir", folder / "run", "--train_batches", 160)
    return folder


def arguments(work_dir, **options):
    options = {"data_dir": work_dir / "data", "model_load_dir": work_dir / CHECKPOINT, "device": "cpu",
               "batch_size": 700, **options}
    return [f"--{name}={value}" for name, value in options.items()]


@pytest.fixture(scope="module")
def trainer(work_dir):
    return field_importance.load(field_importance.parse_args(arguments(work_dir)))


def model_by_hand(work_dir, trainer):
    """The formulas of DeepFM (arXiv:1703.04247) in numpy on the checkpoint's files: a function of ids (n, F)."""
    state = checkpoints.read_checkpoint(work_dir / CHECKPOINT)
    dense = checkpoints.read_dense(work_dir / CHECKPOINT, state)
    tables = {}
    for store in trainer_module.make_tables(trainer.args, trainer.dataset.num_ids):
        name = store.name
        tables[name] = np.full((sum(TABLE_SIZES), store.dim), np.nan)
        for keys, rows in store.read_snapshot(state["tables"][name]["snapshot"], 1):
            tables[name][keys] = rows[:, :store.dim]

    def predict(ids):
        vectors = tables["embedding"][ids]
        logits = tables["embedding_fm"][ids].sum(axis=(1, 2))
        for i in range(ids.shape[1]):
            for j in range(i):
                logits += (vectors[:, i] * vectors[:, j]).sum(axis=1)
        x = vectors.reshape(len(ids), -1)
        for layer in range(3):
            x = x @ dense[f"model.dnn.weight_{layer}"].T + dense[f"model.dnn.bias_{layer}"]
            x = np.maximum(x, 0) if layer < 2 else x
        return 1 / (1 + np.exp(-logits - x[:, 0]))

    return predict


def val_rows(work_dir):
    table = pq.read_table(work_dir / "data" / "val").to_pandas()
    return table.drop(columns="Label").to_numpy(), table["Label"].to_numpy()


def test_against_a_computation_by_hand(work_dir, trainer):
    ids, labels = field_importance.read_ids(trainer.dataset, trainer.dataset.splits["val"])
    expected_ids, expected_labels = val_rows(work_dir)
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_array_equal(labels, expected_labels)
    scores, changes = field_importance.importance(lambda ids: field_importance.score(trainer, ids), ids, labels, 2, 5)
    np.testing.assert_array_equal(ids, expected_ids)  # nothing stays permuted

    predict = model_by_hand(work_dir, trainer)
    auc, logloss = roc_auc_score(labels, predict(ids)), log_loss(labels, predict(ids))
    # rows with the same ids tie here, while float32 may put them in any order: hence the tolerance of AUC
    assert scores == (pytest.approx(auc, abs=2e-3), pytest.approx(logloss, abs=1e-5))
    for field in range(4):
        for repeat in range(2):
            moved = ids.copy()
            order = np.random.default_rng((5, repeat, field)).permutation(ROWS)
            moved[:, field] = ids[order, field]
            probs = predict(moved)
            assert changes[field, repeat, 0] == pytest.approx(auc - roc_auc_score(labels, probs), abs=2e-3)
            assert changes[field, repeat, 1] == pytest.approx(log_loss(labels, probs) - logloss, abs=2e-5)
    assert not np.array_equal(changes[0, 0], changes[0, 1])  # every repeat has its own order


def test_planted_fields(trainer):
    ids, labels = field_importance.read_ids(trainer.dataset, trainer.dataset.splits["val"])
    _, changes = field_importance.importance(lambda ids: field_importance.score(trainer, ids), ids, labels, 3, 0)
    drops, rises = changes.mean(axis=1).T
    assert (drops[:2] > 0.1).all() and (rises[:2] > 0.05).all()
    assert abs(drops[2]) < 0.02 and abs(rises[2]) < 0.02
    assert drops[3] == rises[3] == 0


def test_first_rows_only(work_dir, trainer):
    ids, labels = val_rows(work_dir)
    for rows in (1, 500, 777, ROWS + 5):
        some_ids, some_labels = field_importance.read_ids(trainer.dataset, trainer.dataset.splits["val"], rows)
        np.testing.assert_array_equal(some_ids, ids[:rows])
        np.testing.assert_array_equal(some_labels, labels[:rows])


def test_command(work_dir):
    command = [sys.executable, str(ROOT / "tools" / "field_importance.py"),
               *arguments(work_dir, repeats=2, output=work_dir / "new" / "importance.png")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, cwd=work_dir)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].startswith("val AUC 0.") and lines[0].endswith(f"{ROWS} rows, permutations per field: 2")
    assert lines[2].split()[0] == "field" and len({len(line) for line in lines[2:7]}) == 1
    drops = [float(line.split()[1]) for line in lines[3:7]]
    assert drops == sorted(drops, reverse=True) and {line.split()[0] for line in lines[3:5]} == {"f0", "f1"}
    assert lines[7] == f"wrote {work_dir}/new/importance.png"
    picture = plt.imread(work_dir / "new" / "importance.png")
    assert picture.shape[1] == 1350 and picture.std() > 0.05


def test_bars_are_sorted_and_equal_to_the_table():
    changes = np.array([[[0.1, 0.3], [0.3, 0.5]], [[0.5, 0.2], [0.5, 0.2]], [[-0.1, 0.0], [-0.1, 0.0]]])
    rows = field_importance.sort_fields(["a", "b", "c"], changes)
    assert [row[0] for row in rows] == ["b", "a", "c"]
    assert rows[1][1:] == pytest.approx((0.2, 0.02**0.5, 0.4, 0.02**0.5))  # n - 1
    assert field_importance.sort_fields(["a"], changes[:1, :1]) == [("a", 0.1, 0, 0.3, 0)]  # of one repeat
    figure = field_importance.draw(rows, "title")
    widths = [[bar.get_width() for bar in axes.patches] for axes in figure.axes]
    assert widths == [pytest.approx([0.5, 0.2, -0.1]), pytest.approx([0.2, 0.4, 0.0])]
    first, last = figure.axes[0].transData.transform([(0, 0), (0, 2)])
    assert first[1] > last[1]  # the most important field is on top
    plt.close(figure)


def test_damaged_rows_are_refused(work_dir, tmp_path, capsys):
    data = make_dataset(tmp_path / "data", rows=(99, 101, 97), table_sizes=TABLE_SIZES, digests=True)
    path = data / "val/part-00000.parquet"
    content = bytearray(path.read_bytes())
    content[200] ^= 1
    path.write_bytes(content)
    assert field_importance.main(arguments(work_dir, data_dir=data)) == 1
    assert f"error: {path} was changed or damaged since dataset_info.json" in capsys.readouterr().err


def test_other_data_and_other_mistakes(work_dir, tmp_path, capsys):
    other = make_dataset(tmp_path / "other", table_sizes=[7, 11])
    for options, message in [
        ({"model_load_dir": work_dir / "none"}, f"there is no checkpoint folder {work_dir}/none"),
        ({"data_dir": tmp_path}, f"no *.parquet files in {tmp_path}/val"),
        ({"data_dir": other}, "lacks the columns f2, f3 (2) of the checkpoint's data; give the --data_dir that it was"),
    ]:
        status = field_importance.main(arguments(work_dir, **options))
        [error] = capsys.readouterr().err.splitlines()
        assert status == 1 and error.startswith("error: ") and message in error
    one_class = np.ones(5, np.float32)
    with pytest.raises(UserError, match="all 5 labels are 1, AUC needs both 0 and 1; use a larger --max_rows"):
        field_importance.importance(lambda ids: np.full(5, 0.5), np.zeros((5, 2), int), one_class, 1, 0)


@pytest.mark.parametrize("options, message", [
    ([], "the following arguments are required: --data_dir, --model_load_dir"),
    (["--data_dir", "d", "--model_load_dir", "m", "--repeats", "0"],
     "argument --repeats: 0 must be at least 1"),
])
def test_wrong_arguments(capsys, options, message):
    with pytest.raises(SystemExit) as stop:
        field_importance.main(options)
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"error: {message} (see --help)\n"
