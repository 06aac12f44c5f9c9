"""What lies in a folder, at any depth: what is to be read there, and why the rest is not."""

import os
import stat
from pathlib import Path
from typing import NamedTuple

from flexolmo_jax.errors import UserError

from .paths import LOCK, in_bucket, is_clutter, listing, reason


class Below(NamedTuple):
    """What a directory holds.

    `problem`: why it is not read, and "" for none. `shown`: its name; of what is in a hidden
    folder, that folder's.
    """

    path: Path
    problem: str
    shown: str


def below(directory: Path) -> list[Below]:
    """All files and links at any depth, sorted by path: the same order on a disk and in a bucket.
    Locks do not count.

    Raises UserError where the directory itself cannot be read.
    """
    found: dict[str, str] = {}
    if in_bucket(directory):
        for name, file in listing(directory, clutter=True).items():
            if not (name + "/").endswith("//"):  # an object that stands for a folder
                found[name] = "" if file.size else "empty"
    else:

        def refuse(error: OSError) -> None:
            name = os.path.relpath(error.filename, directory)
            if name == os.curdir:
                raise UserError(f"cannot read {directory}: {reason(error)}") from error
            found[f"{name}/"] = "unreadable"

        for folder, folders, names in os.walk(directory, onerror=refuse):
            links = (name for name in folders if os.path.islink(os.path.join(folder, name)))
            for name in (*names, *links):
                path = os.path.join(folder, name)
                found[os.path.relpath(path, directory)] = _problem(path)
    kept = ((name, problem) for name, problem in found.items() if not name.endswith(LOCK))
    ordered = sorted(kept, key=lambda item: item[0].split("/"))
    return [_below(directory, name, problem) for name, problem in ordered]


def _below(directory: Path, name: str, problem: str) -> Below:
    *folders, last = name.split("/")
    hidden = next((folder for folder in folders if _is_hidden(f"{folder}/")), None)
    if hidden is not None or _is_hidden(last):
        return Below(directory / name, "hidden", last if hidden is None else f"{hidden}/")
    return Below(directory / name, problem, last or f"{folders[-1]}/")


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or is_clutter(name)


def _problem(path: str) -> str:
    """Why a path is not read; "" for none."""
    try:
        status = os.stat(path)
    except OSError:
        return "broken links" if os.path.islink(path) else "unreadable"
    if stat.S_ISDIR(status.st_mode):
        return "links to folders"
    if not stat.S_ISREG(status.st_mode):
        return "no regular files"
    if not os.access(path, os.R_OK):
        return "unreadable"
    return "" if status.st_size else "empty"


def files_below(directory: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """The files at any depth with one of these suffixes, sorted, without hidden ones."""
    readable = (entry for entry in below(directory) if entry.problem in ("", "empty"))
    return [entry.path for entry in readable if ends_in(entry.path, suffixes)]


def ends_in(path: Path, suffixes: tuple[str, ...]) -> bool:
    """Whether a name ends in one of these, in capitals or not."""
    return path.name.lower().endswith(suffixes)
