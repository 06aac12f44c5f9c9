"""Attention in blocks of queries, in plain XLA: the form for CPU, and for GPU without cuDNN.

    forward    P = exp(Q K^T - max);  l = sum P;  O = P V / l;  z = max + log l
    backward   P = exp(Q K^T - z);  dV = P^T dO;  dS = P (dO V^T - <dO, O>)
               dQ = dS K;  dK = dS^T Q                      saved: inputs, O and z

This is FlashAttention (Dao et al., arXiv 2205.14135, section 3) without blocks of keys. No block's
scores are kept, so memory grows with T and not with T^2. A stripe of blocks multiplies only the
keys up to its end, so most of the products and exponentials above the diagonal are left out.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from .. import names
from . import reference

BLOCK = 64  # of 32, 64, 128 and 256, fastest on CPU at T = 256
# A stripe is the blocks that share an end of their keys. Each is compiled for itself, so there are
# few; a longer sequence has more blocks in each, run one after the other.
STRIPES = 4
MASKED_BLOCK = 512  # queries of a long prompt whose scores exist at once
MASKED = float(jnp.finfo(jnp.float32).min)  # finite: a query that sees nothing must not give NaN


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def attention(
    q: Float[Array, "B T H C"],
    k: Float[Array, "B T K C"],
    v: Float[Array, "B T K C"],
    segments: Int[Array, "B T"],
    has_window: Bool[Array, ""] | None = None,
    window: int = 0,
) -> Float[Array, "B T H C"]:
    """Causal, within segments and, if `has_window`, within the last `window` tokens."""
    return _forward(q, k, v, segments, has_window, window)[0]


def masked_attention(
    q: Float[Array, "B T H C"],
    k: Float[Array, "B K S C"],
    v: Float[Array, "B K S C"],
    mask: Bool[Array, "B T S"],
) -> Float[Array, "B T H C"]:
    """Wherever `mask` is True: a long prompt in blocks, the few queries of decoding at once."""
    blocks = [slice(i, i + MASKED_BLOCK) for i in range(0, q.shape[1], MASKED_BLOCK)]
    outs = [reference.masked_attention(q[:, at], k, v, mask[:, at]) for at in blocks]
    return jnp.concatenate(outs, axis=1)


def _forward(q, k, v, segments, has_window, window):
    Q, K, V, ids = _prepared(q, k, v, segments)
    near = has_window, window
    outs, log_zs = [], []
    for start, end in _stripes(ids.shape[1]):

        def block(_, xs, end=end):
            Qb, idb, positions = xs
            scores = _scores(Qb, idb, positions, K, ids, end, near)
            largest = jnp.max(scores, axis=-1, keepdims=True)
            P = jnp.exp(scores - largest)
            total = jnp.sum(P, axis=-1, keepdims=True)
            mixed = _product("bkgts,bksc->bkgtc", P.astype(v.dtype), V[:, :, :end])
            return None, ((mixed / total).astype(q.dtype), largest + jnp.log(total))

        xs = (Q[:, :, :, start:end], ids[:, start:end], jnp.arange(start, end))
        _, (out, log_z) = _over_blocks(block, None, xs, (3, 1, 0))
        outs.append(out)
        log_zs.append(log_z)
    out = _unsplit(jnp.concatenate(outs, axis=3))[:, : q.shape[1]]
    out = checkpoint_name(out, names.ATTENTION)
    log_z = checkpoint_name(jnp.concatenate(log_zs, axis=3), names.ATTENTION)
    return out, (q, k, v, segments, has_window, out, log_z)


def _backward(window, saved, d_out):
    q, k, v, segments, has_window, out, log_z = saved
    T, heads, scale = q.shape[1], k.shape[2], q.shape[-1] ** -0.5
    Q, K, V, ids = _prepared(q, k, v, segments)
    dO = _queries(_padded(d_out), heads)
    O = _queries(_padded(out), heads)
    inner = jnp.sum(O.astype(jnp.float32) * dO.astype(jnp.float32), axis=-1, keepdims=True)
    dQ, dK, dV = [], jnp.zeros(K.shape, jnp.float32), jnp.zeros(V.shape, jnp.float32)

    for start, end in _stripes(ids.shape[1]):

        def block(sums, xs, end=end):
            Qb, dOb, zb, innerb, idb, positions = xs
            P = jnp.exp(_scores(Qb, idb, positions, K, ids, end, (has_window, window)) - zb)
            dS = P * (_product("bkgtc,bksc->bkgts", dOb, V[:, :, :end]) - innerb)
            dKb = _product("bkgts,bkgtc->bksc", dS, Qb)
            dVb = _product("bkgts,bkgtc->bksc", P, dOb)
            dQb = (_product("bkgts,bksc->bkgtc", dS, K[:, :, :end]) * scale).astype(q.dtype)
            return (sums[0] + dKb, sums[1] + dVb), (dQb,)

        of_queries = (a[:, :, :, start:end] for a in (Q, dO, log_z, inner))
        xs = (*of_queries, ids[:, start:end], jnp.arange(start, end))
        sums, (dQs,) = _over_blocks(block, (dK[:, :, :end], dV[:, :, :end]), xs, (3, 3, 3, 3, 1, 0))
        dQ.append(dQs)
        dK, dV = (a.at[:, :, :end].set(b) for a, b in zip((dK, dV), sums, strict=True))
    d_q = _unsplit(jnp.concatenate(dQ, axis=3))[:, :T]
    d_k = _keys(dK)[:, :T].astype(k.dtype)
    d_v = _keys(dV)[:, :T].astype(v.dtype)
    return d_q, d_k, d_v, None, None


attention.defvjp(_forward, _backward)


def _stripes(length: int) -> list[tuple[int, int]]:
    """The first query of every stripe, and the end of its queries and keys."""
    size = max(BLOCK, -(-length // (STRIPES * BLOCK)) * BLOCK)
    return [(start, min(start + size, length)) for start in range(0, length, size)]


def _over_blocks(function, carry, xs: tuple[Array, ...], axes: tuple[int, ...]):
    """`function(carry, xs)` for each block of a stripe in turn.

    A loop, because XLA keeps the scores of all blocks at once if it is unrolled. `axes` are the
    axes of the queries in `xs`; in the results it is axis 3.
    """
    length = xs[-1].shape[0]
    if length <= BLOCK:
        return function(carry, xs)
    n = length // BLOCK
    blocks = tuple(
        jnp.moveaxis(a.reshape(*a.shape[:at], n, BLOCK, *a.shape[at + 1 :]), at, 0)
        for a, at in zip(xs, axes, strict=True)
    )
    carry, ys = jax.lax.scan(function, carry, blocks)
    ys = (jnp.moveaxis(y, 0, 3) for y in ys)
    return carry, tuple(y.reshape(*y.shape[:3], length, *y.shape[5:]) for y in ys)


def _product(letters: str, a: Array, b: Array) -> Array:
    """`jnp.einsum` of a and b in b's dtype, accumulated in float32."""
    return jnp.einsum(letters, a.astype(b.dtype), b, preferred_element_type=jnp.float32)


