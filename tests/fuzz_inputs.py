"""What fuzz.py damages: whole inputs of every kind, the programs that read them, and what these give.

The inputs lie in folders, of which an attempt copies the one that its kind names: `trained` (a dataset and a run on
it), `foreign` (files of other programs), `raw` (raw rows, a dataset made of them, models that know its vocabularies).
"""

import csv
import hashlib
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tools")]

# folder: of the inputs; targets: patterns of files in it; ways: of damage, see `fuzz.damage`; tasks: see `task`;
# checked: whether the format has checksums, so that damage must be noticed
Kind = namedtuple("Kind", "folder targets ways tasks checked")
BYTES = ("flip", "zero", "cut", "append", "double", "swap")
PLACES = ("remove", "empty", "folder", "pipe", "device", "dangling")
ANY = (*BYTES, *PLACES)
HAS_ONNX = all(map(importlib.util.find_spec, ("onnx", "onnxruntime")))
TRAINER = ("evaluate", "evaluate", "predict", "predict", "resume")  # a resumption takes longest
TABLES = ["tables*/0-1/*", "tables*/0-1/*/*", "tables*/0-1/snapshots/*/*"]
PACKED = ["packed/state.json", "packed/dense.npz",
          *(f"packed/tables/*/0-1/{place}" for place in ("*", "*/*", "snapshots/*/*"))]
