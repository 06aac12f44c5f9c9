"""Puts a file's bytes in a second place by hard link, by reflink, or by copy.

Only a read-only file may be linked: writing through one name would change the file under all names.
"""

import errno
import fcntl
import os
import shutil
import stat
from collections.abc import Sequence
from pathlib import Path

from flexolmo_jax.errors import UserError

from . import lacks
from .files import before_change, make_folder

READ_ONLY = 0o444  # the mode of files that several directories may share
WRITABLE = 0o222  # the mode bits that such a file must not have
WAYS = ("link", "reflink", "copy")  # the cheapest first
_CLONE = 0x40049409  # Linux's FICLONE
_UNSUPPORTED = (  # errors that mean: this way does not work here
    errno.EXDEV,
    errno.EPERM,
    errno.EACCES,
    errno.EMLINK,
    errno.EOPNOTSUPP,
    errno.ENOTTY,
    errno.EINVAL,
    errno.ENOSYS,
)


def place(original: Path, target: Path, ways: Sequence[str] = WAYS) -> str:
    """Puts a file's bytes in a second place by the first of `ways` that works, and returns it.

    Raises UserError if none of them works.
    """
    make_folder(target.parent)
    before_change("link", target)
    for way in ways:
        try:
            {"link": _link, "reflink": _reflink, "copy": shutil.copyfile}[way](original, target)
            if way != "link":
                make_read_only(target)
            return way
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
            if way == ways[-1]:
                raise UserError(
                    f"cannot make {target} from {original} by {way}: {error.strerror}; try"
                    " --by auto"
                ) from error
    raise ValueError(f"got no way; expected some of {', '.join(WAYS)}")


def make_read_only(file: Path) -> None:
    """Lets a file be shared by link. Where there are no modes it stays as it is, and is copied."""
    try:
        file.chmod(READ_ONLY)
    except OSError as error:
        if error.errno not in lacks.MODES:
            raise


def _link(original: Path, target: Path) -> None:
    """Links a read-only file of this user. Raises EPERM for any other file."""
    status = os.lstat(original)
    is_read_only = stat.S_ISREG(status.st_mode) and not status.st_mode & WRITABLE
    if not is_read_only or status.st_uid != os.geteuid():
        raise OSError(errno.EPERM, "its file may be changed under another name", str(original))
    os.link(original, target, follow_symlinks=False)


def _reflink(original: Path, target: Path) -> None:
    """A copy that shares blocks on the disk until one of the two changes (btrfs, XFS)."""
    try:
        with original.open("rb") as reading, target.open("xb") as writing:
            fcntl.ioctl(writing, _CLONE, reading.fileno())
    except OSError:
        target.unlink(missing_ok=True)
        raise
