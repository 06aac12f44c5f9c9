"""A contribution's expert on devices: the host's memory holds one of its tensors at a time."""

import functools
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np

from flexolmo_jax.artifact import Placement
from flexolmo_jax.config import ModelConfig
from flexolmo_jax.integrity import leaf_of
from flexolmo_jax.model import Params


def place_expert(
    tensors: Iterable[tuple[str, np.ndarray]], config: ModelConfig, placement: Placement
) -> Params:
    """The parameters [L, 1, ...] of a pair's new expert.

    Args:
        tensors: as `Contribution.tensors` gives them.
        config: of the anchor.
        placement: where each parameter of the pair goes.
    """
    expert: Params = {}
    for name, tensor in tensors:
        path, layer = leaf_of(name)
        leaf = path.removeprefix("experts/")
        if leaf not in expert:
            shape = (config.n_layers, 1, *tensor.shape)
            device = placement(f"expert/{leaf}", shape)
            expert[leaf] = jnp.zeros(shape, tensor.dtype, device=device)
        expert[leaf] = _with_layer(expert[leaf].sharding)(expert[leaf], tensor, layer)
        jax.block_until_ready(expert[leaf])  # after this, the tensor is no longer needed
    return expert


@functools.lru_cache
def _with_layer(
    sharding: jax.sharding.Sharding,
) -> Callable[[jax.Array, np.ndarray, int], jax.Array]:
    """Puts a tensor into a layer of a parameter, in place."""
    put = jax.lax.dynamic_update_index_in_dim
    return jax.jit(
        lambda parameter, tensor, layer: put(parameter, tensor[None], layer, 0),
        donate_argnums=0,
        out_shardings=sharding,
    )
