"""The command line: promised names and defaults, one clear line for every mistake, what reaches OneEmbedding."""

import importlib
import os
import subprocess
import sys

import oneflow as flow
import pytest
from conftest import ROOT

import deepfm_train_eval as trainer_module
from deepfm_train_eval import make_parser, make_store_options, parse_args
from tools.trainer import arguments
from tools.trainer.tables import TableStore

REQUIRED = ["--data_dir", "data", "--persistent_path", "t", "--persistent_path_fm", "f"]
PROMISED = {  # names and defaults that users already have in scripts
    "data_dir": None, "num_train_samples": None, "num_val_samples": None, "num_test_samples": None,
    "model_load_dir": None, "model_save_dir": None, "save_initial_model": False, "save_model_after_each_eval": False,
    "disable_fusedmlp": True, "embedding_vec_size": 16, "dnn": [1000] * 5, "net_dropout": 0.2, "learning_rate": 0.001,
    "batch_size": 10000, "train_batches": 75000, "loss_print_interval": 100, "patience": 2, "min_delta": 1e-6,
    "table_size_array": None, "persistent_path": None, "persistent_path_fm": None, "store_type": "cached_host_mem",
    "cache_memory_budget_mb": 1024, "amp": False, "loss_scale_policy": "static",
}


def launch_variables(**changes):
    return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "WORLD_SIZE": "2", "RANK": "0", **changes}


def test_promised_names_and_defaults():
    args = parse_args(REQUIRED)
    for name, default in PROMISED.items():
        if name not in ("data_dir", "persistent_path", "persistent_path_fm"):
            assert getattr(args, name) == default, name


@pytest.mark.parametrize("options, value", [
    (["--disable_fusedmlp"], True), (["--disable_fusedmlp", "True"], True), (["--disable_fusedmlp", "False"], False),
])
def test_disable_fusedmlp(monkeypatch, options, value):
    monkeypatch.setattr(flow.cuda, "is_available", lambda: True)
    assert parse_args([*REQUIRED, *options]).disable_fusedmlp is value


def test_lists_and_derived_values():
    args = parse_args([*REQUIRED, "--dnn", "400,300", "--table_size_array", "5,6,7", "--model_save_dir", "runs/a"])
    assert (args.dnn, args.table_size_array) == ([400, 300], [5, 6, 7])
    assert args.log_dir == "runs/a/logs" and args.device in ("cpu", "cuda")
    assert args.given == {"data_dir", "persistent_path", "persistent_path_fm", "dnn", "table_size_array",
                          "model_save_dir"}
    assert "batch_size" in parse_args([*REQUIRED, "--batch_size=12"]).given


MISTAKES = [
    (["--batch_size", "0"], "--batch_size: 0 must be at least 1"),
    (["--batch_size", "1e4"], "--batch_size: '1e4' is not a whole number"),
    (["--batch_size", "1" + "0" * 30], "--batch_size: 1000000000000000000000000000000 must be at most 2147483647"),
    (["--train_batches", "9" * 5000], "--train_batches: "),
    (["--learning_rate", "fast"], "--learning_rate: 'fast' is not a number"),
    (["--dnn", "8," + "1" * 30], "has a value below 1 or above 2147483647"),
    (["--dnn", "8,x"], "--dnn: '8,x' is not a comma-separated list of whole numbers"),
    (["--dnn", "8,0"], "--dnn: '8,0' has a value below 1 or above 2147483647"),
    (["--table_size_array", "7,,8"], "--table_size_array: '7,,8' is not a comma-separated list"),
    (["--disable_fusedmlp", "perhaps"], "--disable_fusedmlp: 'perhaps' is not True or False"),
    (["--net_dropout", "1"], "--net_dropout: 1 must be at most 0.99"),
    (["--learning_rate", "0"], "--learning_rate: 0 must be above 0"),
    (["--learning_rate", "nan"], "--learning_rate: 'nan' is not finite"),
    (["--lr_factor", "2"], "--lr_factor: 2 must be at most 1"),
    (["--seed", "-1"], "--seed: -1 must be at least 0"),
    (["--store_type", "ssd"], "--store_type: invalid choice: 'ssd'"),
    (["--batch_siz", "5"], "unrecognized arguments: --batch_siz; did you mean --batch_size?"),  # no abbreviations
    (["--learning-rate=1", "-amp"], "--learning-rate -amp; did you mean --learning_rate, --amp?"),
    (["--lr", "5"], "unrecognized arguments: --lr 5 (see --help)"),  # near to none
    (["--amp", "--device", "cpu"], "--amp needs a CUDA device"),
    (["--cache_memory_budget_mb", "0"], "--cache_memory_budget_mb 0 leaves --store_type cached_host_mem without a"),
    (["--persistent_path_fm", "./t"], "--persistent_path and --persistent_path_fm are both t"),
    (["--model_save_dir", "./t"], "--persistent_path and --model_save_dir are both t"),
    (["--weight_column", ""], "--weight_column is empty; give a value, or leave it out"),
    (["--predict_output="], "--predict_output is empty"),
    (["--min_lr", "0.1"], "--min_lr 0.1 is above --learning_rate 0.001"),
    (["--disable_fusedmlp", "False", "--device", "cpu"], "--disable_fusedmlp False needs a CUDA device"),
    (["--predict", "x"], "--predict and --predict_output go together"),
    (["--predict", "x", "--predict_output", "y"], "--predict needs --model_load_dir"),
    (["--predict", "x", "--predict_output", ".", "--model_load_dir", "z"], "--predict_output . is a folder"),
    (["--predict", "x", "--predict_output", "y", "--eval_only"], "--predict and --eval_only are two things"),
    (["--eval_only"], "--eval_only needs --model_load_dir"),
    (["--resume"], "--resume needs --model_save_dir"),
    (["--resume", "--model_save_dir", "s", "--overwrite_tables"], "leave out --model_load_dir and --overwrite_tables"),
    (["--resume", "--model_save_dir", "s", "--model_load_dir", "c"], "leave out --model_load_dir"),
    (["--save_initial_model"], "--save_initial_model needs --model_save_dir"),
    (["--save_model_after_each_eval"], "--save_model_after_each_eval needs --model_save_dir"),
    (["--checkpoint_interval", "5"], "--checkpoint_interval needs --model_save_dir"),
]


