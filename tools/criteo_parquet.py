#!/usr/bin/env python3
"""Convert raw Criteo text into the parquet dataset that deepfm_train_eval.py reads.

    python tools/criteo_parquet.py --input_dir=/path/to/criteo --output_dir=data/criteo_x4

--input_dir holds one of these, each file plain, .gz or .zst; separator and header are found by looking into the files:

    train.txt                         Kaggle's (tab-separated, no header), which is split 80/10/10 here
    train.csv, valid.csv, test.csv    Criteo_x4 (comma, header)
    day_0 ... day_23                  Criteo's 1 TB logs (tab-separated, no header): the last day is test, the one
                                      before it val, the others train (--val_days, --test_days), in the order of the
                                      days

Expected output for the sample of 5,000 rows that
`python tools/make_criteo_sample.py --output_dir data/raw --num_rows 5000` makes:

    counting train.txt: 5000 rows, ... rows/s, ... s
    reading train.txt: 5000 rows, ... rows/s, ... s
    writing: 5000 rows, ... rows/s, ... s
    wrote data/criteo_x4: 4000 train, 500 val, 500 test rows, 39 fields, ... ids

Encodings (--encoding):
    x4    FuxiCTR's encoding of Criteo_x4. An integer v becomes the token floor(ln(v)^2) if v > 2, else v; a missing one
          becomes 0, which is never in the vocabulary. A category is its string. The vocabulary of a field has the
          tokens that the train rows hold at least --min_categr_count times. Ids as in FuxiCTR 2.x: 0 is padding
          (unused), tokens from 1, all others share the last id, so a table has tokens + 2 rows. More frequent tokens
          have smaller ids, ties in the order of the tokens (those of more than 8 bytes, which Criteo has not, last).
    hash  id = value mod --mod_idx, the value being the integer, or the hexadecimal number of a category; a missing
          value is 0. No vocabulary, --mod_idx rows per table.

The dataset says how its values were encoded (dataset_info.json, vocabulary/), so that tools/encode_rows.py encodes new
rows alike. --base OLD grows a dataset: every token keeps its id, tokens that have now been seen often enough over all
days are appended, all others go to out-of-vocabulary, which is always the last id. Counts of rarer tokens are kept for
that in vocabulary/FIELD.rare.parquet (the 1,048,576 most frequent of each field).

Engines (--engine): `arrow` works on one machine in bounded memory; `spark` gives the same dataset, row by row, from as
many machines as --spark_master has. Both folders and the scratch folder must be visible on all of them.
"""

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `tools` is found from any folder
from tools.trainer import cli

if __name__ == "__main__":
    cli.start_script()  # imports take seconds

from tools.converter import convert, growth, splits
from tools.converter.encoders import Bucket, Category, Modulus
from tools.converter.raw import RawFormat, natural_key, open_raw
from tools.converter.rows import RowMaker
from tools.converter.source import Source
from tools.trainer.cli import LARGEST, UserError, number, shorten
from tools.trainer.dataset_info import LABEL
from tools.trainer.places import as_place

INTEGER_FIELDS = [f"I{i}" for i in range(1, 14)]
CATEGORICAL_FIELDS = [f"C{i}" for i in range(1, 27)]
FIELDS = INTEGER_FIELDS + CATEGORICAL_FIELDS
COLUMNS = [LABEL, *FIELDS]
FORM = RawFormat(columns=COLUMNS, quotes=False, label=LABEL)

X4_ROWS = {"train": 36672493, "val": 4584062, "test": 4584062}
X4_MIN_COUNT = 10
X4_TABLE_SIZES = [
    44, 99, 122, 41, 220, 112, 80, 69, 92, 6, 27, 37, 72,
    1446, 554, 157339, 117822, 306, 18, 11882, 630, 5, 39530, 5131, 156656, 3176, 28,
    11043, 148913, 12, 4560, 2003, 5, 154564, 18, 17, 53031, 82, 40955,
]  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- inputs


