#!/usr/bin/env python3
"""Copy a checkpoint with the rows of its tables into one folder, which can be moved to another path or machine.

    python tools/pack_checkpoint.py --model_load_dir runs/a/best_checkpoint --output_dir model_a

    wrote model_a: 21451 rows, 7.9 MB

The folder is a checkpoint like any other, for --predict, --eval_only, --model_load_dir and the tools; its tables lie in
model_a/tables. Adam's moments go along, so that training can continue from it.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `tools` is found from any folder
from tools.trainer import cli

if __name__ == "__main__":
    cli.start_script()  # imports take seconds

import os
import shutil

from tools.trainer import checkpoints
from tools.trainer.cli import UserError
from tools.trainer.files import sync, write_json


def copy_table(source, saved, target):
    """Write a table's snapshot below `target` as one process has it; returns its entry for state.json."""
    path = os.path.join("tables", source.name)
    store = source.at(os.path.join(target, path))
    os.makedirs(store.path)
    store.write_snapshot(saved["snapshot"], source.read_snapshot(saved["snapshot"], saved["processes"]))
    rows, _ = store.check_snapshot(saved["snapshot"], 1, checksums=False)
    return {"path": path, "dim": store.dim, "snapshot": saved["snapshot"], "processes": 1, "rows": rows,
            "checksum": store.write_checksums(saved["snapshot"])}


def copy_file(source, target):
    """Regular files only: a device that a link leads to would never end."""
    if not os.path.isfile(source):
        raise UserError(f"{source} is not a regular file; {checkpoints.USE_ANOTHER}")
    return shutil.copy2(source, target)


def pack(args):
    folder = checkpoints.find_folder(args.model_load_dir)
    state = checkpoints.read_checkpoint(folder)
    if os.path.lexists(args.output_dir):
        raise UserError(f"--output_dir {args.output_dir} exists already; name another folder")
    checkpoints.read_dense(folder, state, not args.skip_checksums)
    if not args.skip_checksums:
        checkpoints.check_encoder(folder, state)
    parent, name = os.path.split(os.path.abspath(args.output_dir))
    staging = os.path.join(parent, f".deepfm-packing-{name}-{os.getpid()}")
    os.makedirs(parent, exist_ok=True)
    try:
        shutil.copytree(folder, staging, ignore=shutil.ignore_patterns("tables"), copy_function=copy_file)
        stores = checkpoints.saved_tables(folder, state, not args.skip_checksums)
        tables = {store.name: copy_table(store, state["tables"][store.name], staging) for store in stores}
        state = {**{key: value for key, value in state.items() if key != "digest"}, "tables": tables}
        write_json(os.path.join(staging, "state.json"), {**state, "digest": checkpoints.digest(state)})
        sync(staging)
        os.rename(staging, args.output_dir)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    size = sum(path.stat().st_size for path in Path(args.output_dir).rglob("*") if path.is_file())
    print(f"wrote {args.output_dir}: {max(table['rows'] for table in tables.values())} rows, {size / 1e6:.3g} MB")


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    parser.add_argument("--model_load_dir", required=True, help="checkpoint, e.g. MODEL_SAVE_DIR/best_checkpoint")
    parser.add_argument("--output_dir", required=True, help="folder to be made")
    parser.add_argument("--skip_checksums", action="store_true",
                        help="do not compare the checkpoint with its checksums")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    return cli.run_tool(lambda: pack(args), f"; {args.output_dir} was not made")


if __name__ == "__main__":
    sys.exit(main())
