"""The expert FFN for CPUs and GPUs: loops over blocks of tokens that belong to one expert.

`lax.ragged_dot` may be dense there: it then multiplies every token with every expert. A group is
cut into blocks of one full size and a rest. A rest's size is one of a few, so that little is
multiplied in vain, and each size has a loop whose number of turns is known only at run time:

    for every block of size R:      tokens start .. start + R of one expert, others masked

One loop with a `lax.switch` over the sizes in it would copy every array it carries on each turn
(seen in XLA's output of jax 0.10); a loop for each size updates them in place. Blocks come in any
order, so a block leaves the tokens of other groups as they are.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from . import swiglu

STEP = 32  # tokens, at least, between two sizes of rests
REST_SIZES = 8  # each is one more loop to compile
# Multiplications, M D F, of a product so small that more loops save less in thousands of steps than
# they take to compile.
SMALL = 2**24

_dot = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32)


def forward(x, probabilities, sizes, gate, up, down):
    """The output and the two pre-activations, each 0 behind the last group."""
    (M, D), (E, _, F) = x.shape, gate.shape

    def block(span, expert, mask, carry):
        out, gated, upped = carry
        xb = span.part_of(x)
        g, u = _times(xb, gate[expert]), _times(xb, up[expert])
        hidden = swiglu.scaled(g, u, span.part_of(probabilities)).astype(x.dtype)
        y = _times(hidden, down[expert])
        return span.set(out, y, mask), span.set(gated, g, mask), span.set(upped, u, mask)

    zeros = jnp.zeros_like(x), jnp.zeros((M, F), x.dtype), jnp.zeros((M, F), x.dtype)
    return _for_all_blocks(sizes, M, block_sizes(M, E, D, F), block, zeros)


def backward(x, probabilities, sizes, gate, up, down, gated, upped, dout):
    """The gradients in x, probabilities, gate, up and down."""
    (M, D), (E, _, F) = x.shape, gate.shape

    def block(span, expert, mask, carry):
        dx, dprobabilities, dgate, dup, ddown = carry
        xb, doutb = _only(span.part_of(x), mask), _only(span.part_of(dout), mask)
        dhidden = _times_transposed(doutb, down[expert])
        g, u = span.part_of(gated).astype(jnp.float32), span.part_of(upped).astype(jnp.float32)
        h, dp, dg, du = swiglu.gradient(g, u, span.part_of(probabilities), dhidden)
        # Masked after the arithmetic: 0 times a NaN of the next group is NaN.
        h, dg, du = (_only(a, mask).astype(x.dtype) for a in (h, dg, du))
        dxb = _times_transposed(dg, gate[expert]) + _times_transposed(du, up[expert])
        return (
            span.set(dx, dxb, mask),
            span.set(dprobabilities, dp, mask),
            dgate.at[expert].add(_outer(xb, dg)),
            dup.at[expert].add(_outer(xb, du)),
            ddown.at[expert].add(_outer(h, doutb)),
        )

    matrices = gate, up, down
    # The matrices' gradients are summed over blocks in float32: a sum in bfloat16 soon is too large
    # to change.
    zeros = (jnp.zeros(w.shape, jnp.float32) for w in matrices)
    carry = (jnp.zeros_like(x), jnp.zeros_like(probabilities), *zeros)
    rests = block_sizes(M, E, D, F)
    dx, dprobabilities, *dmatrices = _for_all_blocks(sizes, M, rests, block, carry)
    dmatrices = (d.astype(w.dtype) for d, w in zip(dmatrices, matrices, strict=True))
    return dx, dprobabilities, *dmatrices


def block_sizes(M: int, E: int, D: int, F: int) -> tuple[int, ...]:
    """The sizes of rests, ascending; the last is also that of full blocks.

    They depend on M / E, the number of tokens an expert has on average. A small product has one.
    """
    if M * D * F <= SMALL:
        return (min(2 * STEP, M),)
    full = min(256 if M < 256 * E else 512, M)
    step = min(max(STEP, full // REST_SIZES), full)
    return (*range(step, full, step), full)


class _Span:
    """`size` places from `start` on, in any array of M places."""

    def __init__(self, start, size: int):
        self.start, self.size = start, size

    def part_of(self, a):
        return jax.lax.dynamic_slice_in_dim(a, self.start, self.size)

    def set(self, a, value, mask):
        """`a` with `value` at these places, as far as `mask` is True."""
        value = value.astype(a.dtype)
        if mask is not None:
            value = jnp.where(mask if a.ndim == 1 else mask[:, None], value, self.part_of(a))
        return jax.lax.dynamic_update_slice_in_dim(a, value, self.start, 0)


def _for_all_blocks(sizes: Int[Array, " E"], M: int, rest_sizes: tuple[int, ...], block, carry):
    """Runs `carry = block(span, expert, mask, carry)` for all blocks.

    `mask` is None where all tokens of the block are the expert's: full blocks need no masking.
    """
    rests = np.array(rest_sizes)
    full = int(rests[-1])
    starts = jnp.cumsum(sizes) - sizes
    blocks_before = jnp.cumsum(sizes // full)

    def full_block(i, carry):
        expert = jnp.searchsorted(blocks_before, i, side="right")
        first = blocks_before[expert] - sizes[expert] // full
        return block(_Span(starts[expert] + (i - first) * full, full), expert, None, carry)

    carry = jax.lax.fori_loop(0, blocks_before[-1], full_block, carry)
    # The experts whose rests have the same size are neighbours in this order, so that one loop runs
    # them. Those without a rest come first and are left out.
    rest = sizes % full
    kind = jnp.where(rest > 0, jnp.searchsorted(rests, rest) + 1, 0)
    experts = jnp.argsort(kind)
    ends = jnp.cumsum(jnp.sum(kind[:, None] == jnp.arange(len(rests) + 1), axis=0))

    def rest_block(size, i, carry):
        expert = experts[i]
        end = starts[expert] + sizes[expert]
        first = end - rest[expert]
        # At the end of the array a block reaches back into other tokens, which are masked.
        start = jnp.minimum(first, M - size)
        place = start + jnp.arange(size)
        return block(_Span(start, size), expert, (place >= first) & (place < end), carry)

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
