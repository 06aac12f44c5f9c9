"""Bits per byte and routing on prepared records, in the training loop and outside of it.

Bits per byte = sum of -log2 p over scored tokens / UTF-8 bytes of exactly those tokens. Every token
of a document is scored, except the first of each record that it spans; EOS and padding are not. Of
conversations, "assistant" as the `loss` scores only what the assistant says. A byte that the
vocabulary cannot spell adds a byte and 8 bits. What a tokenizer makes shorter or longer, as by NFC,
counts with the bytes of the documents themselves.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from flexolmo_jax.config import Loss, ModelConfig
from flexolmo_jax.data.arrays import read_records
from flexolmo_jax.data.documents import name_of
from flexolmo_jax.data.ids import checked_ids
from flexolmo_jax.data.records import left_out, scored_targets
from flexolmo_jax.data.sample import sample_of, tell_part
from flexolmo_jax.data.tokenizer import LOST_BITS, Tokenizer
from flexolmo_jax.data.tokens import Source
from flexolmo_jax.errors import UserError
from flexolmo_jax.kernels import Kernels
from flexolmo_jax.model import Params, forward
from flexolmo_jax.model.sizes import KEPT
from flexolmo_jax.runtime.sharding import batch_over, put_whole_batch, replicated
from flexolmo_jax.storage.paths import in_bucket

from .losses import predicts, token_losses

BATCH_SIZE = 16  # records
# (tokens, segments, scored), each [B, T], -> nats of each record [B], sums of routing shares [L, E]
Scorer = Callable[[Any, Any, Any], tuple[jax.Array, jax.Array]]


@dataclass(frozen=True)
class Score:
    """How a model does on one set of records."""

    by_record: np.ndarray  # [R, 2]: bits, and bytes of the scored tokens, of each record
    tokens: int
    # UTF-8 bytes that the vocabulary cannot spell: which records lack them is not known
    lost_bytes: int
    # how many bytes more the documents have than their tokens spell, as with NFC
    changed_bytes: int
    # [L, E]: each expert's share of the probability of those chosen, averaged over scored tokens
    routing: np.ndarray

    @property
    def bits(self) -> float:
        return float(self.by_record[:, 0].sum()) + LOST_BITS * self.lost_bytes

    @property
    def bytes(self) -> int:
        return int(self.by_record[:, 1].sum()) + self.lost_bytes + self.changed_bytes

    @property
    def bits_per_byte(self) -> float:
        return self.bits / self.bytes


@functools.lru_cache(KEPT)
def make_scorer(
    config: ModelConfig,
    active: int | None = None,
    dtype: str = "float32",
    mesh: Mesh | None = None,
    kernels: Kernels = "auto",
) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """The jitted (params, tokens, segments, scored, allowed=None) -> sums: a `Scorer` once it is
    given the parameters."""

    @jax.jit
    def score(
        params: Params,
        tokens: jax.Array,
        segments: jax.Array,
        scored: jax.Array,
        allowed: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        output = forward(
            config,
            params,
            tokens,
            segments,
            active=active,
            allowed=allowed,
            dtype=dtype,
            mesh=mesh,
            kernels=kernels,
        )
        losses, _ = token_losses(output.hidden, output.head, tokens, mesh)
        counted = predicts(scored).astype(jnp.float32)
        p = output.router.probabilities
        shares = p / jnp.sum(p, axis=-1, keepdims=True)
        sums = jnp.sum(losses * counted, axis=1), jnp.einsum("lbte,bt->le", shares, counted)
        # every process reads them
        return sums if mesh is None else jax.lax.with_sharding_constraint(sums, replicated(mesh))

    return score


def score_records(  # noqa: PLR0913 - a model, records, and how they are read
    score: Scorer,
    records: Source,
    tokenizer: Tokenizer,
    *,
    loss: Loss = "all",
    batch_size: int = BATCH_SIZE,
    limit: int | None = None,
    advance: Callable[[int], None] = lambda n: None,
) -> Score:
    """Scores records, of which `advance` is told as it goes: all, or a sample of at most `limit`
    (data/sample.py), of which a line tells.

    Raises UserError where the records were made with another tokenizer or hold nothing that can be
    scored.
    """
    check_tokenizer(records, tokenizer)
    chosen = sample_of(len(records), limit)
    tell_part(len(chosen), len(records), name_of(records.path))
    by_record, n_tokens, routing = [np.zeros((0, 2))], 0, np.zeros(())
    for start in range(0, len(chosen), batch_size):
        places = chosen[start : start + batch_size]
        batch = list(read_records(records.__getitem__, places, at_once=in_bucket(records.path)))
        whole = {key: _stack([record[key] for record in batch], batch_size) for key in batch[0]}
        segments = whole["segments"]
        tokens = checked_ids(whole["tokens"], tokenizer.vocab_size, str(records.path), ndim=2)
        scored = scored_targets(tokens, segments, tokenizer.eos_id, left_out(whole, loss))
        nats, shares = score(tokens, segments, scored)
        routing = routing + np.asarray(shares, np.float64)
        n_tokens += int(scored.sum())
        n_bytes = (tokenizer.byte_lengths[tokens] * scored).sum(axis=1)
        bits = np.asarray(nats, np.float64) / math.log(2)
        by_record.append(np.stack([bits, n_bytes], axis=1)[: len(batch)])
        advance(len(batch))
    figures = np.concatenate(by_record)
    if not figures[:, 1].any():
        raise UserError(
            f"{records.path} has no held-out text to score; give more documents, prepare them with"
            " a larger --heldout share, or score all of them (`eval --split all`)"
        )
    lost, changed = records.lost_bytes, records.changed_bytes
    if loss == "assistant":
        lost, changed = lost - records.lost_in_context, changed - records.changed_in_context
    # a part of the records has its share
    lost, changed = (round(n * len(chosen) / len(records)) for n in (lost, changed))
    return Score(figures, n_tokens, lost, changed, routing / n_tokens)


def score_model(  # noqa: PLR0913 - a model, records, and how they are read
    config: ModelConfig,
    params: Params,
    records: Source,
    tokenizer: Tokenizer,
    *,
    loss: Loss = "all",
    mesh: Mesh | None = None,
    limit: int | None = None,
) -> Score:
    """Scores records, as `score_records` does, by a model whose parameters lie on this mesh, with
    every weight in its own dtype and computing in float32.

    A batch has 16 records, or `limit` if that is less, or more where the mesh needs more to be
    divided evenly.
    """
    scorer = make_scorer(config, mesh=mesh)

    def score(*batch: np.ndarray) -> tuple[jax.Array, jax.Array]:
        return scorer(params, *(put_whole_batch(mesh, array) for array in batch))

    size = batch_over(mesh, min(BATCH_SIZE, limit or BATCH_SIZE))
    return score_records(score, records, tokenizer, loss=loss, batch_size=size, limit=limit)


def check_tokenizer(records: Source, tokenizer: Tokenizer) -> None:
    """Raises UserError where the records were prepared with another tokenizer."""
    if records.tokenizer_digest != tokenizer.text_digest:
        raise UserError(
            f"{records.path} was prepared with tokenizer {records.tokenizer_digest[:12]}; the model"
            f" has {tokenizer.text_digest[:12]}; prepare the documents with the model's tokenizer"
            " (--tokenizer MODEL)"
        )


def _stack(arrays: list[np.ndarray], size: int) -> np.ndarray:
    """A batch of one size, the last too, so that one compiled program serves all: padding fills
    it up."""
    stacked = np.zeros((size, *arrays[0].shape), arrays[0].dtype)
    stacked[: len(arrays)] = arrays
    return stacked
