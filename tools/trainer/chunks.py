"""Files of one folder of OneEmbedding's persistent-table format (oneflow/core/embedding/persistent_table.cpp).

FOLDER/ holds chunk files keys/key-*, values/value-* and snapshots/NAME/{LIST,index-*}. An index entry is a row's
position, counted over the chunks. A stored row is float32; the key is the id. Files only ever grow: what a snapshot
needs of them is their first bytes. Beside LIST lies CHECKSUMS, which is ours: a line "CRC-32 in hexadecimal, bytes,
path" for each file that the snapshot needs.

OneFlow has a writer and a reader of its own, which on CUDA is the table itself. A full disk or a damaged file ends them
with a signal that no program survives, and the writer keeps every key in memory; here it is an OSError or UserError.
`width` below: floats of a stored row.
"""

import os
import re
import zlib

import numpy as np

from tools.trainer.cli import UserError
from tools.trainer.files import checksum, list_folder, remove, rename_for_good, sync, sync_entry
from tools.trainer.places import open_regular

BLOCK_SIZE = 4096  # bytes; named everywhere, because OneFlow's defaults differ by version
CHUNK_BYTES = 4 << 30  # of values, OneFlow's default
READ_BYTES = 64 << 20  # of values at a time
SIZE_FILES = ("KEY_SIZE", "VALUE_SIZE", "PHYSICAL_BLOCK_SIZE", "NUM_LOGICAL_BLOCKS_PER_CHUNK")
MARKS = (*SIZE_FILES, "LOCK")  # of a folder that OneEmbedding or this module made
MAX_CHUNKS = 1 << 20


# --------------------------------------------------------------------------------------------------- sizes and names