ENCODER = ["packed/encoder/*", "packed/encoder/vocabulary/*"]
MODEL_USERS = ("predict csv", "predict csv", "predict ids", *["export onnx"] * HAS_ONNX, "export embeddings", "pack")
KINDS = {
    "dataset_info": Kind("trained", ["data/dataset_info.json"], ("json", *ANY),
                         ("train", "evaluate", "inspect"), False),
    "shards": Kind("trained", ["data/*/*.parquet"], ANY, ("train", "evaluate"), True),
    "shards_inspected": Kind("trained", ["data/*/*.parquet"], ANY, ("inspect",), True),
    "rows_to_predict": Kind("trained", ["data/test/*.parquet"], ANY, ("predict",), True),
    "state": Kind("trained", ["save/*/state.json"], ("json", "json", *ANY), TRAINER, True),
    "state_forged": Kind("trained", ["save/*/state.json"], ("forged state",), TRAINER, False),
    "dense": Kind("trained", ["save/*/dense.npz"], ANY, TRAINER, True),
    "dense_forged": Kind("trained", ["save/*/dense.npz"], ("forged arrays", *BYTES), TRAINER, False),
    "dense_old": Kind("trained", ["old/best_checkpoint/dense/*", "old/best_checkpoint/dense/*/*"], ANY,
                      ("evaluate old",), False),
    "run_file": Kind("trained", ["save/run.json"], ("json", *ANY), ("resume",), False),
    "metrics": Kind("trained", ["save/logs/metrics.jsonl"], (*BYTES, "empty", "folder", "pipe", "dangling"),
                    ("resume",), True),
    "tables": Kind("trained", TABLES, ANY, TRAINER, True),
    "tables_unchecked": Kind("trained", TABLES, ANY, ("evaluate unchecked",), False),
    "strange": Kind("trained", ["save", "save/*", "save/*/state.json", "tables*", "tables*/0-1", "tables*/0-1/*",
                                "tables*/0-1/snapshots/*", "data", "data/*"], ("add",), TRAINER, True),
    "h5": Kind("foreign", ["h5/*"], (*ANY, "json"), ("convert h5",), False),
    "npz": Kind("foreign", ["npz/*"], (*ANY, "json"), ("convert npz",), False),
    "fuxictr_parquet": Kind("foreign", ["parquet/*"], (*ANY, "json"), ("convert parquet",), False),
    "csv": Kind("foreign", ["csv/*"], ANY, ("convert csv",), False),
    "csv_gz": Kind("foreign", ["gz/*"], (*BYTES[:-1], *PLACES), ("convert gz",), True),  # two whole ones may be swapped
    "table_csv": Kind("raw", ["day/day.csv"], ANY, ("make from csv", "grow csv", "encode csv"), False),
    "table_tsv": Kind("raw", ["day/day.tsv"], ANY, ("make from tsv", "describe tsv"), False),
    "table_gz": Kind("raw", ["day/day.csv.gz"], ANY, ("make from csv.gz",), True),
    "table_parquet": Kind("raw", ["day/day.parquet"], ANY, ("make from parquet", "encode parquet"), False),
    "vocabulary": Kind("raw", ["data/vocabulary/*"], ANY, ("encode csv", "grow csv", "train raw", "inspect"), True),
    "descriptions": Kind("raw", ["data/dataset_info.json"], ("json", "json", "json", *ANY),
                         ("encode csv", "grow csv", "train raw", "inspect"), False),
    "descriptions_forged": Kind("raw", ["data/dataset_info.json"], ("forged info",), ("encode csv", "grow csv"), False),
    "raw_csv": Kind("raw", ["rows/new.csv"], ANY, ("predict csv",), False),
    "raw_gz": Kind("raw", ["rows/new.csv.gz"], ANY, ("predict csv.gz",), True),
    "raw_parquet": Kind("raw", ["rows/new.parquet"], ANY, ("predict parquet",), False),
    "encoded_rows": Kind("raw", ["encoded/*.parquet"], ANY, ("predict ids",), True),
    "encoded_info": Kind("raw", ["encoded/_dataset_info.json"], ("json", "json", *ANY), ("predict ids",), False),
    "packed": Kind("raw", PACKED, ("json", *ANY), MODEL_USERS, True),
    "packed_unchecked": Kind("raw", [*PACKED, *ENCODER], ANY, ("predict unchecked", "pack unchecked"), False),
    "encoder": Kind("raw", ENCODER, ("json", *ANY), MODEL_USERS, True),
    "encoder_forged": Kind("raw", ["packed/encoder/dataset_info.json"], ("forged info",), MODEL_USERS[:-1], False),
    "grown": Kind("raw", ["grown/dataset_info.json", "grown/vocabulary/*"], ("json", *ANY), ("train grown",), False),
    "onnx": Kind("raw", ["onnx/raw.onnx", "onnx/ids.onnx"], ANY, ("score raw", "score ids"), True),
    "onnx_unchecked": Kind("raw", ["onnx/raw.onnx", "onnx/ids.onnx"], ANY, ("score raw unchecked",
                                                                            "score ids unchecked"), False),
    "onnx_rows": Kind("raw", ["rows/new.csv", "encoded/*.parquet"], ANY, ("score raw", "score ids"), False),
    "logs": Kind("raw", ["runs/*/logs/run.json", "runs/*/logs/metrics.jsonl"], ("json", "json line", *ANY),
                 ("plot", "compare", "compare json"), False),
    "sweep": Kind("raw", ["sweep/sweep.json", "sweep/*/logs/*"], ("json", "json", *ANY), ("sweep",), False),
    "predictions": Kind("raw", ["predictions/*"], ANY, ("calibrate",), False),
}
if not HAS_ONNX:
    KINDS = {name: kind for name, kind in KINDS.items() if not name.startswith("onnx")}


# ------------------------------------------------------------------------------------------------------------- making


def make_inputs(folder, run):
    """All folders of inputs below `folder`; run: as `fuzz.run_inside`."""
    __import__("deepfm_train_eval")  # before OneFlow, which it prepares
    made = folder / "made"
    make_trained(made / "trained", run)
    make_foreign(made / "foreign")
    make_raw(made / "raw", lambda module, *arguments: done(run(module, [*map(str, arguments)], folder / "log")))
    made.rename(folder / "inputs")  # no checkpoint finds the tables of the inputs beside its own
    return folder / "inputs"


def done(result):
    assert result[0] == 0, result


def make_trained(made, run):
    """A dataset, a finished run, its best checkpoint as earlier versions wrote it."""
    from conftest import make_dataset
    from test_checkpoints import old_checkpoint

    made.mkdir(parents=True)
    make_dataset(made / "data", rows=(403, 101, 97), digests=True)
    done(run("deepfm_train_eval", trainer_options(made, "--train_batches", "14"), made.parent / "log"))
    shutil.copytree(made / "save" / "best_checkpoint", made / "old" / "best_checkpoint")
    old_checkpoint(made / "old" / "best_checkpoint")


