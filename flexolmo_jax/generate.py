"""Generation with a KV cache: a batch of prompts of any lengths in, completions out.

    prefill   puts every prompt token but the last into the cache, left-padded to a common length;
              computes no logits
    run       one `lax.while_loop`: feed the last token, choose the next, until a limit is reached
              or every prompt has ended

The loop also feeds a prompt's last token, so that the same step chooses the first token and all
others. Streaming calls the same compiled program, each time with a limit of one token more. So it
gives the same tokens as generating all of them in one call.

Compiling is rare. Lengths are rounded up to powers of two. All else about a request, except whether
it is greedy, is a run-time array: prompts, limits, seeds and excluded experts.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from flexolmo_jax.config import ModelConfig
from flexolmo_jax.data.tokenizer import Tokenizer
from flexolmo_jax.errors import UserError
from flexolmo_jax.kernels import Kernels
from flexolmo_jax.model import (
    CACHE,
    CachedContext,
    Choices,
    KVCache,
    Params,
    decode,
    empty_cache,
)
from flexolmo_jax.runtime import sharding

SMALLEST_BUCKET = 16
COLDEST = 1e-5  # below this temperature a float32 softmax is an argmax


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. `sample` says how the values work together."""

    temperature: float = 0.0  # 0: greedy, the lowest id wins ties
    top_k: int = 0  # choose among the likeliest; 0: all
    top_p: float = 1.0  # and of these among the fewest that have this much probability
    seed: int = 0  # the same seed, prompt and place in the batch give the same completion

    def check(self) -> None:
        """Raises UserError for values out of range."""
        warmth, k, p, seed = self.temperature, self.top_k, self.top_p, self.seed
        _expect(0 <= warmth < math.inf, "temperature", warmth, "0 (greedy) or a positive number")
        _expect(k >= 0, "top_k", k, "0 (all) or the number of tokens to choose from")
        _expect(0 < p <= 1, "top_p", p, "a number above 0 and up to 1 (all)")
        _expect(0 <= seed < 2**32, "seed", seed, "an integer from 0 to 2**32 - 1")


class Decoder(NamedTuple):
    """A model, and what generation needs to know of its tokenizer."""

    config: ModelConfig
    params: Params
    vocab_size: int  # the tokenizer's; larger ids pad the embedding and are never chosen
    eos_id: int  # ends a completion; -1 for none


def generate(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    choices: Choices,
    sampling: Sampling = Sampling(),
    on_token: Callable[[int, np.ndarray], None] | None = None,
) -> list[list[int]]:
    """The completions of a batch of prompts, each cut before its EOS.

    A completion does not depend on the other prompts.

    Args:
        choices: the dtype and the mesh are those of the cache too.
        on_token: called after every step with its index and the chosen ids [B]; prompts that have
            ended give `eos_id`.

    Raises:
        UserError: no prompts, an empty prompt, ids outside the vocabulary, no tokens to generate,
            more tokens than `config.max_seq_len`, or sampling values out of range.
    """
    config, params, _, eos_id = decoder
    vocab_size = min(decoder.vocab_size, config.vocab_size)
    sampling.check()
    _check(config, prompts, max_new_tokens, vocab_size)
    tokens, lengths = _left_padded(prompts, config.max_seq_len)
    request = Request(
        first_slot=jnp.asarray(tokens.shape[1] - lengths),
        eos_id=jnp.int32(eos_id),
        allowed=jnp.asarray(choices.allowed, bool),
        temperature=jnp.float32(sampling.temperature),
        top_k=jnp.int32(min(sampling.top_k or vocab_size, vocab_size)),
        top_p=jnp.float32(sampling.top_p),
        seed=jnp.uint32(sampling.seed),
    )
    greedy, dtype = sampling.temperature < COLDEST, jnp.dtype(choices.dtype).name
    how = greedy, dtype, choices.mesh, choices.kernels
    prefill, run = programs(config, choices.active, vocab_size, *how)
    last = np.array([prompt[-1] for prompt in prompts], np.int32)
    state = prefill(params, tokens, last, request, _bucket(max_new_tokens, config.max_seq_len))
    if on_token is None:
        state = run(params, state, request, np.int32(max_new_tokens))
    else:
        for step in range(max_new_tokens):
            state = run(params, state, request, np.int32(step + 1))
            on_token(step, np.array(state.token))  # a copy: the next step takes the buffer
            if np.all(state.ended):
                break
    completions = np.asarray(state.chosen)[:, : int(state.step)].tolist()
    return [ids[: ids.index(eos_id)] if eos_id in ids else ids for ids in completions]


