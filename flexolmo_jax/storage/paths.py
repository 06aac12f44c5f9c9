"""Paths of files on this machine and in buckets of an object store (gs://bucket/name).

A path in a bucket is an etils.epath, which has pathlib's interface and uses gcsfs. Arrays go
through TensorStore. This module has what both kinds of path need and pathlib does not offer.
Object stores have no directories, links, locks or renaming: files.py works around that.
"""

import base64
import datetime
import errno
import fnmatch
import functools
import importlib.util
import inspect
import io
import logging
import os
import re
import stat
from collections.abc import Callable, Mapping, Sequence
from glob import has_magic
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, ParamSpec, TypeVar

from flexolmo_jax.errors import UserError, from_a_clone

BUCKETS = "gs://"
LOCK = ".flexolmo-lock"  # how the names of locks end
BLOCK = 1 << 25  # bytes of an object per request, when all of it is read or written in order
_NAME = re.compile(r"gs://[a-z0-9][a-z0-9._-]{1,220}[a-z0-9](/.*)?", re.DOTALL)
# in the messages of gcsfs and TensorStore
_REFUSALS = ("Forbidden: ", "PERMISSION_DENIED", "UNAUTHENTICATED")
AnyPath = str | os.PathLike[str]
P = ParamSpec("P")
R = TypeVar("R")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/")
# Names of what systems, file servers and editors leave in folders by themselves.
_CLUTTER_FILES = (
    *(".DS_Store", "._*", ".localized", "Icon\r", "Thumbs.db", "ehthumbs.db", "desktop.ini"),
    *(".nfs*", ".fuse_hidden*", ".directory", "~$*", ".~lock.*#", "*.sw[nop]", "*~", ".#*", "#*#"),
    f".*{LOCK}",
)
_CLUTTER_FOLDERS = (
    *("__MACOSX", ".AppleDouble", ".Spotlight-V100", ".fseventsd", ".TemporaryItems", ".Trashes"),
    *(".Trash-*", "$RECYCLE.BIN", "System Volume Information", "lost+found", ".snapshot"),
    *("@eaDir", "#recycle", "#snapshot"),
)
_IS_CLUTTER_FILE, _IS_CLUTTER_FOLDER = (
    re.compile("|".join(map(fnmatch.translate, names)), re.IGNORECASE).match
    for names in (_CLUTTER_FILES, _CLUTTER_FOLDERS)
)


class File(NamedTuple):
    """What a listing says of one file."""

    size: int  # bytes
    modified: float  # seconds since 1970
    md5: str = ""  # in hex; of objects only, and if the store has computed it


def path_of(path: AnyPath) -> Path:
    """The path that a user gave, wherever it was given: every entrance makes its paths here.

    ~ becomes the home folder. There is no `..` in the result, which TensorStore refuses, and it has
    a name: that of `.` is the working directory's. A path that has been through here stays as it
    is. Raises UserError for what is no path, and for one in a bucket if gcsfs is not installed.
    """
    text = os.fsdecode(path)
    if not in_bucket(text):
        return _on_this_machine(text)
    if not _NAME.fullmatch(text):
        raise UserError(
            f"got the path {text}; expected gs://bucket/name, with small letters and digits in the"
            " bucket's name, and - _ . inside it"
        )
    file_system()
    return literal(text)


def takes_paths(function: Callable[P, R]) -> Callable[P, R]:
    """Lets users call a function: arguments annotated as Path, as several (or one in their place),
    or as some by name go through `path_of`, and may be anything that Python takes for a path."""
    signature = inspect.signature(function)
    kinds = {name: parameter.annotation for name, parameter in signature.parameters.items()}

    @functools.wraps(function)
    def taking(*args: P.args, **options: P.kwargs) -> R:
        given = signature.bind(*args, **options)
        for name, value in given.arguments.items():
            if value is None:
                continue
            if kinds[name] in (Path, Path | None):
                given.arguments[name] = path_of(value)
            elif kinds[name] == Sequence[Path]:
                value = [value] if isinstance(value, str | os.PathLike) else value  # one is meant
                given.arguments[name] = [path_of(each) for each in value]
            elif kinds[name] in (Mapping[str, Path], Mapping[str, Path] | None):
                given.arguments[name] = {key: path_of(each) for key, each in value.items()}
        return function(*given.args, **given.kwargs)

    return taking


