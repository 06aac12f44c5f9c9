"""Files and directories that are either whole or not there, on this machine and in buckets.

A directory on this machine is written beside its place, synced, and renamed:

    .out.1a2b3c4d.tmp/.unfinished   the mark: this program made the folder, and may remove what it
                                    wrote there once no process holds the folder's lock
    .out.1a2b3c4d.tmp/content/      becomes out/

A bucket cannot rename. A directory there is written in its place; the mark in it is the first to be
written and the last to go, and until then `is_whole` says no. Without our mark nothing is removed.
"""

import contextlib
import errno
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from flexolmo_jax.errors import UserError
from flexolmo_jax.storage import lacks
from flexolmo_jax.storage.locks import locked
from flexolmo_jax.storage.outputs import TEMPORARY, UNFINISHED, beside, check_new, check_new_file
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

MARK = (  # what the file UNFINISHED says
    b"flexolmo-jax is writing here, or was stopped while it did. What lies here may be removed.\n"
)
CONTENT = "content"
# A bucket has no locks. After so many seconds without a change nobody is taken to be writing there.
GRACE = 3600.0


# Told of every change before it is made: tests fail there, or kill the process.
observer: Callable[[str, Path], None] | None = None


def before_change(operation: str, path: Path) -> None:
    """Called before every write, link, sync, rename and removal."""
    if observer is not None:
        observer(operation, path)


@contextmanager
def new_directory(out: Path, *, shared: bool = False) -> Iterator[Path]:
    """Yields a temporary directory that becomes `out` at the end; any error removes it.

    `abandoned` finds what a killed process left of it. `shared`: several processes may write it at
    once, because all of them write the same. Raises UserError where `out` is not empty or cannot be
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
        temporary = beside(out)
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
    """Syncs every file and folder, then renames: a power cut leaves all of it or nothing."""
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
    """The mark goes last, so that `abandoned` finds what a process killed on the way leaves."""
    shutil.rmtree(temporary / CONTENT, ignore_errors=True)
    with contextlib.suppress(OSError):
        (temporary / UNFINISHED).unlink(missing_ok=True)
        temporary.rmdir()


@contextmanager
def _marked(out: Path, shared: bool) -> Iterator[None]:
    """Has the mark in a directory of a bucket until the directory is whole."""
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
    """Removes a directory of a bucket if it has the mark; the mark goes last."""
    if not _is_marked(directory):
        return
    before_change("remove", directory)
    names = listing(directory, clutter=True).keys()
    remove_objects([directory / name for name in names if name != UNFINISHED])
    (directory / UNFINISHED).unlink()


def _is_marked(directory: Path) -> bool:
    """Whether a directory has the mark: this program made it and has not finished it."""
    try:
        with open_regular(directory / UNFINISHED) as file:
            return file.read(len(MARK) + 1) == MARK
    except OSError:
        return False


def is_settled(directory: Path) -> bool:
    """Whether a directory of a bucket has not changed for so long that nobody writes it."""
    if not in_bucket(directory):
        return True
    changed = max((file.modified for file in listing(directory).values()), default=0.0)
    return changed < time.time() - GRACE


def clear(out: Path) -> None:
    """Removes what killed processes left unfinished of `out`."""
    for path in abandoned(out.parent, out.name):
        remove_abandoned(path)


def abandoned(directory: Path, name: str | None = None) -> list[Path]:
    """What killed processes left unfinished in a directory: of `name`, or of anything.

    Only what has the mark, and whose lock no process holds.
    """
    if in_bucket(directory):
        places = [directory / name] if name else children(directory)
        return [path for path in places if is_settled(path) and _is_marked(path)]
    found = []
    for path in children(directory):
        if not TEMPORARY.fullmatch(path.name) or (name and not path.name.startswith(f".{name}.")):
            continue
        if path.is_symlink() or not path.is_dir():
            continue
        try:
            with locked(path, wait=False):
                # empty: stopped before it got the mark
                if _is_marked(path) or not children(path, clutter=True):
                    found.append(path)
        except OSError:
            continue  # a process is writing it, or has just finished
    return found


def remove_abandoned(path: Path) -> None:
    """Removes what `abandoned` found."""
    if in_bucket(path):
        _clear(path)
    else:
        before_change("remove", path)
        _remove_temporary(path)


def is_disk_full(error: Exception) -> bool:
    """Whether an error says that the disk is full.

    TensorStore and safetensors are not Python: they give the system's message but no number.
    """
    number = getattr(error, "errno", None)
    return number in (errno.ENOSPC, errno.EDQUOT) or os.strerror(errno.ENOSPC) in str(error)


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
        # Else a power cut may undo the rename: a store would forget the model it was just told of.
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file of a directory that is not finished yet, making its folders."""
    make_folder(path.parent)
    before_change("write", path)
    path.write_bytes(content)


