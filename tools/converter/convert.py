"""From options to a published dataset: the part that all converters share."""

import argparse
from pathlib import Path

import numpy as np
import pyarrow as pa

from tools.converter import arrow_engine, info, publish, spark_engine
from tools.converter.encoders import LARGEST_TABLE, vocabulary_file
from tools.converter.raw import format_again, kept_type
from tools.converter.rows import RowMaker
from tools.trainer.cli import LARGEST, UserError, number, shorten
from tools.trainer.dataset import Split
from tools.trainer.dataset_info import SPLITS, digests_of
from tools.trainer.places import is_url

GIGABYTE = 10**9
ENGINES = {"arrow": arrow_engine.ArrowEngine, "spark": spark_engine.SparkEngine}


class Job:
    """What is to be made of which rows; the engines do it.

    Args:
        source: Source. maker: RowMaker. folder: of the dataset to be made. scratch: for temporary files.
        args: options (memory_gb, seed, spark_master). base: Encoder of the dataset that is to grow, or None.
    """

    def __init__(self, source, maker, folder, scratch, args, base=None):
        self.source, self.maker, self.folder, self.scratch = source, maker, Path(folder), Path(scratch)
        self.args, self.base, self.seed = args, base, getattr(args, "seed", None)
        self.memory_bytes = int(args.memory_gb * GIGABYTE)
        maker.num_rows = source.num_rows
        self.carried_schema = carried_schema(maker, source) if maker.carried else None

    def counted_fields(self):
        return [field for field in self.maker.fields if field.counted] if self.maker.counting else []

    def fit(self, results):
        """Make vocabularies and borders of the counts of all tokens."""
        for field, (tokens, counts, texts) in zip(self.counted_fields(), results):
            field.fit(tokens, counts, texts)
        for field in self.maker.fields:
            if field.table_size > LARGEST_TABLE:
                raise UserError(f"field {field.name} has {field.table_size} ids, expected at most {LARGEST_TABLE}; "
                                "give a larger --min_count, or --hash")

    def id_columns(self):
        """[(name, offset)] of the id columns."""
        offsets = np.cumsum([0] + [field.table_size for field in self.maker.fields])
        return [(name, int(offset)) for field, offset in zip(self.maker.fields, offsets) for name in field.columns]

    def id_dtype(self):
        """numpy int32 when every global id fits, else int64."""
        num_ids = sum(field.table_size for field in self.maker.fields)
        return np.dtype(np.int32 if num_ids <= np.iinfo(np.int32).max else np.int64)

    def write_vocabularies(self):
        (self.folder / Path(vocabulary_file("x")).parent).mkdir(exist_ok=True)
        for field in self.maker.fields:
            if field.vocabulary is not None:
                field.write(self.folder)

    def check_splits(self, num_rows):
        empty = [split for split in SPLITS if not num_rows[split]]
        if empty:
            raise UserError(f"the {empty[0]} split has no rows ({', '.join(f'{num_rows[s]} {s}' for s in SPLITS)}); "
                            "choose other bounds or shares of the splits")


def carried_schema(maker, source):
    """pyarrow schema of the carried columns: text from text files, their own types from parquet."""
    raws = [part.raw for part in source.parts]
    return pa.schema([(name, plain(kept_type(raws, column, "--keep"))) for name, column in maker.carried.items()])


def plain(kind):
    return plain(kind.value_type) if pa.types.is_dictionary(kind) else kind


