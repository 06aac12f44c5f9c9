"""Routing and the dispatch plan as Pallas kernels for TPU.

Experts are on sublanes (padded to 8) and tokens on lanes (padded to 128): the other way round, 8
experts would fill 8 of 128 lanes. A softmax is then a reduction over sublanes. A TPU kernel cannot
sort, take prefix sums or gather. Instead, the top k are k maxima, ranks are a product with a
triangular matrix, and prefix sums are carried from tile to tile.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int

from .reference import Routing

Interpret = bool | pltpu.InterpretParams

LANES, SUBLANES = 128, 8
TOKENS = 1024  # a block of the routing kernels
# Slots in a tile of the plan: the triangular matrix fills the matrix unit of v6e and tpu7x once.
TILE = 256
LARGEST = 2**24  # slots of a plan: counts up to here are exact in float32


def route_forward(
    logits: Float[Array, "N E"], active: int, *, interpret: Interpret = False
) -> Routing:
    """`reference.route_forward`."""
    N = logits.shape[0]
    columns, block = _columns(logits)
    probabilities, ids, log_z = pl.pallas_call(
        functools.partial(_forward_kernel, active=active),
        grid=(columns.shape[1] // block,),
        in_specs=[_block(columns.shape[0], block)],
        out_specs=[_block(active, block), _block(active, block), _block(1, block)],
        out_shape=[
            jax.ShapeDtypeStruct((height, columns.shape[1]), dtype)
            for height, dtype in ((active, jnp.float32), (active, jnp.int32), (1, jnp.float32))
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        interpret=interpret,
        name="route_forward",
    )(columns)
    return Routing(probabilities[:, :N].T, ids[:, :N].T, log_z[0, :N])


def route_backward(
    logits: Float[Array, "N E"],
    ids: Int[Array, "N A"],
    log_z: Float[Array, " N"],
    dprobabilities: Float[Array, "N A"],
    dlog_z: Float[Array, " N"],
    *,
    interpret: Interpret = False,
) -> Float[Array, "N E"]:
    """`reference.route_backward`."""
    N, E = logits.shape
    A = ids.shape[1]
    columns, block = _columns(logits)
    tokens = columns.shape[1]
    slots = [
        jnp.pad(a.T, ((0, 0), (0, tokens - N)))
        for a in (ids, dprobabilities, log_z[:, None], dlog_z[:, None])
    ]
    dlogits = pl.pallas_call(
        _backward_kernel,
        grid=(tokens // block,),
        in_specs=[
            _block(columns.shape[0], block),
            _block(A, block),
            _block(A, block),
            _block(1, block),
            _block(1, block),
        ],
        out_specs=_block(columns.shape[0], block),
        out_shape=jax.ShapeDtypeStruct(columns.shape, jnp.float32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        interpret=interpret,
        name="route_backward",
    )(columns, *slots)
    return dlogits[:E, :N].T


def counted(
    ids: Int[Array, "N A"],
    chosen: Bool[Array, "N A"],
    num_experts: int,
    *,
    interpret: Interpret = False,
) -> tuple[Int[Array, " E"], Int[Array, "N A"]]:
    """`reference.counted`. Raises ValueError for more slots than float32 counts."""
    N, A = ids.shape
    M, E = N * A, num_experts
    if M > LARGEST:
        raise ValueError(f"a plan has at most {LARGEST} slots, got {N} tokens x {A}; use 'xla'")
    experts = _rounded(E, SUBLANES)
    expert = jnp.where(chosen, ids, -1).reshape(1, M)
    expert = jnp.pad(expert, ((0, 0), (0, -M % TILE)), constant_values=-1)
    places, sizes = pl.pallas_call(
        functools.partial(_plan_kernel, no_place=M),
        grid=(2, expert.shape[1] // TILE),  # count all tiles, then place them
        in_specs=[pl.BlockSpec((1, TILE), lambda phase, tile: (0, tile))],
        # While counting, the output stays at its first block, which is written before it moves on.
        out_specs=[
            pl.BlockSpec((1, TILE), lambda phase, tile: (0, phase * tile)),
            pl.BlockSpec((experts, LANES), lambda phase, tile: (0, 0)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct(expert.shape, jnp.int32),
            jax.ShapeDtypeStruct((experts, LANES), jnp.int32),
        ],
        scratch_shapes=[pltpu.VMEM((experts, LANES), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary", "arbitrary")),
        interpret=interpret,
        name="dispatch_plan",
    )(expert)
    return sizes[:E, 0], places[0, :M].reshape(N, A)


def _forward_kernel(logits_ref, probabilities_ref, ids_ref, log_z_ref, *, active: int):
    logits = logits_ref[...]
    best = jnp.max(logits, axis=0, keepdims=True)
    log_z = best + jnp.log(jnp.sum(jnp.exp(logits - best), axis=0, keepdims=True))
    log_z_ref[...] = log_z
    # Indices as float32: not every TPU's vector unit can reduce whole numbers.
    index = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 0).astype(jnp.float32)
    free = jnp.ones(logits.shape, jnp.float32)
    # NaN equals nothing, so it would never be chosen. As the largest score it is chosen first, as
    # by lax.top_k, and its probability is NaN through log_z.
    score = jnp.where(logits == logits, logits, jnp.inf)
    for a in range(active):
        best = jnp.max(jnp.where(free > 0, score, -jnp.inf), axis=0, keepdims=True)
        # Among free experts only: excess slots, which find nothing but -inf, then take a different
        # excluded expert each.
        candidates = jnp.where((score == best) & (free > 0), index, float(logits.shape[0]))
        id = jnp.min(candidates, axis=0, keepdims=True)
        probabilities_ref[a : a + 1, :] = jnp.exp(best - log_z)
        ids_ref[a : a + 1, :] = id.astype(jnp.int32)
        free = jnp.where(index == id, 0.0, free)


def _backward_kernel(logits_ref, ids_ref, dprobabilities_ref, log_z_ref, dlog_z_ref, dlogits_ref):
    p = jnp.exp(logits_ref[...] - log_z_ref[...])
    index = jax.lax.broadcasted_iota(jnp.int32, p.shape, 0)
    g = jnp.zeros(p.shape, jnp.float32)
    for a in range(ids_ref.shape[0]):
        chosen = (index == ids_ref[a : a + 1, :]) & (p > 0)
        g = jnp.where(chosen, dprobabilities_ref[a : a + 1, :], g)
    inner = jnp.sum(p * g, axis=0, keepdims=True)
    dlogits_ref[...] = jnp.where(p > 0, p * (g - inner + dlog_z_ref[...]), 0)


def _plan_kernel(expert_ref, places_ref, sizes_ref, taken_ref, *, no_place: int):
    """In phase 0 all tiles are counted, in phase 1 their slots get places.

    `taken_ref` holds, alike in all lanes, each expert's count so far and then its next place.
    """
    phase, tile = pl.program_id(0), pl.program_id(1)
    experts = taken_ref.shape[0]
    expert = expert_ref[...]
    one_hot = jax.lax.broadcasted_iota(jnp.int32, (experts, TILE), 0) == expert
    one_hot = one_hot.astype(jnp.float32)
    counts = jnp.sum(one_hot, axis=1, keepdims=True)

    @pl.when((phase == 0) & (tile == 0))
    def _():
        taken_ref[...] = jnp.zeros_like(taken_ref)

    @pl.when((phase == 1) & (tile == 0))
    def _():
        sizes = taken_ref[...]
        sizes_ref[...] = sizes.astype(jnp.int32)
        # "highest", because otherwise the matrix unit multiplies float32 in bfloat16, which has too
        # few digits for sizes.
        smaller = _before(experts, axis=1)
        taken_ref[...] = jnp.dot(
            smaller, sizes, precision="highest", preferred_element_type=jnp.float32
        )

    @pl.when(phase == 1)
    def _():
        rank = jnp.dot(one_hot, _before(TILE, axis=0), preferred_element_type=jnp.float32)
        place = jnp.sum(one_hot * (rank + taken_ref[:, :1]), axis=0, keepdims=True)
        places_ref[...] = jnp.where(expert >= 0, place.astype(jnp.int32), no_place)

    taken_ref[...] += counts


def _before(size: int, axis: int) -> Float[Array, "size size"]:
    """1 where the index along `axis` is smaller than the other one."""
    index = functools.partial(jax.lax.broadcasted_iota, jnp.int32, (size, size))
    return (index(axis) < index(1 - axis)).astype(jnp.float32)


def _columns(logits: Float[Array, "N E"]) -> tuple[Float[Array, "E N"], int]:
    """Logits with a column for each token, padded to whole blocks, and the tokens of a block."""
    N, E = logits.shape
    block = min(TOKENS, _rounded(N, LANES))
    columns = jnp.pad(logits.T, ((0, -E % SUBLANES), (0, 0)), constant_values=-jnp.inf)
    return jnp.pad(columns, ((0, 0), (0, -N % block))), block


def _block(height: int, tokens: int) -> pl.BlockSpec:
    return pl.BlockSpec((height, tokens), lambda i: (0, i))


def _rounded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
