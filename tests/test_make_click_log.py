"""tools/make_click_log.py: columns, the same rows for the same day, new ids every day, a signal to be learned."""

import os
import resource
from pathlib import Path

import make_click_log
import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from tools.trainer.files import UNFINISHED, replaced_file, umask


def log(path, *options):
    assert make_click_log.main(["--output", str(path), *map(str, options)]) == 0
    return pd.read_csv(path)


def test_columns_and_days(tmp_path, capsys):
    first, second = (log(tmp_path / f"{day}.csv", "--num_rows", 3000, "--day", day) for day in (1, 2))
    assert list(first) == ["clicked", "user_id", "item_id", "device", "price", "genres", "ts"]
    assert set(first["clicked"]) == {0, 1} and first["ts"].is_monotonic_increasing
    assert first["ts"].str.startswith("2026-01-01").all() and second["ts"].str.startswith("2026-01-02").all()
    assert 0.01 < first["price"].isna().mean() < 0.06
    new = set(second["user_id"]) - set(first["user_id"])
    assert 100 < len(new) < len(set(second["user_id"])) / 2
    assert "wrote" in capsys.readouterr().out
    again = log(tmp_path / "again.csv", "--num_rows", 3000, "--unlabelled")
    pd.testing.assert_frame_equal(again, first.drop(columns="clicked"))
    other = log(tmp_path / "other.csv", "--num_rows", 3000, "--seed", 2)
    assert not other["user_id"].equals(first["user_id"])


def test_labels_follow_the_planted_model():
    table, probs = make_click_log.make_rows(20000, 1, 1)
    labels = table["clicked"].to_numpy()
    assert labels.mean() == pytest.approx(probs.mean(), abs=0.01)
    assert make_click_log.best_auc(labels, probs) == pytest.approx(roc_auc_score(labels, probs), abs=1e-9)
    users = table.to_pandas().groupby("user_id")["clicked"].mean()
    assert np.std(users) > 0.15  # users differ


def test_labels_of_one_kind_have_no_auc(tmp_path, capsys):
    log(tmp_path / "two.csv", "--num_rows", 2)
    assert "best AUC any model could reach undefined (all labels are equal)" in capsys.readouterr().out


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path, capsys):
    """And two runs that write one file do not meet."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        assert make_click_log.main(["--output", str(tmp_path / "d" / "log.csv"), "--num_rows", "1000"]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "File too large" in capsys.readouterr().err and not os.listdir(tmp_path / "d")
    path = tmp_path / ("ü" * 120 + ".csv")
    with replaced_file(path) as one, replaced_file(path) as other:
        Path(one).write_text("one")
        Path(other).write_text("other")
        assert set(map(str, tmp_path.glob(".*"))) == {one, other} == UNFINISHED and not path.exists()
    assert path.read_text() == "one" and path.stat().st_mode & 0o777 == 0o666 & ~umask()
    with pytest.raises(KeyboardInterrupt), replaced_file(path):
        raise KeyboardInterrupt
    assert path.read_text() == "one" and not list(tmp_path.glob(".*")) and not UNFINISHED


def test_an_existing_file_stays(tmp_path, capsys):
    (tmp_path / "mine.csv").write_text("mine")
    assert make_click_log.main(["--output", str(tmp_path / "mine.csv")]) == 1
    assert "exists already; name another file" in capsys.readouterr().err
    assert (tmp_path / "mine.csv").read_text() == "mine"
