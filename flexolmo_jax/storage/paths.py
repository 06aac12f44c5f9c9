"""Where files lie: in directories of this machine, or in a bucket of an object store
(gs://bucket/name).

A path in a bucket is one of etils' epath, which has pathlib's interface and goes through gcsfs;
arrays go through TensorStore. Here is what both kinds of path need and pathlib has no word for.
What an object store has not, directories, links, locks and renaming, files.py makes up for.
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

from flexolmo_jax.errors import UserError

BUCKETS = "gs://"
# bytes of an object that one request reads or writes, where it is read or written from its start to
# its end
BLOCK = 1 << 25
_NAME = re.compile(r"gs://[a-z0-9][a-z0-9._-]{1,220}[a-z0-9](/.*)?", re.DOTALL)
# what gcsfs and TensorStore begin with
_REFUSALS = ("Forbidden: ", "PERMISSION_DENIED", "UNAUTHENTICATED")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/")


class File(NamedTuple):
    """What a listing tells of one."""

    size: int  # bytes
    modified: float  # seconds since 1970
    md5: str = ""  # in hex, where it is an object whose store has computed it


def path_of(path: str | os.PathLike[str]) -> Path:
    """A path as a user gives it. Raises UserError for one in a bucket where gcsfs is not installed,
    and for a misspelt one."""
    text = os.fspath(path)
    if not in_bucket(text):
        if _SCHEME.match(text):
            raise UserError(
                f"got the path {text}; expected one of this machine, or of a bucket:"
                " gs://bucket/name"
            )
        return Path(path)
    if not _NAME.fullmatch(text):
        raise UserError(
            f"got the path {text}; expected gs://bucket/name, the bucket's name in small letters,"
            " digits, and - _ . inside"
        )
    from etils import epath

    file_system()
    return epath.Path(path)  # type: ignore[return-value]  # its interface is pathlib's


def in_bucket(path: str | os.PathLike[str]) -> bool:
    return os.fspath(path).startswith(BUCKETS)


def bucket_of(path: Path) -> str:
    return str(path).removeprefix(BUCKETS).partition("/")[0]


def absolute(path: Path) -> Path:
    """The one name of a place: without links and dots. Raises UserError for links in a circle."""
    if in_bucket(path):
        return path
    try:
        return path.resolve()
    except RuntimeError as error:  # of pathlib, before Python 3.13
        raise UserError(
            f"{path} is a link that leads back to itself; expected a place; remove the link"
        ) from error


def listing(directory: Path) -> dict[str, File]:
    """Every file below a directory by its path from there, links too; nothing where there is no
    directory."""
    if in_bucket(directory):
        start = len(str(directory)) - len(BUCKETS) + 1
        try:
            found = file_system().find(str(directory), detail=True)
        except FileNotFoundError:  # the bucket
            return {}
        return {
            name[start:]: File(info["size"], _seconds(info["mtime"]), _hex(info.get("md5Hash", "")))
            for name, info in found.items()
        }
    files = {}
    for folder, folders, names in os.walk(directory):
        for name in (
            *names,
            *(name for name in folders if os.path.islink(os.path.join(folder, name))),
        ):
            path = os.path.join(folder, name)
            status = os.lstat(path)
            files[os.path.relpath(path, directory)] = File(status.st_size, status.st_mtime)
    return files


def children(directory: Path) -> list[Path]:
    """What lies in a directory, by name; nothing where there is none."""
    if not in_bucket(directory):
        return sorted(directory.iterdir()) if directory.is_dir() else []
    try:
        found = file_system().ls(str(directory), detail=False)
    except FileNotFoundError:
        return []
    return [directory / os.path.basename(name) for name in sorted(found)]


def files_below(directory: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """Files at any depth whose names end so, but hidden ones, in the order of their paths: the same
    here and in a bucket."""
    names = sorted(
        (name for name in listing(directory) if name.endswith(suffixes)),
        key=lambda name: name.split("/"),
    )
    paths = (directory / name for name in names if not name.rpartition("/")[2].startswith("."))
    return [path for path in paths if in_bucket(path) or path.is_file()]


def size_of(file: Path) -> int:
    """Bytes. Raises OSError where there is no such file."""
    return file_system().info(str(file))["size"] if in_bucket(file) else file.stat().st_size


def open_to_read(file: Path) -> BinaryIO:
    """For reading it from its start to its end, or long stretches of it. Raises OSError for what is
    no regular file: a pipe never ends."""
    if not in_bucket(file):
        return io.BufferedReader(_regular(file, os.O_RDONLY))
    return io.BufferedReader(file_system().open(str(file), "rb", block_size=BLOCK))


def open_to_write(file: Path) -> BinaryIO:
    """For writing it from its start to its end, a block of it in memory: an object is there when it
    is closed."""
    return (
        file_system().open(str(file), "wb", block_size=BLOCK)
        if in_bucket(file)
        else file.open("wb")
    )


def read_range(file: Path, start: int, end: int) -> bytes:
    """These bytes of it, or those of them that it has."""
    if in_bucket(file):
        try:
            return file_system().cat_file(str(file), start, end)
        except Exception as error:  # gcsfs has its own
            if getattr(error, "code", None) != 416:
                raise
            return b""  # it ends before
    with file.open("rb") as opened:
        opened.seek(start)
        return opened.read(end - start)


def open_regular(path: Path) -> BinaryIO:
    """A file of a stranger, for reading. Raises OSError for anything but a regular file, a link
    among them."""
    return open_to_read(path) if in_bucket(path) else _regular(path, os.O_RDONLY | os.O_NOFOLLOW)


def _regular(path: Path, flags: int) -> io.FileIO:
    descriptor = os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(0, "it is not a regular file", str(path))
    return io.FileIO(descriptor, "rb")


def kvstore(directory: Path) -> dict[str, Any]:
    """TensorStore's name of a directory."""
    if in_bucket(directory):
        bucket, _, name = str(directory).removeprefix(BUCKETS).partition("/")
        return {"driver": "gcs", "bucket": bucket, "path": f"{name}/" if name else ""}
    return {"driver": "file", "path": str(directory.absolute())}


