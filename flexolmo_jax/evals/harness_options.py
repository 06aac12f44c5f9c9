"""What a generation request of the harness asks for (`gen_kwargs`), and when its completion ends.

As the harness's own `hf` backend reads them, but for two things. All tokens may be sampled where
`top_k` is not given, of which transformers takes 50. What changes the completions and is not known
here is refused, as transformers does, and by name.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from flexolmo_jax.data.tokenizer import Tokenizer
from flexolmo_jax.errors import UserError
from flexolmo_jax.generate import Sampling, TextStream

NEW_TOKENS = 256  # that are generated, where a task does not say how many
# the first of these that is given counts
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
KNOWN = (*LENGTHS, "until", "do_sample", "temperature", "top_k", "top_p", "seed")
# they change nothing at these values, and tasks have them
NEUTRAL = {"num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1}


class Options(NamedTuple):
    """What requests have in common that are completed together. It can be hashed."""

    new: int  # tokens
    until: tuple[str, ...]  # texts that end a completion
    sampling: Sampling

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> "Options":
        """Raises UserError for what is not known or has an impossible value."""
        given = {key: value for key, value in given.items() if value is not None}
        others = {key: given[key] for key in given if key not in KNOWN}
        if unknown := [key for key in others if NEUTRAL.get(key) != others[key]]:
            raise UserError(
                f"gen_kwargs have {unknown[0]}={others[unknown[0]]!r:.40}; expected"
                f" {', '.join(KNOWN)}; leave it out"
            )
        until = given.get("until", [])
        until = [until] if isinstance(until, str) else until
        if not isinstance(until, Sequence) or not all(isinstance(text, str) for text in until):
            raise UserError(f"gen_kwargs have until={until!r:.40}; expected a text or a list")
        try:
            new = int(next((given[key] for key in LENGTHS if key in given), NEW_TOKENS))
            sampling = _sampling(given)
        except (TypeError, ValueError):
            raise UserError(f"gen_kwargs are {given!r:.200}; expected numbers") from None
        if new < 1:
            raise UserError(f"gen_kwargs ask for {new} tokens; expected 1 or more")
        sampling.check()
        return cls(new, tuple(filter(None, until)), sampling)


def _sampling(given: Mapping[str, Any]) -> Sampling:
    is_asked = given.get("do_sample")
    warmth = float(given.get("temperature", 1.0 if is_asked else 0.0))
    seed = int(given.get("seed", 0))
    if is_asked is not None and not is_asked:
        warmth = 0.0
    if not warmth:
        return Sampling(seed=seed)
    return Sampling(warmth, int(given.get("top_k", 0)), float(given.get("top_p", 1.0)), seed)


class Endings:
    """Follows a batch token by token, until each of its completions has ended.

    It ends at a token of `ends`, at its limit, or where its text has one of `until`, also across
    tokens.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        limits: Sequence[int],
        until: Collection[str],
        ends: Collection[int],
    ):
        self._limits, self._until, self._ends = limits, until, ends
        self._longest = max(map(len, until), default=0)
        self._streams = [TextStream(tokenizer) for _ in limits]
        self._tails = [""] * len(limits)  # the last characters, in which one of `until` may begin
        self._open = set(range(len(limits)))

    def __call__(self, step: int, ids: np.ndarray) -> bool:
        """Whether all have ended, given the tokens chosen at a step."""
        self._open = {b for b in self._open if not self._ends_at(step, b, int(ids[b]))}
        return not self._open

    def _ends_at(self, step: int, b: int, token: int) -> bool:
        if token in self._ends or step + 1 >= self._limits[b]:
            return True
        text = self._tails[b] + self._streams[b].push(token)
        self._tails[b] = text[-self._longest :]
        return any(stop in text for stop in self._until)
