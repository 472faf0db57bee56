"""A trained model on rows of any form: ids and raw rows, into files, from Python, as ONNX, moved, on grown data."""

import csv
import itertools
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import encode_rows
import export_embeddings
import host_embedding
import numpy as np
import pack_checkpoint
import pandas as pd
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest
import score_onnx
import table_to_parquet
from conftest import ROOT, locked

import deepfm_train_eval as trainer_module
from tools.converter.encoders import Encoder
from tools.trainer import checkpoints, chunks
from tools.trainer.cli import UserError
from tools.trainer.tables import TableStore

USERS = [f"u{i}" for i in range(60)] + ["日本 ü", 'with "quotes", and comma', "a token of more than eight bytes"]
TRAIN = ["--device", "cpu", "--dnn", "12,8", "--embedding_vec_size", "4", "--batch_size", "200", "--learning_rate",
         "0.01", "--train_batches", "30", "--batch_norm"]


def write_rows(path, rows, seed, users=USERS, labelled=True):
    """A CSV of seven columns with missing values, negative integers, non-ASCII and long tokens."""
    rng = np.random.default_rng(seed)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["clicked"] * labelled + ["user", "item", "price", "age", "genres", "request"])
        for row in range(rows):
            user, item = rng.integers(len(users)), int(rng.geometric(0.1)) - 5
            label = int(rng.random() < (0.15 + 0.7 * (user % 2)))
            price = "" if rng.random() < 0.1 else f"{rng.lognormal(2, 2) - 3:.3f}"
            age = "" if rng.random() < 0.1 else str(int(rng.integers(-2, 90)))
            genres = "|".join(rng.choice(["pop", "rock", "é", "a very long genre"], rng.integers(0, 5)))
            writer.writerow([label] * labelled + ["" if rng.random() < 0.05 else users[user], item, price, age, genres,
                                                  f"r{row}"])
    return path


def convert(folder, *inputs, base=None):
    options = ["--label", "clicked", "--categorical", "user,item", "--numeric", "price,age", "--numeric_bins",
               "price=9", "--list", "genres", "--list_length", "3", "--list_separator", "|", "--keep", "request",
               "--min_count", "3", "--val_share", "0.2", "--test_share", "0.2"]
    options = ["--base", str(base)] if base else options
    inputs = [word for path in inputs for word in ("--input", str(path))]
    assert table_to_parquet.main([*inputs, "--output_dir", str(folder), *options]) == 0
    return folder


def train(data, work, *options):
    trainer_module.main(["--data_dir", str(data), "--persistent_path", f"{work}/t", "--persistent_path_fm", f"{work}/f",
                         "--model_save_dir", f"{work}/save", *TRAIN, *map(str, options)])
    return work / "save" / "best_checkpoint"


@pytest.fixture(scope="module")
def day(tmp_path_factory):
    """A folder with data (converted), a trained model (best) and new.csv, rows with tokens that it has never seen."""
    folder = tmp_path_factory.mktemp("day")
    convert(folder / "data", write_rows(folder / "day1.csv", 3000, 1))
    write_rows(folder / "new.csv", 450, 2, [*USERS[:40], "never seen", "auch nie: ß"])
    train(folder / "data", folder)
    return folder


def best(day):
    return str(day / "save" / "best_checkpoint")


def predict(day, rows, output, *options, checkpoint=None):
    trainer_module.main(["--model_load_dir", str(checkpoint or best(day)), "--predict", str(rows), "--predict_output",
                         str(output), "--device", "cpu", "--batch_size", "64", *options])
    return pa_csv.read_csv(output) if str(output).endswith(".csv") else pq.read_table(output)


@pytest.fixture
def fails(monkeypatch, capfd):
    """Run the trainer; it must stop with one error line, which is returned."""
    def leave(status):
        raise SystemExit(status)

    monkeypatch.setattr(os, "_exit", leave)

    def run(*options):
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            trainer_module.main([str(option) for option in options])
        [error] = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
        assert ended.value.code in (1, 2)
        return error

    return run


def ids_in(folder, columns):
    table = pq.read_table(folder)
    return np.stack([table[name].to_numpy() for name in columns], axis=1)


# ------------------------------------------------------------------------------------------------------- all ways agree


def test_all_ways_to_score_agree(day, tmp_path):
    """Ids, raw text, raw parquet, from Python with ids and with a DataFrame, ONNX with ids and with raw columns."""
    assert encode_rows.main(["--dataset", str(day / "data"), "--input", str(day / "new.csv"), "--output_dir",
                             str(tmp_path / "ids")]) == 0
    scores = {"ids": predict(day, tmp_path / "ids", tmp_path / "ids.parquet")["probability"].to_numpy()}
    raw = predict(day, day / "new.csv", tmp_path / "raw.csv", "--keep_columns", "request,clicked,user")
    assert raw.column_names == ["probability", "request", "clicked", "user"]
    frame = pd.read_csv(day / "new.csv", dtype={"user": str}, keep_default_na=False, na_values={
        name: [""] for name in ("user", "price", "age")})
    assert raw["request"].to_pylist() == list(frame["request"])
    assert raw["clicked"].to_pylist() == list(frame["clicked"])
    scores["raw text"] = raw["probability"].to_numpy()
    frame.to_parquet(tmp_path / "raw.parquet")
    scores["raw parquet"] = predict(day, tmp_path / "raw.parquet", tmp_path / "p.parquet")["probability"].to_numpy()
    model = trainer_module.load(best(day), "cpu")
    ids = ids_in(tmp_path / "ids", model.columns)
    assert model.columns == ["user", "item", "price", "age", "genres_0", "genres_1", "genres_2"]
    scores["load, ids"], scores["load, frame"] = model.predict(ids), model.predict(frame)
    scores["load, one by one"] = np.concatenate([model.predict(ids[row:row + 1]) for row in range(20)] +
                                                [model.predict(ids[20:])])
    scores.update(onnx_scores(day, tmp_path, ids))
    assert len(scores) == (8 if has_onnx() else 6)
    expected = scores["ids"]
    assert expected.dtype == np.float32 and len(expected) == 450 and expected.std() > 0.01
    for name, values in scores.items():
        assert np.abs(values - expected).max() < 1e-6, name


