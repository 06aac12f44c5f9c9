"""Which of many are taken where a limit takes a part, and the line that says so.

Records lie in the order of their files, so the first ones are those of the first files. A sample is
spread evenly over all of them instead. It depends on the two numbers alone: neither on the size of
a batch nor on the number of processes. Nothing that is not taken is read.
"""

from collections.abc import Sequence
from pathlib import Path

from flexolmo_jax.data.records import Records
from flexolmo_jax.data.tokens import Source
from flexolmo_jax.runtime.progress import note_once


def sample_of(total: int, limit: int | None = None) -> Sequence[int]:
    """Places of at most `limit` (None: all) of `total` things, in order, evenly spread."""
    if limit is None or limit >= total:
        return range(total)
    return [i * total // limit for i in range(limit)]


def tell_heldout(records: Source, what: Path | str, more: str = "") -> None:
    """Says once, in a line, how many documents are scored, if it is not all."""
    if isinstance(records, Records):
        own = records.stats.documents
        total = sum(split.documents for split in records.index.splits.values())
        if own < total:
            note_once(f"{what}: {own:,} of {total:,} documents are scored, those held out{more}")


def tell_part(taken: int, total: int, what: str, things: str = "records") -> None:
    """Says once, in a line, that only a part of something is scored, if it is."""
    if taken < total:
        note_once(
            f"{what}: {taken:,} of {total:,} {things} are scored, a sample spread evenly over them"
        )
