"""What a run trains and its optimiser's state: as shapes, before any of it is made or restored, and
as the first state of a new run."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import Mesh

from flexolmo_jax.config import ModelConfig
from flexolmo_jax.model import Params, init_params, logical_axes
from flexolmo_jax.model.tree import flatten, unflatten
from flexolmo_jax.runtime.sharding import parameter_sharding, replicated


class TrainState(NamedTuple):
    """What changes from step to step and is checkpointed: the trained parameters and their
    optimiser state, nothing frozen."""

    params: Params
    optimizer: Any


def abstract_params(
    model: ModelConfig, mesh: Mesh, *, pair: bool, dtype: Callable[[str], str]
) -> Params:
    """All parameters as ShapeDtypeStructs, each with its sharding. `dtype`: by path."""
    axes = flatten(logical_axes(model, pair=pair))
    make = functools.partial(init_params, model, pair=pair)
    params = {}
    for path, a in flatten(jax.eval_shape(make, jax.random.key(0))).items():
        placed = parameter_sharding(mesh, axes[path], a.shape)
        params[path] = jax.ShapeDtypeStruct(a.shape, dtype(path), sharding=placed)
    return unflatten(params)


def abstract_state(
    optimizer: optax.GradientTransformation, trained: Params, mesh: Mesh
) -> TrainState:
    """The state as ShapeDtypeStructs: moments have the sharding of their parameters (arrays, or
    ShapeDtypeStructs)."""
    state = jax.eval_shape(optimizer.init, trained)
    shardings = optax.tree_utils.tree_map_params(
        optimizer,
        lambda _, parameter: parameter.sharding,
        state,
        trained,
        transform_non_params=lambda _: replicated(mesh),
    )
    moments = jax.tree.map(
        lambda a, sharding: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding),
        state,
        shardings,
    )
    return TrainState(trained, moments)


def first_state(
    optimizer: optax.GradientTransformation, trained: Params, abstract: TrainState
) -> TrainState:
    """The state of a new run. Moments are made where they stay."""
    shardings = jax.tree.map(lambda a: a.sharding, abstract.optimizer)
    return TrainState(trained, jax.jit(optimizer.init, out_shardings=shardings)(trained))
