"""Writing a composition's weights: a plan of all files first, then one file after the other.

All weights have one layout (storage/weights.py), so each file can be linked, cloned or copied as it
is. Only two things go through memory: files between a disk and a bucket, and the arrays `instead`.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from flexolmo_jax.errors import UserError
from flexolmo_jax.storage.paths import copy_objects, in_bucket
from flexolmo_jax.storage.placing import WAYS, place
from flexolmo_jax.storage.weights import Box, Layout, Reader, ShardIndex, Writer


class StoredExpert(NamedTuple):
    """An expert in a directory of weights, by its place on the expert axis."""

    weights: Path
    index: int


class PlannedFile(NamedTuple):
    """One file to write, a shard of an array, and the shard of other weights that has its bytes."""

    path: str  # of the array
    index: ShardIndex  # of the shard
    origin: Path | None  # the other weights; None: the shard comes from memory
    origin_index: ShardIndex  # of the shard there


def plan(
    target: Mapping[str, Layout],
    trunk: Path,
    experts: Sequence[StoredExpert],
    given: Sequence[str] = (),
) -> Iterator[PlannedFile]:
    """Every file of the target.

    The arrays `given` come from memory, and so do biases that an expert does not have.
    """
    readers = {expert.weights: Reader(expert.weights) for expert in experts}
    for path, layout in target.items():
        for index in layout.indices():
            if path in given:
                yield PlannedFile(path, index, None, index)
            elif not path.startswith("experts/"):
                yield PlannedFile(path, index, trunk, index)
            else:
                layer, expert, *rest = index
                stored = experts[expert]
                origin = stored.weights if readers[stored.weights].has(path) else None
                yield PlannedFile(path, index, origin, (layer, stored.index, *rest))


def materialize(
    directory: Path,
    target: Mapping[str, Layout],
    trunk: Path,
    experts: Sequence[StoredExpert],
    ways: Sequence[str] = WAYS,
    instead: Mapping[str, np.ndarray] | None = None,
) -> dict[str, int]:
    """Writes weights with these experts in this order; returns how many files came which way.

    Args:
        directory: where the weights are written.
        target: the layout of every array.
        trunk: the weights whose trunk is taken.
        experts: each expert's weights.
        ways: "link", "reflink" and "copy" take whole files; "stream" goes through memory, a shard
            at a time. The first way that works is taken.
        instead: arrays by path that are written in place of the stored ones.

    Raises:
        UserError: for data that cannot be read, and where a bucket has none of the ways.
    """
    if in_bucket(directory) and not {"copy", "stream"} & set(ways):
        raise UserError(
            f"{directory} is in a bucket, which has no {' and no '.join(ways)}; try --by auto"
        )
    instead, taken = instead or {}, Counter[str]()
    readers = {origin: Reader(origin) for origin in (trunk, *(one.weights for one in experts))}
    copies: list[tuple[Path, Path]] = []  # from bucket to bucket, made at the end, many at once
    with Writer(directory, target) as writer:
        for path, index, origin, origin_index in plan(target, trunk, experts, tuple(instead)):
            layout = target[path]
            if path in instead:
                writer.write(path, index, instead[path][layout.box(index)])
            elif origin is None:  # a bias that the expert does not have
                writer.write(path, index, np.zeros(layout.shard, layout.dtype))
            elif "stream" in ways or in_bucket(origin) != in_bucket(directory):
                box = _box_there(layout, index, origin_index)
                writer.write(path, index, readers[origin].read(path, box))
                taken["stream"] += 1
            else:
                file, copy = readers[origin].file(path, origin_index), writer.file(path, index)
                if in_bucket(directory):
                    copies.append((file, copy))
                    taken["server-side copy"] += 1
                else:
                    taken[place(file, copy, ways)] += 1
        copy_objects(copies)
    return dict(taken)


def _box_there(layout: Layout, index: ShardIndex, origin_index: ShardIndex) -> Box:
    """A shard's part of the array in the other weights, where the expert may have another index."""
    box = layout.box(index)
    if origin_index == index:
        return box
    expert = origin_index[1]
    return (box[0], slice(expert, expert + 1), *box[2:])
