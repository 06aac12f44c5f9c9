"""Bits per byte and routing on prepared records, in the training loop and outside of it.

Bits per byte = sum of -log2 p over scored tokens / UTF-8 bytes of exactly those tokens. Scored is
every token of a document but its first in each record it spans; EOS and padding are not.
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

from flexolmo_jax.config import ModelConfig
from flexolmo_jax.data.arrays import read_records
from flexolmo_jax.data.records import scored_targets
from flexolmo_jax.data.tokenizer import Tokenizer
from flexolmo_jax.data.tokens import Source
from flexolmo_jax.errors import UserError
from flexolmo_jax.model import Params, forward
from flexolmo_jax.runtime.sharding import replicated
from flexolmo_jax.storage.paths import in_bucket

from .losses import predicts, token_losses

Scorer = Callable[..., tuple[jax.Array, jax.Array]]


@dataclass(frozen=True)
class Score:
    """What a model does on one set of records."""

    bits: float
    tokens: int
    bytes: int
    # [L, E] share of the chosen experts' weight that each had, over scored tokens
    routing: np.ndarray

    @property
    def bits_per_byte(self) -> float:
        return self.bits / self.bytes


@functools.lru_cache
def make_scorer(
    config: ModelConfig, active: int | None = None, dtype: str = "float32", mesh: Mesh | None = None
) -> Scorer:
    """A jitted function from (params, tokens, segments, scored, allowed) to the sums of nats and of
    routing weights [L, E]."""

    @jax.jit
    def score(
        params: Params,
        tokens: jax.Array,
        segments: jax.Array,
        scored: jax.Array,
        allowed: jax.Array | None,
    ):
        output = forward(
            config, params, tokens, segments, active=active, allowed=allowed, dtype=dtype, mesh=mesh
        )
        losses, _ = token_losses(output.hidden, output.head, tokens, mesh)
        counted = predicts(scored).astype(jnp.float32)
        shares = output.router.weights / jnp.sum(output.router.weights, axis=-1, keepdims=True)
        sums = jnp.sum(losses * counted), jnp.einsum("lbte,bt->le", shares, counted)
        # every process reads them
        return sums if mesh is None else jax.lax.with_sharding_constraint(sums, replicated(mesh))

    return score


def score_records(
    scorer: Scorer,
    params: Params,
    records: Source,
    tokenizer: Tokenizer,
    *,
    allowed: np.ndarray | None = None,
    batch_size: int = 16,
    limit: int | None = None,
    put: Callable[[Any], Any] = jnp.asarray,
    advance: Callable[[int], None] = lambda n: None,
) -> Score:
    """Scores the first `limit` records (all by default). `put` places a batch on the devices.

    Raises UserError where the records were made with another tokenizer or hold nothing that can be
    scored.
    """
    check_tokenizer(records, tokenizer)
    count = min(len(records), limit or len(records))
    bits, n_tokens, n_bytes, routing = 0.0, 0, 0, np.zeros(())
    for start in range(0, count, batch_size):
        places = range(start, min(start + batch_size, count))
        rows = list(read_records(records.__getitem__, places, at_once=in_bucket(records.path)))
        # The last batch is filled up with padding, so that one compiled program serves all.
        tokens, segments = (
            _stack([row[key] for row in rows], batch_size) for key in ("tokens", "segments")
        )
        scored = scored_targets(tokens, segments, tokenizer.eos_id)
        nats, weights = scorer(params, put(tokens), put(segments), put(scored), allowed)
        bits += float(nats) / math.log(2)
        routing = routing + np.asarray(weights, np.float64)
        n_tokens += int(scored.sum())
        n_bytes += int(tokenizer.byte_lengths[tokens[scored]].sum())
        advance(len(rows))
    if n_bytes == 0:
        raise UserError(
            f"{records.path} has no held-out text to score; prepare more documents or a larger"
            " --heldout share"
        )
    return Score(bits, n_tokens, n_bytes, routing / n_tokens)


def check_tokenizer(records: Source, tokenizer: Tokenizer) -> None:
    """Raises UserError where the records were prepared with another tokenizer."""
    if records.tokenizer_digest != tokenizer.digest:
        raise UserError(
            f"{records.path} was prepared with tokenizer {records.tokenizer_digest[:12]}; the model"
            f" has {tokenizer.digest[:12]}; prepare the documents with the model's tokenizer"
        )


def _stack(rows: list[np.ndarray], size: int) -> np.ndarray:
    stacked = np.zeros((size, *rows[0].shape), rows[0].dtype)
    stacked[: len(rows)] = rows
    return stacked
