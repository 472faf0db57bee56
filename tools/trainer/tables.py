"""Table rows on disk, in OneEmbedding's persistent-table format (chunks.py says what is in a folder).

PATH/<rank>-<world size>/ holds the rows of one process: those whose id OneEmbedding's hash gives to it, on both
devices. A stored row is the value and behind it what the optimizer keeps, [value | m | v] with Adam (see OPTIMIZERS),
float32. Each process writes and removes in its own folder only, so that every node may have a disk of its own; on CPU,
where a process trains a range of ids, rows are dealt out over the network while they are written. What is done once for
a path, locking it and clearing it of an earlier run, is done by the first of the processes that share it.
"""

import itertools
import math
import os
import re
import uuid

import numpy as np

from tools.trainer import chunks
from tools.trainer.cli import UserError
from tools.trainer.files import hold, list_folder, lock_for_good, remove, sync
from tools.trainer.processes import all_agree, exchange, from_rank0, gather, rank, world_size

OPTIMIZERS = {"adam": ("m", "v"), "adagrad": ("sum",)}  # what each keeps for a number, in the order of a stored row
GROWTH_ROWS = 1 << 16  # new rows that are made at a time
SCRATCH, PRESENT = ".deepfm-writing-", ".deepfm-process-"
COMPANIONS = {}  # {path: ranks}, see `companions`
CLAIMS = itertools.count()  # of this process, see `TableStore.claim`


def companions(path):
    """Ranks of the processes that share a path's disk, this one among them; all, unless `find_companions` found out."""
    return COMPANIONS.get(path) or list(range(world_size()))


def find_companions(path):
    """Find out which processes see the same folder: each leaves a mark in it and looks for the others'."""
    if world_size() == 1:
        return
    mark = os.path.join(path, f"{PRESENT}{from_rank0(lambda: uuid.uuid4().hex[:8])}-")

    def leave():
        os.makedirs(path, exist_ok=True)
        with open(f"{mark}{rank()}", "w"):
            pass

    all_agree(leave)
    COMPANIONS[path] = [process for process in range(world_size()) if os.path.exists(f"{mark}{process}")]
    gather(np.int64(0))  # all have looked
    os.remove(f"{mark}{rank()}")


def hold_paths(paths, held):
    """Lock the folders of a run's tables until `held` closes: one that is started too early would damage the first.

    All processes call it. Raises: UserError
    """
    for path in paths:
        find_companions(path)
        message = f"another run is training with the tables in {path}; wait for its end or stop it"
        all_agree(hold if companions(path)[0] == rank() else lambda *_: None, path, held, message)


