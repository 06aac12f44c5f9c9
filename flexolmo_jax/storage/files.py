"""Writing files and directories that are either whole or not there: on this machine, and in
buckets, where nothing can be renamed.

A directory on this machine is written beside its place, synced, and renamed:

    .out.1a2b3c4d.tmp/.unfinished   the mark: this program made the folder, and what is in it may go
    when nobody holds its lock .out.1a2b3c4d.tmp/content/      becomes out/

One in a bucket is written in its place, with the mark in it that is there before everything else
and goes last: what has the mark is not there yet, for whoever asks `is_whole`. What bears no mark
of ours is never removed.
"""

import contextlib
import errno
import fcntl
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from flexolmo_jax.errors import UserError
from flexolmo_jax.storage.paths import (
    absolute,
    children,
    copy_objects,
    in_bucket,
    join_objects,
    listing,
    open_regular,
    reason,
    remove_objects,
)

UNFINISHED = ".unfinished"  # the mark ...
# ... and what it says
MARK = (
    b"flexolmo-jax is writing here, or was stopped while it did. What lies here may be removed.\n"
)
STORE_FILE = "store.json"  # in a directory that has it, a store, nobody but the store writes
CONTENT = "content"
# What a directory is that holds exactly its own files, by names that are in it.
_CLOSED = {
    "store": [STORE_FILE],
    "anchor or model": ["flexolmo.json", "weights"],
    "contribution": ["manifest.json", "expert.safetensors"],
}
# seconds without a change after which nobody is taken to be writing something in a bucket, which
# has no locks
GRACE = 3600.0
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.tmp")


# told of every change to come; tests fail or die there
observer: Callable[[str, Path], None] | None = None


def before_change(operation: str, path: Path) -> None:
    """Called before every write, link, sync, rename and removal of what must be whole or not
    there."""
    if observer is not None:
        observer(operation, path)


@contextmanager
def new_directory(out: Path, *, shared: bool = False) -> Iterator[Path]:
    """Yields a temporary directory that is `out` at the end, or vanishes with any error.

    What a killed process leaves of it is found by `abandoned`. `shared`: all who write it write the
    same, and may do so at once. Raises UserError where `out` holds something already, cannot be
    made, and for a full disk.
    """
    out = absolute(out)
    check_new(out, inside_a_store=shared)
    if in_bucket(out):
        with _marked(out, shared):
            yield out
        return
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = out.with_name(f".{out.name}.{uuid.uuid4().hex[:8]}.tmp")
        temporary.mkdir()
    except OSError as error:
        raise UserError(
            f"cannot write {out}: {error.strerror}; choose a place that can be written"
        ) from error
    try:
        with locked(temporary):
            (temporary / UNFINISHED).write_bytes(MARK)
            (temporary / CONTENT).mkdir()
            yield temporary / CONTENT
            _put_in_place(temporary / CONTENT, out, inside_a_store=shared)
    except Exception as error:
        if is_disk_full(error):
            raise UserError(
                f"no space left on the disk while writing {out}; nothing was kept; free some and"
                " run it again"
            ) from error
        raise
    finally:
        _remove_temporary(temporary)


def _put_in_place(content: Path, out: Path, *, inside_a_store: bool) -> None:
    for folder, _, files in os.walk(content, topdown=False):
        for name in files:
            sync(Path(folder, name))
        sync(Path(folder))
    check_new(out, inside_a_store=inside_a_store)
    if out.exists():
        out.rmdir()
    before_change("rename", out)
    os.replace(content, out)
    try:
        sync(out.parent)
    except OSError:
        os.replace(out, content)
        raise


def _remove_temporary(temporary: Path) -> None:
    """A folder that this program made empty; the mark goes last, so that whoever is stopped on the
    way leaves it."""
    shutil.rmtree(temporary / CONTENT, ignore_errors=True)
    with contextlib.suppress(OSError):
        (temporary / UNFINISHED).unlink(missing_ok=True)
        temporary.rmdir()


