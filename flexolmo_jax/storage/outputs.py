"""Where a command may write: at a new place, and not among files that are somebody else's."""

import os
from pathlib import Path

from flexolmo_jax.errors import UserError
from flexolmo_jax.storage.paths import absolute, children, in_bucket

UNFINISHED = ".unfinished"  # the mark of a directory that is not finished
STORE_FILE = "store.json"  # only a store has it
# Directories that hold their own files and no others, each with the names it is known by.
_CLOSED = {
    "store": [STORE_FILE],
    "anchor or model": ["flexolmo.json", "weights"],
    "contribution": ["manifest.json", "expert.safetensors"],
}


def is_whole(directory: Path) -> bool:
    """Whether a directory made by `new_directory` is there and finished."""
    return directory.exists() and not (in_bucket(directory) and (directory / UNFINISHED).exists())


def check_new(out: Path, *, inside_a_store: bool = False) -> None:
    """Raises UserError unless `out` does not exist or is an empty directory, and not the one that
    this process works in; and inside what holds exactly its own files."""
    if is_whole(out) and (not out.is_dir() or children(out)):
        raise UserError(f"{out} exists and is not empty; give a new or empty directory")
    if not in_bucket(out) and out.is_dir() and out.samefile("."):
        raise UserError(
            f"{out} is the working directory, whose place nothing can take; give a new"
            " directory in it"
        )
    if not inside_a_store:
        _check_outside(out)


def check_new_file(out: Path) -> None:
    """Raises UserError where anything lies at `out`, a link among it; and inside what holds exactly
    its own files."""
    if out.exists() if in_bucket(out) else os.path.lexists(out):
        raise UserError(f"{out} exists; give a new file")
    _check_outside(out)


def _check_outside(out: Path) -> None:
    for parent in absolute(out).parents:
        for what, names in _CLOSED.items():
            if all((parent / name).exists() for name in names):
                raise UserError(
                    f"{out} lies inside the {what} {parent}; give a place outside of it"
                )
