"""`permute` and `combine` as Pallas kernels for TPU: one DMA a row, the rows of many slots in
flight at once.

A single row of a [N, D] array is no whole tile in TPU memory and cannot be copied alone; of the
view [N, D/128, 128] it can. `permute` reads a token once, into VMEM, and copies it from there to
each of its rows. `combine` copies a token's rows into one half of a buffer while it sums those in
the other half.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from ..route import DispatchPlan

Interpret = bool | pltpu.InterpretParams

LANES = 128
TOKENS = 128  # a block: at D = 4096 in float32, 2 MiB
GROUP = 8  # tokens whose rows `combine` has in flight together


def permute(
    x: Float[Array, "N D"],
    plan: DispatchPlan,
    *,
    interpret: Interpret = False,
    tokens: int = TOKENS,
) -> Float[Array, "M D"]:
    """`reference.permute`, `tokens` a block. Raises ValueError where rows are no whole lanes."""
    (N, D), A = x.shape, plan.rows.shape[1]
    x = _lanes(x)
    out = pl.pallas_call(
        _permute_kernel,
        grid=(pl.cdiv(N, tokens),),
        in_specs=[_slots(tokens * A), pl.BlockSpec(memory_space=pltpu.SMEM), _tokens(x, tokens)],
        out_specs=pl.BlockSpec(memory_space=pl.ANY),
        out_shape=jax.ShapeDtypeStruct((N * A, *x.shape[1:]), x.dtype),
        scratch_shapes=[pltpu.VMEM(x.shape[1:], x.dtype), pltpu.SemaphoreType.DMA],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        interpret=interpret,
        name="permute",
    )(_blocks(plan.rows, tokens), jnp.sum(plan.sizes).reshape(1), x)
    return out.reshape(N * A, D)


def combine(
    rows: Float[Array, "M D"],
    plan: DispatchPlan,
    *,
    interpret: Interpret = False,
    tokens: int = TOKENS,
) -> Float[Array, "N D"]:
    """`reference.combine`, `tokens` a block (a multiple of `GROUP`). Raises ValueError where rows
    are no whole lanes."""
    (N, A), D = plan.rows.shape, rows.shape[1]
    rows = _lanes(rows)
    y = jax.ShapeDtypeStruct((N, *rows.shape[1:]), rows.dtype)
    out = pl.pallas_call(
        functools.partial(_combine_kernel, active=A),
        grid=(pl.cdiv(N, tokens),),
        in_specs=[_slots(tokens * A), pl.BlockSpec(memory_space=pl.ANY)],
        out_specs=_tokens(y, tokens),
        out_shape=y,
        scratch_shapes=[
            pltpu.VMEM((2, GROUP * A, *rows.shape[1:]), rows.dtype),
            pltpu.SemaphoreType.DMA((2,)),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        interpret=interpret,
        name="combine",
    )(_blocks(plan.rows, tokens), rows)
    return out.reshape(N, D)


def _permute_kernel(rows_ref, used_ref, x_ref, out_ref, zero_ref, arrived):
    M, slots = out_ref.shape[0], rows_ref.shape[1]
    active = slots // x_ref.shape[0]
    zero_ref[...] = jnp.zeros_like(zero_ref)
    # Rows behind the last group are shared out among the blocks.
    first = pl.program_id(0) * slots
    unused = jnp.maximum(used_ref[0], first), jnp.minimum(M, first + slots)

    def for_all_copies(act):
        @pl.loop(0, slots)
        def _(slot):
            row = rows_ref[0, slot]

            @pl.when(row < M)
            def _():
                act(
                    pltpu.make_async_copy(
                        x_ref.at[jax.lax.div(slot, active)], out_ref.at[row], arrived
                    )
                )

        @pl.loop(*unused)
        def _(row):
            act(pltpu.make_async_copy(zero_ref, out_ref.at[row], arrived))

    for_all_copies(lambda copy: copy.start())
    for_all_copies(lambda copy: copy.wait())


def _combine_kernel(slots_ref, rows_ref, y_ref, buffer_ref, arrived, *, active: int):
    M, groups = rows_ref.shape[0], y_ref.shape[0] // GROUP

    def for_all_copies(group, act):
        half = jax.lax.rem(group, 2)

        @pl.loop(0, GROUP * active)
        def _(i):
            row = slots_ref[0, group * GROUP * active + i]

            @pl.when(row < M)
            def _():
                act(
                    pltpu.make_async_copy(
                        rows_ref.at[row], buffer_ref.at[half, i], arrived.at[half]
                    )
                )

    for_all_copies(0, lambda copy: copy.start())

    @pl.loop(0, groups)
    def _(group):
        @pl.when(group + 1 < groups)
        def _():
            for_all_copies(group + 1, lambda copy: copy.start())

        for_all_copies(group, lambda copy: copy.wait())

        @pl.loop(0, GROUP)
        def _(i):
            token = group * GROUP + i
            y = jnp.zeros(y_ref.shape[1:], jnp.float32)  # summed in float32, rounded once
            for a in range(active):
                row = buffer_ref[jax.lax.rem(group, 2), i * active + a].astype(jnp.float32)
                y += jnp.where(slots_ref[0, token * active + a] < M, row, 0)
            y_ref[token] = y.astype(y_ref.dtype)


def _lanes(rows: Array) -> Float[Array, "rows lanes 128"]:
    if rows.shape[1] % LANES:
        raise ValueError(
            f"Pallas copies rows of whole lanes: D must be a multiple of {LANES}, got"
            f" {rows.shape[1]}; use 'xla'"
        )
    return rows.reshape(rows.shape[0], -1, LANES)


def _blocks(rows: Int[Array, "N A"], tokens: int) -> Int[Array, "blocks 1 slots"]:
    """The rows of each block's slots; slots of the last block that no token has get no row."""
    N, A = rows.shape
    return jnp.pad(rows, ((0, -N % tokens), (0, 0)), constant_values=N * A).reshape(
        -1, 1, tokens * A
    )


def _slots(slots: int) -> pl.BlockSpec:
    return pl.BlockSpec((None, 1, slots), lambda i: (i, 0, 0), memory_space=pltpu.SMEM)


def _tokens(x: Array | jax.ShapeDtypeStruct, tokens: int) -> pl.BlockSpec:
    return pl.BlockSpec((tokens, *x.shape[1:]), lambda i: (i, 0, 0))
