"""Every expert on every row, masked: plain XLA, E times the work. What the other implementations
are tested against."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from . import swiglu


def forward(x, weights, sizes, gate, up, down):
    """The output and the two pre-activations, each 0 in rows behind the last group."""
    gated = _each_expert(x, gate, sizes)
    upped = _each_expert(x, up, sizes)
    hidden = swiglu.weighted(gated, upped, weights).astype(x.dtype)
    return tuple(a.astype(x.dtype) for a in (_each_expert(hidden, down, sizes), gated, upped))


def backward(x, weights, sizes, gate, up, down, gated, upped, dout):
    """The gradients in x, weights, gate, up and down."""
    used = jnp.arange(x.shape[0]) < jnp.sum(sizes)
    dhidden = _each_expert(dout, down.swapaxes(1, 2), sizes)
    parts = swiglu.gradient(gated.astype(jnp.float32), upped.astype(jnp.float32), weights, dhidden)
    hidden, dgated, dupped = (parts[i].astype(x.dtype) for i in (0, 2, 3))
    dx = _each_expert(dgated, gate.swapaxes(1, 2), sizes) + _each_expert(
        dupped, up.swapaxes(1, 2), sizes
    )
    dgate, dup, ddown = (
        _each_gradient(x, dgated, sizes),
        _each_gradient(x, dupped, sizes),
        _each_gradient(hidden, dout, sizes),
    )
    dweights = jnp.where(used, parts[1], 0).astype(weights.dtype)
    return (
        dx.astype(x.dtype),
        dweights,
        dgate.astype(gate.dtype),
        dup.astype(up.dtype),
        ddown.astype(down.dtype),
    )


def _each_expert(
    x: Float[Array, "M K"], w: Float[Array, "E K N"], sizes: Int[Array, " E"]
) -> Float[Array, "M N"]:
    out = jnp.zeros((x.shape[0], w.shape[2]), jnp.float32)
    for e, rows in enumerate(_rows(x.shape[0], sizes)):
        # `where`, never a product with 0: NaN in another expert, or in another row, must not leak.
        out = jnp.where(rows, jnp.matmul(x, w[e], preferred_element_type=jnp.float32), out)
    return out


def _each_gradient(
    x: Float[Array, "M K"], dy: Float[Array, "M N"], sizes: Int[Array, " E"]
) -> Float[Array, "E K N"]:
    masks = _rows(x.shape[0], sizes)
    return jnp.stack(
        [
            jnp.matmul(
                jnp.where(m, x, 0).T, jnp.where(m, dy, 0), preferred_element_type=jnp.float32
            )
            for m in masks
        ]
    )


def _rows(M: int, sizes: Int[Array, " E"]) -> list[Array]:
    ends = jnp.cumsum(sizes)
    row = jnp.arange(M)
    return [((row >= ends[e] - sizes[e]) & (row < ends[e]))[:, None] for e in range(sizes.shape[0])]