def has_onnx():
    try:
        import onnx
        import onnxruntime

        return bool(onnx and onnxruntime)
    except ImportError:
        return False


def onnx_scores(day, tmp_path, ids):
    """{way: probabilities} of exported files by score_onnx.py, where onnx is installed."""
    if not has_onnx():
        return {}
    import export_onnx
    import score_onnx

    found = {}
    for inputs, rows in (("raw", day / "new.csv"), ("ids", tmp_path / "ids")):
        path, output = tmp_path / f"{inputs}.onnx", tmp_path / f"{inputs}_scores.parquet"
        assert export_onnx.main(["--model_load_dir", best(day), "--output", str(path), "--inputs", inputs, "--device",
                                 "cpu"]) == 0
        assert score_onnx.main([str(path), str(rows), "--output", str(output), "--threads", "1"]) == 0
        found[f"onnx, {inputs}"] = pq.read_table(output)["probability"].to_numpy()
    return found


def test_val_rows_score_as_in_training(day, tmp_path):
    """The encoder's copy in the checkpoint gives the ids that training saw, for rows it was made from."""
    model = trainer_module.load(best(day), "cpu")
    frame = pd.read_csv(day / "day1.csv", dtype=str, keep_default_na=False).set_index("request")
    val = pq.read_table(day / "data" / "val").to_pandas()
    rows = frame.loc[val["request"]]
    assert (model.encode(rows[model.raw_columns]) == val[model.columns].to_numpy()).all()


def test_state_of_this_process_stays(day):
    before = dict(os.environ)
    trainer_module.load(best(day), "cpu").predict(np.zeros((0, 7), np.int64))
    assert dict(os.environ) == before


# ------------------------------------------------------------------------------------------------- what is not expected


@pytest.mark.parametrize("ids, message", [
    (np.zeros(7, np.int64), r"ids of shape \(7,\) and type int64, expected integers of shape \(n, 7\)"),
    (np.zeros((2, 6), np.int64), "of shape"), (np.zeros((2, 7)), "type float64"),
    (np.array([[0, 1, 2, 3, 4, 5, 6]]), r"row 0: item is 1, expected \["),
])
def test_wrong_ids_raise(day, ids, message):
    with pytest.raises(ValueError, match=message):
        trainer_module.load(best(day), "cpu").predict(ids)


def test_wrong_raw_values_raise(day):
    model = trainer_module.load(best(day), "cpu")
    row = {"user": ["u1"], "item": [3], "price": ["1.5"], "age": [20], "genres": ["pop"]}
    assert model.predict(row).shape == (1,)
    with pytest.raises(ValueError, match="row 0: price is 'dear', expected a number, or nothing"):
        model.predict({**row, "price": ["dear"]})
    with pytest.raises(UserError, match="no column age"):
        model.predict({name: values for name, values in row.items() if name != "age"})


@pytest.mark.parametrize("options, message", [
    ({"batch_size": 0}, "argument --batch_size: 0 must be at least 1"), ({"device": "tpu"}, "--device: invalid choice"),
])
def test_load_never_ends_the_process(day, options, message):
    with pytest.raises(UserError, match=message):
        trainer_module.load(best(day), **{"device": "cpu", **options})


def test_load_on_cuda_again_and_again(day, monkeypatch):
    """OneEmbedding keeps a table until the process ends, and aborts at a second one of the same name."""
    host_embedding.install(monkeypatch.setattr)
    frame = pd.read_csv(day / "day1.csv", dtype={"user": str}, nrows=50)
    scores = [trainer_module.load(best(day), device).predict(frame) for device in ("cuda", "cuda", "cpu")]
    assert (scores[0] == scores[1]).all() and scores[1] == pytest.approx(scores[2], abs=1e-6)


def test_a_table_that_another_process_has_open_is_left_alone(day, tmp_path, monkeypatch, fails):
    host_embedding.install(monkeypatch.setattr)
    store = TableStore("embedding", "persistent_path", str(tmp_path / "t"), 4, 9)
    chunks.make_empty_table(store.own_folder(), store.width, str(tmp_path / "t" / "empty"))
    before = sorted(tmp_path.rglob("*"))
    with locked(tmp_path / "t" / "0-1" / "LOCK"):
        error = fails("--model_load_dir", best(day), "--predict", day / "new.csv", "--predict_output",
                      tmp_path / "p.csv", "--device", "cuda", "--persistent_path", store.path)
    assert error == (f"error: another process has the table in {store.path}/0-1 open, and on CUDA only one can; wait "
                     "for its end, give another --persistent_path, to which the rows are copied, or use --device cpu")
    assert sorted(tmp_path.rglob("*")) == before


def test_other_threads_are_told(day):
    model, errors = trainer_module.load(best(day), "cpu"), []

    def work(job):
        try:
            job()
        except UserError as error:
            errors.append(str(error))

    for job in (lambda: model.predict(np.zeros((1, 7), np.int64)), lambda: trainer_module.load(best(day), "cpu")):
        thread = threading.Thread(target=work, args=(job,))
        thread.start()
        thread.join()
    assert len(errors) == 2 and all("in the thread that imported it only" in error for error in errors)


def test_output_files(day, tmp_path, fails):
    target = tmp_path / "out.parquet"
    predict(day, day / "new.csv", target)
    before = target.read_bytes()
    options = ["--model_load_dir", best(day), "--predict", day / "new.csv", "--predict_output", target]
    assert "exists already; name another file or add --overwrite" in fails(*options)
    assert target.read_bytes() == before
    bad = tmp_path / "bad.csv"
    bad.write_text((day / "new.csv").read_text(encoding="utf-8") + "1,u1,3,dear,20,pop,r\n", encoding="utf-8")
    options[3] = bad
    assert "bad.csv, line 452: price is 'dear', expected a number" in fails(*options, "--overwrite")
    assert target.read_bytes() == before and sorted(path.name for path in tmp_path.iterdir()) == [
        "bad.csv", "out.parquet"]
    assert predict(day, day / "new.csv", target, "--overwrite").num_rows == 450
    strange = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.csv")
    assert "has bytes that are not UTF-8" in fails(*options[:3], day / "new.csv", "--predict_output", strange)
    assert "no column 'none'" in fails(*options[:3], day / "new.csv", "--predict_output", tmp_path / "x",
                                       "--keep_columns", "none")


