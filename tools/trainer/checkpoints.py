"""Checkpoints: save, load, resume, prune. Knows files and names, never the model.

A checkpoint is a folder in --model_save_dir: state.json (what the model is, where the run was, which table snapshots
belong to it, checksums), dense.npz (all tensors but the tables', Adam's moments among them) and encoder/ (the
dataset_info.json and vocabulary/ of the data). Rows of the tables lie in snapshots under the persistent paths, which
state.json names, relative to the checkpoint's folder where they lie in it. Everything gets its name by a rename when
all of it is on disk.

Checkpoint folders are the first process's: it alone reads and writes them, and tells the others, whose nodes need not
have them. Rows of the tables lie in a folder for each process, wherever its node has that.

Order of a save, in which every process takes part in every step:
  1. all bring the dense tensors together and see whether there is room for everything
  2. each writes the rows of its own folder of every table, and its checksums; they are summed over the processes
  3. the first one writes the checkpoint, gives it its names and removes old ones
  4. each removes from its own folders what no checkpoint needs
Order of a load: each checks its share of the snapshot's files, all agree that they are whole; on CUDA they are written
anew where OneEmbedding looks for them, before the tables are built; then each loads its own rows.
"""

import json
import os
import pickle
import re
import shutil
import uuid
import zlib

import numpy as np

from tools.trainer import chunks
from tools.trainer.cli import UserError, brief, could_be_given, first_line
from tools.trainer.dataset_info import INFO, check_file, digest_of, read_info
from tools.trainer.files import count, list_folder, read_json, remove, rename_for_good, sync, write_json
from tools.trainer.places import as_place, copy, open_regular
from tools.trainer.processes import all_agree, from_rank0, on_rank0, print_rank0, rank, sum_over_processes, world_size
from tools.trainer.tables import OPTIMIZERS, TableStore

FORMAT = 2  # 1 has dense/ as flow.save writes it, and no checksums
PERIODIC = re.compile(r"step_\d+$")  # checkpoints for --resume, which --keep_checkpoints counts
STAGING, NEW, OLD = ".deepfm-staging", ".deepfm-new-", ".deepfm-old-"  # names of what is not finished
ENCODER = "encoder"  # in a checkpoint; in the folder of a run it is .deepfm-encoder
USE_ANOTHER = "use another checkpoint"
ENTRY_BYTES, SLACK_BYTES = 1 << 12, 1 << 20  # what an array or file, and all else, may take beside its numbers


def finite(value):
    """A schema: a number that is not NaN or infinite."""
    return type(value) in (int, float) and abs(value) < 1e300


def snapshot_name(value):
    """A schema: a name that does not lead out of its folder."""
    return isinstance(value, str) and re.fullmatch(r"\w[\w.-]*", value) is not None


BEST = {"epoch": count, "step": count, "auc": finite, "logloss": finite}
TABLE = {"path": str, "snapshot": snapshot_name, "processes": lambda n: count(n) and 0 < n < 10**6,
         "rows": (count, None), "checksum?": (count, None), "dim?": lambda n: count(n) and 0 < n < 10**6}
STATE = {
    "format_version": lambda version: version in (1, FORMAT), "digest?": str,
    "data?": {"dir": str, "fingerprint": (str, None)},
    "model": {"fields": [str], "table_sizes": [lambda size: count(size) and size > 0], "lists?": {"*": [str]},
              "optimizer?": lambda name: isinstance(name, str) and name in OPTIMIZERS},
    "run": {"run_id": str, "processes": count, "batch_size": count},
    "progress": {"step": count, "epoch": count, "step_in_epoch": count, "best": (BEST, None)},
    "plateau": {"learning_rate": finite, "best": (finite, None), "epochs_to_cut": count, "epochs_to_stop": count,
                "stopped": bool},
    "losses?": lambda sums: isinstance(sums, list) and len(sums) == 2 and all(map(finite, sums)),
    "tables": {"*": TABLE}, "files?": {"*": {"bytes": count, "crc32": count}},
}
RUN = {"run_id": snapshot_name, "model_load_dir": (str, None), "saved?": bool, "checkpoints?": {"*": snapshot_name}}