def write_together(files: Mapping[Path, tuple[bytes, int]]) -> None:
    """Writes small files of this machine, each with its mode: all of them or none.

    Raises UserError where one exists already and where they cannot be written.
    """
    temporaries = {path: beside(path) for path in files}
    written: dict[Path, os.stat_result] = {}
    try:
        for path, temporary in temporaries.items():
            make_folder(path.parent)
            content, mode = files[path]
            before_change("write", path)
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
            sync(temporary)
        for path, temporary in temporaries.items():
            before_change("link", path)
            _put_new(temporary, path)
            written[path] = path.lstat()
        for folder in {path.parent for path in files}:
            sync(folder)
    except BaseException as error:
        for path, status in written.items():
            with contextlib.suppress(OSError):
                if os.path.samestat(path.lstat(), status):
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


def _put_new(temporary: Path, path: Path) -> None:
    try:
        os.link(temporary, path)  # unlike a rename, fails where a file exists
    except OSError as error:
        if error.errno not in lacks.LINKS or os.path.lexists(path):
            raise
        os.rename(temporary, path)


def _put(path: Path, content: bytes) -> None:
    """Writes an object. Raises UserError where the bucket refuses it or does not exist."""
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
    """Adds to the end of a file, which may be new. An object cannot grow: the bucket joins two."""
    before_change("write", path)
    if not in_bucket(path):
        with path.open("ab") as file:
            file.write(content)
    elif path.exists():
        added = beside(path)
        added.write_bytes(content)
        join_objects([path, added], path)
        added.unlink()
    else:
        path.write_bytes(content)


def make_folder(path: Path) -> None:
    """Makes a folder and its parents on this machine. A bucket has no folders."""
    if not in_bucket(path):
        path.mkdir(parents=True, exist_ok=True)


def discard(directory: Path) -> None:
    """Removes a directory in one step, as others see it. The caller knows that it holds nothing of
    anybody else's."""
    before_change("remove", directory)
    if in_bucket(directory):
        _put(directory / UNFINISHED, MARK)
        _clear(directory)
        return
    temporary = beside(directory)
    temporary.mkdir()
    (temporary / UNFINISHED).write_bytes(MARK)
    os.replace(directory, temporary / CONTENT)
    _remove_temporary(temporary)


def remove_file(path: Path) -> None:
    """Removes one file, if it is there."""
    before_change("remove", path)
    path.unlink(missing_ok=True)


def remove_if_empty(directory: Path) -> None:
    """Removes a directory of this machine if it is empty."""
    if not in_bucket(directory):
        with contextlib.suppress(OSError):
            directory.rmdir()


def move_file(file: Path, target: Path) -> None:
    """Renames a file of this machine, replacing `target`, which is on the same file system."""
    before_change("rename", target)
    os.replace(file, target)


def move(directory: Path, target: Path) -> None:
    """Renames a directory. Raises UserError where `target` exists."""
    check_new(target)
    make_folder(target.parent)
    before_change("rename", target)
    if in_bucket(directory):  # at both places for a while
        names = listing(directory, clutter=True)
        copy_objects([(directory / name, target / name) for name in names])
        discard(directory)
    else:
        os.replace(directory, target)


def sync(path: Path) -> None:
    """Waits until a file or folder is on the disk, where the file system can tell."""
    before_change("sync", path)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in lacks.SYNCING:
            raise
    finally:
        os.close(descriptor)
