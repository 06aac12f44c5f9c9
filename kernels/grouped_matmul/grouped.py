"""The expert FFN from two grouped products: `lax.ragged_dot`, or megablox's Pallas kernels.

    matmul(x [M, K], w [E, K, N], sizes) -> [M, N]          the tokens of group e times w[e]
    outer(x [M, K], dy [M, N], sizes) -> [E, K, N]          x^T dy over the tokens of group e

This is the form for TPUs, whose libraries multiply groups natively. Both leave open what
`matmul` gives behind the last group. What another product takes is set to 0 there, in the same pass
as what is between the products; the rest is left as it is.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm
from jaxtyping import Array, Float, Int

from . import swiglu
from .tiles import gmm_tiling, tgmm_tiling


class Products(NamedTuple):
    """`matmul(x, w, sizes, dtype, transposed=False)` and `outer(x, dy, sizes, dtype)`.

    With `transposed`, w is [E, N, K].
    """

    matmul: Callable[..., Array]
    outer: Callable[..., Array]


def with_products(products: Products):
    """The forward and backward pass made of these products."""
    matmul, outer = products

    def forward(x, probabilities, sizes, gate, up, down):
        used = _used(x, sizes)
        gated = jnp.where(used, matmul(x, gate, sizes, x.dtype), 0)
        upped = jnp.where(used, matmul(x, up, sizes, x.dtype), 0)
        wide = gated.astype(jnp.float32), upped.astype(jnp.float32)
        hidden = swiglu.scaled(*wide, jnp.where(used[:, 0], probabilities, 0))
        out = matmul(hidden.astype(x.dtype), down, sizes, x.dtype)
        return out, gated, upped

    def backward(x, probabilities, sizes, gate, up, down, gated, upped, dout):
        used = _used(x, sizes)
        dhidden = jnp.where(used, matmul(dout, down, sizes, jnp.float32, transposed=True), 0)
        wide = gated.astype(jnp.float32), upped.astype(jnp.float32)
        own = jnp.where(used[:, 0], probabilities, 0)
        hidden, dprobabilities, *dinputs = swiglu.gradient(*wide, own, dhidden)
        hidden, dgated, dupped = (a.astype(x.dtype) for a in (hidden, *dinputs))
        dx = matmul(dgated, gate, sizes, jnp.float32, transposed=True)
        dx += matmul(dupped, up, sizes, jnp.float32, transposed=True)
        return (
            dx.astype(x.dtype),
            dprobabilities.astype(probabilities.dtype),
            outer(x, dgated, sizes, gate.dtype),
            outer(x, dupped, sizes, up.dtype),
            outer(hidden, dout, sizes, down.dtype),
        )

    return forward, backward


def _used(x: Float[Array, "M D"], sizes: Int[Array, " E"]):
    """A mask [M, 1] of the tokens that are in a group."""
    return (jnp.arange(x.shape[0]) < jnp.sum(sizes))[:, None]


def _ragged_matmul(x, w, sizes, dtype, transposed=False):
    # Where ragged_dot is dense, it multiplies zeros with the experts of empty groups too, and 0
    # times NaN is NaN. On TPU it does not read them.
    w = jax.lax.platform_dependent(
        w,
        sizes,
        tpu=lambda w, _: w,
        default=lambda w, sizes: jnp.where(sizes[:, None, None] > 0, w, 0),
    )
    contracted = [1], [2 if transposed else 1]
    dimensions = jax.lax.RaggedDotDimensionNumbers((contracted, ([], [])), [0], [0])
    return _ragged_dot(x, w, sizes, dimensions, dtype)


def _ragged_outer(x, dy, sizes, dtype):
    dimensions = jax.lax.RaggedDotDimensionNumbers((([0], [0]), ([], [])), [0], [])
    return _ragged_dot(x, dy, sizes, dimensions, dtype)


def _ragged_dot(x, w, sizes, dimensions, dtype):
    """Accumulated in float32, rounded to `dtype` once."""
    run = functools.partial(jax.lax.ragged_dot_general, ragged_dot_dimension_numbers=dimensions)
    # TPU's kernel accumulates in float32 whatever it returns (`make test-tpu-compile` looks). Asked
    # for float32 it would write twice the bytes, and they would be read again.
    return jax.lax.platform_dependent(
        x,
        w,
        sizes,
        tpu=functools.partial(run, preferred_element_type=dtype),
        default=lambda *args: run(*args, preferred_element_type=jnp.float32).astype(dtype),
    )


def _megablox(interpret: bool) -> Products:
    def matmul(x, w, sizes, dtype, transposed=False):
        M, K, N = *x.shape, w.shape[1 if transposed else 2]
        tiling = gmm_tiling(M, K, N)
        x = jnp.pad(x, ((0, -M % tiling[0]), (0, 0)))
        with jax.named_scope("megablox_gmm"):  # the library calls all of its kernels `kernel`
            y = gmm(x, w, sizes, dtype, tiling, transpose_rhs=transposed, interpret=interpret)
        return y[:M]

    def outer(x, dy, sizes, dtype):
        tiling = tgmm_tiling(x.shape[0], x.shape[1], dy.shape[1])
        x, dy = (jnp.pad(a, ((0, -a.shape[0] % tiling[0]), (0, 0))) for a in (x, dy))
        # It accumulates in float32 over all tokens of a group and rounds to `dtype` once.
        with jax.named_scope("megablox_tgmm"):
            return tgmm(x.T, dy, sizes, dtype, tiling, interpret=interpret)

    return Products(matmul, outer)


RAGGED_DOT = Products(_ragged_matmul, _ragged_outer)
MEGABLOX = _megablox(interpret=False)
MEGABLOX_INTERPRET = _megablox(interpret=True)
