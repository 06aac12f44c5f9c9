"""Attention on NVIDIA GPUs: cuDNN's fused kernel, in float16 and bfloat16 only."""

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
    """Causal, within segments and, if `has_window`, within the last `window` tokens. cuDNN reads
    segments and window as a bias [B, 1, T, T]."""
    same = (segments[:, :, None] == segments[:, None, :])[:, None]
    if has_window is not None:
        back = jnp.arange(q.shape[1])[:, None] - jnp.arange(q.shape[1])
        same &= (back < window) | jnp.logical_not(has_window)
    return jax.nn.dot_product_attention(q, k, v, mask=same, is_causal=True, implementation="cudnn")


def accepts(
    q: Array, k: Array, v: Array, segments: Array, has_window: Array | None, window: int
) -> bool:
    """Whether JAX can trace this for cuDNN here.

    JAX asks the installed cuDNN and GPU, so the answer is no without a CUDA backend.
    """
    # With a bias, cuDNN's gradient needs an even length.
    if q.dtype not in (jnp.bfloat16, jnp.float16) or q.shape[1] % 2:
        return False
    try:
        jax.eval_shape(attention, q, k, v, segments, has_window)
    except (RuntimeError, NotImplementedError, ValueError):
        return False  # no cuDNN, or not for this head size
    return True
