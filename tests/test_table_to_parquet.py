"""tools/table_to_parquet.py and tools/encode_rows.py: every kind of field against a plain reading of what a dataset
says about itself; splits, growth, carried columns, both engines, proposals, and bad input."""

import contextlib
import gzip
import io
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys

import encode_rows
import inspect_dataset
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import table_to_parquet
from conftest import needs_spark

from tools.converter import convert, describe, encoders, rows, vocabulary
from tools.converter import raw as raw_files
from tools.converter.encoders import Encoder
from tools.converter.info import check_growth, row_map
from tools.trainer.cli import UserError
from tools.trainer.dataset import read_dataset
from tools.trainer.dataset_info import is_readable

SPLITS = ("train", "val", "test")
NAMES = ["user_id", "item", "title", "price", "stock", "tags", "device", "clicked", "request"]
OPTIONS = ["--label", "clicked", "--categorical", "user_id,item,title", "--numeric", "price,stock", "--numeric_bins",
           "price=7", "--list", "tags", "--list_length", "3", "--hash", "device=11", "--keep", "request,item",
           "--min_count", "2", "--min_count", "title=3"]  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- reference


def fnv1a64(text):
    value = 0xCBF29CE484222325
    for byte in text.encode():
        value = (value ^ byte) * 0x100000001B3 % 2**64
    return value


def plain_ids(folder, cells):
    """Global ids by column of {raw column: texts}, from dataset_info.json and vocabulary/ and nothing else."""
    columns = {}
    for field in json.loads((folder / "dataset_info.json").read_text())["fields"]:
        how = field["encoding"]
        words = pq.read_table(folder / how["vocabulary"]).to_pydict() if "vocabulary" in how else {}
        ids = dict(zip(words.get("token", ()), words.get("id", ())))

        def one(text, how=how, ids=ids):
            if text == "":
                return how["missing"]["id"]
            if how["kind"] == "bucket":
                value = int(float(text) if how["cut"] is None else min(max(float(text), how["cut"][0]), how["cut"][1]))
                text = str(math.floor(math.log(value) ** 2) if value > 2 else value)
            if how["kind"] in ("category", "bucket"):
                return ids.get(text, how["oov"])
            if how["kind"] == "quantile":
                return how["first_id"] + sum(border <= float(text) for border in how["borders"])
            number = fnv1a64(text) if how["kind"] == "hash" else int(text, how["base"])
            return how["first_id"] + number % how["modulus"]

        texts = cells[field["raw_column"]]
        if "list" in how:
            length = how["list"]["length"]
            listed = [[one(part) for part in text.split(how["list"]["separator"]) if part][:length] for text in texts]
            values = list(zip(*[row + [0] * (length - len(row)) for row in listed]))
        else:
            values = [[one(text) for text in texts]]
        columns.update({name: np.add(column, field["offset"]).tolist()
                        for name, column in zip(field.get("columns", [field["name"]]), values)})
    return columns


# ---------------------------------------------------------------------------------------------------------------- data


def cells_of(count, seed):
    """{column: texts} of rows with all that is nasty in tables; `request` names the row."""
    rng = np.random.default_rng(seed)
    words = ["", "a", "Gerät", "价格", "exactly8", "nine char", "a long token, quoted", 'say "hi"', " blank ", "A",
             "-1", "1.0", "a long token, quoted!", "null", "nan", "0", "é" * 40]  # fmt: skip
    tags = ["rock", "pop", "", "a tag of more than eight bytes", "ü", "x"]
    stock = rng.choice(["", "-3", "0", "1", "2", "3", "7", "8", "1000", "-70000000000", "1e300", "2.9", "65536"], count)
    return {
        "user_id": [f"user_{i:07d}" for i in rng.zipf(1.4, count) % 60],
        "item": [str(i - 20) for i in rng.zipf(1.5, count) % 50],
        "title": rng.choice(words, count).tolist(),
        "price": [f"{value:.3g}" if value > 0.3 else "" for value in rng.lognormal(1, 2, count)],
        "stock": stock.tolist(),
        "tags": ["|".join(rng.choice(tags, size)) for size in rng.integers(0, 6, count)],
        "device": rng.choice(["", "phone", "tablet of a long name", "价"], count).tolist(),
        "clicked": rng.choice(["0", "1"], count).tolist(),
        "request": [f"{seed}-{i}" for i in range(count)],
    }


def write_csv(path, cells, separator=",", end="\n"):
    lines = [list(cells)] + [list(row) for row in zip(*cells.values())]

    def quoted(text):
        return '"' + text.replace('"', '""') + '"' if separator in text or '"' in text else text

    text = "".join(separator.join(map(quoted, line)) + end for line in lines).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


def write_parquet(path, cells, rows_per_group=150):
    """The same rows with the types that a data frame would have."""
    columns = {name: pa.array([text or None for text in texts]) for name, texts in cells.items()}
    columns["item"] = pa.array([int(text) for text in cells["item"]])
    columns["price"] = pa.array([float(text) if text else None for text in cells["price"]])
    columns["stock"] = pa.array([float(text) if text else np.nan for text in cells["stock"]])
    columns["clicked"] = pa.array([text == "1" for text in cells["clicked"]])
    columns["user_id"] = columns["user_id"].dictionary_encode()
    columns["tags"] = pa.array([text.split("|") if text else None for text in cells["tags"]])
    pq.write_table(pa.table(columns), path, row_group_size=rows_per_group)
    return path


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """({split: cells}, folder with {train,val,test}.{csv,parquet})"""
    folder = tmp_path_factory.mktemp("tables")
    cells = {split: cells_of(count, seed) for seed, (split, count) in enumerate(zip(SPLITS, (700, 150, 130)))}
    for split, part in cells.items():
        write_csv(folder / f"{split}.csv", part)
        write_parquet(folder / f"{split}.parquet", part)
    return cells, folder


def run(output_dir, *options, overwrite=False):
    return table_to_parquet.main([*map(str, options), "--output_dir", str(output_dir)] + ["--overwrite"] * overwrite)


def inputs(folder, ending):
    return ["--input", folder / f"train.{ending}", "--val_input", folder / f"val.{ending}", "--test_input",
            folder / f"test.{ending}"]


def encode(dataset, path, output_dir, *options):
    return encode_rows.main(["--dataset", str(dataset), "--input", str(path), "--output_dir", str(output_dir),
                             *map(str, options)])


def one_error(capsys):
    shown = capsys.readouterr().err
    assert shown.startswith("error: ") and shown.count("\n") == 1, shown
    return shown


def assert_ids(table, expected):
    for name, values in expected.items():
        assert table[name].to_pylist() == values, name


# ---------------------------------------------------------------------------------------------------------- round trips


def commands(folder, ending, made):
    """[(tool, arguments)]: a conversion, new rows of each split, and a growth, into the folder `made`."""
    new = [("encode_rows", ["--dataset", made / "d", "--input", folder / f"{split}.{ending}",
                            "--output_dir", made / split]) for split in SPLITS]
    return [("table_to_parquet", [*inputs(folder, ending), *OPTIONS, "--output_dir", made / "d"]), *new,
            ("table_to_parquet", ["--base", made / "d", "--input", folder / f"day2.{ending}",
                                  "--output_dir", made / "grown"])]


@pytest.fixture(scope="module")
def made(run_on_spark, tables, tmp_path_factory):
    """Folder with what `commands` make: arrow/{csv,parquet}, and spark/{csv,parquet} where Spark runs."""
    _, folder = tables
    for write, ending in ((write_csv, "csv"), (write_parquet, "parquet")):
        write(folder / f"day2.{ending}", cells_of(900, 9))
    root, errors = tmp_path_factory.mktemp("made"), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(errors):
        patch.setattr(raw_files, "BLOCK_BYTES", 20_000)  # so that there are several tasks
        for ending in ("csv", "parquet"):
            for tool, options in commands(folder, ending, root / "arrow" / ending):
                assert sys.modules[tool].main([*map(str, options), "--memory_gb", "1"]) == 0
    assert errors.getvalue() == ""
    if run_on_spark:
        for ending, chosen in (("csv", [0, 2, 4]), ("parquet", [0])):  # each takes seconds
            todo = commands(folder, ending, root / "spark" / ending)
            for tool, options in [todo[number] for number in chosen]:
                status, output, errors = run_on_spark(tool, *options)
                assert (status, errors) == (0, ""), output + errors
    return root