class TableStore:
    """The record of one table: what the model and checkpoints call it, and its rows on disk.

    Attributes: name (of the module in the model), option (that names the path), path (of all processes' folders), dim
    (D, floats of a value), num_ids (rows of the table; the id num_ids is the padding row, which is not kept), optimizer
    (of OPTIMIZERS), size_factor (a stored row has so many times D floats), width (floats of a stored row).
    """

    def __init__(self, name, option, path, dim, num_ids, optimizer="adam"):
        self.name, self.option, self.path, self.dim, self.num_ids = name, option, path, dim, num_ids
        self.optimizer, self.size_factor = optimizer, 1 + len(OPTIMIZERS[optimizer])
        self.width = self.size_factor * dim
        self.known = {}  # {path: (bytes, CRC-32)} of what was written before

    def at(self, path, num_ids=None):
        """The same table at another place, or with another number of rows."""
        return TableStore(self.name, self.option, path, self.dim, num_ids or self.num_ids, self.optimizer)

    def folder(self, process, processes):
        """Where OneEmbedding keeps a process's rows (key_value_store_options.h): 3-8, but 03-16."""
        return os.path.join(self.path, f"{str(process).zfill(len(str(processes)))}-{processes}")

    def folders(self, processes):
        return [self.folder(process, processes) for process in range(processes)]

    def own_folder(self):
        return self.folder(rank(), world_size())

    def existing_folders(self):
        """Folders of this table, of any number of processes; others, "2024-01" say, are not ours to touch."""
        folders = [os.path.join(self.path, name) for name in sorted(list_folder(self.path))
                   if re.fullmatch(r"\d+-\d+", name)]
        return [folder for folder in folders
                if all(os.path.isfile(os.path.join(folder, name)) for name in chunks.MARKS)]

    def snapshots(self):
        """Names of all that this process sees."""
        return set().union(*map(chunks.snapshot_names, self.existing_folders()))

    def has_rows(self):
        return any(list_folder(os.path.join(folder, "keys")) for folder in self.existing_folders())

    # --- once for a path ----------------------------------------------------------------------------------------------

    def leads(self):
        """Whether this process is to do what is done once for a path."""
        return companions(self.path)[0] == rank()

    def remove_all(self):
        for folder in self.existing_folders():
            remove(folder)
        self.remove_scratch()

    def remove_scratch(self):
        """Delete what a killed run left behind."""
        for name in list_folder(self.path):
            if name.startswith((SCRATCH, PRESENT)):
                remove(os.path.join(self.path, name))

    # --- for OneEmbedding on CUDA -------------------------------------------------------------------------------------

    def claim(self):
        """Make the folders ready for OneEmbedding; returns a name that none of its tables in this process had before.

        All processes call it. Raises: UserError where OneEmbedding would abort.
        """
        all_agree(self.lock)
        return f"{self.name}_{next(CLAIMS)}"

    def lock(self):
        """Lock this process's folder as OneEmbedding does, until the process ends; one that is missing is made."""
        folder = self.own_folder()
        if not os.path.exists(folder):
            scratch = os.path.join(self.path, f"{SCRATCH}{rank()}")
            remove(scratch)
            chunks.make_empty_table(folder, self.width, scratch)
        chunks.check_folder(folder, self.width, self.dim)
        advice = f"give another --{self.option}, to which the rows are copied, or use --device cpu"
        try:
            lock_for_good(os.path.join(folder, "LOCK"))
        except BlockingIOError:
            raise UserError(f"another process has the table in {folder} open, and on CUDA only one can; wait for its "
                            f"end, {advice}") from None
        except OSError as error:
            raise UserError(f"{folder} cannot be opened for writing and locked ({error.strerror}), as OneEmbedding on "
                            f"CUDA does; {advice}") from None

    def cache_mb(self, capacity):
        """Megabytes of a GPU cache that has room for a process's share of `capacity` rows.

        OneEmbedding takes all of a cache's memory at once, and 9 bytes a row for key and age on top (lru_cache.cu). A
        row goes to one of the cache's sets of 32 by a hash; with half as much again, one in 1,000 finds its set full.
        """
        return math.ceil(1.5 * capacity / world_size() * 4 * self.width / 2**20)

    def sync(self):
        """Flush the rows that OneEmbedding wrote; not LOCK, where closing a descriptor would give its lock up."""
        for part in ("keys", "values", "snapshots"):
            sync(os.path.join(self.own_folder(), part))

    # --- writing ------------------------------------------------------------------------------------------------------

    def bytes_to_save(self):
        """What a snapshot of all rows takes on the disk of this process's path, for its companions too."""
        share = len(companions(self.path)) / world_size()
        return math.ceil(share * chunks.snapshot_bytes(self.num_ids, self.width))

    def write_snapshot(self, name, blocks):
        """Write rows as a snapshot; all processes call it, each with rows of its own.

        blocks: yields (keys int64 (n,), rows float32 (n, width)). Rows go to new chunk files in a scratch folder, which
        are then added to the process's folder: nothing is visible before all of it is on disk, and each snapshot has
        chunks of its own, so that deleting it gives the space back.
        """
        scratch, failure = os.path.join(self.path, f"{SCRATCH}{rank()}"), None

        def begin():
            remove(scratch)
            os.makedirs(scratch)

        all_agree(begin)
        writer = chunks.ChunkWriter(scratch, self.width)
        for keys, rows in dealt(blocks, self.width):
            try:
                if failure is None:
                    writer.write(keys, rows)
            except OSError as error:
                failure = error  # the others still wait for this process's rows
        all_agree(self.finish, name, writer, failure)

    def finish(self, name, writer, failure):
        """Add what was written to this process's folder, or give the space back."""
        folder = self.own_folder()
        try:
            if failure is not None:
                raise failure
            writer.close()
            if not os.path.exists(folder):
                chunks.make_empty_table(folder, self.width, os.path.join(writer.folder, "empty"))
            chunks.check_folder(folder, self.width, self.dim)
            self.known.update(chunks.add_snapshot(folder, name, writer))
        finally:
            writer.abandon()

    def write_checksums(self, name):
        """Write CHECKSUMS in this process's folder of a snapshot; returns its CRC-32."""
        return chunks.write_checksums(self.own_folder(), name, self.known)

    # --- reading ------------------------------------------------------------------------------------------------------

    def readers(self, name, processes):
        """Which process reads which folder of a snapshot that `processes` processes wrote.

        Returns ([rank of the reader of each folder], whether every process sees all folders). All processes call it.
        Raises: UserError where no process sees a folder.
        """
        lists = [os.path.join(folder, "snapshots", name, "LIST") for folder in self.folders(processes)]
        visible = gather(np.array([os.path.isfile(path) for path in lists], np.int64))  # (readers, folders)
        if not visible.any(axis=0).all():
            folder = self.folder(int(visible.any(axis=0).argmin()), processes)
            raise UserError(f"the table snapshot {name} is not in {folder}; give the --persistent_path and "
                            "--persistent_path_fm that the checkpoint was saved with")
        ranks = [process % world_size() for process in range(processes)]
        return [reader if visible[reader, process] else int(visible[:, process].argmax())
                for process, reader in enumerate(ranks)], bool(visible.all())

    def check_snapshot(self, name, processes, checksums=True):
        """Check every file that is opened of this process's share of the folders -> (rows, checksum or None)

        The checksum is the sum over the folders of the CRC-32 of CHECKSUMS, None where a folder has no such file (older
        versions wrote none) or it is not asked for.
        Raises: UserError when a folder or file is missing, short, damaged or of another row width.
        """
        readers, _ = self.readers(name, processes)
        mine = [folder for folder, reader in zip(self.folders(processes), readers) if reader == rank()]
        return all_agree(self.check_folders, mine, name, checksums)

    def check_folders(self, folders, name, checksums):
        rows = total = 0
        for folder in folders:
            path = os.path.join(folder, "snapshots", name)
            chunks.check_folder(folder, self.width, self.dim)
            rows += sum(chunks.count_chunk(folder, name, file, self.width) for file in chunks.listed(path))
            if checksums and total is not None and os.path.lexists(os.path.join(path, "CHECKSUMS")):
                total += chunks.check_files(folder, name)
            else:
                total = None
        return rows, total

    def read_snapshot(self, name, processes):
        """Yield (keys int64 (n,), rows float32 (n, width)) of a snapshot that `processes` processes wrote.

        Every process gets all rows; folders that not all of them see are read by one and come over the network.
        """
        readers, shared = self.readers(name, processes)
        folders = self.folders(processes)
        if shared:
            yield from self.rows_of(folders, name)
        else:
            mine = [folder for folder, reader in zip(folders, readers) if reader == rank()]
            yield from told(self.rows_of(mine, name), self.width)

    def rows_of(self, folders, name):
        """Rows of a snapshot in some folders, without the padding row, which a table trained on CUDA has too."""
        for folder in folders:
            for keys, rows in chunks.read_rows(folder, name, self.width):
                if keys.min() < 0 or keys.max() > self.num_ids or not np.isfinite(rows).all():
                    raise UserError(f"the table snapshot {name} in {folder} has an id that is not in the table, or "
                                    "numbers that are not finite; use another checkpoint")
                known = keys < self.num_ids
                yield keys[known], rows[known]

    # --- deleting -----------------------------------------------------------------------------------------------------

    def prune(self, unwanted, keep_last_chunk):
        """Delete the snapshots `unwanted` and the chunks that no snapshot needs any more.

        Each process cares for its own folder, the first one on a disk for those of other numbers of processes.
        keep_last_chunk: OneEmbedding on CUDA still appends to it, and needs the chunks of the last snapshot only.
        """
        others = set(self.existing_folders()) - set(self.folders(world_size())) if self.leads() else set()
        for folder in {self.own_folder()} & set(self.existing_folders()) | others:
            for path in chunks.remove_unneeded(folder, unwanted, keep_last_chunk):
                self.known.pop(path, None)


