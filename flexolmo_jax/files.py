"""Writing files and directories that are either whole or not there."""

import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flexolmo_jax.errors import UserError


@contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """Yields a temporary directory beside `out` that becomes `out` at the end, or vanishes with any error.

    Raises UserError where `out` holds something already, cannot be made, and for a full disk.
    """
    out = Path(out).resolve()
    check_new(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = out.with_name(f".{out.name}.{uuid.uuid4().hex[:8]}.tmp")
        temporary.mkdir()
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}; choose a place that can be written") from error
    try:
        yield temporary
        for path in temporary.rglob("*"):
            if path.is_file():
                sync(path)
        sync(temporary)
        check_new(out)
        if out.exists():
            out.rmdir()
        os.replace(temporary, out)
        sync(out.parent)
    except Exception as error:
        if is_disk_full(error):
            raise UserError(f"no space left on the disk while writing {out}; nothing was kept; free some and run it again") from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def is_disk_full(error: Exception) -> bool:
    """Whether that is what an error tells. TensorStore and safetensors, which are not Python, give the system's message and no number."""
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or os.strerror(errno.ENOSPC) in str(error)


def check_new(out: Path) -> None:
    """Raises UserError unless `out` does not exist or is an empty directory."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not empty; give a new or empty directory")


def write_text(path: Path, text: str) -> None:
    """Replaces a file in one step."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
