"""Output folders: made hidden, named when whole; locked against a second run; only what carries our mark is replaced.

While a run works, `.NAME.lock` lies beside the output and is locked (flock), and its files are in a hidden folder
`.NAME.partial-*` that holds a locked file `deepfm_scratch`. What a killed run has left can be told by the lock that
nobody holds, and is removed by the next run; a folder without that file is not ours and stays.

The stores behind URLs know neither renames nor locks. An output there is made on the local disk and uploaded when it
is whole: first the file `deepfm_scratch`, in whose presence all else in the folder is ours; then what was there before
goes, dataset_info.json before the rest; then the files come, dataset_info.json (or _dataset_info.json) last, and the
mark goes. So a folder with dataset_info.json holds a whole dataset at any time. What a killed run has left has none:
nobody takes it for a dataset, and the next run with --overwrite removes it. While the files are on their way there is
neither the old nor the new dataset. Two runs that write to one URL at the same time are not kept apart.
"""

import contextlib
import errno
import fcntl
import os
import shutil
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tools.trainer.cli import NO_SPACE, UserError, shorten
from tools.trainer.dataset_info import INFO, ROWS_INFO, SPLITS, read_info
from tools.trainer.files import umask
from tools.trainer.places import Remote, as_place

MARK = "deepfm_scratch"
CONTENTS = {"README.md", INFO, ROWS_INFO, *SPLITS, "vocabulary", MARK}
TRANSFERS = 8  # files that are uploaded or deleted at a time


def _shard(name):
    return name.startswith("part-") and name.endswith(".parquet")


def _locked(file):
    """Lock an open file; False when another process has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        if error.errno in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            return True  # a file system without locks
        raise


@contextlib.contextmanager
def output_lock(output):
    """Context manager: nobody else writes to the folder `output` (resolved path). Raises: UserError"""
    path = output.parent / f".{output.name}.lock"
    while True:
        file = open(path, "a")  # noqa: SIM115
        if not _locked(file):
            file.close()
            raise UserError(f"--output_dir {output} is being written by another run; wait for its end, or choose "
                            "another folder")
        try:
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                break
        except FileNotFoundError:
            pass
        file.close()  # its holder has just removed it
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
        file.close()


@contextlib.contextmanager
def published_folder(output_dir, inputs, overwrite=False, scratch_dir=None):
    """Context manager: a hidden local folder, which becomes output_dir on a normal exit and is removed on any other.

    Whatever ends the program, a local output_dir is either absent, the old dataset, or a complete new one; for URLs see
    the head of this file. A folder that is no dataset, or that holds one of the inputs, is never replaced.
    scratch_dir: folder for what is to be uploaded; default: the system's.
    """
    output = as_place(output_dir).resolve()  # a link stays, its target is replaced
    _check_place(output_dir, output, [as_place(path).resolve() for path in inputs])
    with _uploaded(output, overwrite, scratch_dir) if isinstance(output, Remote) else \
            _renamed(output_dir, output, overwrite) as folder:
        yield folder


@contextlib.contextmanager
def _renamed(output_dir, output, overwrite):
    """Context manager: a hidden folder beside a local output, which gets its name."""
    _make_parent("--output_dir", output_dir, output.parent)
    with output_lock(output):
        _remove_leftovers(output.parent, f".{output.name}.partial-", output)
        _check_replaced(output_dir, output, overwrite)
        with marked_folder("--output_dir", output_dir, output.parent, f".{output.name}.partial-") as partial:
            folder = partial / "dataset"
            folder.mkdir()
            yield folder
            _replace(folder, output, partial / "old")


def _replace(folder, output, old):
    """Give `folder` the name of `output`, and what has it now the name `old`."""
    try:
        if output.exists():
            output.rename(old)
        folder.rename(output)
    except BaseException:  # Ctrl-C between the two, say: `old` is about to be removed
        if old.exists() and not output.exists():
            old.rename(output)
        raise


def _check_place(output_dir, output, inputs):
    if any(output in [source, *source.parents] for source in inputs):
        raise UserError(f"--output_dir {output_dir} holds the input; choose another folder")
    if isinstance(output, Remote):
        return
    if output in [Path.cwd(), *Path.cwd().parents]:
        raise UserError(f"--output_dir {output_dir} holds the current folder; choose another folder")
    if os.path.ismount(output):
        raise UserError(f"--output_dir {output_dir} is a mount point, which cannot be replaced; choose a folder in it")


def _check_replaced(output_dir, output, overwrite):
    """Raise a UserError unless there is nothing at `output`, or a dataset that may go."""
    if not output.exists():
        return
    if not output.is_dir():
        raise UserError(f"--output_dir {output_dir} is a file, expected a folder; choose another name")
    names = {child.name for child in output.iterdir()}
    mark = next((name for name in (INFO, ROWS_INFO, MARK) if name in names), None)
    if not overwrite:
        what = "holds what a run has left that did not end" if mark == MARK else "exists already"
        raise UserError(f"--output_dir {output_dir} {what}; choose another folder or add --overwrite")
    if not names:
        return
    if mark is None:
        raise UserError(f"--output_dir {output_dir} is no dataset: it holds {shorten(sorted(names))} and no "
                        f"{INFO}, so --overwrite does not replace it; choose another folder")
    if mark != MARK:
        read_info(output, mark)
    strange = sorted(name for name in names - CONTENTS if not _shard(name))
    for split in names & set(SPLITS):
        strange += sorted(f"{split}/{child.name}" for child in (output / split).iterdir()
                          if not child.name.endswith(".parquet"))
    if strange:
        raise UserError(f"--output_dir {output_dir} holds {shorten(strange)} beside the dataset, so --overwrite does "
                        "not replace it; move that elsewhere, or choose another folder")


@contextlib.contextmanager
def _uploaded(output, overwrite, scratch_dir):
    """Context manager: a local folder in scratch_dir, or the system's, that is uploaded."""
    prefix = "deepfm-upload-"
    _check_replaced(output, output, overwrite)
    parent = local_folder(scratch_dir or tempfile.gettempdir())
    if parent.is_dir():
        _remove_leftovers(parent, prefix)
    with marked_folder("--spark_tmp_dir", parent, parent, prefix) as partial:
        folder = partial / "dataset"
        folder.mkdir()
        yield folder
        _upload(folder, output)


