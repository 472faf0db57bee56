"""tools/make_criteo_sample.py: the file format, the rates, the planted model and the reported best metrics."""
import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import log_loss, roc_auc_score

TOOLS = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "tools")
sys.path.insert(0, TOOLS)
import make_criteo_sample as sample  # noqa: E402

ROWS = 60_000  # more than one block


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    path = tmp_path_factory.mktemp("sample")
    sample.main(["--output_dir", str(path), "--num_rows", str(ROWS)])
    return path


@pytest.fixture(scope="module")
def table(made):
    return pd.read_csv(made / "train.txt", sep="\t", header=None, dtype=str, keep_default_na=False)


def test_every_line_has_kaggles_format(made):
    integer, token = r"\t(-?\d{1,6})?", r"\t([0-9a-f]{8})?"
    line_format = re.compile(r"[01]" + integer * 13 + token * 26)
    lines = (made / "train.txt").read_text(encoding="ascii").split("\n")
    assert lines.pop() == ""
    assert len(lines) == ROWS
    assert [line for line in lines if not line_format.fullmatch(line)] == []


def test_rates_and_skew(table):
    assert abs((table[0] == "1").mean() - 0.25) < 0.02
    missing = (table == "").mean()
    groups = [column[-1] for column in sample.INTEGERS + sample.TOKENS]
    expected = [0.0] + [0.0 if group is None else sample.MISSING_SHARE[group] for group in groups]
    np.testing.assert_allclose(missing, expected, atol=0.01)
    smallest = [pd.to_numeric(table[i]).min() for i in range(1, 14)]
    assert smallest[1] == -3 and min(smallest[:1] + smallest[2:]) == 0  # only I2 goes below zero
    assert pd.to_numeric(table[5]).max() > 30 * pd.to_numeric(table[5]).median()  # heavy tail
    counts = table[16].value_counts()  # C3: a few frequent tokens, thousands of rare ones
    assert counts.iloc[0] > 0.05 * ROWS and len(counts) > 5000
    assert table[22].nunique() == 4  # C9


def test_rows_depend_on_seed_and_row_number_only(made, tmp_path):
    more_than_a_block = sample.BLOCK_ROWS + 7
    for name, seed in (("same", 1), ("other", 2)):
        sample.write_sample(str(tmp_path / name), more_than_a_block, seed)
    expected = (made / "train.txt").read_bytes().split(b"\n")[:more_than_a_block]
    assert (tmp_path / "same" / "train.txt").read_bytes().split(b"\n")[:-1] == expected
    assert (tmp_path / "other" / "train.txt").read_bytes().split(b"\n")[0] != expected[0]


def test_best_metrics_equal_scikit_learns(made):
    blocks = list(sample.generate(ROWS, seed=1))
    labels = np.concatenate([block[1] for block in blocks])
    probs = np.concatenate([block[2] for block in blocks])
    info = json.loads((made / "sample_info.json").read_text())
    assert info["num_rows"] == len(labels) == ROWS
    assert info["positive_rate"] == pytest.approx(labels.mean())
    assert info["best_auc"] == pytest.approx(roc_auc_score(labels, probs), abs=1e-5)
    assert info["best_logloss"] == pytest.approx(log_loss(labels, probs), abs=1e-6)


def test_pairs_of_tokens_tell_more_than_the_tokens():
    """Predict C6 x C17 cells from the cells' mean label, and from row and column effects alone, on other rows."""
    columns = sample.draw_columns(np.random.default_rng(3), 50_000)
    probs = sample.sigmoid(sample.PlantedModel(seed=1).logits(columns))
    c6, c17 = columns[2][5], columns[2][16]
    cells = pd.DataFrame({"c6": c6, "c17": c17, "p": probs})
    train, test = cells[:25_000], cells[25_000:]
    mean = train.p.mean()
    row, column = train.groupby("c6").p.mean() - mean, train.groupby("c17").p.mean() - mean
    additive = mean + test.c6.map(row) + test.c17.map(column)
    pairs = test.join(train.groupby(["c6", "c17"]).p.mean().rename("pair"), on=["c6", "c17"]).pair.fillna(mean)
    explained_additive = 1 - ((test.p - additive) ** 2).mean() / test.p.var()
    explained_pairs = 1 - ((test.p - pairs) ** 2).mean() / test.p.var()
    assert explained_pairs > explained_additive + 0.05


@pytest.mark.parametrize("option, value", [("--num_rows", "0"), ("--seed", "-1")])
def test_bad_number_is_an_argument_error(option, value, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        sample.main(["--output_dir", str(tmp_path), option, value])
    assert stop.value.code == 2
    assert f"argument {option}: {value} must be at least" in capsys.readouterr().err


def test_output_that_cannot_be_written_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert sample.main(["--output_dir", str(tmp_path / "file"), "--num_rows", "1"]) == 1
    assert re.match(r"^error: \S+/file: File exists\n$", capsys.readouterr().err)


@pytest.mark.parametrize("files, message", [
    ({"train.txt": "mine"}, "has a train.txt that is not, or not as, this tool has made it"),
    ({"train.txt": "mine", "sample_info.json": "{}"}, "has a train.txt that is not"),
    ({"train.txt": "mine", "sample_info.json": "[" * 100_000}, "has a train.txt that is not"),
    ({"sample_info.json": "{}"}, "has a sample_info.json that is not"),
    ({"train.txt.part": "x"}, "train.txt.part exists: another run is writing it, or was killed"),
])
def test_only_its_own_files_are_replaced(tmp_path, capsys, files, message):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert sample.main(["--output_dir", str(tmp_path), "--num_rows", "5"]) == 1
    assert message in capsys.readouterr().err
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == files


def test_a_sample_is_replaced_unless_it_was_changed(tmp_path, capsys):
    for rows in ("5", "7"):
        assert sample.main(["--output_dir", str(tmp_path), "--num_rows", rows]) == 0
    assert len((tmp_path / "train.txt").read_text().splitlines()) == 7
    with open(tmp_path / "train.txt", "a") as file:
        file.write("a row of mine\n")
    assert sample.main(["--output_dir", str(tmp_path), "--num_rows", "5"]) == 1
    assert len((tmp_path / "train.txt").read_text().splitlines()) == 8


def test_interrupt_leaves_no_half_file(tmp_path):
    command = [sys.executable, os.path.join(TOOLS, "make_criteo_sample.py")]
    process = subprocess.Popen(
        command + ["--output_dir", str(tmp_path), "--num_rows", "100000000"], stderr=subprocess.PIPE, text=True
    )
    part = tmp_path / "train.txt.part"
    deadline = time.monotonic() + 60
    while not (part.exists() and part.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=60)[1]
    assert (process.returncode, error) == (130, "error: interrupted; no sample was written\n")
    assert list(tmp_path.iterdir()) == []
