"""Generation with a KV cache: a batch of prompts of any lengths in, completions out.

The programs are those of model/decoding.py. Compiling is rare: lengths are rounded up to powers of
two, and batches a little. Streaming calls the same program with lower limits, and so gives the
same tokens.
"""

import itertools
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int

from flexolmo_jax.config import ModelConfig
from flexolmo_jax.data.ids import checked_ids
from flexolmo_jax.data.tokenizer import Tokenizer
from flexolmo_jax.errors import UserError
from flexolmo_jax.kernels import Kernels
from flexolmo_jax.model import Params
from flexolmo_jax.model.decoding import (
    ENDS,
    GREEDY,
    Compiled,
    Decoding,
    Request,
    Sizes,
    Weights,
    compiled,
)
from flexolmo_jax.model.sizes import power_of_two, rounded_up
from flexolmo_jax.runtime.sharding import batch_over

STREAMED = 8  # tokens that a call chooses before they are handed out
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
        is_warmth = isinstance(warmth, Real) and 0 <= warmth < math.inf
        _expect(is_warmth, "temperature", warmth, "0 (greedy) or a positive number")
        is_number = isinstance(k, Integral) and k >= 0
        _expect(is_number, "top_k", k, "0 (all) or the number of tokens to choose from")
        is_share = isinstance(p, Real) and 0 < p <= 1
        _expect(is_share, "top_p", p, "a number above 0 and up to 1 (all)")
        is_seed = isinstance(seed, Integral) and 0 <= seed < 2**32
        _expect(is_seed, "seed", seed, "an integer from 0 to 2**32 - 1")

    def likeliest(self, vocab_size: int) -> int:
        """How many tokens have to be put in order, see `Decoding.likeliest`."""
        if self.temperature < COLDEST:
            return GREEDY
        if self.top_k:
            return power_of_two(self.top_k, vocab_size)
        return vocab_size if self.top_p < 1 else 0


class Decoder(NamedTuple):
    """A model, and what generation needs to know of its tokenizer."""

    config: ModelConfig
    params: Params
    vocab_size: int  # the tokenizer's; larger ids pad the embedding and are never chosen
    eos_id: int  # ends a completion; -1 for none


class Generator:
    """A model that completes prompts. Its weights lie as the compiled programs read them."""

    def __init__(
        self,
        decoder: Decoder,
        mesh: Mesh | None = None,
        kernels: Kernels = "auto",
        dtype: str | None = None,
    ):
        """Casts weights of another dtype, once.

        Args:
            decoder: its weights change their places in memory when a program is compiled: they are
                replaced in their tree, one after the other.
            mesh: the devices that the weights are spread over, and the cache is.
            dtype: of weights, activations and cache; by default that of the weights, and float32
                on a CPU, which has no products of another.
        """
        leaves = jax.tree.leaves(decoder.params)
        of_weights = jnp.result_type(*leaves)
        if all(device.platform == "cpu" for device in leaves[0].devices()):
            of_weights = jnp.float32
        self._dtype = jnp.dtype(dtype or of_weights).name
        if any(leaf.dtype != self._dtype for leaf in leaves):
            cast = jax.tree.map(lambda leaf: leaf.astype(self._dtype), decoder.params)
            decoder = decoder._replace(params=cast)
        vocab_size = min(decoder.vocab_size, decoder.config.vocab_size)
        self._decoder = decoder._replace(vocab_size=vocab_size)
        self._mesh, self._kernels = mesh, kernels
        self._weights = Weights.of(decoder.params)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int | list[int],
        experts: tuple[int, np.ndarray],
        sampling: Sampling = Sampling(),
        on_token: Callable[[int, np.ndarray], Any] | None = None,
        ends: Sequence[int] = (),
    ) -> list[list[int]]:
        """The completions of a batch of prompts, each cut before its EOS or another of its ends.

        A completion does not depend on the other prompts.

        Args:
            max_new_tokens: of every prompt, or of each its own.
            experts: how many of them a token uses, and bool [E]: those that it may use.
            on_token: called for every token with its index and the chosen ids [B]; prompts that
                have ended give `eos_id`. After the first, `STREAMED` tokens come at a time. Once it
                returns True, no more are chosen.
            ends: tokens that end a completion as EOS does, ENDS at most.

        Raises:
            UserError: no prompts, one that `checked_ids` refuses, no tokens to generate, more
                tokens than `config.max_seq_len`, too many ends, or sampling values out of range.
        """
        config, _, vocab_size, eos_id = self._decoder
        sampling.check()
        given, limits = _checked(config, prompts, max_new_tokens, vocab_size)
        n = len(given)
        _expect(len(ends) <= ENDS, "ends", f"{len(ends)} tokens", f"at most {ENDS}")
        batch = batch_over(self._mesh, rounded_up(n))
        tokens, last, first_slot = _left_padded(given, batch, config.max_seq_len)
        (active, allowed), likeliest = experts, sampling.likeliest(vocab_size)
        how: dict[str, Any] = {"mesh": self._mesh, "kernels": self._kernels}
        decoding = Decoding(config, active, vocab_size, likeliest, self._dtype, **how)
        slots = power_of_two(max(limits), config.max_seq_len)
        programs = self._compiled(decoding, Sizes(batch, tokens.shape[1], slots))
        of_batch = {"first_slot": first_slot, "prompts": np.int32(n)}
        request = _request(of_batch, allowed, self._decoder, sampling, ends)
        state = programs.prefill(self._decoder.params, tokens, last, request)
        for limit in _limits(max(limits), on_token is not None):
            before = int(state.step)
            state = programs.run(self._decoder.params, state, request, np.int32(limit))
            chosen = np.array(state.chosen)[:n, : int(state.step)]
            steps = range(before, chosen.shape[1])
            told = [on_token(step, chosen[:, step]) for step in steps] if on_token else []
            if chosen.shape[1] < limit or any(stop is True for stop in told):
                break
        own = zip(chosen.tolist(), limits, strict=True)
        return [_before(ids[:limit], {eos_id, *ends}) for ids, limit in own]

    def _compiled(self, decoding: Decoding, sizes: Sizes) -> Compiled:
        """The programs. The weights lie as they read them when this returns."""
        programs = compiled(decoding, self._weights, sizes)
        _lay_out(self._decoder.params, programs.formats)
        self._weights = Weights.of(self._decoder.params, programs.formats)
        return programs


