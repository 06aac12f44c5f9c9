"""Where a command may write: to a new place, outside the directories of other artifacts."""

import os
import re
import uuid
from pathlib import Path

from flexolmo_jax.errors import UserError
from flexolmo_jax.storage.paths import absolute, children, in_bucket

UNFINISHED = ".unfinished"  # a file that marks a directory as not finished
TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.tmp")  # the names of `beside`
STORE_FILE = "store.json"  # only stores have it
# Directories that hold exactly their own files, each with the names that identify it.
_CLOSED = {
    "store": [STORE_FILE],
    "anchor or model": ["flexolmo.json", "weights"],
    "contribution": ["manifest.json", "expert.safetensors"],
}


def is_whole(directory: Path) -> bool:
    """Whether a directory that `new_directory` makes exists and is finished."""
    return directory.exists() and not (in_bucket(directory) and (directory / UNFINISHED).exists())


def check_new(out: Path, *, inside_a_store: bool = False) -> None:
    """Raises UserError unless `out` can become a new directory.

    It must not exist, or be an empty directory other than the working directory. Unless it is
    `inside_a_store`, it must lie outside all stores, anchors, models and contributions.
    """
    if is_whole(out) and (not out.is_dir() or children(out, clutter=True)):
        inside = [f" (it holds {path.name!r})" for path in children(out, clutter=True)]
        told = next(iter(inside), "")
        raise UserError(f"{out} exists and is not empty{told}; give a new or empty directory")
    if not in_bucket(out) and out.is_dir() and out.samefile("."):
        raise UserError(
            f"{out} is the working directory, which cannot be replaced; give a new directory in it"
        )
    if not inside_a_store:
        check_outside(out)
    _check_writable(out)


def check_new_file(out: Path) -> None:
    """Raises UserError if `out` exists, even as a broken link, lies in an artifact, or cannot be
    written."""
    if out.exists() if in_bucket(out) else os.path.lexists(out):
        raise UserError(f"{out} exists; give a new file")
    check_outside(out)
    _check_writable(out)


def _check_writable(out: Path) -> None:
    """Raises UserError where nothing can be made, or replaced, as far as that can be seen now."""
    if in_bucket(out):
        return
    folder = next(parent for parent in absolute(out).parents if os.path.lexists(parent))
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        what = "may not be written to" if folder.is_dir() else "is not a folder"
        raise UserError(f"cannot write {out}: {folder} {what}; choose another place")
    if out.is_dir():
        place = absolute(out)
        try:  # replacing a mount, for one, fails: better told now than after the work
            os.rename(place, aside := beside(place))
            os.rename(aside, place)
        except OSError as error:
            told = f"cannot replace {out}: {error.strerror}; give a new directory in it"
            raise UserError(told) from error


def beside(path: Path) -> Path:
    """A new name beside `path`, for what becomes `path`; `abandoned` finds what is left of it."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")


def check_outside(out: Path) -> None:
    """Raises UserError where a path lies in a store, an anchor, a model or a contribution."""
    for parent in absolute(out).parents:
        for what, names in _CLOSED.items():
            if all((parent / name).exists() for name in names):
                raise UserError(f"{out} lies inside the {what} {parent}; give a path outside it")
