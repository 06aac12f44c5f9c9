"""Digests of files, remembered beside what their file system says of them.

    $FLEXOLMO_CACHE/seen/<digest of a place>.json    {what is said of a file: its SHA-256}

What a file is stays its digest. That its size, times and inode (in a bucket: its generation) are
what they were is only a shortcut past reading it. A file that changed just before it was read is
not remembered: it could change again without another time (git calls that racily clean).
"""

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from flexolmo_jax.errors import UserError
from flexolmo_jax.storage.files import make_folder, write_text
from flexolmo_jax.storage.paths import BUCKETS, absolute, file_system, in_bucket

GRANULARITY = 2 * 10**9  # ns: of the coarsest times of files, FAT's
_SHA256 = re.compile("[0-9a-f]{64}")


def digests_of(
    place: Path, files: Sequence[Path], cache: Path, digest: Callable[[Path], str]
) -> list[str]:
    """The digests of a place's files, in their order: known ones from the cache, others by
    `digest`. A cache that cannot be written remembers nothing."""
    now = time.time_ns()
    record = cache / "seen" / f"{_hash(str(absolute(place)))}.json"
    known, before = _read(record), _stamps(place, files, now)
    found = [known.get(before[file] or "") or digest(file) for file in files]
    after = _stamps(place, files, now)
    kept = {
        stamp: sha256
        for file, sha256 in zip(files, found, strict=True)
        if (stamp := before[file]) is not None and stamp == after[file]
    }
    if kept != known:
        with suppress(OSError, UserError):
            make_folder(record.parent)
            write_text(record, json.dumps(kept))
    return found


def _stamps(place: Path, files: Sequence[Path], now: int) -> dict[Path, str | None]:
    """What is said of each file; None where that could stay the same though the file changes."""
    if not in_bucket(place):
        return {file: _stamp_here(file, os.path.relpath(file, place), now) for file in files}
    try:
        listed = file_system().find(str(place), detail=True)
    except FileNotFoundError:
        listed = {}
    said = {f"{BUCKETS}{name}": info for name, info in listed.items()}
    return {file: _stamp_there(str(file), said.get(str(file), {})) for file in files}


def _stamp_here(file: Path, name: str, now: int) -> str | None:
    try:
        status = file.stat()
    except OSError:
        return None
    if status.st_mtime_ns > now - GRANULARITY:
        return None
    times = status.st_mtime_ns, status.st_ctime_ns
    return _hash(name, status.st_size, status.st_ino, *times)


def _stamp_there(name: str, info: dict[str, object]) -> str | None:
    version = info.get("generation") or info.get("etag")
    return None if version is None else _hash(name, info.get("size"), version)


def _hash(*parts: object) -> str:
    return hashlib.sha256(json.dumps([*map(str, parts)]).encode()).hexdigest()


def _read(record: Path) -> dict[str, str]:
    """What is remembered: nothing where the record is missing or not whole."""
    try:
        found = json.loads(record.read_bytes())
    except (OSError, ValueError):
        return {}
    is_whole = isinstance(found, dict) and all(
        isinstance(value, str) and _SHA256.fullmatch(value) for value in found.values()
    )
    return found if is_whole else {}
