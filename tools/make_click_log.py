#!/usr/bin/env python3
"""Make a synthetic click log of seven columns, a file per day, to try the tools for one's own data.

    python tools/make_click_log.py --output clicks.csv --num_rows 50000
    python tools/make_click_log.py --output day2.csv --num_rows 50000 --day 2

    wrote clicks.csv: 50000 rows of day 1, 0.2512 clicked, best AUC any model could reach 0.8083

Columns: clicked (0 or 1), user_id, item_id, device, price (in 3 % of the rows missing), genres (up to four, with |
between them), ts (date and time, ascending). Every day brings new users and items, and old ones leave. Whether a row
is clicked is drawn from a planted model: taste of each user, quality of each item, an inner product of both, genres
and price. --unlabelled leaves out the label, as in rows that are to be scored. A day's rows depend on --seed, --day and
--num_rows only.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `tools` is found from any folder
from tools.trainer import cli

if __name__ == "__main__":
    cli.start_script()  # imports take seconds

import os
from datetime import datetime, timedelta

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv

from tools.trainer.cli import UserError, number
from tools.trainer.files import replaced_file

USERS, ITEMS = 2000, 500  # in use on a day
NEW_SHARE = 0.1  # of them that are new every day
FACTORS = 2  # rank of the planted inner product
DEVICES = np.array(["phone", "tablet", "desktop", "tv"], object)
GENRES = np.array(["drama", "comedy", "news", "sport", "music", "film noir", "téléfilm", "アニメ"], object)
POSITIVE_LOGIT = -1.4  # for about a quarter of the rows
FIRST_DAY = datetime(2026, 1, 1)


def effects(seed, kind, ids, width):
    """Normal numbers float64 (n, width) of users or items by their number, the same on every day."""
    rng = np.random.default_rng([seed, kind])
    return rng.standard_normal((int(ids.max()) + 1, width))[ids]


def draw_ids(rng, day, in_use, num_rows):
    """Numbers int64 (n) of those in use on a day: a window that moves, some of them far more frequent than others."""
    first = int((day - 1) * NEW_SHARE * in_use)
    rank = (in_use * rng.random(num_rows) ** 2.5).astype(np.int64)
    return first + (rank * 7919 + day * 31) % in_use  # which ones are frequent changes from day to day


def draw_genres(rng, items, seed):
    """Up to four genres per row, of which an item always has the same: list of lists of numbers."""
    own = np.random.default_rng([seed, 3]).random((int(items.max()) + 1, len(GENRES)))[items]
    return [np.flatnonzero(row < 0.25)[:4] for row in own]


def make_rows(num_rows, day, seed):
    """(Table of all columns, true probabilities float64 (n))"""
    rng = np.random.default_rng([seed, 0, day])
    users, items = draw_ids(rng, day, USERS, num_rows), draw_ids(rng, day, ITEMS, num_rows)
    device = rng.choice(len(DEVICES), num_rows, p=[0.55, 0.1, 0.25, 0.1])
    price = np.round(rng.lognormal(2.5, 1.0, num_rows), 2)
    genres = draw_genres(rng, items, seed)
    taste, quality = effects(seed, 1, users, 1 + FACTORS), effects(seed, 2, items, 1 + FACTORS)
    genre_effect = np.random.default_rng([seed, 4]).normal(0, 0.5, len(GENRES))
    logits = POSITIVE_LOGIT + 0.8 * taste[:, 0] + 0.8 * quality[:, 0] + (taste[:, 1:] * quality[:, 1:]).sum(axis=1)
    logits += np.array([genre_effect[own].sum() for own in genres]) - 0.3 * (np.log(price) - 2.5)
    probs = 1 / (1 + np.exp(-logits))
    seconds = np.sort(rng.integers(0, 86400, num_rows))
    start = FIRST_DAY + timedelta(days=day - 1)
    columns = {
        "clicked": (rng.random(num_rows) < probs).astype(np.int8),
        "user_id": [f"u{user}" for user in users],
        "item_id": items + 100000,
        "device": DEVICES[device],
        "price": pa.array(price, mask=rng.random(num_rows) < 0.03),
        "genres": ["|".join(GENRES[own]) for own in genres],
        "ts": [str(start + timedelta(seconds=int(second))) for second in seconds],
    }
    return pa.table(columns), probs


def best_auc(labels, probs):
    """AUC of the true probabilities; they hardly ever tie."""
    ranks = np.empty(len(probs))
    ranks[np.argsort(probs)] = np.arange(1, len(probs) + 1)
    positives = labels.sum()
    return (ranks[labels == 1].sum() - positives * (positives + 1) / 2) / (positives * (len(labels) - positives))


def write(args):
    if os.path.lexists(args.output):
        raise UserError(f"--output {args.output} exists already; name another file")
    table, probs = make_rows(args.num_rows, args.day, args.seed)
    labels = table["clicked"].to_numpy()
    if args.unlabelled:
        table = table.drop(["clicked"])
    with replaced_file(args.output) as part:
        pa_csv.write_csv(table, part, pa_csv.WriteOptions(quoting_style="needed"))
    auc = f"{best_auc(labels, probs):.4f}" if 0 < labels.mean() < 1 else "undefined (all labels are equal)"
    print(f"wrote {args.output}: {args.num_rows} rows of day {args.day}, {labels.mean():.4f} clicked, best AUC any "
          f"model could reach {auc}")


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    parser.add_argument("--output", required=True, metavar="FILE.csv", help="file to write")
    parser.add_argument("--num_rows", type=number(int, 2, 10**7), default=50_000, help="rows of the day")
    parser.add_argument("--day", type=number(int, 1, 1000), default=1, help="which day, from 1")
    parser.add_argument("--seed", type=number(int, 0), default=1, help="seed of the values, labels and model")
    parser.add_argument("--unlabelled", action="store_true", help="leave out the column clicked")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    return cli.run_tool(lambda: write(args), f"; {args.output} was not written")


if __name__ == "__main__":
    sys.exit(main())