def _on_this_machine(text: str) -> Path:
    if not text:  # a variable of a shell that is not set; the working directory is "."
        raise UserError("got an empty path; expected the name of a file or directory")
    if "\0" in text or _SCHEME.match(text):
        raise UserError(
            f"got the path {text}; expected one on this machine, or in a bucket: gs://bucket/name"
        )
    found = Path(os.path.expanduser(text))
    if f"{text}/".startswith("~/") and found == Path(text):
        raise UserError(f"got the path {text}, but there is no home folder; set HOME")
    if ".." in found.parts:
        # Of link/.. it is the folder that holds what the link leads to, as for the system.
        after = found.parts[::-1].index("..")
        split = len(found.parts) - after
        found = absolute(Path(*found.parts[:split])).joinpath(*found.parts[split:])
    if not found.name or found.parts[0].startswith("~") or found.parts[0].endswith(":"):
        found = found.absolute()  # ./~x has to stay what it is
    return found


def literal(path: str | Path) -> Any:
    """The path as Orbax takes it, and as those in buckets are. Its interface is pathlib's."""
    from .literal import LiteralPath

    return LiteralPath(path)


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


def is_clutter(name: str) -> bool:
    """Whether systems and editors leave what has this path in a directory. A folder's ends in "/".

    Nothing of ours is called so. It is not read or copied, and it does not count as a change.
    """
    *folders, last = name.split("/")
    return bool(_IS_CLUTTER_FILE(last)) or any(map(_IS_CLUTTER_FOLDER, (*folders, last)))


def is_apple_double(path: Path) -> bool:
    """Whether a file `._x` is what macOS writes beside `x` in archives and on other systems' disks.

    Its content says so: nobody's own file is overlooked for its name.
    """
    if not path.name.startswith("._"):
        return False
    try:
        with open_regular(path) as file:
            return file.read(4) == b"\0\5\x16\7"
    except OSError:
        return False


def is_there(path: Path) -> bool:
    """Whether a path exists. Unlike `Path.exists`, says no where a folder may not be searched."""
    return path.exists() if in_bucket(path) else os.path.exists(path)


def listing(directory: Path, *, clutter: bool = False) -> dict[str, File]:
    """Every file and link below a directory, by its relative path; `is_clutter` only if asked for.

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
            if clutter or not is_clutter(name[start:])
        }
    files = {}
    for folder, folders, names in os.walk(directory):
        if not clutter:
            folders[:] = [name for name in folders if not is_clutter(f"{name}/")]
            names = [name for name in names if not is_clutter(name)]
        links = (name for name in folders if os.path.islink(os.path.join(folder, name)))
        for name in (*names, *links):
            path = os.path.join(folder, name)
            status = os.lstat(path)
            files[os.path.relpath(path, directory)] = File(status.st_size, status.st_mtime)
    return files


def children(directory: Path, *, clutter: bool = False) -> list[Path]:
    """The files and folders in a directory, sorted; `is_clutter` only if asked for.

    Empty if there is no such directory.
    """
    if in_bucket(directory):
        try:
            names = file_system().ls(str(directory), detail=False)
        except FileNotFoundError:
            return []
        found = [directory / os.path.basename(name) for name in sorted(names)]
    else:
        found = sorted(directory.iterdir()) if directory.is_dir() else []
    return [path for path in found if clutter or not is_clutter(path.name)]


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
    if in_bucket(path):
        return open_to_read(path)
    try:
        return _regular(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        remedy = "copy the directory with what its links lead to (cp -rL)"
        raise OSError(errno.ELOOP, f"it is a link; {remedy}", str(path)) from None


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


def check_for_checkpoints(directory: Path) -> None:
    """Raises UserError where no checkpoint can lie. In a bucket, Orbax reads a path as an address
    of the web, which ends at # or ?."""
    check_for_arrays(directory)
    if in_bucket(directory) and not set("#?\r\n\t").isdisjoint(str(directory)):
        raise UserError(
            f"checkpoints cannot lie in {directory}; expected a path in a bucket without # and ?,"
            " and in one line; choose another place"
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
    """Removes objects, many at once unless gcsfs would take the name of one for a pattern."""
    names = [str(path) for path in paths]
    if not any(map(has_magic, names)):
        if names:
            file_system().rm(names)
        return
    for path in paths:
        path.unlink(missing_ok=True)


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