@pytest.mark.parametrize("ending", ["csv", "parquet"])
@pytest.mark.parametrize("engine", ["arrow", pytest.param("spark", marks=needs_spark)])
def test_raw_value_to_id_three_ways(tables, made, ending, engine):
    """The conversion, encode_rows and a plain reading of the dataset's own description agree on every row."""
    cells, _ = tables
    folder = made / engine / ending
    assert (folder / "val").exists() or (engine, ending) == ("spark", "parquet")
    for split in SPLITS:
        table = pq.read_table(folder / "d" / split)
        wanted = {request: i for i, request in enumerate(cells[split]["request"])}
        order = [wanted[request] for request in table["request"].to_pylist()]
        assert sorted(order) == list(range(len(order))) and (order == sorted(order)) == (split != "train")
        part = {name: [texts[i] for i in order] for name, texts in cells[split].items()}
        assert_ids(table, plain_ids(folder / "d", part))
        assert table["Label"].to_pylist() == list(map(float, part["clicked"]))
        assert list(map(str, table["raw_item"].to_pylist())) == part["item"]
        if (folder / split).exists():  # not all are made on Spark
            assert_ids(pq.read_table(folder / split), plain_ids(folder / "d", cells[split]))


@needs_spark
@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_spark_equals_arrow(made, ending):
    """The same rows in the same order, also of a growth; the same vocabularies and descriptions."""
    for name in ("d", "grown") if ending == "csv" else ("d",):
        one, two = made / "arrow" / ending / name, made / "spark" / ending / name
        for split in SPLITS:
            assert pq.read_table(one / split).equals(pq.read_table(two / split))
        assert sorted(os.listdir(one / "vocabulary")) == sorted(os.listdir(two / "vocabulary"))
        for file in os.listdir(one / "vocabulary"):
            assert (one / "vocabulary" / file).read_bytes() == (two / "vocabulary" / file).read_bytes(), file
        infos = [json.loads((folder / "dataset_info.json").read_text()) for folder in (one, two)]
        for info in infos:
            info["source"]["options"] = {}
        assert infos[0] == infos[1]


