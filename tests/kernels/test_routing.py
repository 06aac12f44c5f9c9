"""Routing: softmax over all experts, then top-k without renormalising; excluded experts leave no trace."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexolmo_jax.kernels.routing import dense_weights, route_topk

N, E = 16, 5
ACTIVE = st.integers(1, E)
ALLOWED = st.lists(st.booleans(), min_size=E, max_size=E).filter(any).map(np.array)
# Few distinct values, so that ties are common.
LOGITS = st.lists(st.integers(-6, 6), min_size=N * E, max_size=N * E).map(lambda v: np.array(v, np.float32).reshape(N, E) / 2)


@settings(max_examples=60, deadline=None)
@given(LOGITS, ACTIVE, ALLOWED)
def test_routing_follows_its_definition(logits, active, allowed):
    routing = route_topk(jnp.asarray(logits), active, jnp.asarray(allowed))
    weights, ids, log_z = (np.asarray(part) for part in routing)
    for n in range(N):
        p = np.where(allowed, np.exp(logits[n], dtype=np.float64), 0)
        total = p.sum()
        best = sorted(np.flatnonzero(allowed), key=lambda e: (-logits[n, e], e))[:active]  # the lowest index wins ties
        assert ids[n, : len(best)].tolist() == best
        np.testing.assert_allclose(weights[n, : len(best)], p[best] / total, rtol=1e-5)
        assert not weights[n, len(best) :].any()  # fewer allowed than active: the excess slots weigh nothing
        np.testing.assert_allclose(log_z[n], np.log(total), rtol=1e-5, atol=1e-6)


@settings(max_examples=20, deadline=None)
@given(LOGITS, ACTIVE, ALLOWED)
def test_the_weights_of_every_expert_are_those_of_the_chosen_and_zero_elsewhere(logits, active, allowed):
    routing = route_topk(jnp.asarray(logits), active, jnp.asarray(allowed))
    dense = np.asarray(dense_weights(routing, E))
    assert not dense[:, ~allowed].any()
    assert ((dense > 0).sum(1) == min(active, allowed.sum())).all()
    np.testing.assert_array_equal(np.sort(dense)[:, E - active :], np.sort(routing.weights))


@settings(max_examples=20, deadline=None)
@given(LOGITS, ACTIVE, ALLOWED, st.sampled_from([np.nan, np.inf, -np.inf, 1e30]))
def test_the_logit_of_an_excluded_expert_changes_no_bit(logits, active, allowed, poison):
    clean = route_topk(jnp.asarray(logits), active, jnp.asarray(allowed))
    poisoned = route_topk(jnp.asarray(np.where(allowed, logits, poison).astype(np.float32)), active, jnp.asarray(allowed))
    chosen = np.asarray(clean.weights) > 0
    np.testing.assert_array_equal(clean.weights, poisoned.weights)
    np.testing.assert_array_equal(clean.log_z, poisoned.log_z)
    np.testing.assert_array_equal(np.asarray(clean.ids)[chosen], np.asarray(poisoned.ids)[chosen])


def test_weights_are_float32_and_equal_those_of_the_same_logits_in_float32():
    logits = jax.random.normal(jax.random.key(0), (N, E)).astype(jnp.bfloat16)
    low, high = route_topk(logits, 2), route_topk(logits.astype(jnp.float32), 2)
    assert low.weights.dtype == low.log_z.dtype == jnp.float32
    np.testing.assert_array_equal(low.weights, high.weights)


def test_adding_one_number_to_all_logits_changes_no_weight():
    logits = jax.random.normal(jax.random.key(0), (N, E))
    shift = 40 * jax.random.normal(jax.random.key(1), (N, 1))
    np.testing.assert_allclose(route_topk(logits + shift, 2).weights, route_topk(logits, 2).weights, rtol=2e-5)


@pytest.mark.parametrize("excluded", [(), (1, 3)])
def test_the_gradient_is_that_of_a_softmax_over_the_allowed_experts(excluded):
    allowed = jnp.asarray([e not in excluded for e in range(E)])
    logits, cotangent = jax.random.normal(jax.random.key(0), (N, E)), jax.random.normal(jax.random.key(1), (N, E))

    def value(logits):
        routing = route_topk(logits, 2, allowed)
        return jnp.sum(dense_weights(routing, E) * cotangent) + jnp.sum(routing.log_z**2)

    p = np.where(allowed, np.exp(logits), 0).astype(np.float64)
    log_z = np.log(p.sum(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    chosen = np.where(p >= np.sort(p)[:, -2:-1], cotangent, 0)
    expected = p * (chosen - (p * chosen).sum(1, keepdims=True) + 2 * log_z)
    np.testing.assert_allclose(jax.grad(value)(logits), expected, atol=1e-5)
