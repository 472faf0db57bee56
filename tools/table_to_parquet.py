#!/usr/bin/env python3
"""Convert a table of one's own (CSV, TSV or parquet, any columns) into the dataset that deepfm_train_eval.py reads.

    python tools/table_to_parquet.py --input clicks.csv --describe
    python tools/table_to_parquet.py --input clicks.csv --output_dir data/clicks --label clicked \\
        --categorical user_id,item_id,device --numeric price --drop ts

The first looks at the rows, says what it saw in each column, proposes the second, and changes nothing. The second
prints

    counting clicks.csv: 50000 rows, ... rows/s, ... s
    reading clicks.csv: 50000 rows, ... rows/s, ... s
    writing: 50000 rows, ... rows/s, ... s
    wrote data/clicks: 40053 train, 4958 val, 4989 test rows, 4 fields, ... ids

Inputs: files or folders; text may be .gz or .zst, with a header (or --columns), cells may be quoted. Every column is
named by one option: --label (0 and 1), a kind, --keep (carried through the shards, no feature) or --drop. A name with a
comma stands in double quotes: --drop '"a,b",c'. The index that pandas writes has an empty name: --drop '""'.

    --categorical   a text; its id is found in the vocabulary of the train rows. Tokens seen fewer than --min_count
                    times, unknown and missing ones share the out-of-vocabulary id, which is the last one.
    --hash          a text; its id is a hash of it, in a table of a size of its own: for unbounded vocabularies.
    --numeric       a number; its id is that of a bucket: floor(ln(v)^2) if v > 2, else v, of its whole part v, with a
                    vocabulary as above. With --numeric_bins, of one of so many bins that hold about equally many train
                    rows (fewer where values repeat). Missing numbers have an id of their own.
    --list          several texts a row: a list column of parquet, or a text with a --list_separator. The first
                    --list_length of them become columns that share one table; absent ones are padding (id 0). The
                    model takes the mean of the others' embeddings, and the sum of their first-order weights.

How the rows fall into splits: by inputs (--input is train; --val_input, --test_input), by chance (--val_share,
--test_share, --seed), by time (--split_by, --val_from, --test_from) or by group (--split_by_group user_id: all rows of
a user are in one split). What is kept of text files stays text, which --weight_column and --group_column can read; a
column that is a feature too is kept as raw_NAME.

dataset_info.json and vocabulary/ describe the encoding, so that tools/encode_rows.py encodes new rows alike.

    python tools/table_to_parquet.py --base data/day1 --input day2.csv --output_dir data/day2

grows a dataset: label, fields and format are those of --base, every token keeps its id, and tokens that have now been
seen often enough over all days are appended. The counts of rarer ones are kept for that in
vocabulary/FIELD.rare.parquet (the 1,048,576 most frequent of each field). Out-of-vocabulary stays the last id. Bins
keep their borders. How the rows fall into splits is not of --base: say it again, or it is by chance.
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `tools` is found from any folder
from tools.trainer import cli

if __name__ == "__main__":
    cli.start_script()  # imports take seconds

from tools.converter import convert, describe, growth, splits
from tools.converter.encoders import Bucket, Category, Encoder, Hash, Quantile
from tools.converter.names import shard_names
from tools.converter.raw import RawFormat, open_raw
from tools.converter.source import Source, open_files
from tools.trainer.cli import LARGEST, UserError, name_list, number, shorten

MIN_COUNT = 2
KINDS = ("categorical", "numeric", "list", "hash")


# ------------------------------------------------------------------------------------------------------------- options


def per_field(kind):
    """An argparse type: '5' -> {None: 5}; 'user=5,item=3' -> {'user': 5, 'item': 3}"""

    def convert_text(text):
        values = {}
        for part in name_list(text):
            name, _, value = part.rpartition("=")
            values[name if "=" in part else None] = kind(value)
        return values

    return convert_text


class Merge(argparse.Action):
    """Of an option that may be given several times: one list or dict of all that was given."""

    def __call__(self, parser, args, values, option=None):
        old = getattr(args, self.dest)
        setattr(args, self.dest, {**(old or {}), **values} if isinstance(values, dict) else [*(old or []), *values])


def make_parser():
    parser = cli.Parser(__doc__)
    columns = {"type": name_list, "action": Merge, "metavar": "COLUMNS"}
    group = parser.add_argument_group("inputs")
    group.add_argument("--input", action="append", required=True, help="file or folder; may be given several times")
    group.add_argument("--val_input", action="append", help="file or folder with the val rows; --input is then train")
    group.add_argument("--test_input", action="append", help="file or folder with the test rows")
    group.add_argument("--columns", type=name_list, help="names of all columns of text files that have no header")
    group.add_argument("--separator", type=separator, help="of text files, tab for a tab; default: found by looking")
    group.add_argument("--no_quotes", action="store_true", help="quotes in text files are plain characters")
    group.add_argument("--describe", action="store_true", help="look at the rows, propose a command, and change "
                                                               "nothing")
    group.add_argument("--base", help="dataset to grow: its fields and ids are kept, and new tokens appended")
    group = parser.add_argument_group("columns")
    group.add_argument("--label", help="column with the label, 0 or 1")
    group.add_argument("--categorical", **columns, help="columns whose values are looked up")
    group.add_argument("--numeric", **columns, help="columns of numbers, which are put into buckets")
    group.add_argument("--list", **columns, help="columns with several values a row")
    group.add_argument("--drop", **columns, help="columns that are left out")
    group.add_argument("--keep", **columns, help="columns carried through the shards, as features or not")
    group.add_argument("--hash", type=per_field(number(int, 4, LARGEST)), action=Merge, metavar="COLUMN=SIZE",
                       help="categorical columns whose ids are hashes, with the rows of their tables")
    group.add_argument("--min_count", type=per_field(number(int, 1)), action=Merge, metavar="N or COLUMN=N",
                       help=f"train rows that a token needs to have an id of its own; default: {MIN_COUNT}")
    group.add_argument("--numeric_bins", type=per_field(number(int, 2, 100000)), action=Merge, metavar="N or COLUMN=N",
                       help="bins of equally many rows for numeric columns; default: logarithmic buckets")
    group.add_argument("--list_length", type=per_field(number(int, 1, 1000)), action=Merge, metavar="N or COLUMN=N",
                       help="values of a list that are used; default: 5")
    group.add_argument("--list_separator", help="between the values of a list in text; default: |")
    group = parser.add_argument_group("splits")
    share = number(float, 0, 1, open_low=True)
    group.add_argument("--val_share", type=share, default=0.1, help="share of the rows (or groups) for val")
    group.add_argument("--test_share", type=share, default=0.1, help="share of the rows (or groups) for test")
    group.add_argument("--split_by", metavar="COLUMN", help="column with the time of a row: a number, or a date as "
                                                            "text")
    group.add_argument("--val_from", help="first time of val")
    group.add_argument("--test_from", help="first time of test")
    group.add_argument("--split_by_group", metavar="COLUMN", help="column whose values are not to be in two splits")
    convert.add_common_options(parser.add_argument_group("output"))
    return parser


def separator(text):
    text = {"tab": "\t", "\\t": "\t"}.get(text, text)
    if len(text) != 1 or text in '"\r\n' or not text.isascii():
        raise argparse.ArgumentTypeError(f"{text!r}, expected one character, or tab")
    return text


def parse_args(argv=None):
    # names of columns are UTF-8 in the files, whatever the locale is
    argv = [os.fsencode(text).decode("utf-8", "surrogateescape") for text in sys.argv[1:]] if argv is None else argv
    parser = make_parser()
    for action in parser._actions:
        if action.dest == "output_dir":
            action.required = False  # --describe needs none
    args = parser.parse_args(argv)
    if args.describe:
        return args
    if not args.output_dir:
        parser.error("the following arguments are required: --output_dir")
    given = [f"--{name}" for name in ("label", "columns", "list_length", "list_separator", "numeric_bins", *KINDS)
             if getattr(args, name) is not None]
    if args.base and given:
        parser.error(f"{given[0]} does not go with --base, whose fields are kept; leave it out")
    if not args.base and args.label is None:
        parser.error("--label is required: the column with 0 and 1; see --describe")
    check_split_options(parser, args)
    return args


def check_split_options(parser, args):
    if bool(args.val_input) != bool(args.test_input):
        parser.error("--val_input and --test_input go together; give both or none")
    rules = [name for name in ("val_input", "split_by", "split_by_group") if getattr(args, name)]
    if len(rules) > 1:
        parser.error(f"--{rules[0]} and --{rules[1]} are two ways to split the rows; give one of them")
    times = [args.split_by, args.val_from, args.test_from]
    if any(times) and not all(times):
        parser.error("--split_by, --val_from and --test_from go together")
    if args.val_share + args.test_share >= 1:
        parser.error(f"--val_share {args.val_share} and --test_share {args.test_share} leave nothing for train")


# -------------------------------------------------------------------------------------------------------------- fields


def assign(args, columns):
    """Check that every column of the table is named by exactly one kind of option; {column: option}."""
    kinds = {}
    for option in KINDS:
        for name in getattr(args, option) or ():
            if name in kinds and {option, kinds[name]} != {"hash", "categorical"}:
                raise UserError(f"column {name} is given to --{kinds[name]} and --{option}; choose one")
            kinds[name] = option
    if None in kinds:
        raise UserError("--hash needs the name of a column: --hash user_id=1000000")
    if "" in kinds:
        raise UserError(f"--{kinds['']} has a column without a name, which cannot be a feature; give it a name in the "
                        "input, or drop it: --drop '\"\"'")
    used = {args.label: "label", **{name: "drop" for name in args.drop or ()}}
    twice = [name for name in used if name in kinds]
    if twice:
        raise UserError(f"column {twice[0]} is given to --{used[twice[0]]} and --{kinds[twice[0]]}; choose one")
    others = {*(args.keep or ()), args.split_by, args.split_by_group} - {None}
    absent = [name for name in [*kinds, *used, *sorted(others)] if name not in columns]
    if absent:
        raise UserError(f"there is no column {absent[0]!r}; the columns are {shorten(columns)}")
    left = [name for name in columns if name not in kinds and name not in used and name not in others]
    if left:
        raise UserError(f"no option names the columns {shorten(left)}; give them to --categorical, --numeric, --list, "
                        "--keep or --drop (see --describe)")
    if not kinds:
        raise UserError("no column is a feature; give some to --categorical, --numeric or --list")
    check_per_field(args, kinds)
    return kinds


def check_per_field(args, kinds):
    """Options of single columns must name columns that they apply to."""
    for option, suited in (("min_count", ("categorical", "numeric", "list")), ("numeric_bins", ("numeric",)),
                           ("list_length", ("list",))):
        for name in getattr(args, option) or ():
            if name is not None and kinds.get(name) not in suited:
                raise UserError(f"--{option} {name}=...: {name!r} is no column of --{' or --'.join(suited)}")


def check_names(args, base):
    """The same where the columns are those of --base; --drop may name what the fields leave out."""
    options = {"category": "categorical", "bucket": "numeric", "quantile": "numeric"}
    kinds = {field.raw_column: options.get(field.kind, field.kind) for field in base.fields}
    check_per_field(args, kinds)
    used = [name for name in args.drop or () if name in kinds or name == base.label]
    if used:
        raise UserError(f"--drop {used[0]}: it is a column of --base {args.base}, whose fields are kept")


def make_fields(args, columns):
    """Fields in the order of the table's columns, and the names of the carried columns {name in the shards: column}."""
    kinds = assign(args, columns)
    wanted = [name for name in columns if name in kinds]
    lengths = {name: value_of(args.list_length, name, 5) for name in wanted if kinds[name] == "list"}
    names, carried = shard_names(wanted, lengths, args.keep or [])
    fields = []
    for column in wanted:
        name, kind = names[column], kinds[column]
        min_count = value_of(args.min_count, column, MIN_COUNT)
        bins = value_of(args.numeric_bins, column, None)
        if kind == "hash":
            fields.append(Hash(name, column, args.hash[column]))
        elif kind == "numeric" and bins:
            fields.append(Quantile(name, column, bins))
        elif kind == "numeric":
            fields.append(Bucket(name, column, min_count, own_missing=True))
        else:
            fields.append(Category(name, column, min_count, lengths.get(column), args.list_separator or "|"))
    return fields, carried


