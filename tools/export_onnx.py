#!/usr/bin/env python3
"""Make one ONNX file of a checkpoint, to be served without OneFlow in any language that has ONNX Runtime.

    python tools/export_onnx.py --model_load_dir runs/a/best_checkpoint --output model.onnx

    compared with the trainer on 25000 rows of data/mine/val: largest difference 1.2e-07
    wrote model.onnx: 2.7 MB, raw inputs I1, I2, I3, ..., C25, C26 (39)

--inputs raw (the default): the inputs are the raw columns, one tensor (rows, 1) each: int64 or double for numbers (a
missing whole number is 0, a missing real one NaN), string for categories (missing: ""), (rows, length) for lists. The
encoder is inside: vocabularies, borders of numbers, out-of-vocabulary ids. Hashed fields cannot be raw: ONNX has no
operator for them. --inputs ids: one input `ids`, int64 (rows, columns), global ids as in the dataset. The output is
`probability`, float (rows,).

The metadata of the file say fields, columns, fingerprint of the encoding, checkpoint and its metrics. Above 2 GB the
numbers go to OUTPUT.data beside it. The file gets its name when its probabilities are those of the trainer to 1e-6.
"""

import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `tools` is found from any folder
from tools.trainer import cli

if __name__ == "__main__":
    cli.start_script()  # imports take seconds

import deepfm_train_eval  # before SciPy and its users: see there

# isort: split
import numpy as np
import onnx

from tools.serving import onnx_graph
from tools.serving.check import rows_to_compare
from tools.serving.onnx_file import add_checksums, data_file
from tools.serving.onnx_rows import OnnxModel
from tools.serving.output import check_output
from tools.serving.weights import encoder_of, read_weights
from tools.trainer.cli import UserError, number, shorten

TOLERANCE = 1e-6
LARGEST_FILE = 2_000_000_000  # bytes; protobuf's limit is 2 GiB


def save(proto, path):
    """Write the model; the numbers of a large one go to a file beside it."""
    if proto.ByteSize() <= LARGEST_FILE:
        onnx.save_model(proto, path)
    else:
        onnx.save_model(proto, path, save_as_external_data=True, location=os.path.basename(data_file(path)))
    add_checksums(path)


def compare(args, path, encoder):
    """Largest difference between the file's probabilities and the trainer's, and a text on which rows."""
    predictor = deepfm_train_eval.load(args.model_load_dir, args.device)
    ids, table, where = rows_to_compare(predictor, args.data_dir, encoder, args.rows)
    expected, model, found = predictor.predict(ids), OnnxModel(path), []
    for start in range(0, len(ids), 1000):
        part = slice(start, start + 1000)
        feed = {"ids": ids[part]} if encoder is None else model.feed(table.slice(start, 1000))
        found.append(model.run(feed))
    return float(np.abs(np.concatenate(found) - expected).max()), where


def export(args):
    check_output(args.output, args.overwrite, "--output", [args.model_load_dir])
    weights = read_weights(args.model_load_dir, not args.skip_checksums)
    encoder = encoder_of(args.model_load_dir, not args.skip_checksums) if args.inputs == "raw" else None
    proto = onnx_graph.build(weights, encoder, args.inputs == "raw", args.model_load_dir)
    inputs = shorten([node.name for node in proto.graph.input])
    parent, name = os.path.split(os.path.abspath(args.output))
    os.makedirs(parent, exist_ok=True)
    # the model names the file of its numbers, so both have their names from the beginning, in a folder of their own
    with tempfile.TemporaryDirectory(prefix=f".deepfm-export-{name[:100]}-", dir=parent) as staging:
        path = os.path.join(staging, name)
        save(proto, path)
        del proto, weights
        difference, where = compare(args, path, encoder)
        if not difference <= TOLERANCE:
            raise UserError(f"the file's probabilities differ by {difference:.1e} from the trainer's on {where}, "
                            f"expected at most {TOLERANCE:.0e}; nothing was written")
        files = sorted(os.listdir(staging), reverse=True)  # the model behind its numbers
        size = sum(os.path.getsize(os.path.join(staging, file)) for file in files)
        for file in files:
            check_output(os.path.join(parent, file), args.overwrite, "--output")
        for file in files:
            os.replace(os.path.join(staging, file), os.path.join(parent, file))
    print(f"compared with the trainer on {where}: largest difference {difference:.1e}")
    print(f"wrote {args.output}: {size / 1e6:.1f} MB, {args.inputs} inputs {inputs}")


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    parser.add_argument("--model_load_dir", required=True, help="checkpoint, e.g. MODEL_SAVE_DIR/best_checkpoint")
    parser.add_argument("--output", required=True, metavar="MODEL.onnx", help="file to write")
    parser.add_argument("--inputs", choices=("raw", "ids"), default="raw", help="raw columns, or global ids")
    parser.add_argument("--data_dir", help="dataset whose val rows are compared; default: the one of the training run, "
                        "or rows drawn at random where it is gone")
    parser.add_argument("--rows", type=number(int, 1), default=25000, help="rows to compare at most")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto",
                        help="what the trainer computes on")
    parser.add_argument("--skip_checksums", action="store_true",
                        help="do not compare the checkpoint with its checksums")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing --output")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    return cli.run_tool(lambda: export(args), f"; {args.output} was not written")


if __name__ == "__main__":
    sys.exit(main())