# ------------------------------------------------------------------------------------------------------------- reading


def find_folder(folder):
    """The folder of a checkpoint, or what it was called when a kill interrupted its replacement."""
    parent, name = os.path.split(os.path.normpath(folder))
    replaced = os.path.join(parent, OLD + name)
    return replaced if not os.path.exists(folder) and os.path.exists(replaced) else folder


def read_checkpoint(folder):
    """state.json of a complete checkpoint.

    Raises: UserError when the folder is no checkpoint, an incomplete or changed one, or of another format.
    """
    if not os.path.isdir(find_folder(folder)):
        raise UserError(f"there is no checkpoint folder {folder}")
    path = os.path.join(find_folder(folder), "state.json")
    if not os.path.isfile(path):
        best = os.path.join(folder, "best_checkpoint")
        advice = f"do you mean {best}?" if os.path.isdir(best) else USE_ANOTHER
        raise UserError(f"{folder} is not a complete checkpoint (it has no state.json); {advice}")
    state = read_json(path, STATE, USE_ANOTHER)
    if state["format_version"] >= 2 and state.get("digest") != digest(state):
        raise UserError(f"{path} was changed or damaged since it was written; {USE_ANOTHER}")
    return state


def digest(state):
    """CRC-32 of a state without its digest."""
    rest = {key: value for key, value in state.items() if key != "digest"}
    return f"{zlib.crc32(json.dumps(rest, sort_keys=True).encode()):08x}"


def find_checkpoints(folder):
    """{name: state} of the complete checkpoints in a --model_save_dir, oldest step first."""
    found = {}
    for name in list_folder(folder):
        if not name.startswith(".") and os.path.exists(os.path.join(folder, name, "state.json")):
            found[name] = read_checkpoint(os.path.join(folder, name))
    return dict(sorted(found.items(), key=lambda item: (item[1]["progress"]["step"], item[0])))


def read_dense(folder, state, checksums=True):
    """{name: array} of a checkpoint's dense tensors.

    Raises: UserError when they are missing or damaged.
    """
    folder = find_folder(folder)
    if state["format_version"] == 1:
        return read_flow_save(os.path.join(folder, "dense"))
    path = os.path.join(folder, "dense.npz")
    expected = state.get("files", {}).get("dense.npz")
    try:
        if checksums and expected and digest_of(path) != expected:
            raise ValueError("it was changed or damaged since it was written")
        with open_regular(path) as file, np.load(file, allow_pickle=False) as arrays:
            return dict(arrays)
    except Exception as error:  # zip, zlib and numpy have a dozen kinds for a damaged file
        raise UserError(f"{path} cannot be read ({first_line(error)}); {USE_ANOTHER}") from None


def encoder_files(folder):
    """{name in the checkpoint: its entry under "files"} of what says how the data was encoded."""
    paths = [os.path.join(place, name) for place, _, names in os.walk(folder) for name in names]
    return {f"{ENCODER}/{os.path.relpath(path, folder)}": digest_of(path) for path in sorted(paths)}


def check_encoder(folder, state):
    """Raise a UserError unless the encoder in a checkpoint is the one that was saved with it."""
    for name in state.get("files", {}):
        if name.startswith(ENCODER + "/"):
            try:
                check_file(find_folder(folder), name, state["files"])
            except UserError:
                raise UserError(f"{folder}/{name} is missing or was changed or damaged since it was written; "
                                f"{USE_ANOTHER}") from None


def share_dense(folder, state, checksums=True):
    """`read_dense` on the first process; the others get arrays of zeros of the same shapes, see `replicate`."""
    arrays = on_rank0(read_dense, folder, state, checksums)
    shapes = from_rank0(lambda: {name: (array.dtype.str, array.shape) for name, array in arrays.items()})
    return arrays or {name: np.zeros(shape, kind) for name, (kind, shape) in shapes.items()}


