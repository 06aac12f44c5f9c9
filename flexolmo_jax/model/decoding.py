"""The two programs of generation over a KV cache, compiled ahead of time.

    prefill   puts every prompt token but the last into the cache, some prompts at a time; computes
              no logits
    run       one `lax.while_loop`: feed the last token, choose the next, until a limit is reached
              or every prompt has ended

The loop also feeds a prompt's last token, so that the same step chooses the first token and all
others.

The compiler lays out weights and cache as the loop reads them. Laid out in another way, they would
be copied by every call: at 7 x 7B that is 5 GiB of weights and 4 GiB of cache on each of 8 TPUs.
"""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from flexolmo_jax.config import ModelConfig
from flexolmo_jax.kernels import Kernels
from flexolmo_jax.runtime import sharding
from flexolmo_jax.runtime.environment import random_key

from .layers import CACHE, CachedContext, KVCache, PromptContext
from .moe import Choices
from .sizes import KEPT
from .transformer import Output, Params, decode, empty_cache, num_experts

# Prompt tokens that a device reads at once. Their activations lie beside the weights: at 7 x 7B
# 32,768 of them took 16.0 of the 15.8 GiB of a v5e.
READ_AT_ONCE = 8192
ENDS = 8  # tokens, beside EOS, that may end a completion
GREEDY = 1  # of `Decoding.likeliest`: the likeliest token, the lowest id among equals


class Sizes(NamedTuple):
    """What a program is compiled for: prompts, and slots of the cache for each."""

    batch: int
    prompt: int  # slots for prompt tokens, padded on the left
    new: int  # slots for chosen tokens


class Request(NamedTuple):
    """A batch's settings, as arrays: other values need no other program."""

    first_slot: Int[Array, "B"]  # of the prompt in the cache; the slots before it are padding
    eos_id: Int[Array, ""]
    ends: Int[
        Array, "Z"
    ]  # ENDS tokens that end a completion as EOS does; EOS where there are fewer
    allowed: Bool[Array, "E"]
    temperature: Float[Array, ""]
    top_k: Int[Array, ""]
    top_p: Float[Array, ""]
    seed: Int[Array, ""]
    prompts: Int[Array, ""]  # how many the batch has; behind them it is padding


class State(NamedTuple):
    """The state between two steps."""

    cache: KVCache
    token: Int[Array, "B"]  # chosen last, not yet in the cache
    ended: Bool[Array, "B"]
    step: Int[Array, ""]  # tokens chosen so far
    chosen: Int[Array, "B N"]  # EOS where not (yet) chosen


class Weights(NamedTuple):
    """The shapes and shardings of a tree of parameters, and their layouts. It can be hashed."""

    tree: Any  # a jax.tree_util.PyTreeDef
    shapes: tuple[jax.ShapeDtypeStruct, ...]
    formats: tuple[Format, ...]

    @classmethod
    def of(cls, params: Params, formats: Params | None = None) -> "Weights":
        """Those of arrays, or of shapes with shardings. Without formats the compiler chooses."""
        leaves, tree = jax.tree.flatten(params)
        shapes = tuple(_shape(leaf.shape, leaf.dtype, leaf.sharding) for leaf in leaves)
        chosen = _automatic(leaves) if formats is None else jax.tree.leaves(formats)
        return cls(tree, shapes, tuple(chosen))


class Program(NamedTuple):
    """A jitted function and the shapes that it is compiled for."""

    function: Any
    arguments: tuple[Any, ...]

    def compile(self) -> Any:
        """A jax.stages.Compiled."""
        return self.function.lower(*self.arguments).compile()


class Compiled(NamedTuple):
    """Both programs, and the formats that they take parameters in."""

    prefill: Any  # params, tokens [B, P], last tokens [B], Request -> State
    run: Any  # params, State, Request, how many tokens are chosen at the end -> State
    formats: Params


