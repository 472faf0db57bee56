"""Columns that are no fields, weights and groups; down-sampled negatives; whole runs with them."""

import json
import shutil
from functools import partial

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import make_dataset, metrics_lines, run_trainer, train_here, trainer_command
from sklearn.metrics import log_loss, roc_auc_score

import deepfm_train_eval as trainer_module
from deepfm_train_eval import compute_metrics, read_dataset, read_rows
from tools.trainer import batches as batching
from tools.trainer.cli import UserError
from tools.trainer.dataset import Split, group_numbers
from tools.trainer.dataset_info import digests_of
from tools.trainer.metrics import Scores

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # petastorm uses pyarrow's old interfaces


def column(folder, split, name):
    return pq.read_table(folder / split)[name].to_pandas()


def rows_of(dataset, split):
    return [np.concatenate(arrays) for arrays in zip(*read_rows(dataset, dataset.splits[split]))]


# ------------------------------------------------------------------------------------------------------------- reading


def test_columns_are_read_where_an_option_names_them(weighted_dataset_dir):
    plain = read_dataset(str(weighted_dataset_dir))
    assert plain.fields == ["f0", "f1", "f2"] and len(rows_of(plain, "val")) == 2
    both = read_dataset(str(weighted_dataset_dir), weight_column="w", group_column="user")
    for split, parts in (("train", 3), ("val", 4), ("test", 4)):
        rows = rows_of(both, split)
        assert len(rows) == parts and all((one == two).all() for one, two in zip(rows, rows_of(plain, split)))
        weights = column(weighted_dataset_dir, split, "w").to_numpy(np.float32)
        assert rows[2].dtype == np.float32 and (rows[2] == weights).all()
    users = column(weighted_dataset_dir, "val", "user").fillna("None")
    groups = rows_of(both, "val")[3]
    assert groups.dtype == np.int64 and pd.crosstab(users, groups).astype(bool).sum().eq(1).all()
    assert len(np.unique(groups)) == users.nunique() > 10


def test_a_field_can_be_the_group(weighted_dataset_dir):
    dataset = read_dataset(str(weighted_dataset_dir), group_column="f2")
    ids, _, groups = rows_of(dataset, "test")
    assert (groups == ids[:, 2]).all()


@pytest.mark.parametrize("processes", [1, 2])
def test_weights_stay_with_their_rows_in_train(tmp_path, processes):
    """Shuffled, dealt out to processes, padded: the weight is made from the row's ids."""
    folder = make_dataset(tmp_path / "data", rows=(1013, 20, 20))
    for split in ("train", "val", "test"):
        path = folder / split / "part-00000.parquet"
        rows = pq.read_table(path).to_pandas()
        rows.assign(w=rows.f0 + 100.0 * rows.f2).to_parquet(path, index=False, row_group_size=51)
    dataset, count = read_dataset(str(folder), weight_column="w"), 0
    for rank in range(processes):
        for batch in batching.train_batches(read_rows, dataset, 64, seed=1, epoch=1, rank=rank, world_size=processes):
            valid = slice(0, batch.num_valid)
            assert (batch.row_weights[valid, 0] == batch.ids[valid, 0] + 100.0 * batch.ids[valid, 2]).all()
            assert not batch.row_weights[batch.num_valid:].any() and batch.row_weights.shape == batch.weights.shape
            count += batch.num_valid
    assert count == 1013


def test_group_numbers():
    whole = group_numbers(np.array([3, -1, 2**62 + 1]))
    assert whole.tolist() == [3, -1, 2**62 + 1]
    floats = group_numbers(np.array([3.0, -1.0, np.nan, -np.nan, 0.0, -0.0, 2.5, np.inf]))  # beside missing ones
    assert floats[:2].tolist() == [3, -1] and floats[2] == floats[3] and floats[4] == floats[5] == 0
    assert len(set(floats.tolist())) == 6
    text = group_numbers(np.array(["a", "b", "日本", "a"]))
    assert text.tolist() == [-4496393130729816112, -5758684491630436641, text[2], -4496393130729816112]  # in every run
    many = group_numbers(np.array([f"user{number}" for number in range(100_000)]))
    assert len(np.unique(many)) == 100_000
    with pytest.raises(UserError, match="2\\^53 and more as floats"):
        group_numbers(np.array([2.0**53, np.nan]))