class SavedTensor:
    """Stands for a tensor in a file of flow.save; `path` is its folder."""

    def __setstate__(self, state):
        self.path = state["path"]


class TensorsOnly(pickle.Unpickler):
    """Reads pickles of flow.save. Everything but a tensor is refused: it could run any command."""

    def find_class(self, module, name):
        if (module, name) != ("oneflow", "Tensor"):
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no checkpoint needs")
        return SavedTensor


def read_flow_save(folder):
    """{name: array} of a folder that flow.save made of a dict of tensors."""
    kinds = {"kFloat": np.float32, "kDouble": np.float64, "kInt64": np.int64, "kInt32": np.int32}
    try:
        with open_regular(os.path.join(folder, "pickled_data")) as file:
            tensors = TensorsOnly(file).load()["data"]
        arrays = {}
        for name, tensor in tensors.items():
            if not re.fullmatch(r"\w+", tensor.path):
                raise ValueError(f"a tensor lies in {tensor.path!r}")
            with open_regular(os.path.join(folder, tensor.path, "meta")) as file:
                meta = file.read().decode("ascii")
            shape = [int(number) for number in re.findall(r"dim: (\d+)", meta)]
            kind = kinds[re.search(r"data_type: (\w+)", meta).group(1)]
            with open_regular(os.path.join(folder, tensor.path, "out")) as file:
                arrays[name] = np.frombuffer(file.read(), kind).reshape(shape)
        return arrays
    except Exception as error:  # a pickle fails in any way
        raise UserError(f"{folder} cannot be read ({first_line(error)}); {USE_ANOTHER}") from None


def adopt_model(args, folder, parser, options, tables):
    """Take the model's shape and the tables' folders from a checkpoint, where the command line does not give them.

    Args: args: parsed by `parser`, given: names of those on the command line; options: names of what describes the
    model; tables: {name: option of its folder}. Returns its state. Raises: UserError where the two contradict.
    """
    state, defaults = from_rank0(read_checkpoint, folder), parser.parse_args([])
    for name in options:
        saved, given = state["model"].get(name, getattr(defaults, name)), name in args.given
        if not could_be_given(parser, name, saved):
            raise UserError(f"{folder} has {brief(repr(saved))} for --{name}; {USE_ANOTHER}")
        if given and name == "negative_sampling_rate":  # parameters and rows do not depend on it
            continue
        if given and getattr(args, name) != saved:
            raise UserError(f"{folder} was saved with --{name} {brief(saved)}, now it is {brief(getattr(args, name))}; "
                            "use the same value, or leave it out")
        setattr(args, name, saved)
    for name, option in tables.items():
        if name not in state["tables"]:
            raise UserError(f"{folder} has no table {name}; it is the checkpoint of another model")
        if getattr(args, option) is None:
            setattr(args, option, table_path(folder, state["tables"][name]))
    if args.batch_norm and not args.disable_fusedmlp:
        raise UserError(f"{folder} has batch normalisation, which the fused MLP has not; leave out "
                        "--disable_fusedmlp False")
    return state


# ------------------------------------------------------------------------------------------- names of complete folders


def publish(staging, names, folder):
    """Make a written checkpoint visible under each name; a name that exists is replaced, and never half."""
    for name in names:
        final, old, copy = (os.path.join(folder, prefix + name) for prefix in ("", OLD, NEW))
        remove(copy)
        if name == names[-1]:
            os.rename(staging, copy)
        else:
            shutil.copytree(staging, copy, copy_function=link_encoder)
        sync(copy)
        if os.path.exists(final):
            remove(old)
            os.rename(final, old)
        rename_for_good(copy, final)
        remove(old)


