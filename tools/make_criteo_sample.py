#!/usr/bin/env python3
"""Make a synthetic Criteo sample: raw text in the format of Kaggle's `train.txt`.

    python tools/make_criteo_sample.py --output_dir data/sample_raw --num_rows 250000 --seed 1

Writes to --output_dir:
    train.txt          one row a line, tab-separated, no header: label, 13 integers, 26 tokens of 8 hex digits;
                       a missing value is an empty string
    sample_info.json   rows, seed, share of positives and the best metrics that any model could reach

`tools/criteo_parquet.py` splits such a file 80/10/10, so the default gives 200,000 train and 25,000 val and test rows.

The columns have skewed (Zipf, log-normal) values, and cardinalities and missing values roughly like Criteo's. Labels
are drawn from a planted model on the logit scale: a first-order part over all fields, and a pairwise part, the inner
product of a factor summed over user fields (C6, C9) with one summed over ad fields (C17, C23), that a linear model
cannot see. Only integers and frequent tokens have an effect, so a few hundred thousand rows are enough to learn it.

Row i depends on --seed and i only: a larger sample starts with the rows of a smaller one.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `tools` is found from any folder
from tools.trainer import cli

if __name__ == "__main__":
    cli.start_script()  # imports take seconds

import json

import numpy as np

from tools.trainer.cli import UserError, number

BLOCK_ROWS = 50_000  # rows per random stream; another value gives other rows
NUM_FACTORS = 2  # rank of the planted pairwise part
HEAD_TOKENS = 64  # tokens of a field that have an effect, the most frequent ones
FIRST_ORDER_STD = 1.15  # logits
PAIRWISE_STD = 1.2  # logits
POSITIVE_RATE = 0.25
MAX_INTEGER = 999_999
AUC_BINS = 100_000

# Columns of one group are missing together in a row, as in Criteo. Group: share of rows in which it is missing.
MISSING_SHARE = {"a": 0.45, "b": 0.22, "c": 0.04, "d": 0.77, "e": 0.03, "f": 0.12, "g": 0.44, "h": 0.76}
# I1..I13: (mean and standard deviation of ln(value), amount taken off the value, missing group)
INTEGERS = (
    (0.8, 1.2, 1, "a"), (2.2, 2.0, 3, None), (1.8, 1.4, 0, "b"), (1.7, 0.9, 1, "b"), (8.0, 1.9, 1, "c"),
    (3.7, 1.5, 1, "b"), (1.7, 1.3, 1, "c"), (2.2, 1.0, 1, None), (3.9, 1.3, 1, "c"), (0.3, 0.5, 1, "a"),
    (0.9, 0.8, 1, "c"), (0.1, 0.9, 1, "d"), (1.7, 1.0, 1, "b"),
)  # fmt: skip
# C1..C26: (number of tokens, Zipf exponent, missing group)
TOKENS = (
    (1461, 1.7, None), (584, 1.1, None), (10_131_227, 1.15, "e"), (2_202_608, 1.15, "e"), (306, 1.9, None),
    (24, 0.9, "f"), (12_518, 1.05, None), (634, 1.7, None), (4, 1.2, None), (93_146, 1.2, None), (5684, 1.05, None),
    (8_351_593, 1.15, "e"), (3195, 1.05, None), (28, 1.1, None), (14_993, 1.1, None), (5_461_306, 1.15, "e"),
    (11, 0.9, None), (5653, 1.15, None), (2173, 1.4, "g"), (4, 0.6, "g"), (7_046_547, 1.15, "e"), (18, 1.3, "h"),
    (16, 1.1, None), (286_181, 1.2, "e"), (105, 1.3, "g"), (142_572, 1.2, "g"),
)  # fmt: skip
# fields of the pairwise part, C1 is 0: few tokens each, so that every pair of tokens is seen many times
USER_FIELDS, AD_FIELDS = (5, 8), (16, 22)


def draw_integers(rng, num_rows, missing):
    """Draw I1..I13: log-normal counts that share one latent activity per row.

    Returns: list of 13 int64 arrays (num_rows,), and a list of 13 bool arrays (num_rows,), True where missing, or None.
    """
    activity = rng.standard_normal(num_rows, dtype=np.float32)
    values = []
    for mean, std, offset, _ in INTEGERS:
        noise = rng.standard_normal(num_rows, dtype=np.float32)
        log_value = mean + std * (0.5 * activity + 0.866 * noise)
        values.append(np.minimum(np.exp(log_value).astype(np.int64) - offset, MAX_INTEGER))
    # only I2 has negative values in Criteo
    values = [value if i == 1 else np.maximum(value, 0) for i, value in enumerate(values)]
    return values, [missing.get(column[-1]) for column in INTEGERS]


def draw_tokens(rng, num_rows, missing):
    """Draw C1..C26 as ranks, 0 for the most frequent token: a power law by the inverse of its distribution function.

    Returns: list of 26 int64 arrays (num_rows,), and a list of 26 bool arrays (num_rows,), True where missing, or None.
    """
    ranks = []
    for cardinality, exponent, _ in TOKENS:
        power = 1.0 - exponent
        uniform = rng.random(num_rows, dtype=np.float32).astype(np.float64)
        rank = (1.0 + uniform * ((cardinality + 1.0) ** power - 1.0)) ** (1.0 / power) - 1.0
        ranks.append(np.minimum(rank.astype(np.int64), cardinality - 1))
    return ranks, [missing.get(column[-1]) for column in TOKENS]


def draw_columns(rng, num_rows):
    """Draw the values of all 39 columns, see draw_integers and draw_tokens."""
    missing = {group: rng.random(num_rows, dtype=np.float32) < share for group, share in MISSING_SHARE.items()}
    return draw_integers(rng, num_rows, missing) + draw_tokens(rng, num_rows, missing)


class PlantedModel:
    """The model that labels are drawn from, on the logit scale.

    A missing integer counts as 0 and a missing or infrequent token has no effect: the usual Criteo encoding
    cannot tell them apart either.
    """

    def __init__(self, seed):
        rng = np.random.default_rng([seed, 0])
        self.integer_weights = rng.standard_normal(len(INTEGERS), dtype=np.float32)
        self.token_weights = rng.standard_normal((len(TOKENS), HEAD_TOKENS + 1), dtype=np.float32)
        self.token_factors = rng.standard_normal((len(TOKENS), HEAD_TOKENS + 1, NUM_FACTORS), dtype=np.float32)
        self.token_weights[:, HEAD_TOKENS] = 0.0
        self.token_factors[:, HEAD_TOKENS] = 0.0
        self._calibrate(draw_columns(np.random.default_rng([seed, 1]), BLOCK_ROWS))

    def _first_order(self, integers, integer_missing, tokens):
        """Sum of the weights of all fields: float32 (rows,)."""
        total = np.zeros(len(tokens[0]), dtype=np.float32)
        for values, missing, weight, (mean, std, _, _) in zip(
            integers, integer_missing, self.integer_weights, INTEGERS
        ):
            counts = np.maximum(values, 0) if missing is None else np.where(missing, 0, np.maximum(values, 0))
            total += weight * (np.log1p(counts, dtype=np.float32) - mean) / std
        for weights, token in zip(self.token_weights, tokens):
            total += weights[token]
        return total

    def _factor_sum(self, tokens, fields):
        """Sum of the factors of some fields: float32 (rows, NUM_FACTORS)."""
        return sum(self.token_factors[field][tokens[field]] for field in fields)

    def _parts(self, columns):
        """Return the unscaled first-order part (rows,), and the factors of users and ads (rows, NUM_FACTORS)."""
        integers, integer_missing, ranks, rank_missing = columns
        tokens = [np.minimum(rank, HEAD_TOKENS) for rank in ranks]
        for token, missing in zip(tokens, rank_missing):
            if missing is not None:
                token[missing] = HEAD_TOKENS
        first_order = self._first_order(integers, integer_missing, tokens)
        return first_order, self._factor_sum(tokens, USER_FIELDS), self._factor_sum(tokens, AD_FIELDS)

    def _calibrate(self, columns):
        """Set means, scales and the intercept from a block of rows, drawn for this only."""
        first_order, user, ad = self._parts(columns)
        # centred factors leave the pairwise part without a linear share
        self.user_mean, self.ad_mean = user.mean(axis=0), ad.mean(axis=0)
        pairwise = ((user - self.user_mean) * (ad - self.ad_mean)).sum(axis=1)
        self.first_order_scale = np.float32(FIRST_ORDER_STD / first_order.std())
        self.pairwise_scale = np.float32(PAIRWISE_STD / pairwise.std())
        self.intercept = np.float32(0.0)
        logits = self.logits(columns)
        low, high = -50.0, 50.0
        for _ in range(40):  # bisection: the rate of positives grows with the intercept
            middle = (low + high) / 2
            low, high = (low, middle) if sigmoid(logits + middle).mean() > POSITIVE_RATE else (middle, high)
        self.intercept = np.float32(middle)

    def logits(self, columns):
        """Return the true logit of each row: float32 (rows,)."""
        first_order, user, ad = self._parts(columns)
        pairwise = ((user - self.user_mean) * (ad - self.ad_mean)).sum(axis=1)
        return self.first_order_scale * first_order + self.pairwise_scale * pairwise + self.intercept


def sigmoid(logits):
    return 1.0 / (1.0 + np.exp(-logits.astype(np.float64)))


class RowFormatter:
    """Turn columns into bytes of text: fixed-width cells first, then the zero bytes that pad them are dropped."""

    def __init__(self):
        self.integer_text = np.arange(-3, MAX_INTEGER + 1).astype("S6")
        # four hex digits, as bytes, for every 16-bit number
        self.hex_text = np.array([b"%04x" % i for i in range(1 << 16)], dtype="S4").view(np.uint32)

    def _tokens(self, field, ranks):
        """Give every rank of a field its own 8 hex digits: multiplying by an odd number mod 2**32 is one-to-one."""
        code = (ranks.astype(np.uint32) + np.uint32(0x9E3779B9 * (field + 1) & 0xFFFFFFFF)) * np.uint32(0x85EBCA6B)
        code ^= code >> np.uint32(15)  # one-to-one too
        code *= np.uint32(0xC2B2AE35)
        halves = np.stack([self.hex_text[code >> np.uint32(16)], self.hex_text[code & np.uint32(0xFFFF)]], axis=1)
        return halves.view(np.uint8)

    def format(self, labels, columns):
        """Return the rows as bytes, one line each."""
        integers, integer_missing, ranks, rank_missing = columns
        width = 1 + 7 * len(integers) + 9 * len(ranks) + 1
        text = np.zeros((len(labels), width), dtype=np.uint8)
        text[:, 0] = labels + ord("0")
        end = 1
        for values, missing in zip(integers, integer_missing):
            cells = self.integer_text[values + 3].view(np.uint8).reshape(-1, 6)
            end = self._put(text, end, cells, missing)
        for field, (rank, missing) in enumerate(zip(ranks, rank_missing)):
            end = self._put(text, end, self._tokens(field, rank), missing)
        text[:, end] = ord("\n")
        return text[text != 0].tobytes()

    @staticmethod
    def _put(text, start, cells, missing):
        text[:, start] = ord("\t")
        end = start + 1 + cells.shape[1]
        text[:, start + 1 : end] = cells
        if missing is not None:
            text[missing, start + 1 : end] = 0
        return end


class BestMetrics:
    """Metrics of the true probabilities, the best that any model could reach, in constant memory."""

    def __init__(self):
        self.counts = np.zeros((2, AUC_BINS), dtype=np.int64)  # negatives and positives by probability
        self.sum_logloss = 0.0

    def add(self, labels, probs):
        bins = np.minimum((probs * AUC_BINS).astype(np.int64), AUC_BINS - 1)
        for label in (0, 1):
            self.counts[label] += np.bincount(bins[labels == label], minlength=AUC_BINS)
        self.sum_logloss -= np.log(np.where(labels == 1, probs, 1.0 - probs)).sum()

    def result(self):
        """Return positive rate, AUC (None when all labels are equal) and logloss."""
        negatives, positives = self.counts
        below = np.cumsum(negatives) - negatives
        pairs = int(negatives.sum()) * int(positives.sum())
        auc = float((positives * (below + 0.5 * negatives)).sum() / pairs) if pairs else None
        num_rows = int(self.counts.sum())
        return {
            "positive_rate": float(positives.sum() / num_rows),
            "best_auc": auc,
            "best_logloss": self.sum_logloss / num_rows,
        }


def generate(num_rows, seed):
    """Yield (text, labels, probs) per block of rows: bytes, uint8 (rows,), float64 (rows,)."""
    model, formatter = PlantedModel(seed), RowFormatter()
    for start in range(0, num_rows, BLOCK_ROWS):
        rng = np.random.default_rng([seed, 2, start // BLOCK_ROWS])
        # a whole block is always drawn, so that the last one starts as it would in a longer file
        columns = draw_columns(rng, BLOCK_ROWS)
        probs = sigmoid(model.logits(columns))
        labels = (rng.random(BLOCK_ROWS) < probs).astype(np.uint8)
        rows = min(BLOCK_ROWS, num_rows - start)
        columns = [[None if column is None else column[:rows] for column in part] for part in columns]
        yield formatter.format(labels[:rows], columns), labels[:rows], probs[:rows]


def check_replaced(output_dir):
    """Raise a UserError where train.txt or sample_info.json is not of an earlier sample: only what we made goes."""
    path, info_path = (os.path.join(output_dir, name) for name in ("train.txt", "sample_info.json"))
    if os.path.lexists(path) or os.path.lexists(info_path):
        try:
            with open(info_path, encoding="utf-8") as file:
                info = json.load(file)
            ours = isinstance(info, dict) and {"num_rows", "seed", "best_auc"} <= set(info)
            ours = ours and os.path.isfile(path) and info.get("bytes") == os.path.getsize(path)
        except (OSError, ValueError, RecursionError):
            ours = False
        if not ours:
            raise UserError(f"{output_dir} has a {'train.txt' if os.path.lexists(path) else 'sample_info.json'} that "
                            f"is not, or not as, this tool has made it; choose another --output_dir, or move it "
                            f"elsewhere")


def write_sample(output_dir, num_rows, seed):
    """Write train.txt and sample_info.json; neither exists under its name before it is complete.

    Returns: dict, the content of sample_info.json. Raises: UserError where there is a file that this tool has not made.
    """
    os.makedirs(output_dir, exist_ok=True)
    check_replaced(output_dir)
    path, info_path = os.path.join(output_dir, "train.txt"), os.path.join(output_dir, "sample_info.json")
    part_path, best, size = path + ".part", BestMetrics(), 0
    if os.path.lexists(part_path):
        raise UserError(f"{part_path} exists: another run is writing it, or was killed; then remove it")
    with open(part_path, "xb") as file:
        try:
            for text, labels, probs in generate(num_rows, seed):
                file.write(text)
                size += len(text)
                best.add(labels, probs)
            file.close()
            if os.path.exists(info_path):
                os.remove(info_path)  # it describes the file that is about to be replaced
            os.replace(part_path, path)
        finally:
            if os.path.exists(part_path):
                os.remove(part_path)
    info = {"num_rows": num_rows, "seed": seed, "bytes": size, **best.result()}
    with open(info_path + ".part", "w", encoding="utf-8") as file:
        json.dump(info, file, indent=2)
    os.replace(info_path + ".part", info_path)
    return info


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    parser.add_argument("--output_dir", required=True, help="directory to write train.txt and sample_info.json to")
    parser.add_argument("--num_rows", type=number(int, 1, 10**12), default=250_000, help="number of rows over all "
                                                                                         "splits")
    parser.add_argument("--seed", type=number(int, 0, 2**64), default=1, help="seed of the values, labels and model")
    return parser.parse_args(argv)


def make(args):
    info = write_sample(args.output_dir, args.num_rows, args.seed)
    best_auc = "undefined (all labels are equal)" if info["best_auc"] is None else f"{info['best_auc']:.6f}"
    print(f"wrote {os.path.join(args.output_dir, 'train.txt')}, {info['num_rows']} rows, seed {info['seed']}, "
          f"{info['positive_rate']:.4f} positive")  # fmt: skip
    print(f"best AUC any model could reach {best_auc}, logloss {info['best_logloss']:.6f}")


def main(argv=None):
    args = parse_args(argv)
    return cli.run_tool(lambda: make(args), "; no sample was written")


if __name__ == "__main__":
    sys.exit(main())
