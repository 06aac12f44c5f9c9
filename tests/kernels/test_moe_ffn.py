"""Sparse dispatch against every expert run on every token: values and all gradients, whatever the
sizes of the groups."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from flexolmo_jax.kernels.expert_ffn import swiglu
from flexolmo_jax.kernels.grouped_matmul import api, grouped
from flexolmo_jax.kernels.moe_ffn import sparse_experts
from flexolmo_jax.kernels.route import Routing, dense_probabilities

BLOCK = 32  # the smallest step of the CPU loop's blocks
N, A, E, D, F = 2 * BLOCK + 45, 2, 4, 12, 20


def dense_experts(x, routing, gate, up, down):
    """The definition: every expert on every token, times its probability."""
    p = dense_probabilities(routing, E)
    return sum(p[:, e, None] * swiglu(x, gate[e], up[e], down[e]) for e in range(E))


def arguments(ids: np.ndarray, probabilities: np.ndarray, seed: int = 0):
    keys = jax.random.split(jax.random.key(seed), 4)
    x, gate, up, down = (
        jax.random.normal(k, s)
        for k, s in zip(keys, [(N, D), (E, D, F), (E, D, F), (E, F, D)], strict=True)
    )
    p = jnp.asarray(probabilities, jnp.float32)
    routing = Routing(p, jnp.asarray(ids, jnp.int32), jnp.zeros(N))
    return x, routing, gate / D**0.5, up / D**0.5, down / F**0.5


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradients(function, x, routing, gate, up, down):
    """The output, and the gradients of a fixed weighted sum of it in x, the probabilities and the
    three matrices."""

    def total(x, probabilities, gate, up, down):
        y = function(x, routing._replace(probabilities=probabilities), gate, up, down)
        return jnp.sum(y * jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)), y

    return jax.grad(total, argnums=(0, 1, 2, 3, 4), has_aux=True)(
        x, routing.probabilities, gate, up, down
    )


def assert_sparse_equals_dense(ids, probabilities):
    values = arguments(ids, probabilities)
    gradients, y = value_and_gradients(sparse_experts, *values)
    expected_gradients, expected = value_and_gradients(dense_experts, *values)
    assert_close(y, expected, "value")
    names = ("x", "probabilities", "gate", "up", "down")
    for name, got, want in zip(names, gradients, expected_gradients, strict=True):
        if name == "probabilities":
            # A slot of probability 0 runs no expert and gets no gradient: an excluded expert's
            # probability is constant.
            want = np.where(probabilities > 0, want, 0)
        assert_close(got, want, f"gradient of {name}")


def assert_close(got, want, what):
    assert np.linalg.norm(np.asarray(got, np.float64) - want) <= 1e-5 * np.linalg.norm(want), what


def sizes_of(*sizes: int) -> np.ndarray:
    """Ids of N tokens whose first slot takes expert e `sizes[e]` times and whose second slot takes
    the next expert."""
    first = np.repeat(np.arange(E), sizes)
    return np.stack([first, (first + 1) % E], axis=1)


@pytest.mark.parametrize(
    "ids",
    [
        pytest.param(np.tile([2, 0], (N, 1)), id="one hot expert and two that nobody chose"),
        pytest.param(sizes_of(BLOCK, BLOCK, 45, 0), id="groups that fill blocks exactly"),
        pytest.param(sizes_of(BLOCK + 1, BLOCK - 1, 44, 1), id="groups one off a block"),
        pytest.param(sizes_of(N, 0, 0, 0), id="groups of several blocks"),
        pytest.param(sizes_of(N - 3, 1, 1, 1), id="groups of one token"),
    ],
)
def test_sparse_dispatch_equals_running_every_expert(ids):
    rng = np.random.default_rng(0)
    ids = rng.permutation(ids)
    assert_sparse_equals_dense(ids, rng.uniform(0.05, 0.5, ids.shape))


@settings(max_examples=10)
@given(st.integers(0, 2**31), st.lists(st.floats(0.01, 1), min_size=E, max_size=E), st.floats(0, 1))
@example(0, [1.0] * E, 1.0)
def test_sparse_dispatch_equals_running_every_expert_for_any_routing(seed, popularity, unused):
    """`unused`: the share of second slots of probability 0, as where fewer experts are allowed than
    active."""
    rng = np.random.default_rng(seed)
    ids = np.argsort(rng.gumbel(size=(N, E)) + np.log(popularity), axis=1)[:, -A:]
    probabilities = rng.uniform(0.05, 0.5, (N, A))
    probabilities[:, 1][rng.random(N) < unused] = 0
    assert_sparse_equals_dense(ids, probabilities)


@pytest.mark.parametrize("kernels", ["xla", "pallas"])
def test_what_products_leave_behind_the_last_group_reaches_nothing(kernels, monkeypatch):
    """A TPU's products write nothing there: it is whatever lay in memory. Some may multiply it with
    0, and 0 times NaN is NaN."""
    rng = np.random.default_rng(0)
    probabilities = rng.uniform(0.05, 0.5, (N, A))
    probabilities[:, 1][rng.random(N) < 0.5] = 0
    values = arguments(np.argsort(rng.random((N, E)), axis=1)[:, :A], probabilities)
    clean = value_and_gradients(functools.partial(sparse_experts, kernels=kernels), *values)

    def behind(a, sizes):
        return (jnp.arange(a.shape[0]) >= jnp.sum(sizes))[:, None]

    def nothing_of(a, sizes):
        return 0 * jnp.sum(jnp.where(behind(a, sizes), a, 0))

    def matmul(x, w, sizes, *options, **more):
        y = grouped.RAGGED_DOT.matmul(x, w, sizes, *options, **more)
        return jnp.where(behind(y, sizes), jnp.nan, y) + nothing_of(x, sizes)

    def outer(x, dy, sizes, dtype):
        y = grouped.RAGGED_DOT.outer(x, dy, sizes, dtype)
        return y + nothing_of(x, sizes) + nothing_of(dy, sizes)

    products = grouped.Products(matmul, outer)
    monkeypatch.setitem(api._PASSES, "blocks", grouped.with_products(products))
    spoilt = value_and_gradients(functools.partial(sparse_experts, kernels=kernels), *values)
    for got, want in zip(jax.tree.leaves(spoilt), jax.tree.leaves(clean), strict=True):
        assert_close(got, want, "beside NaN")


def test_where_nothing_is_chosen_the_output_and_the_gradients_are_zero():
    gradients, y = value_and_gradients(
        sparse_experts, *arguments(np.tile([0, 1], (N, 1)), np.zeros((N, A)))
    )
    assert all(not np.asarray(part).any() for part in (y, *gradients))


def test_an_expert_that_nobody_chose_is_never_read():
    """Also where it is in a slot of probability 0, as an excluded expert is: NaN in it reaches no
    value and no gradient."""
    rng = np.random.default_rng(0)
    ids, probabilities = np.tile([0, 2], (N, 1)), rng.uniform(0.05, 0.5, (N, A))
    ids[:7, 1], probabilities[:7, 1] = 3, 0
    x, routing, *matrices = arguments(ids, probabilities)
    poisoned = [matrix.at[jnp.array([1, 3])].set(jnp.nan) for matrix in matrices]
    expected = value_and_gradients(sparse_experts, x, routing, *matrices)
    jax.tree.map(
        np.testing.assert_array_equal,
        value_and_gradients(sparse_experts, x, routing, *poisoned),
        expected,
    )


def test_tokens_do_not_see_each_other():
    """A NaN token, wherever its slots are among the others, spoils its own output only."""
    rng = np.random.default_rng(0)
    ids = np.argsort(rng.random((N, E)), axis=1)[:, :A]
    x, routing, *matrices = arguments(ids, rng.uniform(0.05, 0.5, (N, A)))
    run = jax.jit(sparse_experts)
    spoilt = np.array([0, 77, N - 1])
    y, with_nan = run(x, routing, *matrices), run(x.at[spoilt].set(jnp.nan), routing, *matrices)
    np.testing.assert_array_equal(np.delete(y, spoilt, 0), np.delete(with_nan, spoilt, 0))
    assert np.isnan(with_nan[spoilt]).all()


def test_weight_gradients_in_bfloat16_are_summed_in_float32():
    """Over many blocks, a bfloat16 sum would stop growing: 8 bits of it are soon larger than what a
    block adds."""
    tokens = 32 * 512  # 32 of the largest blocks
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(tokens, D), (1, D, F), (1, D, F), (1, F, D)]
    x, *matrices = (
        jnp.abs(jax.random.normal(k, s)).astype(jnp.bfloat16) / 4
        for k, s in zip(keys, shapes, strict=True)
    )
    routing = Routing(jnp.ones((tokens, 1)), jnp.zeros((tokens, 1), jnp.int32), jnp.zeros(tokens))

    def total(matrices):
        return jnp.sum(sparse_experts(x, routing, *matrices), dtype=jnp.float32)

    def exact(matrices):
        return jnp.sum(swiglu(x.astype(jnp.float32), *(matrix[0] for matrix in matrices)))

    gradients = jax.jit(jax.grad(total))(matrices)
    expected = jax.jit(jax.grad(exact))([matrix.astype(jnp.float32) for matrix in matrices])
    for gradient, want in zip(gradients, expected, strict=True):
        assert gradient.dtype == jnp.bfloat16
        assert np.linalg.norm(gradient.astype(jnp.float32) - want) < 0.005 * np.linalg.norm(want)