def value_of(values, name, default):
    return default if values is None else values.get(name, values.get(None, default))


def split_rule(args):
    if args.val_input:
        return splits.ByFile()
    if args.split_by:
        return splits.ByTime(args.split_by, args.val_from, args.test_from)
    if args.split_by_group:
        return splits.ByGroup(args.split_by_group, args.seed, args.val_share, args.test_share)
    return splits.ByChance(args.seed, args.val_share, args.test_share)


# ---------------------------------------------------------------------------------------------------------- converting


def raw_format(args, base):
    if base is not None:
        form = convert.format_of(base.info)
        return form._replace(separator=args.separator, quotes=form.quotes and not args.no_quotes)
    return RawFormat(args.columns, args.columns is None, args.separator, not args.no_quotes, args.label)


def open_tables(args, form):
    """[(RawText or RawParquet, index into SPLITS or None)] of all inputs."""
    inputs = [args.input, args.val_input, args.test_input]
    if not args.val_input:
        return [(raw, None) for raw in open_files(args.input, form)]
    return [(raw, split) for split, paths in enumerate(inputs) for raw in open_files(paths, form)]


def source_info(args, base):
    names = ("engine", "seed", "val_share", "test_share", "split_by", "val_from", "test_from", "split_by_group", "base",
             "min_count", "numeric_bins", "hash")
    unused = {"split_by": ("val_share", "test_share"), "val_input": ("val_share", "test_share")}
    hidden = {name for option, others in unused.items() if getattr(args, option) for name in others}
    options = {name: spoken(getattr(args, name)) for name in names
               if getattr(args, name) is not None and name not in hidden}
    return {"tool": "tools/table_to_parquet.py", "options": options, "encoding": "table"}


