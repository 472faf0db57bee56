"""tools/criteo_parquet.py against plain pandas: encodings, splits, nasty rows, both engines, and bad input."""

import contextlib
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import weakref

import criteo_parquet
import encode_rows
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, needs_spark
from sklearn.model_selection import KFold, StratifiedKFold

from tools.converter import arrow_engine, convert, encoders, spark_engine, vocabulary
from tools.converter import raw as raw_files
from tools.converter.info import check_growth, row_map
from tools.converter.splits import stratified_folds

INTEGERS = [f"I{i}" for i in range(1, 14)]
CATEGORIES = [f"C{i}" for i in range(1, 27)]
COLUMNS = ["Label", *INTEGERS, *CATEGORIES]
NAMES = {"train": "train", "val": "valid", "test": "test"}


# ------------------------------------------------------------------------------------------------- independent encoder


def x4_tokens(frame):
    """Tokens of FuxiCTR's Criteo_x4 encoding, missing ones as None."""

    def bucket(text):
        value = float(text or 0)
        return (int(np.floor(np.log(value) ** 2)) if value > 2 else int(value)) or None

    integers = frame[INTEGERS].applymap(bucket).astype(object)
    return pd.concat([integers.where(integers.notna(), None), frame[CATEGORIES].applymap(lambda t: t or None)], axis=1)


def x4_reference(frames, min_count):
    """({split: frame of local ids}, table sizes): padding 0, tokens from 1 by falling count, then the rest."""
    tokens = {split: x4_tokens(frame) for split, frame in frames.items()}
    ids, sizes = {split: {} for split in frames}, []
    for name in INTEGERS + CATEGORIES:
        counts = tokens["train"][name].value_counts()
        kept = sorted((-count, token) for token, count in counts.items() if count >= min_count)
        number = {token: i for i, (_, token) in enumerate(kept, 1)}
        sizes.append(len(number) + 2)
        for split in frames:
            ids[split][name] = [number.get(token, len(number) + 1) for token in tokens[split][name]]
    return {split: pd.DataFrame(columns) for split, columns in ids.items()}, sizes


# --------------------------------------------------------------------------------------------------------------- data


def random_frame(rows, seed):
    """Raw rows as strings; few distinct values, so that most tokens are kept. I2 with C2 makes rows recognisable."""
    rng = np.random.default_rng(seed)
    frame = pd.DataFrame(index=range(rows), columns=COLUMNS, data="")
    frame["Label"] = rng.choice(["0", "1"], rows, p=[0.75, 0.25])
    for name in INTEGERS:
        frame[name] = np.floor(np.exp(rng.normal(1, 2, rows)) - 2).astype(int).astype(str)
    for name in CATEGORIES:
        frame[name] = [f"{number:08x}" for number in rng.zipf(1.5, rows) % 40 + 0xAB0000]
    frame[INTEGERS + CATEGORIES] = frame[INTEGERS + CATEGORIES].where(rng.random((rows, 39)) < 0.8, "")
    return frame


def nasty_frames():
    """Train, val and test rows with everything that has gone wrong in such converters."""
    train = random_frame(500, 0)
    train.loc[0:2, INTEGERS + CATEGORIES] = ""
    borders = [round(np.exp(np.sqrt(k))) + d for k in range(1, 60) for d in (-1, 0, 1)]
    values = ["-1", "-2", "-3", "-2147483648", "0", "1", "2", "3", "7", "8", "65535", "65536", "9007199254740992"]
    values += [str(v) for v in borders]
    train.loc[: 2 * len(values) - 1, "I1"] = values * 2
    train.loc[:, "C1"] = [""] * 470 + ["0000000a"] * 9 + ["0000000b"] * 10 + ["0000000c"] * 11
    train.loc[:, "I3"] = [""] * 450 + ["5"] * 9 + ["20"] * 10 + ["-3"] * 11 + ["400"] * 20
    train.loc[:, "C2"] = [f"{i:08x}" for i in range(500)]  # nothing frequent: an empty vocabulary
    train.loc[:, "I4"] = ""
    train.loc[:299, "C3"] = ["abcdef12", "ABCDEF12", "AbCdEf12", "x", "a", "aa"] * 50
    train.loc[300:, "C3"] = ["a much longer token"] * 110 + ["a much longer tokem"] * 90
    val, test = random_frame(90, 1), random_frame(70, 2)
    val.loc[:40, CATEGORIES] = "ffffffff"  # never in train
    val.loc[:20, "C3"] = ["abcdef12", "ABCDEF12", "a much longer token"] * 7
    val.loc[41:70, "C1"] = ["0000000a", "0000000b", "0000000c"] * 10
    val.loc[41:70, "I3"] = ["5", "20", "-3"] * 10
    val.loc[: len(values[:80]) - 1, "I1"] = values[:80]
    test.loc[69, INTEGERS + CATEGORIES] = ""
    return {"train": train, "val": val, "test": test}


