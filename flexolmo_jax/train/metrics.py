"""A run's metrics: entries in metrics.jsonl, one JSON object a line, and the same numbers as
TensorBoard events.

On a disk an entry is written at once. To a bucket entries are added now and then, and before every
checkpoint.
"""

import json
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from tensorboardX import SummaryWriter
from tensorboardX.record_writer import register_writer_factory

from flexolmo_jax.errors import UserError
from flexolmo_jax.runtime.progress import note
from flexolmo_jax.storage.files import append_bytes, write_text
from flexolmo_jax.storage.paths import in_bucket, open_regular, path_of, reason, size_of
from flexolmo_jax.storage.untrusted import read_bytes

METRICS_LIMIT = 1 << 30  # bytes
ENTRY_LIMIT = 1 << 20  # bytes of the last entry
SECONDS = 30.0  # between two additions to an object


class MetricsWriter:
    """A context manager. It first cuts off entries after `step`, which a run that was killed past
    its last checkpoint has left."""

    def __init__(self, directory: Path, step: int):
        self._path = directory / "metrics.jsonl"
        kept = [entry for entry in read_metrics(directory) if entry["step"] <= step]
        write_text(self._path, "".join(json.dumps(entry) + "\n" for entry in kept))
        self._unwritten: list[str] = []
        self._wait = SECONDS if in_bucket(directory) else 0.0
        self._flushed = time.monotonic()
        self._events = SummaryWriter(
            str(directory / "tensorboard"), purge_step=step + 1, flush_secs=30
        )

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.flush()
        self._events.close()

    def write(self, step: int, values: dict[str, Any]) -> None:
        """`values`: numbers, or nested dicts of numbers."""
        self._unwritten.append(json.dumps({"step": step, **values}) + "\n")
        if time.monotonic() - self._flushed >= self._wait:
            self.flush()
        for name, value in _scalars(values):
            self._events.add_scalar(name, value, step)

    def flush(self) -> None:
        """Call it before a checkpoint is saved: a run that resumes there does not repeat the steps
        of these entries."""
        if self._unwritten:
            append_bytes(self._path, "".join(self._unwritten).encode())
        self._unwritten, self._flushed = [], time.monotonic()


class _BucketEvents:
    """Where tensorboardX writes events of runs in buckets. Its own writer keeps all of a run's
    events and uploads all of them each time."""

    def __init__(self, path: str):
        self._path, self._content = path_of(path), b""

    def write(self, content: bytes) -> None:
        self._content += content

    def flush(self) -> None:
        """Keeps what cannot be written for the next time: an error would end tensorboardX's thread,
        and the run would wait for it for ever."""
        try:
            if self._content:
                append_bytes(self._path, self._content)
            self._content = b""
        except Exception as error:
            note(f"warning: {self._path} cannot be written: {reason(error)}; the run goes on")

    close = flush


class _BucketEventsFactory:
    def open(self, path: str) -> _BucketEvents:
        return _BucketEvents(path)

    def directory_check(self, path: str) -> None:
        """There are none to make."""


register_writer_factory("gs", _BucketEventsFactory())


def last_entry(directory: Path) -> dict[str, Any] | None:
    """The last entry of a run, whatever the length of the file. A crash may leave lines behind it
    that are none.

    Raises UserError where the file is damaged.
    """
    path = directory / "metrics.jsonl"
    try:
        if not path.exists() or not (size := size_of(path)):
            return None
        with open_regular(path) as file:
            file.seek(max(0, size - ENTRY_LIMIT))
            *lines, _ = file.read(ENTRY_LIMIT).split(b"\n")
        return next(filter(None, map(_entry, reversed(lines))))
    except (OSError, ValueError, StopIteration) as error:
        raise UserError(
            f"{path} is damaged ({reason(error) or 'no entry':.80}); restore it, or remove it"
        ) from None


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """The entries of a run, in the order written.

    Whole lines only: a kill may have cut the last. Each once: an object store may have added it
    twice when a request was repeated. A crash may leave lines that are no entries, and a file that
    cannot be read at all: a note says so, since a log never decides whether work goes on.
    """
    path = directory / "metrics.jsonl"
    if not path.exists():
        return []
    try:
        *lines, _ = read_bytes(path, METRICS_LIMIT).split(b"\n")
    except (OSError, UserError) as error:
        note(f"warning: cannot read {path}: {reason(error):.200}; the run goes on without it")
        return []
    lines = list(dict.fromkeys(lines))
    entries = [entry for entry in map(_entry, lines) if entry is not None]
    if bad := len(lines) - len(entries):
        note(f"warning: {path} has lines that are no entries ({bad}); they are left out")
    return entries


def _entry(line: bytes) -> dict[str, Any] | None:
    """The entry in a line; None where there is none."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    is_entry = isinstance(entry, dict) and isinstance(entry.get("step"), int)
    return entry if is_entry else None


def _scalars(values: dict[str, Any], prefix: str = ""):
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _scalars(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)):
            yield prefix + name, value