def link_encoder(source, target):
    """Copy a file of a checkpoint; vocabularies, which never change, are linked where the file system can."""
    if os.sep + ENCODER + os.sep in source:
        try:
            return os.link(source, target)
        except OSError:
            pass
    return shutil.copy2(source, target)


def keep_encoder(data_dir, save_dir):
    """Copy what says how the data was encoded to the folder of a run, where its checkpoints link to it.

    Data without a fingerprint, as earlier versions made it, has nothing to copy. Raises: UserError for a vocabulary
    that is not the one that was written with dataset_info.json.
    """
    target = os.path.join(save_dir, f".deepfm-{ENCODER}")
    remove(target)
    if not (as_place(data_dir) / INFO).exists() or "fingerprint" not in (info := read_info(data_dir)):
        return
    os.makedirs(os.path.join(target, "vocabulary"))
    files = [field.get("encoding", {}).get("vocabulary") for field in info["fields"]]
    for name in [INFO, *filter(None, files)]:
        check_file(data_dir, name, info.get("files"))
        copy(as_place(data_dir) / name, os.path.join(target, name))
    sync(target)


def remove_checkpoint(folder, name):
    """Delete a checkpoint; a kill leaves it whole or under a name that `clean_save_dir` deletes."""
    doomed = os.path.join(folder, f"{STAGING}-{name}")
    os.rename(os.path.join(folder, name), doomed)
    remove(doomed)


def clean_save_dir(folder):
    """Undo what a kill interrupted: put a replaced checkpoint back if its successor is missing, drop unfinished."""
    for name in list_folder(folder):
        path, replaced = os.path.join(folder, name), os.path.join(folder, name[len(OLD):])
        if name.startswith(OLD) and not os.path.exists(replaced):
            os.rename(path, replaced)
        elif name.startswith((OLD, NEW, STAGING)):
            remove(path)


# ------------------------------------------------------------------------------------------------------ save and load