def make_dataset(args, open_source, fields, label, carried, describe, base=None):
    """Convert and publish. Returns the contents of dataset_info.json.

    open_source: function of an engine that finds and counts the raw rows and returns (Source, rule); it runs when the
    output folder is locked. describe: function of a Source that returns (raw, source) for dataset_info.json.
    """
    with publish.published_folder(args.output_dir, inputs_of(args), args.overwrite, args.spark_tmp_dir) as folder, \
            publish.scratch_folder(args.spark_tmp_dir, folder) as scratch, \
            ENGINES[args.engine](args, scratch) as engine:
        source, rule = open_source(engine)
        maker = RowMaker(fields, label, carried, rule, counting=any(field.counted for field in fields))
        num_rows, digests = engine.convert(Job(source, maker, folder, scratch, args, base))
        raw, made = describe(source)
        content = info.dataset_info(fields, num_rows, raw, made, list(carried), digests,
                                    info.grown(base.info) if base is not None else (), digests_of(folder))
        info.write_info(folder, content, show=args.export_dataset_info)
        single = lists_of_one(folder / "train", content["fields"])
    rows = ", ".join(f"{num_rows[split]} {split}" for split in SPLITS)
    ids = sum(field.table_size for field in fields)
    print(f"wrote {args.output_dir}: {rows} rows, {len(fields)} fields, {ids} ids")
    if single:
        print(f"no train row has more than one value of {shorten(single)}; if some should, give their --list_separator")
    return content


def lists_of_one(folder, fields):
    """Names of the fields of lists that have one value at most in each row of a split; fields: of dataset_info.json."""
    lists = [field for field in fields if len(field.get("columns") or []) > 1]
    split = Split(folder, folder.name) if lists else None
    return [field["name"] for field in lists
            if split.column_range(field["columns"][1]) == (field["offset"], field["offset"])]


def inputs_of(args):
    """Paths that the options name as inputs."""
    names = ("input_dir", "input", "val_input", "test_input", "base", "dataset")
    values = [getattr(args, name, None) for name in names]
    return [path for value in values if value for path in (value if isinstance(value, list) else [value])]


def raw_description(raw, label, carried=None):
    """The entry `raw` of dataset_info.json: how raw rows look."""
    common = {"columns": raw.columns, "label": label, "carried": carried or {}}
    if not raw.is_text:
        return {"format": "parquet", **common}
    return {"format": "text", **common, "header": raw.has_header, "separator": raw.separator, "quotes": raw.quotes}


def format_of(info, unlabelled=False):
    """RawFormat of new rows for a dataset, from its dataset_info.json."""
    return format_again(info["raw"], [field.get("raw_column", field["name"]) for field in info["fields"]], unlabelled)


# ------------------------------------------------------------------------------------------------------------- options


def positive_int(text):
    return number(int, 1, LARGEST)(text)


def add_common_options(parser, engines=True, dataset=True):
    """The options that all converters have. engines: there is a choice of them; dataset: not only rows are made."""
    parser.add_argument("--output_dir", required=True, help="folder (or URL) to be made")
    parser.add_argument("--overwrite", action="store_true",
                        help="replace what an earlier run has made there; any other folder is refused")
    parser.add_argument("--spark_tmp_dir", help="folder for scratch files; default: beside the output folder, for "
                                                "a URL the system's")
    parser.add_argument("--memory_gb", type=number(float, 0.1, 1e6), default=4, help="memory to stay within, in GB")
    if dataset:
        parser.add_argument("--seed", type=number(int, 0, 2**32 - 1), default=2018,
                            help="seed of the order of the train rows")
        parser.add_argument("--export_dataset_info", action="store_true",
                            help="print dataset_info.json and README.md of the dataset as well")
    if engines:
        parser.add_argument("--engine", choices=list(ENGINES), default="arrow", help="what does the work")
        parser.add_argument("--spark_master", type=spark_master, default="local[*]", help="Spark master (--engine "
                                                                                          "spark)")


def spark_master(text):
    if not spark_engine.is_master(text):
        raise argparse.ArgumentTypeError(f"'{text}', expected local[*], local[2], yarn, spark://HOST:PORT, k8s://... "
                                         "or mesos://...")
    return text


def ending(output_dir):
    """What an interrupted conversion says."""
    return f"; no dataset was made at {output_dir}" if is_url(output_dir) else f"; nothing was written to {output_dir}"