@pytest.mark.parametrize("kind", [pa.int64(), pa.int8(), pa.uint8(), pa.float32(), pa.float64(), pa.string()])
def test_groups_of_any_type_that_petastorm_reads(weighted_dataset_dir, tmp_path, kind):
    """The same groups, whatever they are stored as, also with missing ones."""
    dataset = read_dataset(str(weighted_dataset_dir), group_column="user")
    expected = rows_of(dataset, "val")[2]
    known = column(weighted_dataset_dir, "val", "user")
    numbers = [None if user is None else int(user[4:]) for user in known]
    rows = pq.read_table(weighted_dataset_dir / "val").drop(["user"])
    folder = tmp_path / "val"
    folder.mkdir()
    values = [str(n) for n in numbers] if pa.types.is_string(kind) else numbers
    pq.write_table(rows.append_column("user", pa.array(values, kind)), folder / "part.parquet", row_group_size=51)
    split = Split(str(folder), "val")
    split.extras = {"groups": "user"}
    groups = np.concatenate([block[2] for block in read_rows(dataset, split)])
    assert pd.crosstab(expected, groups).astype(bool).sum().eq(1).all() and len(set(groups)) == len(set(expected))


def test_weights_may_be_text(weighted_dataset_dir, tmp_path):
    """As --keep leaves them of a CSV file."""
    folder = edited(weighted_dataset_dir, tmp_path / "data", lambda rows: rows.assign(w=rows.w.map(repr)), "train")
    blocks = [rows_of(read_dataset(str(place), weight_column="w"), "train") for place in (weighted_dataset_dir, folder)]
    for numbers, texts in zip(*blocks):
        assert np.array_equal(numbers, texts) and numbers.dtype == texts.dtype


def test_without_dataset_info_named_columns_are_no_fields(tmp_path, weighted_dataset_dir):
    for split in ("train", "val", "test"):
        (tmp_path / split).mkdir()
        pq.write_table(pq.read_table(weighted_dataset_dir / split), tmp_path / split / "part.parquet")
    arguments = [str(tmp_path), [7, 11, 40], {"train": 403, "val": 301, "test": 299}]
    assert read_dataset(*arguments, weight_column="w", group_column="user").fields == ["f0", "f1", "f2"]
    with pytest.raises(UserError, match="--table_size_array has 3 values, expected 4: f0, f1, f2, w"):
        read_dataset(*arguments, group_column="user")


# -------------------------------------------------------------------------------------------------------------- errors


def edited(source, folder, change, split="val"):
    """A copy of a dataset with one split's rows changed (a pandas table)."""
    for name in ("train", "val", "test"):
        (folder / name).mkdir(parents=True)
        rows = pq.read_table(source / name).to_pandas()
        rows = change(rows) if name == split else rows
        rows.to_parquet(folder / name / "part-00000.parquet", index=False, row_group_size=51)
    (folder / "dataset_info.json").write_text((source / "dataset_info.json").read_text())
    return folder


def test_a_column_that_petastorm_cannot_read_is_named(weighted_dataset_dir, tmp_path):
    folder = edited(weighted_dataset_dir, tmp_path / "data", lambda rows: rows.rename(columns={"w": "a b"}), "train")
    with pytest.raises(UserError, match=r"petastorm cannot read the columns a b \(1\); rename them"):
        read_dataset(str(folder), weight_column="a b")


def weight(value, row=7):
    def change(rows):
        rows.loc[row, "w"] = value
        return rows
    return change


