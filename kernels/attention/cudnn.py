"""Attention on NVIDIA GPUs: cuDNN's fused kernel, in float16 and bfloat16 only."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def attention(
    q: Float[Array, "B T H C"],
    k: Float[Array, "B T K C"],
    v: Float[Array, "B T K C"],
    segments: Int[Array, "B T"],
) -> Float[Array, "B T H C"]:
    """Causal, within segments. cuDNN reads the segments as a bias [B, 1, T, T]."""
    same = (segments[:, :, None] == segments[:, None, :])[:, None]
    return jax.nn.dot_product_attention(q, k, v, mask=same, is_causal=True, implementation="cudnn")


def accepts(q: Array, k: Array, v: Array, segments: Array) -> bool:
    """Whether JAX can trace this for cuDNN here.

    JAX asks the installed cuDNN and GPU, so the answer is no without a CUDA backend.
    """
    # With a bias, cuDNN's gradient needs an even length.
    if q.dtype not in (jnp.bfloat16, jnp.float16) or q.shape[1] % 2:
        return False
    try:
        jax.eval_shape(attention, q, k, v, segments)
    except (RuntimeError, NotImplementedError, ValueError):
        return False  # no cuDNN, or not for this head size
    return True