def spoken(value):
    """An option's value as it was given."""
    if isinstance(value, dict):
        return ",".join(str(item) if name is None else f"{name}={item}" for name, item in value.items())
    return value


def convert_table(args):
    base = Encoder.load(args.base) if args.base else None
    form = raw_format(args, base)
    files = open_tables(args, form)
    columns = files[0][0].columns
    if base is not None:
        check_names(args, base)
        fields = growth.fields_of(base, args.base, args.min_count)
        label, carried = base.label, growth.carried_of(base, args.keep)
        files[0][0].check_columns(args.drop or ())
    else:
        fields, carried = make_fields(args, columns)
        label = args.label
    for name, column in [(field.name, field.raw_column) for field in fields] + list(carried.items()):
        if name != column:
            print(f"note: column {column!r} is called {name} in the dataset")
    rule = split_rule(args)
    wanted = [label, *(field.raw_column for field in fields), *carried.values(), *rule.columns]
    convert.make_dataset(args, lambda engine: (Source(engine, files, wanted), rule), fields, label, carried,
                         lambda source: (convert.raw_description(files[0][0], label, carried), source_info(args, base)),
                         base)


def describe_table(args):
    form = RawFormat(args.columns, args.columns is None, args.separator, not args.no_quotes, args.label)
    raw = open_raw(open_files(args.input[:1], form)[0].path, form)
    print(describe.text_of(raw, args))


def main(argv=None):
    args = parse_args(argv)
    if args.describe:
        return cli.run_tool(lambda: describe_table(args))
    return cli.run_tool(lambda: convert_table(args), convert.ending(args.output_dir))


if __name__ == "__main__":
    sys.exit(main())