def to_text(frame, separator=",", header=True, end="\n", last_end=True):
    lines = [separator.join(row) for row in ([COLUMNS] if header else []) + frame[COLUMNS].values.tolist()]
    return (end.join(lines) + (end if last_end else "")).encode()


@pytest.fixture(scope="module")
def nasty(tmp_path_factory):
    """(folder, frames): train with CRLF line ends, valid without the last one, test gzipped."""
    frames, folder = nasty_frames(), tmp_path_factory.mktemp("nasty")
    (folder / "train.csv").write_bytes(to_text(frames["train"], end="\r\n"))
    (folder / "valid.csv").write_bytes(to_text(frames["val"], last_end=False))
    (folder / "test.csv.gz").write_bytes(gzip.compress(to_text(frames["test"])))
    return folder, frames


def run(input_dir, output_dir, *options):
    return criteo_parquet.main(["--input_dir", str(input_dir), "--output_dir", str(output_dir), *map(str, options)])


def read_local_ids(folder):
    """{split: frame of Label and local ids}, dataset_info."""
    info = json.loads((folder / "dataset_info.json").read_text())
    frames = {}
    for split in NAMES:
        frame = pq.read_table(folder / split).to_pandas()
        assert list(frame) == COLUMNS
        assert len(frame) == info["num_samples"][split]
        for field in info["fields"]:
            frame[field["name"]] -= field["offset"]
            assert frame[field["name"]].between(0, field["table_size"] - 1).all()
        frames[split] = frame
    return frames, info


def sorted_rows(frame):
    return sorted(map(tuple, frame.astype(int).values.tolist()))


def assert_same_rows(made, expected, frames):
    """val and test in the order of the input; train with the same rows, each as often, in another order."""
    for split in NAMES:
        wanted = expected[split].copy()
        wanted.insert(0, "Label", frames[split]["Label"].astype(int).tolist())
        assert sorted_rows(made[split]) == sorted_rows(wanted)
        in_order = (made[split].astype(int).values == wanted.values).all()
        assert in_order == (split != "train")


# ------------------------------------------------------------------------------------------------------------ encodings


@pytest.mark.parametrize("small", [False, True])
def test_x4_equals_plain_pandas(nasty, tmp_path, monkeypatch, small):
    folder, frames = nasty
    if small:  # many blocks, shuffle buckets and spills of the counts
        monkeypatch.setattr(raw_files, "BLOCK_BYTES", 20_000)
        monkeypatch.setattr(convert, "GIGABYTE", 25_000)
        spills = []
        spill = vocabulary.TokenCounter._spill
        monkeypatch.setattr(vocabulary.TokenCounter, "_spill", lambda self: (spills.append(1), spill(self)))
    assert run(folder, tmp_path / "out") == 0
    made, info = read_local_ids(tmp_path / "out")
    expected, sizes = x4_reference(frames, 10)
    assert [field["table_size"] for field in info["fields"]] == sizes
    assert_same_rows(made, expected, frames)
    assert not small or len(spills) > 2


def test_min_categr_count(nasty, tmp_path):
    folder, frames = nasty
    assert run(folder, tmp_path / "out", "--min_categr_count", 2) == 0
    made, info = read_local_ids(tmp_path / "out")
    expected, sizes = x4_reference(frames, 2)
    assert [field["table_size"] for field in info["fields"]] == sizes
    assert_same_rows(made, expected, frames)


def test_buckets_equal_the_formula_at_every_border():
    borders = encoders.BORDERS[encoders.BORDERS < 1 << 40]
    assert len(borders) == 768  # floor((40 ln 2)^2)
    near = (borders[:, None] + np.arange(-2, 3)).ravel()
    values = np.unique(np.concatenate([near, np.arange(-50, 70_000), [-(1 << 31), 1 << 53]]))
    formula = [int(np.floor(np.log(v) ** 2)) if v > 2 else v for v in values.tolist()]
    assert encoders.buckets(values).tolist() == formula


