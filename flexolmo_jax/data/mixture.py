"""Batches from weighted sources of records, as a pure function of (seed, step): the state of the
data is one integer.

Each source is shuffled anew every epoch and repeated for ever; Grain interleaves the sources in the
proportion of their weights into one endless sequence, and batch s is its elements [s B, (s + 1) B).
A process takes those of them that its devices need, by position, so any number of processes sees
the same global batches, and a resumed run needs nothing but its step.
"""

import itertools
import math
import sys
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import cast

import grain
import numpy as np

from flexolmo_jax.data.arrays import read_records
from flexolmo_jax.data.records import Record
from flexolmo_jax.data.tokens import Source
from flexolmo_jax.errors import UserError
from flexolmo_jax.storage.paths import in_bucket

_FEW = 1 << 16


class Batches:
    """The endless sequence of batches of a mixture; see `mixture`."""

    def __init__(
        self,
        records: grain.MapDataset[Record],
        batch_size: int,
        seq_len: int,
        at_once: bool = False,
    ):
        self.batch_size = batch_size
        self.seq_len = seq_len
        self._records, self._at_once = records, at_once

    def at(self, step: int, rows: Sequence[int] | None = None) -> Record:
        """The batch of a step, or only these rows of it, which are what one of several processes
        needs.

        "tokens" and "segments": int32 [rows, T]; "source": int32 [rows], the place in the mixture
        of the source of each record.
        """
        rows = range(self.batch_size) if rows is None else rows
        # none is None: nothing is filtered
        get = cast(Callable[[int], Record], self._records.__getitem__)
        records = list(
            read_records(get, [step * self.batch_size + row for row in rows], at_once=self._at_once)
        )
        return {
            key: np.stack([record[key] for record in records])
            for key in ("tokens", "segments", "source")
        }

    def iterate(
        self, start_step: int = 0, rows: Sequence[int] | None = None, prefetch: int = 2
    ) -> Generator[Record]:
        """Yields `at(start_step)`, `at(start_step + 1)`, ... for ever, read ahead by `prefetch`
        batches in one background thread.

        An error in that thread is raised here. The thread ends when the iterator is closed
        (`.close()`) or garbage.
        """
        reader = ThreadPoolExecutor(1, thread_name_prefix="batches")
        try:
            ahead = deque(reader.submit(self.at, start_step + i, rows) for i in range(prefetch))
            for step in itertools.count(start_step + prefetch):
                ahead.append(reader.submit(self.at, step, rows))
                yield ahead.popleft().result()
        finally:
            reader.shutdown(wait=True, cancel_futures=True)


def mixture(sources: Sequence[tuple[Source, float]], batch_size: int, seed: int) -> Batches:
    """Batches in which sources appear in the proportion of their weights (which need not add up to
    one).

    Raises UserError where there is no source, one has no records or no positive weight, sources
    disagree in sequence length or tokenizer, or all of them together have fewer records than one
    batch.
    """
    _check(sources, batch_size, seed)
    shuffled = [
        _shuffled_for_ever(records, (seed, i)).map(_Labelled(i))
        for i, (records, _) in enumerate(sources)
    ]
    mixed = (
        grain.MapDataset.mix(shuffled, weights=[weight for _, weight in sources])
        if len(shuffled) > 1
        else shuffled[0]
    )
    return Batches(
        mixed,
        batch_size,
        sources[0][0].seq_len,
        at_once=any(in_bucket(records.path) for records, _ in sources),
    )


def _shuffled_for_ever(records: Source, seed: tuple[int, int]) -> grain.MapDataset[Record]:
    """All records, then all again in another order, and so on. A source's place is part of its
    seed: a corpus named twice comes in two orders."""
    if len(records) < _FEW:
        return grain.MapDataset.source(_FewShuffled(records, seed))
    source_seed = int(np.random.SeedSequence(seed).generate_state(1)[0])
    return grain.MapDataset.source(records).seed(source_seed).shuffle().repeat()


class _Labelled:
    """Adds a record's source to it."""

    def __init__(self, source: int):
        self._source = np.array(source, np.int32)

    def __call__(self, record: Record) -> Record:
        return record | {"source": self._source}


class _FewShuffled:
    """What Grain's shuffle and repeat do, for few records: its index shuffle then rejects most of
    what it draws (0.8 ms a record at 37 records, 0.02 ms from 20 thousand on), while a permutation
    of each epoch costs next to nothing."""

    def __init__(self, records: Source, seed: tuple[int, int]):
        self._records = records
        self._order = lru_cache(2)(
            lambda epoch: np.random.default_rng((*seed, epoch)).permutation(len(records))
        )

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> Record:
        epoch, place = divmod(index, len(self._records))
        return self._records[int(self._order(epoch)[place])]


def _check(sources: Sequence[tuple[Source, float]], batch_size: int, seed: int) -> None:
    if not sources:
        raise UserError("got no data: expected at least one source of records")
    if batch_size < 1:
        raise UserError(f"got a batch size of {batch_size}, expected 1 or more")
    if seed < 0:
        raise UserError(f"got seed {seed}, expected 0 or more")
    first = sources[0][0]
    for records, weight in sources:
        if not (weight > 0 and math.isfinite(weight)):
            raise UserError(
                f"{records.path} has weight {weight}, expected more than 0: leave out what should"
                " not be used"
            )
        if len(records) == 0:
            raise UserError(
                f"{records.path} has no {records.split} records: give it more documents or another"
                " held-out share"
            )
        if records.seq_len != first.seq_len:
            raise UserError(
                f"{records.path} has records of {records.seq_len} tokens, {first.path} of"
                f" {first.seq_len}: prepare both alike"
            )
        if records.tokenizer_digest != first.tokenizer_digest:
            raise UserError(
                f"{records.path} and {first.path} were prepared with different tokenizers: prepare"
                " both with one"
            )
    total = sum(len(records) for records, _ in sources)
    if total < batch_size:
        raise UserError(
            f"the corpus is smaller than a batch: {total} records for batches of {batch_size}; add"
            " documents or take smaller ones"
        )