class Checkpointer:
    """Saves and loads what a trainer hands over; all processes call its methods together.

    The trainer offers: step; state(): parts of state.json; dense_tensors(): {name: array}; save_rows(store, snapshot);
    load_dense({name: array}, folder, to_train); load_rows(store, snapshot, blocks of (ids, rows), to_train).
    stores: the tables; run_id: prefix of the run's snapshots; keep: number of periodic checkpoints;
    appends: whether tables go on appending to the files of a snapshot (OneEmbedding); saves_all: whether a snapshot has
    all rows anew, and not only those of a cache; checksums: compare when loading.
    """

    def __init__(self, save_dir, stores, *, run_id=None, keep=2, appends=False, saves_all=True, checksums=True):
        self.save_dir, self.stores, self.run_id = save_dir, stores, run_id
        self.keep, self.appends, self.saves_all, self.checksums = keep, appends, saves_all, checksums
        self.encoder_files = {}
        self.known = set()  # names of the snapshots that this process made or loaded

    def save(self, trainer, names):
        """Save the state as one snapshot of each table and one checkpoint folder per name."""
        snapshot = self.snapshot_of(trainer.step)
        dense = trainer.dense_tensors()
        missing = [store for store in self.stores if not self.has(store, snapshot)]
        all_agree(self.check_space, missing if self.saves_all else [], dense, len(names))
        for store in missing:  # one that was saved at this step already is in use: replacing it could leave it half
            self.explain_failure(trainer.save_rows, store, snapshot)
        tables = {store.name: self.describe(store, snapshot) for store in self.stores}
        self.explain_failure(on_rank0, self.write, names, {**trainer.state(), "tables": tables}, dense)
        if missing or not self.appends:  # else there may be rows in chunks that no snapshot has: evaluations append too
            self.prune()

    def snapshot_of(self, step):
        """Name of the snapshot of a step: the one that this process made or loaded, or a new one.

        A run that goes on from an earlier checkpoint comes to steps of which there may be snapshots of other rows,
        those of checkpoints that somebody moved.
        """
        name, number = f"{self.run_id}-step_{step}", 1
        while name not in self.known and sum_over_processes(any(name in store.snapshots() for store in self.stores)):
            number += 1
            name = f"{self.run_id}-step_{step}-{number}"
        self.known.add(name)
        return name

    def has(self, store, snapshot):
        """Whether every process has a snapshot already."""
        mine = os.path.join(store.own_folder(), "snapshots", snapshot)
        return sum_over_processes(os.path.isdir(mine)) == world_size()

    def check_space(self, stores, dense, copies):
        """Raise a UserError unless there is room for the rows of some tables and some copies of the dense tensors.

        What lies on one disk is counted together.
        """
        needed = {}  # {device number: [folder, bytes]}
        places = [(store.path, store.bytes_to_save()) for store in stores if store.leads()]
        if rank() == 0:
            size = sum(array.nbytes + ENTRY_BYTES for array in dense.values()) + ENTRY_BYTES
            places.append((self.save_dir, size * copies))
        for folder, size in places:
            device = needed.setdefault(os.stat(folder).st_dev, [folder, SLACK_BYTES])
            device[1] += size
        for folder, size in needed.values():
            free = shutil.disk_usage(folder).free
            if free < size:
                raise UserError(f"saving a checkpoint needs {size / 2**20:.1f} MiB on the disk of {folder}, but only "
                                f"{free / 2**20:.1f} MiB are free; the earlier ones are whole: free some space and "
                                "continue with --resume")

    def explain_failure(self, function, *args):
        """Call a function that writes; a failure is a UserError that says what is left."""
        try:
            return function(*args)
        except OSError as error:
            raise UserError(f"cannot write a checkpoint to {error.filename or self.save_dir} ({reason_of(error)}); the "
                            "earlier ones are whole: mend that and continue with --resume") from None

    def describe(self, store, snapshot):
        """A table's entry in state.json."""
        value = self.explain_failure(all_agree, store.write_checksums, snapshot)
        rows, _ = store.check_snapshot(snapshot, world_size(), False)
        return {"path": os.path.abspath(store.path), "dim": store.dim, "snapshot": snapshot, "processes": world_size(),
                "rows": sum_over_processes(rows), "checksum": sum_over_processes(value)}

    def write(self, names, state, dense):
        staging = os.path.join(self.save_dir, STAGING)
        remove(staging)
        os.makedirs(staging)
        encoder = os.path.join(self.save_dir, f".deepfm-{ENCODER}")
        if os.path.isdir(encoder):
            shutil.copytree(encoder, os.path.join(staging, ENCODER), copy_function=link_encoder)
            self.encoder_files = self.encoder_files or encoder_files(encoder)  # they never change
        path = os.path.join(staging, "dense.npz")
        np.savez(path, **dense)
        files = {"dense.npz": digest_of(path), **self.encoder_files}
        run = {"run_id": self.run_id, "processes": world_size(), **state["run"]}
        state = {"format_version": FORMAT, **state, "run": run, "files": files}
        write_json(os.path.join(staging, "state.json"), {**state, "digest": digest(state)})
        publish(staging, names, self.save_dir)
        snapshots = {table["snapshot"] for table in state["tables"].values()}
        note_checkpoints(self.save_dir, dict.fromkeys(names, snapshots.pop()))

    def prune(self):
        """Drop old periodic checkpoints, then this run's snapshots that no checkpoint needs."""
        needed = set(from_rank0(self.remove_old_checkpoints))
        for store in self.stores:
            all_agree(self.prune_rows, store, needed)

    def remove_old_checkpoints(self):
        """Returns the names of the snapshots that those which stay, or that somebody moved elsewhere, need."""
        checkpoints = find_checkpoints(self.save_dir)
        old = [name for name in checkpoints if PERIODIC.match(name)][:-self.keep]
        noted = note_checkpoints(self.save_dir, forget=old)
        for name in old:
            remove_checkpoint(self.save_dir, name)
            del checkpoints[name]
        kept = [table["snapshot"] for state in checkpoints.values() for table in state["tables"].values()]
        return kept + [snapshot for name, snapshot in noted.items() if name not in checkpoints]

    def prune_rows(self, store, needed):
        own = {name for name in store.snapshots() if name.startswith(self.run_id + "-")}
        store.prune(own - needed, keep_last_chunk=self.appends)

    def prepare(self, folder, copy_rows, growth=None):
        """Check the snapshots of a checkpoint; copy_rows: to where OneEmbedding will look for them (CUDA).

        growth: how rows move, where the data has grown since; also for `load`.
        """
        state = from_rank0(read_checkpoint, folder)
        for store in self.stores:
            saved = state["tables"][store.name]
            source = self.holder(store, saved, folder, growth)
            if source.path != store.path:
                print_rank0(f"Reading the rows of {store.name} from {source.path}, where the checkpoint was saved")
            self.check_rows(source, saved)
            if copy_rows and not self.has(store, name_here(saved, growth)):
                all_agree(store.lock)  # a table that another process has open would come upon the new files
                store.write_snapshot(name_here(saved, growth), share_of(rows_of(source, saved, growth)))

    def check_rows(self, source, saved):
        """Raise a UserError unless a snapshot is whole and the one that the checkpoint names."""
        rows, value = source.check_snapshot(saved["snapshot"], saved["processes"], self.checksums)
        rows, known = sum_over_processes(rows), sum_over_processes(value is None) == 0
        value = sum_over_processes(value or 0)
        if saved["rows"] is not None and rows != saved["rows"]:
            raise UserError(f"the table snapshot {saved['snapshot']} in {source.path} has {rows} rows, the checkpoint "
                            f"says {saved['rows']}; {USE_ANOTHER}")
        if self.checksums and saved.get("checksum") is not None and not (known and value == saved["checksum"]):
            raise UserError(f"the table snapshot {saved['snapshot']} in {source.path} is not the one that was saved "
                            f"with the checkpoint; {USE_ANOTHER}")

    def holder(self, store, saved, folder, growth=None):
        """The store that holds a checkpoint's snapshot: this run's, or the one that it was saved to."""
        num_ids = len(growth.places) if growth else None
        here = sum_over_processes(saved["snapshot"] in store.snapshots())
        return store.at(store.path if here else from_rank0(table_path, folder, saved), num_ids)

    def load(self, trainer, folder, to_train=True, growth=None):
        """Hand a checkpoint's tensors and rows to the trainer, after `prepare`, Adam's moments only to train."""
        state = from_rank0(read_checkpoint, folder)
        trainer.load_dense(share_dense(folder, state, self.checksums), folder, to_train)
        for store in self.stores:
            saved = state["tables"][store.name]
            blocks = rows_of(self.holder(store, saved, folder, growth), saved, growth)
            trainer.load_rows(store, name_here(saved, growth), blocks, to_train)
            self.known.add(saved["snapshot"])
        trainer.step = state["progress"]["step"]


