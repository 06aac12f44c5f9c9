"""Attention, `softmax(q k^T / sqrt(C)) v`: causal within documents, or under a mask.

The first is for training and scoring, the second for decoding. Each `H / K` consecutive query heads
share a key head. Softmax is in float32; the result has the dtype of `q`.
"""

from typing import Literal

import jax
from jaxtyping import Array, Bool, Float, Int

from . import blocks, cudnn, pallas_tpu, reference

Implementation = Literal["reference", "blocks", "splash", "cudnn"]
IMPLEMENTATIONS = {
    "reference": reference.attention,
    "blocks": blocks.attention,
    "splash": pallas_tpu.attention,
    "cudnn": cudnn.attention,
}


def attention(
    q: Float[Array, "B T H C"],
    k: Float[Array, "B T K C"],
    v: Float[Array, "B T K C"],
    *,
    segments: Int[Array, "B T"],
    implementation: Implementation | None = None,
    platform: str | None = None,
) -> Float[Array, "B T H C"]:
    """Causal self-attention in which no token attends outside its own segment.

    Padding (say, segment 0) is a segment like any other. By default "splash" where the program is
    lowered for TPU, "cudnn" for CUDA where cuDNN takes these arrays (16 bits), else "blocks": the
    first two are the platforms' own fused kernels, which skip what is above the diagonal. An
    implementation asked for by name is used or fails. The compiler does not partition custom calls:
    on more than one device, call this inside `jax.shard_map`, over batch and heads.

    `platform` ("cpu", "gpu" or "tpu") is the one that the program is for, where that is known.
    Without it a backward pass keeps what it needs of every platform's implementation: twice the
    memory.
    """
    if implementation is not None:
        return IMPLEMENTATIONS[implementation](q, k, v, segments)
    gpu = cudnn.attention if cudnn.accepts(q, k, v, segments) else blocks.attention
    if platform is not None:
        known = {"tpu": pallas_tpu.attention, "gpu": gpu}
        return known.get(platform, blocks.attention)(q, k, v, segments)
    return jax.lax.platform_dependent(
        q, k, v, segments, tpu=pallas_tpu.attention, cuda=gpu, default=blocks.attention
    )


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
