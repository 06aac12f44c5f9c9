"""What a disk is asked for, in order: what a power cut at any moment would leave follows from
it."""

import os
from collections.abc import Iterable
from pathlib import Path

import pytest

from flexolmo_jax.storage import files


class Recorder:
    """Records every sync that reaches the system, by inode, and every rename and link that files.py
    announces, by name."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.events: list[tuple[str, int | Path]] = []
        fsync = os.fsync

        def synced(descriptor: int) -> None:
            fsync(descriptor)
            self.events.append(("sync", os.fstat(descriptor).st_ino))

        def observe(operation: str, path: Path) -> None:
            if operation in ("rename", "link"):
                self.events.append(("name", path))

        monkeypatch.setattr(os, "fsync", synced)
        monkeypatch.setattr(files, "observer", observe)

    @property
    def renamed(self) -> list[Path]:
        return [path for _, path in self.events if isinstance(path, Path)]

    def expect_durable(self, path: Path, files: Iterable[Path] | None = None) -> None:
        """Fails unless all of `path`, or these `files`, was synced before it got its name the last
        time, and the name's folder after."""
        named = max(place for place, event in enumerate(self.events) if event == ("name", path))
        before, after = self.events[:named], self.events[named:]
        for each in files or (path, *path.rglob("*")):
            assert (
                "sync",
                each.stat().st_ino,
            ) in before, f"{each} was not synced before {path} had its name"
        assert (
            "sync",
            path.parent.stat().st_ino,
        ) in after, f"the folder of {path} was not synced after"
