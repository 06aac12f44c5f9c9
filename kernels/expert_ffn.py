"""SwiGLU experts, `y_n = sum_a weights[n, a] * FFN_{ids[n, a]}(x_n)`, dense (every expert runs) or sparse (dropless dispatch).

The dense path is the least work where all or nearly all experts are active (pair training, router tuning). The sparse path
costs `A` experts a token whatever `E` is: rows sorted by expert, then one loop over blocks of rows that belong to one expert.
A loop with a traced number of blocks has no automatic gradient, so the sparse path carries its own.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .route import Routing

BLOCK = 128  # rows of one expert multiplied at once; measured on CPU, larger only pays from 512 rows an expert on


def swiglu(x: Float[Array, "N D"], gate: Float[Array, "D F"], up: Float[Array, "D F"], down: Float[Array, "F D"]) -> Float[Array, "N D"]:
    """One expert: `(silu(x gate) * (x up)) down`."""
    return (jax.nn.silu(x @ gate) * (x @ up)) @ down


def sparse_experts(
    x: Float[Array, "N D"], routing: Routing, gate: Float[Array, "E D F"], up: Float[Array, "E D F"], down: Float[Array, "E F D"]
) -> Float[Array, "N D"]:
    """Runs only the chosen experts. An expert that is chosen nowhere is never read, so nothing in its weights can matter."""
    N, A = routing.ids.shape
    E = gate.shape[0]
    # A slot of weight 0 (an excluded expert in an excess slot) gets no row: it sorts behind every real expert.
    expert = jnp.where(routing.weights > 0, routing.ids, E).reshape(N * A)
    order = jnp.argsort(expert, stable=True)
    sizes = jnp.sum(expert[:, None] == jnp.arange(E), axis=0)
    out = _grouped_swiglu(x[order // A], sizes, gate, up, down)
    by_slot = jnp.zeros_like(out).at[order].set(out, unique_indices=True).reshape(N, A, -1)
    weighted = jnp.where(routing.weights[:, :, None] > 0, by_slot * routing.weights[:, :, None].astype(by_slot.dtype), 0)
    return jnp.sum(weighted, axis=1)


@jax.custom_vjp
def _grouped_swiglu(x: Float[Array, "M D"], sizes: Int[Array, "E"], gate: Array, up: Array, down: Array) -> Float[Array, "M D"]:
    """`swiglu` of each row with its group's expert; rows behind the last group give 0."""
    M, D = x.shape
    x = jnp.pad(x, ((0, BLOCK), (0, 0)))
    blocks, block_of = _blocks(sizes)

    def body(i, out):
        expert, start, rows = block_of(i)
        y = swiglu(jax.lax.dynamic_slice_in_dim(x, start, BLOCK), gate[expert], up[expert], down[expert])
        # A block's tail may reach into the next group: those rows are 0 here and overwritten by their own block, which comes later.
        return jax.lax.dynamic_update_slice_in_dim(out, jnp.where(rows, y, 0), start, 0)

    return jax.lax.fori_loop(0, blocks, body, jnp.zeros((M + BLOCK, D), x.dtype))[:M]


def _forward(x, sizes, gate, up, down):
    return _grouped_swiglu(x, sizes, gate, up, down), (x, sizes, gate, up, down)


def _backward(saved, dy):
    x, sizes, gate, up, down = saved
    M, D = x.shape
    x, dy = (jnp.pad(a, ((0, BLOCK), (0, 0))) for a in (x, dy))
    blocks, block_of = _blocks(sizes)

    def body(i, carry):
        dx, dgate, dup, ddown = carry
        expert, start, rows = block_of(i)
        block = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=BLOCK)
        _, pullback = jax.vjp(swiglu, block(x), gate[expert], up[expert], down[expert])
        dxb, dg, du, dd = pullback(jnp.where(rows, block(dy), 0))
        dx = jax.lax.dynamic_update_slice_in_dim(dx, dxb, start, 0)
        return dx, dgate.at[expert].add(dg), dup.at[expert].add(du), ddown.at[expert].add(dd)

    # Weight gradients are summed over blocks in float32: in bfloat16 the sum soon swallows what a block adds.
    zeros = (jnp.zeros((M + BLOCK, D), x.dtype), *(jnp.zeros(w.shape, jnp.float32) for w in (gate, up, down)))
    dx, dgate, dup, ddown = jax.lax.fori_loop(0, blocks, body, zeros)
    return dx[:M], None, dgate.astype(gate.dtype), dup.astype(up.dtype), ddown.astype(down.dtype)


_grouped_swiglu.defvjp(_forward, _backward)


def _blocks(sizes: Int[Array, "E"]):
    """The number of blocks, and the function from a block's index to its expert, first row and mask of its own rows."""
    ends = jnp.cumsum(sizes)
    block_ends = jnp.cumsum((sizes + BLOCK - 1) // BLOCK)

    def block_of(i):
        expert = jnp.searchsorted(block_ends, i, side="right")
        first = jnp.where(expert > 0, block_ends[expert - 1], 0)
        start = ends[expert] - sizes[expert] + (i - first) * BLOCK
        rows = (start + jnp.arange(BLOCK) < ends[expert])[:, None]
        return expert, start, rows

    return block_ends[-1], block_of
