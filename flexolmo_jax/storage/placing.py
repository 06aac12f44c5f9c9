"""Having a file's bytes in a second place: by another name of the same file, by a clone that shares
its blocks, or by a copy.

A file gets a second name only while nobody can write to it: through one of its names it would be
changed under all the others.
"""

import errno
import fcntl
import os
import shutil
import stat
from collections.abc import Sequence
from pathlib import Path

from flexolmo_jax.errors import UserError

from .files import before_change, make_folder

# modes: of files that several directories may share; the bits that it lacks
READ_ONLY, WRITABLE = 0o444, 0o222
WAYS = ("link", "reflink", "copy")  # to have a file's bytes in a second place, the cheapest first
_CLONE = 0x40049409  # Linux's FICLONE
_NOT_HERE = (
    errno.EXDEV,
    errno.EPERM,
    errno.EACCES,
    errno.EMLINK,
    errno.EOPNOTSUPP,
    errno.ENOTTY,
    errno.EINVAL,
    errno.ENOSYS,
)


def place(source: Path, target: Path, ways: Sequence[str] = WAYS) -> str:
    """Puts a file's bytes in a second place: the first of the ways that the file system has.
    Returns which.

    Raises UserError where it has none of them.
    """
    make_folder(target.parent)
    before_change("link", target)
    for way in ways:
        try:
            {"link": _link, "reflink": _reflink, "copy": shutil.copyfile}[way](source, target)
            if way != "link":
                target.chmod(READ_ONLY)
            return way
        except OSError as error:
            if error.errno not in _NOT_HERE:
                raise
            if way == ways[-1]:
                raise UserError(
                    f"{target} cannot be made of {source} by {way}: {error.strerror}; try --by auto"
                ) from error
    raise ValueError(f"{ways!r} names no way")


def _link(source: Path, target: Path) -> None:
    """Raises EPERM for a file that is not ours or may be written: through one of its names it would
    be changed in all the others."""
    status = os.lstat(source)
    if (
        not stat.S_ISREG(status.st_mode)
        or status.st_mode & WRITABLE
        or status.st_uid != os.geteuid()
    ):
        raise OSError(errno.EPERM, "its file may be changed under another name", str(source))
    os.link(source, target, follow_symlinks=False)


def _reflink(source: Path, target: Path) -> None:
    """A copy that shares the disk's blocks until one of both is changed (btrfs, XFS)."""
    try:
        with source.open("rb") as reading, target.open("xb") as writing:
            fcntl.ioctl(writing, _CLONE, reading.fileno())
    except OSError:
        target.unlink(missing_ok=True)
        raise
