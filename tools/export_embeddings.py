#!/usr/bin/env python3
"""Write what a model has learned about each token as one parquet file, for nearest-neighbour search and for looking at.

    python tools/export_embeddings.py --model_load_dir runs/a/best_checkpoint --output embeddings.parquet

    wrote embeddings.parquet: 21451 ids of 39 fields, vectors of 8

Columns: field (text), token (text; null for ids that stand for no token), id (within the field), global_id, count
(times seen in the train rows; null where that is not known), vector (list of float32), first_order (float32, its weight
in logits). --fields C1,C17 writes these only. Without vocabularies (data of older versions) token and count are null.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `tools` is found from any folder
from tools.trainer import cli

if __name__ == "__main__":
    cli.start_script()  # imports take seconds

from tools.trainer.startup import flow  # noqa: F401 - before SciPy and its users

# isort: split
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tools.serving.output import check_output
from tools.serving.rows import load_encoder
from tools.serving.weights import read_weights
from tools.trainer.cli import UserError, name_list, shorten
from tools.trainer.files import replaced_file

WRITE_ROWS = 1 << 17


def tokens_of(field, size):
    """(token per id, count per id) of a field, null where there is none; field: of an Encoder, or None."""
    tokens, counts = np.full(size, None, object), np.full(size, -1, np.int64)
    vocabulary = getattr(field, "vocabulary", None)
    if vocabulary is not None:
        places = slice(field.first_id, field.first_id + len(vocabulary))
        tokens[places], counts[places] = vocabulary.texts.to_numpy(zero_copy_only=False), vocabulary.counts
    return tokens, counts


def field_table(name, field, offset, rows):
    """rows: (vectors float32 (n, D), first-order weights float32 (n,)) of the field's ids."""
    vectors, weights = rows
    tokens, counts = tokens_of(field, len(weights))
    ids = np.arange(len(weights))
    lists = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])
    return pa.table({"field": pa.array([name] * len(ids)), "token": pa.array(tokens, pa.string()), "id": ids,
                     "global_id": ids + offset, "count": pa.array(counts, mask=counts < 0),
                     "vector": lists, "first_order": weights})


def export(args):
    check_output(args.output, args.overwrite, "--output", [args.model_load_dir])
    weights, encoder = read_weights(args.model_load_dir), load_encoder(args.model_load_dir)
    model = weights.state["model"]
    wanted = args.fields or model["fields"]
    strange = [name for name in wanted if name not in model["fields"]]
    if strange:
        raise UserError(f"--fields {strange[0]} is not a field of the model; its fields are {shorten(model['fields'])}")
    fields = {field.name: field for field in encoder.fields} if encoder else {}
    ends, writer, count = np.cumsum([0, *model["table_sizes"]]).tolist(), None, 0
    with replaced_file(args.output) as part:
        for place, name in enumerate(model["fields"]):
            if name in wanted:
                rows = slice(ends[place], ends[place + 1])
                table = field_table(name, fields.get(name), ends[place],
                                    (weights.embedding[rows], weights.first_order[rows]))
                writer = writer or pq.ParquetWriter(part, table.schema)
                writer.write_table(table, WRITE_ROWS)
                count += len(table)
        writer.close()
    print(f"wrote {args.output}: {count} ids of {len(wanted)} fields, vectors of {model['embedding_vec_size']}")


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    parser.add_argument("--model_load_dir", required=True, help="checkpoint, e.g. MODEL_SAVE_DIR/best_checkpoint")
    parser.add_argument("--output", required=True, metavar="FILE.parquet", help="file to write")
    parser.add_argument("--fields", type=name_list, metavar="NAME,NAME", help="only these fields")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing --output")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    return cli.run_tool(lambda: export(args), f"; {args.output} was not written")


if __name__ == "__main__":
    sys.exit(main())
