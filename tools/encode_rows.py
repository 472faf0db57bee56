#!/usr/bin/env python3
"""Encode new raw rows with the vocabularies of a dataset: shards with the same ids, to be scored or trained on.

    python tools/encode_rows.py --dataset data/clicks --input new.csv --output_dir new_ids

    counting new.csv: 1000 rows, ... rows/s, ... s
    encoding new.csv: 1000 rows, ... rows/s, ... s
    unknown values, by field: user_id 31 (3.10 %), item_id 0, device 0, price 0
    wrote new_ids: 1000 rows without labels, 4 fields

Rows look as those that the dataset was made from: the same column names (in any order, among any others), or the same
columns in the same order where files have no header. They may be text (also .gz and .zst) or parquet, with the label or
without. Values that the vocabulary does not have get the out-of-vocabulary id; how many there are is said per field.
Rows keep their order. OUT holds part-00000.parquet ... and _dataset_info.json, which says with which encoder they were
made (a name with _, so that pandas and Spark read the folder as one table).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `tools` is found from any folder
from tools.trainer import cli

if __name__ == "__main__":
    cli.start_script()  # imports take seconds

import numpy as np

from tools.converter import convert, growth, info, publish, splits
from tools.converter.encoders import Encoder
from tools.converter.rows import RowMaker
from tools.converter.source import Source, open_files
from tools.converter.writer import SplitWriter, parquet_writer, rows_digest
from tools.trainer.cli import UserError, name_list
from tools.trainer.dataset_info import LABEL, digest_of, parquet_files


def open_source(engine, args, encoder, wanted):
    """Source of the new rows. Raises: UserError where some files have a label and others have not."""
    files = open_files(args.input, convert.format_of(encoder.info, unlabelled=True))
    labelled = [encoder.label in raw.columns for raw in files]
    if len(set(labelled)) > 1:
        raise UserError(f"{files[labelled.index(False)].path} has no label {encoder.label!r}, but "
                        f"{files[labelled.index(True)].path} has; encode them one by one")
    return Source(engine, [(raw, 0) for raw in files], wanted, may_be_empty=True)


def write_no_rows(job, labelled):
    """A shard that has the columns only, for an hour without rows, say; returns what engine.encode would."""
    with SplitWriter(job.folder, job.id_columns(), job.id_dtype(), 0, labelled, job.carried_schema) as writer:
        parquet_writer(job.folder / "part-00000.parquet", writer.schema).close()
    return {"rows": 0}, {"rows": rows_digest([])}


def encode_rows(args):
    encoder = Encoder.load(args.dataset)
    carried = growth.carried_of(encoder, args.keep or [])
    maker = RowMaker(encoder.fields, encoder.label, carried, splits.ByFile(), counting=False)
    unknown = np.zeros(len(encoder.fields), np.int64)
    place = (args.output_dir, convert.inputs_of(args), args.overwrite, args.spark_tmp_dir)
    with publish.published_folder(*place) as folder, \
            publish.scratch_folder(args.spark_tmp_dir, folder) as scratch, \
            convert.ENGINES[args.engine](args, scratch) as engine:
        source = open_source(engine, args, encoder, [*encoder.raw_columns, *carried.values()])
        labelled = encoder.label in source.parts[0].raw.columns
        job = convert.Job(source, maker, folder, scratch, args)
        num_samples, digests = engine.encode(job, unknown) if source.num_rows else write_no_rows(job, labelled)
        made = {"tool": "tools/encode_rows.py", "options": {"dataset": args.dataset, "engine": args.engine}}
        counts = {field.name: int(count) for field, count in zip(encoder.fields, unknown)}
        label = LABEL if labelled else None
        files = {path.name: digest_of(path) for path in parquet_files(folder)}
        content = info.rows_info(encoder.info, num_samples, digests, label, carried, made, counts, files)
        info.write_rows_info(folder, content)
    shown = [f"{field.name} {count}" + (f" ({100 * count / source.num_rows:.2f} %)"
                                        if count and len(field.columns) == 1 else "")  # a list may be of any length
             for field, count in zip(encoder.fields, unknown)]
    print(f"unknown values, by field: {', '.join(shown)}")
    print(f"wrote {args.output_dir}: {source.num_rows} rows with{'' if labelled else 'out'} labels, "
          f"{len(encoder.fields)} fields")


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    parser.add_argument("--dataset", required=True, help="dataset (or folder with its dataset_info.json and "
                                                         "vocabulary/)")
    parser.add_argument("--input", action="append", required=True, help="file or folder; may be given several times")
    parser.add_argument("--keep", type=name_list, help="columns carried through the shards, a,b,c")
    convert.add_common_options(parser, dataset=False)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    return cli.run_tool(lambda: encode_rows(args), convert.ending(args.output_dir))


if __name__ == "__main__":
    sys.exit(main())
