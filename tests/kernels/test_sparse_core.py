"""Rows that SparseCores gather and sum: values, races, and on which TPUs they are used.

The simulator of TPU memory has no SparseCores. It runs the kernel with a copy for each row instead
of a gather. The test for TPUs compares the gathers themselves.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexolmo_jax.kernels.permute import combine, permute, reference, sparse_core
from flexolmo_jax.kernels.permute.sparse_core import SparseCores, gather_sum
from flexolmo_jax.kernels.route import DispatchPlan
from tests.kernels.simulator import MODES, simulated
from tests.tpus import KINDS, traced_for

N, R, D = 13, 10, 256
# two subcores with two blocks of sums each, the last not full; memory for one part of 128 columns
SMALL = SparseCores(cores=1, subcores=2, lanes=4, memory=0)
WITH = {"v5e": False, "v5p": True, "v6e": True, "tpu7x": True}


def rows_and_values(active: int, dtype) -> tuple[jax.Array, jax.Array]:
    """Some rows are none; the last row of the array, which stands in for those, is NaN."""
    rows = np.random.default_rng(0).integers(0, R - 1, (active, N)).astype(np.int32)
    rows[:, 5], rows[0, 6] = R, R + 7
    x = jax.random.normal(jax.random.key(0), (R, D), dtype).at[R - 1].set(jnp.nan)
    return jnp.asarray(rows), x


def summed(x, rows):
    """The definition: in float32, one row after the other, rounded once."""
    total = jnp.zeros((N, D), jnp.float32)
    for row in rows:
        total += jnp.where((row < R)[:, None], x[jnp.minimum(row, R - 1)].astype(jnp.float32), 0)
    return total.astype(x.dtype)


def by_simulator(x, rows, mode: str):
    with simulated(mode) as params:
        run = jax.jit(lambda x, rows: gather_sum(x, rows, SMALL, interpret=params))
        with traced_for("v5p"):  # the pipeline asks for its tiles
            lowered = run.trace(x, rows).lower(lowering_platforms=("cpu",))
        return np.asarray(lowered.compile()(x, rows))


@pytest.mark.parametrize(
    ("mode", "dtype", "active"),
    [(MODES[0], jnp.bfloat16, 3), (MODES[1], jnp.float32, 2), (MODES[1], jnp.bfloat16, 1)],
)
def test_rows_are_summed_as_defined_and_no_copy_races(mode, dtype, active):
    rows, x = rows_and_values(active, dtype)
    got, want = by_simulator(x, rows, mode), summed(x, rows)
    assert got.dtype == dtype
    np.testing.assert_array_equal(got, want)
    if dtype == jnp.bfloat16 and active > 1:
        in_bfloat16 = sum(jnp.where((row < R)[:, None], x[row % R], 0) for row in rows)
        assert (want != in_bfloat16).any()  # else this does not show that it is rounded once


def plan_for(tokens: int, active: int, experts: int = 8) -> DispatchPlan:
    slots = jnp.arange(tokens * active, dtype=jnp.int32)
    return DispatchPlan(jnp.zeros(experts, jnp.int32), slots.reshape(tokens, active), slots)


@pytest.mark.parametrize("tpu", KINDS)
def test_the_tpus_that_have_sparse_cores_use_them(tpu):
    x = jax.ShapeDtypeStruct((1024, D), jnp.bfloat16)
    plan = plan_for(1024, 4)
    for function in (permute, combine):
        argument = x if function is permute else jax.ShapeDtypeStruct((4096, D), jnp.bfloat16)
        with traced_for(tpu):
            lowered = jax.jit(function).trace(argument, plan).lower(lowering_platforms=("tpu",))
        used = "gather_sum" in lowered.as_text()
        assert used == (WITH[tpu] and jax.__version_info__ >= (0, 12))


@pytest.mark.skipif(jax.__version_info__ < (0, 12), reason="not compiled below jax 0.12")
@pytest.mark.parametrize(
    ("taken", "shape", "dtype", "active", "sums"),
    [
        (True, (4096, D), jnp.bfloat16, 4, 1024),
        (False, (4096, D), jnp.bfloat16, 4, 511),  # v5p has 512 lanes
        (False, (4096, D + 64), jnp.bfloat16, 4, 1024),
        (False, (4095, D), jnp.bfloat16, 4, 1024),  # half a word left over
        (True, (4095, D), jnp.float32, 4, 1024),
        (False, (4096, D), jnp.float16, 4, 1024),
        (False, (4096, D), jnp.bfloat16, 64, 1024),  # more rows than a subcore can hold
    ],
)
def test_what_sparse_cores_cannot_do_is_left_to_others(taken, shape, dtype, active, sums):
    x = jax.ShapeDtypeStruct(shape, dtype)
    with traced_for("v5p"):
        assert (sparse_core.for_sums(x, active, sums) is not None) == taken
    assert sparse_core.for_sums(x, active, sums) is None  # nor on a CPU


@pytest.mark.tpu(only=True)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("active", [1, 2, 5])
def test_on_a_tpu_gathers_give_what_xla_gives(dtype, active):
    tokens, width = 2048, 1024
    order = jax.random.permutation(jax.random.key(0), tokens * active)
    slots = order.at[-100:].set(tokens * active)  # places without a slot
    places = jnp.full(tokens * active, tokens * active).at[order].set(jnp.arange(order.size))
    places = jnp.where(places < order.size - 100, places, order.size).reshape(tokens, active)
    plan = DispatchPlan(jnp.zeros(4, jnp.int32), places, slots)
    if (own := sparse_core.of_this_tpu()) is None:
        pytest.skip("this TPU has no SparseCores")
    for function, length in (("permute", tokens), ("combine", tokens * active)):
        x = jax.random.normal(jax.random.key(1), (length, width), dtype)
        got = jax.jit(functools.partial(getattr(sparse_core, function), own=own))(x, plan)
        np.testing.assert_array_equal(got, jax.jit(getattr(reference, function))(x, plan))
