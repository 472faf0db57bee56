"""Places: local paths, and URLs of any store that fsspec knows (s3://, gs://, hdfs://, memory://), used alike.

`as_place` makes a pathlib.Path of a path and a Remote of a URL, which has those methods of a Path that are used here.
fsspec's package for the store (s3fs, gcsfs, ...) is the user's to install; credentials and addresses are those that it
finds, in environment variables say.
"""

import errno
import functools
import io
import os
import re
import shutil
import stat
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import quote, unquote_to_bytes

from tools.trainer.cli import UserError, first_line

URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
READ_AHEAD = 1 << 22  # bytes of a remote file that are read at least


def as_place(path):
    """Path of a local path (also file://...), Remote of a URL; what is one of them stays what it is."""
    if isinstance(path, (Path, Remote)):
        return path
    text = os.fspath(path)
    scheme = URL.match(text)
    if not scheme:
        return Path(text)
    return Path(text[scheme.end():]) if scheme[1] == "file" else Remote(text)


def is_url(path):
    return isinstance(as_place(path), Remote)


def open_regular(path):
    """Open a file of any place to read bytes.

    Raises: OSError, also for a folder, and for a pipe or a device, which could keep its reader waiting.
    """
    path = as_place(path)
    if isinstance(path, Remote):
        return path.open("rb")
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return open(descriptor, "rb")  # noqa: SIM115 - for the caller to close


def arrow_file(path):
    """A file of any place for Arrow to read.

    Local ones are Arrow's own: its threads let go of a file a moment after a read has ended, and if that is one of
    Python's and Python has ended, the process aborts. Raises: OSError, see `open_regular`.
    """
    import pyarrow as pa

    path = as_place(path)
    if isinstance(path, Remote):
        return path.open("rb")
    with open_regular(path) as file:
        return pa.OSFile(f"/proc/self/fd/{file.fileno()}")  # Arrow takes no path with bytes that are not UTF-8


def parquet_file(path):
    """pyarrow's ParquetFile of a place."""
    import pyarrow.parquet as pq

    return pq.ParquetFile(arrow_file(path))


def copy(source, target):
    """Copy a file of any place to a local path."""
    with open_regular(source) as file, open(target, "wb") as local:
        shutil.copyfileobj(file, local, READ_AHEAD)


def as_name(path):
    """A place as a file:// URL of one name, from which `of_name` gets it back: for libraries that take URLs apart."""
    return "file:///" + quote(os.fsencode(str(as_place(path).absolute())), safe="")


@functools.lru_cache(maxsize=1 << 16)
def of_name(path):
    """The place of the path of such a URL."""
    return as_place(os.fsdecode(unquote_to_bytes(path.lstrip("/"))))


@contextmanager
def told(url):
    """Context manager: what a store's package raises becomes a UserError; a missing file stays a FileNotFoundError."""
    try:
        yield
    except FileNotFoundError:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), url) from None
    except (UserError, MemoryError):
        raise
    except ImportError as error:  # it names the package
        raise UserError(f"{url} cannot be used without another Python package ({first_line(error)})") from None
    except Exception as error:  # every package has its own classes
        raise UserError(f"{url} cannot be used ({type(error).__name__}: {first_line(error)}); check the address, the "
                        "network and your credentials") from None


@functools.lru_cache(maxsize=None)
def open_store(root, process):
    """fsspec's file system of scheme://host, for all threads of this process (fsspec itself makes one per thread)."""
    import fsspec

    return fsspec.core.url_to_fs(root)[0]


class Remote:
    """A file or folder of a store; methods are those of pathlib.Path. Raises: UserError, see `told`.

    known: what a listing of its folder said of it. What the store once said is not asked for again.
    """

    def __init__(self, url, known=None):
        self.url, self.known = url.rstrip("/"), known

    def __str__(self):
        return self.url

    def __eq__(self, other):
        return isinstance(other, Remote) and self.url == other.url

    def __hash__(self):
        return hash(self.url)

    def __truediv__(self, name):
        return Remote(f"{self.url}/{name}")

    @property
    def name(self):
        return self.url.rpartition("/")[2]

    @property
    def parent(self):
        return Remote(self.url.rpartition("/")[0])

    @property
    def parents(self):
        start = URL.match(self.url).end()
        return [Remote(self.url[:i]) for i in range(len(self.url) - 1, start, -1) if self.url[i] == "/"]

    def absolute(self):
        return self

    resolve = absolute

    def store(self):
        """(fsspec's file system, the path in it); use it within `told`."""
        host = self.url.find("/", URL.match(self.url).end())
        files = open_store(self.url[:host] if host > 0 else self.url, os.getpid())
        return files, files._strip_protocol(self.url)

    def info(self):
        """{"type": "file" or "directory", "size"}. Raises: FileNotFoundError"""
        if self.known is None:
            with told(self.url):
                files, path = self.store()
                self.known = files.info(path)
        return self.known

    def stat(self):
        """st_mode (regular file or folder) and st_size."""
        info = self.info()
        kind = stat.S_IFDIR if info["type"] == "directory" else stat.S_IFREG
        return SimpleNamespace(st_mode=kind, st_size=info["size"])

    def exists(self):
        return self._type() is not None

    def is_dir(self):
        return self._type() == "directory"

    def is_file(self):
        return self._type() == "file"

    def _type(self):
        try:
            return self.info()["type"]
        except FileNotFoundError:
            return None

    def iterdir(self):
        """What is in a folder, as it is now."""
        with told(self.url):
            files, path = self.store()
            files.invalidate_cache()
            entries = files.ls(path, detail=True)
        path = path.strip("/")
        # some stores have a file of the folder's own name, which stands for the folder
        entries = [entry for entry in entries if entry["name"].strip("/") != path]
        return [Remote(f"{self.url}/{entry['name'].rstrip('/').rpartition('/')[2]}", entry) for entry in entries]

    def files(self):
        """All files in a folder and those below it; none where there is no such folder."""
        with told(self.url):
            files, path = self.store()
            files.invalidate_cache()
            found = files.find(path)
        return [Remote(self.url + name[len(path):]) for name in found]

    def open(self, mode="rb"):
        """The file, for reading bytes."""
        return io.BufferedReader(RemoteFile(self), READ_AHEAD)

    def read_text(self, encoding):
        return self.read_bytes().decode(encoding)

    def read_bytes(self, start=None, end=None):
        with told(self.url):
            files, path = self.store()
            return files.cat_file(path, start=start, end=end)

    def write_bytes(self, data):
        with told(self.url):
            files, path = self.store()
            files.pipe_file(path, data)

    def upload(self, local):
        """Make it a copy of a local file."""
        with told(self.url):
            files, path = self.store()
            files.put_file(str(local), path)

    def unlink(self):
        with told(self.url):
            files, path = self.store()
            files.rm_file(path)


class RemoteFile(io.RawIOBase):
    """A remote file as bytes; every read is a request of its own, so put a buffer before it."""

    def __init__(self, remote):
        self.remote, self.size, self.position = remote, remote.stat().st_size, 0

    def readable(self):
        return True

    def seekable(self):
        return True

    def tell(self):
        return self.position

    def seek(self, offset, whence=io.SEEK_SET):
        self.position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.size}[whence]
        return self.position

    def readinto(self, buffer):
        end = min(self.size, self.position + len(buffer))
        if end <= self.position:
            return 0
        data = self.remote.read_bytes(self.position, end)
        buffer[:len(data)] = data
        self.position += len(data)
        return len(data)
