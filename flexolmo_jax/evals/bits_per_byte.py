"""`flexolmo eval`: bits per byte and routing shares of a run, anchor or model on held-out text."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from flexolmo_jax.config import Loss, Reading
from flexolmo_jax.data.documents import AS_TEXT, name_of
from flexolmo_jax.data.prepare import check_read, open_heldout
from flexolmo_jax.data.records import Part
from flexolmo_jax.data.sample import sample_of, tell_heldout
from flexolmo_jax.data.tokens import Source
from flexolmo_jax.errors import UserError
from flexolmo_jax.loaded import LoadedModel
from flexolmo_jax.runtime.progress import bar
from flexolmo_jax.runtime.sharding import put_whole_batch
from flexolmo_jax.storage.paths import takes_paths
from flexolmo_jax.train.evaluate import Score, make_scorer, score_records

# tokens of the records that raw documents are packed into, where nothing says what a model was
# trained on
RAW_SEQ_LEN = 1024
SHOWN = 8  # experts whose share of a data set is shown by name


@takes_paths
def evaluate(  # noqa: PLR0913 - the verb's options
    model: LoadedModel,
    data: Sequence[Path],
    *,
    without: Sequence[str] = (),
    active: int | None = None,
    split: Part = "heldout",
    limit: int | None = None,
    batch_size: int = 16,
    names: Sequence[str] | None = None,
    loss: Loss = "all",
    reading: Reading = AS_TEXT,
) -> dict[str, Any]:
    """Scores the held-out records of prepared directories and raw documents, all of token files. A
    line tells how many documents these are; split="all" scores every one.

    Returns {"bits_per_byte": {data: x}, "tokens": {data: n}, "bytes": {data: n}, "routing": {data:
    {expert: share}}, "routing_by_layer": {data: {expert: [share of each layer]}}, "by_record":
    {data: [[bits, bytes] of each record]}}. With `limit` only a sample of each data set's records
    is read (data/sample.py). `names`: the data's, instead of the files'. `reading`: how raw
    documents are read. `loss`: "assistant" scores of conversations only what the assistant says.
    Raises UserError where no data set holds any, and where nothing of one is held out.
    """
    k, allowed = model.selection(without, active)
    model.check_batch(batch_size)
    scorer = make_scorer(model.config, k, mesh=model.mesh, kernels=model.kernels)

    def score_batch(*batch: np.ndarray) -> tuple[jax.Array, jax.Array]:
        placed = (put_whole_batch(model.mesh, array) for array in batch)
        return scorer(model.params, *placed, allowed)

    keys = ("bits_per_byte", "tokens", "bytes", "routing", "routing_by_layer", "by_record")
    result: dict[str, Any] = {key: {} for key in keys}
    opened = _opened(model, data, names, split, reading)
    _check_loss(loss, opened)
    for name, records in opened.items():
        count = len(sample_of(len(records), limit))
        with bar(f"eval {name_of(records.path)}", count) as advance:
            score = score_records(
                score_batch,
                records,
                model.tokenizer,
                loss=loss,
                limit=limit,
                batch_size=batch_size,
                advance=advance,
            )
        for key, figure in _figures(score, model.experts).items():
            result[key][name] = figure
    return result


def _opened(
    model: LoadedModel,
    data: Sequence[Path],
    names: Sequence[str] | None,
    split: Part,
    reading: Reading,
) -> dict[str, Source]:
    """The records of each data set, by its name."""
    seq_len, opened = raw_seq_len(model), dict[str, Source]()
    names = names or [name_of(path) for path in data]
    if twice := [name for i, name in enumerate(names) if name in names[:i]]:
        raise UserError(f"two data sets are called {twice[0]!r}; rename one of them")
    for path, name in zip(data, names, strict=True):
        records = open_heldout(path, model.tokenizer, seq_len, split, reading)
        model.artifact.warn_of_length(records.seq_len, f"{path} has records")
        if split == "heldout":
            _check_heldout(path, records)
        opened[name] = records
    check_read(reading, opened.values(), "--text-key", "--separator")
    return opened


def raw_seq_len(model: LoadedModel) -> int:
    """Tokens of the records that raw documents are packed into; prepared ones have a length."""
    return model.artifact.trained_seq_len or min(RAW_SEQ_LEN, model.config.max_seq_len)


def _check_heldout(path: Path, records: Source) -> None:
    """Tells how many documents are scored. Raises UserError where none is held out."""
    if not len(records):
        raise UserError(
            f"{path}: none of its documents is held out; score all of them with --split all if the"
            " model has not learnt from them, or give more"
        )
    tell_heldout(records, path, "; `eval --split all` scores every one")


def _check_loss(loss: Loss, opened: dict[str, Source]) -> None:
    if loss == "assistant" and not any(records.conversations for records in opened.values()):
        raise UserError(
            f"--loss is assistant, and {', '.join(opened)} have no conversations; give documents"
            ' with "messages", or leave --loss out'
        )


def in_brief(result: dict[str, Any]) -> dict[str, Any]:
    """A result of `evaluate` for people: the largest shares of each data set."""
    largest = {name: _largest(shares) for name, shares in result["routing"].items()}
    brief = {key: figures for key, figures in result.items() if key != "by_record"}
    return brief | {"routing": largest, "routing_by_layer": "with every share: --json"}


def _largest(shares: dict[str, float]) -> dict[str, float]:
    ordered = sorted(shares.items(), key=lambda share: -share[1])
    rest = [share for _, share in ordered[SHOWN:]]
    return dict(ordered[:SHOWN]) | ({f"({len(rest)} more)": sum(rest)} if rest else {})


def _figures(score: Score, experts: Sequence[str]) -> dict[str, Any]:
    by_layer = dict(zip(experts, score.routing.T.tolist(), strict=True))
    return {
        "bits_per_byte": score.bits_per_byte,
        "tokens": score.tokens,
        "bytes": score.bytes,
        "routing": {expert: sum(shares) / len(shares) for expert, shares in by_layer.items()},
        "routing_by_layer": by_layer,
        "by_record": score.by_record.tolist(),
    }
