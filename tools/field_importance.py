#!/usr/bin/env python3
"""Show how much a trained model owes to each field: permutation importance on the val split.

    python tools/field_importance.py --data_dir data/criteo_sample --model_load_dir runs/small/best_checkpoint \\
        --output importance.png

prints the val metrics, then the fields, the most important first:

    val AUC 0.791415, logloss 0.458567, 25000 rows, permutations per field: 3

    field   AUC drop        +-  logloss rise        +-
    C17     0.075703  0.001025      0.082521  0.001346
    C9      0.071845  0.001207      0.079850  0.001403
    ...
    I13    -0.000579  0.000204     -0.000310  0.000176
    wrote importance.png

Each field's column is permuted among the rows (those of a list together), all else stays, and the model scores the rows
again (Breiman, Random Forests, 2001, section 10). What AUC loses and logloss gains by that is the field's importance:
about 0 for a field that the model does not use, a little below 0 by chance. A field whose content another field repeats
looks less important than it is. `+-` is the standard deviation (n - 1) over the repeats. All rows count alike, whatever
weights the run had.

Shape of the model and folders of the tables are read from the checkpoint. The ids of all scored rows are held in memory
(4 bytes each, 8 from 2^31 table rows on: 0.7 GB for the 4.6 million rows of Criteo_x4), and every repeat of every field
scores them once: use --max_rows where that takes too long.
"""

import math
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `tools` is found from any folder
from tools.trainer import cli

if __name__ == "__main__":
    cli.start_script()  # imports take seconds

import deepfm_train_eval as trainer_code  # before SciPy and its users: see there

# isort: split
import matplotlib.pyplot as plt
import numpy as np
from plot_training import COLOURS, png_path, save
from tqdm import tqdm

from tools.trainer import checkpoints, metrics
from tools.trainer.batches import Batch
from tools.trainer.cli import Parser, UserError, number, shorten
from tools.trainer.dataset import Dataset, Split, add_digests, read_dataset_info
from tools.trainer.dataset_info import LABEL
from tools.trainer.places import as_place
from tools.trainer.startup import prepare_run

BAR_HEIGHT, BAR_CHART_WIDTH = 0.19, 9.0  # inches


# ------------------------------------------------------------------------------------------------------ model and data


def load(args):
    """A Trainer with the checkpoint's model; its dataset has the val split only."""
    state = checkpoints.read_checkpoint(args.model_load_dir)
    model, known, splits = state["model"], read_dataset_info(args.data_dir), {}
    split = splits["val"] = Split(as_place(args.data_dir) / "val", "val")
    if known.get("files"):
        add_digests(splits, known["files"], args.data_dir)
    dataset = Dataset(splits, model["fields"], model["table_sizes"], model.get("lists"), known.get("fingerprint"))
    missing = [name for name in (LABEL, *dataset.columns) if name not in split.columns]
    if missing:
        raise UserError(f"{split.files[0]} lacks the columns {shorten(missing)} of the checkpoint's data; give the "
                        "--data_dir that it was trained on")
    options = {"data_dir": args.data_dir, "model_load_dir": args.model_load_dir, "device": args.device,
               "batch_size": args.batch_size or state["run"]["batch_size"], "persistent_path": args.persistent_path,
               "persistent_path_fm": args.persistent_path_fm}
    given = [f"--{name}={value}" for name, value in options.items() if value is not None]
    trainer, _ = trainer_code.open_checkpoint(trainer_code.parse_args([*given, "--eval_only"]), args.model_load_dir,
                                              dataset)
    return trainer


def read_ids(dataset, split, max_rows=None):
    """The first max_rows rows (None: all) of a split -> (ids int32 or int64 (n, C), labels float32 (n,))"""
    rows, position, ids, labels = min(split.num_rows, max_rows or split.num_rows), 0, None, None
    for group_ids, group_labels in trainer_code.read_rows(dataset, split):
        if ids is None:
            ids, labels = np.empty((rows, len(dataset.columns)), group_ids.dtype), np.empty(rows, np.float32)
        part = slice(position, min(position + len(group_ids), rows))
        ids[part], labels[part] = group_ids[:rows - position], group_labels[:rows - position]
        position = part.stop
        if position == rows:
            break
    return ids, labels


def score(trainer, ids):
    """Probabilities float32 (n,) of the model for ids (n, C)."""
    size, num_ids = trainer.args.batch_size, trainer.dataset.num_ids

    def batches():
        for start in range(0, len(ids), size):
            part = ids[start:start + size]
            labels = np.zeros(len(part), np.float32)  # not used
            yield Batch([(part, labels)], size, len(part), num_ids), [labels]

    return trainer.score(batches(), len(ids), "val")[0]


# ---------------------------------------------------------------------------------------------------------- importance


def permuted(rows, seed, repeat, field):
    """The rows in an order of its own for every (seed, repeat, field number)."""
    return np.random.default_rng((seed, repeat, field)).permutation(rows)


def auc_and_logloss(labels, probs):
    scores = metrics.clipped(metrics.Scores(probs, labels))
    return metrics.auc(scores), metrics.logloss(scores)


