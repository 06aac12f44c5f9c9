"""A decoder with experts in place of the FFN, as Flax NNX modules run by plain JAX on trees of
arrays.

    norm "post"    h = x + norm(attention(x));  y = h + norm(mixture(h))     OLMo 2 and 3
    norm "pre"     h = x + attention(norm(x));  y = h + mixture(norm(h))     Llama, Mistral, Qwen

Layers are stacked and scanned. Parameters are a nested dict of arrays with three branches, whose
paths are the same in configs, checkpoints and manifests:

    trunk/...      embeddings, attention, norms, head
    experts/...    gate, up, down [L, E, ...], row [L, E, D], bias [L, E]: the anchor's expert first
    expert/...     the same with E = 1: a pair's new expert (present in a pair only)
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from flexolmo_jax.config import ModelConfig, Remat
from flexolmo_jax.kernels import Kernels
from flexolmo_jax.runtime.sharding import platform_of

from .layers import (
    Attention,
    CachedContext,
    Context,
    KVCache,
    Linear,
    PackedContext,
    PromptContext,
    RMSNorm,
)
from .moe import Choices, Experts, RouterOutput, mixture
from .rematerialisation import rematerialised

Params = dict  # nested dict of arrays, see above

MOST_UNROLLED = 8  # layers
SMALL = 2**24  # multiplications, B T D F; a step of fewer is too short for compiling to pay


class Output(NamedTuple):
    """What comes before the logits, so that a loss may make them in parts."""

    hidden: Float[Array, "B T D"]
    head: Float[Array, "D V"]
    router: RouterOutput  # of every layer, [L, ...]
    cache: KVCache | None

    @property
    def logits(self) -> Float[Array, "B T V"]:
        """float32; computed where they are asked for, and only there."""
        return jnp.einsum("btd,dv->btv", self.hidden, self.head, preferred_element_type=jnp.float32)


class Layer(nnx.Module):
    """Attention and the two norms. The experts come from outside: they are stored and trained
    apart from the trunk."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.attention = Attention(config, rngs)
        self.attention_norm = RMSNorm(config.d_model, None, config)
        self.ffn_norm = RMSNorm(config.d_model, None, config)
        self.config = config

    def __call__(
        self,
        x: Float[Array, "B T D"],
        experts: tuple[Experts, ...],
        positions: Int[Array, "B T"],
        context: Context,
        choices: Choices,
        has_window: Bool[Array, ""] | bool = False,
    ) -> tuple[Float[Array, "B T D"], KVCache | None, RouterOutput]:
        """Over a cache, the experts' matrices are those of all layers."""
        is_pre, renormalise = self.config.norm == "pre", self.config.renormalise
        with jax.named_scope("attention"):
            seen = self.attention_norm(x) if is_pre else x
            attended, cache = self.attention(seen, positions, context, has_window, choices.mesh)
            h = x + (attended if is_pre else self.attention_norm(attended))
        with jax.named_scope("mixture"):
            seen = self.ffn_norm(h) if is_pre else h
            mixed, router = mixture(seen, experts, choices, context.layer, renormalise)
            return h + (mixed if is_pre else self.ffn_norm(mixed)), cache, router


