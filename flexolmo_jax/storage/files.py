"""Writing files and directories that are either whole or not there: on this machine, and in buckets, where nothing can be renamed.

A directory on this machine is written beside its place, synced, and renamed. One in a bucket is written in its place, with a mark in it
that is there before everything else and goes last: what has the mark is not there yet, for whoever asks `is_whole`.
"""

import contextlib
import errno
import fcntl
import glob
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from flexolmo_jax.errors import UserError
from flexolmo_jax.storage.paths import absolute, children, copy_objects, in_bucket, join_objects, listing, reason, remove_objects

WAYS = ("link", "reflink", "copy")  # to have a file's bytes in a second place, the cheapest first
UNFINISHED = ".unfinished"  # the mark
GRACE = 3600.0  # seconds without a change after which nobody is taken to be writing something in a bucket, which has no locks
_CLONE = 0x40049409  # Linux's FICLONE
_NOT_HERE = (errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL, errno.ENOSYS)


observer: Callable[[str, Path], None] | None = None  # told of every change to come; tests fail or die there


def before_change(operation: str, path: Path) -> None:
    """Called before every write, link, sync, rename and removal of what must be whole or not there."""
    if observer is not None:
        observer(operation, path)


@contextmanager
def new_directory(out: Path, *, shared: bool = False) -> Iterator[Path]:
    """Yields a temporary directory that is `out` at the end, or vanishes with any error.

    What a killed process leaves of it is found by `abandoned`. `shared`: all who write it write the same, and may do so at once.
    Raises UserError where `out` holds something already, cannot be made, and for a full disk.
    """
    out = absolute(out)
    check_new(out)
    if in_bucket(out):
        with _marked(out, shared):
            yield out
        return
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = out.with_name(f".{out.name}.{uuid.uuid4().hex[:8]}.tmp")
        temporary.mkdir()
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}; choose a place that can be written") from error
    try:
        with locked(temporary):
            yield temporary
            for folder, _, files in os.walk(temporary, topdown=False):
                for name in files:
                    sync(Path(folder, name))
                sync(Path(folder))
            check_new(out)
            if out.exists():
                out.rmdir()
            before_change("rename", out)
            os.replace(temporary, out)
            try:
                sync(out.parent)
            except OSError:
                os.replace(out, temporary)
                raise
    except Exception as error:
        if is_disk_full(error):
            raise UserError(f"no space left on the disk while writing {out}; nothing was kept; free some and run it again") from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _marked(out: Path, shared: bool) -> Iterator[None]:
    if not shared:
        _clear(out)  # of what a killed process left
    _put(out / UNFINISHED, b"")
    try:
        yield
    except BaseException:
        if not shared:
            remove(out)
        raise
    before_change("rename", out)
    (out / UNFINISHED).unlink(missing_ok=True)


def _clear(directory: Path) -> None:
    """Removes all objects there, the mark last."""
    names = listing(directory).keys()
    remove_objects([directory / name for name in names if name != UNFINISHED])
    if UNFINISHED in names:
        (directory / UNFINISHED).unlink()


def is_whole(directory: Path) -> bool:
    """Whether a directory that `new_directory` makes is there."""
    return directory.exists() and not (in_bucket(directory) and (directory / UNFINISHED).exists())


def is_settled(directory: Path) -> bool:
    """Whether nobody can be at work on what lies there, as far as a bucket lets one know."""
    return not in_bucket(directory) or max((f.modified for f in listing(directory).values()), default=0.0) < time.time() - GRACE


def clear(out: Path) -> None:
    """Removes what killed processes left on the way to `out`."""
    for path in abandoned(out.parent, out.name):
        remove(path)


def abandoned(directory: Path, name: str | None = None) -> list[Path]:
    """What processes that are no longer there left in a directory, on the way to `name` or anything."""
    if in_bucket(directory):
        places = [directory / name] if name else children(directory)
        return [path for path in places if (path / UNFINISHED).exists() and is_settled(path)]
    found = []
    for path in directory.glob(f".{glob.escape(name) if name else '*'}.*.tmp"):
        try:
            with locked(path, wait=False):
                found.append(path)
        except OSError:
            continue  # somebody is at it, or has just finished
    return found


@contextmanager
def locked(path: Path, *, shared: bool = False, wait: bool = True) -> Iterator[None]:
    """Holds the lock of a file or directory, which ends with the process at the latest.

    Without `wait`, raises OSError where another has it. File systems that have no locks, and buckets, are worked on without.
    """
    if in_bucket(path):
        yield
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            if not wait or error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
        yield
    finally:
        os.close(descriptor)


def is_disk_full(error: Exception) -> bool:
    """Whether that is what an error tells. TensorStore and safetensors, which are not Python, give the system's message and no number."""
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or os.strerror(errno.ENOSPC) in str(error)


def check_new(out: Path) -> None:
    """Raises UserError unless `out` does not exist or is an empty directory."""
    if is_whole(out) and (not out.is_dir() or children(out)):
        raise UserError(f"{out} exists and is not empty; give a new or empty directory")


