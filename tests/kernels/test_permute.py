"""Tokens to rows and back: values, gradients and, for the kernels that copy by DMA, no race.

One suite, inherited for each implementation; plans are made here by sorting, not by the code under
test.
"""

import dataclasses
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

# the simulator's race flag has no public name
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from flexolmo_jax.kernels.permute import combine, pallas_tpu, permute, reference, row_weights
from flexolmo_jax.kernels.permute.shapes import SHAPES
from flexolmo_jax.kernels.route import DispatchPlan, Implementation

N, A, E, D = 150, 3, 5, 256  # more tokens than a block of the kernels, and not a multiple of one
SEED, UNUSED = st.integers(0, 2**31), st.floats(0, 1)


def few(examples: int) -> settings:
    # The suite is inherited on purpose: one property, drawn for each implementation.
    return settings(
        max_examples=examples,
        deadline=None,
        suppress_health_check=[HealthCheck.differing_executors],
    )


def plan_of(seed: int, unused: float, tokens: int = N) -> DispatchPlan:
    """Random experts; a share `unused` of the slots has no row."""
    rng = np.random.default_rng(seed)
    experts = np.argsort(rng.random((tokens, E)), axis=1)[:, :A]
    experts[rng.random(experts.shape) < unused] = E
    M, used = experts.size, int(np.sum(experts < E))
    order = np.argsort(experts.reshape(-1), kind="stable")
    rows, slots = np.full(M, M, np.int32), np.full(M, M, np.int32)
    rows[order[:used]], slots[:used] = np.arange(used), order[:used]
    sizes = np.bincount(experts.reshape(-1), minlength=E + 1)[:E]
    return DispatchPlan(
        jnp.asarray(sizes, jnp.int32), jnp.asarray(rows.reshape(tokens, A)), jnp.asarray(slots)
    )


