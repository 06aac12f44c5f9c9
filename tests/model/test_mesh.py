"""One model on many devices: loss and every gradient as on one, however batch, parameters and
experts are spread."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexolmo_jax.config import MeshConfig, ModelConfig, OptimConfig
from flexolmo_jax.kernels import Kernels
from flexolmo_jax.model import Params, forward, init_params, logical_axes
from flexolmo_jax.model.tree import flatten
from flexolmo_jax.runtime import sharding
from flexolmo_jax.train.losses import loss_sums
from tests.families import OTHERS, as_family, distinct_first

B, T, V = 8, 24, 64
RNG = np.random.default_rng(0)
TOKENS = jnp.asarray(RNG.integers(V, size=(B, T)))
SEGMENTS = jnp.asarray(np.sort(RNG.integers(1, 4, size=(B, T)), axis=1))
TARGETS = jnp.ones((B, T), bool)
MESHES = {
    "fsdp 8": MeshConfig(fsdp=8),
    "data 4 x expert 2": MeshConfig(data=4, fsdp=1, expert=2),
    "data 2 x expert 4": MeshConfig(data=2, fsdp=1, expert=4),
    "fsdp 2 x tensor 2 x expert 2": MeshConfig(fsdp=2, tensor=2, expert=2),
    "fsdp 4 x tensor 2": MeshConfig(fsdp=4, tensor=2),
    "data 2 x fsdp 2 x expert 2": MeshConfig(data=2, fsdp=2, expert=2),
}


def model(experts: int, active: int, family: str = "olmo2") -> ModelConfig:
    config = ModelConfig(
        vocab_size=V,
        d_model=32,
        n_layers=2,
        n_heads=4,
        n_kv_heads=2,
        d_ffn=48,
        n_experts=experts,
        n_active=active,
        init_std=0.2,
    )
    return as_family(config, family)


@functools.cache
def parameters(config: ModelConfig, pair: bool = False) -> Params:
    params = init_params(config, jax.random.key(1), pair=pair)
    for branch in (
        params[name] for name in ("experts", "expert") if "bias" in params.get(name, {})
    ):
        branch["bias"] = -0.3 * jax.random.uniform(jax.random.key(2), branch["bias"].shape)
    return params


def value_and_gradients(
    config: ModelConfig, params: Params, mesh=None, allowed=None, kernels: Kernels = "auto"
):
    def loss(params, tokens, segments, targets):
        how: dict[str, Any] = {"mesh": mesh, "kernels": kernels}
        output = forward(config, params, tokens, segments, allowed=allowed, **how)
        sums = loss_sums(
            output, tokens, targets, OptimConfig(router_z_loss=0.1, load_balance=0.1), mesh=mesh
        )
        return sums.total / B / T, output.router.probabilities

    batch = [TOKENS, SEGMENTS, TARGETS]
    if mesh is not None:
        axes = flatten(logical_axes(config, pair="expert" in params))
        params = jax.tree_util.tree_map_with_path(
            lambda path, a: jax.device_put(
                a, sharding.parameter_sharding(mesh, axes["/".join(k.key for k in path)], a.shape)
            ),
            params,
        )
        batch = jax.device_put(batch, sharding.batch_sharding(mesh))
    value_and_grad = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (value, probabilities), gradients = value_and_grad(params, *batch)
    return value, probabilities, {path: np.asarray(a) for path, a in flatten(gradients).items()}


@functools.cache
def on_one_device(config: ModelConfig, pair: bool = False):
    return value_and_gradients(config, parameters(config, pair))


@pytest.mark.parametrize(
    ("mesh", "experts", "active", "kernels"),
    [
        ("fsdp 2 x tensor 2 x expert 2", 3, 2, "auto"),
        ("fsdp 8", 3, 2, "pallas"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("data 4 x expert 2", 3, 2, "auto"),
                ("data 2 x expert 4", 3, 3, "auto"),
                *((mesh, 3, 2, "auto") for mesh in ("fsdp 8", "data 2 x expert 4")),
                *(
                    (mesh, 3, 2, "auto")
                    for mesh in ("fsdp 4 x tensor 2", "data 2 x fsdp 2 x expert 2")
                ),
                ("data 2 x expert 4", 4, 2, "auto"),
                ("fsdp 2 x tensor 2 x expert 2", 3, 2, "pallas"),
            )
        ),
    ],
)
def test_a_mixture_has_the_same_gradients_on_every_mesh(mesh, experts, active, kernels):
    """3 experts do not divide over 2 or 4 devices: empty ones fill up the last."""
    config = model(experts, active)
    value, probabilities, gradients = value_and_gradients(
        config, parameters(config), sharding.make_mesh(MESHES[mesh]), kernels=kernels
    )
    expected, expected_probabilities, expected_gradients = on_one_device(config)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_array_equal(probabilities > 0, expected_probabilities > 0)
    for path, gradient in expected_gradients.items():
        assert np.linalg.norm(gradients[path] - gradient) <= 1e-4 * np.linalg.norm(gradient), path


@pytest.mark.parametrize(
    "mesh",
    [
        pytest.param("fsdp 8", marks=pytest.mark.slow),
        "fsdp 4 x tensor 2",
        "data 2 x fsdp 2 x expert 2",
    ],
)
@pytest.mark.parametrize(
    ("experts", "active", "pair"),
    [(1, 1, False), (1, 1, True), (4, 2, False)],
    ids=["anchor", "pair", "merged"],
)
def test_value_and_gradients_are_those_of_one_device(mesh, experts, active, pair):
    are_those_of_one_device(model(experts, active), mesh, pair)


@pytest.mark.parametrize("family", distinct_first(OTHERS))
@pytest.mark.parametrize(
    ("experts", "active", "pair"),
    [
        pytest.param(1, 1, True, marks=pytest.mark.slow, id="pair"),
        pytest.param(4, 2, False, id="merged"),
    ],
)
def test_every_familys_value_and_gradients_are_those_of_one_device(family, experts, active, pair):
    are_those_of_one_device(model(experts, active, family), "fsdp 2 x tensor 2 x expert 2", pair)


def are_those_of_one_device(config: ModelConfig, mesh: str, pair: bool) -> None:
    value, _, gradients = value_and_gradients(
        config, parameters(config, pair), sharding.make_mesh(MESHES[mesh])
    )
    expected, _, expected_gradients = on_one_device(config, pair)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert gradients.keys() == expected_gradients.keys()
    for path, gradient in expected_gradients.items():
        assert np.linalg.norm(gradients[path] - gradient) <= 1e-5 * np.linalg.norm(gradient), path


def test_experts_lie_where_they_run():
    """Each device holds its own experts; where their number does not divide, the width is spread
    instead."""
    mesh = sharding.make_mesh(MESHES["data 2 x expert 4"])
    axes = logical_axes(model(4, 2))["experts"]["gate"]
    whole = (2, 4, 32, 48)
    assert sharding.parameter_sharding(mesh, axes, whole).shard_shape(whole) == (2, 1, 32, 48)
    uneven = (2, 3, 32, 48)
    assert sharding.parameter_sharding(mesh, axes, uneven).shard_shape(uneven) == (2, 3, 8, 48)


def test_an_excluded_expert_has_no_influence_on_a_mesh():
    config = model(4, 2)
    params, mesh = parameters(config), sharding.make_mesh(MESHES["data 2 x expert 4"])
    poisoned = params | {
        "experts": jax.tree.map(lambda a: a.at[:, 2].set(jnp.nan), params["experts"])
    }
    allowed = jnp.ones(4, bool).at[2].set(False)
    value, _, _ = value_and_gradients(config, poisoned, mesh, allowed)
    expected, _, _ = value_and_gradients(config, params, mesh, allowed)
    np.testing.assert_array_equal(value, expected)