def _request(
    of_batch: dict[str, Any],
    allowed: np.ndarray,
    decoder: Decoder,
    sampling: Sampling,
    ends: Sequence[int],
) -> Request:
    """In numpy's arrays: every process of a mesh gives its own."""
    vocab_size = decoder.vocab_size
    settings: dict[str, Any] = {
        **of_batch,
        "eos_id": np.int32(decoder.eos_id),
        "ends": np.array([*ends, *[decoder.eos_id] * (ENDS - len(ends))], np.int32),
        "allowed": np.asarray(allowed, bool),
        "temperature": np.float32(sampling.temperature),
        "top_k": np.int32(min(sampling.top_k or vocab_size, vocab_size)),
        "top_p": np.float32(sampling.top_p),
        "seed": np.uint32(sampling.seed),
    }
    return Request(**settings)


def _lay_out(params: Params, formats: Params) -> None:
    """Replaces the arrays that lie in another format, so that one at a time is there twice."""
    for name, wanted in formats.items():
        if isinstance(wanted, dict):
            _lay_out(params[name], wanted)
        elif params[name].format != wanted:
            params[name] = jax.device_put(params[name], wanted)


def _before(ids: list[int], ends: set[int]) -> list[int]:
    """The ids before the first of the ends."""
    return list(itertools.takewhile(lambda i: i not in ends, ids))


def _limits(max_new_tokens: int, is_streamed: bool) -> list[int]:
    """How many tokens are chosen after each call. The first is streamed as soon as it is there."""
    early = range(1, max_new_tokens, STREAMED) if is_streamed else ()
    return [*early, max_new_tokens]


def _left_padded(
    prompts: Sequence[np.ndarray], batch: int, largest: int
) -> tuple[Int[np.ndarray, "B P"], Int[np.ndarray, "B"], Int[np.ndarray, "B"]]:
    """The prompts without their last tokens, padded on the left; these; and where each begins.

    Prompts of one token fill up the batch.
    """
    prompts = [*prompts, *[prompts[0][:1]] * (batch - len(prompts))]
    last = np.array([prompt[-1] for prompt in prompts], np.int32)
    lengths = np.array([len(prompt) - 1 for prompt in prompts], np.int32)
    P = power_of_two(max(map(len, prompts)) - 1, largest)
    tokens = np.zeros((len(prompts), P), np.int32)
    for b, prompt in enumerate(prompts):
        tokens[b, P - lengths[b] :] = prompt[:-1]
    return tokens, last, P - lengths


class TextStream:
    """Turns ids into text as they come.

    A token may end inside a character. Its bytes then wait for the rest of the character. Special
    tokens and those of `hidden` give no text.
    """

    def __init__(self, tokenizer: Tokenizer, hidden: Collection[int] = ()):
        self._tokenizer, self._hidden = tokenizer, hidden
        self._ids: list[int] = []  # since the last token that ended with a whole character
        self._printed = 0  # characters of these that were returned

    def push(self, token: int) -> str:
        """Returns the text that this token completes: often one word; empty inside a character."""
        if token in self._hidden:
            return ""
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


def _checked(
    config: ModelConfig, prompts: Sequence[Any], new: int | list[int], vocab_size: int
) -> tuple[list[np.ndarray], list[int]]:
    """The prompts, and how many tokens may follow each."""
    limits = new if isinstance(new, list) else [new] * len(prompts)
    _expect(len(prompts) > 0, "prompts", "none", "at least one")
    checked = [checked_ids(ids, vocab_size, f"prompt {i}") for i, ids in enumerate(prompts)]
    for i, (prompt, max_new_tokens) in enumerate(zip(checked, limits, strict=True)):
        is_number = isinstance(max_new_tokens, Integral) and max_new_tokens >= 1
        _expect(is_number, "max_new_tokens", max_new_tokens, "a whole number, 1 or more")
        fits = len(prompt) + max_new_tokens <= config.max_seq_len
        got = f"{len(prompt)} tokens and {max_new_tokens} new ones"
        most = f"at most {config.max_seq_len} together (model.max_seq_len)"
        _expect(fits, f"prompt {i}", got, f"{most}; shorten the prompt or generate less")
    return checked, limits


def _expect(holds: bool, name: str, got: object, expected: str) -> None:
    if not holds:
        raise UserError(f"{name}: got {got}, expected {expected}")