def test_no_rows_are_scored_as_no_rows(day, tmp_path, fails, capfd):
    """As of an hour without any: a header only, parquet or shards without rows; all ways write the columns and no row,
    and say so. A file without even a header, or a folder without files, is a mistake."""
    header = tmp_path / "header.csv"
    header.write_text((day / "new.csv").read_text(encoding="utf-8").split("\n")[0] + "\n", encoding="utf-8")
    pq.write_table(pa_csv.read_csv(day / "new.csv")[:0], tmp_path / "raw.parquet")
    encode = ["--dataset", str(day / "data"), "--keep", "request", "--overwrite", "--output_dir"]
    for rows in (header, tmp_path / "raw.parquet"):
        assert encode_rows.main([*encode, str(tmp_path / "ids"), "--input", str(rows)]) == 0
        assert f"wrote {tmp_path}/ids: 0 rows with labels, 5 fields\n" in capfd.readouterr().out
    shutil.copy(tmp_path / "ids" / "part-00000.parquet", tmp_path / "ids.parquet")  # without what describes it
    some = tmp_path / "some"
    some.mkdir()
    shutil.copy(header, some / "1.csv")
    shutil.copy(day / "new.csv", some / "2.csv")
    assert encode_rows.main([*encode, str(tmp_path / "some ids"), "--input", str(some)]) == 0
    pq.write_table(pq.read_table(tmp_path / "ids"), tmp_path / "some ids" / "part-00001.parquet")
    (tmp_path / "some ids" / "_dataset_info.json").unlink()
    (tmp_path / "empty.csv").touch()
    (tmp_path / "none").mkdir()
    wrong = {"empty.csv": "is empty, expected rows", "none": "has no data files in it"}
    score = [f"--model_load_dir={best(day)}", "--device=cpu", "--overwrite", "--predict_output", tmp_path / "p.parquet"]
    counts = {"header.csv": 0, "raw.parquet": 0, "ids": 0, "ids.parquet": 0, "some": 450, "some ids": 450}
    for name, count in counts.items():
        trainer_module.main([*map(str, score), "--predict", str(tmp_path / name)])
        assert f"\nWrote {count} probabilities to {tmp_path}/p.parquet\n" in capfd.readouterr().out
        assert pq.read_table(tmp_path / "p.parquet").num_rows == count
    for name, message in wrong.items():
        assert f"{name} {message}" in fails(*score, "--predict", tmp_path / name)
        assert encode_rows.main([*encode, str(tmp_path / "ids"), "--input", str(tmp_path / name)]) == 1
        assert f"{name} {message}" in capfd.readouterr().err
    if has_onnx():
        no_rows_as_onnx(day, tmp_path, wrong, capfd)


def no_rows_as_onnx(day, tmp_path, wrong, capfd):
    import export_onnx

    for inputs, names in (("raw", ("header.csv", "raw.parquet")), ("ids", ("ids", "ids.parquet"))):
        path, output = tmp_path / f"{inputs}.onnx", tmp_path / "s.parquet"
        export_onnx.main([f"--model_load_dir={best(day)}", f"--output={path}", f"--inputs={inputs}", "--device=cpu"])
        for name in names:
            capfd.readouterr()
            assert score_onnx.main([str(path), str(tmp_path / name), f"--output={output}", "--overwrite"]) == 0
            assert capfd.readouterr().out == f"wrote {output}: 0 rows\n" and pq.read_table(output).num_rows == 0
        for name, message in wrong.items():
            assert score_onnx.main([str(path), str(tmp_path / name)]) == 1
            assert f"{name} {message}" in capfd.readouterr().err


def test_unknown_values_and_ids(day, tmp_path, fails, capfd):
    predict(day, day / "new.csv", tmp_path / "a.parquet")
    assert "values that it does not know: user " in capfd.readouterr().out
    options = ["--model_load_dir", best(day), "--predict_output", tmp_path / "b.parquet", "--predict"]
    error = fails(*options, day / "new.csv", "--unknown_ids", "error")
    assert "has values that the model does not know (user " in error
    model = trainer_module.load(best(day), "cpu")
    table = pq.read_table(day / "data" / "test").to_pandas()
    table.loc[3, "user"] = 10**6
    table.to_parquet(tmp_path / "ids.parquet")
    shutil.copy(day / "data" / "dataset_info.json", tmp_path)
    assert "column user has ids outside its table, the first in row 3" in fails(*options, tmp_path / "ids.parquet")
    found = predict(day, tmp_path / "ids.parquet", tmp_path / "c.parquet", "--unknown_ids", "oov")["probability"]
    for missing in (pa.uint32(), pa.uint64()):
        column = pa.array([None if row == 3 else value for row, value in enumerate(table["user"])], missing)
        ids = pa.Table.from_pandas(table)
        pq.write_table(ids.set_column(ids.column_names.index("user"), "user", column), tmp_path / "ids.parquet")
        assert "column user has ids outside its table, the first in row 3" in fails(*options, tmp_path / "ids.parquet")
    table.loc[3, "user"] = model.encoder.fields[0].oov
    expected = model.predict(table[model.columns].to_numpy())
    assert np.abs(found.to_numpy() - expected).max() < 1e-6


def test_raw_rows_in_a_folder_of_the_dataset(day, tmp_path):
    shutil.copytree(day / "data", tmp_path / "data")
    (tmp_path / "data" / "new").mkdir()
    pq.write_table(pa_csv.read_csv(day / "new.csv"), tmp_path / "data" / "new" / "raw.parquet")
    found = predict(day, tmp_path / "data" / "new", tmp_path / "a.parquet")
    assert found.equals(predict(day, day / "new.csv", tmp_path / "b.parquet"))


