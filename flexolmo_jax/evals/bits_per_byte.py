"""`flexolmo eval`: bits per byte and routing shares of a run, anchor or model on held-out text."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flexolmo_jax.data.documents import name_of
from flexolmo_jax.data.prepare import prepare_cached
from flexolmo_jax.data.records import Records, Split, open_records
from flexolmo_jax.errors import UserError
from flexolmo_jax.loaded import LoadedModel
from flexolmo_jax.progress import bar
from flexolmo_jax.train.evaluate import make_scorer, score_records

RAW_SEQ_LEN = 1024  # records that raw documents are packed into, where no prepared directory says otherwise


def evaluate(
    model: LoadedModel,
    data: Sequence[Path],
    *,
    without: Sequence[str] = (),
    active: int | None = None,
    split: Split = "heldout",
    limit: int | None = None,
    batch_size: int = 16,
) -> dict[str, Any]:
    """The held-out records of prepared directories or raw documents, scored.

    Returns {"bits_per_byte": {data: x}, "tokens": {data: n}, "bytes": {data: n}, "routing": {data: {expert: share}},
    "routing_by_layer": {data: {expert: [share of each layer]}}}; `limit` reads the first records of each only.
    """
    k, allowed = model.selection(without, active)
    scorer = make_scorer(model.config, k)
    result: dict[str, Any] = {"bits_per_byte": {}, "tokens": {}, "bytes": {}, "routing": {}, "routing_by_layer": {}}
    for path in data:
        records = open_heldout(path, model, split)
        name = name_of(path)
        if name in result["tokens"]:
            raise UserError(f"two data sets are called {name!r}; rename one of them")
        with bar(f"eval {name}", min(len(records), limit or len(records))) as advance:
            score = score_records(
                scorer,
                model.params,
                records,
                model.tokenizer,
                allowed=allowed,
                limit=limit,
                batch_size=batch_size,
                advance=advance,
            )
        result["bits_per_byte"][name] = score.bits_per_byte
        result["tokens"][name], result["bytes"][name] = score.tokens, score.bytes
        by_layer = dict(zip(model.experts, score.routing.T.tolist(), strict=True))
        result["routing_by_layer"][name] = by_layer
        result["routing"][name] = {expert: sum(shares) / len(shares) for expert, shares in by_layer.items()}
    return result


def open_heldout(path: Path, model: LoadedModel, split: Split = "heldout") -> Records:
    """Records of a prepared directory, or of raw documents, which are prepared into the cache."""
    if (path / "index.json").exists():
        return open_records(path, split)
    seq_len = min(RAW_SEQ_LEN, model.config.max_seq_len)
    return open_records(prepare_cached(path, model.tokenizer, seq_len), split)