def importance(predict, ids, labels, repeats, seed, field_of=None):
    """Drop in AUC and rise in logloss by permuting each field: ((AUC, logloss), changes float64 (F, repeats, 2)).

    predict: ids (n, C) -> probabilities (n,). ids come back as they were. field_of: number of each column's field;
    None: every column is a field.
    """
    field_of = np.arange(ids.shape[1]) if field_of is None else np.asarray(field_of)
    auc, logloss = auc_and_logloss(labels, predict(ids))
    if math.isnan(auc):
        raise UserError(f"all {len(labels)} labels are {labels[0]:g}, AUC needs both 0 and 1; use a larger --max_rows")
    num_fields = field_of[-1] + 1
    changes = np.empty((num_fields, repeats, 2))
    jobs = [(field, repeat) for field in range(num_fields) for repeat in range(repeats)]
    for field, repeat in tqdm(jobs, unit=" scores", leave=False, disable=not sys.stderr.isatty()):
        columns = np.flatnonzero(field_of == field)
        values = ids[:, columns]
        ids[:, columns] = values[permuted(np.arange(len(ids)), seed, repeat, field)]
        new_auc, new_logloss = auc_and_logloss(labels, predict(ids))
        ids[:, columns] = values
        changes[field, repeat] = auc - new_auc, new_logloss - logloss
    return (auc, logloss), changes


# -------------------------------------------------------------------------------------------------------------- output


def sort_fields(fields, changes):
    """[(name, mean AUC drop, its deviation, mean logloss rise, its deviation)], largest AUC drop first."""
    means, deviations = changes.mean(axis=1), changes.std(axis=1, ddof=min(1, changes.shape[1] - 1))
    order = np.argsort(-means[:, 0], kind="stable")
    return [(fields[f], means[f, 0], deviations[f, 0], means[f, 1], deviations[f, 1]) for f in order]


def table_text(rows):
    width = max(5, *(len(row[0]) for row in rows))
    lines = [f"{'field':<{width}}   AUC drop        +-  logloss rise        +-"]
    for name, *numbers in rows:
        lines.append("{:<{}}  {:>9.6f}  {:>8.6f}  {:>12.6f}  {:>8.6f}".format(name, width, *numbers))
    return "\n".join(lines)


def draw(rows, title):
    """Figure with a bar per field for AUC and for logloss; thin lines show the deviation over the repeats."""
    height = BAR_HEIGHT * len(rows) + 1.1
    figure, panels = plt.subplots(1, 2, sharey=True, figsize=(BAR_CHART_WIDTH, height))
    names = [row[0] for row in rows]
    for axes, label, place, colour in zip(panels, ("drop in AUC", "rise in logloss"), (1, 3), COLOURS):
        axes.barh(names, [row[place] for row in rows], xerr=[row[place + 1] for row in rows], color=colour,
                  height=0.7, error_kw={"elinewidth": 1, "ecolor": "#444444"})
        axes.axvline(0, color="#444444", linewidth=0.8)
        axes.set_xlabel(label, fontsize=9)
        axes.grid(True, axis="x", color="#e4e4e4", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.tick_params(labelsize=8.5, color="#888888")
        axes.tick_params(axis="y", length=0)
        axes.locator_params(axis="x", nbins=6)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
    panels[0].set_ylim(len(rows) - 0.4, -0.6)  # the most important on top
    figure.suptitle(title, fontsize=10, fontweight="bold")
    figure.tight_layout()
    return figure


# ----------------------------------------------------------------------------------------------------------- arguments


def parse_args(argv=None):
    parser = Parser(__doc__.split("\n")[0])
    model = parser.add_argument_group("data and model")
    model.add_argument("--data_dir", required=True, help="folder with val/ parquet shards")
    model.add_argument("--model_load_dir", required=True, help="checkpoint, e.g. MODEL_SAVE_DIR/best_checkpoint")
    model.add_argument("--persistent_path",
                       help="folder of the persistent store of the embedding, if it was moved since the checkpoint")
    model.add_argument("--persistent_path_fm", help="the same for the first-order (FM) embedding")
    work = parser.add_argument_group("work")
    work.add_argument("--repeats", type=number(int, 1), default=3, help="permutations per field")
    work.add_argument("--seed", type=number(int, 0), default=2022, help="seed of the permutations")
    work.add_argument("--max_rows", type=number(int, 1), help="use the first rows of val only")
    work.add_argument("--batch_size", type=number(int, 1), help="rows scored at a time, if other than in training")
    work.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto",
                      help="auto: cuda when OneFlow sees a GPU")
    parser.add_argument_group("output").add_argument("--output", type=png_path, metavar="FILE.png", help="bar chart")
    return parser.parse_args(argv)


def run(args):
    prepare_run(on_cpu=args.device != "cuda")
    trainer = load(args)
    ids, labels = read_ids(trainer.dataset, trainer.dataset.splits["val"], args.max_rows)
    (auc, logloss), changes = importance(partial(score, trainer), ids, labels, args.repeats, args.seed,
                                         trainer.dataset.field_of)
    title = f"val AUC {auc:.6f}, logloss {logloss:.6f}, {len(labels)} rows, permutations per field: {args.repeats}"
    rows = sort_fields(trainer.dataset.fields, changes)
    print(f"{title}\n\n{table_text(rows)}", flush=True)
    if args.output:
        save(draw(rows, title), args.output)
        print(f"wrote {args.output}")


def main(argv=None):
    args = parse_args(argv)
    return cli.run_tool(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