def test_another_vocabulary_is_refused(day, tmp_path, fails):
    """Also where the sizes of all tables agree: the other dataset has the same tokens in another order."""
    other = tmp_path / "other"
    shutil.copytree(day / "data", other)
    encoder = Encoder.load(other)
    path = other / "vocabulary" / "user.parquet"
    table = pq.read_table(path).to_pandas()
    table["token"] = table["token"].to_numpy()[::-1]
    pq.write_table(pa.Table.from_pandas(table, preserve_index=False), path)
    field = encoder.fields[0]
    field.read(other, len(table))
    from tools.converter.encoders import fingerprint

    info = json.loads((other / "dataset_info.json").read_text(encoding="utf-8"))
    info["fields"][0]["fingerprint"], info["fingerprint"] = field.digest(), fingerprint(encoder.fields)
    del info["files"]["vocabulary/user.parquet"]
    (other / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    options = ["--data_dir", other, "--model_load_dir", best(day), "--device", "cpu"]
    assert "encoded with another vocabulary" in fails(*options, "--eval_only")
    places = ["--persistent_path", tmp_path / "t", "--persistent_path_fm", tmp_path / "f"]
    assert "did not grow out of the one" in fails(*options, *places)
    assert "encoded with another vocabulary" in fails(
        "--model_load_dir", best(day), "--predict", other / "test", "--predict_output", tmp_path / "x")


# -------------------------------------------------------------------------------------------------- changed or damaged


@pytest.fixture
def packed(day, tmp_path):
    assert pack_checkpoint.main(["--model_load_dir", best(day), "--output_dir", str(tmp_path / "packed")]) == 0
    return tmp_path / "packed"


def edit_json(path, change):
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def test_a_changed_encoder_of_a_checkpoint_is_refused(day, packed, tmp_path, fails, capfd):
    """Also what no fingerprint covers: which raw column has which name in a text without header, say."""
    info, vocabulary = packed / "encoder/dataset_info.json", packed / "encoder/vocabulary/user.parquet"
    options = ["--model_load_dir", packed, "--predict", day / "new.csv", "--predict_output", tmp_path / "p.parquet"]
    for path, change in ((info, lambda: edit_json(info, lambda content: content["raw"].update(quotes=False))),
                         (vocabulary, lambda: flip(vocabulary, 60)), (vocabulary, vocabulary.unlink)):
        before = path.read_bytes()
        change()
        error = f"{path} is missing or was changed or damaged since it was written; use another checkpoint"
        assert error in fails(*options)
        for tool, output in ((pack_checkpoint, "--output_dir"), (export_embeddings, "--output")):
            assert tool.main(["--model_load_dir", str(packed), output, str(tmp_path / "out")]) == 1
            assert error in capfd.readouterr().err
        path.write_bytes(before)
    edit_json(info, lambda content: content["source"].update(tool="by hand"))
    assert predict(day, day / "new.csv", tmp_path / "q.parquet", "--skip_checksums", checkpoint=packed).num_rows == 450


def test_an_endless_file_is_not_packed(packed, tmp_path, capfd):
    """Without checksums nothing but the packing itself notices what a link leads to."""
    path = packed / "encoder/vocabulary/user.parquet"
    path.unlink()
    path.symlink_to("/dev/zero")
    assert pack_checkpoint.main(["--model_load_dir", str(packed), "--output_dir", str(tmp_path / "out"),
                                 "--skip_checksums"]) == 1
    assert f"{path} is not a regular file" in capfd.readouterr().err and not (tmp_path / "out").exists()


def test_what_is_read_is_not_written(day, packed, tmp_path, fails, capfd):
    shutil.copytree(day / "data/test", tmp_path / "rows")
    shutil.copy(day / "new.csv", tmp_path)
    files = [tmp_path / "new.csv", *(tmp_path / "rows").iterdir()]
    before = [path.read_bytes() for path in files]
    for rows, output in ((files[0], files[0]), (tmp_path / "rows", files[1])):
        error = fails("--model_load_dir", packed, "--predict", rows, "--predict_output", output, "--overwrite")
        assert f"{output} is part of the input {rows}; name another file" in error
        assert score_onnx.main([str(day / "none.onnx"), str(rows), "--output", str(output), "--overwrite"]) == 1
        assert "is part of the input" in capfd.readouterr().err
    state = packed / "state.json"
    assert export_embeddings.main(["--model_load_dir", str(packed), "--output", str(state), "--overwrite"]) == 1
    assert "is part of the input" in capfd.readouterr().err and state.stat().st_size
    assert [path.read_bytes() for path in files] == before
    assert "ends in .txt" in fails("--model_load_dir", packed, "--predict", files[0], "--predict_output", "x.txt")


def test_the_folder_of_a_run_is_not_a_checkpoint(day, tmp_path, fails):
    run = Path(best(day)).parent
    error = fails("--model_load_dir", run, "--predict", day / "new.csv", "--predict_output", tmp_path / "x")
    assert f"do you mean {run / 'best_checkpoint'}?" in error


def test_the_encoder_of_another_dataset_is_refused(day, packed, tmp_path, fails):
    """Also where it is whole and all checksums fit."""
    convert(tmp_path / "other", write_rows(tmp_path / "other.csv", 1000, 7))
    shutil.copytree(tmp_path / "other/vocabulary", packed / "encoder/vocabulary", dirs_exist_ok=True)
    shutil.copy(tmp_path / "other/dataset_info.json", packed / "encoder")
    error = fails("--model_load_dir", packed, "--predict", day / "new.csv", "--predict_output", tmp_path / "p.parquet",
                  "--skip_checksums")
    assert "does not encode rows as the data of the checkpoint was encoded; use another checkpoint" in error


def test_damaged_vocabulary_is_refused_at_the_start_of_a_training(day, tmp_path, fails):
    shutil.copytree(day / "data", tmp_path / "data")
    places = ["--persistent_path", tmp_path / "t", "--persistent_path_fm", tmp_path / "f", "--device", "cpu"]
    flip(tmp_path / "data/vocabulary/user.parquet", 60)
    assert "vocabulary/user.parquet was changed or damaged" in fails("--data_dir", tmp_path / "data", *places)
    info = tmp_path / "data/dataset_info.json"
    edit_json(info, lambda content: content["fields"][0]["encoding"].update(vocabulary="../../outside"))
    assert "cannot be used (fields, encoding, vocabulary is '../../outside')" in fails(
        "--data_dir", tmp_path / "data", *places)


def test_damaged_shards_to_score_are_refused(day, tmp_path, fails):
    """Rows of a dataset, and rows that encode_rows.py made."""
    shutil.copytree(day / "data", tmp_path / "data")
    assert encode_rows.main(["--dataset", str(day / "data"), "--input", str(day / "new.csv"), "--output_dir",
                             str(tmp_path / "ids")]) == 0
    for shard in (tmp_path / "data/test/part-00000.parquet", tmp_path / "ids/part-00000.parquet"):
        flip(shard, 200)
        options = ["--model_load_dir", best(day), "--predict_output", tmp_path / "p", "--predict"]
        for rows in (shard, shard.parent):
            assert f"{shard} was changed or damaged since dataset_info.json was written" in fails(*options, rows)


def test_damaged_onnx_files_are_refused(day, tmp_path, monkeypatch, capsys):
    """The model, and the file of its numbers where it has one (as above 2 GB)."""
    if not has_onnx():
        pytest.skip("onnx and onnxruntime are not installed")
    import export_onnx
    import score_onnx

    monkeypatch.setattr(export_onnx, "LARGEST_FILE", 0)
    path, data = tmp_path / "model.onnx", tmp_path / "model.onnx.data"
    assert export_onnx.main(["--model_load_dir", best(day), "--output", str(path), "--device", "cpu"]) == 0
    score = [str(path), str(day / "new.csv"), "--overwrite", "--output", str(tmp_path / "scores.csv")]
    assert score_onnx.main(score) == 0 and not list(tmp_path.glob(".*"))
    for file in (path, data):
        content = file.read_bytes()
        for place in (1000, len(content) // 2, len(content) - 1):
            flip(file, place)
            assert score_onnx.main(score) == 1
            assert f"error: {file} was changed or damaged since it was written" in capsys.readouterr().err
            file.write_bytes(content)
        file.write_bytes(content[:-40])
        assert score_onnx.main(score) == 1 and str(file) in capsys.readouterr().err
        file.write_bytes(content)
    import onnx

    onnx.save_model(onnx.load(path), path)  # as a program does that changes it
    assert score_onnx.main(score) == 1 and "or add --skip_checksums" in capsys.readouterr().err
    assert score_onnx.main([*score, "--skip_checksums"]) == 0
    path.unlink()
    os.mkfifo(path)
    assert score_onnx.main([*score, "--skip_checksums"]) == 1 and "not a regular" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------- moved, and looked into


def test_packed_checkpoint_works_anywhere(day, tmp_path):
    assert pack_checkpoint.main(["--model_load_dir", best(day), "--output_dir", str(tmp_path / "packed")]) == 0
    expected = predict(day, day / "new.csv", tmp_path / "a.parquet")
    moved = tmp_path / "elsewhere" / "model"
    moved.parent.mkdir()
    (tmp_path / "packed").rename(moved)
    for path in moved.rglob("*"):
        assert str(day / "save") not in str(path)
    hidden = day.with_name("hidden")
    day.rename(hidden)  # nothing of the original is needed
    try:
        found = predict(day, hidden / "new.csv", tmp_path / "b.parquet", checkpoint=moved)
        assert found.equals(expected)
        trainer_module.main(["--data_dir", str(hidden / "data"), "--model_load_dir", str(moved), "--eval_only",
                             "--device", "cpu"])
    finally:
        hidden.rename(day)
    assert pack_checkpoint.main(["--model_load_dir", best(day), "--output_dir", str(moved)]) == 1


def test_embeddings(day, tmp_path):
    path = tmp_path / "embeddings.parquet"
    assert export_embeddings.main(["--model_load_dir", best(day), "--output", str(path)]) == 0
    table, encoder = pq.read_table(path).to_pandas(), Encoder.load(day / "data")
    assert table["global_id"].tolist() == list(range(len(table))) and table["field"].unique().tolist() == [
        field.name for field in encoder.fields]
    vocabulary = pq.read_table(day / "data" / "vocabulary" / "user.parquet").to_pandas()
    users = table[table.field == "user"].dropna(subset=["token"])
    assert (users[["token", "id", "count"]].to_numpy() == vocabulary[["token", "id", "count"]].to_numpy()).all()
    model = trainer_module.load(best(day), "cpu").trainer.model
    rows = model.embedding.weight.to_local().numpy()[:-1]
    assert (np.stack(table["vector"]) == rows).all()
    assert (table["first_order"].to_numpy() == model.embedding_fm.weight.to_local().numpy()[:-1, 0]).all()


# -------------------------------------------------------------------------------------------------------------- growth


@pytest.fixture(scope="module")
def grown(day, tmp_path_factory):
    """The data of a second day, with new users, grown out of the first."""
    folder = tmp_path_factory.mktemp("grown")
    write_rows(folder / "day2.csv", 3000, 3, [*USERS, *(f"new{i}" for i in range(20))])
    return convert(folder / "data", folder / "day2.csv", base=day / "data")


def rows_of(checkpoint):
    """{table: {id: row}}"""
    state, found = checkpoints.read_checkpoint(str(checkpoint)), {}
    for store in checkpoints.saved_tables(str(checkpoint), state):
        saved = state["tables"][store.name]
        blocks = store.read_snapshot(saved["snapshot"], saved["processes"])
        found[store.name] = {int(key): row.copy() for keys, rows in blocks for key, row in zip(keys, rows)}
    return found


@pytest.mark.parametrize("new_rows", ["oov", "normal"])
def test_rows_move_to_their_new_ids(day, grown, tmp_path, new_rows):
    start = train(grown, tmp_path, "--model_load_dir", best(day), "--new_rows", new_rows, "--save_initial_model",
                  "--train_batches", "1").with_name("initial_checkpoint")
    old, new = Encoder.load(day / "data"), Encoder.load(grown)
    before, after = rows_of(best(day)), rows_of(start)
    assert len(new.fields[0].vocabulary) >= len(old.fields[0].vocabulary) + 15
    for table, dim in (("embedding", 4), ("embedding_fm", 1)):
        assert len(after[table]) == sum(field.table_size for field in new.fields)
        for was, now in zip(old.fields, new.fields):
            first, second = old.offsets[was.name], new.offsets[now.name]
            for local in range(was.table_size):
                moved = now.oov if local == was.oov else local
                assert np.array_equal(before[table][first + local], after[table][second + moved]), (was.name, local)
            oov = before[table][first + was.oov] if was.oov is not None else None
            for local in range(was.oov or 0, now.oov or 0):  # tokens of the second day
                row = after[table][second + local]
                assert not row[dim:].any()
                assert np.array_equal(row[:dim], oov[:dim]) if new_rows == "oov" else 0 < np.abs(row[:dim]).max() < 1e-3


def test_a_new_day_continues_from_the_day_before(day, grown, tmp_path, capfd):
    """One epoch from the first day's model is better than one epoch from nothing; and it can be exported and scored."""
    scores = {}
    for name, options in (("from nothing", []), ("from day 1", ["--model_load_dir", best(day)])):
        capfd.readouterr()
        checkpoint = train(grown, tmp_path / name, "--train_batches", "9", *options)
        line = [line for line in capfd.readouterr().out.splitlines() if "test AUC" in line][-1]
        scores[name] = float(line.split("test AUC ")[1].split(",")[0])
    assert scores["from day 1"] > scores["from nothing"] + 0.02
    resumed = ["--resume", "--train_batches", "6"]
    assert train(grown, tmp_path / "from day 1", *resumed).exists()
    assert predict(day, grown / "test", tmp_path / "p.parquet", checkpoint=checkpoint).num_rows > 100


def test_rows_of_grown_data_on_the_old_model(day, grown, tmp_path, fails):
    options = ["--model_load_dir", best(day), "--predict", grown / "test", "--predict_output", tmp_path / "p.parquet"]
    assert "has grown since the model was trained; add --unknown_ids oov" in fails(*options)
    found = predict(day, grown / "test", tmp_path / "p.parquet", "--unknown_ids", "oov")["probability"].to_numpy()
    frame = pd.read_csv(grown.parent / "day2.csv", dtype=str, keep_default_na=False).set_index("request")
    rows = frame.loc[pq.read_table(grown / "test")["request"].to_pylist()]
    assert np.abs(found - trainer_module.load(best(day), "cpu").predict(rows)).max() < 1e-6
    assert "another vocabulary" in fails("--data_dir", grown, "--model_load_dir", best(day), "--eval_only")


def test_rows_of_a_growth_that_is_none(day, grown, tmp_path, fails):
    """Also where it says that it is one: with the vocabularies beside the rows that is proven."""
    other = convert(tmp_path / "other", write_rows(tmp_path / "other.csv", 3000, 9))
    info = json.loads((other / "dataset_info.json").read_text(encoding="utf-8"))
    info["grown_from"] = json.loads((grown / "dataset_info.json").read_text(encoding="utf-8"))["grown_from"]
    (other / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    assert "field user did not keep its ids" in fails(
        "--model_load_dir", best(day), "--predict", other / "test", "--predict_output", tmp_path / "x", "--unknown_ids",
        "oov")


def test_score_onnx_needs_no_oneflow(day, tmp_path):
    """Nor pandas, scikit-learn or petastorm: it runs where onnxruntime, numpy and pyarrow are."""
    if not has_onnx():
        pytest.skip("onnx and onnxruntime are not installed")
    import export_onnx

    path = tmp_path / "model.onnx"
    assert export_onnx.main(["--model_load_dir", best(day), "--output", str(path), "--device", "cpu"]) == 0
    code = f"""
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("oneflow", "pandas", "sklearn", "scipy", "petastorm", "psutil", "tqdm", "onnx"):
            raise ImportError(name + " must not be needed")
sys.meta_path.insert(0, Refuse())
sys.path.insert(0, {str(ROOT / "tools")!r})
import score_onnx
sys.exit(score_onnx.main([{str(path)!r}, {str(day / "new.csv")!r}]))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0] == '"probability"' and len(lines) == 451
    expected = predict(day, day / "new.csv", tmp_path / "p.parquet")["probability"].to_numpy()
    assert np.abs(np.array(lines[1:], float) - expected).max() < 1e-6


# ----------------------------------------------------------------------------------------------------------------- onnx


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """A model of what is rare: lists of one value, quantiles of several numbers of bins, negatives kept seldom."""
    if not has_onnx():
        pytest.skip("onnx and onnxruntime are not installed")
    folder = tmp_path_factory.mktemp("odd.parts ü[1]#")
    write_rows(folder / "day1.csv", 2000, 1)
    assert table_to_parquet.main(
        ["--input", str(folder / "day1.csv"), "--output_dir", str(folder / "data"), "--label", "clicked",
         "--categorical", "user", "--numeric", "item,price,age", "--numeric_bins", "price=20,age=5", "--list", "genres",
         "--list_length", "1", "--drop", "request"]) == 0
    train(folder / "data", folder, "--negative_sampling_rate", "0.0001", "--train_batches", "100")
    return folder


def export(folder, *options):
    import export_onnx

    path = folder / f"model{len(list(folder.glob('*.onnx')))}.onnx"
    assert export_onnx.main(["--model_load_dir", best(folder), "--output", str(path), "--device", "cpu", *options]) == 0
    return str(path)


def odd_rows():
    """Rows of all combinations of values that are rare."""
    numbers = ["", "inf", "-inf", "-0.0", "-2.7", "2.7", "1e300", "-1e300"]
    lists = ["", "pop", "pop|rock", "|é", "||", "never seen|pop"]
    rows = [{"user": f"u{place}", "item": item, "price": price, "age": age, "genres": lists[place % len(lists)]}
            for place, (item, price, age) in enumerate(itertools.product(numbers, repeat=3))]
    return pd.DataFrame(rows)


def test_rare_values_score_alike_as_onnx(odd, tmp_path):
    import score_onnx

    odd_rows().to_csv(tmp_path / "rows.csv", index=False)
    expected = predict(odd, tmp_path / "rows.csv", tmp_path / "p.parquet")["probability"].to_numpy()
    assert score_onnx.main([export(odd), str(tmp_path / "rows.csv"), "--output", str(tmp_path / "o.parquet")]) == 0
    found = pq.read_table(tmp_path / "o.parquet")["probability"].to_numpy()
    assert expected.std() > 1e-6 and np.abs(found / expected - 1).max() < 1e-4


@pytest.mark.parametrize("bins", [["--numeric_bins", "same=5"], [], ["--numeric_bins", "5"]])
def test_text_without_header_and_fields_without_tokens(tmp_path, bins):
    """Separators that are not found by looking; the vocabulary of `rare` is empty, `same` has no borders.

    Also where all numbers are of one kind, and where texts become booleans and dates in a data frame.
    """
    if not has_onnx():
        pytest.skip("onnx and onnxruntime are not installed")
    import score_onnx

    rng = np.random.default_rng(0)
    rows = [["01"[rng.random() < 0.2 + 0.1 * (i % 5)], f"u{i % 5}", f"r{i}", "7", i % 3 - 1, i % 2 == 0,
             f"2024-01-0{1 + i % 7}"] for i in range(600)]
    names = ["clicked", "user", "rare", "same", "number", "flag", "day"]
    for name, cells in (("labelled", rows), ("unlabelled", [row[1:] for row in rows])):
        (tmp_path / f"{name}.txt").write_text("".join(":".join(map(str, row)) + "\n" for row in cells))
    data = ["--output_dir", str(tmp_path / "data"), "--label", "clicked", "--columns", ",".join(names), "--separator",
            ":", "--categorical", "user,rare,flag,day", "--numeric", "same,number", *bins]
    assert table_to_parquet.main(["--input", str(tmp_path / "labelled.txt"), *data]) == 0
    train(tmp_path / "data", tmp_path, "--eval_interval", "30")
    path, frame = export(tmp_path), pd.DataFrame(rows, columns=names).astype({"day": "datetime64[ns]"})
    frame.to_parquet(tmp_path / "frame.pq")
    expected = trainer_module.load(best(tmp_path), "cpu").predict(frame)
    assert expected.std() > 0.01
    encoded = []
    for name in ("labelled.txt", "unlabelled.txt", "frame.pq"):
        file, output = tmp_path / name, tmp_path / f"{name}.parquet"
        assert score_onnx.main([path, str(file), "--output", str(output)]) == 0
        scores = [pq.read_table(output)["probability"].to_numpy()]
        scores.append(predict(tmp_path, file, tmp_path / f"{name}.csv")["probability"].to_numpy())
        assert np.abs(np.array(scores) - expected).max() < 1e-6, name
        encoded.append(tmp_path / f"{name}.d")
        assert encode_rows.main(["--dataset", str(tmp_path / "data"), "--input", str(file), "--output_dir",
                                 str(encoded[-1])]) == 0
        assert pq.read_table(encoded[-1], columns=names[1:]) == pq.read_table(encoded[0], columns=names[1:]), name
    scores = predict(tmp_path, encoded[0], tmp_path / "encoded.csv")["probability"].to_numpy()
    assert np.abs(scores - expected).max() < 1e-6
    assert table_to_parquet.main(["--base", str(tmp_path / "data"), "--input", str(tmp_path / "labelled.txt"),
                                  "--output_dir", str(tmp_path / "grown")]) == 0


def test_corrected_probabilities_keep_their_digits(odd, tmp_path):
    """Also where the model is sure: p / (p + (1 - p) / rate) of float32 probabilities would be off by 1e-4."""
    from tools.serving import onnx_graph
    from tools.serving.onnx_rows import OnnxModel
    from tools.serving.weights import read_weights

    weights = read_weights(best(odd))
    weights.layers[-1][1][:] = 9  # certain of a click before the correction
    import onnx

    onnx.save(onnx_graph.build(weights, None, False, ""), tmp_path / "sure.onnx")
    ids = ids_in(odd / "data" / "test", trainer_module.load(best(odd), "cpu").columns)
    probs = OnnxModel(tmp_path / "sure.onnx", checksums=False).run({"ids": ids.astype(np.int64)}).astype(np.float64)
    weights.state["model"]["negative_sampling_rate"] = 1.0
    weights.layers[-1][1][:] += np.float32(np.log(0.0001))
    onnx.save(onnx_graph.build(weights, None, False, ""), tmp_path / "plain.onnx")
    plain = OnnxModel(tmp_path / "plain.onnx", checksums=False).run({"ids": ids.astype(np.int64)})
    assert 0.1 < plain.mean() < 0.9 and np.abs(probs - plain).max() < 1e-6


def test_rows_to_compare_are_of_the_models_data(odd, day, grown, tmp_path, capsys):
    """Where the data is given and is other data: one line. Where it has been moved or replaced since: random ids."""
    import export_onnx

    options = ["--model_load_dir", best(odd), "--output", str(tmp_path / "m.onnx"), "--device", "cpu", "--overwrite"]
    (tmp_path / "damaged" / "val").mkdir(parents=True)
    (tmp_path / "damaged" / "val" / "a.parquet").write_bytes(b"PAR1...")
    for folder, message in ((day / "data", "encoded with another vocabulary"), (tmp_path, "no *.parquet files in"),
                            (tmp_path / "damaged", "is not a readable parquet file")):
        capsys.readouterr()
        assert export_onnx.main([*options, "--data_dir", str(folder)]) == 1
        error = capsys.readouterr().err
        assert error.startswith(f"error: --data_dir {folder} cannot be compared on: ") and message in error
        assert error.count("\n") == 1 and not (tmp_path / "m.onnx").exists()
    (odd / "data").rename(odd / "moved")
    shutil.copytree(day / "data", odd / "data")
    try:
        assert export_onnx.main(options) == 0
    finally:
        shutil.rmtree(odd / "data")
        (odd / "moved").rename(odd / "data")
    assert "10000 rows drawn at random" in capsys.readouterr().out


def test_importance_of_lists(odd, day, capsys):
    """The columns of a list are permuted together; rows of other data are refused."""
    import field_importance

    options = ["--model_load_dir", best(day), "--device", "cpu", "--data_dir"]
    assert field_importance.main([*options, str(day / "data")]) == 0
    lines = capsys.readouterr().out.splitlines()
    fields = [line.split()[0] for line in lines if line.count(".") == 4]
    assert sorted(fields) == ["age", "genres", "item", "price", "user"] and fields[0] == "user"
    assert field_importance.main([*options, str(odd / "data")]) == 1
    assert "error: " in capsys.readouterr().err


def test_large_models_keep_their_numbers_beside_them(odd, tmp_path, monkeypatch):
    import export_onnx

    from tools.serving.onnx_rows import OnnxModel

    whole = OnnxModel(export(odd))
    monkeypatch.setattr(export_onnx, "LARGEST_FILE", 1000)
    path = export(odd)
    assert os.path.exists(f"{path}.data") and not list(odd.glob(".deepfm*"))
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in (path, f"{path}.data"):
        shutil.move(name, moved)
    feed = whole.feed(pa.Table.from_pandas(odd_rows()))
    assert np.array_equal(whole.run(feed), OnnxModel(moved / os.path.basename(path)).run(feed))


@pytest.mark.parametrize("column, value, message", [
    ("price", "dear", "line 3: price is 'dear', expected a number, or nothing"),
    ("user", None, "line 3: 4 columns, expected 5 (user,item,price,age,genres)"),
])
def test_bad_rows_for_onnx_are_named(odd, tmp_path, capsys, column, value, message):
    import score_onnx

    rows = odd_rows()
    rows.to_csv(tmp_path / "rows.csv", index=False)
    lines = (tmp_path / "rows.csv").read_text(encoding="utf-8").splitlines()
    cells = lines[2].split(",")
    cells[list(rows).index(column)] = value
    lines[2] = ",".join(cell for cell in cells if cell is not None)
    (tmp_path / "rows.csv").write_text("\n".join(lines), encoding="utf-8")
    assert score_onnx.main([export(odd), str(tmp_path / "rows.csv"), "--output", str(tmp_path / "o.csv")]) == 1
    assert capsys.readouterr().err.endswith(f"error: {tmp_path / 'rows.csv'}, {message}\n")
    assert not list(tmp_path.glob("o.csv*"))


@pytest.mark.parametrize("value", [10**6, 0, -1, None])
def test_ids_that_are_not_of_their_table_are_refused_by_onnx(odd, tmp_path, capsys, value):
    import score_onnx

    rows = pq.read_table(odd / "data" / "test").to_pandas().astype({"item": "Int64"})
    rows.loc[3, "item"] = pd.NA if value is None else value
    rows.to_parquet(tmp_path / "ids.parquet")
    path, output = export(odd, "--inputs", "ids"), ["--output", str(tmp_path / "o.csv")]
    assert score_onnx.main([path, str(odd / "data" / "test"), *output]) == 0
    assert score_onnx.main([path, str(tmp_path / "ids.parquet"), *output, "--overwrite"]) == 1
    shown = "missing" if value is None else float(value)
    assert f"row 3 (counted from 0): item is {shown}, expected an id in [" in capsys.readouterr().err


def test_kept_columns_stay_as_they_are(odd, tmp_path, capfd, fails):
    """Numbers that the model reads too as they stand in a text file; lists in parquet only."""
    import score_onnx

    odd_rows().to_csv(tmp_path / "rows.csv", index=False)
    path = export(odd)
    for name in ("o.csv", "o.parquet"):
        assert score_onnx.main([path, str(tmp_path / "rows.csv"), "--output", str(tmp_path / name), "--keep_columns",
                                "price,genres"]) == 0
    assert pq.read_table(tmp_path / "o.parquet")["price"].to_pylist() == list(odd_rows().price)
    table = pa.table({**odd_rows(), "genres": [["pop"]] * len(odd_rows())})
    pq.write_table(table, tmp_path / "rows.parquet")
    capfd.readouterr()
    assert score_onnx.main([path, str(tmp_path / "rows.parquet"), "--keep_columns", "genres"]) == 1
    assert "cannot take the columns to keep" in capfd.readouterr().err
    assert "cannot take the columns to keep" in fails(
        "--model_load_dir", best(odd), "--predict", tmp_path / "rows.parquet", "--predict_output", tmp_path / "p.csv",
        "--keep_columns", "genres")
    assert not list(tmp_path.glob("p.csv*"))


def test_kept_columns_that_cannot_be_written(odd, tmp_path, capfd, fails):
    """By both programs alike: two columns of one name, and one of several types."""
    parts, path = tmp_path / "parts", export(odd)
    parts.mkdir()
    for number, (kind, similar) in enumerate(((pa.int64(), pa.int32()), (pa.float64(), pa.null()))):
        table = pa.Table.from_pandas(odd_rows())
        rid = pa.array([None if number and row == 7 else row for row in range(table.num_rows)], kind)
        hour = pa.array([None if number else row for row in range(table.num_rows)], similar)
        for name, column in (("rid", rid), ("probability", rid), ("hour", hour)):
            table = table.append_column(name, column)
        pq.write_table(table, parts / f"{number}.parquet")
    for keep, message in (("user,user", "the output would have two columns user"),
                          ("probability", "the output would have two columns probability"),
                          ("rid", "--keep_columns rid: the inputs have it as double and int64; give inputs of one")):
        assert score_onnx.main([path, str(parts), f"--output={tmp_path}/o.parquet", "--keep_columns", keep]) == 1
        assert message in capfd.readouterr().err
        assert message in fails("--model_load_dir", best(odd), "--predict", parts, "--predict_output",
                                tmp_path / "o.parquet", "--keep_columns", keep)
    assert not list(tmp_path.glob("o.parquet*"))
    one, other = tmp_path / "one.parquet", tmp_path / "other.parquet"  # missing in one part, but of one type
    assert score_onnx.main([path, str(parts), f"--output={one}", "--keep_columns", "hour"]) == 0
    predict(odd, parts, other, "--keep_columns", "hour")
    assert pq.read_table(one)["hour"] == pq.read_table(other)["hour"] and pq.read_table(one)["hour"].type == pa.int32()