def share_of(blocks):
    """Every so many of the blocks that all processes get, and empty ones for the rest, so that all stay in step."""
    for number, (ids, rows) in enumerate(blocks):
        mine = number % world_size() == rank()
        yield (ids, rows) if mine else (ids[:0], rows[:0])


def name_here(saved, growth):
    """What a checkpoint's snapshot is called among a run's own, where it has been copied for OneEmbedding."""
    return saved["snapshot"] + ("-grown" if growth else "")


def rows_of(source, saved, growth):
    """Blocks of (ids, rows) of a snapshot, as ids of the tables that they are for."""
    blocks = source.read_snapshot(saved["snapshot"], saved["processes"])
    return growth.blocks(blocks, source.dim) if growth else blocks


def table_path(folder, saved):
    """Folder of a table's rows by its entry in the state.json of a checkpoint."""
    return os.path.normpath(os.path.join(find_folder(folder), saved["path"]))


def saved_tables(folder, state, checksums=True):
    """TableStores of a checkpoint's tables, where they were saved, after a check of their files. Raises: UserError"""
    stores = []
    for name, saved in state["tables"].items():
        path = table_path(folder, saved)
        dim = saved.get("dim") or width_of(path, saved)
        stores.append(TableStore(name, "persistent_path", path, dim, sum(state["model"]["table_sizes"]),
                                 state["model"].get("optimizer", "adam")))
        Checkpointer(None, [], checksums=checksums).check_rows(stores[-1], saved)
    return stores


