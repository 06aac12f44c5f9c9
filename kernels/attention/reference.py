"""Attention with all scores `[B, H, T, S]` at once: the other implementations' definition."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def attention(
    q: Float[Array, "B T H C"],
    k: Float[Array, "B T K C"],
    v: Float[Array, "B T K C"],
    segments: Int[Array, "B T"],
    has_window: Bool[Array, ""] | None = None,
    window: int = 0,
) -> Float[Array, "B T H C"]:
    """Causal, within segments and, if `has_window`, within the last `window` tokens."""
    T = q.shape[1]
    k, v = (a.transpose(0, 2, 1, 3) for a in (k, v))
    back = jnp.arange(T)[:, None] - jnp.arange(T)
    mask = (back >= 0) & (segments[:, :, None] == segments[:, None, :])
    if has_window is not None:
        mask &= (back < window) | jnp.logical_not(has_window)
    return masked_attention(q, k, v, mask)


def masked_attention(
    q: Float[Array, "B T H C"],
    k: Float[Array, "B K S C"],
    v: Float[Array, "B K S C"],
    mask: Bool[Array, "B T S"],
) -> Float[Array, "B T H C"]:
    """Wherever `mask` is True; a query that may see nothing gets the mean of v."""
    B, T, H, C = q.shape
    K = k.shape[1]
    # Heads in front make canonical batched products. On CPU, forward and backward then take half
    # the time of "btkgc,bskc->bkgts".
    q = (q * C**-0.5).reshape(B, T, K, H // K, C).transpose(0, 2, 3, 1, 4)
    scores = jnp.einsum("bkgtc,bksc->bkgts", q, k, preferred_element_type=jnp.float32)
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    p = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    mixed = jnp.einsum("bkgts,bksc->bkgtc", p, v)
    return mixed.transpose(0, 3, 1, 2, 4).reshape(B, T, H, C)