@pytest.mark.parametrize("options, message", MISTAKES, ids=[" ".join(options) for options, _ in MISTAKES])
def test_mistakes_end_in_one_line_and_status_2(capsys, options, message):
    with pytest.raises(SystemExit) as ended:
        parse_args([*REQUIRED, *options])
    errors = capsys.readouterr().err
    assert ended.value.code == 2 and errors.startswith("error: ") and errors.count("\n") == 1 and message in errors


@pytest.mark.parametrize("tool, words, message", [
    ("inspect_dataset", ["--jsn", "data"], "unrecognized arguments: --jsn; did you mean --json?"),
    ("inspect_dataset", ["data", "--", "--jsn"], "unrecognized arguments: --jsn"),  # behind -- there are no options
    # which it would miss, too
    ("encode_rows", ["--output_di", "out"], "unrecognized arguments: --output_di; did you mean --output_dir?"),
    ("benchmark", ["loader", "--repeat", "1"], "unrecognized arguments: --repeat; did you mean --repeats?"),
    ("inspect_dataset", [""], "data_dir is empty; give a value"),  # Path("") would be the current folder
    ("criteo_parquet", ["--input_dir", "", "--output_dir", "x"], "--input_dir is empty; give a value"),
    ("compare_runs", ["a", ""], "runs is empty; give a value"),
])
def test_a_misspelt_or_empty_option_of_a_tool(capsys, tool, words, message):
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(tool).main(words)
    expected = f"error: {message} (see --help)\n"
    assert (ended.value.code, capsys.readouterr().err) == (2, expected)


def test_fused_layers_have_no_batch_normalisation(capsys, monkeypatch):
    monkeypatch.setattr(flow.cuda, "is_available", lambda: True)
    with pytest.raises(SystemExit):
        parse_args([*REQUIRED, "--disable_fusedmlp", "False", "--batch_norm"])
    assert "--disable_fusedmlp False has no batch normalisation" in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["--data_dir", "--persistent_path", "--persistent_path_fm"])
def test_required(capsys, missing):
    position = REQUIRED.index(missing)
    rest = REQUIRED[:position] + REQUIRED[position + 2:]
    with pytest.raises(SystemExit):
        parse_args(rest)
    assert f"the following arguments are required: {missing}" in capsys.readouterr().err
    parse_args(["--predict", "x", "--predict_output", "y", "--model_load_dir", "z", *rest])  # the checkpoint has it


@pytest.mark.parametrize("name, value", [("WORLD_SIZE", "two"), ("WORLD_SIZE", "9" * 30), ("RANK", "abc"),
                                         ("MASTER_PORT", "http")])
def test_environment_of_a_broken_launcher(name, value):
    result = subprocess.run([sys.executable, ROOT / "deepfm_train_eval.py", *REQUIRED], capture_output=True, text=True,
                            env={**os.environ, **launch_variables(**{name: value})}, timeout=60)
    assert result.returncode == 2 and result.stderr.startswith("error: the environment variable " + name)
    assert result.stderr.count("\n") == 1