def _left_padded(
    prompts: Sequence[Sequence[int]], largest: int
) -> tuple[Int[np.ndarray, "B P"], Int[np.ndarray, "B"]]:
    """The prompts without their last tokens, padded on the left, and their lengths."""
    lengths = np.array([len(prompt) - 1 for prompt in prompts], np.int32)
    P = _bucket(max(map(len, prompts)) - 1, largest)
    tokens = np.zeros((len(prompts), P), np.int32)
    for b, prompt in enumerate(prompts):
        tokens[b, P - lengths[b] :] = prompt[:-1]
    return tokens, lengths


class TextStream:
    """Turns ids into text as they come.

    A token may end inside a character. Its bytes then wait for the rest of the character.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._ids: list[int] = []  # since the last token that ended with a whole character
        self._printed = 0  # characters of these that were returned

    def push(self, token: int) -> str:
        """Returns the text that this token completes: often one word; empty inside a character."""
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids)
        # The bytes of an incomplete character decode to one U+FFFD, at the end. The text before it
        # is final.
        incomplete = text.endswith("\ufffd")
        new = text[self._printed : len(text) - incomplete]
        if incomplete:
            self._printed += len(new)
        else:
            self._ids, self._printed = [], 0
        return new

    def finish(self) -> str:
        """Returns the rest at the end: U+FFFD for a character that was never completed."""
        left = self._tokenizer.decode(self._ids)[self._printed :]
        self._ids, self._printed = [], 0
        return left


class Request(NamedTuple):
    """A batch's settings, as arrays: other values need no other program."""

    first_slot: Int[Array, "B"]  # of the prompt in the cache; the slots before it are padding
    eos_id: Int[Array, ""]
    allowed: Bool[Array, "E"]
    temperature: Float[Array, ""]
    top_k: Int[Array, ""]
    top_p: Float[Array, ""]
    seed: Int[Array, ""]


class State(NamedTuple):
    """The state between two steps. The cache has P slots for prompt tokens and N for new ones."""

    cache: KVCache
    token: Int[Array, "B"]  # chosen last, not yet in the cache
    ended: Bool[Array, "B"]
    step: Int[Array, ""]  # tokens chosen so far
    chosen: Int[Array, "B N"]  # EOS where not (yet) chosen


@functools.lru_cache
def programs(  # noqa: PLR0913 - what a model call depends on
    config: ModelConfig,
    active: int,
    vocab_size: int,
    greedy: bool,
    dtype: str,
    mesh: Mesh | None,
    kernels: Kernels,
) -> tuple[Callable, Callable]:
    """The jitted (prefill, run) for these values.

    Each compiles once for a batch size and rounded lengths.
    """

    def model(params: Params, request: Request, tokens: Array, positions: Array, context):
        choices = Choices(active, request.allowed, dtype=dtype, mesh=mesh, kernels=kernels)
        return decode(config, params, tokens, positions, context, choices)

    @functools.partial(jax.jit, static_argnums=4)
    def prefill(
        params: Params, tokens: Array, last: Array, request: Request, new_slots: int
    ) -> State:
        B, P = tokens.shape
        slots = jnp.arange(P)
        mask = (slots <= slots[:, None]) & (slots >= request.first_slot[:, None, None])
        positions = jnp.maximum(slots - request.first_slot[:, None], 0)
        context = CachedContext(mask, empty_cache(config, B, P, jnp.dtype(dtype)), slot=0)
        # The logits are not used, so the compiler drops the head. They would be [B, P, V], which
        # is larger than all the rest.
        cache = model(params, request, tokens, positions, context).cache
        room = ((0, 0), (0, 0), (0, 0), (0, new_slots), (0, 0))
        cache = sharding.constrain(mesh, jax.tree.map(lambda a: jnp.pad(a, room), cache), CACHE)
        chosen = jnp.full((B, new_slots), request.eos_id)
        return State(cache, last, jnp.zeros(B, bool), jnp.int32(0), chosen)

    step = functools.partial(_step, model, vocab_size, greedy)

    @functools.partial(jax.jit, donate_argnums=1)
    def run(params: Params, state: State, request: Request, until: Array) -> State:
        """Steps until `until` tokens are chosen or every prompt has ended."""

        def goes_on(state: State) -> Array:
            return (state.step < until) & ~jnp.all(state.ended)

        return jax.lax.while_loop(goes_on, functools.partial(step, params, request), state)

    return prefill, run


