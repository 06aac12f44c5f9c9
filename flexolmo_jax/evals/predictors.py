"""Models and the ensembles that a merged model is compared with, behind one interface: what each
says of every next token.

Individual models, Branch-Train-Merge, prompt routing and soups (FlexOlmo, arXiv 2507.07024, section
4) differ in how they combine dense models that owners trained further, all weights, on their own
text. Whatever they weigh these models by at a token, they know it from what stands before that
token in its document, never from the token itself or what comes later.
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
from flexolmo_jax.loaded import LoadedModel
from flexolmo_jax.model import Params, forward
from flexolmo_jax.runtime.sharding import put_batch
from flexolmo_jax.train.losses import token_losses

# tokens of a document by which prompt routing and weighted soups choose; the paper's prompts are
# shorter than its texts
PROMPT = 32
TEMPERATURE = 1.0  # of posteriors; at 1 they are Bayes' rule


class Predictor(Protocol):
    """Anything that predicts text."""

    def losses(self, tokens: np.ndarray, segments: np.ndarray) -> np.ndarray:
        """int [B, T] twice (segments mark packed documents, 0 is padding) -> float [B, T]: -ln p of
        each token, given what stands before it in its document. At a document's first token, and in
        padding, the figure means nothing.
        """
        ...


def bits_per_byte(
    predictor: Predictor, records: Iterable[Record], tokenizer: Tokenizer, batch_size: int = 16
) -> float:
    """Bits per byte of the scored tokens: all of a document but its first in each record, no EOS.
    Raises ValueError where there is none."""
    bits, n_bytes = 0.0, 0
    rows = list(records)
    for start in range(0, len(rows), batch_size):
        tokens, segments = (
            np.stack([row[key] for row in rows[start : start + batch_size]])
            for key in ("tokens", "segments")
        )
        scored = scored_targets(tokens, segments, tokenizer.eos_id)
        bits += float(predictor.losses(tokens, segments)[scored].sum(dtype=np.float64)) / math.log(
            2
        )
        n_bytes += int(tokenizer.byte_lengths[tokens[scored]].sum())
    if not n_bytes:
        raise ValueError("there is no text to score")
    return bits / n_bytes


class OfModel:
    """A run, anchor or model; of a merged one perhaps without some experts, or with another number
    active."""

    def __init__(self, model: LoadedModel, without: Sequence[str] = (), active: int | None = None):
        self._model = model
        active, self._allowed = model.selection(without, active)
        self._run = _losses(model.config, active, model.mesh)

    def losses(self, tokens: np.ndarray, segments: np.ndarray) -> np.ndarray:
        self._model.check_batch(len(tokens))
        mesh = self._model.mesh
        batch = [
            a if mesh is None else put_batch(mesh, range(len(a)), len(a), a)
            for a in (tokens, segments)
        ]
        return np.asarray(self._run(self._model.params, *batch, self._allowed))


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
    """A mixture of the models' next-token distributions, weighed by softmax(-loss / temperature),
    where a model's loss is what it lost on the document so far; of all models, or at every token
    the `top` best (Li et al., arXiv 2208.03306; Gururangan et al., 2303.14177).
    """

    def __init__(
        self, models: Sequence[Predictor], top: int | None = None, temperature: float = TEMPERATURE
    ):
        if not 1 <= (top or 1) <= len(models) or temperature <= 0:
            raise ValueError(
                f"top is {top} and temperature {temperature}; expected 1 to {len(models)}, the"
                " number of models, and above 0"
            )
        self._models, self._top, self._temperature = models, top or len(models), temperature

    def losses(self, tokens: np.ndarray, segments: np.ndarray) -> np.ndarray:
        each = np.stack([model.losses(tokens, segments) for model in self._models]).astype(
            np.float64
        )
        logits = -_before(each, segments) / self._temperature
        # equal ones, as at a document's start: the first models
        order = np.argsort(-logits, axis=0, kind="stable")
        ranks = np.argsort(order, axis=0, kind="stable")
        logits[ranks >= self._top] = -np.inf
        return _log_sum_exp(logits) - _log_sum_exp(logits - each)


class PromptRouting:
    """Each document goes to one model, which a classifier chooses by its first tokens; these
    themselves are the first model's.

    `classify`: token ids of a prompt -> the index of a model.
    """

    def __init__(
        self,
        models: Sequence[Predictor],
        classify: Callable[[Sequence[int]], int],
        prompt: int = PROMPT,
    ):
        self._models, self._classify, self._prompt = models, classify, prompt

    def losses(self, tokens: np.ndarray, segments: np.ndarray) -> np.ndarray:
        each = np.stack([model.losses(tokens, segments) for model in self._models])
        result = each[0].copy()
        for row, start, end in _documents(segments):
            if end - start > self._prompt:
                chosen = self._classify(tokens[row, start : start + self._prompt].tolist())
                result[row, start + self._prompt : end] = each[
                    chosen, row, start + self._prompt : end
                ]
        return result


class Soup:
    """One model whose parameters are the models' average; all alike, or `weights`, which sum to
    1."""

    def __init__(self, models: Sequence[LoadedModel], weights: Sequence[float] | None = None):
        shares = np.asarray(
            [1 / len(models)] * len(models) if weights is None else weights, np.float32
        )
        self._params = jax.tree.map(
            lambda *leaves: _average(shares, leaves), *(model.params for model in models)
        )
        self._run = _losses(models[0].config, models[0].config.n_active)

    def losses(self, tokens: np.ndarray, segments: np.ndarray) -> np.ndarray:
        return np.asarray(self._run(self._params, tokens, segments, None))


class WeightedSoup:
    """A soup for each document, whose weights are softmax(-loss / temperature) over the models'
    losses on the document's first tokens; these themselves are the uniform soup's.
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
        self._run = _soups(models[0].config)

    def losses(self, tokens: np.ndarray, segments: np.ndarray) -> np.ndarray:
        result = np.array(self._uniform.losses(tokens, segments))
        each = np.stack([model.losses(tokens, segments) for model in self._each]).astype(np.float64)
        known = -_before(each, segments) / self._temperature
        for row, start, end in _documents(segments):
            first = start + self._prompt
            if end > first:
                weights = np.exp(known[:, row, first] - _log_sum_exp(known[:, row, first]))
                own = (np.arange(tokens.shape[1]) >= start) & (np.arange(tokens.shape[1]) < end)
                losses = self._run(
                    self._stacked,
                    weights.astype(np.float32),
                    tokens[row : row + 1],
                    own[None].astype(np.int32),
                )
                result[row, first:end] = np.asarray(losses)[0, first:end]
        return result


