#!/usr/bin/env python3
"""Score rows with a model of export_onnx.py, without OneFlow: it takes onnxruntime, numpy and pyarrow on any CPython.

    python tools/score_onnx.py model.onnx rows.csv > probabilities.csv
    python tools/score_onnx.py model.onnx rows/ --output probabilities.parquet --keep_columns request_id

writes `probability`, one a row in their order, and the columns that are kept. Rows are files, or folders of files, of
what the model takes: raw columns (text, also .gz and .zst, or parquet) or ids (parquet, or text with a header).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `tools` is found from any folder
from tools.trainer import cli

if __name__ == "__main__":
    cli.start_script()  # imports take seconds

import pyarrow as pa

from tools.serving.onnx_rows import OnnxModel
from tools.serving.output import (
    check_output,
    check_suffix,
    csv_writer,
    kept_schema,
    prediction_file,
    prediction_schema,
    rows_table,
)
from tools.trainer.cli import name_list, number


class Printed:
    """The same as a PredictionFile, on stdout as CSV."""

    def __init__(self, kept):
        self.schema = prediction_schema(kept)
        self.writer = csv_writer(pa.PythonFile(sys.stdout.buffer, "w"), self.schema, "the output to stdout")

    def write(self, probs, kept):
        self.writer.write_table(rows_table(self.schema, probs, kept))

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        self.writer.close()
        sys.stdout.flush()


def score(args):
    if args.output:
        check_output(args.output, args.overwrite, "--output", [args.model, *args.rows])
        check_suffix(args.output, "--output")
    model = OnnxModel(args.model, args.threads, not args.skip_checksums)
    raws = [raw for path in args.rows for raw in model.open(path)]
    keep = args.keep_columns or []
    kept = kept_schema(raws, keep)
    with prediction_file(args.output, kept) if args.output else Printed(kept) as file:
        for raw in raws:
            for probs, columns in model.blocks(raw, keep):
                file.write(probs, columns.cast(kept) if keep else None)
    if args.output:
        print(f"wrote {args.output}: {file.rows} rows")


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    parser.add_argument("model", metavar="MODEL.onnx", help="file that export_onnx.py made")
    parser.add_argument("rows", nargs="+", metavar="ROWS", help="file or folder of rows")
    parser.add_argument("--output", metavar="FILE",
                        help="file to write, CSV where it ends in .csv, else parquet; default: CSV on stdout")
    parser.add_argument("--keep_columns", type=name_list, metavar="NAME,NAME", help="columns to write beside")
    parser.add_argument("--threads", type=number(int, 0, 1024), default=0,
                        help="threads to compute with; 0: one a core")
    parser.add_argument("--skip_checksums", action="store_true",
                        help="do not compare the model with its checksum; for one that another program has changed")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing --output")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    return cli.run_tool(lambda: score(args))


if __name__ == "__main__":
    sys.exit(main())