def block_bytes(width):
    """A block holds whole rows only; a row longer than a block takes several."""
    return max(BLOCK_SIZE, -(-4 * width // BLOCK_SIZE) * BLOCK_SIZE)


def rows_per_block(width):
    return block_bytes(width) // (4 * width)


def rows_per_chunk(width):
    return CHUNK_BYTES // block_bytes(width) * rows_per_block(width)


def snapshot_bytes(rows, width):
    """What a snapshot of so many rows takes on disk: values, and 8 bytes each for key and position."""
    return -(-rows // rows_per_block(width)) * block_bytes(width) + 16 * rows


def sizes_of(width):
    """{name of a size file: the number in it}"""
    return dict(zip(SIZE_FILES, (8, 4 * width, BLOCK_SIZE, CHUNK_BYTES // block_bytes(width))))


def chunk_files(folder, chunk):
    """Paths of a chunk's keys and values."""
    return [os.path.join(folder, f"{kind}s", f"{kind}-{chunk:012d}") for kind in ("key", "value")]


def chunk_of(index_file):
    """Number of the chunk that an index file or chunk file belongs to."""
    return int(index_file.rsplit("-", 1)[1])


def chunk_numbers(folder):
    return {chunk_of(name) for kind in ("key", "value") for name in list_folder(os.path.join(folder, f"{kind}s"))
            if re.fullmatch(rf"{kind}-\d{{12}}", name)}


def snapshot_names(folder):
    path = os.path.join(folder, "snapshots")
    return {name for name in list_folder(path) if name[0] != "." and os.path.isdir(os.path.join(path, name))}


# ------------------------------------------------------------------------------------------------------------- writing


class ChunkWriter:
    """Writes rows to new chunk files in a folder of its own, in whole blocks.

    Attributes: counts: rows of each chunk; sums: [(bytes, CRC-32) of the keys, of the values] of each chunk.
    """

    def __init__(self, folder, width):
        self.folder, self.width = folder, width
        self.counts, self.sums, self.files = [], [], []
        self.keys, self.rows = np.empty(0, np.int64), np.empty((0, width), np.float32)  # less than a block

    def write(self, keys, rows):
        """keys int64 (n,), rows float32 (n, width)"""
        keys, rows = np.concatenate([self.keys, keys]), np.concatenate([self.rows, rows])
        whole = len(keys) // rows_per_block(self.width) * rows_per_block(self.width)
        self.keys, self.rows = keys[whole:], rows[whole:]
        self.put(keys[:whole], rows[:whole])

    def put(self, keys, rows):
        size = rows_per_chunk(self.width)
        while len(keys):
            if not self.counts or self.counts[-1] == size:
                self.begin_chunk()
            count = min(len(keys), size - self.counts[-1])
            blocks = as_blocks(rows[:count], self.width)
            padded = np.zeros(len(blocks) * rows_per_block(self.width), np.int64)
            padded[:count] = keys[:count]
            for kind, data in enumerate((padded, blocks)):
                write_all(self.files[kind], data)
                length, value = self.sums[-1][kind]
                self.sums[-1][kind] = length + data.nbytes, zlib.crc32(data, value)
            self.counts[-1] += count
            keys, rows = keys[count:], rows[count:]

    def begin_chunk(self):
        self.end_chunk()
        self.files = [open(os.path.join(self.folder, f"{kind}-{len(self.counts)}"), "wb", buffering=0)  # noqa: SIM115
                      for kind in ("key", "value")]
        self.counts.append(0)
        self.sums.append([(0, 0), (0, 0)])

    def end_chunk(self):
        for file in self.files:
            os.fsync(file.fileno())
            file.close()
        self.files = []

    def close(self):
        self.put(self.keys, self.rows)
        self.end_chunk()

    def abandon(self):
        """Give the space back after a failure."""
        for file in self.files:
            file.close()
        remove(self.folder)


def write_all(file, data):
    """Write an array to an unbuffered file, which may take a part at a time."""
    rest = memoryview(data).cast("B")
    while rest:
        rest = rest[file.write(rest):]


def as_blocks(rows, width):
    """float32 (n, width) -> bytes uint8 (blocks, bytes of a block); the rest of a block is 0."""
    per_block = rows_per_block(width)
    blocks = np.zeros((-(-len(rows) // per_block), block_bytes(width)), np.uint8)
    data = np.ascontiguousarray(rows).view(np.uint8).reshape(len(rows), 4 * width)
    whole = len(rows) // per_block
    blocks[:whole, :per_block * 4 * width] = data[:whole * per_block].reshape(whole, per_block * 4 * width)
    rest = data[whole * per_block:].ravel()
    blocks[whole:, :len(rest)] = rest
    return blocks


def make_empty_table(target, width, staging):
    """A folder without rows, made under the name `staging` first."""
    for name in ("keys", "values", "snapshots"):
        os.makedirs(os.path.join(staging, name))
    for name, number in sizes_of(width).items():
        with open(os.path.join(staging, name), "w") as file:
            file.write(f"{number}\n")
    with open(os.path.join(staging, "LOCK"), "w"):
        pass  # OneFlow locks it
    sync(staging)
    rename_for_good(staging, target)  # fails if there is a folder with other files


def add_snapshot(folder, name, writer):
    """Give written chunks new numbers behind the folder's, and a snapshot of them its name; nothing shows before.

    Returns {path: (bytes, CRC-32)} of the chunk files.
    """
    staging, known = os.path.join(folder, "snapshots", "." + name), {}
    remove(staging)
    os.makedirs(staging)
    first = max(chunk_numbers(folder), default=-1) + 1
    for number, (count, sums) in enumerate(zip(writer.counts, writer.sums)):
        chunk = first + number
        for kind, path, known_sum in zip(("key", "value"), chunk_files(folder, chunk), sums):
            os.rename(os.path.join(writer.folder, f"{kind}-{number}"), path)
            known[path] = known_sum
        start = chunk * rows_per_chunk(writer.width)
        np.arange(start, start + count, dtype=np.uint64).tofile(os.path.join(staging, f"index-{chunk:012d}"))
    with open(os.path.join(staging, "LIST"), "w") as listing:
        listing.writelines(f"index-{first + number:012d}\n" for number in range(len(writer.counts)))
    for part in ("keys", "values"):
        sync_entry(os.path.join(folder, part))
    sync(staging)
    final = os.path.join(folder, "snapshots", name)
    remove(final)  # of a save that a kill interrupted
    rename_for_good(staging, final)
    return known


def write_checksums(folder, name, known):
    """Write CHECKSUMS of a snapshot in a folder; returns its CRC-32.

    known: {path: (bytes, CRC-32)} of what was read or written before, which grows; those bytes are not read again.
    """
    path, lines = os.path.join(folder, "snapshots", name), []
    for relative in snapshot_files(folder, name):
        file = os.path.join(folder, relative)
        size = os.path.getsize(file)
        before, value = known.get(file, (0, 0))
        value = checksum(file, size, *((before, value) if before <= size else (0, 0)))
        if not relative.startswith("snapshots"):
            known[file] = size, value
        lines.append(f"{value:08x} {size} {relative}\n")
    with open(os.path.join(path, "CHECKSUMS.tmp"), "w") as file:
        file.writelines(lines)
    sync_entry(os.path.join(path, "CHECKSUMS.tmp"))
    os.replace(os.path.join(path, "CHECKSUMS.tmp"), os.path.join(path, "CHECKSUMS"))
    sync_entry(path)
    return checksum(os.path.join(path, "CHECKSUMS"))


def remove_unneeded(folder, unwanted, keep_last_chunk):
    """Delete the snapshots `unwanted` and the chunks that no snapshot needs any more; returns the paths of these.

    keep_last_chunk: OneEmbedding on CUDA has the files open; it appends to the last chunk and reads those of its rows.
    """
    for name in unwanted:
        remove(os.path.join(folder, "snapshots", name))
    needed = {chunk_of(name) for snapshot in list_folder(os.path.join(folder, "snapshots"))
              for name in list_folder(os.path.join(folder, "snapshots", snapshot)) if INDEX.fullmatch(name)}
    chunks = chunk_numbers(folder)
    if keep_last_chunk and chunks:
        needed.add(max(chunks))
    paths = [path for chunk in chunks - needed for path in chunk_files(folder, chunk) if os.path.lexists(path)]
    for path in paths:
        if keep_last_chunk and not os.path.islink(path) and os.stat(path).st_nlink == 1:
            os.truncate(path, 0)  # an open file would keep its space until the process ends
        remove(path)
    return paths


# ------------------------------------------------------------------------------------------------------------- reading


INDEX = re.compile(r"index-\d{12}")


def listed(path):
    """Names of the index files of a snapshot. Raises: UserError when LIST has anything else."""
    try:
        with open_regular(os.path.join(path, "LIST")) as file:
            names = file.read().decode("ascii", "replace").splitlines()
    except OSError:
        names = [""]
    if not all(INDEX.fullmatch(name) for name in names) or len(set(names)) < len(names):
        raise UserError(f"{path}/LIST is missing or damaged; use another checkpoint")
    return names


def snapshot_files(folder, name):
    """Files that a snapshot needs, relative to the folder."""
    indexes = listed(os.path.join(folder, "snapshots", name))
    chunks = [os.path.relpath(path, folder) for index in indexes for path in chunk_files(folder, chunk_of(index))]
    inside = [os.path.join("snapshots", name, file) for file in ["LIST", *indexes]]
    return [*SIZE_FILES, *inside, *chunks]


def read_rows(folder, name, width):
    """Yield (keys int64 (n,), rows float32 (n, width)) of a snapshot, in the order in which they lie on disk."""
    per_block, size = rows_per_block(width), block_bytes(width)
    step = max(1, READ_BYTES // size)  # blocks
    for index_file in listed(os.path.join(folder, "snapshots", name)):
        chunk = chunk_of(index_file)
        positions = read_index(os.path.join(folder, "snapshots", name, index_file), chunk, width)
        key_file, value_file = chunk_files(folder, chunk)
        for first in range(positions[0] // per_block, positions[-1] // per_block + 1, step):
            low, high = np.searchsorted(positions, [first * per_block, (first + step) * per_block])
            if low == high:
                continue
            inside = positions[low:high] - first * per_block
            keys = read_array(key_file, np.int64, first * per_block, int(inside[-1]) + 1)
            count = int(inside[-1]) // per_block + 1
            blocks = read_array(value_file, np.uint8, first * size, count * size).reshape(count, size)
            rows = np.ascontiguousarray(blocks[:, :per_block * 4 * width]).view(np.float32).reshape(-1, width)
            yield keys[inside], rows[inside]


def read_index(path, chunk, width):
    """Positions int64 (n,) within the chunk, ascending. Raises: ValueError when one is outside of it, or none is."""
    positions = read_array(path, np.uint64) - np.uint64(chunk * rows_per_chunk(width))
    positions.sort()
    if len(positions) == 0 or positions[-1] >= rows_per_chunk(width):
        raise ValueError(f"{path} has no positions, or one outside of its chunk")
    return positions.astype(np.int64)


def read_array(path, kind, start=0, count=None):
    """Numbers [start, start + count), None: all, of a file of nothing but numbers. Raises: OSError when it is short."""
    size = np.dtype(kind).itemsize
    with open_regular(path) as file:
        if count is None:
            count, rest = divmod(os.fstat(file.fileno()).st_size, size)
            if rest:
                raise OSError(f"{path} ends within a number")
        file.seek(start * size)
        array = np.fromfile(file, kind, count)
    if len(array) < count:
        raise OSError(f"{path} is shorter than {(start + count) * size} bytes")
    return array


# ------------------------------------------------------------------------------------------------------------ checking


def read_number(path):
    """The whole number in a file. Raises: UserError when it holds anything else."""
    try:
        with open_regular(path) as file:
            return int(file.read(32))
    except (OSError, ValueError):
        raise UserError(f"{path} is missing or damaged; use another checkpoint") from None


def check_folder(folder, width, dim):
    """Check what OneFlow aborts on when it opens a table folder of D = dim. Raises: UserError"""
    found = read_number(os.path.join(folder, "VALUE_SIZE"))
    if found != 4 * width:
        raise UserError(f"{folder} holds rows of {found // 4} floats, expected {width // dim} x {dim}; check "
                        "--embedding_vec_size, --optimizer and the order of --persistent_path and --persistent_path_fm")
    for name, number in sizes_of(width).items():
        found = read_number(os.path.join(folder, name))
        if found != number:
            raise UserError(f"{folder}/{name} is {found}, expected {number}; the table is damaged or of another "
                            "sort: use another checkpoint")
    for name in ("keys", "values", "snapshots"):
        if not os.path.isdir(os.path.join(folder, name)):
            raise UserError(f"{folder}/{name} is missing or not a folder; use another checkpoint")
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
        with open_regular(path) as file:
            lines = [line.split(" ", 2) for line in file.read().decode("ascii").splitlines()]
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


def count_chunk(folder, name, index_file, width):
    """Rows of a snapshot in one chunk. Raises: UserError when one of its files is missing, short or inconsistent."""
    chunk = chunk_of(index_file)
    try:
        key_bytes, value_bytes = (os.path.getsize(path) for path in chunk_files(folder, chunk))
        positions = read_index(os.path.join(folder, "snapshots", name, index_file), chunk, width)
    except (OSError, ValueError):
        positions = None
    if positions is None or key_bytes < (positions[-1] + 1) * 8 or (
            value_bytes < (positions[-1] // rows_per_block(width) + 1) * block_bytes(width)):
        raise UserError(f"chunk {chunk} of the table snapshot {name} in {folder} is missing or incomplete; "
                        "use another checkpoint")
    return len(positions)
