"""The parts of a layer that are not experts: RMSNorm and attention.

Dims (used everywhere): B batch, T time, S key time, D model, H heads, K kv heads, C head size, F
ffn, E experts, A active experts, V vocabulary, L layers. Each parameter names its logical axes;
`sharding.py` maps them to the mesh.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from flexolmo_jax.config import ModelConfig
from flexolmo_jax.kernels import names
from flexolmo_jax.kernels.attention import attention, masked_attention
from flexolmo_jax.runtime import sharding

from .rope import rope_of, rotate

# logical axes of activations and of a KV cache
QUERIES, KEYS = ("batch", None, "heads", None), ("batch", None, "kv_heads", None)
CACHE = ("layers", "batch", "kv_heads", None, None)


class KVCache(NamedTuple):
    """Keys and values of all layers."""

    keys: Float[Array, "L B K S C"]
    values: Float[Array, "L B K S C"]

    def written(
        self,
        k: Float[Array, "B T K C"],
        v: Float[Array, "B T K C"],
        layer: Int[Array, ""] | int,
        slot: Int[Array, ""] | int,
    ) -> "KVCache":
        """The cache with a layer's new keys and values from this slot on.

        The whole cache goes from layer to layer, so that a step writes its own slots and copies
        nothing.
        """

        def put(old: Array, new: Array) -> Array:
            heads_first = new.transpose(0, 2, 1, 3)[None].astype(old.dtype)
            return jax.lax.dynamic_update_slice(old, heads_first, (layer, 0, 0, slot, 0))

        return KVCache(put(self.keys, k), put(self.values, v))


class Linear(nnx.Module):
    """`x @ kernel + bias`; both are cast to the activations' dtype.

    Over a batch with one axis: with two, XLA transposes both sides of the product that is the
    kernel's gradient (1.7 times the time on a CPU).
    """

    def __init__(
        self,
        shape: tuple[int, int],
        axes: tuple[str | None, str | None],
        config: ModelConfig,
        rngs: nnx.Rngs,
        has_bias: bool = False,
    ):
        self.kernel = nnx.Param(
            config.init_std * jax.random.normal(rngs.params(), shape), axes=axes
        )
        self.bias = nnx.Param(jnp.zeros(shape[1]), axes=axes[1:]) if has_bias else None

    def __call__(self, x: Float[Array, "*N I"]) -> Float[Array, "*N O"]:
        tokens = x.reshape(-1, x.shape[-1])
        y = (tokens @ self.kernel[...].astype(x.dtype)).reshape(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


class RMSNorm(nnx.Module):
    """`x / rms(x) * scale`, computed in float32 (OLMo 2 multiplies by the scale before casting
    back)."""

    def __init__(self, size: int, axis: str | None, config: ModelConfig):
        self.scale = nnx.Param(jnp.ones(size), axes=(axis,))
        self.eps = config.norm_eps

    def __call__(self, x: Float[Array, "*N D"]) -> Float[Array, "*N D"]:
        # the mean of squares of a bfloat16 vector loses all of its digits
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        return (x32 * self.scale[...].astype(jnp.float32)).astype(x.dtype)


class Window(NamedTuple):
    """How far tokens of a layer see: `size` tokens, themselves included, if it has a window."""

    size: int
    is_there: Bool[Array, ""] | bool  # a tracer where some layers have one and some have not


class PackedContext(NamedTuple):
    """What tokens attend to in whole sequences: their own document, up to themselves."""

    segments: Int[Array, "B T"]  # each token's document, counted from 1; 0 is padding
    layer = cache = None

    def of_layer(self, layer: Int[Array, ""], cache: None) -> "PackedContext":
        """The same in every layer."""
        return self

    def attend(
        self,
        q: Float[Array, "B T H C"],
        k: Float[Array, "B T K C"],
        v: Float[Array, "B T K C"],
        window: Window | None,
        mesh: Mesh | None,
    ) -> tuple[Float[Array, "B T H C"], None]:
        # A custom call where there is one: the compiler does not partition it over a mesh.
        within = functools.partial(_attention_within, sharding.platform_of(mesh))
        axes, arrays = (QUERIES, KEYS, KEYS, ("batch", None)), (q, k, v, self.segments)
        if window is not None:
            within = functools.partial(within, window=window.size)
            axes, arrays = (*axes, ()), (*arrays, jnp.asarray(window.is_there))
        attend = sharding.on_each_shard(mesh, within, axes, QUERIES)
        return attend(*arrays), None


class CachedContext(NamedTuple):
    """What tokens attend to in a step over a KV cache of S slots: where `mask` says."""

    mask: Bool[Array, "B T S"]
    cache: KVCache
    slot: Int[Array, ""] | int  # where the step's own keys and values are written
    layer: Int[Array, ""] | int = 0

    def of_layer(self, layer: Int[Array, ""], cache: KVCache) -> "CachedContext":
        """The context in this layer, with the cache as the layer before has left it."""
        return self._replace(layer=layer, cache=cache)

    def attend(
        self,
        q: Float[Array, "B T H C"],
        k: Float[Array, "B T K C"],
        v: Float[Array, "B T K C"],
        window: Window | None,
        mesh: Mesh | None,
    ) -> tuple[Float[Array, "B T H C"], KVCache]:
        cache = self.cache.written(k, v, self.layer, self.slot)
        keys, values = cache.keys[self.layer], cache.values[self.layer]
        mask = self.mask
        if window is not None:
            slots = self.slot + jnp.arange(q.shape[1])
            near = slots[:, None] - jnp.arange(keys.shape[2]) < window.size
            mask &= near | jnp.logical_not(window.is_there)
        return masked_attention(q, keys, values, mask), cache


class PromptContext(NamedTuple):
    """What the tokens of prompts attend to on their way into an empty cache: their own prompt."""

    segments: Int[Array, "B T"]  # 1; 0 is padding
    cache: KVCache
    layer: Int[Array, ""] | int = 0

    def of_layer(self, layer: Int[Array, ""], cache: KVCache) -> "PromptContext":
        """The context in this layer, with the cache as the layer before has left it."""
        return self._replace(layer=layer, cache=cache)

    def attend(
        self,
        q: Float[Array, "B T H C"],
        k: Float[Array, "B T K C"],
        v: Float[Array, "B T K C"],
        window: Window | None,
        mesh: Mesh | None,
    ) -> tuple[Float[Array, "B T H C"], KVCache]:
        attended, _ = PackedContext(self.segments).attend(q, k, v, window, mesh)
        return attended, self.cache.written(k, v, self.layer, 0)


Context = PackedContext | PromptContext | CachedContext


class Attention(nnx.Module):
    """Multi-head or grouped-query attention."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        D, C = config.d_model, config.head_size
        q_size, kv_size = config.n_heads * C, config.n_kv_heads * C
        has_bias = config.attention_bias
        self.q = Linear((D, q_size), ("embed", "heads"), config, rngs, has_bias)
        self.k = Linear((D, kv_size), ("embed", "kv_heads"), config, rngs, has_bias)
        self.v = Linear((D, kv_size), ("embed", "kv_heads"), config, rngs, has_bias)
        self.o = Linear((q_size, D), ("heads", "embed"), config, rngs)
        q_norm = k_norm = None
        if config.qk_norm == "full":
            q_norm, k_norm = RMSNorm(q_size, "heads", config), RMSNorm(kv_size, "kv_heads", config)
        elif config.qk_norm == "head":
            q_norm, k_norm = RMSNorm(C, None, config), RMSNorm(C, None, config)
        self.q_norm, self.k_norm = q_norm, k_norm
        self.config = config

    def __call__(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        context: Context,
        has_window: Bool[Array, ""] | bool,
        mesh: Mesh | None = None,
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        """The output, and the context's cache with this step's keys and values in it."""
        B, T, _ = x.shape
        K, C, rope = self.config.n_kv_heads, self.config.head_size, rope_of(self.config, has_window)
        q, k, v = (checkpoint_name(f(x), names.PROJECTIONS) for f in (self.q, self.k, self.v))
        q = rotate(self._normed(q, self.q_norm), positions, rope)
        k = rotate(self._normed(k, self.k_norm), positions, rope)
        window = Window(self.config.window, has_window) if self.config.window else None
        mixed, cache = context.attend(q, k, v.reshape(B, T, K, C), window, mesh)
        return checkpoint_name(self.o(mixed.reshape(B, T, -1)), names.PROJECTIONS), cache

    def _normed(self, x: Float[Array, "B T N"], norm: RMSNorm | None) -> Float[Array, "B T _ C"]:
        """Queries or keys, by heads."""
        heads = (*x.shape[:2], -1, self.config.head_size)
        if norm is None:
            return x.reshape(heads)
        return norm(x.reshape(heads)) if self.config.qk_norm == "head" else norm(x).reshape(heads)


def _attention_within(  # noqa: PLR0913 - a kernel's call
    platform: str | None,
    q: Array,
    k: Array,
    v: Array,
    segments: Array,
    has_window: Array | None = None,
    window: int = 0,
) -> Array:
    return attention(
        q, k, v, segments=segments, window=window, has_window=has_window, platform=platform
    )