class Trunk(nnx.Module):
    """Everything of the anchor but its FFN and router: embeddings, stacked layers, final norm,
    head."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        V, D = config.vocab_size, config.d_model
        self.embedding = nnx.Param(
            config.init_std * jax.random.normal(rngs.params(), (V, D)), axes=("vocab", "embed")
        )
        self.layers = nnx.vmap(functools.partial(Layer, config))(rngs.split(config.n_layers))
        self.norm = RMSNorm(D, None, config)
        self.head = None if config.tied_head else Linear((D, V), ("embed", "vocab"), config, rngs)

    def output_matrix(self) -> Float[Array, "D V"]:
        return self.embedding[...].T if self.head is None else self.head.kernel[...]


class Transformer(nnx.Module):
    """A dense model, a merged model (`n_experts` > 1) or, with `pair`, the anchor beside one new
    expert."""

    def __init__(self, config: ModelConfig, pair: bool, rngs: nnx.Rngs):
        def stack(num_experts: int, has_bias: bool) -> Experts:
            of_layer = functools.partial(Experts, config, num_experts, has_bias)
            return nnx.vmap(of_layer)(rngs.split(config.n_layers))

        self.config = config
        self.trunk = Trunk(config, rngs)
        self.experts = stack(config.n_experts, config.router_bias and config.n_experts > 1)
        self.expert = stack(1, config.router_bias) if pair else None

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        context: Context,
        choices: Choices,
    ) -> Output:
        graph, layers = nnx.split(self.trunk.layers)
        # The scan hands each layer a copy of its slice. Generating is too short for that: there a
        # layer gets the matrices of all layers, and reads those that its tokens choose,
        # mostly a few experts'.
        whole = nnx.Nothing() if context.cache is None else Experts.is_matrix
        groups = [
            nnx.split(group, whole, ...)
            for group in (self.experts, self.expert)
            if group is not None
        ]

        def layer_step(carry, xs):
            x, cache = carry
            layer_state, expert_states, index, noise, has_window = xs
            layer = nnx.merge(graph, layer_state)
            experts = tuple(
                nnx.merge(group, matrices, state)
                for (group, matrices, _), state in zip(groups, expert_states, strict=True)
            )
            here = context.of_layer(index, cache)
            own = dataclasses.replace(choices, noise=noise)
            y, cache, router = layer(
                x, experts, positions, here, own, windows if has_window is None else has_window
            )
            return (y, cache), router

        x = self.trunk.embedding[...][tokens].astype(choices.dtype)
        index = jnp.arange(self.config.n_layers)
        windows, windows_by_layer = _windows(self.config)
        (x, cache), router = jax.lax.scan(
            rematerialised(layer_step, choices.remat),
            (x, context.cache),
            (layers, [state for *_, state in groups], index, choices.noise, windows_by_layer),
            unroll=_is_unrolled(self.config, x, context, choices),
        )
        hidden, head = self.trunk.norm(x), self.trunk.output_matrix().astype(x.dtype)
        return Output(hidden, head, router, cache)


def init_params(config: ModelConfig, key: Array, *, pair: bool = False) -> Params:
    """Random float32 parameters: N(0, init_std), norms 1."""
    return nnx.to_pure_dict(nnx.state(Transformer(config, pair, nnx.Rngs(params=key))))


def _windows(config: ModelConfig) -> tuple[bool, Bool[Array, "L"] | None]:
    """Whether the layers have windows: all or none of them, or each for itself."""
    by_layer = [config.has_window(layer) for layer in range(config.n_layers)]
    return all(by_layer), jnp.array(by_layer) if any(by_layer) and not all(by_layer) else None


def _is_unrolled(
    config: ModelConfig, x: Float[Array, "B T D"], context: Context, choices: Choices
) -> bool:
    """Whether layers are compiled one by one and not as a loop.

    On a CPU a loop sets what it saves for the backward pass to 0, copies it there, and copies it
    out again: 6 to 12 % of a step. Without a loop the weights are copied instead. So tokens have to
    be many, and layers few, as each takes time to compile.
    """
    if context.cache is not None or choices.remat != "none":
        return False
    tokens, platform = x.shape[0] * x.shape[1], platform_of(choices.mesh) or jax.default_backend()
    is_small = x.size * config.d_ffn <= SMALL
    are_many = tokens >= 2 * config.d_model * choices.allowed.size  # of all experts, a pair's too
    return platform == "cpu" and are_many and config.n_layers <= MOST_UNROLLED and not is_small


def forward(  # noqa: PLR0913 - a model call
    config: ModelConfig,
    params: Params,
    tokens: Int[Array, "B T"],
    segments: Int[Array, "B T"] | None = None,
    *,
    active: int | None = None,
    allowed: Bool[Array, "E"] | None = None,
    dtype: DTypeLike = jnp.float32,
    remat: Remat = "none",
    mesh: Mesh | None = None,
    kernels: Kernels = "auto",
    router_noise: Float[Array, "L B T E"] | None = None,
) -> Output:
    """Runs whole sequences of packed documents.

    Args:
        segments: the document of each token, 0 for padding; no token attends outside its own.
        active: experts a token uses; by default the config's, and both of a pair's.
        allowed: experts that tokens may use; by default all.
        router_noise, dtype, remat, mesh, kernels: as in `Choices`.
    """
    if segments is None:
        segments = jnp.ones(tokens.shape, jnp.int32)
    active, allowed = _all_experts(config, params, active, allowed)
    choices = Choices(active, allowed, router_noise, dtype, remat, mesh, kernels)
    positions = document_positions(segments)
    return bind(config, params)(tokens, positions, PackedContext(segments), choices)


def forward_layer(
    config: ModelConfig,
    params: Params,
    x: Float[Array, "B T D"],
    segments: Int[Array, "B T"],
    has_window: Bool[Array, ""] | bool = False,
) -> Float[Array, "B T D"]:
    """One layer of a pair with both experts active, where only one layer fits the memory.

    `params` are that layer's, without their axis of layers: `layer` (of the trunk), `experts` and
    `expert`. `x` comes from the layer before: at first the embeddings of the tokens.
    """
    modules = _abstract(config, True)
    parts = {"layer": modules.trunk.layers, "experts": modules.experts, "expert": modules.expert}
    layer, *experts = (
        nnx.merge(nnx.split(module)[0], params[name]) for name, module in parts.items()
    )
    positions, context = document_positions(segments), PackedContext(segments)
    choices = Choices(2, jnp.ones(2, bool))
    return layer(x, tuple(experts), positions, context, choices, has_window)[0]


def decode(
    config: ModelConfig,
    params: Params,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    context: PromptContext | CachedContext,
    choices: Choices,
) -> Output:
    """One step over a KV cache, for a prompt and for each token after it. The output's cache has
    this step in it."""
    return bind(config, params)(tokens, positions, context, choices)


def empty_cache(
    config: ModelConfig, batch: int, slots: int, dtype: DTypeLike = jnp.float32
) -> KVCache:
    shape = (config.n_layers, batch, config.n_kv_heads, slots, config.head_size)
    return KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


def bind(config: ModelConfig, params: Params) -> Transformer:
    """The module with these parameters in it (arrays or tracers); cheap."""
    return nnx.merge(_graph(config, "expert" in params), params)


def document_positions(segments: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Position of each token within its own document: a packed document sees the positions it would
    have alone."""
    index = jnp.arange(segments.shape[1])
    starts = jnp.concatenate(
        [jnp.ones_like(segments[:, :1], bool), segments[:, 1:] != segments[:, :-1]], axis=1
    )
    return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)


