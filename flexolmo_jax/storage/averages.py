"""The mean of a run's checkpoints (`train.average`): their float32 sum in the order of steps, times
1 / N. It is the same bits on devices and in the host's memory."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .checkpoint import Leaves, StepCheckpoints, Tree


def restore_mean(
    checkpoints: StepCheckpoints, key: str, target: Tree, steps: Sequence[int]
) -> Tree:
    """The mean of the branch `key` over these steps, in `target`'s shapes and shardings. Two of
    them are in memory at once. Raises UserError as `StepCheckpoints.restore` does."""
    first, *others = sorted(steps)
    add = jax.jit(lambda a, b: jax.tree.map(jnp.add, a, b), donate_argnums=0)
    total = checkpoints.restore_part(key, target, first)
    for step in others:
        total = add(total, checkpoints.restore_part(key, target, step))
    return jax.tree.map(lambda a: a * _share(steps), total) if others else total


class MeanReader:
    """Reads the mean of leaves. As many are in memory as there are steps."""

    def __init__(
        self, checkpoints: StepCheckpoints, key: str, target: Leaves, steps: Sequence[int]
    ):
        self._readers = [checkpoints.reader(key, target, step) for step in sorted(steps)]

    def read(self, path: str, box: Any) -> np.ndarray:
        """A part of a leaf. Raises UserError as `StepReader.read` does."""
        first, *others = self._readers
        total = first.read(path, box)
        for reader in others:
            total += reader.read(path, box)
        return total * _share(self._readers) if others else total


def _share(all_: Sequence[Any]) -> np.float32:
    return np.float32(1 / len(all_))
