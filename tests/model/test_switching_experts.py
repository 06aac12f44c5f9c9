"""The whole model with experts switched off, permuted or taken away."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexolmo_jax.kernels.route import route_topk
from flexolmo_jax.model import (
    CachedContext,
    Choices,
    Params,
    decode,
    empty_cache,
    forward,
    moe,
)
from tests.model.test_transformer import (
    CONFIG,
    DENSE,
    TOKENS,
    B,
    E,
    T,
    assert_close,
    jitted,
    random_params,
)


def on_experts(params: Params, change) -> Params:
    """The parameters with `change` applied to every expert leaf, [L, E, ...]."""
    return params | {"experts": jax.tree.map(change, params["experts"])}


@settings(max_examples=10)
@given(st.sets(st.integers(1, E - 1), min_size=1), st.sampled_from([2, E]))
def test_a_masked_expert_has_no_influence(excluded, active):
    """With its FFN, row and bias replaced by NaN no bit of any logit changes, dispatched sparsely
    (2 active) or densely (all)."""
    gone = jnp.asarray(sorted(excluded))
    allowed = jnp.ones(E, bool).at[gone].set(False)
    poisoned = on_experts(random_params(), lambda leaf: leaf.at[:, gone].set(jnp.nan))
    expected = jitted(CONFIG, random_params(), TOKENS, active=active, allowed=allowed)
    got = jitted(CONFIG, poisoned, TOKENS, active=active, allowed=allowed)
    assert np.isfinite(expected.logits).all()
    jax.tree.map(np.testing.assert_array_equal, got, expected)


@pytest.mark.parametrize("active", [2, E])
def test_a_masked_expert_has_no_influence_on_decoding(active):
    """Nor where each layer reaches into the matrices of all layers."""
    gone, slots = 2, jnp.arange(T)
    poisoned = on_experts(random_params(), lambda leaf: leaf.at[:, gone].set(jnp.nan))
    allowed = jnp.ones(E, bool).at[gone].set(False)
    mask = jnp.broadcast_to(slots <= slots[:, None], (B, T, T))
    positions = jnp.broadcast_to(slots, (B, T))
    choices = Choices(active, allowed)
    step = jax.jit(functools.partial(decode, choices=choices), static_argnums=0)
    expected, got = (
        step(CONFIG, params, TOKENS, positions, CachedContext(mask, empty_cache(CONFIG, B, T), 0))
        for params in (random_params(), poisoned)
    )
    jax.tree.map(np.testing.assert_array_equal, got, expected)
    assert_close(
        got.logits, jitted(CONFIG, random_params(), TOKENS, active=active, allowed=allowed).logits
    )


@pytest.mark.parametrize("active", [2, E])
def test_switching_experts_compiles_nothing(active):
    run: Any = jax.jit(functools.partial(forward, CONFIG, active=active))
    outputs = [
        run(random_params(), TOKENS, allowed=jnp.arange(E) != excluded).logits
        for excluded in range(1, E)
    ]
    assert run._cache_size() == 1
    assert all(np.any(outputs[0] != other) for other in outputs[1:])


@pytest.mark.parametrize("active", [2, E])
def test_masking_an_expert_equals_dropping_it(active):
    smaller = dataclasses.replace(CONFIG, n_experts=E - 1)
    dropped = on_experts(random_params(), lambda leaf: jnp.delete(leaf, 2, axis=1))
    masked = jitted(CONFIG, random_params(), TOKENS, active=active, allowed=jnp.arange(E) != 2)
    assert_close(masked.logits, jitted(smaller, dropped, TOKENS, active=min(active, E - 1)).logits)


def test_permuting_the_experts_changes_no_logit():
    order = jnp.asarray([0, 3, 1, 2])
    expected = jitted(CONFIG, random_params(), TOKENS)
    permuted = jitted(CONFIG, on_experts(random_params(), lambda leaf: leaf[:, order]), TOKENS)
    assert_close(permuted.logits, expected.logits)
    assert_close(permuted.router.probabilities, expected.router.probabilities[..., order])


def test_a_merged_model_with_every_expert_masked_is_the_anchor():
    anchor = on_experts(random_params(), lambda leaf: leaf[:, :1])
    del anchor["experts"]["bias"]
    alone = jitted(CONFIG, random_params(), TOKENS, allowed=jnp.arange(E) == 0)
    assert_close(alone.logits, jitted(DENSE, anchor, TOKENS).logits, 1e-6)
    assert (alone.router.probabilities[..., 0] == 1).all()


def test_the_router_of_a_dense_model_has_no_influence():
    params = random_params(DENSE)
    other = params | {"experts": params["experts"] | {"row": 9 * params["experts"]["row"] + 1}}
    np.testing.assert_array_equal(
        jitted(DENSE, other, TOKENS).logits, jitted(DENSE, params, TOKENS).logits
    )


def test_a_pair_is_the_merged_model_of_its_two_experts():
    pair = random_params(DENSE, pair=True)
    both = {
        name: jnp.concatenate([pair["experts"][name], leaf], 1)
        for name, leaf in pair["expert"].items()
        if name != "bias"
    }
    merged = {
        "trunk": pair["trunk"],
        "experts": both | {"bias": jnp.pad(pair["expert"]["bias"], ((0, 0), (1, 0)))},
    }
    config = dataclasses.replace(CONFIG, n_experts=2)
    assert_close(jitted(DENSE, pair, TOKENS).logits, jitted(config, merged, TOKENS).logits, 1e-6)


def test_renormalising_the_chosen_probabilities_changes_nothing(monkeypatch):
    """The norm after the mixture cancels a common factor (up to its eps): models that renormalise
    need no code of their own."""

    def renormalised(*given, **more):
        routing = route_topk(*given, **more)
        total = jnp.sum(routing.probabilities, axis=-1, keepdims=True)
        return routing._replace(probabilities=routing.probabilities / total)

    expected = forward(CONFIG, random_params(), TOKENS)
    monkeypatch.setattr(moe, "route_topk", renormalised)
    got = forward(CONFIG, random_params(), TOKENS)
    assert np.abs(got.router.probabilities - expected.router.probabilities).max() > 0.1
    assert_close(got.logits, expected.logits, 1e-4)
