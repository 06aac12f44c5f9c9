"""A merged model and the ensembles it is compared with, as predictors of the next token.

Individual models, Branch-Train-Merge, prompt routing and soups (FlexOlmo, arXiv 2507.07024, section
4) differ in how they combine dense models: owners continued the anchor, all of its weights, on
their own text. How much a model counts at a token depends only on the tokens before it in its
document.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from flexolmo_jax.config import ModelConfig
from flexolmo_jax.data.records import Record, scored_targets
from flexolmo_jax.data.tokenizer import Tokenizer
from flexolmo_jax.kernels import Kernels
from flexolmo_jax.loaded import LoadedModel
from flexolmo_jax.model import Output, Params, forward
from flexolmo_jax.model.sizes import KEPT
from flexolmo_jax.runtime.sharding import put_whole_batch
from flexolmo_jax.train.losses import token_losses

# Prompt routing and weighted soups choose by this many tokens of a document. The paper chooses by
# prompts, which are shorter than its texts.
PROMPT = 32
TEMPERATURE = 1.0  # of posteriors; at 1 they are Bayes' rule


class Predictor(Protocol):
    """Anything that predicts text."""

    def losses(self, tokens: np.ndarray, segments: np.ndarray) -> np.ndarray:
        """float [B, T]: -ln p of each token, given those before it in its document.

        tokens, segments: int [B, T]; segments mark packed documents, 0 is padding. At a document's
        first token, and in padding, the figure means nothing.
        """
        ...


def bits_per_byte(
    predictor: Predictor, records: Iterable[Record], tokenizer: Tokenizer, batch_size: int = 16
) -> float:
    """Bits per byte of the scored tokens: all of a document but its first in each record, no EOS.

    Raises ValueError if no token is scored.
    """
    bits, n_bytes = 0.0, 0
    records = list(records)
    for start in range(0, len(records), batch_size):
        batch = records[start : start + batch_size]
        tokens, segments = (np.stack([one[key] for one in batch]) for key in ("tokens", "segments"))
        scored = scored_targets(tokens, segments, tokenizer.eos_id)
        nats = float(predictor.losses(tokens, segments)[scored].sum(dtype=np.float64))
        bits += nats / math.log(2)
        n_bytes += int(tokenizer.byte_lengths[tokens[scored]].sum())
    if not n_bytes:
        raise ValueError("there is no text to score")
    return bits / n_bytes


class OfModel:
    """A run, anchor or model; a merged one also without experts, or with another `active`."""

    def __init__(self, model: LoadedModel, without: Sequence[str] = (), active: int | None = None):
        self._model = model
        active, self._allowed = model.selection(without, active)
        self._how = model.config, active, model.mesh, model.kernels

    def losses(self, tokens: np.ndarray, segments: np.ndarray) -> np.ndarray:
        self._model.check_batch(len(tokens))
        batch = [put_whole_batch(self._model.mesh, array) for array in (tokens, segments)]
        run = _losses(*self._how, tokens.shape)
        return np.asarray(run(self._model.params, *batch, self._allowed))


class Remembered:
    """A predictor that several ensembles share: each batch is run once."""

    def __init__(self, predictor: Predictor):
        self._predictor = predictor
        self._known: dict[bytes, np.ndarray] = {}

    def losses(self, tokens: np.ndarray, segments: np.ndarray) -> np.ndarray:
        key = np.asarray(tokens, np.int64).tobytes() + np.asarray(segments, np.int64).tobytes()
        if key not in self._known:
            self._known[key] = self._predictor.losses(tokens, segments)
        return self._known[key]


class BranchTrainMerge:
    """A mixture of the models' next-token distributions.

    A model's share is softmax(-loss / temperature) of its loss on the document so far. All models
    take part, or at every token the `top` best (Li et al., arXiv 2208.03306; Gururangan et al.,
    2303.14177). With `switch`, each token may be of another model than the one before it, with this
    probability: what lies far back counts less (Herbster and Warmuth, 1998: fixed share).
    """

    def __init__(
        self,
        models: Sequence[Predictor],
        top: int | None = None,
        temperature: float = TEMPERATURE,
        switch: float = 0.0,
    ):
        if not 1 <= (top or 1) <= len(models) or temperature <= 0 or not 0 <= switch < 1:
            raise ValueError(
                f"top is {top}, temperature {temperature} and switch {switch}; expected 1 to"
                f" {len(models)}, the number of models, above 0, and 0 to below 1"
            )
        self._models, self._top = models, top or len(models)
        self._temperature, self._switch = temperature, switch

    def losses(self, tokens: np.ndarray, segments: np.ndarray) -> np.ndarray:
        each = _stacked_losses(self._models, tokens, segments).astype(np.float64)
        if self._switch:
            logits = _switched(each / self._temperature, segments, self._switch)
        else:
            logits = -_before(each, segments) / self._temperature
        # of equal ones, as at a document's start, the first models
        order = np.argsort(-logits, axis=0, kind="stable")
        ranks = np.argsort(order, axis=0, kind="stable")
        logits[ranks >= self._top] = -np.inf
        return _log_sum_exp(logits) - _log_sum_exp(logits - each)


class PromptRouting:
    """Each document goes to one model, which a classifier chooses by the document's first tokens.

    These first tokens are predicted by the first model. `classify`: token ids of a prompt -> the
    index of a model.
    """

    def __init__(
        self,
        models: Sequence[Predictor],
        classify: Callable[[Sequence[int]], int],
        prompt: int = PROMPT,
    ):
        self._models, self._classify, self._prompt = models, classify, prompt

    def losses(self, tokens: np.ndarray, segments: np.ndarray) -> np.ndarray:
        each = _stacked_losses(self._models, tokens, segments)
        result = each[0].copy()
        for record, start, end in _documents(segments):
            first = start + self._prompt
            if end > first:
                chosen = self._classify(tokens[record, start:first].tolist())
                result[record, first:end] = each[chosen, record, first:end]
        return result


class Soup:
    """One model whose parameters are the models' average: uniform, or by `shares` that sum to 1."""

    def __init__(self, models: Sequence[LoadedModel], shares: Sequence[float] | None = None):
        uniform = [1 / len(models)] * len(models)
        each = np.asarray(uniform if shares is None else shares, np.float32)
        self._params = jax.tree.map(
            lambda *leaves: _average(each, leaves), *(model.params for model in models)
        )
        first = models[0]
        self._how = first.config, first.config.n_active, None, first.kernels

    def losses(self, tokens: np.ndarray, segments: np.ndarray) -> np.ndarray:
        run = _losses(*self._how, tokens.shape)
        return np.asarray(run(self._params, tokens, segments, None))


