"""Where files lie: in directories of this machine, or in a bucket of an object store (gs://bucket/name).

A path in a bucket is one of etils' epath, which has pathlib's interface and goes through gcsfs; arrays go through TensorStore. Here is what
both kinds of path need and pathlib has no word for. What an object store has not, directories, links, locks and renaming,
files.py makes up for.
"""

import datetime
import functools
import importlib.util
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from flexolmo_jax.errors import UserError

BUCKETS = "gs://"
READ_AHEAD = 1 << 25  # bytes, of an object that is read from its start to its end


class File(NamedTuple):
    """What a listing tells of one."""

    size: int  # bytes
    modified: float  # seconds since 1970


def path_of(path: str | os.PathLike[str]) -> Path:
    """A path as a user gives it. Raises UserError for one in a bucket where gcsfs is not installed."""
    if not in_bucket(path):
        return Path(path)
    from etils import epath

    file_system()
    return epath.Path(path)  # type: ignore[return-value]  # its interface is pathlib's


def in_bucket(path: str | os.PathLike[str]) -> bool:
    return os.fspath(path).startswith(BUCKETS)


def absolute(path: Path) -> Path:
    """The one name of a place: without links and dots."""
    return path if in_bucket(path) else path.resolve()


def listing(directory: Path) -> dict[str, File]:
    """Every file below a directory by its path from there, links too; nothing where there is no directory."""
    if in_bucket(directory):
        start = len(str(directory)) - len(BUCKETS) + 1
        found = file_system().find(str(directory), detail=True)
        return {name[start:]: File(info["size"], _seconds(info["mtime"])) for name, info in found.items()}
    files = {}
    for folder, folders, names in os.walk(directory):
        for name in (*names, *(name for name in folders if os.path.islink(os.path.join(folder, name)))):
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


def open_regular(path: Path) -> BinaryIO:
    """A file of a stranger, for reading. Raises OSError for anything but a regular file, a link among them."""
    if in_bucket(path):
        return file_system().open(str(path), "rb", block_size=READ_AHEAD)
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(0, "it is not a regular file", str(path))
    return os.fdopen(descriptor, "rb", buffering=0)


def kvstore(directory: Path) -> dict[str, Any]:
    """TensorStore's name of a directory."""
    if in_bucket(directory):
        bucket, _, name = str(directory).removeprefix(BUCKETS).partition("/")
        return {"driver": "gcs", "bucket": bucket, "path": f"{name}/"}
    return {"driver": "file", "path": str(directory.absolute())}


def copy_objects(pairs: Sequence[tuple[Path, Path]]) -> None:
    """Has an object store copy objects: no byte comes here."""
    if pairs:
        file_system().copy([str(source) for source, _ in pairs], [str(target) for _, target in pairs])


def remove_objects(paths: Sequence[Path]) -> None:
    if paths:
        file_system().rm([str(path) for path in paths])


@functools.cache
def file_system() -> Any:
    """Of all buckets. It remembers no listing: TensorStore and other processes write there too."""
    if importlib.util.find_spec("gcsfs") is None:
        raise UserError("paths in buckets (gs://) need gcsfs; install it: pip install 'flexolmo-jax[gcs]'")
    import fsspec
    import fsspec.config

    fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)  # for epath's as well
    return fsspec.filesystem("gcs")


def _seconds(when: datetime.datetime | str) -> float:
    return (datetime.datetime.fromisoformat(when) if isinstance(when, str) else when).timestamp()