def test_hash_encoding(tmp_path):
    frames = {split: random_frame(60, seed) for seed, split in enumerate(NAMES)}
    frames["val"].loc[0:3, "C26"] = ["FFFFFFFF", "ffffffff", "7", ""]
    frames["val"].loc[0:3, "I13"] = ["-1", "123456789", "1234", ""]
    for split, name in NAMES.items():
        (tmp_path / f"{name}.csv").write_bytes(to_text(frames[split]))
    assert run(tmp_path, tmp_path / "out", "--encoding", "hash", "--mod_idx", 1234) == 0
    made, info = read_local_ids(tmp_path / "out")
    expected = {}
    for split, frame in frames.items():
        integers = frame[INTEGERS].applymap(lambda text: int(text or "0") % 1234)
        expected[split] = pd.concat([integers, frame[CATEGORIES].applymap(lambda t: int(t or "0", 16) % 1234)], axis=1)
    assert_same_rows(made, expected, frames)
    assert [(f["table_size"], f["offset"]) for f in info["fields"]] == [(1234, 1234 * i) for i in range(39)]
    assert info["source"] == {"tool": "tools/criteo_parquet.py", "encoding": "hash",
                              "options": {"engine": "arrow", "seed": 2018, "mod_idx": 1234}}  # fmt: skip


def test_integers_written_as_floats(nasty, tmp_path):
    """pandas writes a column of integers with gaps as 1.0, 2.0, ..."""
    frames = {split: frame.copy() for split, frame in nasty[1].items()}
    for split, name in NAMES.items():
        floats = frames[split].copy()
        floats[["Label", *INTEGERS]] = floats[["Label", *INTEGERS]].applymap(lambda text: text and text + ".0")
        (tmp_path / f"{name}.csv").write_bytes(to_text(floats))
    assert run(tmp_path, tmp_path / "out") == 0
    assert_same_rows(read_local_ids(tmp_path / "out")[0], x4_reference(frames, 10)[0], frames)


def test_published_table_sizes():
    sizes = list(criteo_parquet.X4_TABLE_SIZES)
    assert len(sizes) == 39 and sum(sizes) == 910708 + 39  # FuxiCTR 1.x has one row per field less
    assert criteo_parquet.compare_with_published(sizes) == "the table sizes are those published for Criteo_x4"
    sizes[1] += 1
    text = "the table sizes of 1 of 39 fields differ from those published for Criteo_x4 (I2)"
    assert text in criteo_parquet.compare_with_published(sizes)


# ---------------------------------------------------------------------------------------------------------------- folds


@pytest.mark.parametrize("rows, share, first", [(14, 0.2, 0), (101, 0.5, 1), (1234, 0.25, 0), (5000, 0.03, 1)])
def test_folds_equal_scikit_learn(rows, share, first):
    labels = (np.random.default_rng(rows).random(rows) < share).astype(np.int8)
    labels[0] = first
    splits = StratifiedKFold(10, shuffle=True, random_state=2018).split(labels, labels)
    expected = np.empty(rows, int)
    with np.testing.suppress_warnings() as warnings:
        warnings.filter(UserWarning)  # fewer members than folds
        for fold, (_, members) in enumerate(splits):
            expected[members] = fold
    assert (stratified_folds(labels, "sklearn") == expected).all()


@pytest.mark.parametrize("rows, share", [(101, 0.5), (1234, 0.25), (200, 0.02)])
def test_folds_of_old_scikit_learn(rows, share):
    """Up to 0.21: one shuffled KFold per class, in the order of the labels, all drawing from one generator."""
    labels = (np.random.default_rng(rows).random(rows) < share).astype(np.int8)
    random, expected = np.random.RandomState(2018), np.empty(rows, int)
    for label in (0, 1):
        members = np.flatnonzero(labels == label)
        parts = KFold(10, shuffle=True, random_state=random).split(np.zeros(max(10, len(members))))
        for fold, (_, part) in enumerate(parts):
            expected[members[part[part < len(members)]]] = fold
    assert (stratified_folds(labels, "sklearn-0.19") == expected).all()