def test_environment_of_another_program(tmp_path):
    odd = {"WORLD_SIZE": "9" * 30, "RANK": "abc", "MASTER_PORT": "http"}  # without MASTER_ADDR: no launcher's
    result = subprocess.run([sys.executable, ROOT / "deepfm_train_eval.py", *REQUIRED], capture_output=True, text=True,
                            env={**os.environ, **odd}, cwd=tmp_path, timeout=60)
    assert result.stderr == "error: --data_dir data is not a folder; it should hold train/, val/ and test/\n"


def test_batch_that_the_processes_cannot_share(capsys, monkeypatch):
    monkeypatch.setattr(arguments, "world_size", lambda: 3)
    with pytest.raises(SystemExit):
        parse_args([*REQUIRED, "--batch_size", "100"])
    assert "--batch_size 100 is not divisible by 3 processes; use a multiple of 3" in capsys.readouterr().err


def test_only_the_first_process_speaks(capsys, monkeypatch):
    for name, value in launch_variables(RANK="1").items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as ended:
        parse_args([*REQUIRED, "--batch_size", "0"])
    assert ended.value.code == 2 and capsys.readouterr().err == ""


def test_cuda_is_refused_without_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr(flow.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        parse_args([*REQUIRED, "--device", "cuda"])
    assert "OneFlow sees no CUDA device" in capsys.readouterr().err
    assert parse_args(REQUIRED).device == "cpu"


def test_help_shows_every_default_and_fits_a_screen_per_topic():
    result = subprocess.run([sys.executable, ROOT / "deepfm_train_eval.py", "--help"], capture_output=True, text=True,
                            env={"PATH": "/usr/bin:/bin", "COLUMNS": "120", "HOME": "/tmp"}, timeout=120)  # fmt: skip
    assert result.returncode == 0
    topics = result.stdout.split("\n\n")
    for title in ("data", "model", "training", "embedding tables", "checkpoints", "evaluation and prediction"):
        topic = next(topic for topic in topics if topic.startswith(title + ":"))
        assert topic.count("\n") <= 40
    text = " ".join(result.stdout.split())
    for action in make_parser()._actions:
        assert action.help
        if action.default not in (None, "==SUPPRESS=="):
            assert f"(default: {action.default})" in text, action.dest


def test_the_usage_parses():
    for line in trainer_module.USAGE.replace("[", "").replace("]", "").replace("...", "").strip().splitlines():
        assert parse_args(line.split()[1:])


# ------------------------------------------------------------------------------------------ what OneEmbedding is given


@pytest.mark.parametrize("optimizer, size_factor", [("adam", 3), ("adagrad", 2)])
@pytest.mark.parametrize("store_type", trainer_module.STORE_TYPES)
def test_store_options(store_type, tmp_path, optimizer, size_factor):
    table = TableStore("embedding", "persistent_path", str(tmp_path), 8, 999, optimizer)
    options = make_store_options(store_type, table, 10**7, 256)
    store = options["kv_store"]
    assert (options["size_factor"], store["persistent_table"]["path"]) == (size_factor, str(tmp_path))
    assert store["persistent_table"]["physical_block_size"] == 4096
    caches = store.get("caches", [])
    expected = {  # the GPU cache of the two cached stores has a budget, a full cache holds every row
        "device_mem": [("full", "device")],
        "cached_host_mem": [("lru", "device"), ("full", "host")],
        "cached_ssd": [("lru", "device")],
    }
    assert [(cache["policy"], cache["value_memory_kind"]) for cache in caches] == expected[store_type]
    for cache in caches:
        if cache["policy"] == "full":
            assert cache["capacity"] == 10**7
        else:
            assert cache["cache_memory_budget_mb"] == 256


@pytest.mark.parametrize("store_type", ["cached_host_mem", "cached_ssd"])
@pytest.mark.parametrize("dim, rows, budget_mb", [(8, 1000, 1), (8, 10**6, 138), (1, 10**6, 18)])
def test_a_gpu_cache_is_not_larger_than_one_for_all_rows(store_type, dim, rows, budget_mb):
    """OneEmbedding takes all of it at once. 12 D bytes a row with Adam, and half as much again."""
    table = TableStore("embedding", "persistent_path", "tables", dim, rows)
    [cache, *_] = make_store_options(store_type, table, rows, 256)["kv_store"]["caches"]
    assert cache["cache_memory_budget_mb"] == budget_mb