def make_foreign(made):
    """FuxiCTR's files of three versions, and Criteo's columns as text."""
    import numpy as np
    from test_h5_to_parquet import write_dataset

    for name, form in (("h5", "2.0"), ("npz", "2.2"), ("parquet", "2.3")):
        write_dataset(made / name, form)
    rng = np.random.default_rng(3)
    names = [f"I{i}" for i in range(1, 14)] + [f"C{i}" for i in range(1, 27)]
    (made / "csv").mkdir()
    for split, rows in (("train", 120), ("valid", 40), ("test", 40)):
        numbers, tokens = rng.integers(0, 30, (rows, 13)), rng.integers(0, 9, (rows, 26))
        lines = [",".join([str(row % 2), *map(str, numbers[row]), *(f"{token:08x}" for token in tokens[row])])
                 for row in range(rows)]
        (made / "csv" / f"{split}.csv").write_text("\n".join(["Label," + ",".join(names), *lines, ""]))
    shutil.copytree(made / "csv", made / "gz")
    subprocess.run(["gzip", "-n", *map(str, (made / "gz").iterdir())], check=True)


COLUMNS = ["--label", "clicked", "--categorical", "user,item", "--numeric", "price,age", "--numeric_bins", "price=9",
           "--list", "genres", "--list_length", "3", "--list_separator", "|", "--min_count", "3", "--memory_gb", "1"]
HASHED, KEPT = ["--hash", "request=64"], ["--keep", "request"]  # ONNX takes no raw hashed column


def make_raw(made, run):
    """Raw rows in four forms, datasets and models of them (packed: with a hashed field; plain: without), logs."""
    make_rows(made)
    for data, model, more in (("data", "packed", HASHED), ("plain_data", "plain", KEPT)):
        run("table_to_parquet", "--input", made / "day/day.csv", "--output_dir", made / data, *COLUMNS, *more)
        run("deepfm_train_eval", *trainer_options(made, "--train_batches", "9", data=data))
        run("pack_checkpoint", "--model_load_dir", made / "save/best_checkpoint", "--output_dir", made / model)
        for name in ("save", "tables", "tables_fm"):
            shutil.rmtree(made / name)
    run("table_to_parquet", "--base", made / "data", "--input", made / "day/more.csv", "--output_dir", made / "grown")
    run("encode_rows", "--dataset", made / "data", "--input", made / "rows/new.csv", "--output_dir", made / "encoded")
    (made / "onnx").mkdir()
    for name, model in (("raw", "plain"), ("ids", "packed")) if HAS_ONNX else ():
        run("export_onnx", "--model_load_dir", made / model, "--output", made / f"onnx/{name}.onnx", "--inputs", name,
            "--device", "cpu")
    for name in ("plain", "plain_data"):
        shutil.rmtree(made / name)
    make_logs(made, run)


def make_rows(made):
    """Labelled rows in day/, unlabelled ones in rows/: text, gzip, parquet with a list column."""
    import pyarrow as pa
    import pyarrow.csv as pa_csv
    import pyarrow.parquet as pq
    from test_serving import USERS, write_rows

    for name in ("day", "rows", "predictions"):
        (made / name).mkdir(parents=True)
    write_rows(made / "day/more.csv", 200, 4, [*USERS[:20], "grown", "auch gewachsen: ß"])
    for path, rows, labelled in ((made / "day/day", 500, True), (made / "rows/new", 60, False)):
        write_rows(path.with_suffix(".csv"), rows, 1, labelled=labelled)
        subprocess.run(["gzip", "-nk", path.with_suffix(".csv")], check=True)
        texts = pa_csv.ConvertOptions(column_types={"item": pa.int64(), "price": pa.float64()})
        table = pa_csv.read_csv(path.with_suffix(".csv"), convert_options=texts)
        lists = [[part for part in text.split("|") if part] for text in table["genres"].to_pylist()]
        table = table.set_column(table.column_names.index("genres"), "genres", pa.array(lists))
        pq.write_table(table, path.with_suffix(".parquet"), row_group_size=200)
    with open(made / "day/day.csv", newline="", encoding="utf-8") as source, \
            open(made / "day/day.tsv", "w", newline="", encoding="utf-8") as target:
        csv.writer(target, delimiter="\t").writerows(csv.reader(source))


