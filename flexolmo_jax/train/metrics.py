"""A run's metrics: one JSON object a line in metrics.jsonl, and the same numbers as TensorBoard events."""

import json
from pathlib import Path
from types import TracebackType
from typing import Any

from tensorboardX import SummaryWriter

from flexolmo_jax.files import write_text


class MetricsWriter:
    """A context manager. Rows after `step`, left by a run that was killed past its last checkpoint, are cut off first."""

    def __init__(self, directory: Path, step: int):
        path = directory / "metrics.jsonl"
        kept = [line for line in read_lines(path) if json.loads(line)["step"] <= step]
        write_text(path, "".join(line + "\n" for line in kept))
        self._file = path.open("a", buffering=1)
        self._events = SummaryWriter(str(directory / "tensorboard"), purge_step=step + 1, flush_secs=30)

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()
        self._events.close()

    def write(self, step: int, values: dict[str, Any]) -> None:
        """`values`: numbers, or nested dicts of numbers."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in _scalars(values):
            self._events.add_scalar(name, value, step)


def read_lines(path: Path) -> list[str]:
    """Whole lines only: the last may have been cut by a kill."""
    if not path.exists():
        return []
    *lines, _ = path.read_text().split("\n")
    return lines


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """All rows of a run, in the order written."""
    return [json.loads(line) for line in read_lines(directory / "metrics.jsonl")]


def _scalars(values: dict[str, Any], prefix: str = ""):
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _scalars(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)):
            yield prefix + name, value
