"""Tokens that travel to their experts' devices: values and gradients are those of one device,
however many choose the same expert, and no token goes where none of its experts are."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexolmo_jax.config import MeshConfig
from flexolmo_jax.kernels.moe_ffn import sparse_experts
from flexolmo_jax.kernels.route import Routing
from flexolmo_jax.model import dispatch
from flexolmo_jax.runtime import sharding

N, D, F, E, A = 64, 8, 16, 8, 3
MESHES = {
    "expert 8": MeshConfig(data=1, fsdp=1, expert=8),
    "fsdp 2 x expert 4": MeshConfig(data=1, fsdp=2, expert=4),
    "tensor 2 x expert 4": MeshConfig(data=1, fsdp=1, tensor=2, expert=4),
}


def normal(seed: int, *shape: int) -> jax.Array:
    return 0.5 * jax.random.normal(jax.random.key(seed), shape)


X, MATRICES = normal(0, N, D), (normal(1, E, D, F), normal(2, E, D, F), normal(3, E, F, D))


def routing(popular: int | None, silent: int = 0) -> Routing:
    """Every token chooses expert `popular` and random others; a `silent`-th of slots is unused."""
    random = np.random.default_rng(7)
    ids = np.stack([random.permutation(E)[:A] for _ in range(N)])
    if popular is not None:
        ids[:, 0] = popular
        ids[:, 1:] = (popular + 1 + np.stack([random.permutation(E - 1)[: A - 1] for _ in ids])) % E
    probabilities = random.uniform(0.1, 1, (N, A)).astype(np.float32)
    if silent:
        probabilities.reshape(-1)[::silent] = 0
    return Routing(jnp.asarray(probabilities), jnp.asarray(ids), jnp.zeros(N))


def value_and_gradients(mesh: sharding.Mesh | None, chosen: Routing, matrices=MATRICES) -> Any:
    run = sharding.over_experts(mesh, functools.partial(dispatch.run_chosen, "auto"))

    def loss(x, probabilities, matrices):
        y = run(((x, chosen._replace(probabilities=probabilities)), None), *matrices)
        return jnp.sum(jnp.sin(y)), y

    how = {"argnums": (0, 1, 2), "has_aux": True}
    (_, y), gradients = jax.jit(jax.value_and_grad(loss, **how))(X, chosen.probabilities, matrices)
    return y, *jax.tree.leaves(gradients)


def most_to_one_device(mesh: sharding.Mesh, chosen: Routing) -> int:
    """The most slots that one device has for another."""
    devices = mesh.shape["expert"]
    own = np.asarray(chosen.ids // (E // devices)).reshape(sharding.devices_of_batch(mesh), -1)
    return max(np.bincount(ids, minlength=devices).max() for ids in own)


@pytest.mark.parametrize(
    ("mesh", "popular", "silent", "rounds"),
    [
        ("expert 8", None, 0, 1),
        ("expert 8", E - 1, 4, 3),
        ("fsdp 2 x expert 4", 0, 0, 3),
        ("tensor 2 x expert 4", 0, 4, 3),
    ],
)
def test_values_and_gradients_are_those_of_one_device(mesh, popular, silent, rounds, monkeypatch):
    """In one round, and in several, where a round holds a few slots for each device and all tokens
    choose the same expert."""
    spread, chosen = sharding.make_mesh(MESHES[mesh]), routing(popular, silent)
    if rounds > 1:
        monkeypatch.setattr(dispatch, "FEWEST", 2)
        monkeypatch.setattr(dispatch, "SLACK", 0.5)
    own = N // sharding.devices_of_batch(spread)
    devices = spread.shape["expert"]
    size = dispatch.round_size(own, A, devices, E // devices)
    assert -(-most_to_one_device(spread, chosen) // size) >= rounds
    expected = value_and_gradients(None, chosen)
    for got, want in zip(value_and_gradients(spread, chosen), expected, strict=True):
        assert np.linalg.norm(got - want) <= 1e-5 * np.linalg.norm(want)


def test_on_one_device_it_is_the_sparse_mixture():
    chosen = routing(0, 5)
    y = value_and_gradients(None, chosen)[0]
    np.testing.assert_array_equal(y, jax.jit(sparse_experts)(X, chosen, *MATRICES))


def test_an_expert_that_nobody_chose_is_not_read(monkeypatch):
    monkeypatch.setattr(dispatch, "FEWEST", 2)
    chosen = routing(0)
    others = chosen._replace(ids=jnp.where(chosen.ids == 3, 4, chosen.ids))
    poisoned = tuple(m.at[3].set(jnp.nan) for m in MATRICES)
    mesh = sharding.make_mesh(MESHES["expert 8"])
    for got in value_and_gradients(mesh, others, poisoned):
        assert np.isfinite(got).all()


@pytest.mark.parametrize(
    ("tokens", "active", "devices", "experts", "size"),
    [
        (2, 5, 8, 8, 10),  # decoding: all of a device's slots may go to one device
        (2, 5, 64, 1, 2),  # a token chooses an expert once
        (8192, 5, 8, 8, 6400),  # 1.25 times an even share
        (8192, 5, 64, 1, 896),  # and then whole blocks
        (8192, 4, 2, 4, 20480),
    ],
)
def test_the_size_of_a_round(tokens, active, devices, experts, size):
    assert dispatch.round_size(tokens, active, devices, experts) == size


def test_tokens_are_exchanged_and_not_gathered():
    mesh = sharding.make_mesh(MESHES["expert 8"])
    run = sharding.over_experts(mesh, functools.partial(dispatch.run_chosen, "auto"))
    text = jax.jit(run).lower(((X, routing(None)), None), *MATRICES).as_text()
    size = dispatch.round_size(N // 8, A, 8, 1)
    assert f"tensor<{8 * size}x{D}xf32>) -> tensor<{8 * size}x{D}xf32>" in text
    assert "stablehlo.all_to_all" in text
    assert "stablehlo.all_gather" not in text and "stablehlo.reduce_scatter" not in text