class Document(NamedTuple):
    """A document in a record: where its tokens start and end."""

    row: int
    start: int
    end: int


@functools.lru_cache
def _losses(config: ModelConfig, active: int, mesh: Mesh | None = None) -> Callable[..., jax.Array]:
    @jax.jit
    def losses(params: Params, tokens: jax.Array, segments: jax.Array, allowed: Any) -> jax.Array:
        return _next_token_losses(config, params, tokens, segments, active, allowed, mesh)

    return losses


@functools.lru_cache
def _soups(config: ModelConfig) -> Callable[..., jax.Array]:
    @jax.jit
    def losses(
        stacked: Params, weights: jax.Array, tokens: jax.Array, segments: jax.Array
    ) -> jax.Array:
        params = jax.tree.map(lambda a: jnp.tensordot(weights, a, axes=1), stacked)
        return _next_token_losses(config, params, tokens, segments, config.n_active, None)

    return losses


def _next_token_losses(
    config: ModelConfig,
    params: Params,
    tokens: Any,
    segments: Any,
    active: int,
    allowed: Any,
    mesh: Mesh | None = None,
) -> jax.Array:
    output = forward(config, params, tokens, segments, active=active, allowed=allowed, mesh=mesh)
    return jnp.roll(token_losses(output.hidden, output.head, tokens, mesh)[0], 1, axis=1)


def _average(shares: np.ndarray, leaves: Sequence[jax.Array]) -> jax.Array:
    return functools.reduce(
        jnp.add,
        (share * leaf.astype(jnp.float32) for share, leaf in zip(shares, leaves, strict=True)),
    )


def _documents(segments: np.ndarray) -> list[Document]:
    found = []
    for row, of_row in enumerate(segments):
        edges = np.flatnonzero(np.diff(of_row, prepend=-1, append=-1))
        found += [
            Document(row, int(a), int(b)) for a, b in itertools.pairwise(edges) if of_row[a] > 0
        ]
    return found


def _before(losses: np.ndarray, segments: np.ndarray) -> np.ndarray:
    """[M, B, T] -> [M, B, T]: the sum of losses over the tokens before each in its document, of
    which the first has none."""
    sums = np.zeros_like(losses)
    for row, start, end in _documents(segments):
        sums[:, row, start + 2 : end] = np.cumsum(losses[:, row, start + 1 : end - 1], axis=-1)
    return sums


def _log_sum_exp(logits: np.ndarray) -> np.ndarray:
    most = logits.max(axis=0)
    return most + np.log(np.exp(logits - most).sum(axis=0))
