"""What benchmark.py measures in processes of their own, and the synthetic data for it.

    python benchmark_workers.py NAME JSON

runs one of WORKERS with the settings in JSON and prints its result as JSON in the last line, or several results, each
in a line as soon as it is known. The peer runs in a Python
that has torch but none of this package's requirements, so everything beyond the standard library is imported late.
"""

import ctypes
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

TOOLS = Path(__file__).resolve().parent

# ----------------------------------------------------------------------------------------------------------- processes


def output_lines(process, patience):
    """Yield the lines that a process with a session of its own prints, as they come.

    It is killed with all that it started after `patience` seconds without a line, or when nobody wants more lines.
    """
    timer = None

    def kill():
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    try:
        while True:
            timer = threading.Timer(patience, kill)
            timer.start()
            line = process.stdout.readline()
            timer.cancel()
            if not line:
                break
            yield line.rstrip("\n")
        process.wait()
    finally:
        timer.cancel()
        if process.poll() is None:
            kill()
            process.wait()


def last_words(lines, number):
    """The last lines of a process that failed, behind those further up that say why: OneFlow's stack is long."""
    return [line for line in lines[:-number] if "Check failed" in line or "rror:" in line] + lines[-number:]


# ----------------------------------------------------------------------------------------------------------------- data


def make_dataset(folder, rows, fields, table_rows):
    """A dataset for the trainer in folder: `rows` = (train, val, test), `fields` tables of `table_rows` together.

    Ids are log-uniform in their table: few are frequent and many are rare, as in Criteo.
    Numbers of rows are rounded up to whole row groups. Raises UserError when a field would be without rows.
    """
    import numpy as np
    import pyarrow as pa

    from tools.converter.writer import parquet_writer
    from tools.trainer.cli import UserError

    if table_rows < fields:
        raise UserError(f"--table_rows {table_rows} is below --fields {fields}; every field needs a row")
    rng = np.random.default_rng(0)
    sizes = [table_rows // fields + (f < table_rows % fields) for f in range(fields)]
    offsets = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    counts = {}
    for split, num_rows in zip(("train", "val", "test"), rows):
        groups = 8 * -(-num_rows // 400_000)
        group_rows = -(-num_rows // groups)
        counts[split] = groups * group_rows
        (folder / split).mkdir(parents=True)
        with parquet_writer(folder / split / "part-00000.parquet", dataset_schema(fields)) as writer:
            for _ in range(groups):
                columns = [(rng.random(group_rows) < 0.25).astype(np.float32)]
                columns[0][:2] = 0, 1  # both labels
                for size, offset in zip(sizes, offsets):
                    local = np.minimum(np.power(float(size), rng.random(group_rows)).astype(np.int32), size) - 1
                    columns.append((local + offset).astype(np.int32))
                writer.write_table(pa.table(columns, schema=dataset_schema(fields)))
    info = [{"name": f"f{f}", "table_size": size, "offset": int(offset)}
            for f, (size, offset) in enumerate(zip(sizes, offsets))]
    (folder / "dataset_info.json").write_text(json.dumps({"fields": info, "num_samples": counts}))


def dataset_schema(fields):
    import pyarrow as pa

    return pa.schema([("Label", pa.float32())] + [(f"f{f}", pa.int32()) for f in range(fields)])


def save_batches(data_dir, path, batch_size, count=8):
    """The first training batches for the peer: ids int64 (count, B, F), labels float32 (count, B, 1)."""
    import numpy as np
    import pyarrow.parquet as pq

    file = pq.ParquetFile(data_dir / "train" / "part-00000.parquet")
    table = next(file.iter_batches(batch_size=count * batch_size))
    columns = [column.to_numpy(zero_copy_only=False) for column in table.columns]
    ids = np.stack(columns[1:], axis=1).astype(np.int64)
    count = len(ids) // batch_size
    shape = (count, batch_size, -1)
    np.savez(path, ids=ids[: count * batch_size].reshape(shape), labels=columns[0][: count * batch_size].reshape(shape))


def make_raw(folder, num_rows):
    """Synthetic raw Criteo as train.csv, valid.csv, test.csv (80/10/10 in the order of the rows), in folder."""
    subprocess.run(
        [sys.executable, TOOLS / "make_criteo_sample.py", "--output_dir", folder, "--num_rows", str(num_rows)],
        check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    names = ["Label"] + [f"I{i}" for i in range(1, 14)] + [f"C{i}" for i in range(1, 27)]
    ends = {"train": num_rows * 8 // 10, "valid": num_rows * 9 // 10, "test": num_rows}
    with open(folder / "train.txt") as raw:
        done = 0
        for split, end in ends.items():
            with open(folder / f"{split}.csv", "w") as file:
                file.write(",".join(names) + "\n")
                for _ in range(end - done):
                    file.write(next(raw).replace("\t", ","))
            done = end
    (folder / "train.txt").unlink()


def make_served_data(work, num_rows):
    """A Criteo dataset in work/data in which every token of train has an id; its raw rows are in work/raw."""
    raw, data = Path(work) / "raw", Path(work) / "data"
    raw.mkdir()
    make_raw(raw, num_rows)
    subprocess.run([sys.executable, TOOLS / "criteo_parquet.py", "--input_dir", raw, "--output_dir", data,
                    "--min_categr_count", "1"], check=True, stdout=subprocess.DEVNULL)
    return data


def make_h5(dataset_dir, folder):
    """The dataset that criteo_parquet.py made, as the h5 files of FuxiCTR 2.0 (one array per column, local ids)."""
    import h5py
    import pyarrow.parquet as pq

    info = json.loads((dataset_dir / "dataset_info.json").read_text())
    folder.mkdir()
    for split, name in zip(("train", "val", "test"), ("train", "valid", "test")):
        table = pq.read_table(dataset_dir / split)
        with h5py.File(folder / f"{name}.h5", "w") as file:
            file.create_dataset("Label", data=table["Label"].to_numpy().astype("float64"))
            for field in info["fields"]:
                column = table[field["name"]].to_numpy().astype("int64")
                file.create_dataset(field["name"], data=column - field["offset"])
    sizes = {field["name"]: field["table_size"] for field in info["fields"]}
    features = [{name: {"source": "", "type": "categorical", "vocab_size": size}} for name, size in sizes.items()]
    feature_map = {
        "dataset_id": "h5", "num_fields": len(features), "labels": ["Label"], "features": features,
        "total_features": sum(sizes.values()),
    }  # fmt: skip
    (folder / "feature_map.json").write_text(json.dumps(feature_map))


# -------------------------------------------------------------------------------------------------------------- workers


def open_trainer(spec):
    """(the trainer's module, Trainer and Checkpointer of a new run) in this process; spec: data_dir, work_dir, options.

    Threads are scheduled as in a training run.
    """
    module = import_trainer()
    args = module.parse_args(
        ["--data_dir", spec["data_dir"], "--persistent_path", f"{spec['work_dir']}/tables",
         "--persistent_path_fm", f"{spec['work_dir']}/tables_fm", "--overwrite_tables", *spec["options"]])  # fmt: skip
    module.prepare_run(on_cpu=args.device == "cpu")
    return (module, *module.start_run(args, module.read_dataset(args.data_dir))[:2])


def import_trainer():
    import_startup()  # before anything that loads SciPy's matrix library
    import deepfm_train_eval

    return deepfm_train_eval


def import_startup():
    sys.path.insert(0, str(TOOLS.parent))
    from tools.trainer import startup

    return startup


def peer_worker(spec):
    """A plain PyTorch DeepFM, for a Python that has torch.

    What FuxiCTR does: dense gradients for the tables and torch.optim.Adam over all parameters, with updates "recipe"
    also the L2 term over both tables and clipping of the global gradient norm. To its advantage one table instead of
    one per field, all data in memory, no shuffling.
    """
    import numpy as np
    import torch
    from torch import nn

    with np.load(spec["batches"]) as file:
        ids, labels = torch.from_numpy(file["ids"]), torch.from_numpy(file["labels"])
    model = torch_deepfm(spec["table_rows"], spec["fields"], spec["dnn"], spec["net_dropout"])
    adam, bce = torch.optim.Adam(model.parameters(), lr=1e-3), nn.BCEWithLogitsLoss()
    recipe = spec["updates"] == "recipe"
    for step in range(spec["warmup"] + spec["steps"]):
        if step == spec["warmup"]:
            start = time.perf_counter()
        loss = bce(model(ids[step % len(ids)]), labels[step % len(ids)])
        if recipe:
            loss = loss + 0.5e-5 * (model.embedding.weight.square().sum() + model.first.weight.square().sum())
        adam.zero_grad()
        loss.backward()
        if recipe:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        adam.step()
    ms = 1000 * (time.perf_counter() - start) / spec["steps"]
    return {"ms_per_step": ms, "threads": torch.get_num_threads(), "torch": torch.__version__}


def torch_deepfm(rows, fields, hidden, dropout, dim=16):
    """A plain DeepFM for a Python that has torch: ids (B, F) -> logits (B, 1)"""
    from torch import nn

    class DeepFM(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.first = nn.Embedding(rows, dim), nn.Embedding(rows, 1)
            for table in (self.embedding, self.first):
                nn.init.normal_(table.weight, std=1e-4)
            sizes, layers = [fields * dim, *hidden], []
            for fan_in, fan_out in zip(sizes, hidden):
                layers += [nn.Linear(fan_in, fan_out), nn.ReLU()] + ([nn.Dropout(dropout)] if dropout else [])
            self.dnn = nn.Sequential(*layers, nn.Linear(sizes[-1], 1))

        def forward(self, ids):
            x = self.embedding(ids)
            total = x.sum(1)
            pairs = 0.5 * ((total * total).sum(1, keepdim=True) - (x * x).flatten(1).sum(1, keepdim=True))
            return self.first(ids).sum(1) + pairs + self.dnn(x.flatten(1))

    return DeepFM()


def floor_worker(spec):
    """One process's share of the matrix products of a step: each layer forward, weight gradient, input gradient."""
    import numpy as np

    startup = import_startup()
    library = ctypes.CDLL(None if startup.BLAS else startup.flow._oneflow_internal.__file__)
    rng, rows, calls = np.random.default_rng(0), spec["rows"], []

    def product(m, n, k, transpose_a, transpose_b):
        a, b, c = (rng.standard_normal(shape).astype(np.float32) for shape in ((m, k), (k, n), (m, n)))
        pointers = [ctypes.c_void_p(array.ctypes.data) for array in (a, b, c)]
        one, zero = ctypes.c_float(1), ctypes.c_float(0)
        calls.append(lambda keep=(a, b, c): library.cblas_sgemm(
            101, 112 if transpose_a else 111, 112 if transpose_b else 111, m, n, k, one, pointers[0],
            m if transpose_a else k, pointers[1], k if transpose_b else n, zero, pointers[2], n))  # fmt: skip

    sizes = spec["sizes"]
    for fan_in, fan_out in zip(sizes[:-1], sizes[1:]):
        product(rows, fan_out, fan_in, False, True)
        product(fan_out, fan_in, rows, True, False)
        product(rows, fan_in, fan_out, False, False)
    for step in range(spec["steps"] + 1):
        if step == 1:
            wait_for_all(spec)
            start = time.perf_counter()
        for call in calls:
            call()
    ms = 1000 * (time.perf_counter() - start) / spec["steps"]
    return {"ms_per_step": ms, "blas": startup.BLAS or "OneFlow built-in"}


def wait_for_all(spec):
    """Return when all processes of the floor have come here, so that they compute at the same time."""
    folder = Path(spec["folder"])
    (folder / str(spec["process"])).touch()
    while len(list(folder.iterdir())) < spec["processes"]:
        time.sleep(0.001)


def gpu_worker(spec):
    """Yield two results of the trainer's classes: steps on rows from parquet, and steps on one batch over and over.

    Each is {"data": which of them, "ms_per_step", "samples_per_second" of all processes together, "gpu_memory_mb"}.
    spec["steps"] steps are counted, behind as many with compilation and with rows that are new to the tables. In them
    nothing is started, logged or saved.
    """
    module, trainer, _ = open_trainer(spec)

    def result(data, ms):
        return {"data": data, "ms_per_step": ms, "samples_per_second": 1000 * trainer.args.batch_size / ms,
                **trainer.device.memory()}  # fmt: skip

    with module.prefetched(module.batches_of_epoch(trainer)) as batches:
        yield result("from parquet", timed_steps(trainer, batches, spec["steps"], spec["steps"]))
        batch = next(batches)
    yield result("same batch", timed_steps(trainer, itertools.repeat(batch), 3, spec["steps"]))


def timed_steps(trainer, batches, warmup, steps):
    """ms per step of so many steps behind the warm-up, as the training loop takes them."""
    for number, batch in enumerate(itertools.islice(batches, warmup + steps)):
        if number == warmup:
            trainer.losses.read()  # waits for the step before
            start = time.perf_counter()
        trainer.losses.add(trainer.train_step(batch), trainer.step_weight, trainer.step)
    trainer.losses.read()
    return 1000 * (time.perf_counter() - start) / steps


def loader_worker(spec):
    """Second epoch of the trainer's reading, shuffling and batching, and its dropout masks, on one core.

    In the first one the process gets its memory from the system, which takes as long again on a virtual machine.
    """
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    module = import_trainer()
    dataset = module.read_dataset(spec["data_dir"])
    for epoch in (1, 2):
        start = time.perf_counter()
        rows = sum(batch.num_valid for batch in module.train_batches(
            module.read_rows, dataset, spec["batch_size"], seed=0, epoch=epoch, rank=0, world_size=1))
    seconds = time.perf_counter() - start
    start = time.perf_counter()
    for number in range(5):
        module.draw_masks(spec["dnn"], spec["batch_size"], 0.2, 0, number, 0)
    masks = (time.perf_counter() - start) / 5
    return {"rows_per_second": rows / seconds, "rows": rows, "masks_per_second": spec["batch_size"] / masks}


def metrics_worker(spec):
    """All metrics of random scores, without and with groups; the memory that it takes on top of what is held."""
    import numpy as np

    module = import_trainer()
    rng = np.random.default_rng(0)
    labels = (rng.random(spec["rows"], np.float32) < 0.25).astype(np.float32)
    probs = rng.random(spec["rows"], np.float32)
    groups = rng.integers(-2**62, 2**62, 1 + spec["rows"] // 9)
    groups = groups[rng.integers(0, len(groups), spec["rows"])]
    result = {}
    for name, scores in (("seconds", module.metrics.Scores(probs, labels)),
                         ("seconds_with_groups", module.metrics.Scores(probs, labels, groups=groups))):  # fmt: skip
        before, start = peak_of_this_process(), time.perf_counter()
        module.compute_metrics(scores)
        result[name] = time.perf_counter() - start
        result.setdefault("extra_bytes", (peak_of_this_process() - before) / spec["rows"])
    return {**result, "held_bytes": (labels.nbytes + probs.nbytes) / spec["rows"]}


def peak_of_this_process():
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def checkpoint_worker(spec):
    """Build the tables, take one step, save, load; in one process. Loading compares checksums first."""
    module, trainer, checkpointer = open_trainer(spec)
    rows = trainer.dataset.num_ids
    float(trainer.train_step(next(module.batches_of_epoch(trainer))).to_local().numpy())
    start = time.perf_counter()
    checkpointer.save(trainer, ["saved"])
    saved = time.perf_counter()
    folder = os.path.join(checkpointer.save_dir, "saved")
    checkpointer.prepare(folder, copy_rows=False)
    checked = time.perf_counter()
    checkpointer.load(trainer, folder)
    loaded = time.perf_counter()
    size = sum(path.stat().st_size for path in Path(spec["work_dir"]).rglob("*") if path.is_file())
    return {"save_seconds": saved - start, "check_seconds": checked - saved, "load_seconds": loaded - saved,
            "bytes_per_row": size / rows}  # fmt: skip


class FuxiCTRBatches:
    """Batches {column: tensor} of a split of the dataset, ids within their fields.

    From memory, where FuxiCTR's own loader has the rows of a small data set too; shuffled anew in every epoch.
    """

    def __init__(self, spec, fields, split, shuffle=False):
        import polars
        import torch

        table = polars.read_parquet(sorted(Path(spec["data"], split).glob("*.parquet")))
        self.columns = {field["name"]: torch.from_numpy(table[field["name"]].to_numpy().astype("int64"))
                        - field["offset"] for field in fields}  # fmt: skip
        self.columns["Label"] = torch.from_numpy(table["Label"].to_numpy().astype("float32"))
        self.rows, self.batch_size, self.shuffle = len(table), spec["batch_size"], shuffle

    def __len__(self):
        return -(-self.rows // self.batch_size)

    def __iter__(self):
        import torch

        order = torch.randperm(self.rows) if self.shuffle else torch.arange(self.rows)
        for chosen in order.split(self.batch_size):
            yield {name: column[chosen] for name, column in self.columns.items()}


def fuxictr_model(features, spec, **options):
    """DeepFM of FuxiCTR's layers; features: its FeatureMap."""
    from fuxictr.pytorch.layers import FactorizationMachine, FeatureEmbedding, MLP_Block
    from fuxictr.pytorch.models import BaseModel

    class DeepFM(BaseModel):
        def __init__(self):
            super().__init__(features, "DeepFM", gpu=-1, **options)
            self.embedding = FeatureEmbedding(features, spec["embedding_vec_size"])
            self.fm = FactorizationMachine(features)
            self.mlp = MLP_Block(features.sum_emb_out_dim(), spec["dnn"], "ReLU", output_dim=1, output_activation=None,
                                 dropout_rates=spec["net_dropout"], batch_norm=spec["batch_norm"])  # fmt: skip
            self.compile("adam", "binary_crossentropy", spec["learning_rate"])
            self.reset_parameters()
            self.model_to_device()

        def forward(self, inputs):
            ids = self.get_inputs(inputs)
            embeddings = self.embedding(ids)
            return {"y_pred": self.output_activation(self.fm(ids, embeddings) + self.mlp(embeddings.flatten(1)))}

    return DeepFM()


def begin_as_here(model, fields, folder):
    """Give FuxiCTR's model the initial values that `train_here` left in folder; biases begin with 0 in both."""
    import numpy as np
    import polars
    import torch

    rows = polars.read_parquet(folder / "embeddings.parquet", columns=["field", "id", "vector", "first_order"])
    rows = {key[0]: part for key, part in rows.partition_by("field", as_dict=True).items()}
    tables = {"vector": model.embedding, "first_order": model.fm.lr_layer.embedding_layer}
    linear = [layer for layer in model.mlp.mlp if isinstance(layer, torch.nn.Linear)]
    with torch.no_grad(), np.load(folder / "model" / "initial_checkpoint" / "dense.npz") as dense:
        for column, table in tables.items():
            for field in fields:
                part, weight = rows[field["name"]], table.embedding_layer.embedding_layers[field["name"]].weight
                values = np.array(part[column].to_list(), np.float32).reshape(len(part), -1)
                weight[torch.from_numpy(part["id"].to_numpy().astype("int64"))] = torch.from_numpy(values)
        for i, layer in enumerate(linear):
            layer.weight.copy_(torch.from_numpy(dense[f"model.dnn.weight_{i}"]))


def fuxictr_worker(spec):
    """Train in FuxiCTR's own loop, score test with its best epoch; for a Python that has fuxictr 2.3."""
    import fuxictr
    import torch
    from fuxictr.features import FeatureMap
    from fuxictr.pytorch.torch_utils import seed_everything

    start = time.perf_counter()
    seed_everything(spec["seed"])
    fields = json.loads((Path(spec["data"]) / "dataset_info.json").read_text())["fields"]
    features = FeatureMap("data", ".")
    features.features.update({field["name"]: {"source": "", "type": "categorical", "vocab_size": field["table_size"]}
                              for field in fields})  # fmt: skip
    features.labels, features.default_emb_dim = ["Label"], spec["embedding_vec_size"]
    features.num_fields = features.get_num_fields()
    features.set_column_index()
    monitor = {"auc-logloss": {"AUC": 1, "logloss": -1}, "auc": "AUC", "logloss": "logloss"}[spec["monitor"]]
    folder = Path(spec["folder"])
    (folder / "fuxictr" / "data").mkdir(parents=True)
    model = fuxictr_model(
        features, spec, monitor=monitor, monitor_mode="min" if monitor == "logloss" else "max", verbose=0,
        early_stop_patience=spec["early_stop_patience"], embedding_regularizer=float(spec["embedding_l2"]),
        net_regularizer=None, reduce_lr_on_plateau=True, model_root=str(folder / "fuxictr"),
        metrics=["AUC", "logloss"])  # fmt: skip
    begin_as_here(model, fields, folder)
    model.fit(FuxiCTRBatches(spec, fields, "train", True), epochs=spec["epochs"],
              validation_data=FuxiCTRBatches(spec, fields, "val"), max_gradient_norm=spec["max_grad_norm"])  # fmt: skip
    found = model.evaluate(FuxiCTRBatches(spec, fields, "test"), metrics=["AUC", "logloss"])
    return {"auc": float(found["AUC"]), "logloss": float(found["logloss"]), "epochs": model._epoch_index + 1,
            "seconds": time.perf_counter() - start, "fuxictr": fuxictr.__version__, "torch": torch.__version__}


def serve_worker(spec):
    """An exported model on one core: seconds to load it, and of requests of each number of rows; see `requests`."""
    os.sched_setaffinity(0, {spec["core"]})
    sys.path.insert(0, str(TOOLS.parent))
    from tools.serving.onnx_rows import OnnxModel

    start = time.perf_counter()
    model = OnnxModel(spec["model"], threads=1)
    loaded = time.perf_counter() - start
    [raw] = model.open(spec["rows"])
    table = raw.table(next(raw.blocks()), model.types(), lambda cells: None)
    feed = model.feed(table)
    return {"load_seconds": loaded, **requests(spec, table.num_rows, lambda rows: model.run(
        {name: values[rows] for name, values in feed.items()}))}


def serve_peer_worker(spec):
    """A plain PyTorch DeepFM in eval mode on ids, on one core, with random weights."""
    import torch

    os.sched_setaffinity(0, {spec["core"]})
    torch.set_num_threads(1)
    model = torch_deepfm(spec["table_rows"], spec["fields"], spec["dnn"], 0.0).eval()
    ids = torch.randint(0, spec["table_rows"], (4096, spec["fields"]))
    with torch.inference_mode():
        return requests(spec, len(ids), lambda rows: torch.sigmoid(model(ids[rows])).numpy())


def requests(spec, available, run):
    """{"1": [seconds, ...], ...}: requests of so many rows, one after another for spec["seconds"] each."""
    found = {}
    for size in spec["sizes"]:
        times, start, place = [], time.perf_counter(), 0
        while time.perf_counter() - start < spec["seconds"] or len(times) < 20:
            begin = time.perf_counter()
            run(slice(place, place + size))
            times.append(time.perf_counter() - begin)
            place = (place + size) % (available - size)
        found[str(size)] = times[len(times) // 10:]  # the first ones warm up
    return found


WORKERS = {"peer": peer_worker, "floor": floor_worker, "gpu": gpu_worker, "loader": loader_worker,
           "metrics": metrics_worker, "checkpoint": checkpoint_worker, "fuxictr": fuxictr_worker,
           "serve": serve_worker, "serve_peer": serve_peer_worker}  # fmt: skip


def main():
    if len(sys.argv) != 3 or sys.argv[1] not in WORKERS:
        sys.exit("error: this is a part of tools/benchmark.py; run: python tools/benchmark.py --help")
    results = WORKERS[sys.argv[1]](json.loads(sys.argv[2]))
    for result in [results] if isinstance(results, dict) else results:
        if os.environ.get("RANK", "0") == "0":
            print(json.dumps(result), flush=True)
    os._exit(0)  # without OneFlow's messages at its end: the result is the last line


if __name__ == "__main__":
    main()