def _upload(folder, output):
    """Make the URL `output` a copy of a local folder; see the head of this file."""
    (output / MARK).write_bytes(b"A converter is writing here, or was ended while it wrote.\n")
    old = {path for path in output.files() if path != output / MARK}
    new = {output / path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    last = {output / name for name in (INFO, ROWS_INFO)}
    with ThreadPoolExecutor(TRANSFERS) as pool:
        for paths in (old & last, old - last):
            list(pool.map(Remote.unlink, paths))
        for paths in (new.keys() - last, new.keys() & last):
            list(pool.map(lambda path: path.upload(new[path]), paths))
    (output / MARK).unlink()


def local_folder(scratch_dir):
    """The folder for scratch files. Raises: UserError for a URL"""
    folder = as_place(scratch_dir).resolve()
    if isinstance(folder, Remote):
        raise UserError(f"--spark_tmp_dir {scratch_dir} is a URL, expected a folder; scratch files are local")
    return folder


def _make_parent(option, value, parent):
    try:
        parent.mkdir(parents=True, exist_ok=True)
        if not os.access(parent, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        if error.errno in NO_SPACE:
            raise
        raise UserError(f"{option} {value}: cannot make a folder in {parent} ({error.strerror}); "
                        "choose a folder that you may write to") from None


@contextlib.contextmanager
def marked_folder(option, value, parent, prefix):
    """Context manager: a fresh folder in parent with our mark, which is removed at the end, whatever that is."""
    _make_parent(option, value, parent)
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    try:
        folder.chmod(0o777 & ~umask())  # mkdtemp makes it private
        with open(folder / f".{MARK}", "w") as mark:
            _locked(mark)
            os.rename(mark.name, folder / MARK)  # now it is locked, so that no other run takes it for a leftover
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def scratch_folder(spark_tmp_dir, folder):
    """Context manager: a fresh scratch folder in spark_tmp_dir (made if missing), or beside the unpublished dataset."""
    parent = local_folder(spark_tmp_dir) if spark_tmp_dir else Path(folder).parent
    if spark_tmp_dir and parent.is_dir():
        _remove_leftovers(parent, "parquet-scratch-")
    with marked_folder("--spark_tmp_dir", spark_tmp_dir, parent, "parquet-scratch-") as scratch:
        yield scratch


def _remove_leftovers(parent, prefix, output=None):
    """Remove what killed runs have left; a dataset that was about to be replaced gets its name back."""
    for name in sorted(os.listdir(parent)):
        folder = parent / name
        if not (name.startswith(prefix) and os.path.isfile(folder / MARK) and os.access(folder / MARK, os.W_OK)):
            continue
        with open(folder / MARK, "a") as mark:
            if not _locked(mark):
                continue
            if output is not None and (folder / "old").exists() and not output.exists():
                (folder / "old").rename(output)
                print(f"note: a killed run had left the dataset of {output} in {folder}; it is back", file=sys.stderr)
            shutil.rmtree(folder, ignore_errors=True)
            print(f"note: removed {folder}, which a killed run had left", file=sys.stderr)
