"""Copies of what is published, and changes to them that keep the digests right."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tensorstore as ts

from flexolmo_jax.description import write_description


def copied(source: Path, to: Path) -> Path:
    """With files that may be changed."""
    shutil.copytree(source, to)
    for file in to.rglob("*"):
        if file.is_file():
            file.chmod(0o644)
    return to


def redescribed(path: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """With another description, sealed anew: what a forger does first."""
    description = json.loads((path / "flexolmo.json").read_text())
    change(description)
    write_description(path, description)
    return path


def written(model: Path, array: str, at: tuple[int, ...], value: float) -> None:
    """Another number in an array, with right checksums: what plain TensorStore writes."""
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{model}/weights/{array}"}}
    ts.open(spec, open=True).result()[at].write(value).result()
