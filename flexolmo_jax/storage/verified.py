"""Remembers which directories were verified, so that unchanged files are not read twice.

    ~/.cache/flexolmo-jax/verified/<digest>   (or below $XDG_CACHE_HOME)

The digest covers the claim that was verified and, for every file of the directory that `is_clutter`
does not name, its name, device, inode, size and times. It is kept in the user's own cache, so a
directory cannot say of itself that it was verified. Nothing is remembered if the cache cannot be
written, if others can write to it, or if its folder is a link, which others may have made. If
somebody changes a file and restores its old times, only `flexolmo verify` notices: it always reads
everything.
"""

import hashlib
import json
import os
import stat
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flexolmo_jax.errors import UserError
from flexolmo_jax.storage.paths import in_bucket, is_clutter, listing

RULES = 2  # raised whenever a version checks more, so that everything is verified again


def once(directory: Path, claim: str, check: Callable[[], object]) -> None:
    """Calls `check`, unless it has passed for these unchanged files before.

    Args:
        claim: what a passed check means, such as "anchor <digest of its description>".

    Raises:
        UserError: the files changed during the check. Whatever `check` raises comes through.
    """
    before = identity(directory, claim)
    if _is_known(before):
        return
    check()
    if identity(directory, claim) != before:
        raise UserError(
            f"{directory} changed while it was verified; stop all writing there and run it again"
        )
    _remember(before)


def remember(directory: Path, claim: str) -> None:
    """Counts a directory as verified: this process has just made it from verified files."""
    _remember(identity(directory, claim))


def vouch(statement: str) -> None:
    """Counts a statement as this program's own: this user's process has just found it to be so."""
    _remember(_digest(statement))


def is_vouched(statement: str) -> bool:
    """Whether `vouch` was told this very statement. Whoever wrote it into a file may be anybody."""
    return _is_known(_digest(statement))


@contextmanager
def unchanged(directories: Collection[Path]) -> Iterator[None]:
    """Raises UserError at the end where other files are in a directory than at the beginning.

    What was verified in between is then what was used. More links to a file are no change.
    """
    before = {directory: _status(directory) for directory in directories}
    yield
    for directory, files in before.items():
        if _status(directory) != files:
            raise UserError(
                f"{directory} changed while it was used; stop all writing there and run it again"
            )


def _status(directory: Path) -> list[Any]:
    files = sorted(_files(directory))
    return files if in_bucket(directory) else [status[:-1] for status in files]


def identity(directory: Path, claim: str) -> str:
    """The digest of a claim and of the names, sizes and times of a directory's files."""
    return _digest(claim, sorted(_files(directory)))


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps([RULES, *parts]).encode()).hexdigest()


def _files(directory: Path) -> Iterator[list[Any]]:
    if in_bucket(directory):
        for name, file in listing(directory).items():
            yield [f"{directory}/{name}", file.size, file.modified, file.md5]
        return
    folders = [("", os.fspath(directory))]
    while folders:
        inside, folder = folders.pop()
        with os.scandir(folder) as entries:
            for entry in entries:
                name = inside + entry.name
                is_folder = entry.is_dir(follow_symlinks=False)
                if is_clutter(f"{name}/" if is_folder else name):
                    continue
                if is_folder:
                    folders.append((f"{name}/", entry.path))
                    continue
                status = entry.stat(follow_symlinks=False)
                mine = [name, status.st_mode, status.st_dev, status.st_ino, status.st_size]
                # The time of change also changes when a file gets another hard link. It counts
                # only for files with a single link.
                changed = status.st_ctime_ns if status.st_nlink == 1 else 0
                yield [*mine, status.st_mtime_ns, changed]


def _is_known(identity: str) -> bool:
    try:
        return (folder := _folder()) is not None and (folder / identity).is_file()
    except OSError:  # a folder that may not be searched
        return False


def _remember(identity: str) -> None:
    if (folder := _folder()) is not None:
        try:
            (folder / identity).touch()
        except OSError:
            return  # the disk is full, for example: it is verified again next time


def _folder() -> Path | None:
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
        if not cache.is_absolute():  # below the working directory, which may be a stranger's
            cache = Path.home() / ".cache"
        if not cache.is_absolute():
            return None
        folder = cache / "flexolmo-jax" / "verified"
        cache.mkdir(parents=True, exist_ok=True)
        for path in (folder.parent, folder):
            path.mkdir(mode=0o700, exist_ok=True)
        return folder if _is_mine(folder) else None
    except (OSError, RuntimeError):  # no home folder, or no permission
        return None


def _is_mine(folder: Path) -> bool:
    """Whether only this user can put anything into a folder, which is no link to another."""
    status = folder.lstat()
    is_open = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and not is_open