def permuted(x, plan):
    """The definition of `permute`, row by row."""
    return np.stack(
        [
            x[slot // A] if slot < x.shape[0] * A else np.zeros_like(x[0])
            for slot in np.asarray(plan.slots)
        ]
    )


def combined(rows, plan):
    """The definition of `combine`, token by token, in float64."""
    rows = np.asarray(rows, np.float64)
    return np.stack(
        [
            sum((rows[r] for r in of_token if r < len(rows)), np.zeros(rows.shape[1]))
            for of_token in np.asarray(plan.rows)
        ]
    )


def random(*shape: int, dtype=jnp.float32, seed: int = 0):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


@functools.partial(jax.jit, static_argnums=(0, 4))
def value_and_pullback(function, x, plan, dout, implementation):
    value, pullback = jax.vjp(lambda x: function(x, plan, implementation=implementation), x)
    return value, pullback(dout)[0]


class PermuteSuite:
    """What holds for every implementation."""

    implementation: Implementation

    def run(self, function, x, plan, dout=None):
        dout = (
            jnp.zeros(
                (plan.slots.size if function is permute else plan.rows.shape[0], x.shape[1]),
                x.dtype,
            )
            if dout is None
            else dout
        )
        return value_and_pullback(function, x, plan, dout, self.implementation)

    @few(10)
    @given(SEED, UNUSED)
    @example(0, 0.0)
    @example(0, 1.0)
    def test_permute_copies_each_token_to_its_rows_and_its_gradient_sums_them(self, seed, unused):
        plan, x, dout = plan_of(seed, unused), random(N, D), random(N * A, D, seed=1)
        out, dx = self.run(permute, x, plan, dout)
        np.testing.assert_array_equal(out, permuted(np.asarray(x), plan))
        np.testing.assert_allclose(dx, combined(dout, plan), rtol=1e-5, atol=1e-6)

    @few(10)
    @given(SEED, UNUSED)
    @example(0, 0.0)
    @example(0, 1.0)
    def test_combine_sums_the_rows_of_each_token_and_its_gradient_copies_them_back(
        self, seed, unused
    ):
        plan, rows, dout = plan_of(seed, unused), random(N * A, D), random(N, D, seed=1)
        y, drows = self.run(combine, rows, plan, dout)
        np.testing.assert_allclose(y, combined(rows, plan), rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(drows, permuted(np.asarray(dout), plan))

    def test_rows_in_bfloat16_are_summed_in_float32_and_rounded_once(self):
        plan, rows = plan_of(0, 0.1), random(N * A, D, dtype=jnp.bfloat16)
        y, drows = self.run(combine, rows, plan)
        assert y.dtype == drows.dtype == jnp.bfloat16
        exact = reference.combine(rows.astype(jnp.float32), plan)
        np.testing.assert_array_equal(y, exact.astype(jnp.bfloat16))
        in_bfloat16 = functools.reduce(
            jnp.add,
            (jnp.take(rows, plan.rows[:, a], axis=0, mode="fill", fill_value=0) for a in range(A)),
        )
        assert (y != in_bfloat16).any()  # else this shows nothing

    def test_all_values_and_gradients_equal_those_of_xla_bit_for_bit(self):
        plan = plan_of(1, 0.3)
        for function, x, dout in (
            (permute, random(N, D), random(N * A, D, seed=1)),
            (combine, random(N * A, D), random(N, D, seed=1)),
        ):
            got, want = (
                self.run(function, x, plan, dout),
                value_and_pullback(function, x, plan, dout, "xla"),
            )
            jax.tree.map(np.testing.assert_array_equal, got, want)

    def test_a_row_without_a_slot_is_never_read(self):
        plan, rows = plan_of(0, 0.5), random(N * A, D)
        poisoned = jnp.where(plan.slots[:, None] < N * A, rows, jnp.nan)
        np.testing.assert_array_equal(
            self.run(combine, poisoned, plan)[0], self.run(combine, rows, plan)[0]
        )

    def test_a_nan_token_spoils_its_own_rows_only(self):
        plan, x = plan_of(0, 0.5), random(N, D)
        rows, _ = self.run(permute, x.at[7].set(jnp.nan), plan)
        np.testing.assert_array_equal(np.isnan(rows).any(1), np.asarray(plan.slots) // A == 7)
        y, _ = self.run(combine, rows, plan)
        assert not np.isnan(np.delete(y, 7, 0)).any()

    @pytest.mark.parametrize("function", [permute, combine])
    def test_neither_value_nor_gradient_sorts_or_scatters(self, function):
        plan, x, dout = plan_of(0, 0.5), random(N, D), random(N * A, D)
        arguments = (x, plan, dout) if function is permute else (dout, plan, x)
        program = str(
            jax.make_jaxpr(value_and_pullback, static_argnums=(0, 4))(
                function, *arguments, self.implementation
            )
        )
        assert not re.search(r"= (sort|scatter\S*)\[", program)


@pytest.mark.tpu
class TestXla(PermuteSuite):
    implementation = "xla"


class TestPallasInterpreted(PermuteSuite):
    implementation = "pallas_interpret"


@pytest.mark.tpu(only=True)
class TestPallas(PermuteSuite):
    implementation = "pallas"


def test_the_search_for_sorts_and_scatters_can_find_them():
    program = str(jax.make_jaxpr(jax.grad(lambda x: jnp.sum(x[jnp.argsort(x)] ** 2)))(jnp.ones(4)))
    assert set(re.findall(r"= (sort|scatter)\S*\[", program)) == {"sort", "scatter"}


@few(20)
@given(SEED, UNUSED)
@example(0, 0.0)
@example(0, 1.0)
def test_row_weights_and_their_gradient_follow_the_plan_both_ways(seed, unused):
    plan, weights, dout = plan_of(seed, unused), random(N, A), random(N * A, seed=1)
    out, pullback = jax.vjp(lambda weights: row_weights(weights, plan), weights)
    slots, rows = np.asarray(plan.slots), np.asarray(plan.rows)
    np.testing.assert_array_equal(out, np.append(np.asarray(weights).reshape(-1), 0)[slots])
    np.testing.assert_array_equal(pullback(dout)[0], np.append(np.asarray(dout), 0)[rows])


def test_the_gradient_of_row_weights_is_a_gather():
    plan = plan_of(0, 0.5)
    program = str(
        jax.make_jaxpr(jax.grad(lambda weights: jnp.sum(row_weights(weights, plan) ** 2)))(
            random(N, A)
        )
    )
    assert "gather[" in program
    assert "scatter" not in program


@pytest.mark.parametrize("function", [permute, combine])
def test_a_named_implementation_is_used_or_fails(function):
    plan, x = plan_of(0, 0.0), random(N if function is permute else N * A, D)
    with pytest.raises(
        ValueError, match="must be None, 'xla', 'pallas' or 'pallas_interpret'; got 'cuda'"
    ):
        function(x, plan, implementation="cuda")
    # Pallas itself, lowering a TPU kernel for the CPU
    with pytest.raises(ValueError, match="interpret mode"):
        jax.block_until_ready(function(x, plan, implementation="pallas"))
    with pytest.raises(ValueError, match="multiple of 128, got 200; use 'xla'"):
        function(x[:, :200], plan, implementation="pallas")


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("implementation", ["xla", "pallas"])
def test_real_shapes_are_traced(name, implementation):
    tokens, experts, active, width = SHAPES[name]
    shapes = (experts,), (tokens, active), (tokens * active,)
    plan = jax.eval_shape(lambda: DispatchPlan(*(jnp.zeros(shape, jnp.int32) for shape in shapes)))
    x, rows = (
        jax.ShapeDtypeStruct((length, width), jnp.bfloat16) for length in (tokens, tokens * active)
    )
    assert (
        jax.eval_shape(lambda x, plan: permute(x, plan, implementation=implementation), x, plan)
        == rows
    )
    assert (
        jax.eval_shape(
            lambda rows, plan: combine(rows, plan, implementation=implementation), rows, plan
        )
        == x
    )


# Kernels that copy by DMA, under the simulator of TPU memory, which records races but does not fail
# because of them.

SMALL = 22  # tokens: two blocks of 16, the second not full
KERNELS = ["permute", "combine"]


def assert_sound(module, kernel: str, mode: str):
    """The kernel gives what the reference gives, and no memory is touched while a DMA may still be
    writing or reading it."""
    plan = plan_of(3, 0.2, SMALL)
    x = random(SMALL if kernel == "permute" else SMALL * A, D)
    # with few clocks DMAs share them
    parameters = {"detect_races": True, "dma_execution_mode": mode, "vector_clock_size": 128}
    # newer jax raises otherwise, inside a callback
    if "on_race" in {field.name for field in dataclasses.fields(pltpu.InterpretParams)}:
        parameters["on_race"] = "warn"
    try:
        got = getattr(module, kernel)(
            x, plan, interpret=pltpu.InterpretParams(**parameters), tokens=16
        )
        got = np.asarray(got)
        races = interpret_pallas_call.races
        assert races is not None
        assert not races.races_found, f"{kernel} races with {mode} DMAs"
    finally:
        pltpu.reset_tpu_interpret_mode_state()
    np.testing.assert_array_equal(got, getattr(reference, kernel)(x, plan))


def without(line: str) -> types.ModuleType:
    """A copy of the kernels' module with one line taken out."""
    source = inspect.getsource(pallas_tpu)
    assert source.count(line) == 1
    module = types.ModuleType("broken")
    module.__package__ = pallas_tpu.__package__
    exec(compile(source.replace(line, "pass"), pallas_tpu.__file__, "exec"), module.__dict__)
    return module


@pytest.mark.parametrize("mode", ["eager", "on_wait"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_no_copy_races(kernel, mode):
    assert_sound(pallas_tpu, kernel, mode)


@pytest.mark.parametrize("mode", ["eager", "on_wait"])
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
