"""What has been verified, remembered by the identity of its files, so that bytes nobody touched are
not read twice.

    ~/.cache/flexolmo-jax/verified/<digest>   (or below $XDG_CACHE_HOME)

The digest is over what was verified and, of every file of the directory, its name, device, inode,
size and time of change. It lies in the user's own cache, out of reach of what is verified. Where
that cannot be written, or others may write to it, nothing is remembered. A file that is changed and
given back its old time is found by `flexolmo verify` only, which always reads everything.
"""

import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from flexolmo_jax.errors import UserError
from flexolmo_jax.storage.paths import in_bucket, listing

RULES = 2  # counted up whenever more is checked than before


def once(directory: Path, claim: str, check: Callable[[], object]) -> None:
    """Calls `check` unless it passed for these very files before. Raises what it raises, and
    UserError where they change meanwhile.

    `claim`: what a passed check means, as "anchor <fingerprint>".
    """
    before = identity(directory, claim)
    if _is_known(before):
        return
    check()
    if identity(directory, claim) != before:
        raise UserError(
            f"{directory} changed while it was verified; let nobody write there, and run it again"
        )
    _remember(before)


def remember(directory: Path, claim: str) -> None:
    """For files that this process has just made of verified ones."""
    _remember(identity(directory, claim))


def identity(directory: Path, claim: str) -> str:
    """Of all files in a directory, or of one file, as they are now."""
    return hashlib.sha256(
        json.dumps([RULES, claim, sorted(_files(directory))]).encode()
    ).hexdigest()


def _files(directory: Path) -> Iterator[list[Any]]:
    if in_bucket(directory):
        for name, file in listing(directory).items():
            yield [f"{directory}/{name}", file.size, file.modified, file.md5]
        return
    for folder, folders, names in os.walk(directory):
        for name in (
            *names,
            *(name for name in folders if os.path.islink(os.path.join(folder, name))),
        ):
            path = os.path.join(folder, name)
            status = os.lstat(path)
            mine = [
                os.path.relpath(path, directory),
                status.st_mode,
                status.st_dev,
                status.st_ino,
                status.st_size,
                status.st_mtime_ns,
            ]
            # Giving a file a second name changes this time too, so it says something of those alone
            # that have one.
            yield [*mine, status.st_ctime_ns if status.st_nlink == 1 else 0]


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
            return  # a full disk, say: it is verified again next time


def _folder() -> Path | None:
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
        if not cache.is_absolute():  # below the working directory, which may be a stranger's
            cache = Path.home() / ".cache"
        if not cache.is_absolute():
            return None
        folder = cache / "flexolmo-jax" / "verified"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except (OSError, RuntimeError):  # no home at all
        return None
    is_mine = status.st_uid == os.geteuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return folder if is_mine else None