class Growth:
    """How the rows of a table move to the table of a dataset that grew.

    places: int64 (ids of the old table): the new id of each row. new_ids: int64 (m): ids that no row goes to; origins:
    int64 (m): the old row whose values they begin with; both are empty where they are to begin as in a new table.
    """

    def __init__(self, places, new_ids, origins):
        self.places, self.new_ids, self.origins = places, new_ids, origins

    def blocks(self, blocks, dim):
        """Yield (ids, rows) of the grown table for those of the old one; dim: floats of a value.

        The optimizer has kept nothing of new rows yet.
        """
        found = {}
        for keys, rows in blocks:
            for place in np.flatnonzero(np.isin(keys, self.origins)):
                found[int(keys[place])] = rows[place].copy()
            yield self.places[keys], rows
        for start in range(0, len(self.new_ids), GROWTH_ROWS):
            part = slice(start, start + GROWTH_ROWS)
            known = np.array([origin in found for origin in self.origins[part].tolist()], bool)
            origins = self.origins[part][known]
            if len(origins):
                rows = np.stack([found[origin] for origin in origins.tolist()])
                rows[:, dim:] = 0
                yield self.new_ids[part][known], rows


# ------------------------------------------------------------------------------------------------ rows over the network


def owners(keys, processes):
    """int64 (n,) -> number of the process that OneEmbedding keeps each id on (ShardingHash, hash_functions.cuh)."""
    def rotated(x, bits):
        return x << np.uint64(bits) | x >> np.uint64(64 - bits)

    prime = [np.uint64(number) for number in (0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9,
                                              0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5)]  # XXH64 of 8 bytes with seed 1
    hashed = rotated(keys.astype(np.uint64) * prime[1], 31) * prime[0] ^ (prime[4] + np.uint64(1 + 8))
    hashed = rotated(hashed, 27) * prime[0] + prime[3]
    for bits, factor in ((33, prime[1]), (29, prime[2]), (32, np.uint64(1))):
        hashed = (hashed ^ hashed >> np.uint64(bits)) * factor
    return (hashed % np.uint64(processes)).astype(np.int64)