def write_text(path: Path, text: str) -> None:
    """Replaces a file in one step."""
    if in_bucket(path):
        _put(path, text.encode())
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        before_change("write", temporary)
        temporary.write_text(text, encoding="utf-8")
        sync(temporary)
        before_change("rename", path)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file of a directory that is still under way, with the folders it lies in."""
    make_folder(path.parent)
    before_change("write", path)
    path.write_bytes(content)


def write_together(files: Mapping[Path, tuple[bytes, int]]) -> None:
    """Writes small files of this machine, each with its mode, beside each other: all of them or none, and never over what is there.

    Raises UserError where one exists already, for a full disk, and where they cannot be written.
    """
    temporaries = {path: path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp") for path in files}
    try:
        for path, temporary in temporaries.items():
            make_folder(path.parent)
            content, mode = files[path]
            before_change("write", path)
            with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
                file.write(content)
            sync(temporary)
        for path, temporary in temporaries.items():
            before_change("link", path)
            os.link(temporary, path)  # unlike a renamed file, it takes no other's place
        for folder in {path.parent for path in files}:
            sync(folder)
    except BaseException as error:
        for path, temporary in temporaries.items():
            with contextlib.suppress(OSError):
                if os.path.samestat(path.lstat(), temporary.lstat()):
                    path.unlink()
        if isinstance(error, OSError):
            names, told = " and ".join(map(str, files)), reason(error)
            raise UserError(f"cannot write {names}: {told}; nothing was written; choose another name or place") from error
        raise
    finally:
        for temporary in temporaries.values():
            with contextlib.suppress(OSError):
                temporary.unlink()


def _put(path: Path, content: bytes) -> None:
    """Writes an object. Raises UserError where that is refused: such are the first of all that is written into a bucket."""
    before_change("write", path)
    try:
        path.write_bytes(content)
    except FileNotFoundError:
        raise UserError(f"cannot write {path}: there is no such bucket; give the name of one that is there") from None
    except OSError as error:
        raise UserError(f"cannot write {path}: {reason(error)}; choose a place that can be written") from error


def append_bytes(path: Path, content: bytes) -> None:
    """Adds to the end of a file, which may be new. An object cannot grow: its store joins it and what is added to one in its place."""
    before_change("write", path)
    if not in_bucket(path):
        with path.open("ab") as file:
            file.write(content)
    elif path.exists():
        added = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
        added.write_bytes(content)
        join_objects([path, added], path)
        added.unlink()
    else:
        path.write_bytes(content)


def make_folder(path: Path) -> None:
    """Where files are about to be written, with all it lies in. A bucket has no folders."""
    if not in_bucket(path):
        path.mkdir(parents=True, exist_ok=True)


def place(source: Path, target: Path, ways: Sequence[str] = WAYS) -> str:
    """Puts a file's bytes in a second place: the first of the ways that the file system has. Returns which.

    Raises UserError where it has none of them.
    """
    make_folder(target.parent)
    before_change("link", target)
    for way in ways:
        try:
            {"link": _link, "reflink": _reflink, "copy": shutil.copyfile}[way](source, target)
            return way
        except OSError as error:
            if error.errno not in _NOT_HERE:
                raise
            if way == ways[-1]:
                raise UserError(f"{target} cannot be made of {source} by {way}: {error.strerror}; try --by auto") from error
    raise ValueError(f"{ways!r} names no way")


def _link(source: Path, target: Path) -> None:
    os.link(source, target, follow_symlinks=False)


def _reflink(source: Path, target: Path) -> None:
    """A copy that shares the disk's blocks until one of both is changed (btrfs, XFS)."""
    try:
        with source.open("rb") as reading, target.open("xb") as writing:
            fcntl.ioctl(writing, _CLONE, reading.fileno())
    except OSError:
        target.unlink(missing_ok=True)
        raise


def remove(directory: Path) -> None:
    """Takes a directory away: at once, as far as anybody sees."""
    if in_bucket(directory):
        before_change("remove", directory)
        (directory / UNFINISHED).write_text("")
        _clear(directory)
        return
    gone = directory.with_name(f".{directory.name}.{uuid.uuid4().hex[:8]}.tmp")
    before_change("remove", directory)
    os.replace(directory, gone)
    shutil.rmtree(gone)


def remove_file(path: Path) -> None:
    """Takes one file away, if it is there."""
    before_change("remove", path)
    path.unlink(missing_ok=True)


def remove_if_empty(directory: Path) -> None:
    """Takes a directory of this machine away if nothing is in it."""
    if not in_bucket(directory):
        with contextlib.suppress(OSError):
            directory.rmdir()


def move_file(source: Path, target: Path) -> None:
    """Puts a file of this machine in the place of what may lie at `target`, on the same file system."""
    before_change("rename", target)
    os.replace(source, target)


def move(directory: Path, target: Path) -> None:
    """Puts a directory in the place of what may lie at `target`. In a bucket it is at both places for a while."""
    if target.exists():
        remove(target)
    make_folder(target.parent)
    if in_bucket(directory):
        copy_objects([(directory / name, target / name) for name in listing(directory)])
        remove(directory)
        return
    before_change("rename", target)
    os.replace(directory, target)


def sync(path: Path) -> None:
    before_change("sync", path)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