@pytest.mark.parametrize("style", ["kaggle", "gz", "csv in disguise", "words", "Words", "floats"])
def test_train_txt_is_split_by_folds(tmp_path, monkeypatch, style):
    monkeypatch.setattr(raw_files, "BLOCK_BYTES", 20_000)
    frame = random_frame(1003, 5)
    raw = tmp_path / "raw"
    raw.mkdir()
    if style == "kaggle":
        (raw / "train.txt").write_bytes(to_text(frame, "\t", header=False))
        (raw / "test.txt").write_bytes(b"\n".join(to_text(frame, "\t", header=False).split(b"\t")[1:41]))  # no labels
    elif style == "gz":
        (raw / "train.txt.gz").write_bytes(gzip.compress(to_text(frame, "\t", header=False, last_end=False)))
    elif style == "csv in disguise":
        (raw / "train.txt").write_bytes(to_text(frame, end="\r\n"))
    else:
        words = {"words": ("false", "true"), "Words": ("False", "True"), "floats": ("0.0", "1.0")}[style]
        labels = [words[int(label)] for label in frame["Label"]]
        (raw / "train.txt").write_bytes(to_text(frame.assign(Label=labels), "\t", header=False))
    assert run(raw, tmp_path / "out", "--min_categr_count", 3) == 0
    splitter = StratifiedKFold(10, shuffle=True, random_state=2018)
    folds = [members for _, members in splitter.split(frame, frame["Label"].astype(int))]
    members = {"test": folds[0], "val": folds[1], "train": np.sort(np.concatenate(folds[2:]))}
    frames = {split: frame.loc[members[split]].reset_index(drop=True) for split in NAMES}
    made, info = read_local_ids(tmp_path / "out")
    assert_same_rows(made, x4_reference(frames, 3)[0], frames)
    assert info["source"]["options"]["fold_rule"] == "sklearn"


def test_seed_changes_the_order_only_and_memory_nothing(nasty, tmp_path, monkeypatch):
    trains = []
    for number, (seed, memory) in enumerate([(1, 10**9), (1, 200_000), (2, 10**9)]):
        monkeypatch.setattr(convert, "GIGABYTE", memory)
        assert run(nasty[0], tmp_path / str(number), "--seed", seed) == 0
        trains.append(pq.read_table(tmp_path / str(number) / "train").to_pandas())
    assert trains[0].equals(trains[1])
    assert not trains[0].equals(trains[2])
    assert sorted_rows(trains[0]) == sorted_rows(trains[2])


# ------------------------------------------------------------------------------------------- days, growth, vocabularies


def write_days(folder, days):
    """{day: frame} as Criteo's 1 TB logs: day_0, day_1.gz, ..."""
    folder.mkdir()
    for number, frame in days.items():
        text = to_text(frame, "\t", header=False)
        if number % 2:
            (folder / f"day_{number}.gz").write_bytes(gzip.compress(text))
        else:
            (folder / f"day_{number}").write_bytes(text)


@pytest.mark.parametrize("options, val, test", [
    ([], [10], [11]), (["--val_days", "3", "--test_days", "0,11"], [3], [0, 11])])
def test_days_are_splits(tmp_path, options, val, test):
    days = {number: random_frame(60 + number, number) for number in (0, 1, 2, 3, 10, 11)}  # day_10 comes after day_3
    write_days(tmp_path / "raw", days)
    assert run(tmp_path / "raw", tmp_path / "out", "--min_categr_count", 3, *options) == 0
    members = {"val": val, "test": test, "train": [day for day in days if day not in val + test]}
    frames = {split: pd.concat([days[day] for day in members[split]], ignore_index=True) for split in NAMES}
    assert_same_rows(read_local_ids(tmp_path / "out")[0], x4_reference(frames, 3)[0], frames)


@pytest.mark.parametrize("days, options, message", [
    ([0, 1], [], "there are 2 days (day_0, day_1.gz (2)), expected at least 3"),
    ([0, 1, 2], ["--val_days", "1"], "--val_days and --test_days go together"),
    ([0, 1, 2], ["--val_days", "7", "--test_days", "2"], "there is no day_7"),
    ([0, 1, 2], ["--val_days", "2", "--test_days", "2"], "day_2 is both in --val_days and in --test_days"),
])
def test_days_that_do_not_fit(tmp_path, capsys, days, options, message):
    write_days(tmp_path / "raw", {number: random_frame(20, number) for number in days})
    assert run(tmp_path / "raw", tmp_path / "out", *options) == 1
    assert message in one_error(capsys)


def test_files_that_shadow_each_other(tmp_path, capsys):
    """Of two data sets, or two files of one name, neither is chosen in silence."""
    write_inputs(tmp_path / "raw", train_csv=None, valid_csv=None, test_csv=None)
    text = to_text(random_frame(50, 1), "\t", header=False)
    for name, content, message in [("train.txt", text, "has both train.csv and train.txt"),
                                   ("day_0", text, "has both train.csv and day_0"),
                                   ("valid.csv.gz", gzip.compress(text), "has both valid.csv and valid.csv.gz")]:
        (tmp_path / "raw" / name).write_bytes(content)
        assert run(tmp_path / "raw", tmp_path / "out") == 1
        assert message in one_error(capsys)
        (tmp_path / "raw" / name).unlink()


