"""Table rows on disk, in OneEmbedding's persistent-table format (oneflow/core/embedding/persistent_table.cpp).

PATH/<rank>-<world size>/ holds chunk files keys/key-*, values/value-* and snapshots/NAME/{LIST,index-*}. An index
entry is a row's position, counted over the chunks. A stored row is the value and behind it what the optimizer keeps,
[value | m | v] with Adam (see OPTIMIZERS), float32; the key is the id. Files only ever grow: what a snapshot needs of
them is their first bytes. Beside LIST lies CHECKSUMS, which is ours: a line "CRC-32 in hexadecimal, bytes, path" for
each file that the snapshot needs.
"""

import fcntl
import os
import re
import shutil
from contextlib import contextmanager, suppress

import numpy as np

from tools.trainer.cli import UserError
from tools.trainer.files import checksum, list_folder, rename_for_good, sync, sync_entry
from tools.trainer.processes import barrier, on_rank0, rank, world_size
from tools.trainer.startup import flow

OPTIMIZERS = {"adam": ("m", "v"), "adagrad": ("sum",)}  # what each keeps for a number, in the order of a stored row
BLOCK_SIZE = 4096  # bytes; named everywhere, because OneFlow's defaults differ by version
CHUNK_BYTES = 4 << 30  # of values, OneFlow's default
SIZE_FILES = ("KEY_SIZE", "VALUE_SIZE", "PHYSICAL_BLOCK_SIZE", "NUM_LOGICAL_BLOCKS_PER_CHUNK")
MARKS = (*SIZE_FILES, "LOCK")  # of a folder that OneEmbedding or this module made
MAX_CHUNKS = 1 << 20
GROWTH_ROWS = 1 << 16  # new rows that are made at a time
SCRATCH = ".deepfm-writing-"