def width_of(path, saved):
    """Floats of a value in a table that an earlier version saved, with Adam's moments."""
    store = TableStore("", "persistent_path", path, 0, 0)
    row_bytes = chunks.read_number(os.path.join(store.folder(0, saved["processes"]), "VALUE_SIZE"))
    return row_bytes // (4 * store.size_factor)


def reason_of(error):
    """What the system says of a failed write; shutil.copytree gives a list of (source, target, reason)."""
    if error.errno:
        return os.strerror(error.errno)
    failures = error.args[0] if error.args else ""
    return brief(failures[0][2] if isinstance(failures, list) and failures else failures, 200)


# ------------------------------------------------------------------------------------------------- folders of a run


def run_file(save_dir):
    return os.path.join(save_dir, "run.json")


def read_run(save_dir):
    """{"run_id": prefix of the run's snapshots, "model_load_dir": checkpoint that it started from, or None, ...}

    "saved": whether it has made a checkpoint; "checkpoints": {name: snapshot} of those that it made and did not remove.
    """
    return read_json(run_file(save_dir), RUN, f"--model_save_dir {save_dir} cannot be continued: begin a new run, with "
                     "--model_load_dir to start from one of its checkpoints")


def note_checkpoints(save_dir, new=(), forget=()):
    """Note which checkpoints the run has made: if one is missing later, somebody moved it. Returns {name: snapshot}."""
    if not os.path.exists(run_file(save_dir)):  # the end of a run that keeps none
        return {}
    run = read_run(save_dir)
    noted = {**run.get("checkpoints", {}), **dict(new)}
    noted = {name: snapshot for name, snapshot in noted.items() if name not in forget}
    if noted != run.get("checkpoints", {}):
        write_json(run_file(save_dir), {**run, "saved": True, "checkpoints": noted})
    return noted


def prepare_new_run(save_dir, stores, data_dir, load_dir=None, overwrite=False):
    """Make sure that nothing of another run is overwritten or mixed in, and mark the folder as this run's.

    All processes call it. Raises: UserError when the folders hold another run's rows or checkpoints.
    """
    needed = from_rank0(look_for_checkpoints, save_dir, load_dir, overwrite)
    if overwrite:
        all_agree(keep_loaded_rows, stores, needed, load_dir)
        on_rank0(remove_checkpoints, save_dir)
    all_agree(clear_tables, stores, load_dir, overwrite)
    on_rank0(begin_run, save_dir, data_dir, load_dir)


def look_for_checkpoints(save_dir, load_dir, overwrite):
    """Raise a UserError when a run would begin among checkpoints of another, or delete those that it loads.

    Returns the names of the snapshots that it loads.
    """
    needed = [table["snapshot"] for table in read_checkpoint(load_dir)["tables"].values()] if load_dir else []
    if not overwrite and find_checkpoints(save_dir):
        raise UserError(f"{save_dir} holds checkpoints of another run; continue it with --model_save_dir {save_dir} "
                        "--resume, give another folder, or delete it with --overwrite_tables")
    if overwrite and load_dir and os.path.realpath(save_dir) == os.path.dirname(os.path.realpath(load_dir)):
        raise UserError(f"--overwrite_tables would delete --model_load_dir {load_dir}; give another --model_save_dir")
    return needed