class WeightedSoup:
    """A soup for each document: shares are softmax(-loss / temperature) on its first tokens.

    These first tokens are predicted by the uniform soup.
    """

    def __init__(
        self, models: Sequence[LoadedModel], prompt: int = PROMPT, temperature: float = TEMPERATURE
    ):
        self._uniform = Soup(models)
        self._each = [Remembered(OfModel(model)) for model in models]
        self._stacked = jax.tree.map(
            lambda *leaves: jnp.stack([leaf.astype(jnp.float32) for leaf in leaves]),
            *(m.params for m in models),
        )
        self._prompt, self._temperature = prompt, temperature
        self._config = models[0].config

    def losses(self, tokens: np.ndarray, segments: np.ndarray) -> np.ndarray:
        result = np.array(self._uniform.losses(tokens, segments))
        each = _stacked_losses(self._each, tokens, segments).astype(np.float64)
        logits = -_before(each, segments) / self._temperature
        positions = np.arange(tokens.shape[1])
        for record, start, end in _documents(segments):
            first = start + self._prompt
            if end > first:
                of_models = logits[:, record, first]
                shares = np.exp(of_models - _log_sum_exp(of_models)).astype(np.float32)
                own = ((positions >= start) & (positions < end))[None].astype(np.int32)
                run = _soups(self._config, own.shape)
                losses = run(self._stacked, shares, tokens[record : record + 1], own)
                result[record, first:end] = np.asarray(losses)[0, first:end]
        return result