class TableStore:
    """The record of one table: what the model and checkpoints call it, and its rows on disk.

    Attributes: name (of the module in the model), option (that names the path), path (of all processes' folders), dim
    (D, floats of a value), num_ids (rows of the table; the id num_ids is the padding row, which is not kept), optimizer
    (of OPTIMIZERS), size_factor (a stored row has so many times D floats).
    """

    def __init__(self, name, option, path, dim, num_ids, optimizer="adam"):
        self.name, self.option, self.path, self.dim, self.num_ids = name, option, path, dim, num_ids
        self.optimizer, self.size_factor = optimizer, 1 + len(OPTIMIZERS[optimizer])
        self.known = {}  # {path: (bytes, CRC-32)} of what was written before

    def at(self, path, num_ids=None):
        """The same table at another place, or with another number of rows."""
        return TableStore(self.name, self.option, path, self.dim, num_ids or self.num_ids, self.optimizer)

    def folder(self, process, processes):
        """Where OneEmbedding keeps a process's rows (key_value_store_options.h): 3-8, but 03-16."""
        return os.path.join(self.path, f"{str(process).zfill(len(str(processes)))}-{processes}")

    def folders(self, processes):
        return [self.folder(process, processes) for process in range(processes)]

    def existing_folders(self):
        """Folders of this table, of any number of processes; others, "2024-01" say, are not ours to touch."""
        folders = [os.path.join(self.path, name) for name in sorted(list_folder(self.path))
                   if re.fullmatch(r"\d+-\d+", name)]
        return [folder for folder in folders if all(os.path.isfile(os.path.join(folder, name)) for name in MARKS)]

    def snapshots(self):
        return {name for folder in self.existing_folders() for name in list_folder(os.path.join(folder, "snapshots"))
                if not name.startswith(".")}

    def has_rows(self):
        return any(list_folder(os.path.join(folder, "keys")) for folder in self.existing_folders())

    def remove_all(self):
        for folder in self.existing_folders():
            shutil.rmtree(folder)
        self.remove_scratch()

    def remove_scratch(self):
        """Delete what a killed save left behind."""
        for name in list_folder(self.path):
            if name.startswith(SCRATCH):
                shutil.rmtree(os.path.join(self.path, name))

    # --- writing ------------------------------------------------------------------------------------------------------

    def write_snapshot(self, name, blocks):
        """Write rows as a snapshot for the current number of processes; all processes call it, each with its own rows.

        blocks: yields (keys int64 (n,), rows float32 (n, size_factor * D)). Rows go to new chunk files in a scratch
        folder, which the first process then adds to the table: nothing is visible before all of it is on disk, and each
        snapshot has chunks of its own, so that deleting it gives the space back.
        """
        on_rank0(self.check_disk_space)
        processes = world_size()
        scratch = [os.path.join(self.path, f"{SCRATCH}{process}") for process in range(processes)]
        mine = scratch[rank()]
        shutil.rmtree(mine, ignore_errors=True)
        os.makedirs(mine)
        paths = [os.path.join(mine, f"{process}-{processes}") for process in range(processes)]
        writer = flow.one_embedding.make_persistent_table_writer(
            paths, name, flow.int64, flow.float, self.size_factor * self.dim, physical_block_size=BLOCK_SIZE)
        for keys, rows in blocks:
            writer.write(keys, rows)
        writer.close()
        sync(mine)
        barrier()  # every process has written its rows
        on_rank0(self.add_snapshot, name, scratch, processes)

    def check_disk_space(self):
        """For the whole table, since all processes may share the disk. OneFlow's writer aborts when it is full.

        Raises: UserError
        """
        row_bytes = 4 * self.size_factor * self.dim
        blocks = -(-self.num_ids // rows_per_block(row_bytes))
        needed = blocks * block_bytes(row_bytes) + 16 * self.num_ids  # 8 each for key and index
        free = shutil.disk_usage(self.path).free
        if free < needed:
            raise UserError(f"saving the table needs {needed / 2**20:.1f} MiB in {self.path}, but only "
                            f"{free / 2**20:.1f} MiB are free; free some space and continue with --resume")

    def add_snapshot(self, name, scratch, processes):
        for process, target in enumerate(self.folders(processes)):
            sources = [os.path.join(folder, f"{process}-{processes}") for folder in scratch]
            if not os.path.exists(target):
                make_empty_table(sources[0], target)
            staging = os.path.join(target, "snapshots", "." + name)
            shutil.rmtree(staging, ignore_errors=True)
            os.makedirs(staging)
            with open(os.path.join(staging, "LIST"), "w") as listing:
                for source in sources:
                    for index_file in move_chunks(source, target, name, staging):
                        listing.write(index_file + "\n")
            for folder in ("keys", "values"):
                sync_entry(os.path.join(target, folder))
            sync(staging)
            rename_for_good(staging, os.path.join(target, "snapshots", name))
        for folder in scratch:
            shutil.rmtree(folder)

    # --- reading ------------------------------------------------------------------------------------------------------

    def check_snapshot(self, name, processes, checksums=True):
        """Check every file that OneFlow will open of this process's share of the folders -> (rows, checksum or None)

        The checksum is the sum over the folders of the CRC-32 of CHECKSUMS, None where a folder has no such file (older
        versions wrote none) or it is not asked for.
        Raises: UserError when a folder or file is missing, short, damaged or of another row width.
        """
        rows = total = 0
        for process, folder in enumerate(self.folders(processes)):
            if process % world_size() != rank():
                continue
            path = os.path.join(folder, "snapshots", name)
            if not os.path.isfile(os.path.join(path, "LIST")):
                raise UserError(f"the table snapshot {name} is not in {folder}; give the --persistent_path and "
                                "--persistent_path_fm that the checkpoint was saved with")
            check_folder(folder, self.dim, self.size_factor)
            rows += sum(count_chunk(folder, name, index_file) for index_file in listed(path))
            if checksums and total is not None and os.path.exists(os.path.join(path, "CHECKSUMS")):
                total += check_files(folder, name)
            else:
                total = None
        return rows, total

    def write_checksums(self, name):
        """Write CHECKSUMS in this process's folder of a snapshot; returns its CRC-32.

        Bytes that an earlier snapshot needed too are not read again.
        """
        folder = self.folder(rank(), world_size())
        path = os.path.join(folder, "snapshots", name)
        lines = []
        for relative in snapshot_files(folder, name):
            file = os.path.join(folder, relative)
            size = os.path.getsize(file)
            before, value = self.known.get(file, (0, 0))
            value = checksum(file, size, *((before, value) if before <= size else (0, 0)))
            if not relative.startswith("snapshots"):
                self.known[file] = size, value
            lines.append(f"{value:08x} {size} {relative}\n")
        with open(os.path.join(path, "CHECKSUMS.tmp"), "w") as file:
            file.writelines(lines)
        sync_entry(os.path.join(path, "CHECKSUMS.tmp"))
        os.replace(os.path.join(path, "CHECKSUMS.tmp"), os.path.join(path, "CHECKSUMS"))
        sync_entry(path)
        return checksum(os.path.join(path, "CHECKSUMS"))

    def read_snapshot(self, name, processes):
        """Yield (keys int64 (n,), rows float32 (n, size_factor * D)) of a snapshot that `processes` processes wrote."""
        first, folders = rank() % processes, self.folders(processes)
        for folder in folders[first:] + folders[:first]:  # all processes read, each begins with another folder
            with alone_in(folder):
                reader = flow.one_embedding.make_persistent_table_reader(
                    [folder], name, flow.int64, flow.float, self.size_factor * self.dim, physical_block_size=BLOCK_SIZE)
                for keys, rows in reader:
                    if keys.min() < 0 or keys.max() > self.num_ids or not np.isfinite(rows).all():
                        raise UserError(f"the table snapshot {name} in {folder} has an id that is not in the table, or "
                                        "numbers that are not finite; use another checkpoint")
                    known = keys < self.num_ids  # a table trained on CUDA also has the padding row
                    yield keys[known], rows[known]
                reader.close()

    # --- deleting -----------------------------------------------------------------------------------------------------

    def prune(self, unwanted, keep_last_chunk):
        """Delete the snapshots `unwanted` and the chunks that no snapshot needs any more.

        Each process cares for its own folders. keep_last_chunk: OneEmbedding on CUDA still appends to it.
        """
        for folder in self.existing_folders():
            if int(os.path.basename(folder).split("-")[0]) % world_size() != rank():
                continue
            for name in unwanted:
                shutil.rmtree(os.path.join(folder, "snapshots", name), ignore_errors=True)
            needed = {chunk_of(name) for snapshot in list_folder(os.path.join(folder, "snapshots"))
                      for name in list_folder(os.path.join(folder, "snapshots", snapshot)) if name.startswith("index-")}
            chunks = chunk_numbers(folder)
            if keep_last_chunk and chunks:
                needed.add(max(chunks))
            for chunk in chunks - needed:
                for path in chunk_files(folder, chunk):
                    self.known.pop(path, None)
                    with suppress(FileNotFoundError):
                        os.remove(path)


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


# --------------------------------------------------------------------------------------------------- files of a folder


def chunk_files(folder, chunk):
    """Paths of a chunk's keys and values."""
    return [os.path.join(folder, f"{kind}s", f"{kind}-{chunk:012d}") for kind in ("key", "value")]


def chunk_of(index_file):
    """Number of the chunk that an index file or chunk file belongs to."""
    return int(index_file.rsplit("-", 1)[1])


def chunk_numbers(folder):
    return {chunk_of(name) for kind in ("key", "value") for name in list_folder(os.path.join(folder, f"{kind}s"))
            if re.fullmatch(rf"{kind}-\d{{12}}", name)}


def listed(path):
    """Names of the index files of a snapshot. Raises: UserError when LIST has anything else."""
    with open(os.path.join(path, "LIST"), "rb") as file:
        names = file.read().decode("ascii", "replace").splitlines()
    if not all(re.fullmatch(r"index-\d{12}", name) for name in names) or len(set(names)) < len(names):
        raise UserError(f"{path}/LIST is damaged; use another checkpoint")
    return names


def snapshot_files(folder, name):
    """Files that a snapshot needs, relative to the folder."""
    indexes = listed(os.path.join(folder, "snapshots", name))
    chunks = [os.path.relpath(path, folder) for index in indexes for path in chunk_files(folder, chunk_of(index))]
    inside = [os.path.join("snapshots", name, file) for file in ["LIST", *indexes]]
    return [*SIZE_FILES, *inside, *chunks]


def read_number(path):
    """The whole number in a file. Raises: UserError when it holds anything else."""
    try:
        with open(path, "rb") as file:
            return int(file.read(32))
    except (OSError, ValueError):
        raise UserError(f"{path} is missing or damaged; use another checkpoint") from None


def block_bytes(row_bytes):
    """A block holds whole rows only; a row longer than a block takes several."""
    return max(BLOCK_SIZE, -(-row_bytes // BLOCK_SIZE) * BLOCK_SIZE)


def rows_per_block(row_bytes):
    return block_bytes(row_bytes) // row_bytes


def rows_per_chunk(row_bytes):
    return CHUNK_BYTES // block_bytes(row_bytes) * rows_per_block(row_bytes)


def row_bytes_in(folder):
    return read_number(os.path.join(folder, "VALUE_SIZE"))


def check_folder(folder, dim, size_factor):
    """Check what OneFlow aborts on when it opens a table folder. Raises: UserError"""
    width = row_bytes_in(folder) // 4
    if width != size_factor * dim:
        raise UserError(f"{folder} holds rows of {width} floats, expected {size_factor} x {dim}; check "
                        "--embedding_vec_size, --optimizer and the order of --persistent_path and --persistent_path_fm")
    expected = (8, 4 * width, BLOCK_SIZE, CHUNK_BYTES // block_bytes(4 * width))
    for path, number in zip((os.path.join(folder, name) for name in SIZE_FILES), expected):
        if read_number(path) != number:
            raise UserError(f"{path} is {read_number(path)}, expected {number}; the table is damaged or of another "
                            "sort: use another checkpoint")
    chunks = [path for number in chunk_numbers(folder) for path in chunk_files(folder, number)]
    for path in [os.path.join(folder, "LOCK"), *filter(os.path.lexists, chunks)]:  # a kill may have left half a chunk
        if not os.path.isfile(path):
            raise UserError(f"{path} is missing or not a file; use another checkpoint")
    if max(chunk_numbers(folder), default=0) > MAX_CHUNKS:
        raise UserError(f"{folder}/values has a chunk number above {MAX_CHUNKS}; use another checkpoint")


def check_files(folder, name):
    """Compare the files of a snapshot with its CHECKSUMS; returns the CRC-32 of that file. Raises: UserError"""
    path = os.path.join(folder, "snapshots", name, "CHECKSUMS")
    try:
        with open(path, encoding="ascii") as file:
            lines = [line.split(" ", 2) for line in file.read().splitlines()]
        found = {relative: (int(size), int(value, 16)) for value, size, relative in lines}
        if set(found) != set(snapshot_files(folder, name)):
            raise ValueError
    except (OSError, ValueError):
        raise UserError(f"{path} is damaged; use another checkpoint") from None
    for relative, (size, value) in found.items():
        file = os.path.join(folder, relative)
        try:
            same = checksum(file, size) == value
        except (OSError, EOFError):
            same = False
        if not same:
            raise UserError(f"{file} was changed or damaged since the checkpoint was saved; use another checkpoint")
    return checksum(path)


def count_chunk(folder, name, index_file):
    """Rows of a snapshot in one chunk. Raises: UserError when one of its files is missing, short or inconsistent."""
    chunk, row_bytes = chunk_of(index_file), row_bytes_in(folder)
    broken = UserError(f"chunk {chunk} of the table snapshot {name} in {folder} is missing or incomplete; "
                       "use another checkpoint")
    index_path = os.path.join(folder, "snapshots", name, index_file)
    try:
        index_bytes, key_bytes, value_bytes = map(os.path.getsize, [index_path, *chunk_files(folder, chunk)])
        positions = np.fromfile(index_path, np.uint64)
    except OSError:
        raise broken from None
    if index_bytes == 0 or index_bytes % 8:
        raise broken
    size = rows_per_chunk(row_bytes)
    first, last = int(positions.min()) - chunk * size, int(positions.max()) - chunk * size
    needed = (last // rows_per_block(row_bytes) + 1) * block_bytes(row_bytes)
    if first < 0 or last >= size or key_bytes < (last + 1) * 8 or value_bytes < needed:
        raise broken
    return len(positions)


def make_empty_table(source, target):
    """A table without rows in `target`, of the same sizes as the one in `source`."""
    staging = source + ".empty"
    for name in ("keys", "values", "snapshots"):
        os.makedirs(os.path.join(staging, name))
    for name in MARKS:
        shutil.copyfile(os.path.join(source, name), os.path.join(staging, name))
    sync(staging)
    rename_for_good(staging, target)  # fails if there is a folder with other files


def move_chunks(source, target, name, staging):
    """Give the source's chunks new numbers behind the target's; yield the new index files of the snapshot."""
    size = rows_per_chunk(row_bytes_in(target))
    new = max(chunk_numbers(target), default=-1) + 1
    for old in sorted(chunk_numbers(source)):
        for old_path, new_path in zip(chunk_files(source, old), chunk_files(target, new)):
            os.rename(old_path, new_path)
        index_file = os.path.join(source, "snapshots", name, f"index-{old:012d}")
        if os.path.exists(index_file):
            positions = np.fromfile(index_file, np.uint64) + np.uint64((new - old) * size)
            positions.tofile(os.path.join(staging, f"index-{new:012d}"))
            yield f"index-{new:012d}"
        new += 1


@contextmanager
def alone_in(folder):
    """Wait for the other processes that are in the folder: OneFlow 0.8.0 aborts when two open a table to read."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a network file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