@dataclass(frozen=True)
class Decoding:
    """What the programs depend on beside their sizes.

    Prompts, limits, seeds, sampling values and excluded experts are arrays: other values of them
    need no other program.
    """

    config: ModelConfig
    active: int  # experts a token uses
    vocab_size: int  # the tokenizer's; larger ids pad the embedding and are never chosen
    likeliest: int  # tokens that are put in order, to choose among them: GREEDY, or 0 for none
    dtype: str  # of activations and of the cache
    mesh: Mesh | None = None
    kernels: Kernels = "auto"

    def run(self, weights: Weights, sizes: Sizes) -> Program:
        """Steps until so many tokens are chosen or every prompt has ended."""

        def run(params: Params, state: State, request: Request, until: Array) -> State:
            def goes_on(state: State) -> Array:
                return (state.step < until) & ~jnp.all(state.ended)

            step = functools.partial(self._step, params, request)
            return jax.lax.while_loop(goes_on, step, state)

        params, state, request, until = self.arguments(weights, sizes)
        formats = weights.tree.unflatten(weights.formats)
        state_formats = _automatic(state)
        jitted = jax.jit(
            run,
            in_shardings=(formats, state_formats, *_shardings((request, until))),
            out_shardings=state_formats,
            donate_argnums=1,
        )
        return Program(jitted, (params, state, request, until))

    def prefill(self, weights: Weights, sizes: Sizes, loop: Any) -> Program:
        """Makes the first state: every prompt token but the last is cached.

        `loop` is the compiled `run`. Weights and state lie as it takes them.
        """
        B, P, N = sizes
        formats, state_formats, *_ = loop.input_formats[0]

        def prefill(params: Params, tokens: Array, last: Array, request: Request) -> State:
            slots = jnp.arange(P) - request.first_slot[:, None]
            cache = self._read(params, request, tokens, slots, N)
            chosen = jnp.full((B, N), request.eos_id)
            return State(cache, last, jnp.arange(B) >= request.prompts, jnp.int32(0), chosen)

        params, state, request, _ = self.arguments(weights, sizes)
        given = _shape((B, P), "int32", state.token.sharding), state.token, request
        jitted = jax.jit(
            prefill,
            in_shardings=(formats, *_shardings(given)),
            out_shardings=state_formats,
        )
        return Program(jitted, (params, *given))

    def arguments(self, weights: Weights, sizes: Sizes) -> tuple[Params, State, Request, Any]:
        """The shapes and shardings of the loop's arguments."""
        B, P, N = sizes
        params: Params = weights.tree.unflatten(weights.shapes)
        everywhere = weights.shapes[0].sharding  # of one device
        if self.mesh is not None:
            everywhere = sharding.replicated(self.mesh)

        def array(*shape: int, dtype: str = "int32") -> Any:
            return _shape(shape, dtype, everywhere)

        def cached(a: jax.ShapeDtypeStruct) -> Any:
            mesh = self.mesh
            placed = mesh and sharding.parameter_sharding(mesh, CACHE, a.shape)
            return _shape(a.shape, a.dtype, placed or everywhere)

        empty = functools.partial(empty_cache, self.config, B, P + N, jnp.dtype(self.dtype))
        cache = jax.tree.map(cached, jax.eval_shape(empty))
        state = State(cache, array(B), array(B, dtype="bool"), array(), array(B, N))
        request = Request(
            first_slot=array(B),
            eos_id=array(),
            ends=array(ENDS),
            allowed=array(num_experts(self.config, params), dtype="bool"),
            temperature=array(dtype="float32"),
            top_k=array(),
            top_p=array(dtype="float32"),
            seed=array(dtype="uint32"),
            prompts=array(),
        )
        return params, state, request, array()

    def _read(
        self,
        params: Params,
        request: Request,
        tokens: Int[Array, "B P"],
        slots: Int[Array, "B P"],
        new: int,
    ) -> KVCache:
        """A cache with these tokens in it, and `new` empty slots behind them. A negative slot is
        padding."""
        B, P = tokens.shape

        def empty(batch: int, slots: int) -> KVCache:
            cache = empty_cache(self.config, batch, slots, jnp.dtype(self.dtype))
            return sharding.constrain(self.mesh, cache, CACHE)

        def read(cache: KVCache, tokens: Array, slots: Array) -> KVCache:
            context = PromptContext((slots >= 0).astype(jnp.int32), cache)
            # The logits are not used, so the compiler drops the head. They would be [B, P, V],
            # which is larger than all the rest.
            filled = self._model(params, request, tokens, jnp.maximum(slots, 0), context).cache
            assert filled is not None  # since the context has one
            return filled

        n = self._parts(B, P)
        if n == 1:
            return read(empty(B, P + new), tokens, slots)

        def read_part(whole: KVCache, part: tuple[Array, ...]) -> tuple[KVCache, None]:
            index, tokens, slots = part

            def put(whole: Array, own: Array) -> Array:  # [L, B / n, n, K, S, C]
                return jax.lax.dynamic_update_slice(whole, own[:, :, None], (0, 0, index, 0, 0, 0))

            return jax.tree.map(put, whole, read(empty(B // n, P), tokens, slots)), None

        # Every n-th prompt goes to the same part: each device has an even share of every part.
        by_part = [jnp.moveaxis(a.reshape(-1, n, P), 1, 0) for a in (tokens, slots)]
        cache = empty(B, P + new)
        apart = jax.tree.map(lambda a: a.reshape(a.shape[0], -1, n, *a.shape[2:]), cache)
        filled, _ = jax.lax.scan(read_part, apart, (jnp.arange(n), *by_part))
        return jax.tree.map(lambda a, like: a.reshape(like.shape), filled, cache)

    def _parts(self, batch: int, prompt: int) -> int:
        """In how many parts prompts are read: the fewest that leave a device READ_AT_ONCE tokens,
        or one prompt."""
        own = batch // (sharding.devices_of_batch(self.mesh) if self.mesh else 1)
        sizes = (n for n in range(1, own + 1) if own % n == 0)
        return next(n for n in sizes if own // n * prompt <= READ_AT_ONCE or n == own)

    def _model(
        self, params: Params, request: Request, tokens: Array, positions: Array, context: Any
    ) -> Output:
        how: dict[str, Any] = {"dtype": self.dtype, "mesh": self.mesh, "kernels": self.kernels}
        choices = Choices(self.active, request.allowed, **how)
        return decode(self.config, params, tokens, positions, context, choices)

    def _step(self, params: Params, request: Request, state: State) -> State:
        """Feeds every prompt's last token and chooses its next one."""
        S, N = state.cache.keys.shape[3], state.chosen.shape[1]
        slot = S - N + state.step
        slots = jnp.arange(S)
        mask = (slots <= slot) & (slots >= request.first_slot[:, None, None])
        positions = (slot - request.first_slot)[:, None]
        context = CachedContext(mask, state.cache, slot)
        out = self._model(params, request, state.token[:, None], positions, context)
        assert out.cache is not None  # since the context has one
        token = self._next_token(out.logits[:, 0, : self.vocab_size], request, state.step)
        token = jnp.where(state.ended, request.eos_id, token)
        chosen = jax.lax.dynamic_update_slice_in_dim(state.chosen, token[:, None], state.step, 1)
        ends = (token == request.eos_id) | jnp.any(token[:, None] == request.ends, axis=1)
        ended = state.ended | ends
        return State(out.cache, token, ended, state.step + 1, chosen)

    def _next_token(
        self, logits: Float[Array, "B V"], request: Request, step: Int[Array, ""]
    ) -> Int[Array, "B"]:
        if self.likeliest == GREEDY:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        key = jax.random.fold_in(random_key(request.seed), step)
        keys = jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(len(logits)))
        draw = functools.partial(sample, likeliest=self.likeliest)
        draw = jax.vmap(draw, in_axes=(0, 0, None, None, None))
        return draw(keys, logits, request.temperature, request.top_k, request.top_p)


@functools.lru_cache(KEPT)
def compiled(decoding: Decoding, weights: Weights, sizes: Sizes) -> Compiled:
    """Both programs. Compiles once for equal arguments, while they are among the KEPT used last."""
    run = decoding.run(weights, sizes).compile()
    prefill = decoding.prefill(weights, sizes, run).compile()
    return Compiled(prefill, run, run.input_formats[0][0])


def sample(
    key: Array,
    logits: Float[Array, "V"],
    temperature: Float[Array, ""],
    top_k: Int[Array, ""],
    top_p: Float[Array, ""],
    *,
    likeliest: int,
) -> Int[Array, ""]:
    """Draws a token: temperature first, then the `top_k` likeliest, then their nucleus of `top_p`.

    The nucleus (Holtzman et al., arXiv 1904.09751) keeps a token while the likelier ones together
    have less than `top_p`. So at least one token is always kept. Gumbel noise of each token's own
    makes the choice among the kept ones, so it does not depend on their order.

    Args:
        likeliest: how many tokens are put in order, at least `top_k`; 0: none, and `top_k` and
            `top_p` are not used.
    """
    noise = jax.random.gumbel(key, logits.shape)
    # subtract the maximum before dividing: a low temperature would overflow
    scaled = (logits - jnp.max(logits)) / temperature
    if not likeliest:
        return jnp.argmax(scaled + noise).astype(jnp.int32)
    scaled, order = jax.lax.top_k(scaled, likeliest)  # the lowest id first among equals
    scaled = jnp.where(jnp.arange(likeliest) < top_k, scaled, -jnp.inf)
    likelihood = jax.nn.softmax(scaled)
    before = jnp.cumsum(likelihood) - likelihood
    scaled = jnp.where((before < top_p) | (top_p >= 1), scaled, -jnp.inf)
    return order[jnp.argmax(scaled + noise[order])].astype(jnp.int32)


def _shape(shape: tuple[int, ...], dtype: Any, placement: Any) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=placement)


def _shardings(tree: Any) -> Any:
    return jax.tree.map(lambda a: a.sharding, tree)


def _automatic(tree: Any) -> Any:
    """Formats that the compiler chooses."""
    return jax.tree.map(lambda a: Format(Layout.AUTO, a.sharding), tree)