@contextmanager
def _marked(out: Path, shared: bool) -> Iterator[None]:
    if not shared:
        _clear(out)  # of what a killed process left
    _put(out / UNFINISHED, MARK)
    try:
        yield
    except BaseException:
        if not shared:
            _clear(out)
        raise
    before_change("rename", out)
    (out / UNFINISHED).unlink(missing_ok=True)


def _clear(directory: Path) -> None:
    """Removes all objects of a directory in a bucket that bears the mark, the mark last."""
    if not _is_marked(directory):
        return
    before_change("remove", directory)
    names = listing(directory).keys()
    remove_objects([directory / name for name in names if name != UNFINISHED])
    (directory / UNFINISHED).unlink()


def _is_marked(directory: Path) -> bool:
    """Whether this program made a directory, and nothing in it is anybody's yet."""
    try:
        with open_regular(directory / UNFINISHED) as file:
            return file.read(len(MARK) + 1) == MARK
    except OSError:
        return False


def is_whole(directory: Path) -> bool:
    """Whether a directory that `new_directory` makes is there."""
    return directory.exists() and not (in_bucket(directory) and (directory / UNFINISHED).exists())


def is_settled(directory: Path) -> bool:
    """Whether nobody can be at work on what lies there, as far as a bucket lets one know."""
    return (
        not in_bucket(directory)
        or max((f.modified for f in listing(directory).values()), default=0.0) < time.time() - GRACE
    )


def clear(out: Path) -> None:
    """Removes what killed processes left on the way to `out`."""
    for path in abandoned(out.parent, out.name):
        remove_abandoned(path)


def abandoned(directory: Path, name: str | None = None) -> list[Path]:
    """What processes that are no longer there left in a directory, on the way to `name` or
    anything: what bears the mark, and no more."""
    if in_bucket(directory):
        places = [directory / name] if name else children(directory)
        return [path for path in places if is_settled(path) and _is_marked(path)]
    found = []
    for path in children(directory):
        if not _TEMPORARY.fullmatch(path.name) or (name and not path.name.startswith(f".{name}.")):
            continue
        if path.is_symlink() or not path.is_dir():
            continue
        try:
            with locked(path, wait=False):
                if _is_marked(path) or not children(path):  # empty: stopped before it got the mark
                    found.append(path)
        except OSError:
            continue  # somebody is at it, or has just finished
    return found


def remove_abandoned(path: Path) -> None:
    """Takes away what `abandoned` found."""
    if in_bucket(path):
        _clear(path)
    else:
        before_change("remove", path)
        _remove_temporary(path)


@contextmanager
def locked(path: Path, *, shared: bool = False, wait: bool = True) -> Iterator[None]:
    """Holds the lock of a file or directory, which ends with the process at the latest.

    Without `wait`, raises OSError where another has it. File systems that have no locks, and
    buckets, are worked on without.
    """
    if in_bucket(path):
        yield
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(
                descriptor,
                (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB),
            )
        except OSError as error:
            if not wait or error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
        yield
    finally:
        os.close(descriptor)


def is_disk_full(error: Exception) -> bool:
    """Whether that is what an error tells. TensorStore and safetensors, which are not Python, give
    the system's message and no number."""
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or os.strerror(
        errno.ENOSPC
    ) in str(error)


def check_new(out: Path, *, inside_a_store: bool = False) -> None:
    """Raises UserError unless `out` does not exist or is an empty directory, and not the one that
    this process works in; and inside what holds exactly its own files."""
    if is_whole(out) and (not out.is_dir() or children(out)):
        raise UserError(f"{out} exists and is not empty; give a new or empty directory")
    if not in_bucket(out) and out.is_dir() and out.samefile("."):
        raise UserError(
            f"{out} is the working directory, whose place nothing can take; give a new"
            " directory in it"
        )
    if not inside_a_store:
        _check_outside(out)