def packed(keys, rows, size):
    """(n,), (n, width) -> int32 (size, 2 + width), bit for bit; behind the rows the key is -1."""
    parcel = np.full((size, 2 + rows.shape[1]), -1, np.int32)
    parcel[:len(keys), :2] = keys.astype(np.int64).view(np.int32).reshape(-1, 2)
    parcel[:len(keys), 2:] = np.ascontiguousarray(rows).view(np.int32)
    return parcel


def unpacked(parcels):
    parcels = parcels.reshape(-1, parcels.shape[-1])
    keys = np.ascontiguousarray(parcels[:, :2]).view(np.int64).ravel()
    return keys[keys >= 0], np.ascontiguousarray(parcels[keys >= 0, 2:]).view(np.float32)


def rounds(blocks, width):
    """Yield this process's blocks, then empty ones until no process has any more; all processes take part."""
    blocks = iter(blocks)
    while True:
        block = next(blocks, None)
        if not gather(np.int64(block is not None)).any():
            return
        yield block or (np.empty(0, np.int64), np.empty((0, width), np.float32))


def dealt(blocks, width):
    """Blocks of rows of any process -> blocks of those that belong into this process's folder."""
    processes = world_size()
    if processes == 1:
        yield from blocks
        return
    for keys, rows in rounds(blocks, width):
        places = owners(keys, processes)
        size = int(gather(np.bincount(places, minlength=processes)).max())
        if size:
            yield unpacked(exchange(np.stack([packed(keys[places == process], rows[places == process], size)
                                              for process in range(processes)])))


def told(blocks, width):
    """Blocks of each process -> the blocks of all, on every process."""
    for keys, rows in rounds(blocks, width):
        size = int(gather(np.int64(len(keys))).max())
        if size:
            yield unpacked(gather(packed(keys, rows, size)))