@pytest.fixture(scope="module")
def dataset(tables, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dataset") / "d"
    assert run(folder, *inputs(tables[1], "csv"), *OPTIONS) == 0
    return folder


def test_files_and_data_frames_of_the_same_values_have_the_same_ids(tables, dataset, tmp_path):
    """CSV, TSV, gz, parquet and a data frame: one rule for all."""
    cells, folder = tables
    expected = plain_ids(dataset, cells["val"])
    assert run(tmp_path / "from_parquet", *inputs(folder, "parquet"), *OPTIONS) == 0
    fingerprints = [Encoder.load(d).fingerprint for d in (dataset, tmp_path / "from_parquet")]
    assert fingerprints[0] == fingerprints[1]
    write_csv(tmp_path / "val.tsv.gz", cells["val"], "\t", "\r\n")
    for number, path in enumerate([folder / "val.parquet", tmp_path / "val.tsv.gz"]):
        assert encode(dataset, path, tmp_path / f"out{number}") == 0
        assert_ids(pq.read_table(tmp_path / f"out{number}"), expected)
    encoder = Encoder.load(dataset)
    frame = pq.read_table(folder / "val.parquet").to_pandas()
    ids = encoder.encode(frame[frame.columns[::-1]])
    assert ids.dtype == np.int32 and ids.T.tolist() == [expected[name] for name in encoder.columns]


def test_encoder_is_a_value(tables, dataset, tmp_path):
    encoder = Encoder.load(dataset)
    encoder.save(tmp_path / "copy")
    copy = Encoder.load(tmp_path / "copy")
    assert copy.fingerprint == encoder.fingerprint and copy.info == encoder.info
    cells = pd.DataFrame(tables[0]["test"])
    assert (copy.encode(cells) == encoder.encode(cells)).all()
    assert encoder.raw_columns == {"user_id": "category", "item": "category", "title": "category", "price": "quantile",
                                   "stock": "bucket", "tags": "category", "device": "hash"}
    assert encoder.label == "clicked"
    unknown = np.zeros(7, np.int64)
    new = {"user_id": ["nobody", "", "user_0000001"], "item": [10**6, None, 10**7], "title": ["never seen before"] * 3,
           "price": [None, "1", "2"], "stock": ["123456789", "", "1"], "tags": ["rock|never|seen", "", "x|jazz"],
           "device": ["a", "b", "c"]}  # fmt: skip
    encoder.encode(new, unknown)
    assert unknown.tolist() == [1, 2, 3, 0, 1, 3, 0]
    lists = pa.array([["rock", "pop"], ["x", "jazz"], ["", "x"]])
    ids = [encoder.encode({**new, "tags": tags}) for tags in (lists, lists.cast(pa.list_(pa.string(), 2)))]
    assert (ids[0] == ids[1]).all()
    with pytest.raises(UserError, match="no column user_id"):
        encoder.encode({"item": [1]})


def test_unlabelled_rows_and_unknown_values(tables, dataset, tmp_path, capsys):
    cells = {name: texts for name, texts in tables[0]["test"].items() if name not in ("clicked", "request")}
    cells["user_id"][:13], cells["tags"][0] = ["nobody"] * 13, "nothing known"
    write_csv(tmp_path / "new.csv", {"more": ["x"] * 130, **cells})
    assert encode(dataset, tmp_path / "new.csv", tmp_path / "out", "--keep", "more,user_id") == 0
    shown = capsys.readouterr().out
    known = set(pq.read_table(dataset / "vocabulary" / "user_id.parquet")["token"].to_pylist())
    count = sum(user not in known for user in cells["user_id"])
    assert count >= 13 and f"unknown values, by field: user_id {count} ({100 * count / 130:.2f} %), item " in shown
    assert re.search(r" tags \d+, ", shown)  # no share: lists may be of any length
    assert "130 rows without labels" in shown
    table = pq.read_table(tmp_path / "out")
    assert_ids(table, plain_ids(dataset, cells))
    assert "Label" not in table.column_names and table["raw_user_id"].to_pylist() == cells["user_id"]
    info = json.loads((tmp_path / "out" / "_dataset_info.json").read_text())
    assert info["fingerprint"] == Encoder.load(dataset).fingerprint and info["unknown"]["user_id"] == count
    assert info["num_samples"] == {"rows": 130} and info["label"] is None and info["carried"] == ["more", "raw_user_id"]


def test_encoded_rows_are_no_dataset(tables, dataset, tmp_path, capsys):
    """Whoever takes them for one is told what they are."""
    write_csv(tmp_path / "new.csv", tables[0]["test"])
    out = tmp_path / "out"
    assert encode(dataset, tmp_path / "new.csv", out) == 0
    expected = (f"{out} holds rows that tools/encode_rows.py encoded, not a dataset with train/, val/ and test/; score "
                f"them with deepfm_train_eval.py --predict {out}, or give the dataset's folder")
    capsys.readouterr()
    assert inspect_dataset.main([str(out)]) == 1 and capsys.readouterr() == ("", f"error: {expected}\n")
    assert encode(out, tmp_path / "new.csv", tmp_path / "again") == 1
    assert capsys.readouterr().err == f"error: {expected}\n"
    with pytest.raises(UserError) as raised:
        read_dataset(str(out))
    assert str(raised.value) == expected


def test_ids_do_not_depend_on_memory_or_blocks(tables, tmp_path, monkeypatch):
    """Tokens with texts of their own are put on disk and come back; so are carried columns."""
    _, folder = tables
    assert run(tmp_path / "one", *inputs(folder, "csv"), *OPTIONS) == 0
    spills, spill = [], vocabulary.TokenCounter._spill
    monkeypatch.setattr(vocabulary.TokenCounter, "_spill", lambda self: (spills.append(1), spill(self)))
    monkeypatch.setattr(raw_files, "BLOCK_BYTES", 3000)
    monkeypatch.setattr(convert, "GIGABYTE", 9000)
    assert run(tmp_path / "two", *inputs(folder, "csv"), *OPTIONS) == 0
    assert len(spills) > 2
    for split in SPLITS:
        assert pq.read_table(tmp_path / "one" / split).equals(pq.read_table(tmp_path / "two" / split))
    for name in os.listdir(tmp_path / "one" / "vocabulary"):
        one, two = ((tmp_path / d / "vocabulary" / name).read_bytes() for d in ("one", "two"))
        assert one == two, name
    infos = [json.loads((tmp_path / d / "dataset_info.json").read_text()) for d in ("one", "two")]
    assert infos[0] == infos[1]


def test_quantiles_hold_equal_shares(tmp_path, monkeypatch):
    """Also where only a sample of the rows is looked at, and where values repeat."""
    values = np.random.default_rng(0).normal(size=40_000)
    frame = pd.DataFrame({"x": values, "y": np.round(values), "label": values > 0})
    frame.to_parquet(tmp_path / "t.parquet")
    for sample in (rows.SAMPLE_ROWS, 8000):
        monkeypatch.setattr(rows, "SAMPLE_ROWS", sample)
        assert run(tmp_path / "d", "--input", tmp_path / "t.parquet", "--label", "label", "--numeric", "x,y",
                   "--numeric_bins", "8", overwrite=True) == 0
        train = pq.read_table(tmp_path / "d" / "train").to_pandas()
        shares = train["x"].value_counts(normalize=True)
        assert len(shares) == 8 and shares.between(0.105, 0.145).all()
        info = json.loads((tmp_path / "d" / "dataset_info.json").read_text())
        assert set(info["fields"][1]["encoding"]["borders"]) <= set(range(-5, 6))


# --------------------------------------------------------------------------------------------------------------- growth


def grow(base, path, output_dir, *options):
    return run(output_dir, "--base", base, "--input", path, *options)


def test_growth_keeps_every_id(tables, dataset, tmp_path):
    cells = cells_of(900, 9)
    cells["user_id"][:300] = [f"new user {i % 100}" for i in range(300)]
    write_csv(tmp_path / "day2.csv", cells)
    assert grow(dataset, tmp_path / "day2.csv", tmp_path / "d2") == 0
    old, new = Encoder.load(dataset), Encoder.load(tmp_path / "d2")
    for before, after in zip(old.fields, new.fields):
        if before.vocabulary is not None:
            size = len(before.vocabulary)
            assert after.vocabulary.texts[:size].equals(before.vocabulary.texts)
            assert len(after.vocabulary) >= size
            assert after.oov == after.table_size - 1
    assert len(new.fields[0].vocabulary) > len(old.fields[0].vocabulary) + 50
    check_growth(old.info, new)
    assert [entry["fingerprint"] for entry in new.info["grown_from"]] == [old.fingerprint]
    # rows of the old tables, mapped, are the new ids, except where out-of-vocabulary became a token
    moved = row_map(old.info, new.info)
    frame = pd.DataFrame(tables[0]["train"])
    before, after = old.encode(frame), new.encode(frame)
    known = np.ones(before.shape, bool)
    for index, (field, offset) in enumerate(zip(old.fields[:3], list(old.offsets.values()))):
        known[:, index] = before[:, index] != offset + field.oov
    assert known.mean() > 0.9 and (moved[before] == after)[known].all()
    assert len(moved) == sum(field.table_size for field in old.fields) and len(set(moved.tolist())) == len(moved)
    assert all(moved[old.offsets[f.name] + f.oov] == new.offsets[f.name] + g.oov
               for f, g in zip(old.fields, new.fields) if f.oov is not None)


def test_counts_below_the_threshold_add_up(tmp_path):
    """Five times today and five times tomorrow are ten; what is long has its text again."""
    def day(number, rare):
        users = ["often"] * 60 + rare * 5 + ["once", f"only on day {number} and long"]
        return write_csv(tmp_path / f"{number}.csv", {"u": users, "y": ["0", "1"] * (len(users) // 2)})

    paths = [day(1, ["a", "a name of some length"]), day(2, ["b", "a name of some length"]),
             day(3, ["b", "a"])]  # fmt: skip
    common = ["--val_input", tmp_path / "1.csv", "--test_input", tmp_path / "1.csv"]
    columns = ["--label", "y", "--categorical", "u", "--min_count", 10]
    assert run(tmp_path / "d1", "--input", paths[0], *common, *columns) == 0
    assert run(tmp_path / "d2", "--input", paths[1], *common, "--base", tmp_path / "d1") == 0
    assert run(tmp_path / "d3", "--input", paths[2], *common, "--base", tmp_path / "d2") == 0
    tokens = [pq.read_table(tmp_path / d / "vocabulary" / "u.parquet").to_pydict() for d in ("d1", "d2", "d3")]
    assert [part["token"] for part in tokens] == [["often"], ["often", "a name of some length"],
                                                  ["often", "a name of some length", "a", "b"]]
    assert tokens[2]["count"] == [180, 10, 10, 10] and tokens[2]["id"] == [1, 2, 3, 4]
    rare = pq.read_table(tmp_path / "d3" / "vocabulary" / "u.rare.parquet").to_pydict()
    assert dict(zip(rare["token"], rare["count"])) == {"once": 3, **{f"only on day {i} and long": 1 for i in (1, 2, 3)}}
    chain = json.loads((tmp_path / "d3" / "dataset_info.json").read_text())["grown_from"]
    assert [entry["fields"]["u"]["num_tokens"] for entry in chain] == [1, 2]
    third = Encoder.load(tmp_path / "d3")
    for name in ("d1", "d2"):
        check_growth(Encoder.load(tmp_path / name).info, third)
    with pytest.raises(UserError, match="did not grow out of"):
        check_growth(third.info, Encoder.load(tmp_path / "d2"))


def test_rare_tokens_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(vocabulary, "RARE_TOKENS", 5)
    users = [name for i, name in enumerate("abcdefghij") for _ in range(i % 4 + 1)] * 2 + ["z"] * 56
    write_csv(tmp_path / "t.csv", {"u": users, "y": ["0", "1"] * (len(users) // 2)})
    same = ["--val_input", tmp_path / "t.csv", "--test_input", tmp_path / "t.csv"]
    columns = ["--label", "y", "--categorical", "u", "--min_count", 20]
    assert run(tmp_path / "d", "--input", tmp_path / "t.csv", *same, *columns) == 0
    rare = pq.read_table(tmp_path / "d" / "vocabulary" / "u.rare.parquet").to_pydict()
    assert dict(zip(rare["token"], rare["count"])) == {"d": 8, "h": 8, "c": 6, "g": 6, "b": 4}


def test_growth_proves_itself(dataset, tmp_path):
    """A vocabulary that does not begin with the old one is found, and so is one that was swapped."""
    write_csv(tmp_path / "day2.csv", cells_of(900, 9))
    assert grow(dataset, tmp_path / "day2.csv", tmp_path / "d2") == 0
    old, new = Encoder.load(dataset), Encoder.load(tmp_path / "d2")
    texts = new.fields[2].vocabulary.texts.to_pylist()
    new.fields[2].vocabulary.texts = pa.array([texts[1], texts[0], *texts[2:]])
    with pytest.raises(UserError, match="field title did not keep its ids"):
        check_growth(old.info, new)
    path = tmp_path / "d2" / "vocabulary" / "title.parquet"
    table = pq.read_table(path)
    pq.write_table(table.set_column(0, "token", pa.array([texts[1], texts[0], *texts[2:]])), path)
    with pytest.raises(UserError, match="title.parquet was changed or damaged since dataset_info.json was written"):
        Encoder.load(tmp_path / "d2")
    info = json.loads((tmp_path / "d2" / "dataset_info.json").read_text())
    del info["files"]
    (tmp_path / "d2" / "dataset_info.json").write_text(json.dumps(info))
    with pytest.raises(UserError, match="field title is not encoded as its fingerprint says"):
        Encoder.load(tmp_path / "d2")


def test_lists_of_one_value_are_noticed(tmp_path, capsys):
    """A wrong separator makes a token of every whole cell."""
    lines = [f"{row % 2},a;b,c|d" for row in range(200)]
    (tmp_path / "x.csv").write_text("\n".join(["y,one,two", *lines]) + "\n")
    options = ["--input", tmp_path / "x.csv", "--label", "y", "--list", "one,two"]
    assert run(tmp_path / "d", *options) == 0
    assert "no train row has more than one value of one (1); if some should, give " in capsys.readouterr().out
    assert run(tmp_path / "d2", *options, "--list_separator", ";") == 0
    assert "no train row has more than one value of two (1)" in capsys.readouterr().out


def test_base_takes_no_columns(dataset, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(tmp_path / "out", "--base", dataset, "--input", "x.csv", "--categorical", "a")
    assert "--categorical does not go with --base" in capsys.readouterr().err


def test_base_takes_another_form(tmp_path, capsys):
    """What is said of the new files holds; names must be those of columns."""
    options = ["--label", "y", "--categorical", "u", "--numeric", "x", "--numeric_bins", "3", "--min_count", "1"]
    for name, separator in (("1", ","), ("2", "#")):
        cells = {"y": ["0", "1"] * 60, "u": ["a", f'"{name}"'] * 60, "x": list(map(str, range(120)))}
        lines = [",".join(cells), *map(",".join, zip(*cells.values()))]
        (tmp_path / f"{name}.csv").write_text("\n".join(lines).replace(",", separator) + "\n")
    assert run(tmp_path / "d", "--input", tmp_path / "1.csv", *options) == 0
    new = (tmp_path / "d", tmp_path / "2.csv", tmp_path / "grown", "--separator", "#")
    assert grow(*new, "--no_quotes", "--min_count", "u=1") == 0
    encoder = Encoder.load(tmp_path / "grown")
    assert sorted(encoder.fields[0].vocabulary.texts.to_pylist()) == ['"2"', "1", "a"]
    assert [encoder.info["raw"][name] for name in ("separator", "quotes")] == ["#", False]
    for wrong, message in ((["--min_count", "w=7"], "--min_count w=...: 'w' is no column of"),
                           (["--drop", "z"], "has no column 'z'"), (["--drop", "u"], "--drop u: it is a column of"),
                           (["--keep", "z"], "has no column 'z'"), (["--split_by_group", "z"], "has no column 'z'")):
        assert grow(*new, *wrong, "--overwrite") == 1
        assert message in one_error(capsys)


# --------------------------------------------------------------------------------------------------------------- splits


def split_of(folder, column):
    """{value of a carried column: split}"""
    return {value: split for split in SPLITS for value in pq.read_table(folder / split)[column].to_pylist()}


@pytest.fixture
def timed(tmp_path):
    rng = np.random.default_rng(3)
    count = 2000
    frame = pd.DataFrame({"ts": rng.permutation(count), "user": rng.integers(0, 300, count),
                          "y": rng.integers(0, 2, count)})
    frame["date"] = pd.Timestamp("2024-01-01") + pd.to_timedelta(frame["ts"], unit="h")
    frame["text"] = frame["date"].astype(str)
    frame.to_csv(tmp_path / "t.csv", index=False)
    frame.to_parquet(tmp_path / "t.parquet")
    return frame


COMMON = ["--label", "y", "--categorical", "user", "--keep", "user,ts,date,text"]


@pytest.mark.parametrize("ending", ["csv", "parquet"])
@pytest.mark.parametrize("column, val_from, test_from", [
    ("ts", "1500", "1800"), ("text", "2024-03-03 12:00:00", "2024-03-16"),
    ("date", "2024-03-03 12:00:00", "2024-03-16"), ("date UTC", "2024-03-03 12:00:00", "2024-03-16T00:00:00Z"),
    ("date +02:00", "2024-03-03 14:00:00", "2024-03-16T00:00:00Z"),
    ("date America/Lima", "2024-03-03 07:00:00", "2024-03-15 19:00:00"), ("day", "2024-03-04", "2024-03-16")])
def test_split_by_time(timed, tmp_path, ending, column, val_from, test_from):
    name, _, zone = column.partition(" ")
    if zone or name == "day":
        if ending == "csv":
            pytest.skip("text has no such types")
        rows = pq.read_table(tmp_path / "t.parquet")
        kind = pa.timestamp("us", zone) if zone else pa.date32()
        dates = rows["date"].cast(pa.timestamp("us")).cast(kind, safe=False)
        pq.write_table(rows.append_column("when", dates), tmp_path / "t.parquet")
        name = "when"
    assert run(tmp_path / "d", "--input", tmp_path / f"t.{ending}", *COMMON, "--split_by", name,
               "--val_from", val_from, "--test_from", test_from) == 0
    found = {int(ts): split for ts, split in split_of(tmp_path / "d", "ts").items()}
    first = 1512 if column == "day" else 1500
    assert found == {ts: "train" if ts < first else "val" if ts < 1800 else "test" for ts in range(2000)}


@pytest.mark.parametrize("ending", ["csv", "parquet"])
@pytest.mark.parametrize("column, bounds", [("ts", ("900", "1000.5")), ("text", ("2024-03-03", "2024-03-16")),
                                            ("date", ("2024-03-03", "2024-03-03 01:00:00"))])
def test_bounds_in_the_wrong_order(timed, tmp_path, capsys, ending, column, bounds):
    for val_from, test_from in ((bounds[1], bounds[0]), (bounds[0], bounds[0])):
        assert run(tmp_path / "d", "--input", tmp_path / f"t.{ending}", *COMMON, "--split_by", column,
                   "--val_from", val_from, "--test_from", test_from) == 1
        assert f"--val_from {val_from} is not before --test_from {test_from}" in one_error(capsys)


def test_split_by_group_and_by_chance(timed, tmp_path):
    shares = ["--val_share", "0.2", "--test_share", "0.3"]
    made = []
    for number, extra in enumerate([["--split_by_group", "user"], ["--split_by_group", "user", "--seed", "1"], []]):
        assert run(tmp_path / str(number), "--input", tmp_path / "t.csv", *COMMON, *shares, *extra) == 0
        made.append({split: pq.read_table(tmp_path / str(number) / split)["raw_user"].to_pylist() for split in SPLITS})
    for groups in made[:2]:
        assert len(set().union(*groups.values())) == sum(len(set(users)) for users in groups.values())
        sizes = [len(groups[split]) / 2000 for split in SPLITS]
        assert np.allclose(sizes, [0.5, 0.2, 0.3], atol=0.08)
    assert set(made[0]["test"]) != set(made[1]["test"])
    sizes = [len(made[2][split]) / 2000 for split in SPLITS]
    assert np.allclose(sizes, [0.5, 0.2, 0.3], atol=0.03)


def test_splits_do_not_depend_on_blocks(timed, tmp_path, monkeypatch):
    assert run(tmp_path / "1", "--input", tmp_path / "t.csv", *COMMON) == 0
    monkeypatch.setattr(raw_files, "BLOCK_BYTES", 1000)
    assert run(tmp_path / "2", "--input", tmp_path / "t.csv", *COMMON) == 0
    for split in SPLITS:
        assert pq.read_table(tmp_path / "1" / split).equals(pq.read_table(tmp_path / "2" / split))


def test_empty_split_and_missing_time(timed, tmp_path, capsys):
    by_time = ["--split_by", "ts", "--val_from", "100", "--test_from", "5000"]
    assert run(tmp_path / "d", "--input", tmp_path / "t.csv", *COMMON, *by_time) == 1
    assert "the test split has no rows (100 train, 1900 val, 0 test)" in one_error(capsys)
    timed.loc[7, "ts"] = np.nan
    timed.to_parquet(tmp_path / "t.parquet")
    assert run(tmp_path / "d", "--input", tmp_path / "t.parquet", *COMMON, *by_time) == 1
    assert "t.parquet, row 7 (counted from 0): ts is missing, expected a time" in one_error(capsys)
    timed.assign(ts=pd.to_timedelta(timed["ts"], unit="h")).to_parquet(tmp_path / "t.parquet")
    assert run(tmp_path / "d", "--input", tmp_path / "t.parquet", *COMMON, *by_time) == 1
    assert "ts is a value of type duration[ns], expected one that compares with 100 and 5000: a date, a number or a " \
           "text" in one_error(capsys)
    assert not (tmp_path / "d").exists()


# ----------------------------------------------------------------------------------------------------- names, proposals


def test_names_that_petastorm_cannot_read(tmp_path, capsys):
    cells = {"user-id": ["a", "b"] * 50, "2nd": ["c", "d"] * 50, "class": ["e"] * 100, "Label": ["f"] * 100,
             "价格": ["1"] * 100, "y": ["0", "1"] * 50, "area m²": ["g"] * 100, "te\u0301le": ["h"] * 100,
             "½": ["i"] * 100, "µ": ["j"] * 100, "²\u0301": ["k"] * 100}  # fmt: skip
    write_csv(tmp_path / "t.csv", cells)
    options = ["--input", tmp_path / "t.csv", "--label", "y",
               "--categorical", "user-id,2nd,class,Label,area m²,te\u0301le,½,µ,²\u0301",
               "--numeric", "价格"]
    assert run(tmp_path / "d", *options, "--keep", "2nd") == 0
    assert "note: column 'user-id' is called user_id in the dataset" in capsys.readouterr().out
    names = ["Label", "user_id", "c2nd", "class_", "Label_", "价格", "area_m2", "t\u00e9le", "c1_2", "μ", "c2\u0301",
             "raw_c2nd"]
    assert pq.read_table(tmp_path / "d" / "val").column_names == names and all(map(is_readable, names))
    assert inspect_dataset.main([str(tmp_path / "d")]) == 0
    assert encode(tmp_path / "d", tmp_path / "t.csv", tmp_path / "new") == 0
    assert_ids(pq.read_table(tmp_path / "new"), plain_ids(tmp_path / "d", cells))
    write_csv(tmp_path / "t.csv", {"user id": ["a"] * 100, **cells})
    assert run(tmp_path / "d2", *options, "--categorical", "user id") == 1
    assert "'user id' and 'user-id' would both be called user_id" in one_error(capsys)


def test_describe_proposes_a_command_that_works(tables, tmp_path, capsys):
    cells, folder = tables
    before = sorted(os.listdir(folder))
    assert table_to_parquet.main(["--input", str(folder / "train.csv"), "--describe"]) == 0
    assert sorted(os.listdir(folder)) == before
    shown = capsys.readouterr().out
    for line in ("user_id", "price    numbers", "tags     text", "another value in every row"):
        assert line in shown
    command = shlex.split(shown.split("\n\n")[-1].replace("\\\n", ""))
    assert command[:2] == ["python", "tools/table_to_parquet.py"]
    options = [str(tmp_path / "d") if word == "DATA_DIR" else word for word in command[2:]]
    assert options[options.index("--label") + 1] == "clicked"
    assert "tags" in options[options.index("--list") + 1] and "request" in options[options.index("--drop") + 1]
    assert table_to_parquet.main(options) == 0


@pytest.mark.parametrize("header, options", [
    ("y:user, id:--item:it's \"q\" $x", ["--separator", ":"]), ("y click,user,-item,'a'", ["--label", "y click"]),
    ('y,"user,id","""q"",r",$HOME', []), ("y\tuser\titem\tclick", ["--label", "y", "--separator", "tab"]),
])
def test_described_names_and_separators_come_back(tmp_path, capsys, monkeypatch, header, options):
    """Through a shell, with names that shells, lists of names and argparse take apart."""
    separator = {":": ":", "tab": "\t"}.get(options[-1] if options else "", ",")
    rows = ["0", "1"] * 30, [f"u{i % 7}" for i in range(60)], [f"i{i % 5}" for i in range(60)], ["0", "1"] * 30
    folder = tmp_path / "it's \"q\" $HOME [1]*"
    folder.mkdir()
    (folder / "-rows.txt").write_text("\n".join([header, *map(separator.join, zip(*rows))]) + "\n", encoding="utf-8")
    monkeypatch.chdir(folder)
    assert table_to_parquet.main(["--input=-rows.txt", "--describe", *options]) == 0
    command = capsys.readouterr().out.split("\n\n")[-1].replace("python tools/table_to_parquet.py", "printf '%s\\0'")
    words = subprocess.run(["bash", "-c", command], capture_output=True, text=True).stdout.split("\0")[:-1]
    assert table_to_parquet.main(["d" if word == "DATA_DIR" else word for word in words]) == 0
    info = json.loads((folder / "d" / "dataset_info.json").read_text(encoding="utf-8"))
    assert info["raw"]["label"] == info["raw"]["columns"][0] and len(info["fields"]) == 3
    assert table_to_parquet.main(["--input=-rows.txt", "--describe", "--label", "nothing", *options[2:]]) == 1
    assert "has no column 'nothing'" in capsys.readouterr().err


@pytest.mark.parametrize("drop, status", [("described", 0), ("", 0), ('""', 0), ("x", 1)])
def test_the_index_that_pandas_writes(tmp_path, capsys, drop, status):
    """A column without a name: it is proposed to be dropped, can be kept, and is in new rows as well."""
    pd.DataFrame({"y": [0, 1] * 60, "x": range(120)}).to_csv(tmp_path / "t.csv")
    words = ["--input", tmp_path / "t.csv", "--label", "y", "--numeric", "x", "--drop", drop]
    if drop == "described":
        assert table_to_parquet.main(["--input", str(tmp_path / "t.csv"), "--describe"]) == 0
        words = shlex.split(capsys.readouterr().out.split("\n\n")[-1].replace("\\\n", ""))[2:]
    assert run(tmp_path / "d", *words) == status
    if status:
        assert "column x is given to" in one_error(capsys)
        assert run(tmp_path / "d", *words[:-2]) == 1 and 'names the columns "" (1); give' in one_error(capsys)
        return
    assert encode(tmp_path / "d", tmp_path / "t.csv", tmp_path / "new", "--keep", "") == 0
    assert pq.read_table(tmp_path / "new")["column"].to_pylist() == list(map(str, range(120)))


def test_describe_looks_at_everything(tmp_path, capsys):
    """Types that are no features, times of any zone, files without rows, lists with several separators."""
    count = 40
    table = pa.table({"y": [0, 1] * 20, "structs": [[{"a": 1}]] * count, "deep": [[[1]]] * count,
                      "flags": [[True, False]] * count,
                      "long": pa.array(np.arange(count), pa.duration("s")),
                      "when": pa.array(np.arange(count), pa.timestamp("ns", "+02:00")),
                      **{name: [f"t{i % 4}{separator}t{i % 5}" for i in range(count)]
                         for name, separator in (("a", "|"), ("b", ";"), ("c", "|"))}})
    pq.write_table(table, tmp_path / "t.parquet")
    assert table_to_parquet.main(["--input", str(tmp_path / "t.parquet"), "--describe"]) == 0
    shown = capsys.readouterr().out
    for text in ("structs  list<", "deep     list<", "when     times", "or write its lists with '|' for ';': --list",
                 "--list flags,a,c", "--drop structs,deep,long,when,b", "--list_separator '|'"):
        assert text in shown
    pq.write_table(table.slice(0, 0), tmp_path / "t.parquet")
    assert table_to_parquet.main(["--input", str(tmp_path / "t.parquet"), "--describe"]) == 1
    assert "t.parquet has no rows" in one_error(capsys)
    (tmp_path / "t.csv").write_text("a,b\n")
    assert table_to_parquet.main(["--input", str(tmp_path / "t.csv"), "--describe"]) == 1
    assert "t.csv has a header but no rows" in one_error(capsys)


def test_names_with_colons_are_hashed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(describe, "MANY_TOKENS", 100)
    write_csv(tmp_path / "t.csv", {"ns: user": [f"u{i * 2 // 3}" for i in range(200)], "y": ["0", "1"] * 100})
    assert table_to_parquet.main(["--input", str(tmp_path / "t.csv"), "--describe"]) == 0
    assert "--hash 'ns: user=512'" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------ text and files


def test_text_in_other_forms(tables, tmp_path):
    """Byte order mark, Windows line ends, no last line end, tab, semicolon, a folder of parts: the same dataset."""
    cells, _ = tables
    write_csv(tmp_path / "a.csv", cells["train"])
    text = (tmp_path / "a.csv").read_bytes()
    (tmp_path / "b.csv").write_bytes(b"\xef\xbb\xbf" + text.replace(b"\n", b"\r\n")[:-2])
    write_csv(tmp_path / "c.tsv", cells["train"], "\t")
    write_csv(tmp_path / "d.csv", cells["train"], ";")
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "_SUCCESS").write_text("")
    (tmp_path / "parts" / ".part.crc").write_text("x")
    for number, start in enumerate(range(0, 700, 50)):  # part 10 comes after part 9
        part = {name: texts[start : start + 50] for name, texts in cells["train"].items()}
        write_csv(tmp_path / "parts" / f"part-{number}.csv.gz", part)
    with open(tmp_path / "z.csv.zst", "wb") as file, pa.CompressedOutputStream(file, "zstd") as packed:
        packed.write(text)
    frames = []
    for number, name in enumerate(["a.csv", "b.csv", "c.tsv", "d.csv", "parts", "z.csv.zst"]):
        assert run(tmp_path / f"out{number}", "--input", tmp_path / name, *OPTIONS) == 0
        frames.append(pq.read_table(tmp_path / f"out{number}" / "train"))
    assert all(frame.equals(frames[0]) for frame in frames)


def test_spark_folder_called_parquet(tables, tmp_path):
    cells, folder = tables
    (tmp_path / "x.parquet").mkdir()
    for name in ("_SUCCESS", ".part-0.crc"):
        (tmp_path / "x.parquet" / name).write_text("")
    shutil.copy(folder / "train.parquet", tmp_path / "x.parquet" / "part-0.parquet")
    assert run(tmp_path / "one", "--input", tmp_path / "x.parquet", *OPTIONS) == 0
    assert run(tmp_path / "two", "--input", folder / "train.parquet", *OPTIONS) == 0
    assert pq.read_table(tmp_path / "one" / "train").equals(pq.read_table(tmp_path / "two" / "train"))


def test_text_without_header(tmp_path):
    rows_ = "".join(f"{i % 2},{i % 7},{'ab'[i % 2]}\n" for i in range(200))
    (tmp_path / "t.csv").write_text(rows_)
    columns = ["--columns", "y,n,c", "--label", "y", "--categorical", "n,c"]
    assert run(tmp_path / "d", "--input", tmp_path / "t.csv", *columns) == 0
    cells = {"n": ["3", "6", "99"], "c": ["a", "b", ""]}
    (tmp_path / "new.csv").write_text("3,a\n6,b\n99,\n")  # no label
    (tmp_path / "named.csv").write_text("c,n\na,3\nb,6\n,99\n")
    for name in ("new.csv", "named.csv"):
        assert encode(tmp_path / "d", tmp_path / name, tmp_path / f"out-{name}") == 0
        assert_ids(pq.read_table(tmp_path / f"out-{name}"), plain_ids(tmp_path / "d", cells))


@pytest.mark.parametrize("line, separator, columns", [
    ("u1,a|b|c|a", ",", None), ("0,u1,a|b|c|a", ",", None), ("2,u1,a|b|c|d", ",", None), ("u1", ",", None),
    ("u1;a|b|c|d", ";", None), ("0\tu1\ta,b,c", "\t", None), ("u1,user", ",", None),
    ("genres,user", ",", ["genres", "user"]), ("a|b|c,user,genres", ",", ["a|b|c", "user", "genres"]),
    ("y;user;genres", ";", ["y", "user", "genres"]), ("user,genre", ",", ["user", "genre"]),
])
def test_separator_and_header_of_new_rows(tmp_path, line, separator, columns):
    """The dataset's own separator comes first; a header has all names that are needed, or was meant to have them."""
    (tmp_path / "new.csv").write_text(line + "\n")
    raw = {"columns": ["y", "user", "genres"], "label": "y", "header": False, "separator": ","}
    form = convert.format_of({"raw": raw, "fields": [{"name": "user"}, {"name": "genres"}]}, unlabelled=True)
    raw = raw_files.open_raw(tmp_path / "new.csv", form)
    assert (raw.separator, raw.has_header) == (separator, columns is not None)
    assert columns is None or raw.columns == columns


def test_separator_of_rows_without_header(tmp_path):
    """The one that gives as many cells as there are names, also where a list has more of another."""
    (tmp_path / "t.csv").write_text("".join(f"{i % 2},u{i % 5},a|b|c|d\n" for i in range(100)))
    options = ["--columns", "y,user,genres", "--label", "y", "--categorical", "user", "--list", "genres"]
    assert run(tmp_path / "d", "--input", tmp_path / "t.csv", *options) == 0
    (tmp_path / "new.csv").write_text("u1,d|c|b|a\n")
    assert encode(tmp_path / "d", tmp_path / "new.csv", tmp_path / "out") == 0
    assert_ids(pq.read_table(tmp_path / "out"), plain_ids(tmp_path / "d", {"user": ["u1"], "genres": ["d|c|b|a"]}))


GOOD = "y,a,x\n" + "".join(f"{i % 2},t{i % 3},{i}.5\n" for i in range(60))
BAD_TEXTS = {
    "UTF-16": (GOOD.encode("utf-16"), "t.csv is UTF-16, expected text in UTF-8"),
    "UTF-16 without mark": (GOOD.encode("utf-16-le"), "is UTF-16, or not text at all"),
    "latin 1": (GOOD.replace("t1,7", "é,7").encode("latin-1"), "t.csv, line 9: invalid continuation byte at byte 2"),
    "latin 1 header": (GOOD.replace("a", "é").encode("latin-1"), "t.csv, line 1: invalid continuation byte"),
    "empty": (b"", "t.csv is empty"),
    "header only": (b"y,a,x\n", "t.csv has a header but no rows"),
    "short line": (GOOD.replace("t1,7.5", "t1").encode(), "t.csv, line 9: 2 columns, expected 3 (y,a,x)"),
    "open quote": (GOOD.replace("t1,7", '"t1,7').encode(), "t.csv, line 9: a quote that is not closed"),
    "line end in quotes": (GOOD.replace("t1,7", '"t\n1",7').encode(), "t.csv, line 9: a quote that is not closed"),
    "label": (GOOD.replace("1,t1,7", "2,t1,7").encode(), "t.csv, line 9: label '2', expected 0 or 1"),
    "no label": (GOOD.replace("1,t1,7", ",t1,7").encode(), "t.csv, line 9: label '', expected 0 or 1"),
    "number": (GOOD.replace("t1,7.5", "t1,7,5").replace("7,5", "7;5").encode(), "t.csv, line 9: x is '7;5', expected a "
                                                                                "number"),
    "zero byte": (GOOD.replace("t1,7", "t\0,7").encode(), "t.csv, line 9: a zero byte"),
    "twice": (GOOD.replace("y,a,x", "y,a,a").encode(), "has two columns called 'a'"),
    "quotes inside": (GOOD.replace(",t", ',5" t').replace("1,5\" t2,59", "7,t2,59").encode(), "line 61: label '7'"),
    "blanks": (GOOD.replace("1,t2,59", "7,t2,59").replace(",t2,", ",t2, \t").replace(".5", ".5 ").encode(),
               "t.csv, line 61: label '7', expected 0 or 1"),
    "carriage return": (GOOD.replace("t1,7", "t\r1,7").encode(), "line 9: a carriage return inside the line"),
}


@pytest.mark.parametrize("case", BAD_TEXTS)
def test_bad_text_is_named(tmp_path, capsys, case):
    content, message = BAD_TEXTS[case]
    (tmp_path / "t.csv").write_bytes(content)
    options = ["--input", tmp_path / "t.csv", "--label", "y", "--categorical", "a", "--numeric", "x"]
    assert run(tmp_path / "d", *options) == 1
    assert message in one_error(capsys)
    assert os.listdir(tmp_path) == ["t.csv"]


def test_blanks_around_numbers(tmp_path):
    """They are the same numbers, whether a column is read as numbers or as text, which is to be kept as well."""
    (tmp_path / "t.csv").write_text(GOOD.replace(".5", ".5 ").replace(",t1,", ",t1, \t"))
    (tmp_path / "plain.csv").write_text(GOOD)
    options = ["--label", "y", "--categorical", "a", "--numeric", "x", "--split_by", "x", "--val_from", "40",
               "--test_from", "50"]  # fmt: skip
    ids = []
    for name, more in (("t", []), ("t", ["--keep", "x"]), ("plain", ["--keep", "x"])):
        assert run(tmp_path / "d", "--input", tmp_path / f"{name}.csv", *options, *more, overwrite=True) == 0
        ids.append([pq.read_table(tmp_path / "d" / split)["x"].to_pylist() for split in SPLITS])
    assert ids[0] == ids[1] == ids[2]
    assert encode(tmp_path / "d", tmp_path / "t.csv", tmp_path / "out", "--keep", "x") == 0
    assert pq.read_table(tmp_path / "out")["raw_x"].to_pylist()[:3] == ["0.5 ", " \t1.5 ", "2.5 "]


def test_a_file_without_line_ends_is_not_read_as_a_whole(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(raw_files, "LONGEST_LINE", 100_000)
    monkeypatch.setattr(raw_files, "BLOCK_BYTES", 30_000)
    (tmp_path / "t.csv").write_text("y,a\n0,b\n" + "1" * 200_000)
    assert run(tmp_path / "d", "--input", tmp_path / "t.csv", "--label", "y", "--categorical", "a") == 1
    assert "has a line of more than 0 MiB at byte 8" in one_error(capsys)
    (tmp_path / "t.csv").write_text("1" * (1 << 20))
    assert run(tmp_path / "d", "--input", tmp_path / "t.csv", "--label", "y", "--categorical", "a") == 1
    assert "has no line end in its first 1048576 bytes" in one_error(capsys)


def test_what_is_no_file(tmp_path, capsys):
    options = ["--label", "y", "--categorical", "a"]
    os.mkfifo(tmp_path / "pipe.csv")
    (tmp_path / "folder").mkdir()
    for name, message in (("pipe.csv", "pipe.csv is a named pipe, expected a file"), ("none.csv", "cannot be read"),
                          ("folder", "folder has no data files in it")):
        assert run(tmp_path / "d", "--input", tmp_path / name, *options) == 1
        assert message in one_error(capsys)
    (tmp_path / "folder" / "t.csv").write_text(GOOD)
    (tmp_path / "folder" / "notes.md").write_text("")
    assert run(tmp_path / "d", "--input", tmp_path / "folder", *options) == 1
    assert "holds notes.md (1) beside data files" in one_error(capsys)


@pytest.mark.parametrize("name", ["a[1]", "a?b", "a#b", "a b", "ü", "file:x", "*"])
def test_paths_are_not_patterns(tables, tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    shutil.copy(tables[1] / "train.csv", folder / f"{name}.csv")
    assert run(folder / "d", "--input", folder / f"{name}.csv", *OPTIONS, "--spark_tmp_dir", folder / "tmp") == 0
    assert encode(folder / "d", folder / f"{name}.csv", folder / "new") == 0
    assert Encoder.load(folder / "d").fingerprint


def test_output_with_bytes_that_are_not_utf8_is_one_line(tables, tmp_path, capsys):
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/\xff")
    assert run(folder, "--input", tables[1] / "train.csv", *OPTIONS) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and error.endswith("has bytes that are not UTF-8; use names without them")


@needs_spark
def test_paths_are_not_patterns_for_spark(tables, dataset, tmp_path, run_on_spark):
    """Neither of rows, nor of the scratch folder, which Spark reads again."""
    folder = tmp_path / "a [1]?#{b,c}*ü"
    folder.mkdir()
    shutil.copy(tables[1] / "train.csv", folder / "a[1].csv")
    common = ["--input", folder / "a[1].csv", "--base", dataset, "--output_dir"]
    status, _, errors = run_on_spark("table_to_parquet", *common, folder / "d", cores=1)
    assert (status, errors) == (0, "")
    assert run(folder / "e", *common[:-1]) == 0
    for split in SPLITS:
        assert pq.read_table(folder / "d" / split).equals(pq.read_table(folder / "e" / split))


@pytest.mark.parametrize("change, message", [
    ({"x": pa.array([[1]] * 60)}, "row 0 (counted from 0): x is a value of type list<element: int64>, expected a "
                                  "number"),
    ({"a": pa.array([[1]] * 60)}, "a is list<element: int64>, expected one value a row; a column of lists can be given "
                                  "to"),
    ({"a": pa.array([b"\xff"] * 60)}, r"row 0 (counted from 0): a is b'\xff', expected text in UTF-8"),
    ({"y": pa.array([0.5] * 60)}, "y is 0.5, expected 0 or 1"),
    ({"y": pa.array([None] + [1] * 59)}, "y is missing, expected 0 or 1"),
])
def test_bad_parquet_values_are_named(tmp_path, capsys, change, message):
    table = pa.table({"y": [0, 1] * 30, "a": ["b"] * 60, "x": [1.0] * 60, **change})
    pq.write_table(table, tmp_path / "t.parquet")
    options = ["--label", "y", "--categorical", "a", "--numeric", "x"]
    assert run(tmp_path / "d", "--input", tmp_path / "t.parquet", *options) == 1
    assert message in one_error(capsys)


def test_damaged_packed_files(tables, tmp_path, capsys):
    _, folder = tables
    text, parquet = (folder / "train.csv").read_bytes(), (folder / "train.parquet").read_bytes()
    packed = gzip.compress(text)
    zstd = pa.BufferOutputStream()
    with pa.CompressedOutputStream(zstd, "zstd") as stream:
        stream.write(text)
    zstd = zstd.getvalue().to_pybytes()
    middle = len(packed) // 2
    cases = {"a.csv.gz": packed[:-20], "b.csv.gz": packed[:middle] + b"\xff" * 50 + packed[middle + 50 :],
             "c.csv.gz": packed[:-8] + bytes(8), "d.csv.zst": zstd[: len(zstd) // 2], "e.parquet": parquet[:-30],
             "f.parquet": parquet[:200] + b"\xff" * 3000 + parquet[3200:]}  # fmt: skip
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        assert run(tmp_path / "d", "--input", tmp_path / name, *OPTIONS) == 1
        shown = one_error(capsys)
        assert name in shown and ("is not a whole" in shown or "is not a readable parquet file" in shown), shown
    assert not (tmp_path / "d").exists()


# -------------------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize("options, message", [
    (["--categorical", "a"], "no option names the columns x (1)"),
    (["--categorical", "a,z", "--numeric", "x"], "there is no column 'z'; the columns are y, a, x (3)"),
    (["--categorical", "a,x", "--numeric", "x"], "column x is given to --categorical and --numeric"),
    (["--categorical", "a,x,y"], "column y is given to --label and --categorical"),
    (["--drop", "a,x"], "no column is a feature"), (["--numeric", "x,"], "--numeric has a column without a name"),
    (["--categorical", "a,x", "--min_count", "b=3"], "--min_count b=...: 'b' is no column of --categorical or "
                                                     "--numeric"),
    (["--categorical", "a,x", "--hash", "50"], "--hash needs the name of a column"),
    (["--categorical", "a,x", "--keep", "b"], "there is no column 'b'"),
    (["--categorical", "a", "--columns", "y,a,a"], "has two columns called 'a'; rename one of them"),
])
def test_columns_that_do_not_fit_the_table(tmp_path, capsys, options, message):
    (tmp_path / "t.csv").write_text(GOOD)
    assert run(tmp_path / "d", "--input", tmp_path / "t.csv", "--label", "y", *options) == 1
    assert message in one_error(capsys)


@pytest.mark.parametrize("options, message", [
    ([], "--label is required"), (["--label", "y", "--val_input", "x"], "--val_input and --test_input go together"),
    (["--label", "y", "--split_by", "t"], "--split_by, --val_from and --test_from go together"),
    (["--label", "y", "--val_share", "0.6", "--test_share", "0.4"], "leave nothing for train"),
    (["--label", ""], "--label is empty; give a value"),
    (["--label", "y", "--min_count", "a=x"], "'x' is not a whole number"),
    (["--label", "y", "--separator", "ab"], "'ab', "),
    (["--label", "y", "--list_separator", ""], "--list_separator is empty"),
])
def test_options_that_do_not_fit_together(tmp_path, capsys, options, message):
    with pytest.raises(SystemExit) as stop:
        run(tmp_path / "d", "--input", "t.csv", *options)
    assert stop.value.code == 2 and message in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- the dataset's own files


@pytest.mark.parametrize("change, message", [
    (lambda info: info["fields"][0].pop("encoding"), "was made by an older version"),
    (lambda info: info["fields"][0]["encoding"].update(num_tokens=1), "does not hold the 1 ids from 1 on"),
    (lambda info: info["fields"][0]["encoding"].update(kind="other"), "unknown kind other"),
    (lambda info: info["fields"][0].update(table_size=2**70), "cannot be used"),
    (lambda info: info["fields"][0].update(name=7), "cannot be used"),
    (lambda info: info.update(fingerprint="0"), "the fingerprint is 0, not"),
    (lambda info: info.pop("raw"), "it does not say how raw rows look"),
    (lambda info: info.update(fields=3), "cannot be used"),
    (lambda info: info.update(format_version=3), r"cannot be used \(format_version is 3\)"),
    (lambda info: info["fields"][3]["encoding"]["borders"].pop(), "field price"),
    (lambda info: info["fields"][3]["encoding"].update(borders="x"), "cannot be used"),
    (lambda info: info["fields"][5]["encoding"].update(first_id=3), "vocabulary"),
])
def test_descriptions_that_are_not_right(dataset, tmp_path, change, message):
    shutil.copytree(dataset, tmp_path / "d")
    info = json.loads((tmp_path / "d" / "dataset_info.json").read_text())
    change(info)
    (tmp_path / "d" / "dataset_info.json").write_text(json.dumps(info))
    with pytest.raises(UserError, match=message):
        Encoder.load(tmp_path / "d")


@pytest.mark.parametrize("change", [
    lambda field: field.update(name="../x"), lambda field: field.update(name="a\nb"),
    lambda field: field.update(name="\0"), lambda field: field.update(columns=["title_0"]),
    lambda field: field.update(raw_column=7),
    lambda field: field["encoding"].update(oov=3), lambda field: field["encoding"].update(missing={"id": 0}),
    lambda field: field["encoding"].update(vocabulary="vocabulary/item.parquet"),
    lambda field: field["encoding"].update(vocabulary="../item.parquet"),
    lambda field: field["encoding"].update(min_count=0), lambda field: field["encoding"].update(first_id=True),
])
def test_descriptions_that_contradict_the_field(dataset, tmp_path, change):
    """Growth and scoring use them beside the vocabulary."""
    shutil.copytree(dataset, tmp_path / "d")
    info = json.loads((tmp_path / "d" / "dataset_info.json").read_text())
    change(info["fields"][2])
    (tmp_path / "d" / "dataset_info.json").write_text(json.dumps(info))
    with pytest.raises(UserError, match="cannot be used"):
        Encoder.load(tmp_path / "d")


@pytest.mark.parametrize("change", [lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes() + b"x"),
                                    lambda path: (path.unlink(), os.mkfifo(path))])
def test_rare_tokens_that_changed_stop_a_growth(dataset, tmp_path, capsys, change):
    """Without them, tokens would not become frequent that are."""
    shutil.copytree(dataset, tmp_path / "d")
    path = next((tmp_path / "d" / "vocabulary").glob("*.rare.parquet"))
    change(path)
    write_csv(tmp_path / "day2.csv", cells_of(300, 9))
    assert grow(tmp_path / "d", tmp_path / "day2.csv", tmp_path / "d2") == 1
    assert one_error(capsys).startswith(f"error: {path} ")


@pytest.mark.parametrize("content", [b"", b"x", b"[" * 100_000, b'{"fields": [' + b'{"a":' * 50_000, b"\xff\xfe{}",
                                     b"null"])
def test_descriptions_that_are_no_json(dataset, tmp_path, capsys, content):
    shutil.copytree(dataset, tmp_path / "d")
    (tmp_path / "d" / "dataset_info.json").write_bytes(content)
    assert encode(tmp_path / "d", "x.csv", tmp_path / "new") == 1
    assert "cannot be used" in one_error(capsys)


@pytest.mark.parametrize("damage", ["cut", "gone", "column", "type", "order"])
def test_vocabularies_that_are_not_right(dataset, tmp_path, capsys, damage):
    shutil.copytree(dataset, tmp_path / "d")
    path = tmp_path / "d" / "vocabulary" / "user_id.parquet"
    table = pq.read_table(path)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:100])
    elif damage == "gone":
        path.unlink()
    else:
        columns = {"column": table.drop(["id"]), "type": table.set_column(1, "id", table["token"]),
                   "order": table.set_column(1, "id", pa.array(table["id"].to_pylist()[::-1]))}  # fmt: skip
        pq.write_table(columns[damage], path)
    assert encode(tmp_path / "d", "x.csv", tmp_path / "new") == 1
    assert str(path) in one_error(capsys)


def test_bucket_and_hash_formulas():
    values = pa.array([2.9, -2.9, 0.5, 1e18, -1e18, None, np.nan, np.inf, 3, 2**53])
    bucket = encoders.Bucket("x", own_missing=True)
    tokens = bucket.tokens(values)[0][0].tolist()
    top = math.floor(math.log(2**53) ** 2)
    assert tokens == [2, -2, 0, top, -(2**31) + 1, -(2**31), -(2**31), top, 1, top]
    texts = ["", "a", "ab", "价格", "x" * 1000, "a"]
    assert encoders.fnv1a(pa.array(texts)).tolist() == [fnv1a64(text) for text in texts]
    sliced = pa.array(["zz", *texts, "y"]).slice(1, len(texts))
    assert encoders.fnv1a(sliced).tolist() == [fnv1a64(text) for text in texts]
    assert encoders.Hash("h", size=100).tokens(sliced)[0][0][0] == 1


def test_keys_are_equal_exactly_when_texts_are():
    texts = ["", "a", "a\0", "a\0\0", "\0", "12345678", "123456789", "1234567\0", "é" * 4, "é" * 5, "x" * 1000]
    keys, long = vocabulary.string_keys(pa.array(texts * 2))
    assert len(set(keys.tolist())) == len(texts) and (keys[: len(texts)] == keys[len(texts) :]).all()
    assert keys[0] == 0 and set(long[1].to_pylist()) == {t for t in texts if "\0" in t or len(t.encode()) > 8}
    part, _ = vocabulary.string_keys(pa.array(texts).slice(3, 5))
    assert (part == keys[3:8]).all()
    assert vocabulary.texts_of(keys, long).to_pylist() == texts * 2
