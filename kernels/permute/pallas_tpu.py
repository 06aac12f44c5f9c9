"""`permute` and `combine` as Pallas kernels for TPU: one DMA for each slot, many in flight at once.

In TPU memory a single token of a [N, D] array is a part of a tile, because a tile spans several
tokens, and cannot be copied alone. In the view [N, D/128, 128] a token is whole tiles, and can.
`permute` reads a token once, into VMEM, and copies it from there to each of its places. `combine`
copies the outputs of some tokens into one half of a buffer while it sums those in the other half.
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
GROUP = 8  # tokens whose outputs `combine` has in flight together


def permute(
    x: Float[Array, "N D"],
    plan: DispatchPlan,
    *,
    interpret: Interpret = False,
    tokens: int = TOKENS,
) -> Float[Array, "M D"]:
    """`reference.permute`, `tokens` a block. Of the plan it reads `places` and `sizes`."""
    (N, D), A = x.shape, plan.places.shape[1]
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
    )(_blocks(plan.places, tokens), jnp.sum(plan.sizes).reshape(1), x)
    return out.reshape(N * A, -1)[:, :D]


def combine(
    outputs: Float[Array, "M D"],
    plan: DispatchPlan,
    *,
    interpret: Interpret = False,
    tokens: int = TOKENS,
) -> Float[Array, "N D"]:
    """`reference.combine`, `tokens` a block (a multiple of `GROUP`). Of the plan it reads
    `places`."""
    (N, A), D = plan.places.shape, outputs.shape[1]
    outputs = _lanes(outputs)
    y = jax.ShapeDtypeStruct((N, *outputs.shape[1:]), outputs.dtype)
    out = pl.pallas_call(
        functools.partial(_combine_kernel, active=A),
        grid=(pl.cdiv(N, tokens),),
        in_specs=[_slots(tokens * A), pl.BlockSpec(memory_space=pl.ANY)],
        out_specs=_tokens(y, tokens),
        out_shape=y,
        scratch_shapes=[
            pltpu.VMEM((2, GROUP * A, *outputs.shape[1:]), outputs.dtype),
            pltpu.SemaphoreType.DMA((2,)),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        interpret=interpret,
        name="combine",
    )(_blocks(plan.places, tokens), outputs)
    return out.reshape(N, -1)[:, :D]


def _permute_kernel(places_ref, used_ref, x_ref, out_ref, zero_ref, arrived):
    """`used_ref`: the number of used places. `arrived`: the semaphore of all copies."""
    M, slots = out_ref.shape[0], places_ref.shape[1]
    active = slots // x_ref.shape[0]
    zero_ref[...] = jnp.zeros_like(zero_ref)
    # Each block fills its share of the unused places, which are behind the last group.
    first = pl.program_id(0) * slots
    unused = jnp.maximum(used_ref[0], first), jnp.minimum(M, first + slots)

    def for_all_copies(act):
        @pl.loop(0, slots)
        def _(slot):
            place = places_ref[0, slot]

            @pl.when(place < M)
            def _():
                token = x_ref.at[jax.lax.div(slot, active)]
                act(pltpu.make_async_copy(token, out_ref.at[place], arrived))

        @pl.loop(*unused)
        def _(place):
            act(pltpu.make_async_copy(zero_ref, out_ref.at[place], arrived))

    # All copies are started before any is waited for: one loop does both, so that they match.
    for_all_copies(lambda copy: copy.start())
    for_all_copies(lambda copy: copy.wait())


def _combine_kernel(places_ref, outputs_ref, y_ref, buffer_ref, arrived, *, active: int):
    """`buffer_ref`: two halves, each for the outputs of `GROUP` tokens with a semaphore."""
    M, groups = outputs_ref.shape[0], y_ref.shape[0] // GROUP

    def for_all_copies(group, act):
        half = jax.lax.rem(group, 2)

        @pl.loop(0, GROUP * active)
        def _(i):
            place = places_ref[0, group * GROUP * active + i]

            @pl.when(place < M)
            def _():
                output, into = outputs_ref.at[place], buffer_ref.at[half, i]
                act(pltpu.make_async_copy(output, into, arrived.at[half]))

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
                output = buffer_ref[jax.lax.rem(group, 2), i * active + a].astype(jnp.float32)
                y += jnp.where(places_ref[0, token * active + a] < M, output, 0)
            y_ref[token] = y.astype(y_ref.dtype)


def _lanes(x: Array) -> Float[Array, "N lanes 128"]:
    """The view in which a token can be copied alone; its last lanes are padded where D is no
    multiple of 128."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % LANES))).reshape(x.shape[0], -1, LANES)


def _blocks(places: Int[Array, "N A"], tokens: int) -> Int[Array, "blocks 1 slots"]:
    """The places of each block's slots; the last block is padded with slots without a place."""
    N, A = places.shape
    places = jnp.pad(places, ((0, -N % tokens), (0, 0)), constant_values=N * A)
    return places.reshape(-1, 1, tokens * A)


def _slots(slots: int) -> pl.BlockSpec:
    return pl.BlockSpec((None, 1, slots), lambda i: (i, 0, 0), memory_space=pltpu.SMEM)


def _tokens(x: Array | jax.ShapeDtypeStruct, tokens: int) -> pl.BlockSpec:
    return pl.BlockSpec((tokens, *x.shape[1:]), lambda i: (i, 0, 0))