def find_inputs(args):
    """The raw files: list of (path, index into SPLITS, or None for one yet to be split). Raises: UserError"""
    folder = as_place(args.input_dir)
    if not folder.is_dir():
        raise UserError(f"--input_dir {folder} is not a folder")
    names = ("train", "valid", "test")
    found = {kind: {name: find(folder, name + kind) for name in names} for kind in (".csv", ".txt")}
    days = find_days(folder)
    kinds = [*(f"train{kind}" for kind in found if found[kind]["train"]), *([days[0].name] if days else [])]
    if len(kinds) > 1:
        raise UserError(f"--input_dir {folder} has both {' and '.join(kinds)}; move all but one of these data sets "
                        "elsewhere")
    if days:
        return split_days(days, args.val_days, args.test_days)
    for kind, paths in found.items():
        if kind == ".txt" and paths["train"] and not paths["valid"]:
            return [(paths["train"], None)]  # Kaggle's; its test.txt has no labels and is left alone
        if any(paths.values()):
            missing = [name + kind for name, path in paths.items() if not path]
            if missing:
                raise UserError(f"{folder} has no {' and no '.join(missing)} (nor .gz of it); expected train{kind}, "
                                f"valid{kind} and test{kind}, or Kaggle's train.txt alone")
            return [(path, split) for split, path in enumerate(paths.values())]
    raise UserError(f"{folder} has neither train.txt nor train.csv, valid.csv, test.csv nor day_0 ... (nor .gz of "
                    "them)")


def find(folder, name):
    """The file of this name, or its .gz or .zst; two of them are an error."""
    paths = [folder / (name + end) for end in ("", ".gz", ".zst") if (folder / (name + end)).exists()]
    if len(paths) > 1:
        raise UserError(f"{folder} has both {paths[0].name} and {paths[1].name}; remove the one that is out of date")
    return paths[0] if paths else None


def find_days(folder):
    """Files day_0, day_1, ... (.gz, .zst) in order."""
    days = sorted((path for path in folder.iterdir() if re.fullmatch(r"day_\d+(\.gz|\.zst)?", path.name)),
                  key=lambda path: natural_key(path.name))
    numbers = [day_number(path) for path in days]
    twice = [path.name for path in days if numbers.count(day_number(path)) > 1]
    if twice:
        raise UserError(f"{folder} has both {' and '.join(twice[:2])}; remove the one that is out of date")
    return days


def day_number(path):
    return int(re.search(r"\d+", path.name).group())


def split_days(days, val_days, test_days):
    """Days to splits by their numbers; by default the last is test and the one before it val."""
    numbers = [day_number(path) for path in days]
    if (val_days is None) != (test_days is None):
        raise UserError("--val_days and --test_days go together; give both or none")
    if len(days) < 3:
        raise UserError(f"there are {len(days)} days ({shorten([path.name for path in days])}), expected at least 3: "
                        "train, val and test")
    val_days, test_days = val_days or [numbers[-2]], test_days or [numbers[-1]]
    unknown = sorted({*val_days, *test_days} - set(numbers))
    if unknown:
        raise UserError(f"there is no day_{unknown[0]}; the days are {shorten([path.name for path in days])}")
    if set(val_days) & set(test_days):
        raise UserError(f"day_{min(set(val_days) & set(test_days))} is both in --val_days and in --test_days")
    return [(path, 1 if day in val_days else 2 if day in test_days else 0) for path, day in zip(days, numbers)]


def open_source(engine, args, fields):
    """(Source, rule): the raw files with their rows counted, and how their rows fall into splits."""
    files = [(open_raw(path, FORM), split) for path, split in find_inputs(args)]
    for raw, _ in files:
        if raw.is_text and raw.has_header and raw.columns != COLUMNS:
            raise UserError(f"{raw.path} has the header {','.join(raw.columns)}, expected {','.join(COLUMNS)}")
    if files[0][1] is not None:
        return Source(engine, files, COLUMNS), splits.ByFile()
    check = RowMaker(fields, LABEL, {}, splits.ByFile(), counting=False).problem
    source = Source(engine, files, COLUMNS, labels_of=check)
    if source.num_rows < splits.NUM_FOLDS:
        raise UserError(f"{files[0][0].path} has {source.num_rows} rows, expected at least {splits.NUM_FOLDS} to split "
                        "them")
    return source, splits.ByFold(source.labels, args.fold_rule)


