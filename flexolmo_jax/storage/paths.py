"""Paths of files on this machine and in buckets of an object store (gs://bucket/name).

A path in a bucket is an etils.epath, which has pathlib's interface and uses gcsfs. Arrays go
through TensorStore. This module has what both kinds of path need and pathlib does not offer.
Object stores have no directories, links, locks or renaming: files.py works around that.
"""

import base64
import datetime
import errno
import functools
import importlib.util
import io
import logging
import os
import re
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from flexolmo_jax.errors import UserError, from_a_clone

BUCKETS = "gs://"
BLOCK = 1 << 25  # bytes of an object per request, when all of it is read or written in order
_NAME = re.compile(r"gs://[a-z0-9][a-z0-9._-]{1,220}[a-z0-9](/.*)?", re.DOTALL)
# in the messages of gcsfs and TensorStore
_REFUSALS = ("Forbidden: ", "PERMISSION_DENIED", "UNAUTHENTICATED")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/")


class File(NamedTuple):
    """What a listing says of one file."""

    size: int  # bytes
    modified: float  # seconds since 1970
    md5: str = ""  # in hex; of objects only, and if the store has computed it


def path_of(path: str | os.PathLike[str]) -> Path:
    """The path that a user gave.

    Raises UserError for a misspelt one, and for one in a bucket if gcsfs is not installed.
    """
    text = os.fspath(path)
    if not in_bucket(text):
        if _SCHEME.match(text):
            raise UserError(
                f"got the path {text}; expected one on this machine, or in a bucket:"
                " gs://bucket/name"
            )
        return Path(path)
    if not _NAME.fullmatch(text):
        raise UserError(
            f"got the path {text}; expected gs://bucket/name, with small letters and digits in the"
            " bucket's name, and - _ . inside it"
        )
    from etils import epath

    file_system()
    return epath.Path(path)  # type: ignore[return-value]  # its interface is pathlib's


def in_bucket(path: str | os.PathLike[str]) -> bool:
    return os.fspath(path).startswith(BUCKETS)


def bucket_of(path: Path) -> str:
    return str(path).removeprefix(BUCKETS).partition("/")[0]


def absolute(path: Path) -> Path:
    """The absolute path, with links resolved. Raises UserError for links in a circle."""
    if in_bucket(path):
        return path
    try:
        found = path.resolve()
        # Since Python 3.13 nothing is raised, and the circle stays in the path.
        is_circle = any(place.is_symlink() for place in (found, *found.parents))
    except RuntimeError:
        is_circle = True
    if is_circle:
        raise UserError(
            f"{path} is a link that leads back to itself; expected a place; remove the link"
        )
    return found


def listing(directory: Path) -> dict[str, File]:
    """Every file and link below a directory, by its relative path.

    Empty if there is no such directory.
    """
    if in_bucket(directory):
        start = len(str(directory)) - len(BUCKETS) + 1
        try:
            found = file_system().find(str(directory), detail=True)
        except FileNotFoundError:  # there is no such bucket
            return {}
        return {
            name[start:]: File(info["size"], _seconds(info["mtime"]), _hex(info.get("md5Hash", "")))
            for name, info in found.items()
        }
    files = {}
    for folder, folders, names in os.walk(directory):
        links = (name for name in folders if os.path.islink(os.path.join(folder, name)))
        for name in (*names, *links):
            path = os.path.join(folder, name)
            status = os.lstat(path)
            files[os.path.relpath(path, directory)] = File(status.st_size, status.st_mtime)
    return files


def children(directory: Path) -> list[Path]:
    """The files and folders in a directory, sorted. Empty if there is no such directory."""
    if not in_bucket(directory):
        return sorted(directory.iterdir()) if directory.is_dir() else []
    try:
        found = file_system().ls(str(directory), detail=False)
    except FileNotFoundError:
        return []
    return [directory / os.path.basename(name) for name in sorted(found)]


def size_of(file: Path) -> int:
    """The size in bytes. Raises OSError if there is no such file."""
    return file_system().info(str(file))["size"] if in_bucket(file) else file.stat().st_size


