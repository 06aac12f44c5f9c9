"""Every expert on every token, masked, in plain XLA: E times the work.

It is the definition that the other implementations are tested against.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from . import swiglu


def forward(x, probabilities, sizes, gate, up, down):
    """The output and the two pre-activations, each 0 behind the last group."""
    gated = _each_expert(x, gate, sizes)
    upped = _each_expert(x, up, sizes)
    hidden = swiglu.scaled(gated, upped, probabilities).astype(x.dtype)
    return tuple(a.astype(x.dtype) for a in (_each_expert(hidden, down, sizes), gated, upped))


def backward(x, probabilities, sizes, gate, up, down, gated, upped, dout):
    """The gradients in x, probabilities, gate, up and down."""
    used = jnp.arange(x.shape[0]) < jnp.sum(sizes)
    dhidden = _each_expert(dout, down.swapaxes(1, 2), sizes)
    gated, upped = gated.astype(jnp.float32), upped.astype(jnp.float32)
    hidden, dprobabilities, *dinputs = swiglu.gradient(gated, upped, probabilities, dhidden)
    hidden, dgated, dupped = (a.astype(x.dtype) for a in (hidden, *dinputs))
    dx = _each_expert(dgated, gate.swapaxes(1, 2), sizes)
    dx += _each_expert(dupped, up.swapaxes(1, 2), sizes)
    dgate = _each_gradient(x, dgated, sizes)
    dup = _each_gradient(x, dupped, sizes)
    ddown = _each_gradient(hidden, dout, sizes)
    dprobabilities = jnp.where(used, dprobabilities, 0).astype(probabilities.dtype)
    dmatrices = zip((dgate, dup, ddown), (gate, up, down), strict=True)
    return dx.astype(x.dtype), dprobabilities, *(d.astype(w.dtype) for d, w in dmatrices)


def _each_expert(
    x: Float[Array, "M K"], w: Float[Array, "E K N"], sizes: Int[Array, " E"]
) -> Float[Array, "M N"]:
    """The tokens of group e times w[e]."""
    out = jnp.zeros((x.shape[0], w.shape[2]), jnp.float32)
    for e, mask in enumerate(_groups(x.shape[0], sizes)):
        # `where`, never a product with 0: NaN in another expert or another token must not leak.
        out = jnp.where(mask, jnp.matmul(x, w[e], preferred_element_type=jnp.float32), out)
    return out


def _each_gradient(
    x: Float[Array, "M K"], dy: Float[Array, "M N"], sizes: Int[Array, " E"]
) -> Float[Array, "E K N"]:
    """x^T dy over the tokens of each group."""

    def of_group(mask):
        own_x, own_dy = jnp.where(mask, x, 0).T, jnp.where(mask, dy, 0)
        return jnp.matmul(own_x, own_dy, preferred_element_type=jnp.float32)

    return jnp.stack([of_group(mask) for mask in _groups(x.shape[0], sizes)])


def _groups(M: int, sizes: Int[Array, " E"]) -> list[Array]:
    """For each group a mask [M, 1] of its tokens."""
    ends = jnp.cumsum(sizes)
    place = jnp.arange(M)
    return [
        ((place >= ends[e] - sizes[e]) & (place < ends[e]))[:, None] for e in range(sizes.shape[0])
    ]
