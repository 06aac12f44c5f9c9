"""Writing weights whose trunk and whose experts lie elsewhere: first a plan, a line for every file,
then its execution.

All sources have one layout (weights.py), so that a file of theirs is a file of ours: it is linked,
cloned or copied as it is. Through memory goes what crosses the border between a disk and a bucket,
and what `instead` says.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from flexolmo_jax.errors import UserError
from flexolmo_jax.storage.paths import copy_objects, in_bucket
from flexolmo_jax.storage.placing import WAYS, place
from flexolmo_jax.storage.weights import Index, Layout, Reader, Writer


class Source(NamedTuple):
    """An expert in a directory of weights."""

    weights: Path
    index: int


class Step(NamedTuple):
    """One file to be written: shard `index` of an array is shard `at` of the same array in other
    weights. None: it comes from memory."""

    path: str
    index: Index
    source: Path | None
    at: Index


def plan(
    target: Mapping[str, Layout], trunk: Path, experts: Sequence[Source], given: Sequence[str] = ()
) -> Iterator[Step]:
    """A step for every file of the target. `given`: arrays that come from memory; so do biases that
    a source does not have."""
    readers = {source.weights: Reader(source.weights) for source in experts}
    for path, layout in target.items():
        for index in layout.indices():
            if path in given:
                yield Step(path, index, None, index)
            elif not path.startswith("experts/"):
                yield Step(path, index, trunk, index)
            else:
                layer, expert, *rest = index
                source = experts[expert]
                has = readers[source.weights].has(path)
                yield Step(
                    path, index, source.weights if has else None, (layer, source.index, *rest)
                )


def compose(
    directory: Path,
    target: Mapping[str, Layout],
    trunk: Path,
    experts: Sequence[Source],
    ways: Sequence[str] = WAYS,
    instead: Mapping[str, np.ndarray] | None = None,
) -> dict[str, int]:
    """Writes weights of these experts, in this order; returns how many files came which way.

    The ways "link", "reflink" and "copy" move whole files; "stream" goes through memory, a shard at
    a time. `instead` has arrays that are written in the place of what lies there. Raises UserError
    for data that cannot be read, and for a way that a bucket has not.
    """
    if in_bucket(directory) and not {"copy", "stream"} & set(ways):
        raise UserError(
            f"{directory} is in a bucket, which has no {' and no '.join(ways)}; try --by auto"
        )
    instead, taken = instead or {}, Counter[str]()
    readers = {
        weights: Reader(weights) for weights in (trunk, *(source.weights for source in experts))
    }
    copies: list[tuple[Path, Path]] = []  # within buckets: many at once
    with Writer(directory, target) as writer:
        for path, index, source, at in plan(target, trunk, experts, tuple(instead)):
            box = target[path].box(index)
            if source is None:
                values = (
                    instead[path][box]
                    if path in instead
                    else np.zeros(target[path].shard, target[path].dtype)
                )
                writer.write(path, index, values)
            elif "stream" in ways or in_bucket(source) != in_bucket(directory):
                if at != index:  # another expert: there may be more of them there than here
                    box = (box[0], slice(at[1], at[1] + 1), *box[2:])
                writer.write(path, index, readers[source].read(path, box))
                taken["stream"] += 1
            elif in_bucket(directory):
                copies.append((readers[source].file(path, at), writer.file(path, index)))
                taken["server-side copy"] += 1
            else:
                taken[place(readers[source].file(path, at), writer.file(path, index), ways)] += 1
        copy_objects(copies)
    return dict(taken)