def test_new_rows_and_growth(nasty, tmp_path, capsys):
    """Rows encoded later have the ids of the conversion; a grown dataset keeps them."""
    folder, frames = nasty
    assert run(folder, tmp_path / "one") == 0
    made, info = read_local_ids(tmp_path / "one")
    expected, _ = x4_reference(frames, 10)
    old = encoders.Encoder.load(tmp_path / "one")
    local = old.encode(frames["test"]) - np.array(list(old.offsets.values()))
    assert (local == expected["test"].values).all()
    (tmp_path / "new.txt").write_bytes(to_text(frames["val"], "\t", header=False))  # and without labels
    (tmp_path / "bare.txt").write_bytes(b"".join(line.split(b"\t", 1)[1] for line in (
        to_text(frames["val"], "\t", header=False).splitlines(True))))
    for name in ("new.txt", "bare.txt"):
        assert encode_rows.main(["--dataset", str(tmp_path / "one"), "--input", str(tmp_path / name), "--output_dir",
                                 str(tmp_path / f"ids-{name}")]) == 0
        ids = pq.read_table(tmp_path / f"ids-{name}").to_pandas()
        assert ("Label" in ids) == (name == "new.txt")
        local = ids[INTEGERS + CATEGORIES].values - np.array(list(old.offsets.values()))
        assert (local == expected["val"].values).all()
    assert run(folder, tmp_path / "two", "--base", tmp_path / "one") == 0  # every count doubles
    new = encoders.Encoder.load(tmp_path / "two")
    check_growth(old.info, new)
    c1 = new.fields[13].vocabulary
    assert c1.texts.to_pylist() == ["0000000c", "0000000b", "0000000a"] and c1.counts.tolist() == [22, 20, 18]
    moved = row_map(old.info, new.info)
    before, after = old.encode(frames["test"]), new.encode(frames["test"])
    same = before - np.array(list(old.offsets.values())) != [field.oov for field in old.fields]
    assert (moved[before] == after)[same].all()
    assert run(folder, tmp_path / "three", "--base", tmp_path / "one", "--encoding", "hash") == 1
    assert "field I1 is encoded there as bucket" in one_error(capsys)


# ---------------------------------------------------------------------------------------------------------------- spark


@needs_spark
def test_spark_equals_arrow(nasty, tmp_path, run_on_spark):
    scratch = tmp_path / "scratch"
    assert run(nasty[0], tmp_path / "arrow") == 0
    status, output, errors = run_on_spark(
        "criteo_parquet", "--input_dir", nasty[0], "--output_dir", tmp_path / "spark", "--spark_tmp_dir", scratch,
        cores=1, block_bytes=60_000)
    assert (status, errors) == (0, "")
    steps = [line.split(" rows/s")[0].rsplit(" ", 1)[0] for line in output.splitlines()]
    assert steps[-5:-1] == [f"{step}: 660 rows," for step in ("counting tokens", "encoding", "sorting", "writing")]
    for split in NAMES:
        assert pq.read_table(tmp_path / "spark" / split).equals(pq.read_table(tmp_path / "arrow" / split))
    infos = [json.loads((tmp_path / engine / "dataset_info.json").read_text()) for engine in ("arrow", "spark")]
    assert [info["source"]["options"].pop("engine") for info in infos] == ["arrow", "spark"]
    assert infos[0] == infos[1]
    assert os.listdir(scratch) == []


@needs_spark
def test_spark_on_packed_files_and_bad_lines(tmp_path, run_on_spark):
    """Workers unpack and count; folds are dealt by the labels that they have seen; a bad line is named as on arrow."""
    frame = random_frame(1003, 5)
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "train.txt.gz").write_bytes(gzip.compress(to_text(frame, "\t", header=False, last_end=False)))
    frame.loc[700, "Label"] = "7"
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "train.txt").write_bytes(to_text(frame, "\t", header=False))
    assert run(tmp_path / "raw", tmp_path / "arrow", "--min_categr_count", 3) == 0
    here = f"../{tmp_path.name}"  # relative paths
    done = {folder: run_on_spark("criteo_parquet", "--input_dir", f"{here}/{folder}", "--output_dir",
                                 f"{here}/spark-{folder}", "--min_categr_count", 3, block_bytes=60_000)
            for folder in ("raw", "bad")}
    assert done["raw"][::2] == (0, "")
    assert done["bad"][::2] == (1, f"error: {here}/bad/train.txt, line 701: label '7', expected 0 or 1\n")
    assert sorted(os.listdir(tmp_path)) == ["arrow", "bad", "raw", "spark-raw"]
    for split in NAMES:
        assert pq.read_table(tmp_path / "spark-raw" / split).equals(pq.read_table(tmp_path / "arrow" / split))


