"""tools/make_click_log.py: columns, the same rows for the same day, new ids every day, a signal to be learned."""

import make_click_log
import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score


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


def test_an_existing_file_stays(tmp_path, capsys):
    (tmp_path / "mine.csv").write_text("mine")
    assert make_click_log.main(["--output", str(tmp_path / "mine.csv")]) == 1
    assert "exists already; name another file" in capsys.readouterr().err
    assert (tmp_path / "mine.csv").read_text() == "mine"
