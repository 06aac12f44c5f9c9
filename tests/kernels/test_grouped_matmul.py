"""One suite for every implementation of the expert FFN that runs on a CPU: values and all gradients
against running every expert.

The definition's gradients are jax's own; the reference writes its own by hand, so it stands in the
suite too.
"""

import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from flexolmo_jax.kernels.expert_ffn import swiglu
from flexolmo_jax.kernels.grouped_matmul import Implementation, blocks, expert_ffn
from flexolmo_jax.kernels.grouped_matmul.blocks import block_sizes
from flexolmo_jax.kernels.grouped_matmul.shapes import SHAPES_7B
from flexolmo_jax.kernels.grouped_matmul.tiles import executed_over_ideal, executed_tiles

M, E, D, F = 150, 4, 12, 20
NAMES = ("x", "probabilities", "gate", "up", "down")
GROUPS = {
    "even": (37, 37, 37, 37),
    "one hot expert": (0, M, 0, 0),
    "no tokens at all": (0, 0, 0, 0),
    "empty groups and unused places": (0, 70, 0, 33),
    "groups of one token": (1, 1, 1, M - 3),
    "unused places only at the end of a tile": (128, 0, 0, 0),
    "blocks of exactly one step": (32, 64, 32, 0),
}
# by how many a program has one tells who made it
OPERATIONS = ("stablehlo.while", "ragged_dot", "tpu_custom_call", "dot_general")
# Numbers that add up to at most M: gaps between sorted points of [0, M].
SIZES = st.lists(st.integers(0, M), min_size=E, max_size=E).map(
    lambda points: np.diff(np.sort(points), prepend=0)
)


