"""Attention on NVIDIA GPUs: cuDNN's fused kernel through `jax.nn.dot_product_attention`; float16
and bfloat16 only."""

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
    """Whether JAX can trace this for cuDNN here. It asks the installed cuDNN and GPU, so only where
    a CUDA backend is installed."""
    # the gradient under a bias needs an even length
    if q.dtype not in (jnp.bfloat16, jnp.float16) or q.shape[1] % 2:
        return False
    try:
        jax.eval_shape(attention, q, k, v, segments)
    # no cuDNN; a head size it lacks; a layout it lacks
    except (RuntimeError, NotImplementedError, ValueError):
        return False
    return True