def make_logs(made, run):
    """Two runs by hand, a finished sweep of one run, predictions with labels."""
    from made_runs import run_info, write_run

    for seed, name in enumerate(("a", "b"), 1):
        write_run(made / "runs" / name / "logs", info=run_info(seed))
    one = made / "sweep" / "seed_1"
    write_run(one / "logs", info=run_info(1))
    (one / "output.log").touch()
    runs = {"seed_1": {"arguments": ["--data_dir", "gone", "--seed=1"], "state": "finished", "status": 0,
                       "seconds": 3.2}}
    (made / "sweep" / "sweep.json").write_text(json.dumps({"tool": "tools/sweep.py", "runs": runs}, indent=1))
    for ending in ("csv", "parquet"):
        run("deepfm_train_eval", "--model_load_dir", made / "packed", "--predict", made / "data/val",
            "--predict_output", made / f"predictions/{ending}.{ending}", "--keep_columns", "Label", "--device", "cpu")


# -------------------------------------------------------------------------------------------------------------- tasks


def trainer_options(work, *options, data="data", save=True):
    given = ["--persistent_path", work / "tables", "--persistent_path_fm", work / "tables_fm", "--device", "cpu",
             "--dnn", "8,8", "--embedding_vec_size", "4", "--batch_size", "64", "--learning_rate", "0.01"]
    given += ["--data_dir", work / data] if data else []
    given += ["--model_save_dir", work / "save"] if save else []
    return [*map(str, given), *options]


def task(name, work):
    """(module, its arguments, function that describes what came out)"""
    kind, _, rest = name.partition(" ")
    if kind == "convert":
        tool = "criteo_parquet" if rest in ("csv", "gz") else "h5_to_parquet"
        more = ["--min_categr_count", "2"] if tool == "criteo_parquet" else []
        found = tool, ["--input_dir", work / rest, "--output_dir", work / "out", *more], tables
    elif kind in ("train", "resume", "evaluate") or name == "predict":
        found = trainer_task(name, work)
    elif kind in ("make", "describe", "grow", "encode", "inspect"):
        found = data_task(kind, rest, work)
    elif kind in ("plot", "compare", "sweep", "calibrate"):
        found = log_task(kind, rest, work)
    else:
        found = model_task(kind, rest, work)
    return found[0], [*map(str, found[1])], found[2]


def trainer_task(name, work):
    best, predict = work / "save/best_checkpoint", ["--predict", work / "data/test"]
    if name == "predict":
        options = [*predict, "--predict_output", work / "out.parquet"]
        options = trainer_options(work, "--model_load_dir", best, *options, data=None, save=False)
        return "deepfm_train_eval", options, predicted
    if name == "resume":
        return "deepfm_train_eval", trainer_options(work, "--train_batches", "15", "--resume"), trained
    if name.startswith("train"):
        for path in ("tables", "tables_fm", "save"):
            shutil.rmtree(work / path, ignore_errors=True)
        more = ["--model_load_dir", work / "packed"] if name == "train grown" else []
        data = "grown" if name == "train grown" else "data"
        return "deepfm_train_eval", trainer_options(work, "--train_batches", "9", *more, data=data), trained
    folder = work / "old" / "best_checkpoint" if name == "evaluate old" else best
    more = ["--skip_checksums"] if name == "evaluate unchecked" else []
    options = trainer_options(work, "--model_load_dir", folder, "--eval_only", *more, save=False)
    return "deepfm_train_eval", options, scores


def data_task(kind, rest, work):
    rows, out = work / "day" / f"day.{rest.replace('from ', '')}", ["--output_dir", work / "out"]
    if kind == "inspect":
        return "inspect_dataset", [work / "data"], printed
    if kind == "describe":
        return "table_to_parquet", ["--input", rows, "--describe"], printed
    if kind == "grow":
        return "table_to_parquet", ["--base", work / "data", "--input", rows, *out, "--memory_gb", "1"], tables
    if kind == "encode":
        return "encode_rows", ["--dataset", work / "data", "--input", rows, *out], tables
    return "table_to_parquet", ["--input", rows, *out, *COLUMNS, *HASHED], tables