def check_new_file(out: Path) -> None:
    """Raises UserError where anything lies at `out`, a link among it; and inside what holds exactly
    its own files."""
    if out.exists() if in_bucket(out) else os.path.lexists(out):
        raise UserError(f"{out} exists; give a new file")
    _check_outside(out)


def _check_outside(out: Path) -> None:
    for parent in absolute(out).parents:
        for what, names in _CLOSED.items():
            if all((parent / name).exists() for name in names):
                raise UserError(
                    f"{out} lies inside the {what} {parent}; give a place outside of it"
                )


def write_text(path: Path, text: str) -> None:
    """Replaces a file in one step."""
    _write_at_once(path, text.encode())


def write_new(path: Path, content: bytes) -> None:
    """Writes a user's new file, whole or not at all, with the folders it lies in. Raises UserError
    as `check_new_file` does."""
    check_new_file(path)
    make_folder(path.parent)
    _write_at_once(path, content)


def _write_at_once(path: Path, content: bytes) -> None:
    if in_bucket(path):
        _put(path, content)
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        before_change("write", temporary)
        temporary.write_bytes(content)
        sync(temporary)
        before_change("rename", path)
        os.replace(temporary, path)
        # else a power cut may take the new name back: a store would forget a model that it was told
        # of
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file of a directory that is still under way, with the folders it lies in."""
    make_folder(path.parent)
    before_change("write", path)
    path.write_bytes(content)


def write_together(files: Mapping[Path, tuple[bytes, int]]) -> None:
    """Writes small files of this machine, each with its mode, beside each other: all of them or
    none, and never over what is there.

    Raises UserError where one exists already, for a full disk, and where they cannot be written.
    """
    temporaries = {
        path: path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp") for path in files
    }
    try:
        for path, temporary in temporaries.items():
            make_folder(path.parent)
            content, mode = files[path]
            before_change("write", path)
            with os.fdopen(
                os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb"
            ) as file:
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
            raise UserError(
                f"cannot write {names}: {told}; nothing was written; choose another name or place"
            ) from error
        raise
    finally:
        for temporary in temporaries.values():
            with contextlib.suppress(OSError):
                temporary.unlink()


def _put(path: Path, content: bytes) -> None:
    """Writes an object. Raises UserError where that is refused: such are the first of all that is
    written into a bucket."""
    before_change("write", path)
    try:
        path.write_bytes(content)
    except FileNotFoundError:
        raise UserError(
            f"cannot write {path}: there is no such bucket; give the name of one that is there"
        ) from None
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {reason(error)}; choose a place that can be written"
        ) from error


def append_bytes(path: Path, content: bytes) -> None:
    """Adds to the end of a file, which may be new. An object cannot grow: its store joins it and
    what is added to one in its place."""
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


def discard(directory: Path) -> None:
    """Takes away a directory that this program made: at once, as far as anybody sees. The caller
    knows that nothing else lies in it."""
    before_change("remove", directory)
    if in_bucket(directory):
        _put(directory / UNFINISHED, MARK)
        _clear(directory)
        return
    temporary = directory.with_name(f".{directory.name}.{uuid.uuid4().hex[:8]}.tmp")
    temporary.mkdir()
    (temporary / UNFINISHED).write_bytes(MARK)
    os.replace(directory, temporary / CONTENT)
    _remove_temporary(temporary)


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
    """Puts a file of this machine in the place of what may lie at `target`, on the same file
    system."""
    before_change("rename", target)
    os.replace(source, target)


def move(directory: Path, target: Path) -> None:
    """Gives a directory another name. In a bucket it is at both places for a while. Raises
    UserError where something has that name."""
    check_new(target)
    make_folder(target.parent)
    before_change("rename", target)
    if in_bucket(directory):
        copy_objects([(directory / name, target / name) for name in listing(directory)])
        discard(directory)
    else:
        os.replace(directory, target)


def sync(path: Path) -> None:
    before_change("sync", path)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
