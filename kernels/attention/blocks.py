"""Attention in blocks of queries, plain XLA: each block multiplies only the keys up to its end, and no block's scores are kept.

    forward    P = exp(Q K^T - max);  l = sum P;  O = P V / l;  z = max + log l             (saved: inputs, O and z)
    backward   P = exp(Q K^T - z);  dV = P^T dO;  dS = P (dO V^T - <dO, O>);  dQ = dS K;  dK = dS^T Q

(Dao et al., FlashAttention, arXiv 2205.14135, section 3, without blocks of keys.) Besides memory, half of the products and of the
exponentials fall above the diagonal and are left out.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from . import reference

BLOCK = 64  # of 32, 64, 128 and 256, fastest on CPU at T = 256
MOST_BLOCKS = 16  # they are unrolled: bounds the size of the program, and the scores in memory to 1/16 of all
MASKED_BLOCK = 512
MASKED = float(jnp.finfo(jnp.float32).min)


@jax.custom_vjp
def attention(
    q: Float[Array, "B T H C"], k: Float[Array, "B T K C"], v: Float[Array, "B T K C"], segments: Int[Array, "B T"]
) -> Float[Array, "B T H C"]:
    """Causal, within segments."""
    return _forward(q, k, v, segments)[0]


def masked_attention(
    q: Float[Array, "B T H C"], k: Float[Array, "B S K C"], v: Float[Array, "B S K C"], mask: Bool[Array, "B T S"]
) -> Float[Array, "B T H C"]:
    """Wherever `mask` says: prefill's long prompts in blocks, decoding's few queries at once."""
    spans = [slice(i, i + MASKED_BLOCK) for i in range(0, q.shape[1], MASKED_BLOCK)]
    return jnp.concatenate([reference.masked_attention(q[:, at], k, v, mask[:, at]) for at in spans], axis=1)


def _forward(q, k, v, segments):
    Q, K, V = _queries(q * q.shape[-1] ** -0.5, k.shape[2]), _keys(k), _keys(v)
    outs, log_zs = [], []
    for start, end in _spans(q.shape[1]):
        scores = _scores(Q, K, segments, start, end)
        largest = jnp.max(scores, axis=-1, keepdims=True)
        weights = jnp.exp(scores - largest)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        mixed = jnp.einsum("bkgts,bksc->bkgtc", weights.astype(v.dtype), V[:, :, :end], preferred_element_type=jnp.float32)
        outs.append((mixed / total).astype(q.dtype))
        log_zs.append(largest + jnp.log(total))
    out = _unsplit(jnp.concatenate(outs, axis=3))
    return out, (q, k, v, segments, out, jnp.concatenate(log_zs, axis=3))


def _backward(saved, d_out):
    q, k, v, segments, out, log_z = saved
    scale, heads = q.shape[-1] ** -0.5, k.shape[2]
    Q, K, V, dO = _queries(q * scale, heads), _keys(k), _keys(v), _queries(d_out, heads)
    along = jnp.sum(_queries(out, heads).astype(jnp.float32) * dO.astype(jnp.float32), axis=-1, keepdims=True)
    dQ, dK, dV = [], jnp.zeros(K.shape, jnp.float32), jnp.zeros(V.shape, jnp.float32)

    def product(letters, a, b):
        return jnp.einsum(letters, a.astype(b.dtype), b, preferred_element_type=jnp.float32)

    for start, end in _spans(q.shape[1]):
        Qb, dOb, zb, alongb = (a[:, :, :, start:end] for a in (Q, dO, log_z, along))
        weights = jnp.exp(_scores(Q, K, segments, start, end) - zb)
        d_scores = weights * (product("bkgtc,bksc->bkgts", dOb, V[:, :, :end]) - alongb)
        dQ.append((product("bkgts,bksc->bkgtc", d_scores, K[:, :, :end]) * scale).astype(q.dtype))
        dK = dK.at[:, :, :end].add(product("bkgts,bkgtc->bksc", d_scores, Qb))
        dV = dV.at[:, :, :end].add(product("bkgts,bkgtc->bksc", weights, dOb))
    return _unsplit(jnp.concatenate(dQ, axis=3)), _keys(dK).astype(k.dtype), _keys(dV).astype(v.dtype), None


attention.defvjp(_forward, _backward)


def _spans(length: int) -> list[tuple[int, int]]:
    """First query and end of every block."""
    size = max(BLOCK, -(-length // MOST_BLOCKS))
    return [(start, min(start + size, length)) for start in range(0, length, size)]


def _scores(Q: Array, K: Array, segments: Array, start: int, end: int) -> Float[Array, "B K G block end"]:
    scores = jnp.einsum("bkgtc,bksc->bkgts", Q[:, :, :, start:end], K[:, :, :end], preferred_element_type=jnp.float32)
    causal = jnp.arange(start, end)[:, None] >= jnp.arange(end)
    mask = causal & (segments[:, start:end, None] == segments[:, None, :end])
    return jnp.where(mask[:, None, None], scores, MASKED)


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
