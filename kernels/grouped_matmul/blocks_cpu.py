"""The expert FFN for CPUs: loops over blocks of rows that belong to one expert.

`lax.ragged_dot` is dense on CPU. Here a group is cut into blocks of `block` rows and one rest;
rests have a few sizes to choose from, so that little is multiplied in vain, and there is one loop
with a traced number of turns for each size:

    block size R:   for every block of that size:   rows start .. start + R of one expert, those
    outside the group masked

A `lax.switch` over the sizes inside one loop would copy every array it carries on each turn (seen
in XLA's output of jax 0.10); a loop updates them in place. Blocks come in any order, so rows
outside the group keep what they hold.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from . import swiglu

STEP = 32  # rows, at least, between the sizes of rests
REST_SIZES = 8  # each is one more loop to compile

_dot = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32)


def forward(x, weights, sizes, gate, up, down):
    """The output and the two pre-activations, each 0 in rows behind the last group."""
    M, F = x.shape[0], gate.shape[2]

    def block(rows, expert, mask, carry):
        out, gated, upped = carry
        xb = rows(x)
        g, u = _times(xb, gate[expert]), _times(xb, up[expert])
        y = _times(swiglu.weighted(g, u, rows(weights)).astype(x.dtype), down[expert])
        return rows.set(out, y, mask), rows.set(gated, g, mask), rows.set(upped, u, mask)

    return _for_all_blocks(
        sizes, M, block, (jnp.zeros_like(x), jnp.zeros((M, F), x.dtype), jnp.zeros((M, F), x.dtype))
    )


def backward(x, weights, sizes, gate, up, down, gated, upped, dout):
    """The gradients in x, weights, gate, up and down."""

    def block(rows, expert, mask, carry):
        dx, dweights, dgate, dup, ddown = carry
        xb, doutb = _only(rows(x), mask), _only(rows(dout), mask)
        dhidden = _times_transposed(doutb, down[expert])
        h, dw, dg, du = swiglu.gradient(
            rows(gated).astype(jnp.float32), rows(upped).astype(jnp.float32), rows(weights), dhidden
        )
        # Masked after the arithmetic: 0 times a NaN of the next group is NaN.
        h, dg, du = (_only(a, mask).astype(x.dtype) for a in (h, dg, du))
        dxb = _times_transposed(dg, gate[expert]) + _times_transposed(du, up[expert])
        return (
            rows.set(dx, dxb, mask),
            rows.set(dweights, dw, mask),
            dgate.at[expert].add(_outer(xb, dg)),
            dup.at[expert].add(_outer(xb, du)),
            ddown.at[expert].add(_outer(h, doutb)),
        )

    # Weight gradients are summed over blocks in float32: in bfloat16 the sum soon swallows what a
    # block adds.
    zeros = (
        jnp.zeros_like(x),
        jnp.zeros_like(weights),
        *(jnp.zeros(w.shape, jnp.float32) for w in (gate, up, down)),
    )
    dx, dweights, *dmatrices = _for_all_blocks(sizes, x.shape[0], block, zeros)
    return (
        dx,
        dweights,
        *(d.astype(w.dtype) for d, w in zip(dmatrices, (gate, up, down), strict=True)),
    )


def block_sizes(M: int, E: int) -> tuple[int, ...]:
    """The sizes of rests, ascending; the last is also that of full blocks. From the expected rows
    of an expert, M / E."""
    full = min(256 if M < 256 * E else 512, M)
    step = min(max(STEP, full // REST_SIZES), full)
    return (*range(step, full, step), full)


class _Rows:
    """`size` rows from `start` on, of any array with M rows."""

    def __init__(self, start, size: int):
        self.start, self.size = start, size

    def __call__(self, a):
        return jax.lax.dynamic_slice_in_dim(a, self.start, self.size)

    def set(self, a, value, mask):
        value = value.astype(a.dtype)
        if mask is not None:
            value = jnp.where(mask if a.ndim == 1 else mask[:, None], value, self(a))
        return jax.lax.dynamic_update_slice_in_dim(a, value, self.start, 0)


def _for_all_blocks(sizes: Int[Array, " E"], M: int, block, carry):
    """Runs `carry = block(rows, expert, mask, carry)` for all blocks; `mask` is None where all rows
    belong to the expert."""
    rests = np.array(block_sizes(M, sizes.shape[0]))
    full = int(rests[-1])
    starts = jnp.cumsum(sizes) - sizes
    blocks_before = jnp.cumsum(sizes // full)

    def full_block(i, carry):
        expert = jnp.searchsorted(blocks_before, i, side="right")
        first = blocks_before[expert] - sizes[expert] // full
        return block(_Rows(starts[expert] + (i - first) * full, full), expert, None, carry)

    carry = jax.lax.fori_loop(0, blocks_before[-1], full_block, carry)
    # Experts in the order of their rest's size; those without a rest come first and are left out.
    rest = sizes % full
    kind = jnp.where(rest > 0, jnp.searchsorted(rests, rest) + 1, 0)
    experts = jnp.argsort(kind)
    ends = jnp.cumsum(jnp.sum(kind[:, None] == jnp.arange(len(rests) + 1), axis=0))

    def rest_block(size, i, carry):
        expert = experts[i]
        end = starts[expert] + sizes[expert]
        first = end - rest[expert]
        # the last block of all may reach back into rows that are not its own
        start = jnp.minimum(first, M - size)
        row = start + jnp.arange(size)
        return block(_Rows(start, size), expert, (row >= first) & (row < end), carry)

    for i, size in enumerate(rests.tolist()):
        carry = jax.lax.fori_loop(ends[i], ends[i + 1], functools.partial(rest_block, size), carry)
    return carry


def _only(a, mask):
    return a if mask is None else jnp.where(mask[:, None], a, 0)


def _times(a, w):
    return _dot(a, w, (((1,), (0,)), ((), ())))


def _times_transposed(a, w):
    return _dot(a, w, (((1,), (1,)), ((), ())))


def _outer(a, b):
    return _dot(a, b, (((0,), (0,)), ((), ())))