def test_spark_without_java(nasty, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("JAVA_HOME", raising=False)
    assert run(nasty[0], tmp_path / "out", "--engine", "spark") == 1
    assert capsys.readouterr().err.startswith("error: --engine spark needs Java")
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    assert run(nasty[0], tmp_path / "out", "--engine", "spark") == 1
    assert f"which is not in JAVA_HOME {tmp_path}; install it" in capsys.readouterr().err


@pytest.mark.skipif(not shutil.which("java"), reason="needs Java")
def test_spark_without_pyspark(nasty, tmp_path, monkeypatch, capsys):
    for name in ("pyspark", "pyspark.sql"):
        monkeypatch.setitem(sys.modules, name, None)
    assert run(nasty[0], tmp_path / "out", "--engine", "spark") == 1
    error = capsys.readouterr().err
    assert "needs PySpark (" in error and "run `bash tools/setup_env.sh spark`, or use --engine arrow" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("number, error", [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_signals_wait_until_spark_has_started(number, error):
    """A start that is broken off leaves a Java process behind."""
    ours = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: lambda *_: sys.exit(143)}
    before = {which: signal.signal(which, handler) for which, handler in ours.items()}
    started = False
    try:
        with pytest.raises(error), spark_engine.signals_held():
            os.kill(os.getpid(), number)
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # as Spark does
            started = True
        assert {which: signal.getsignal(which) for which in ours} == ours
    finally:
        for which, handler in before.items():
            signal.signal(which, handler)
    assert started


def test_spark_errors_are_one_line():
    java = "An error occurred while calling o36.range.\n: java.lang.IllegalStateException: stopped\n\tat a.B(C.java:1)"
    shown = str(spark_engine.worker_error(RuntimeError(java)))
    assert shown.startswith("Spark failed: java.lang.IllegalStateException: stopped; check Java and --spark_master")
    worker = RuntimeError("Traceback:\n  tools.trainer.cli.UserError: x.csv, line 3: no\n\tat org.apache")
    assert str(spark_engine.worker_error(worker)) == "x.csv, line 3: no"


def test_share_of_tasks():
    class Item:
        def __init__(self, **fields):
            self.__dict__.update(fields)

    stages = {1: Item(numTasks=3, numCompletedTasks=3), 2: Item(numTasks=5, numCompletedTasks=1), 3: None}
    tracker = Item(getJobIdsForGroup=lambda _: [7, 8], getStageInfo=stages.get,
                   getJobInfo={7: Item(stageIds=[1]), 8: Item(stageIds=[2, 3])}.get)  # fmt: skip
    assert spark_engine.share_of_tasks(tracker, "sorting") == 0.5


# ------------------------------------------------------------------------------------------------------------ bad input


def assert_nothing_left(folder, *allowed):
    """No output folder and no hidden or scratch folder beside it."""
    assert set(os.listdir(folder)) <= {"raw", *allowed}


def one_error(capsys):
    shown = capsys.readouterr().err
    assert shown.startswith("error: ") and shown.count("\n") == 1
    return shown


BAD_LINES = {
    "39 columns": (lambda row: row[:-1], "39 columns, expected 40"),
    "41 columns": (lambda row: row + ["x"], "41 columns, expected 40"),
    "empty line": (lambda row: [""], "1 columns, expected 40"),
    "word": (lambda row: row[:5] + ["abc"] + row[6:], "I5 is 'abc', expected a whole number"),
    "fraction": (lambda row: row[:5] + ["1.5"] + row[6:], "I5 is '1.5', expected a whole number"),
    "infinite": (lambda row: row[:5] + ["inf"] + row[6:], "I5 is 'inf', expected a whole number"),
    "too large": (lambda row: row[:5] + ["1" * 19] + row[6:], "I5 is '1111111111111111111', expected a whole number"),
    "carriage return": (lambda row: row[:20] + ["ab\rcd"] + row[21:], "a carriage return inside the line"),
    "zero byte": (lambda row: row[:20] + ["ab\0"] + row[21:], "a zero byte"),
    "hidden character": (lambda row: ["\ufeff1"] + row[1:], r"label '\ufeff1', expected 0 or 1"),
    "label 2": (lambda row: ["2"] + row[1:], "label '2', expected 0 or 1"),
    "no label": (lambda row: [""] + row[1:], "label '', expected 0 or 1"),
    "label word": (lambda row: ["yes"] + row[1:], "label 'yes', expected 0 or 1"),
}


@pytest.mark.parametrize("kind", BAD_LINES)
@pytest.mark.parametrize("kaggle", [True, False])
def test_bad_line_is_named(tmp_path, capsys, monkeypatch, kind, kaggle):
    monkeypatch.setattr(raw_files, "BLOCK_BYTES", 3000)
    spoil, message = BAD_LINES[kind]
    rows = random_frame(100, 3).values.tolist()
    rows[57] = spoil(rows[57])
    raw = tmp_path / "raw"
    raw.mkdir()
    if kaggle:
        (raw / "train.txt").write_text("".join("\t".join(row) + "\n" for row in rows))
        place = f"{raw}/train.txt, line 58: "
    else:
        for name in ("train", "test"):
            (raw / f"{name}.csv").write_bytes(to_text(random_frame(20, 4)))
        (raw / "valid.csv").write_text("".join(",".join(row) + "\n" for row in [COLUMNS] + rows))
        place = f"{raw}/valid.csv, line 59: "
    assert run(raw, tmp_path / "out") == 1
    assert f"error: {place}{message}" in one_error(capsys)
    assert_nothing_left(tmp_path)


@pytest.mark.parametrize("token", ["12g", "123456789"])
def test_hash_refuses_what_is_not_hexadecimal(tmp_path, capsys, token):
    raw = tmp_path / "raw"
    raw.mkdir()
    frame = random_frame(50, 3)
    frame.loc[30, "C7"] = token
    (raw / "train.txt").write_bytes(to_text(frame, "\t", header=False))
    assert run(raw, tmp_path / "out", "--encoding", "hash") == 1
    assert f"line 31: C7 is '{token}', expected up to 8 hexadecimal digits" in one_error(capsys)
    assert_nothing_left(tmp_path)


def write_inputs(raw, **texts):
    raw.mkdir(exist_ok=True)
    good = to_text(random_frame(30, 1))
    for name, text in texts.items():
        (raw / name.replace("_", ".")).write_bytes(good if text is None else text)


@pytest.mark.parametrize(
    "texts, message",
    [
        ({}, "has neither train.txt nor train.csv, valid.csv, test.csv"),
        ({"train_csv": None, "test_csv": None}, "has no valid.csv"),
        ({"train_csv": None}, "has no valid.csv and no test.csv"),
        ({"train_csv": b"", "valid_csv": None, "test_csv": None}, "train.csv is empty"),
        ({"train_csv": to_text(random_frame(0, 0)), "valid_csv": None, "test_csv": None}, "train.csv has a header but"),
        ({"train_csv": b"Label,I2\n1,2\n", "valid_csv": None, "test_csv": None}, "has the header Label,I2, expected"),
        ({"train_txt": to_text(random_frame(9, 0), "\t", header=False)}, "train.txt has 9 rows, expected at least 10"),
        ({"train_txt": gzip.compress(to_text(random_frame(900, 0), "\t"))[:-99]}, "train.txt is not a whole gzip file"),
    ],
)
def test_bad_inputs(tmp_path, capsys, texts, message):
    write_inputs(tmp_path / "raw", **texts)
    assert run(tmp_path / "raw", tmp_path / "out") == 1
    assert message in one_error(capsys)
    assert_nothing_left(tmp_path)


def test_input_dir_is_missing(tmp_path, capsys):
    assert run(tmp_path / "raw", tmp_path / "out") == 1
    assert one_error(capsys) == f"error: --input_dir {tmp_path / 'raw'} is not a folder\n"
    assert_nothing_left(tmp_path)


def test_existing_output(nasty, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("")
    assert run(nasty[0], out) == 1
    assert one_error(capsys) == f"error: --output_dir {out} exists already; choose another folder or add --overwrite\n"
    assert run(nasty[0], out, "--overwrite") == 1
    assert "is no dataset: it holds old (1) and no dataset_info.json" in one_error(capsys)
    assert os.listdir(out) == ["old"]
    (out / "old").unlink()
    assert run(nasty[0], out, "--overwrite", "--export_dataset_info") == 0
    assert sorted(os.listdir(out)) == ["README.md", "dataset_info.json", "test", "train", "val", "vocabulary"]
    shown = capsys.readouterr().out
    assert (out / "README.md").read_text() in shown and (out / "dataset_info.json").read_text() in shown
    assert_nothing_left(tmp_path, "out")


def test_output_around_the_input(tmp_path, capsys):
    """--overwrite would delete the raw files."""
    write_inputs(tmp_path / "raw", train_csv=None, valid_csv=None, test_csv=None)
    (tmp_path / "link").symlink_to(tmp_path / "raw")
    for output in ("raw", "link", "."):
        assert run(tmp_path / "raw", tmp_path / output, "--overwrite") == 1
        assert "holds the input; choose another folder" in one_error(capsys)
    assert sorted(os.listdir(tmp_path / "raw")) == ["test.csv", "train.csv", "valid.csv"]


@pytest.mark.parametrize("memory, workers", [(10**9, 64), (60_000, 5), (100, 1)])
def test_memory_limits_the_blocks_in_flight(nasty, tmp_path, monkeypatch, memory, workers):
    pools, pool = [], arrow_engine.ThreadPoolExecutor
    monkeypatch.setattr(arrow_engine, "ThreadPoolExecutor", lambda workers: (pools.append(workers), pool(1))[1])
    monkeypatch.setattr(arrow_engine, "num_cpus", lambda: 64)
    monkeypatch.setattr(raw_files, "BLOCK_BYTES", 5000)
    monkeypatch.setattr(convert, "GIGABYTE", memory)
    assert run(nasty[0], tmp_path / "out", "--memory_gb", "5") == 0
    assert set(pools[:-1]) == {workers}  # the last one writes the vocabularies


def test_counts_are_freed_before_rows_are_written(nasty, tmp_path, monkeypatch):
    """Those of all tokens when the writing begins, those of rare ones as soon as they are in their files."""
    counters, fields, write = [], [], arrow_engine.write_splits

    def watch(job, spools):
        assert counters[0]() is None
        assert any(len(field.rare[0]) for field in job.maker.fields)
        fields.extend(job.maker.fields)
        return write(job, spools)

    make = arrow_engine.TokenCounter
    monkeypatch.setattr(arrow_engine, "TokenCounter", lambda *args: (
        counter := make(*args), counters.append(weakref.ref(counter)))[0])
    monkeypatch.setattr(arrow_engine, "write_splits", watch)
    assert run(nasty[0], tmp_path / "out", "--min_categr_count", "3") == 0
    assert len(fields) == 39 and all(field.rare is None or not len(field.rare[0]) for field in fields)


@pytest.mark.parametrize("stage", ["spool", "parquet"])
def test_full_disk(nasty, tmp_path, capsys, monkeypatch, stage):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    targets = {"spool": "tools.converter.spool.RowSpool.append", "parquet": "pyarrow.parquet.ParquetWriter.write_table"}
    monkeypatch.setattr(targets[stage], full)
    assert run(nasty[0], tmp_path / "out", "--spark_tmp_dir", tmp_path / "scratch") == 1
    assert one_error(capsys).startswith("error: no space left on the disk")
    assert_nothing_left(tmp_path, "scratch")
    assert os.listdir(tmp_path / "scratch") == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_no_permission(nasty, tmp_path, capsys):
    (tmp_path / "raw").mkdir(mode=0o500)
    assert run(nasty[0], tmp_path / "raw" / "out") == 1
    assert one_error(capsys).startswith("error: no permission (")


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_killed_while_writing(nasty, tmp_path, number, code):
    script = (
        "import sys, time, criteo_parquet as tool\n"
        "from tools.converter.writer import SplitWriter\n"
        "SplitWriter.write = lambda *_: (print('writing now', flush=True), time.sleep(60))\n"
        "sys.exit(tool.main(sys.argv[1:]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, "--input_dir", nasty[0], "--output_dir", tmp_path / "out"], env={**os.environ,
        "PYTHONPATH": str(ROOT / "tools")}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # fmt: skip
    while "writing now" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(number)
    error = process.communicate(timeout=30)[1]
    assert process.returncode == code
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.rglob("dataset_info.json"))  # what SIGKILL leaves is hidden and has no such file
    if number != signal.SIGKILL:
        assert error.startswith("error: ") and f"nothing was written to {tmp_path / 'out'}" in error
        assert_nothing_left(tmp_path)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--min_categr_count", "0"], "argument --min_categr_count: 0 must be at least 1"),
        (["--mod_idx", "x"], "argument --mod_idx: 'x' is not a whole number"),
        (["--mod_idx", str(1 << 31)], f"argument --mod_idx: {1 << 31} must be at most {(1 << 31) - 1}"),
        (["--spark_master", "here"], "argument --spark_master: 'here', expected local[*], local[2], yarn, spark://"),
        (["--memory_gb", "-1"], "argument --memory_gb: -1 must be at least 0.1"),
        (["--seed", "-1"], "argument --seed: -1 must be at least 0"),
    ],
)
def test_bad_options(tmp_path, capsys, options, message):
    with contextlib.suppress(SystemExit):
        run(tmp_path, tmp_path / "out", *options)
    assert message in capsys.readouterr().err
