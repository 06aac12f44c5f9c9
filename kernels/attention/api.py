"""Attention, `softmax(q k^T / sqrt(C)) v`, in two forms: causal within documents (training,
scoring), or under a mask (decoding).

`H / K` query heads in a row share a key head. Softmax is in float32; the result has the dtype of
`q`.
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
) -> Float[Array, "B T H C"]:
    """Causal self-attention in which no token attends outside its own segment. Padding (say,
    segment 0) is a segment like any other.

    By default "splash" where the program is lowered for TPU, "cudnn" for CUDA where cuDNN takes
    these arrays (16 bits), else "blocks". An implementation asked for by name is used or fails.
    Custom calls are not partitioned by the compiler: on more than one device, call this inside
    `jax.shard_map`, over batch and heads.
    """
    if implementation is not None:
        return IMPLEMENTATIONS[implementation](q, k, v, segments)
    cuda = cudnn.attention if cudnn.accepts(q, k, v, segments) else blocks.attention
    return jax.lax.platform_dependent(
        q, k, v, segments, tpu=pallas_tpu.attention, cuda=cuda, default=blocks.attention
    )


def masked_attention(
    q: Float[Array, "B T H C"],
    k: Float[Array, "B K S C"],
    v: Float[Array, "B K S C"],
    mask: Bool[Array, "B T S"],
) -> Float[Array, "B T H C"]:
    """Attention over a cache with heads in front, as batched products want them, wherever `mask`
    says.

    A row of the mask that is all False gives the mean of v: finite, unused.
    """
    return blocks.masked_attention(q, k, v, mask)