def keep_loaded_rows(stores, needed, load_dir):
    if any(set(needed) & store.snapshots() for store in stores):
        raise UserError(f"--overwrite_tables would delete the tables of --model_load_dir {load_dir}; "
                        "give another --persistent_path and --persistent_path_fm")


def remove_checkpoints(save_dir):
    for name in find_checkpoints(save_dir):
        remove_checkpoint(save_dir, name)


def clear_tables(stores, load_dir, overwrite):
    """Make the folders of the tables ready for a run, each by the first process on its disk."""
    for store in stores:
        if not store.leads():
            continue
        if overwrite:
            store.remove_all()
        if store.has_rows() and not load_dir:
            raise UserError(f"--{store.option} {store.path} already holds rows of another run; continue it with "
                            "--resume, start from a checkpoint with --model_load_dir, give another path, or delete the "
                            "rows with --overwrite_tables")
        os.makedirs(store.path, exist_ok=True)
        store.remove_scratch()


def begin_run(save_dir, data_dir, load_dir):
    os.makedirs(save_dir, exist_ok=True)
    clean_save_dir(save_dir)
    keep_encoder(data_dir, save_dir)
    start = load_dir and os.path.abspath(load_dir)
    write_json(run_file(save_dir), {"run_id": uuid.uuid4().hex[:8], "model_load_dir": start, "saved": False})


def prepare_resume(save_dir, stores):
    """Undo half-done work of a killed run. All processes call it.

    Raises: UserError when the folder is not that of a run, its checkpoints are gone, or the tables belong to another.
    """
    run, found = from_rank0(reopen, save_dir)
    has_rows = sum_over_processes(any(is_of_run(name, run) for store in stores for name in store.snapshots()))
    if run.get("saved", has_rows > 0) and not found:
        raise UserError(f"--resume: {save_dir} had checkpoints, but they are gone; put them back, or begin a new run "
                        "with --model_load_dir. The tables' rows were left as they are")
    if found and "best_checkpoint" in run.get("checkpoints", {}) and "best_checkpoint" not in found:
        raise UserError(f"--resume: {save_dir}/best_checkpoint is gone, and the run ends with it; put it back, or "
                        "begin a new run with --model_load_dir. The tables' rows were left as they are")
    all_agree(reopen_tables, stores, run, found)


def is_of_run(snapshot, run):
    return snapshot.startswith(run["run_id"] + "-")


def reopen(save_dir):
    """(content of run.json, names of the complete checkpoints)"""
    if not os.path.exists(run_file(save_dir)):
        raise UserError(f"--resume: {save_dir} is not the folder of a run; start without --resume")
    clean_save_dir(save_dir)
    return read_run(save_dir), list(find_checkpoints(save_dir))


def reopen_tables(stores, run, found):
    for store in stores:
        if not store.leads():
            continue
        store.remove_scratch()
        if not found and all(is_of_run(name, run) for name in store.snapshots()):
            store.remove_all()  # killed before its first checkpoint: start again
        os.makedirs(store.path, exist_ok=True)


def check_same_run(run, name, options, dataset, data_dir):
    """Raise a UserError where a resumed run would differ from the one of a checkpoint.

    Args: run: of its state; name: its folder; options: {name: value} of this start. The learning rate, cut or not, and
    the position in the epoch come from the checkpoint.
    """
    for option, value in options.items():
        if run[option] != value:
            raise UserError(f"--resume: {name} was trained with --{option} {brief(run[option])}, now it is "
                            f"{brief(value)}; use the same value, or begin a run with --model_load_dir")
    rows = dataset.splits["train"].num_rows
    if run.get("train_rows", rows) != rows:
        raise UserError(f"--resume: {name} was trained on {run['train_rows']} rows, now --data_dir {data_dir} has "
                        f"{rows}; use the same data")
    if run.get("train_digest", dataset.train_digest()) != dataset.train_digest():
        raise UserError(f"--resume: {name} was trained on other rows than those of --data_dir {data_dir}; use the same "
                        "files, or begin a run with --model_load_dir")
