"""Rotary positions, and the ways in which they are stretched for contexts longer than the first.

Source: RoFormer, arXiv 2104.09864; YaRN, arXiv 2309.00071; `modeling_rope_utils.py` of transformers
5.23 for the rest.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from flexolmo_jax.config import ModelConfig, RopeScaling


class Rope(NamedTuple):
    """Of a layer."""

    frequencies: Float[Array, "half"]  # radians a position, of each pair of a head's numbers
    factor: Float[Array, ""] | float = 1.0  # of the turned queries and keys


def rope_of(config: ModelConfig, has_window: Bool[Array, ""] | bool) -> Rope:
    """Of a layer with or without a window. Where some layers have windows, only the others are
    stretched."""
    plain = Rope(_frequencies(config, config.rope_theta))
    scaled = plain if config.rope_scaling is None else _scaled(config, config.rope_scaling, plain)
    if not config.full_every:
        return scaled
    theta = config.window_rope_theta or config.rope_theta
    near = Rope(_frequencies(config, theta))
    if isinstance(has_window, bool):
        return near if has_window else scaled
    return Rope(*(jnp.where(has_window, a, b) for a, b in zip(near, scaled, strict=True)))


def rotate(x: Float[Array, "B T H C"], positions: Int[Array, "B T"], rope: Rope) -> Array:
    """A head's halves are turned against each other, as in HF's models; [B, T, H, C].

    cos and sin are in float32.
    """
    angles = positions[:, :, None, None].astype(jnp.float32) * rope.frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    if not isinstance(rope.factor, float) or rope.factor != 1:
        cos, sin = cos * rope.factor, sin * rope.factor
    # float32: positions in the thousands need more than 8 bits
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def _frequencies(config: ModelConfig, theta: float) -> Float[Array, "half"]:
    half = config.head_size // 2
    return theta ** (-jnp.arange(half, dtype=jnp.float32) / half)


def _scaled(config: ModelConfig, scaling: RopeScaling, plain: Rope) -> Rope:
    fast, slow = plain.frequencies, plain.frequencies / scaling.factor
    if scaling.kind == "linear":
        return Rope(slow)
    if scaling.kind == "llama3":
        turns = scaling.first_seq_len / (2 * math.pi) * fast  # in the first context
        width = scaling.high_frequency - scaling.low_frequency
        kept = jnp.clip((turns - scaling.low_frequency) / width, 0, 1)
        return Rope(slow * (1 - kept) + fast * kept)
    first = max(math.floor(_pair_that_turns(config, scaling, scaling.beta_fast)), 0)
    last = math.ceil(_pair_that_turns(config, scaling, scaling.beta_slow))
    last = min(last, config.head_size - 1)
    pairs = jnp.arange(len(fast), dtype=jnp.float32)
    stretched = jnp.clip((pairs - first) / (last - first or 0.001), 0, 1)
    factor = scaling.attention_factor or 1 + 0.1 * math.log(scaling.factor)
    return Rope(slow * stretched + fast * (1 - stretched), factor)


def _pair_that_turns(config: ModelConfig, scaling: RopeScaling, turns: float) -> float:
    """The pair of a head's numbers that turns so often in the first context, as a real number."""
    size = config.head_size * math.log(scaling.first_seq_len / (turns * 2 * math.pi))
    return size / (2 * math.log(config.rope_theta))
