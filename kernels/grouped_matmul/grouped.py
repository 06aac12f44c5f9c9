"""The expert FFN from two grouped products, for TPUs and GPUs: `lax.ragged_dot`, or megablox's
Pallas kernels.

    matmul(x [M, K], w [E, K, N], sizes) -> [M, N]          rows of group e times w[e]
    outer(x [M, K], dy [M, N], sizes) -> [E, K, N]          x_e^T dy_e over the rows of group e

What stands in rows behind the last group is unspecified in both libraries, so they are set to 0 on
the way in and out.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm
from jaxtyping import Array, Float, Int

from . import swiglu
from .tiles import gmm_tiling, tgmm_tiling


class Products(NamedTuple):
    """`matmul(x, w, sizes, transposed, dtype)` and `outer(x, dy, sizes, dtype)`; `transposed`: w is
    [E, N, K]."""

    matmul: Callable[..., Array]
    outer: Callable[..., Array]


def with_products(products: Products):
    """The forward and backward pass made of these products."""

    def forward(x, weights, sizes, gate, up, down):
        used = _used(x, sizes)
        x = jnp.where(used, x, 0)
        gated = jnp.where(used, products.matmul(x, gate, sizes, False, x.dtype), 0)
        upped = jnp.where(used, products.matmul(x, up, sizes, False, x.dtype), 0)
        hidden = swiglu.weighted(
            gated.astype(jnp.float32), upped.astype(jnp.float32), jnp.where(used[:, 0], weights, 0)
        )
        out = products.matmul(hidden.astype(x.dtype), down, sizes, False, x.dtype)
        return jnp.where(used, out, 0), gated, upped

    def backward(x, weights, sizes, gate, up, down, gated, upped, dout):
        used = _used(x, sizes)
        x, dout = jnp.where(used, x, 0), jnp.where(used, dout, 0)
        dhidden = jnp.where(used, products.matmul(dout, down, sizes, True, jnp.float32), 0)
        parts = swiglu.gradient(
            gated.astype(jnp.float32),
            upped.astype(jnp.float32),
            jnp.where(used[:, 0], weights, 0),
            dhidden,
        )
        hidden, dgated, dupped = (parts[i].astype(x.dtype) for i in (0, 2, 3))
        dx = products.matmul(dgated, gate, sizes, True, jnp.float32) + products.matmul(
            dupped, up, sizes, True, jnp.float32
        )
        return (
            jnp.where(used, dx, 0).astype(x.dtype),
            parts[1].astype(weights.dtype),
            products.outer(x, dgated, sizes, gate.dtype),
            products.outer(x, dupped, sizes, up.dtype),
            products.outer(hidden, dout, sizes, down.dtype),
        )

    return forward, backward


def _used(x: Float[Array, "M D"], sizes: Int[Array, " E"]):
    return (jnp.arange(x.shape[0]) < jnp.sum(sizes))[:, None]


def _ragged_matmul(x, w, sizes, transposed, dtype):
    # Where ragged_dot is dense, it multiplies other experts' weights with 0, and NaN times 0 is
    # NaN. On TPU it reads no empty group.
    w = jax.lax.platform_dependent(
        w,
        sizes,
        tpu=lambda w, _: w,
        default=lambda w, sizes: jnp.where(sizes[:, None, None] > 0, w, 0),
    )
    dimensions = jax.lax.RaggedDotDimensionNumbers(
        (([1], [2 if transposed else 1]), ([], [])), [0], [0]
    )
    return jax.lax.ragged_dot_general(
        x, w, sizes, dimensions, preferred_element_type=jnp.float32
    ).astype(dtype)


def _ragged_outer(x, dy, sizes, dtype):
    dimensions = jax.lax.RaggedDotDimensionNumbers((([0], [0]), ([], [])), [0], [])
    return jax.lax.ragged_dot_general(
        x, dy, sizes, dimensions, preferred_element_type=jnp.float32
    ).astype(dtype)


def _megablox(interpret: bool) -> Products:
    def matmul(x, w, sizes, transposed, dtype):
        M, K, N = *x.shape, w.shape[1 if transposed else 2]
        tiling = gmm_tiling(M, K, N)
        x = jnp.pad(x, ((0, -M % tiling[0]), (0, 0)))
        return gmm(x, w, sizes, dtype, tiling, transpose_rhs=transposed, interpret=interpret)[:M]

    def outer(x, dy, sizes, dtype):
        tiling = tgmm_tiling(x.shape[0], x.shape[1], dy.shape[1])
        x, dy = (jnp.pad(a, ((0, -a.shape[0] % tiling[0]), (0, 0))) for a in (x, dy))
        # It accumulates in float32 over all rows of a group and rounds to `dtype` once.
        return tgmm(x.T, dy, sizes, dtype, tiling, interpret=interpret)

    return Products(matmul, outer)


RAGGED_DOT = Products(_ragged_matmul, _ragged_outer)
MEGABLOX = _megablox(interpret=False)
MEGABLOX_INTERPRET = _megablox(interpret=True)