@pytest.mark.parametrize("options, change, message", [
    ({"weight_column": "v"}, None, "--weight_column v is not a column of .*train/part-00000.parquet; its columns are"),
    ({"group_column": "users"}, None, "--group_column users is not a column of"),
    ({"weight_column": "user"}, None, "--weight_column user of the train split has text that is no number .*user"),
    ({"weight_column": "w"}, lambda rows: rows.assign(w=["1"] * (len(rows) - 1) + [""]), "val split has text that "),
    ({"weight_column": "w"}, lambda rows: rows.assign(w=["1"] * (len(rows) - 1) + [None]), "has the weight nan"),
    ({"weight_column": "w"}, lambda rows: rows.assign(w=["1"] * (len(rows) - 1) + ["nan"]), "has the weight nan"),
    ({"weight_column": "w"}, lambda rows: rows.assign(w=pd.Timestamp("2020-01-01")),
     r"--weight_column w is of type timestamp\[.*\] in .*, expected signed integers, floats or text that is a number"),
    ({"weight_column": "f0"}, None, "--weight_column f0 is a field; name a column of weights"),
    ({"weight_column": "Label"}, None, "--weight_column Label is the label; name a column of weights"),
    ({"weight_column": "a b"}, None, "--weight_column a b is not a column of .*; its columns are"),
    ({"weight_column": "w"}, weight(-0.5), "--weight_column w of the val split has the weight -0.5, expected finite"),
    ({"weight_column": "w"}, weight(np.inf), "of the val split has the weight inf, expected finite"),
    ({"weight_column": "w"}, weight(1e39), "of the val split has the weight inf, expected finite"),
    ({"weight_column": "w"}, weight(None), "of the val split has the weight nan, expected finite"),
    ({"weight_column": "w"}, lambda rows: rows.assign(w=0.0), "gives all rows of the val split the weight 0"),
    ({"weight_column": "w"}, lambda rows: rows.assign(w=rows.Label), "gives all rows with label 0 of the val split"),
    ({"group_column": "user"}, lambda rows: rows.assign(user=pd.Timestamp("2020-01-01")),
     r"--group_column user is of type timestamp\[.*\] in .*, expected signed integers, floats or text"),
    ({"group_column": "user"}, lambda rows: rows.assign(user=np.uint64(3)), "--group_column user is of type uint64"),
])
def test_what_cannot_be_used_is_one_line_before_training(weighted_dataset_dir, tmp_path, options, change, message):
    folder = edited(weighted_dataset_dir, tmp_path / "data", change or (lambda rows: rows))
    with pytest.raises(UserError, match=message) as raised:
        read_dataset(str(folder), **options)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("known, message", [
    (True, "was changed or damaged"), (False, "part-00000.parquet cannot be read"),
])  # fmt: skip
def test_damaged_weights_are_one_line_before_training(weighted_dataset_dir, tmp_path, known, message):
    folder = shutil.copytree(weighted_dataset_dir, tmp_path / "data")
    if known:
        info = json.loads((folder / "dataset_info.json").read_text())
        info["files"] = digests_of(str(folder))
        (folder / "dataset_info.json").write_text(json.dumps(info))
    path = folder / "train" / "part-00000.parquet"
    chunk = pq.read_metadata(path).row_group(0).column(pq.read_schema(path).names.index("w"))
    start = min(filter(None, (chunk.dictionary_page_offset, chunk.data_page_offset)))
    data = bytearray(path.read_bytes())
    data[start:start + 8] = b"\xff" * 8  # the header of its first page
    path.write_bytes(data)
    with pytest.raises(UserError, match=message):
        read_dataset(str(folder), weight_column="w")


def test_a_mistake_ends_in_one_line(weighted_dataset_dir, tmp_path, fails):
    error = fails(weighted_dataset_dir, tmp_path, "--weight_column", "nothing")
    assert error.startswith("error: --weight_column nothing is not a column")


# ----------------------------------------------------------------------------------------------------------- whole runs


def metrics_log(work):
    return [json.loads(line) for line in (work / "logs" / "metrics.jsonl").read_text().splitlines()]


def predictions(data_dir, work, split, *options):
    """Probabilities of the best checkpoint, from its own command line."""
    target = work / f"{split}{len(list(work.iterdir()))}.parquet"
    trainer_module.main(trainer_command(data_dir, work, "--predict", data_dir / split, "--predict_output", target,
                                        "--model_load_dir", work / "save" / "best_checkpoint", *options)[2:])
    return pq.read_table(target)["probability"].to_numpy()


@pytest.fixture(scope="module")
def weighted_run(weighted_dataset_dir, tmp_path_factory):
    work = tmp_path_factory.mktemp("weighted_run")
    output = train_here(weighted_dataset_dir, work, "--weight_column", "w", "--group_column", "user",
                        "--model_save_dir", work / "save", "--log_dir", work / "logs", "--train_batches", "14")
    return work, output


def test_metrics_of_a_run_equal_those_of_its_predictions(weighted_dataset_dir, weighted_run):
    work, output = weighted_run
    probs = predictions(weighted_dataset_dir, work, "test")
    labels, weights, users = (column(weighted_dataset_dir, "test", name) for name in ("Label", "w", "user"))
    line = metrics_log(work)[-1]
    assert line["event"] == "test" and "monitor" not in line
    assert line["auc"] == pytest.approx(roc_auc_score(labels, probs, sample_weight=weights), abs=1e-6)
    assert line["logloss"] == pytest.approx(log_loss(labels, probs.astype(float), sample_weight=weights), abs=1e-6)
    ctr = np.average(labels, weights=weights)
    assert line["calibration"] == pytest.approx(np.average(probs, weights=weights) / ctr, abs=1e-6)
    groups = pd.factorize(users.fillna("None"))[0]
    scores = Scores(probs, labels.to_numpy(np.float32), weights.to_numpy(np.float32), groups.astype(np.int64))
    assert {name: line[name] for name in trainer_module.METRICS} == pytest.approx(compute_metrics(scores), abs=1e-6)
    second = f"  test pCTR/CTR {line['calibration']:.6f}, test ECE {line['ece']:.6f}, test GAUC " \
             f"{line['gauc']:.6f}, test rows outside GAUC {line['gauc_left_out']:.6f}"
    assert second in output.splitlines() and len(second) <= 100
    [val, *_] = [line for line in metrics_log(work) if line["event"] == "val"]
    assert val["monitor"] == val["auc"] - val["logloss"]
    best = json.loads((work / "save" / "best_checkpoint" / "state.json").read_text())["progress"]["best"]
    assert {"auc", "logloss", "calibration", "ece", "gauc", "gauc_left_out"} < set(best)