# --------------------------------------------------------------------------------------------------------------- main


def make_fields(args):
    if args.encoding == "hash":
        return [Modulus(name, modulus=args.mod_idx, base=10 if name in INTEGER_FIELDS else 16) for name in FIELDS]
    return ([Bucket(name, min_count=args.min_categr_count) for name in INTEGER_FIELDS]
            + [Category(name, min_count=args.min_categr_count) for name in CATEGORICAL_FIELDS])


def describe_raw(source):
    """The raw entry of dataset_info.json; new rows may have a header or not."""
    return {**convert.raw_description(source.parts[0].raw, LABEL), "header": None}


def source_info(args, source):
    """The source entry of dataset_info.json: what a user needs in order to make the same dataset again."""
    options = {"engine": args.engine, "seed": args.seed}
    if args.encoding == "x4":
        options["min_categr_count"] = args.min_categr_count
    else:
        options["mod_idx"] = args.mod_idx
    if source.parts[0].split is None:
        options["fold_rule"] = args.fold_rule
    return {"tool": "tools/criteo_parquet.py", "options": options, "encoding": args.encoding}


def compare_with_published(table_sizes):
    """One line on whether the table sizes are those of the published Criteo_x4 (FuxiCTR 2.x vocab_size)."""
    different = [name for name, ours, theirs in zip(FIELDS, table_sizes, X4_TABLE_SIZES) if ours != theirs]
    if not different:
        return "the table sizes are those published for Criteo_x4"
    return (f"the table sizes of {len(different)} of {len(FIELDS)} fields differ from those published for Criteo_x4 "
            f"({', '.join(different)}): same number of rows, but another split")


def convert_criteo(args):
    """Make the dataset that args (see parse_args) asks for; returns the contents of dataset_info.json."""
    fields = make_fields(args)
    base = growth.load_base(args.base, fields) if args.base else None
    info = convert.make_dataset(
        args, lambda engine: open_source(engine, args, fields), fields, LABEL, {},
        lambda source: (describe_raw(source), source_info(args, source)), base)
    if args.encoding == "x4" and info["num_samples"] == X4_ROWS and args.min_categr_count == X4_MIN_COUNT:
        print(compare_with_published([field.table_size for field in fields]))
    return info


def int_range(text):
    """An argparse type: '22,23' -> [22, 23]"""
    return [number(int, 0)(part) for part in text.split(",")]


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    parser.add_argument("--input_dir", required=True,
                        help="folder with train.txt, or train.csv, valid.csv and test.csv, or day_0 ... day_23")
    convert.add_common_options(parser)
    parser.add_argument("--encoding", choices=["x4", "hash"], default="x4",
                        help="x4: FuxiCTR's vocabularies; hash: value mod --mod_idx")
    parser.add_argument("--min_categr_count", type=convert.positive_int, default=X4_MIN_COUNT,
                        help="times that a token must occur in the train rows to have an id of its own (x4)")
    parser.add_argument("--mod_idx", type=number(int, 1, LARGEST), default=40000000, help="rows per table (hash)")
    parser.add_argument("--fold_rule", choices=["sklearn", "sklearn-0.19"], default="sklearn",
                        help="how the rows of train.txt are dealt to ten folds: as scikit-learn does since 0.22, or as "
                             "0.19 did, with which the published Criteo_x4 files were made")
    parser.add_argument("--val_days", type=int_range, help="days for val, 22 say; default: the last but one")
    parser.add_argument("--test_days", type=int_range, help="days for test, 23 say; default: the last")
    parser.add_argument("--base", help="dataset to grow: its ids are kept, and new tokens appended")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    return cli.run_tool(lambda: convert_criteo(args) and 0, convert.ending(args.output_dir))


if __name__ == "__main__":
    sys.exit(main())