def open_to_read(file: Path) -> BinaryIO:
    """Opens a file to read all of it, or long parts.

    Raises OSError for anything but a regular file: reading a pipe may never end.
    """
    if not in_bucket(file):
        return io.BufferedReader(_regular(file, os.O_RDONLY))
    return io.BufferedReader(file_system().open(str(file), "rb", block_size=BLOCK))


def open_to_write(file: Path) -> BinaryIO:
    """Opens a file to write it in order, with a block in memory. An object exists once closed."""
    if in_bucket(file):
        return file_system().open(str(file), "wb", block_size=BLOCK)
    return file.open("wb")


def read_range(file: Path, start: int, end: int) -> bytes:
    """The bytes from `start` to `end`; fewer if the file ends before."""
    if in_bucket(file):
        try:
            return file_system().cat_file(str(file), start, end)
        except Exception as error:  # gcsfs has exceptions of its own
            if getattr(error, "code", None) != 416:
                raise
            return b""  # 416: the object ends before `start`
    with file.open("rb") as opened:
        opened.seek(start)
        return opened.read(end - start)


def open_regular(path: Path) -> BinaryIO:
    """Opens a file that others made. Raises OSError for all but a regular file, links included."""
    return open_to_read(path) if in_bucket(path) else _regular(path, os.O_RDONLY | os.O_NOFOLLOW)


def _regular(path: Path, flags: int) -> io.FileIO:
    descriptor = os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(0, "it is not a regular file", str(path))
    return io.FileIO(descriptor, "rb")


def kvstore(directory: Path) -> dict[str, Any]:
    """TensorStore's specification of a directory."""
    if in_bucket(directory):
        bucket, _, name = str(directory).removeprefix(BUCKETS).partition("/")
        return {"driver": "gcs", "bucket": bucket, "path": f"{name}/" if name else ""}
    check_for_arrays(directory)
    return {"driver": "file", "path": str(directory.absolute())}


def check_for_arrays(directory: Path) -> None:
    """Raises UserError for a directory whose name TensorStore does not take as it is.

    It takes a backslash for a slash, and so would read and write elsewhere.
    """
    text = os.fspath(directory if in_bucket(directory) else directory.absolute())
    if "\\" in text or text.encode("utf-8", "replace").decode() != text:
        raise UserError(
            f"weights cannot lie in {text}; expected a path in UTF-8 without a backslash; rename"
            " its folders, or choose another place"
        )


def copy_objects(pairs: Sequence[tuple[Path, Path]]) -> None:
    """Copies objects inside the object store. No byte passes through this machine."""
    if pairs:
        originals, targets = zip(*pairs, strict=True)
        file_system().copy(list(map(str, originals)), list(map(str, targets)))


def join_objects(parts: Sequence[Path], target: Path) -> None:
    """Joins objects of one bucket into `target`, which may be one of them, inside the store."""
    file_system().merge(str(target), [str(part) for part in parts])


def remove_objects(paths: Sequence[Path]) -> None:
    if paths:
        file_system().rm([str(path) for path in paths])


@functools.cache
def file_system() -> Any:
    """gcsfs, for all buckets. It caches no listings: others write there at the same time."""
    if importlib.util.find_spec("gcsfs") is None:
        raise UserError(f"paths in buckets (gs://) need gcsfs; install it: {from_a_clone('gcs')}")
    import fsspec
    import fsspec.config

    # epath's own gcsfs must not cache listings either
    fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
    # gcsfs raises errors and also logs them, with a traceback
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
    return fsspec.filesystem("gcs")


def reason(error: BaseException) -> str:
    """The reason of an error in one line. An object store's errors have no strerror."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    said = " ".join(str(error).split())
    if isinstance(error, FileNotFoundError):
        return f"{os.strerror(errno.ENOENT)} ({said})"
    return said[:300]


def is_refusal(error: BaseException) -> bool:
    """Whether an error comes from an object store, or from the network on the way to it."""
    library = type(error).__module__.split(".")[0]
    is_denied = any(word in str(error) for word in _REFUSALS)
    return is_denied or library in ("gcsfs", "google", "aiohttp")


def _hex(digest: str) -> str:
    return base64.b64decode(digest).hex()


def _seconds(when: datetime.datetime | str) -> float:
    return (datetime.datetime.fromisoformat(when) if isinstance(when, str) else when).timestamp()
