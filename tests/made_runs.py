"""Log folders of training runs, made by hand, for the tests of the tools that read them."""

import json


def train_line(step, lr=0.01, loss=0.5, speed=1000.0, epoch=1):
    return {"event": "train", "step": step, "epoch": epoch, "loss": loss, "lr": lr, "samples_per_second": speed}


def eval_line(event, step, epoch, auc, logloss, **more):
    return {"event": event, "step": step, "epoch": epoch, "auc": auc, "logloss": logloss, **more}


# by AUC alone epoch 3 would be best, by logloss alone epoch 1; a cut behind steps 20 and 40
LINES = [train_line(10), train_line(20), eval_line("val", 20, 1, 0.70, 0.40), train_line(30, 0.001),
         train_line(40, 0.001), eval_line("val", 40, 2, 0.79, 0.41), train_line(50, 0.0001),
         eval_line("val", 50, 3, 0.80, 0.45), eval_line("test", 40, 2, 0.78, 0.42)]


def write_run(folder, lines=LINES, info=None):
    """metrics.jsonl and, with `info`, run.json in a folder; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if info is not None:
        (folder / "run.json").write_text(json.dumps(info))
    return folder


def run_info(seed=1, monitor="auc-logloss", fingerprint="f00d", **options):
    """A run.json as the trainer writes it."""
    options = {"seed": seed, "learning_rate": 0.001, "dnn": [8, 8], "model_save_dir": f"saved/{seed}", **options}
    return {"run_id": f"id{seed}", "options": options, "seed": seed, "monitor": monitor, "processes": 1,
            "device": "cpu", "data": {"dir": f"data/{seed}", "fingerprint": fingerprint, "rows": {"train": 9}},
            "versions": {"oneflow": "0.9.0"}, "machine": {"cpu": "two cores"}}
