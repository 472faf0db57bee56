"""Cross-checks of the trainer's arguments: options that need or exclude each other, and what the device can do."""

import itertools
import os

from tools.trainer.processes import world_size
from tools.trainer.startup import flow


def check_arguments(parser, args, folders):
    """End in one line when arguments contradict each other; chooses args.device where it is auto.

    folders: names of the options that say where the tables' rows are.
    """
    check_use(parser, args, folders)
    check_device(parser, args)
    check_training(parser, args)


def check_use(parser, args, folders):
    """What is to be done, and whether all that it needs is there; folders: options that name the tables' folders."""
    if args.predict and args.eval_only:
        parser.error("--predict and --eval_only are two things; leave one out")
    if (args.predict is None) != (args.predict_output is None):
        parser.error("--predict and --predict_output go together")
    if (args.predict or args.eval_only) and not args.model_load_dir:
        parser.error(f"{'--predict' if args.predict else '--eval_only'} needs --model_load_dir, the checkpoint to use")
    needed = [] if args.predict else ["data_dir"]
    needed += [] if args.predict or args.eval_only else folders
    missing = [f"--{name}" for name in needed if not getattr(args, name)]
    if missing:
        parser.error(f"the following arguments are required: {', '.join(missing)}")
    if args.resume and not args.model_save_dir:
        parser.error("--resume needs --model_save_dir, the folder of the run to continue")
    if args.resume and (args.model_load_dir or args.overwrite_tables):
        parser.error("--resume continues from --model_save_dir; leave out --model_load_dir and --overwrite_tables")
    if not args.model_save_dir:
        for name in ("save_initial_model", "save_model_after_each_eval", "checkpoint_interval"):
            if getattr(args, name):
                parser.error(f"--{name} needs --model_save_dir")


def check_device(parser, args):
    """Choose the device, and refuse what it cannot do."""
    if args.device == "cuda" and not flow.cuda.is_available():
        parser.error("--device cuda, but OneFlow sees no CUDA device; use --device cpu or mend the driver")
    if args.device == "auto":
        args.device = "cuda" if flow.cuda.is_available() else "cpu"
    if args.amp and args.device != "cuda":
        parser.error("--amp needs a CUDA device; leave it out on CPU")
    if not args.disable_fusedmlp and args.device != "cuda":
        parser.error("--disable_fusedmlp False needs a CUDA device; leave it out on CPU")
    if not args.disable_fusedmlp and args.batch_norm:
        parser.error("--disable_fusedmlp False has no batch normalisation; leave out --batch_norm or the fused MLP")
    if args.store_type != "device_mem" and args.cache_memory_budget_mb == 0:
        parser.error(f"--cache_memory_budget_mb 0 leaves --store_type {args.store_type} without a cache; "
                     "give at least 1 or use --store_type device_mem")


def check_training(parser, args):
    if args.batch_size % world_size():
        parser.error(f"--batch_size {args.batch_size} is not divisible by {world_size()} processes; "
                     f"use a multiple of {world_size()}")
    folders = [(name, os.path.realpath(getattr(args, name))) for name in ("persistent_path", "persistent_path_fm",
                                                                          "model_save_dir") if getattr(args, name)]
    for (name, path), (other, same) in itertools.combinations(folders, 2):
        if path == same:
            parser.error(f"--{name} and --{other} are both {getattr(args, name)}; use two folders")
    if args.min_lr > args.learning_rate:
        parser.error(f"--min_lr {args.min_lr} is above --learning_rate {args.learning_rate}")
    if args.optimizer != "adam" and args.given & {"adam_betas", "adam_epsilon"}:
        parser.error(f"--optimizer {args.optimizer} has no betas and its own epsilon; leave out --adam_betas and "
                     "--adam_epsilon")
