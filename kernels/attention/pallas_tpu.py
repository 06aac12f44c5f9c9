"""Attention on TPU: JAX's own splash kernels, which skip what is above the diagonal."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jaxtyping import Array, Bool, Float, Int

from .. import names
from .tuned import BLOCKS, Blocks

LANES = 128  # a block is a multiple of it
LARGEST_BLOCK = 512


def attention(  # noqa: PLR0913 - a kernel's call
    q: Float[Array, "B T H C"],
    k: Float[Array, "B T K C"],
    v: Float[Array, "B T K C"],
    segments: Int[Array, "B T"],
    has_window: Bool[Array, ""] | None = None,
    window: int = 0,
    *,
    interpret: bool = False,
) -> Float[Array, "B T H C"]:
    """Causal, within segments and, if `has_window`, within the last `window` tokens. For any
    length: the last block is padded behind the last token, where no token looks."""
    whole, near = (
        functools.partial(_attention, mask=mask, interpret=interpret)
        for mask in (masks.CausalMask, functools.partial(_near, window))
    )
    if has_window is None:
        return whole(q, k, v, segments)
    return jax.lax.cond(has_window, near, whole, q, k, v, segments)


def _near(window: int, shape: tuple[int, int]) -> masks.Mask:
    return masks.LocalMask(shape, (window - 1, 0), 0)


def _attention(
    q: Array,
    k: Array,
    v: Array,
    segments: Array,
    *,
    mask: Callable[[tuple[int, int]], masks.Mask],
    interpret: bool,
) -> Array:
    T, H, C = q.shape[1:]
    (block_q, block_kv, fused), length = _blocks(T, C)

    def heads_in_front(a):
        return jnp.pad(a, ((0, 0), (0, length - T), (0, 0), (0, 0))).transpose(0, 2, 1, 3)

    of_heads = masks.MultiHeadMask([mask((length, length))] * H)
    sizes = splash.BlockSizes(
        block_q=block_q,
        block_kv=block_kv,
        block_q_dkv=block_q,
        block_kv_dkv=block_kv,
        block_q_dq=None if fused else block_q,
        block_kv_dq=None if fused else block_kv,
        use_fused_bwd_kernel=fused,
    )
    kernel = splash.make_splash_mha(
        of_heads,
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=names.ATTENTION,
        interpret=interpret,
    )

    # The kernel's declared type also has residuals, which are not asked for: hence Any.
    def one_record(q: Array, k: Array, v: Array, segments: Array) -> Any:
        return kernel(q, k, v, segment_ids=splash.SegmentIds(segments, segments))

    segments = jnp.pad(segments, ((0, 0), (0, length - T)))
    out = jax.vmap(one_record)(
        heads_in_front(q * C**-0.5), heads_in_front(k), heads_in_front(v), segments
    )
    return out.transpose(0, 2, 1, 3)[:, :T]


def _blocks(length: int, head_size: int) -> tuple[Blocks, int]:
    """The blocks, and the padded length. Where nothing was measured, the largest block that pads no
    more than one of 128 would."""
    length = -(-length // LANES) * LANES
    device = jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]
    measured = BLOCKS.get((device.device_kind, length, head_size))
    sizes = (LARGEST_BLOCK, LARGEST_BLOCK // 2, LANES)
    size = next(size for size in sizes if length % size == 0)
    return measured or Blocks(size, size, fused=False), length
