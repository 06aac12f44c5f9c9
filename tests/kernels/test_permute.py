"""Tokens into expert order and back: values and gradients; and no race where DMAs copy.

One suite, inherited by each kind of kernels; plans are made here by sorting, not by the code under
test.
"""

import functools
import inspect
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from flexolmo_jax.kernels import Kernels
from flexolmo_jax.kernels.permute import (
    combine,
    pallas_tpu,
    permute,
    permute_probabilities,
    reference,
)
from flexolmo_jax.kernels.permute.shapes import SHAPES
from flexolmo_jax.kernels.route import DispatchPlan
from tests.kernels.simulator import MODES, simulated

N, A, E, D = 150, 3, 5, 256  # more tokens than a block of the kernels, and not a multiple of one
SEED, UNUSED = st.integers(0, 2**31), st.floats(0, 1)


def few(examples: int) -> settings:
    # The suite is inherited on purpose: one property, drawn for each kind of kernels.
    return settings(
        max_examples=examples,
        suppress_health_check=[HealthCheck.differing_executors],
    )


def plan_of(seed: int, unused: float, tokens: int = N) -> DispatchPlan:
    """Random experts; a share `unused` of the slots has no place."""
    rng = np.random.default_rng(seed)
    experts = np.argsort(rng.random((tokens, E)), axis=1)[:, :A]
    experts[rng.random(experts.shape) < unused] = E
    M, used = experts.size, int(np.sum(experts < E))
    order = np.argsort(experts.reshape(-1), kind="stable")
    places, slots = np.full(M, M, np.int32), np.full(M, M, np.int32)
    places[order[:used]], slots[:used] = np.arange(used), order[:used]
    sizes = np.bincount(experts.reshape(-1), minlength=E + 1)[:E]
    return DispatchPlan(
        jnp.asarray(sizes, jnp.int32), jnp.asarray(places.reshape(tokens, A)), jnp.asarray(slots)
    )


