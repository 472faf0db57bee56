"""Files that survive a kill or a power cut, are checked when they are read back, and belong to one run at a time."""

import fcntl
import json
import os
import shutil
import stat
import tempfile
import zlib
from contextlib import contextmanager, suppress

from tools.trainer.cli import UserError, brief, first_line
from tools.trainer.places import open_regular

READ_BYTES = 1 << 22
UNFINISHED = set()  # paths of files that are removed if a signal ends the process


def list_folder(path):
    """Names in a folder; none when there is no such folder."""
    return os.listdir(path) if os.path.isdir(path) else []


# ------------------------------------------------------------------------------------------------------------- writing


def write_json(path, value):
    """Replace a JSON file: its name stands for the old or the new content, whole."""
    with open(path + ".tmp", "w", encoding="utf-8") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(path + ".tmp", path)
    sync_entry(os.path.dirname(os.path.abspath(path)))


@contextmanager
def replaced_file(path):
    """Context manager: path of a new file beside `path`, which gets its name on a normal exit and goes on any other.

    No other process writes to it. The folder is made where it is missing.
    """
    folder, name = os.path.split(os.path.abspath(path))
    os.makedirs(folder, exist_ok=True)
    descriptor, part = tempfile.mkstemp(".part", f".{name[:40]}.", folder)
    UNFINISHED.add(part)
    try:
        os.fchmod(descriptor, 0o666 & ~umask())  # mkstemp makes it private
        os.close(descriptor)
        yield part
        os.replace(part, path)
    finally:
        with suppress(OSError):
            os.remove(part)
        UNFINISHED.discard(part)


def umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def sync(folder):
    """Flush a folder with all that is in it to disk."""
    for root, _, files in os.walk(folder):
        for name in [*files, ""]:
            sync_entry(os.path.join(root, name))


def sync_entry(path):
    """Flush a file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if not stat.S_ISFIFO(os.fstat(descriptor).st_mode):
        os.fsync(descriptor)
    os.close(descriptor)


def remove(path):
    """Delete a folder with all that is in it, or a file, of ours; nothing is there afterwards.

    shutil.rmtree alone waits for ever at a pipe.
    """
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    elif os.path.lexists(path):
        os.unlink(path)


def rename_for_good(staging, final):
    """Give a folder that `sync` flushed its name; from here on it survives a power cut."""
    os.rename(staging, final)
    sync_entry(os.path.dirname(final))


# ------------------------------------------------------------------------------------------------------------- reading


def read_json(path, schema, advice):
    """The content of a JSON file (a path or a place) that fits a schema, see `check_json`.

    Raises: UserError "PATH is ...; ADVICE" when it cannot be read or does not fit.
    """
    try:
        with open_regular(path) as file:
            value = json.loads(file.read().decode("utf-8"))
        check_json(value, schema)
        return value
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
        raise UserError(f"{path} cannot be used ({reason}); {advice}") from None


def check_json(value, schema, where="it"):
    """Raise a ValueError unless the value fits.

    A schema is a type (a whole number also fits float; True and False fit bool only), None, a tuple of alternatives, a
    list of one schema for all items, a function that returns whether a value fits, or a dict of schemas by key. A key
    that ends in "?" may be absent, "*" stands for all others; keys that the schema does not know are left alone.
    """
    if isinstance(schema, tuple):
        if not any(fits(value, option) for option in schema):
            raise ValueError(f"{where} is {brief(repr(value))}")
    elif isinstance(schema, dict):
        if not isinstance(value, dict):
            raise ValueError(f"{where} is {brief(repr(value))}, expected an object")
        for key, part in schema.items():
            names = [key.rstrip("?")] if key != "*" else [name for name in value if name not in schema]
            for name in names:
                if name in value:
                    check_json(value[name], part, f"{where}, {name}" if where != "it" else name)
                elif not key.endswith("?"):
                    raise ValueError(f"{where} lacks {name}")
    elif isinstance(schema, list):
        if not isinstance(value, list):
            raise ValueError(f"{where} is {brief(repr(value))}, expected a list")
        for item in value:
            check_json(item, schema[0], where)
    elif not fits(value, schema):
        raise ValueError(f"{where} is {brief(repr(value))}")


def fits(value, schema):
    """Whether a value fits a schema that is a type, None or a function, or any other by `check_json`."""
    if schema is None:
        return value is None
    if isinstance(schema, type):
        kinds = (int, float) if schema is float else (schema,)
        return isinstance(value, kinds) and (schema is bool or not isinstance(value, bool))
    if callable(schema):
        return bool(schema(value))
    try:
        check_json(value, schema)
    except ValueError:
        return False
    return True


def count(value):
    """A schema: a whole number from 0 to 2^60."""
    return type(value) is int and 0 <= value <= 2**60


# ----------------------------------------------------------------------------------------------------------- checksums


def checksum(path, size=None, start=0, value=0):
    """CRC-32 of the bytes [start, size) of a file, continuing `value`; size: None for all of it.

    Raises: EOFError when the file is shorter.
    """
    with open_regular(path) as file:
        size = file.seek(0, os.SEEK_END) if size is None else size
        file.seek(start)
        while start < size:
            data = file.read(min(READ_BYTES, size - start))
            if not data:
                raise EOFError(f"{path} is shorter than {size} bytes")
            value = zlib.crc32(data, value)
            start += len(data)
    return value


# --------------------------------------------------------------------------------------------------------------- locks


def hold(folder, held, message):
    """Lock a folder, which is made if missing, until `held` (an ExitStack) closes.

    Raises: UserError with the message when another process holds it.
    """
    os.makedirs(folder, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    held.callback(os.close, descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(message) from None
    except OSError:
        pass  # a network file system without locks


def lock_for_good(path):
    """Lock a file as OneFlow does, with fcntl, until the process ends; not against this process.

    Raises: BlockingIOError when another process has locked it; any other OSError when that cannot be.
    """
    descriptor = os.open(path, os.O_RDWR)  # stays open: closing any one gives up all locks of the process on the file
    fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