def model_task(kind, rest, work):
    """With a packed checkpoint or an ONNX file."""
    packed, rows = ["--model_load_dir", work / "packed"], work / "rows" / f"new.{rest}"
    more = ["--skip_checksums"] if rest.endswith("unchecked") else []
    if kind == "predict":
        rows = {"ids": work / "encoded", "unchecked": work / "rows/new.csv"}.get(rest, rows)
        return "deepfm_train_eval", [*packed, "--predict", rows, "--predict_output", work / "out.parquet", "--device",
                                     "cpu", "--batch_size", "64", *more], predicted
    if kind == "pack":
        return "pack_checkpoint", [*packed, "--output_dir", work / "out", *more], files
    if kind == "score":
        model = rest.split()[0]
        rows = work / "rows/new.csv" if model == "raw" else work / "encoded"
        return "score_onnx", [work / f"onnx/{model}.onnx", rows, "--output", work / "out.parquet", "--threads", "1",
                              *more], predicted
    if rest == "onnx":
        return "export_onnx", [*packed, "--output", work / "out.onnx", "--inputs", "ids", "--rows", "100", "--device",
                               "cpu"], graph
    return "export_embeddings", [*packed, "--output", work / "out/out.parquet"], tables


def log_task(kind, rest, work):
    if kind == "plot":
        return "plot_training", [work / "runs", "--output", work / "out.png"], printed
    if kind == "calibrate":
        return "plot_training", ["--calibration", *sorted((work / "predictions").iterdir()), "--output",
                                 work / "out.png"], printed
    if kind == "compare":
        return "compare_runs", [work / "runs", *(["--json"] if rest else [])], printed
    return "sweep", ["--seeds", "1", "--output_dir", work / "sweep", "--", "--data_dir", "gone"], printed


# ------------------------------------------------------------------------------------------------- what came out


def scores(work, output):
    return re.findall(r"Step \d+, \w+ AUC [\d.]+, \w+ LogLoss [\d.]+", output)


def printed(work, output):
    return output.replace(str(work), "WORK")


def predicted(work, output):
    import pyarrow.parquet as pq

    return hashlib.md5(pq.read_table(work / "out.parquet")["probability"].to_numpy().tobytes()).hexdigest()


def trained(work, output):
    """Scores, every number of the last checkpoint, its encoder."""
    from tools.trainer import checkpoints
    from tools.trainer.chunks import read_rows

    name, state = list(checkpoints.find_checkpoints(str(work / "save")).items())[-1]
    digest = hashlib.md5()
    for array, values in sorted(checkpoints.read_dense(str(work / "save" / name), state).items()):
        digest.update(array.encode() + values.tobytes())
    for path, table, width in (("tables", "embedding", 12), ("tables_fm", "embedding_fm", 3)):
        for keys, rows in read_rows(str(work / path / "0-1"), state["tables"][table]["snapshot"], width):
            digest.update(keys.tobytes() + rows.tobytes())
    for path in sorted((work / "save" / name / "encoder").rglob("*.*")):
        digest.update(path.read_bytes())
    return [scores(work, output)[-2:], state["progress"]["step"], digest.hexdigest()]


def tables(work, output):
    """Rows of all parquet files in the output folder."""
    import pyarrow.parquet as pq

    digest = hashlib.md5()
    for path in sorted((work / "out").rglob("*.parquet")):
        digest.update(repr(pq.read_table(path).to_pydict()).encode())
    return digest.hexdigest()


def files(work, output):
    """All bytes in the output folder."""
    digest = hashlib.md5()
    for path in sorted((work / "out").rglob("*")):
        digest.update(str(path.relative_to(work)).encode() + (path.read_bytes() if path.is_file() else b""))
    return digest.hexdigest()


def graph(work, output):
    """An ONNX model without its metadata, which say where the checkpoint was."""
    import onnx

    return hashlib.md5(onnx.load(work / "out.onnx").graph.SerializeToString(deterministic=True)).hexdigest()
