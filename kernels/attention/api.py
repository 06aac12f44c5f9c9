"""Attention, `softmax(q k^T / sqrt(C)) v`: causal within documents, or under a mask.

The first is for training and scoring, the second for decoding. Each `H / K` consecutive query heads
share a key head. Softmax is in float32; the result has the dtype of `q`.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from . import blocks, cudnn, pallas_tpu, reference

Implementation = Literal["reference", "blocks", "splash", "cudnn"]
IMPLEMENTATIONS = {
    "reference": reference.attention,
    "blocks": blocks.attention,
    "splash": pallas_tpu.attention,
    "cudnn": cudnn.attention,
}


def attention(  # noqa: PLR0913 - a kernel's call
    q: Float[Array, "B T H C"],
    k: Float[Array, "B T K C"],
    v: Float[Array, "B T K C"],
    *,
    segments: Int[Array, "B T"],
    window: int = 0,
    has_window: Bool[Array, ""] | None = None,
    implementation: Implementation | None = None,
    platform: str | None = None,
) -> Float[Array, "B T H C"]:
    """Causal self-attention in which no token attends outside its own segment.

    Padding (say, segment 0) is a segment like any other. With a `window` no token attends further
    back than so many tokens, itself included, unless `has_window` is False.

    By default "splash" where the program is lowered for TPU, "cudnn" for CUDA where cuDNN takes
    these arrays (16 bits), else "blocks": the first two are the platforms' own fused kernels, which
    skip what is above the diagonal. An implementation asked for by name is used or fails. The
    compiler does not partition custom calls: on more than one device, call this inside
    `jax.shard_map`, over batch and heads.

    `platform` ("cpu", "gpu" or "tpu") is the one that the program is for, where that is known.
    Without it a backward pass keeps what it needs of every platform's implementation: twice the
    memory.
    """
    if window and has_window is None:
        has_window = jnp.array(True)
    arrays = (q, k, v, segments, has_window)
    if implementation is not None:
        return IMPLEMENTATIONS[implementation](*arrays, window)
    gpu: Implementation = "cudnn" if cudnn.accepts(*arrays, window) else "blocks"
    if platform is not None:
        known: dict[str, Implementation] = {"tpu": "splash", "gpu": gpu}
        return IMPLEMENTATIONS[known.get(platform, "blocks")](*arrays, window)
    names: tuple[Implementation, ...] = ("splash", gpu, "blocks")
    tpu, cuda, default = (functools.partial(IMPLEMENTATIONS[name], window=window) for name in names)
    return jax.lax.platform_dependent(*arrays, tpu=tpu, cuda=cuda, default=default)


def masked_attention(
    q: Float[Array, "B T H C"],
    k: Float[Array, "B K S C"],
    v: Float[Array, "B K S C"],
    mask: Bool[Array, "B T S"],
) -> Float[Array, "B T H C"]:
    """Attention over a cache, wherever `mask` is True. Heads are in front for batched products.

    A query that may see nothing gets the mean of v: unused, but finite.
    """
    return blocks.masked_attention(q, k, v, mask)