def test_evaluation_of_a_checkpoint_knows_the_columns(run_here, weighted_dataset_dir, weighted_run):
    work, output = weighted_run
    options = ["--eval_only", "--model_load_dir", work / "save" / "best_checkpoint"]
    scored = run_here(weighted_dataset_dir, work, *options, "--weight_column", "w", "--group_column", "user")
    plain = run_here(weighted_dataset_dir, work, *options)
    assert metrics_lines(scored, "test") == metrics_lines(output, "test") != metrics_lines(plain, "test")
    assert "GAUC" not in plain and "pCTR/CTR" in plain
    note = "All rows count alike; the run that trained this had --weight_column w\n"
    assert note in plain and note not in scored + output
    by_field = run_here(weighted_dataset_dir, work, *options, "--group_column", "f2")
    note = "GAUC by the field f2: all its values outside the vocabulary are one group"
    assert note in by_field and note not in scored + plain


def test_two_processes_equal_one(weighted_dataset_dir, tmp_path):
    options = ["--batch_norm", "--optimizer", "adagrad", "--warmup_batches", "5"]
    logs = []
    for name, train in (("1", train_here), ("2", partial(run_trainer, processes=2))):
        work = tmp_path / name
        train(weighted_dataset_dir, work, "--net_dropout", "0", "--log_dir", work / "logs", "--weight_column", "w",
              "--group_column", "user", "--train_batches", "12", "--loss_print_interval", "3", "--eval_interval", "5",
              *options)
        logs.append(metrics_log(work))
    assert [(line["event"], line["step"]) for line in logs[0][:-1]] == [
        ("train", 3), ("val", 5), ("train", 6), ("train", 9), ("val", 10), ("train", 12), ("val", 12)]
    assert logs[0][-1]["event"] == "test"
    for one, two in zip(*logs):
        names = [name for name in one if name in ("step", "loss", "lr", "monitor", *trainer_module.METRICS)]
        # rows of equal scores on one side of a border of the ECE's bins are on the other one now and then
        assert {name: one[name] for name in names} == pytest.approx({name: two[name] for name in names}, abs=2e-5)


def test_down_sampled_negatives(run_here, weighted_dataset_dir, tmp_path):
    """Training is the same; probabilities are corrected, wherever they come out, also from a checkpoint by itself."""
    plain, corrected = tmp_path / "plain", tmp_path / "corrected"
    for work, rate in ((plain, []), (corrected, ["--negative_sampling_rate", "0.1"])):
        output = run_here(weighted_dataset_dir, work, "--train_batches", "9", "--model_save_dir", work / "save",
                          "--monitor", "auc", "--log_dir", work / "logs", *rate)
    assert "Predictions are corrected for a train split with a share of 0.1 of the rows with label 0" in output
    state = json.loads((corrected / "save" / "best_checkpoint" / "state.json").read_text())
    assert state["model"]["negative_sampling_rate"] == 0.1
    p, q = (predictions(weighted_dataset_dir, work, "test").astype(np.float64) for work in (plain, corrected))
    assert q == pytest.approx(p / (p + (1 - p) / 0.1), abs=1e-6) and q.mean() < 0.5 * p.mean()
    given = predictions(weighted_dataset_dir, plain, "test", "--negative_sampling_rate", "0.1")
    assert given == pytest.approx(q, abs=1e-7)
    first, second = ([line for line in metrics_log(work) if line["event"] == "val"][-1] for work in (plain, corrected))
    assert first["auc"] == pytest.approx(second["auc"], abs=1e-9)
    labels = column(weighted_dataset_dir, "test", "Label")
    test = metrics_log(corrected)[-1]
    assert test["calibration"] == pytest.approx(q.mean() / labels.mean(), abs=1e-6)
    assert test["logloss"] == pytest.approx(log_loss(labels, q), abs=1e-6)


@pytest.mark.parametrize("rate", ["0", "1.5", "-1", "nan"])
def test_rates_that_are_none(rate, capsys):
    with pytest.raises(SystemExit):
        trainer_module.parse_args(["--negative_sampling_rate", rate])
    assert "--negative_sampling_rate" in capsys.readouterr().err