def permuted(x, plan):
    """The definition of `permute`, place by place."""
    padded = np.concatenate([x, np.zeros_like(x[:1])])
    return np.stack([padded[slot // A] for slot in np.asarray(plan.slots)])


def combined(outputs, plan):
    """The definition of `combine`, token by token, in float64."""
    outputs = np.asarray(outputs, np.float64)
    padded = np.concatenate([outputs, np.zeros_like(outputs[:1])])
    return np.stack([padded[places].sum(axis=0) for places in np.asarray(plan.places)])


def random(*shape: int, dtype=jnp.float32, seed: int = 0):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


@functools.partial(jax.jit, static_argnums=(0, 4))
def value_and_pullback(function, x, plan, dout, kernels):
    value, pullback = jax.vjp(lambda x: function(x, plan, kernels=kernels), x)
    return value, pullback(dout)[0]


class PermuteSuite:
    """What holds for all kernels."""

    kernels: Kernels

    def run(self, function, x, plan, dout=None):
        if dout is None:
            size = plan.slots.size if function is permute else plan.places.shape[0]
            dout = jnp.zeros((size, x.shape[1]), x.dtype)
        return value_and_pullback(function, x, plan, dout, self.kernels)

    @few(10)
    @given(SEED, UNUSED)
    @example(0, 0.0)
    @example(0, 1.0)
    def test_permute_copies_each_token_to_its_places_and_its_gradient_sums_them(self, seed, unused):
        plan, x, dout = plan_of(seed, unused), random(N, D), random(N * A, D, seed=1)
        out, dx = self.run(permute, x, plan, dout)
        np.testing.assert_array_equal(out, permuted(np.asarray(x), plan))
        np.testing.assert_allclose(dx, combined(dout, plan), rtol=1e-5, atol=1e-6)

    @few(10)
    @given(SEED, UNUSED)
    @example(0, 0.0)
    @example(0, 1.0)
    def test_combine_sums_the_outputs_of_each_token_and_its_gradient_copies_them_back(
        self, seed, unused
    ):
        plan, outputs, dout = plan_of(seed, unused), random(N * A, D), random(N, D, seed=1)
        y, doutputs = self.run(combine, outputs, plan, dout)
        np.testing.assert_allclose(y, combined(outputs, plan), rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(doutputs, permuted(np.asarray(dout), plan))

    def test_outputs_in_bfloat16_are_summed_in_float32_and_rounded_once(self):
        plan, outputs = plan_of(0, 0.1), random(N * A, D, dtype=jnp.bfloat16)
        y, doutputs = self.run(combine, outputs, plan)
        assert y.dtype == doutputs.dtype == jnp.bfloat16
        exact = reference.combine(outputs.astype(jnp.float32), plan)
        np.testing.assert_array_equal(y, exact.astype(jnp.bfloat16))
        take = functools.partial(jnp.take, axis=0, mode="fill", fill_value=0)
        in_bfloat16 = functools.reduce(jnp.add, (take(outputs, at) for at in plan.places.T))
        assert (y != in_bfloat16).any()  # else this shows nothing

    def test_all_values_and_gradients_equal_those_of_xla_bit_for_bit(self):
        plan = plan_of(1, 0.3)
        for function, x, dout in (
            (permute, random(N, D), random(N * A, D, seed=1)),
            (combine, random(N * A, D), random(N, D, seed=1)),
        ):
            got = self.run(function, x, plan, dout)
            want = value_and_pullback(function, x, plan, dout, "xla")
            jax.tree.map(np.testing.assert_array_equal, got, want)

    def test_an_unused_place_is_never_read(self):
        plan, outputs = plan_of(0, 0.5), random(N * A, D)
        poisoned = jnp.where(plan.slots[:, None] < N * A, outputs, jnp.nan)
        np.testing.assert_array_equal(
            self.run(combine, poisoned, plan)[0], self.run(combine, outputs, plan)[0]
        )

    def test_a_nan_token_spoils_its_own_places_only(self):
        plan, x = plan_of(0, 0.5), random(N, D)
        tokens, _ = self.run(permute, x.at[7].set(jnp.nan), plan)
        np.testing.assert_array_equal(np.isnan(tokens).any(1), np.asarray(plan.slots) // A == 7)
        y, _ = self.run(combine, tokens, plan)
        assert not np.isnan(np.delete(y, 7, 0)).any()

    @pytest.mark.parametrize("function", [permute, combine])
    def test_neither_value_nor_gradient_sorts_or_scatters(self, function):
        plan, x, dout = plan_of(0, 0.5), random(N, D), random(N * A, D)
        arguments = (x, plan, dout) if function is permute else (dout, plan, x)
        program = str(
            jax.make_jaxpr(value_and_pullback, static_argnums=(0, 4))(
                function, *arguments, self.kernels
            )
        )
        assert not re.search(r"= (sort|scatter\S*)\[", program)


@pytest.mark.tpu
class TestXla(PermuteSuite):
    kernels = "xla"


@pytest.mark.tpu
class TestPallas(PermuteSuite):
    kernels = "pallas"  # on a CPU interpreted


def test_the_search_for_sorts_and_scatters_can_find_them():
    program = str(jax.make_jaxpr(jax.grad(lambda x: jnp.sum(x[jnp.argsort(x)] ** 2)))(jnp.ones(4)))
    assert set(re.findall(r"= (sort|scatter)\S*\[", program)) == {"sort", "scatter"}


@few(20)
@given(SEED, UNUSED)
@example(0, 0.0)
@example(0, 1.0)
def test_permute_probabilities_and_their_gradient_follow_the_plan_both_ways(seed, unused):
    plan, values, dout = plan_of(seed, unused), random(N, A), random(N * A, seed=1)
    slots, places = np.asarray(plan.slots), np.asarray(plan.places)
    without_slots = plan._replace(slots=jnp.full_like(plan.slots, -1))
    plans: dict[Kernels, DispatchPlan] = {"xla": plan, "pallas": without_slots}
    for kernels, own in plans.items():
        run = functools.partial(permute_probabilities, plan=own, kernels=kernels)
        out, pullback = jax.vjp(run, values)
        np.testing.assert_array_equal(out, np.append(np.asarray(values).reshape(-1), 0)[slots])
        np.testing.assert_array_equal(pullback(dout)[0], np.append(np.asarray(dout), 0)[places])


@pytest.mark.parametrize("kernels", ["xla", "pallas"])
def test_the_gradient_of_permute_probabilities_is_a_gather(kernels):
    plan = plan_of(0, 0.5)
    run = functools.partial(permute_probabilities, plan=plan, kernels=kernels)
    _, pullback = jax.vjp(run, random(N, A))
    program = str(jax.make_jaxpr(pullback)(random(N * A)))
    assert "gather[" in program
    assert "scatter" not in program


@pytest.mark.parametrize("function", [permute, combine])
def test_pallas_runs_where_it_is_named_and_reads_the_places_alone(function):
    plan, x = plan_of(0, 0.0), random(N if function is permute else N * A, D)
    with pytest.raises(ValueError, match="'cuda'; expected one of auto, xla, pallas"):
        function(x, plan, kernels="cuda")
    for kernels, has_kernel in ("auto", False), ("xla", False), ("pallas", True):
        run = jax.jit(functools.partial(function, kernels=kernels))
        text = run.trace(x, plan).lower(lowering_platforms=("tpu",)).as_text()
        assert (f'kernel_name = "{function.__name__}"' in text) == has_kernel
    without_slots = plan._replace(slots=jnp.full_like(plan.slots, -1))
    np.testing.assert_array_equal(
        function(x, without_slots, kernels="pallas"), function(x, plan, kernels="xla")
    )


@pytest.mark.parametrize("function", [permute, combine])
@pytest.mark.parametrize("width", [12, 200])
def test_pallas_takes_tokens_of_any_width(function, width):
    plan, x = plan_of(0, 0.2), random(N if function is permute else N * A, width)
    np.testing.assert_array_equal(
        function(x, plan, kernels="pallas"), function(x, plan, kernels="xla")
    )


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("kernels", ["xla", "pallas"])
def test_real_shapes_are_traced(name, kernels):
    tokens, experts, active, width = SHAPES[name]
    shapes = (experts,), (tokens, active), (tokens * active,)
    plan = jax.eval_shape(lambda: DispatchPlan(*(jnp.zeros(shape, jnp.int32) for shape in shapes)))
    x, dispatched = (
        jax.ShapeDtypeStruct((length, width), jnp.bfloat16) for length in (tokens, tokens * active)
    )
    for function, value, wanted in ((permute, x, dispatched), (combine, dispatched, x)):
        run = functools.partial(function, kernels=kernels)
        assert jax.eval_shape(run, value, plan) == wanted


# Kernels that copy by DMA, under the simulator of TPU memory.

SMALL = 22  # tokens: two blocks of 16, the second not full
KERNELS = ["permute", "combine"]


def assert_sound(module, kernel: str, mode: str):
    """The kernel gives what the reference gives, and no memory is touched while a DMA may still be
    writing or reading it."""
    plan = plan_of(3, 0.2, SMALL)
    x = random(SMALL if kernel == "permute" else SMALL * A, D)
    with simulated(mode) as params:
        got = np.asarray(getattr(module, kernel)(x, plan, interpret=params, tokens=16))
    np.testing.assert_array_equal(got, getattr(reference, kernel)(x, plan))


def without(line: str) -> types.ModuleType:
    """A copy of the kernels' module with one line taken out."""
    source = inspect.getsource(pallas_tpu)
    assert source.count(line) == 1
    module = types.ModuleType("broken")
    module.__package__ = pallas_tpu.__package__
    exec(compile(source.replace(line, "pass"), pallas_tpu.__file__, "exec"), module.__dict__)
    return module


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_no_copy_races(kernel, mode):
    assert_sound(pallas_tpu, kernel, mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "kernel, wait",
    [
        ("permute", "    for_all_copies(lambda copy: copy.wait())"),
        ("combine", "for_all_copies(group, lambda copy: copy.wait())"),
    ],
)
def test_a_missing_wait_is_caught(kernel, wait, mode):
    with pytest.raises(AssertionError, match="races with eager" if mode == "eager" else None):
        assert_sound(without(wait.strip()), kernel, mode)
