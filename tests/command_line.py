"""A verb that must refuse, for tests: how it does, and what it leaves."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flexolmo_jax.cli import main

Fails = Callable[..., str]


@pytest.fixture
def fails(tmp_path, capfd, monkeypatch) -> Fails:
    """`fails("merge", ..., out)`: runs a verb that must refuse, checks how it does, and returns its
    line.

    `tmp_path / "out"` stands for the output's parent directory: whatever is in it before must be
    there afterwards, and no more.
    """
    monkeypatch.setenv("FLEXOLMO_CACHE", str(tmp_path / "cache"))
    (tmp_path / "out").mkdir()

    def run(*command: Any) -> str:
        before = snapshot(tmp_path / "out")
        capfd.readouterr()
        status = main([str(word) for word in command])
        out, err = capfd.readouterr()
        assert (status, out) == (2, ""), err
        ours = [line for line in err.splitlines() if line.startswith("flexolmo: ")]
        assert (
            len(ours) == 1
            and err.endswith(ours[0] + "\n")
            and "Traceback" not in err
            and "WARNING" not in err
        ), err
        assert snapshot(tmp_path / "out") == before
        return ours[0]

    return run


def snapshot(directory: Path) -> dict[str, bytes | None]:
    return {
        str(p.relative_to(directory)): p.read_bytes() if p.is_file() else None
        for p in directory.rglob("*")
    }