@pytest.fixture(scope="module", autouse=True)
def many_sizes_of_blocks():
    """As for products that are not small."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "SMALL", 0)
        yield


def arguments(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 5)
    x, gate, up, down = (
        jax.random.normal(k, s)
        for k, s in zip(keys, [(M, D), (E, D, F), (E, D, F), (E, F, D)], strict=False)
    )
    probabilities = jax.random.uniform(keys[4], (M,), minval=0.05, maxval=0.5)
    return (
        x.astype(dtype),
        probabilities,
        *((w / w.shape[1] ** 0.5).astype(dtype) for w in (gate, up, down)),
    )


def by_definition(x, probabilities, sizes, gate, up, down):
    expert = jnp.sum(jnp.arange(M)[:, None] >= jnp.cumsum(sizes), axis=1)
    each = [
        jnp.where((expert == e)[:, None], swiglu(x, gate[e], up[e], down[e]), 0) for e in range(E)
    ]
    return probabilities[:, None] * sum(each)


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradients(function, x, probabilities, sizes, gate, up, down):
    def total(x, probabilities, gate, up, down):
        y = function(x, probabilities, sizes, gate, up, down)
        cotangent = jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)
        return jnp.sum(y.astype(jnp.float32) * cotangent), y

    return jax.grad(total, argnums=(0, 1, 2, 3, 4), has_aux=True)(x, probabilities, gate, up, down)


def run(function, sizes, values):
    x, probabilities, *matrices = values
    gradients, y = value_and_gradients(
        function, x, probabilities, jnp.asarray(sizes, jnp.int32), *matrices
    )
    results = dict(zip(NAMES, gradients, strict=True)) | {"value": y}
    # What is behind the last group means nothing.
    of_tokens = ("value", "x", "probabilities")
    used = {name: results[name][: sum(sizes)] for name in of_tokens}
    return {name: np.asarray(a, np.float64) for name, a in (results | used).items()}


def assert_equal_to_the_definition(function, sizes):
    got, want = run(function, sizes, arguments()), run(by_definition, sizes, arguments())
    for name in want:
        assert np.linalg.norm(got[name] - want[name]) <= 1e-5 * np.linalg.norm(want[name]), name


@functools.cache
def implemented_by(implementation):
    """The same object every time, so that `jax.jit` compiles once for an implementation."""
    return functools.partial(expert_ffn, implementation=implementation)


class Suite:
    """What every implementation must do."""

    implementation: Implementation | None

    @property
    def function(self):
        return implemented_by(self.implementation)

    @pytest.mark.parametrize("sizes", GROUPS.values(), ids=GROUPS.keys())
    def test_values_and_gradients_equal_the_definition(self, sizes):
        assert_equal_to_the_definition(self.function, sizes)

    def test_an_expert_without_tokens_is_never_read_and_has_a_gradient_of_exactly_zero(self):
        sizes, empty = (0, 70, 0, 33), np.array([0, 2])
        x, probabilities, *matrices = arguments()
        poisoned = (x, probabilities, *(m.at[empty].set(jnp.nan) for m in matrices))
        clean = run(self.function, sizes, (x, probabilities, *matrices))
        got = run(self.function, sizes, poisoned)
        for name in clean:
            np.testing.assert_array_equal(got[name], clean[name], err_msg=name)
        for name in ("gate", "up", "down"):
            assert not got[name][empty].any()

    def test_whatever_is_in_unused_places_changes_nothing(self):
        sizes = (20, 0, 61, 30)
        x, probabilities, *matrices = arguments()
        used = sum(sizes)
        poisoned = (x.at[used:].set(jnp.nan), probabilities.at[used:].set(jnp.nan), *matrices)
        clean = run(self.function, sizes, (x, probabilities, *matrices))
        got = run(self.function, sizes, poisoned)
        for name in clean:
            np.testing.assert_array_equal(got[name], clean[name], err_msg=name)

    def test_a_spoilt_token_spoils_its_own_output_and_the_gradients_of_its_own_expert_only(self):
        sizes = (20, 0, 61, 30)
        x, probabilities, *matrices = arguments()
        clean = run(self.function, sizes, (x, probabilities, *matrices))
        got = run(self.function, sizes, (x.at[25].set(jnp.nan), probabilities, *matrices))
        for name in ("value", "x", "probabilities"):
            np.testing.assert_array_equal(
                np.delete(got[name], 25, 0), np.delete(clean[name], 25, 0), err_msg=name
            )
        for name in ("gate", "up", "down"):
            np.testing.assert_array_equal(
                np.delete(got[name], 2, 0), np.delete(clean[name], 2, 0), err_msg=name
            )

    def test_in_bfloat16_weight_gradients_are_summed_in_float32(self):
        """Positive terms, so that a bfloat16 sum would stop growing; 4096 tokens of one expert are
        many blocks and tiles."""
        tokens = 4096
        keys = jax.random.split(jax.random.key(0), 4)
        x, *matrices = (
            (jnp.abs(jax.random.normal(k, s)) / 4).astype(jnp.bfloat16)
            for k, s in zip(keys, [(tokens, D), (1, D, F), (1, D, F), (1, F, D)], strict=True)
        )

        def total(matrices):
            return jnp.sum(
                self.function(x, jnp.ones(tokens), jnp.array([tokens], jnp.int32), *matrices),
                dtype=jnp.float32,
            )

        def exact(matrices):
            return jnp.sum(swiglu(x.astype(jnp.float32), *(m[0] for m in matrices)))

        got = jax.jit(jax.grad(total))(matrices)
        want = jax.jit(jax.grad(exact))([m.astype(jnp.float32) for m in matrices])
        for g, w in zip(got, want, strict=True):
            assert g.dtype == jnp.bfloat16
            assert np.linalg.norm(g.astype(jnp.float32) - w) < 0.005 * np.linalg.norm(w)


@pytest.mark.tpu
class TestThePlatformsChoice(Suite):
    implementation = None


class TestReference(Suite):
    implementation = "reference"


class TestRaggedDot(Suite):
    implementation = "ragged_dot"


class TestMegablox(Suite):
    implementation = "megablox_interpret"


@pytest.mark.parametrize("implementation", ["blocks", "reference"])
def test_plain_xla_leaves_zeros_behind_the_last_group(implementation):
    sizes = jnp.array([20, 0, 61, 30], jnp.int32)
    x, probabilities, *matrices = arguments()
    used = int(sizes.sum())
    poisoned = x.at[used:].set(jnp.nan), probabilities.at[used:].set(jnp.nan)
    function = implemented_by(implementation)
    (dx, dp, *_), y = value_and_gradients(function, *poisoned, sizes, *matrices)
    assert used < M and y[:used].any() and dx[:used].any() and dp[:used].any()
    assert not y[used:].any() and not dx[used:].any() and not dp[used:].any()


# not in the suite: hypothesis refuses tests that classes share
@pytest.mark.parametrize("suite", Suite.__subclasses__())
@settings(max_examples=15)
@given(sizes=SIZES)
@example(sizes=np.array([M, 0, 0, 0]))
def test_values_and_gradients_equal_the_definition_for_any_sizes(suite, sizes):
    assert_equal_to_the_definition(suite().function, sizes)


def test_an_unknown_implementation_is_refused():
    with pytest.raises(ValueError, match="one of blocks, ragged_dot, megablox"):
        unknown: Any = "triton"
        expert_ffn(
            *arguments()[:2], jnp.zeros(E, jnp.int32), *arguments()[2:], implementation=unknown
        )


@pytest.mark.parametrize("lowered_for", ["cpu", "tpu", "cuda"])
def test_the_implementation_follows_the_platform_the_program_is_lowered_for(lowered_for):
    tpu = "ragged_dot" if jax.__version_info__ >= (0, 12) else "megablox"
    x, probabilities, *matrices = arguments()

    def program(implementation):
        def total(x):
            return jnp.sum(
                expert_ffn(
                    x,
                    probabilities,
                    jnp.full(E, 30, jnp.int32),
                    *matrices,
                    implementation=implementation,
                )
            )

        return jax.jit(jax.grad(total)).trace(x).lower(lowering_platforms=(lowered_for,)).as_text()

    counts = {operation: program(None).count(operation) for operation in OPERATIONS}
    for implementation in ("blocks", "ragged_dot", "megablox", "reference"):
        if implementation == "megablox" and lowered_for != "tpu":
            continue  # no other platform has it
        same = counts == {
            operation: program(implementation).count(operation) for operation in OPERATIONS
        }
        assert same == (
            implementation == {"cpu": "blocks", "tpu": tpu, "cuda": "blocks"}[lowered_for]
        ), implementation


def largest_buffer(function, *arguments) -> int:
    """Elements of the largest array in the program that is compiled for this device."""
    text = jax.jit(function).lower(*arguments).compile().as_text() or ""
    shapes = re.findall(r"\b[a-z]+\d*\[([\d,]+)\]", text)
    return max(math.prod(map(int, shape.split(","))) for shape in shapes)


@pytest.mark.gpu
def test_no_buffer_of_the_compiled_program_holds_every_token_for_every_expert():
    tokens, experts, width = 2048, 8, 64
    of = jax.ShapeDtypeStruct
    x, sizes = of((tokens, width), jnp.bfloat16), of((experts,), jnp.int32)
    matrices = [of((experts, width, width), jnp.bfloat16)] * 3

    def total(x, sizes, *matrices):
        return jnp.sum(expert_ffn(x, jnp.ones(tokens), sizes, *matrices), dtype=jnp.float32)

    def dense(x, sizes, *matrices):
        each = jax.lax.optimization_barrier(jnp.einsum("md,edf->emf", x, matrices[0]))
        return jnp.sum(each[0])

    every = experts * tokens * width
    assert largest_buffer(dense, x, sizes, *matrices) >= every
    gradient = jax.grad(total, argnums=(0, 2, 3, 4))
    assert largest_buffer(gradient, x, sizes, *matrices) < every


def test_block_sizes_are_ascending_and_never_larger_than_the_array():
    for slots, experts in [(1, 8), (16, 8), (150, 4), (4096, 8), (4096, 32), (10240, 8)]:
        sizes = block_sizes(slots, experts, D, F)
        assert list(sizes) == sorted(set(sizes)) and sizes[0] >= 1 and sizes[-1] <= slots


@pytest.mark.parametrize("sizes", GROUPS.values(), ids=GROUPS.keys())
def test_small_products_have_blocks_of_one_size(sizes, monkeypatch):
    monkeypatch.setattr(blocks, "SMALL", M * D * F)
    assert len(block_sizes(M, E, D, F)) == 1 < len(block_sizes(M + 1, E, D, F))
    assert_equal_to_the_definition(functools.partial(expert_ffn, implementation="blocks"), sizes)


@settings(max_examples=50)
@given(SIZES, st.sampled_from([8, 16, 32]))
def test_executed_tiles_are_those_each_group_touches(sizes, tm):
    group = np.repeat(np.arange(E), sizes)
    assert executed_tiles(list(sizes), tm) == len({(i // tm, e) for i, e in enumerate(group)})


@pytest.mark.parametrize("shape", SHAPES_7B, ids=str)
@pytest.mark.parametrize("skew", [0.0, 1.0, 2.0])
def test_megablox_multiplies_at_most_a_twentieth_more_than_needed_at_7b(shape, skew):
    share = (1 + np.arange(shape.E)) ** -skew
    sizes = np.floor(shape.M * share / share.sum()).astype(int)
    sizes[0] += shape.M - sizes.sum()
    assert 1 <= executed_over_ideal(list(sizes), shape.D, shape.F) <= 1.05
