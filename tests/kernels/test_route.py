"""Routing and the plan: softmax over all experts, then top-k; excluded experts leave no trace; the
plan sorts without a sort.

One suite, inherited by each kind of kernels.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from jax.typing import ArrayLike

from flexolmo_jax.kernels import Kernels
from flexolmo_jax.kernels.route import (
    dense_probabilities,
    dispatch_plan,
    route_topk,
    router_probabilities,
)
from flexolmo_jax.kernels.route.shapes import SHAPES as REAL

N, E = 16, 5
ACTIVE = st.sampled_from([1, 3, E])  # each is a program to compile
ALLOWED = st.lists(st.booleans(), min_size=E, max_size=E).filter(any).map(np.array)
# Few distinct values, so that ties are common.
LOGITS = st.lists(st.integers(-6, 6), min_size=N * E, max_size=N * E).map(
    lambda v: np.array(v, np.float32).reshape(N, E) / 2
)
# tokens, experts, active: below, at and over whole tiles
SHAPES = st.sampled_from([(1, 1, 1), (40, 5, 3), (150, 8, 2), (300, 9, 4)])


def few(examples: int) -> settings:
    # The suite is inherited on purpose: one property, drawn for each kind of kernels.
    return settings(
        max_examples=examples,
        suppress_health_check=[HealthCheck.differing_executors],
    )


@functools.partial(jax.jit, static_argnums=(2, 5))
def routed(logits, allowed, active, dprobabilities, dlog_z, kernels):
    """The routing, and the logits' gradient for given gradients of the probabilities, laid out by
    expert, and of `log_z`."""

    def value(logits):
        routing = route_topk(logits, active, allowed, kernels=kernels)
        dense = dense_probabilities(routing, logits.shape[1])
        return jnp.sum(dense * dprobabilities) + jnp.sum(routing.log_z * dlog_z), routing

    dlogits, routing = jax.grad(value, has_aux=True)(logits)
    return routing, dlogits


plan_of = jax.jit(dispatch_plan, static_argnums=2, static_argnames="kernels")


class RouteSuite:
    """What holds for all kernels."""

    kernels: Kernels

    def route(
        self, logits, active, allowed=None, dprobabilities: ArrayLike = 0.0, dlog_z: ArrayLike = 0.0
    ):
        logits = jnp.asarray(logits)
        allowed = jnp.ones(logits.shape[1], bool) if allowed is None else jnp.asarray(allowed)
        dprobabilities = jnp.broadcast_to(jnp.asarray(dprobabilities, jnp.float32), logits.shape)
        dlog_z = jnp.broadcast_to(jnp.asarray(dlog_z, jnp.float32), logits.shape[:1])
        return jax.tree.map(
            np.asarray, routed(logits, allowed, active, dprobabilities, dlog_z, self.kernels)
        )

    def plan(self, ids, chosen, num_experts):
        return plan_of(
            jnp.asarray(ids, jnp.int32),
            jnp.asarray(chosen),
            num_experts,
            kernels=self.kernels,
        )

    @few(40)
    @given(LOGITS, ACTIVE, ALLOWED)
    def test_routing_follows_its_definition(self, logits, active, allowed):
        (probabilities, ids, log_z), _ = self.route(logits, active, allowed)
        for n in range(N):
            p = np.where(allowed, np.exp(logits[n], dtype=np.float64), 0)
            total = p.sum()
            # the lowest index wins ties
            best = sorted(np.flatnonzero(allowed), key=lambda e: (-logits[n, e], e))[:active]
            assert ids[n, : len(best)].tolist() == best
            np.testing.assert_allclose(probabilities[n, : len(best)], p[best] / total, rtol=1e-5)
            # fewer allowed than active: the excess slots have probability 0
            assert not probabilities[n, len(best) :].any()
            np.testing.assert_allclose(log_z[n], np.log(total), rtol=1e-5, atol=1e-6)

    @few(20)
    @given(LOGITS, ACTIVE, ALLOWED)
    def test_the_ids_are_those_of_lax_top_k(self, logits, active, allowed):
        """In excess slots too: there the gradient needs them to be experts that are excluded, each
        once."""
        (_, ids, _), _ = self.route(logits, active, allowed)
        np.testing.assert_array_equal(
            ids, jax.lax.top_k(jnp.where(allowed, logits, -jnp.inf), active)[1]
        )

    @few(20)
    @given(LOGITS, ACTIVE, ALLOWED)
    def test_the_probabilities_by_expert_are_those_of_the_chosen_and_zero_elsewhere(
        self, logits, active, allowed
    ):
        routing, _ = self.route(logits, active, allowed)
        dense = np.asarray(dense_probabilities(routing, E))
        assert not dense[:, ~allowed].any()
        assert ((dense > 0).sum(1) == min(active, allowed.sum())).all()
        np.testing.assert_array_equal(
            np.sort(dense)[:, E - active :], np.sort(routing.probabilities)
        )

    @few(20)
    @given(LOGITS, ACTIVE, ALLOWED, st.sampled_from([np.nan, np.inf, -np.inf, 1e30]))
    def test_the_logit_of_an_excluded_expert_changes_no_bit_of_value_or_gradient(
        self, logits, active, allowed, poison
    ):
        cotangents = np.cos(np.arange(N * E, dtype=np.float32)).reshape(N, E), 0.5
        clean, dclean = self.route(logits, active, allowed, *cotangents)
        poisoned, dpoisoned = self.route(
            np.where(allowed, logits, poison).astype(np.float32), active, allowed, *cotangents
        )
        jax.tree.map(np.testing.assert_array_equal, (poisoned, dpoisoned), (clean, dclean))

    @few(20)
    @given(LOGITS, ACTIVE, ALLOWED, st.integers(0, 2**31))
    def test_the_gradient_is_that_of_a_softmax_over_the_allowed_experts(
        self, logits, active, allowed, seed
    ):
        rng = np.random.default_rng(seed)
        dprobabilities, dlog_z = rng.normal(size=(N, E)), rng.normal(size=N)
        (_, ids, _), dlogits = self.route(logits, active, allowed, dprobabilities, dlog_z)
        p = np.where(allowed, np.exp(logits), 0).astype(np.float64)
        p /= p.sum(1, keepdims=True)
        g = np.where((ids[:, :, None] == np.arange(E)).any(1), dprobabilities, 0)
        expected = p * (g - (p * g).sum(1, keepdims=True) + dlog_z[:, None])
        np.testing.assert_allclose(dlogits, expected, atol=1e-5)
        assert not np.asarray(dlogits)[:, ~allowed].any()

    def test_no_gradient_of_a_slot_of_probability_zero_leaks(self):
        allowed = np.arange(E) < 2
        dprobabilities = np.where(allowed, 1.0, np.nan)
        logits = np.linspace(-1, 1, N * E, dtype=np.float32).reshape(N, E)

        def value(logits):
            routing = route_topk(logits, E, jnp.asarray(allowed), kernels=self.kernels)
            return routing.probabilities, routing.ids

        probabilities, pullback, ids = jax.vjp(value, jnp.asarray(logits), has_aux=True)
        (got,) = pullback(jnp.asarray(dprobabilities, jnp.float32)[ids])
        (want,) = pullback(jnp.where(probabilities > 0, 1.0, 0.0))
        np.testing.assert_array_equal(got, want)

    def test_many_tokens_are_routed_as_few_are(self):
        """Over several blocks, the last of them not full, and more experts than sublanes."""
        logits = jax.random.normal(jax.random.key(0), (2100, 9))
        dprobabilities = jax.random.normal(jax.random.key(1), logits.shape)
        (routing, dlogits), (want, dwant) = (
            routed(logits, jnp.arange(9) != 4, 4, dprobabilities, logits[:, 0], kernels)
            for kernels in (self.kernels, "xla")
        )
        np.testing.assert_array_equal(routing.ids, want.ids)
        for got, expected in (
            (routing.probabilities, want.probabilities),
            (routing.log_z, want.log_z),
            (dlogits, dwant),
        ):
            np.testing.assert_allclose(got, expected, rtol=1e-5, atol=2e-6)

    def test_a_nan_token_spoils_its_own_routing_only(self):
        logits = np.linspace(-1, 1, N * E, dtype=np.float32).reshape(N, E)
        clean, _ = self.route(logits, 3)
        logits[2] = np.nan
        spoilt, _ = self.route(logits, 3)
        jax.tree.map(
            lambda a, b: np.testing.assert_array_equal(np.delete(a, 2, 0), np.delete(b, 2, 0)),
            spoilt,
            clean,
        )
        assert np.isnan(spoilt.probabilities[2]).all()
        assert ((spoilt.ids >= 0) & (spoilt.ids < E)).all()

    def test_probabilities_are_float32_and_equal_those_of_the_same_logits_in_float32(self):
        logits = jax.random.normal(jax.random.key(0), (N, E)).astype(jnp.bfloat16)
        (low, dlow), (high, _) = self.route(logits, 3), self.route(logits.astype(jnp.float32), 3)
        assert low.probabilities.dtype == low.log_z.dtype == jnp.float32
        assert dlow.dtype == jnp.bfloat16
        np.testing.assert_array_equal(low.probabilities, high.probabilities)

    def test_adding_one_number_to_all_logits_changes_no_probability(self):
        logits = jax.random.normal(jax.random.key(0), (N, E))
        shift = 40 * jax.random.normal(jax.random.key(1), (N, 1))
        np.testing.assert_allclose(
            self.route(logits + shift, 3)[0].probabilities,
            self.route(logits, 3)[0].probabilities,
            rtol=2e-5,
        )

    @few(40)
    @given(SHAPES, st.integers(0, 2**31), st.floats(0, 8), st.floats(0, 1))
    @example((300, 9, 4), 0, 8.0, 0.5)
    @example((300, 9, 4), 0, 0.0, 1.0)  # no slot has a place
    @example((150, 8, 2), 0, 0.0, 0.0)  # all have
    def test_the_plan_equals_a_stable_argsort(self, shape, seed, skew, unused):
        """Experts as popular as exp(-skew * index), so from even to one hot expert with empty
        groups; a share of slots is not chosen."""
        tokens, experts, active = shape
        rng = np.random.default_rng(seed)
        ids = np.argsort(rng.gumbel(size=(tokens, experts)) - skew * np.arange(experts), axis=1)[
            :, ::-1
        ][:, :active]
        assert_plan(
            self.plan(ids, chosen := rng.random(ids.shape) >= unused, experts), ids, chosen, experts
        )

    @pytest.mark.parametrize("expert", [0, 3, 7])
    def test_the_plan_of_one_hot_expert_keeps_every_slot_in_place(self, expert):
        # also the same expert twice in a token, which a plan need not know to be impossible
        ids = np.full((150, 2), expert)
        plan = self.plan(ids, ids >= 0, 8)
        assert_plan(plan, ids, ids >= 0, 8)
        np.testing.assert_array_equal(plan.slots, np.arange(300))

    @few(10)
    @given(LOGITS, ALLOWED)
    def test_slots_beyond_the_allowed_experts_get_no_place(self, logits, allowed):
        routing, _ = self.route(logits, E, allowed)
        plan = self.plan(routing.ids, routing.probabilities > 0, E)
        assert_plan(plan, routing.ids, routing.probabilities > 0, E)
        np.testing.assert_array_equal(plan.sizes, np.where(allowed, N, 0))
        assert (np.asarray(plan.places)[routing.probabilities == 0] == N * E).all()

    @pytest.mark.parametrize("experts", [128, 256])
    def test_many_experts_are_routed_and_planned_alike(self, experts):
        """Value and gradient are those of softmax and lax.top_k, differentiated by JAX."""
        logits, toward = jax.random.normal(jax.random.key(0), (2, 200, experts))
        allowed = jnp.arange(experts) % 3 != 1

        def plain(logits):
            p = jax.nn.softmax(jnp.where(allowed, logits, -jnp.inf))
            best, ids = jax.lax.top_k(p, 8)
            return jnp.sum(best * jnp.take_along_axis(toward, ids, axis=1)), (best, ids)

        gradient, (best, ids) = jax.grad(plain, has_aux=True)(logits)
        routing, dlogits = self.route(logits, 8, allowed, dprobabilities=toward)
        np.testing.assert_array_equal(routing.ids, ids)
        np.testing.assert_allclose(routing.probabilities, best, rtol=1e-5)
        np.testing.assert_allclose(dlogits, gradient, atol=1e-6)
        chosen = np.asarray(routing.probabilities > 0)
        assert_plan(self.plan(ids, chosen, experts), np.asarray(ids), chosen, experts)

    def test_the_plan_is_made_without_a_sort(self):
        ids = jnp.zeros((300, 4), jnp.int32)
        assert sorts(lambda ids: jnp.argsort(ids.reshape(-1)), ids)
        assert not sorts(lambda ids: dispatch_plan(ids, ids >= 0, 9, kernels=self.kernels), ids)


@pytest.mark.tpu
class TestXla(RouteSuite):
    kernels = "xla"


@pytest.mark.tpu
class TestPallas(RouteSuite):
    kernels = "pallas"  # on a CPU interpreted


@pytest.mark.parametrize(
    "run",
    [
        lambda x, kernels: route_topk(x, 3, kernels=kernels),
        lambda x, kernels: dispatch_plan(x > 0, x > 0, E, kernels=kernels),
    ],
)
def test_the_platform_chooses_or_the_name_does(run):
    logits = jnp.ones((N, E))
    with pytest.raises(ValueError, match="'cuda'; expected one of auto, xla, pallas"):
        run(logits, "cuda")
    names = {"route_forward", "dispatch_plan"}
    for kernels, platform, has_kernels in [
        ("auto", "tpu", True),
        ("auto", "cpu", False),
        ("auto", "cuda", False),
        ("pallas", "tpu", True),
        ("pallas", "cpu", False),
        ("xla", "tpu", False),
    ]:
        traced = jax.jit(run, static_argnums=1).trace(logits, kernels)
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert any(f'kernel_name = "{name}"' in text for name in names) == has_kernels


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("kernels", ["xla", "pallas"])
def test_real_shapes_are_traced(name, kernels):
    N, E, A, _ = REAL[name]
    routing = jax.eval_shape(
        lambda x: route_topk(x, A, kernels=kernels),
        jax.ShapeDtypeStruct((N, E), jnp.float32),
    )
    plan = jax.eval_shape(
        lambda ids, p: dispatch_plan(ids, p > 0, E, kernels=kernels),
        routing.ids,
        routing.probabilities,
    )
    assert [a.shape for a in (*routing, *plan)] == [(N, A), (N, A), (N,), (E,), (N, A), (N * A,)]


@pytest.mark.parametrize("active", [0, E + 1])
def test_more_active_experts_than_there_are_or_none_are_refused(active):
    with pytest.raises(ValueError, match=f"between 1 and the number of experts, {E}; got {active}"):
        route_topk(jnp.ones((N, E)), active)


def test_a_plan_of_more_slots_than_float32_counts_is_refused():
    with pytest.raises(ValueError, match="use 'xla'"):
        jax.eval_shape(
            lambda: dispatch_plan(
                jnp.zeros((2**23, 4), jnp.int32),
                jnp.ones((2**23, 4), bool),
                E,
                kernels="pallas",
            )
        )


@pytest.mark.parametrize("excluded", [(), (1, 3)])
def test_router_probabilities_are_those_with_every_expert_active(excluded):
    logits, allowed = (
        jax.random.normal(jax.random.key(0), (N, E)),
        jnp.asarray([e not in excluded for e in range(E)]),
    )
    probabilities, log_z = router_probabilities(logits, allowed)
    routing = route_topk(logits, E, allowed)
    np.testing.assert_array_equal(probabilities, dense_probabilities(routing, E))
    np.testing.assert_array_equal(log_z, routing.log_z)


def assert_plan(plan, ids, chosen, experts):
    """Against a stable argsort by expert, bit for bit; slots without a place sort behind all
    experts."""
    slots = np.where(chosen, ids, experts).reshape(-1)
    M, used = slots.size, int(np.sum(chosen))
    order = np.argsort(slots, kind="stable")
    places = np.full(M, M)
    places[order[:used]] = np.arange(used)
    np.testing.assert_array_equal(plan.sizes, np.bincount(slots, minlength=experts + 1)[:experts])
    np.testing.assert_array_equal(plan.places, places.reshape(ids.shape))
    np.testing.assert_array_equal(plan.slots, np.where(np.arange(M) < used, order, M))
    assert plan.sizes.dtype == plan.places.dtype == plan.slots.dtype == jnp.int32


def sorts(function, *arguments) -> bool:
    return bool(re.search(r"= sort\[", str(jax.make_jaxpr(function)(*arguments))))