def _step(
    model: Callable,
    vocab_size: int,
    greedy: bool,
    params: Params,
    request: Request,
    state: State,
) -> State:
    """Feeds every prompt's last token and chooses its next one."""
    S, N = state.cache.keys.shape[3], state.chosen.shape[1]
    slot = S - N + state.step
    slots = jnp.arange(S)
    mask = (slots <= slot) & (slots >= request.first_slot[:, None, None])
    positions = (slot - request.first_slot)[:, None]
    context = CachedContext(mask, state.cache, slot)
    out = model(params, request, state.token[:, None], positions, context)
    assert out.cache is not None  # since the context has one
    token = _next_token(out.logits[:, 0, :vocab_size], request, state.step, greedy)
    token = jnp.where(state.ended, request.eos_id, token)
    chosen = jax.lax.dynamic_update_slice_in_dim(state.chosen, token[:, None], state.step, 1)
    ended = state.ended | (token == request.eos_id)
    return State(out.cache, token, ended, state.step + 1, chosen)


def _next_token(
    logits: Float[Array, "B V"], request: Request, step: Int[Array, ""], greedy: bool
) -> Int[Array, "B"]:
    if greedy:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    key = jax.random.fold_in(jax.random.key(request.seed), step)
    keys = jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(len(logits)))
    draw = jax.vmap(sample, in_axes=(0, 0, None, None, None))
    return draw(keys, logits, request.temperature, request.top_k, request.top_p)


def sample(
    key: Array,
    logits: Float[Array, "V"],
    temperature: Float[Array, ""],
    top_k: Int[Array, ""],
    top_p: Float[Array, ""],
) -> Int[Array, ""]:
    """Draws a token: temperature first, then the `top_k` likeliest, then their nucleus of `top_p`.

    The nucleus (Holtzman et al., arXiv 1904.09751) keeps a token while the likelier ones together
    have less than `top_p`. So at least one token is always kept.
    """
    order = jnp.argsort(logits, descending=True, stable=True)  # the lowest id first among equals
    # subtract the maximum before dividing: a low temperature would overflow
    scaled = (logits[order] - jnp.max(logits)) / temperature
    scaled = jnp.where(jnp.arange(len(logits)) < top_k, scaled, -jnp.inf)
    likelihood = jax.nn.softmax(scaled)
    before = jnp.cumsum(likelihood) - likelihood
    scaled = jnp.where((before < top_p) | (top_p >= 1), scaled, -jnp.inf)
    return order[jax.random.categorical(key, scaled)].astype(jnp.int32)


def _check(
    config: ModelConfig, prompts: Sequence[Sequence[int]], max_new_tokens: int, vocab_size: int
) -> None:
    _expect(len(prompts) > 0, "prompts", "none", "at least one")
    _expect(max_new_tokens >= 1, "max_new_tokens", max_new_tokens, "1 or more")
    for i, prompt in enumerate(prompts):
        _expect(len(prompt) > 0, f"prompt {i}", "no tokens", "at least one; give it some text")
        known = min(prompt) >= 0 and max(prompt) < vocab_size
        _expect(known, f"prompt {i}", "ids outside the vocabulary", f"0 to {vocab_size - 1}")
        fits = len(prompt) + max_new_tokens <= config.max_seq_len
        got = f"{len(prompt)} tokens and {max_new_tokens} new ones"
        most = f"at most {config.max_seq_len} together (model.max_seq_len)"
        _expect(fits, f"prompt {i}", got, f"{most}; shorten the prompt or generate less")


def _expect(holds: bool, name: str, got: object, expected: str) -> None:
    if not holds:
        raise UserError(f"{name}: got {got}, expected {expected}")


def _bucket(length: int, largest: int) -> int:
    """The length, rounded up to a power of two so that few programs are compiled."""
    return min(max(SMALLEST_BUCKET, 1 << max(length - 1, 0).bit_length()), largest)