def num_experts(config: ModelConfig, params: Params) -> int:
    """How many experts a token can choose from, the anchor's included."""
    return config.n_experts + ("expert" in params)


def logical_axes(config: ModelConfig, *, pair: bool = False) -> Params:
    """The logical axis names of every parameter, in the shape of the parameter tree; stacked ones
    start with "layers"."""
    axes = {}
    for path, variable in nnx.to_flat_state(nnx.state(_abstract(config, pair))):
        names = variable.get_metadata()["axes"]
        branch = axes
        for key in path[:-1]:
            branch = branch.setdefault(key, {})
        branch[path[-1]] = ("layers", *names) if len(variable.shape) > len(names) else names
    return axes


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter by its path. Nothing is allocated."""
    return {
        "/".join(map(str, path)): variable.shape
        for path, variable in nnx.to_flat_state(nnx.state(_abstract(config, False)))
    }


@functools.lru_cache
def _abstract(config: ModelConfig, pair: bool) -> Transformer:
    return nnx.eval_shape(lambda: Transformer(config, pair, nnx.Rngs(params=0)))


@functools.lru_cache
def _graph(config: ModelConfig, pair: bool) -> nnx.GraphDef:
    return nnx.split(_abstract(config, pair))[0]


def _all_experts(
    config: ModelConfig, params: Params, active: int | None, allowed: Array | None
) -> tuple[int, Array]:
    """Defaults: every expert allowed; the config's number of active ones, both of them in a
    pair."""
    E = num_experts(config, params)
    if active is None:
        active = E if "expert" in params else config.n_active
    return active, jnp.ones(E, bool) if allowed is None else allowed