def copy_objects(pairs: Sequence[tuple[Path, Path]]) -> None:
    """Has an object store copy objects: no byte comes here."""
    if pairs:
        file_system().copy(
            [str(source) for source, _ in pairs], [str(target) for _, target in pairs]
        )


def join_objects(parts: Sequence[Path], target: Path) -> None:
    """Has an object store make one object of several of the same bucket, of which `target` may be
    one: no byte comes here."""
    file_system().merge(str(target), [str(part) for part in parts])


def remove_objects(paths: Sequence[Path]) -> None:
    if paths:
        file_system().rm([str(path) for path in paths])


@functools.cache
def file_system() -> Any:
    """Of all buckets. It remembers no listing: TensorStore and other processes write there too."""
    if importlib.util.find_spec("gcsfs") is None:
        raise UserError(
            "paths in buckets (gs://) need gcsfs; install it: pip install 'flexolmo-jax[gcs]'"
        )
    import fsspec
    import fsspec.config

    # for epath's as well
    fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
    # it logs, with a traceback, what it also raises
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
    return fsspec.filesystem("gcs")


def reason(error: BaseException) -> str:
    """What the system, or an object store, whose errors have no strerror, says of an error: one
    line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    said = " ".join(str(error).split())
    return (
        f"{os.strerror(errno.ENOENT)} ({said})"
        if isinstance(error, FileNotFoundError)
        else said[:300]
    )


def is_refusal(error: BaseException) -> bool:
    """Whether it is an object store that tells this error, or the way to one: through gcsfs and its
    libraries, or TensorStore."""
    library = type(error).__module__.split(".")[0]
    return library in ("gcsfs", "google", "aiohttp") or any(
        word in str(error) for word in _REFUSALS
    )


def _hex(digest: str) -> str:
    return base64.b64decode(digest).hex()


def _seconds(when: datetime.datetime | str) -> float:
    return (datetime.datetime.fromisoformat(when) if isinstance(when, str) else when).timestamp()