def _scores(  # noqa: PLR0913 - a kernel's operands
    Qb: Array,
    idb: Array,
    positions: Array,
    K: Array,
    ids: Array,
    end: int,
    near: tuple[Array | None, int],
) -> Float[Array, "B K G block end"]:
    """The scores of a block of queries with segments and positions, and the first `end` keys."""
    scores = _product("bkgtc,bksc->bkgts", Qb, K[:, :, :end])
    mask = (positions[:, None] >= jnp.arange(end)) & (idb[:, :, None] == ids[:, None, :end])
    has_window, window = near
    if has_window is not None:
        mask &= (positions[:, None] - jnp.arange(end) < window) | jnp.logical_not(has_window)
    return jnp.where(mask[:, None, None], scores, MASKED)


def _prepared(q: Array, k: Array, v: Array, segments: Array) -> tuple[Array, Array, Array, Array]:
    """Scaled queries, keys and values with heads in front, and segments."""
    q, k, v, segments = (_padded(a) for a in (q * q.shape[-1] ** -0.5, k, v, segments))
    return _queries(q, k.shape[2]), _keys(k), _keys(v), segments


def _padded(a: Array) -> Array:
    """Sequences of several blocks a stripe are padded to whole blocks, behind their last token,
    where no token looks."""
    short = a.shape[1] <= STRIPES * BLOCK
    return a if short else jnp.pad(a, ((0, 0), (0, -a.shape[1] % BLOCK), *((0, 0),) * (a.ndim - 2)))


def _queries(q: Float[Array, "B T H C"], heads: int) -> Float[Array, "B K G T C"]:
    """Heads in front, as batched products want them, grouped by the key head they share."""
    B, T, H, C = q.shape
    return q.reshape(B, T, heads, H // heads, C).transpose(0, 2, 3, 1, 4)


def _unsplit(q: Float[Array, "B K G T C"]) -> Float[Array, "B T H C"]:
    B, K, G, T, C = q.shape
    return q.transpose(0, 3, 1, 2, 4).reshape(B, T, K * G, C)


def _keys(k: Array) -> Array:
    """[B, S, K, C] <-> [B, K, S, C]."""
    return k.transpose(0, 2, 1, 3)
