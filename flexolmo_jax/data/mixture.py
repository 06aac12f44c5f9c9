"""Batches from a mixture of sources of records, as a pure function of (seed, step).

Each source is shuffled again every epoch and repeated for ever. Grain interleaves the sources, in
proportion to their shares, into one endless sequence of records; batch s of B records is the
elements [s B, (s + 1) B). A process takes from each batch the records that its devices need, by
their places. So any number of processes sees the same global batches, and a run is resumed from its
step alone.
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
        sources: Sequence[Source] = (),
    ):
        self.batch_size = batch_size
        self.seq_len = seq_len
        self.sources = tuple(sources)
        self._records = records
        self._at_once = any(in_bucket(source.path) for source in sources)

    def at(self, step: int, places: Sequence[int] | None = None) -> Record:
        """The batch of a step, or only the n records at these places in it.

        "tokens" and "segments": int32 [n, T]; "context": bool [n, T], where a record has one;
        "source": int32 [n], the number of each record's source in the mixture.
        """
        places = range(self.batch_size) if places is None else places
        indices = [step * self.batch_size + place for place in places]
        # Grain's type allows None for records that are filtered out: here nothing is filtered
        get = cast(Callable[[int], Record], self._records.__getitem__)
        records = list(read_records(get, indices, at_once=self._at_once))
        no_context = np.zeros(self.seq_len, bool)
        keys = ("tokens", "segments", "context", "source")
        return {
            key: np.stack([record.get(key, no_context) for record in records])
            for key in keys
            if any(key in record for record in records)
        }

    def iterate(
        self, start_step: int = 0, places: Sequence[int] | None = None, prefetch: int = 2
    ) -> Generator[Record]:
        """Yields `at(start_step)`, `at(start_step + 1)`, ... for ever, `prefetch` batches ahead.

        One background thread reads ahead. An error in it is raised here. It ends when the iterator
        is closed (`.close()`) or collected.
        """
        reader = ThreadPoolExecutor(1, thread_name_prefix="batches")
        try:
            ahead = deque(reader.submit(self.at, start_step + i, places) for i in range(prefetch))
            for step in itertools.count(start_step + prefetch):
                ahead.append(reader.submit(self.at, step, places))
                yield ahead.popleft().result()
        finally:
            reader.shutdown(wait=True, cancel_futures=True)


def mixture(sources: Sequence[tuple[Source, float]], batch_size: int, seed: int) -> Batches:
    """Batches in which sources appear in proportion to their shares, whose sum is free.

    Raises UserError where there is no source, one has no records or no positive share, they differ
    in sequence length or tokenizer, or all of them together have fewer records than one batch.
    """
    _check(sources, batch_size, seed)
    shuffled = [
        _shuffled_for_ever(records, (seed, i)).map(_Labelled(i))
        for i, (records, _) in enumerate(sources)
    ]
    mixed = shuffled[0]
    if len(shuffled) > 1:
        mixed = grain.MapDataset.mix(shuffled, weights=[share for _, share in sources])
    return Batches(mixed, batch_size, sources[0][0].seq_len, [records for records, _ in sources])


def _shuffled_for_ever(records: Source, seed: tuple[int, int]) -> grain.MapDataset[Record]:
    """All records, then all again in another order, and so on.

    The seed includes the source's place in the mixture: a corpus named twice comes in two orders.
    """
    if len(records) < _FEW:
        return grain.MapDataset.source(_FewShuffled(records, seed))
    source_seed = int(np.random.SeedSequence(seed).generate_state(1)[0])
    return grain.MapDataset.source(records).seed(source_seed).shuffle().repeat()


class _Labelled:
    """Adds the number of its source to a record."""

    def __init__(self, source: int):
        self._source = np.array(source, np.int32)

    def __call__(self, record: Record) -> Record:
        return record | {"source": self._source}


class _FewShuffled:
    """Shuffle and repeat as Grain does, for few records.

    With few records Grain's index shuffle rejects most of what it draws: it takes 0.8 ms a record
    at 37 records, and 0.02 ms from 20 thousand on. A permutation of each epoch is almost free.
    """

    def __init__(self, records: Source, seed: tuple[int, int]):
        self._records = records

        def order(epoch: int) -> np.ndarray:
            return np.random.default_rng((*seed, epoch)).permutation(len(records))

        self._order = lru_cache(2)(order)

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
    for records, share in sources:
        if not (share > 0 and math.isfinite(share)):
            raise UserError(
                f"{records.path} has weight {share}, expected more than 0: leave out a source that"
                " should not be used"
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