class Document(NamedTuple):
    """A document in a record: where its tokens start and end."""

    record: int  # in the batch
    start: int
    end: int


@functools.lru_cache(KEPT)
def _losses(
    config: ModelConfig, active: int, mesh: Mesh | None, kernels: Kernels, shape: tuple[int, ...]
) -> Callable[..., jax.Array]:
    """For batches of this shape: a function of its own, which goes with its program."""

    @jax.jit
    def losses(params: Params, tokens: jax.Array, segments: jax.Array, allowed: Any) -> jax.Array:
        how: dict[str, Any] = {"active": active, "mesh": mesh, "kernels": kernels}
        output = forward(config, params, tokens, segments, allowed=allowed, **how)
        return _own_losses(output, tokens, mesh)

    return losses


@functools.lru_cache(KEPT)
def _soups(config: ModelConfig, shape: tuple[int, ...]) -> Callable[..., jax.Array]:
    """For one record of this shape, as `_losses`."""

    @jax.jit
    def losses(
        stacked: Params, shares: jax.Array, tokens: jax.Array, segments: jax.Array
    ) -> jax.Array:
        params = jax.tree.map(lambda a: jnp.tensordot(shares, a, axes=1), stacked)
        return _own_losses(forward(config, params, tokens, segments), tokens)

    return losses


def _own_losses(output: Output, tokens: jax.Array, mesh: Mesh | None = None) -> jax.Array:
    """[B, T]: what each token cost where it was the next one, which is one place earlier."""
    return jnp.roll(token_losses(output.hidden, output.head, tokens, mesh)[0], 1, axis=1)


def _stacked_losses(
    predictors: Sequence[Predictor], tokens: np.ndarray, segments: np.ndarray
) -> np.ndarray:
    """[M, B, T]"""
    return np.stack([predictor.losses(tokens, segments) for predictor in predictors])


def _average(shares: np.ndarray, leaves: Sequence[jax.Array]) -> jax.Array:
    return functools.reduce(
        jnp.add,
        (share * leaf.astype(jnp.float32) for share, leaf in zip(shares, leaves, strict=True)),
    )


def _documents(segments: np.ndarray) -> list[Document]:
    found = []
    for record, own in enumerate(segments):
        edges = np.flatnonzero(np.diff(own, prepend=-1, append=-1))
        parts = itertools.pairwise(edges.tolist())
        found += [Document(record, start, end) for start, end in parts if own[start] > 0]
    return found


def _before(losses: np.ndarray, segments: np.ndarray) -> np.ndarray:
    """[M, B, T] -> [M, B, T]: at each token, the sum of losses on those before it in its document.

    A document's first token has no loss.
    """
    sums = np.zeros_like(losses)
    for record, start, end in _documents(segments):
        own = losses[:, record, start + 1 : end - 1]
        sums[:, record, start + 2 : end] = np.cumsum(own, axis=-1)
    return sums


def _switched(losses: np.ndarray, segments: np.ndarray, switch: float) -> np.ndarray:
    """[M, B, T] -> [M, B, T]: at each token, the log of every model's share after those before it
    in its document, where each may be of another model than the one before it."""
    logits = np.zeros_like(losses)
    for record, start, end in _documents(segments):
        shares = np.full(len(losses), 1 / len(losses))
        for place in range(start + 2, end):  # a document's first token has no loss
            own = losses[:, record, place - 1]
            shares = shares * np.exp(own.min() - own)
            shares = (1 - switch) * shares / shares.sum() + switch / len(shares)
            logits[:, record, place] = np.log(shares)
    return logits


def _log_sum_exp(logits: np.ndarray) -> np.ndarray:
    most = logits.max(axis=0)
    return most + np.log(np.exp(logits - most).sum(axis=0))
