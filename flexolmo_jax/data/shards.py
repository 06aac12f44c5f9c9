"""Shards of documents -> packed records, a shard after the other.

A shard is a run of whole files. The files and their sizes alone decide where one ends, and records
never hold documents of two shards. So the records are the same whoever prepares which shard.
"""

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from flexolmo_jax.config import Reading
from flexolmo_jax.data.documents import (
    AS_TEXT,
    Document,
    Tally,
    digest_of,
    documents_in,
    is_heldout,
)
from flexolmo_jax.data.records import SPLITS, InputFile, Split, SplitIndex
from flexolmo_jax.data.split_writer import SplitWriter
from flexolmo_jax.data.tokenized import Tokenized, tokenized
from flexolmo_jax.data.tokenizer import Tokenizer

SHARD = 1 << 30  # bytes of its files, as they are on disk; a longer file is a shard of its own
# a task has a chunk; the process that renders its conversations takes 0.1 s to start
_CHUNK_CHARACTERS = 1 << 20
_AROUND = 200  # of a message: what a template writes around it, and the work for it

Chunk = list[tuple[Split, Document]]


class Shard(NamedTuple):
    number: int
    files: list[Path]
    bytes: int


class Packed(NamedTuple):
    """What the records of some shards hold, and what they were made of."""

    splits: dict[Split, SplitIndex]
    inputs: list[InputFile]
    duplicates: int
    empty: int
    tally: Tally


def shards_of(files: Sequence[Path], sizes: Sequence[int]) -> list[Shard]:
    """The files in their order, as shards of at most SHARD bytes or one file."""
    shards: list[Shard] = []
    for file, size in zip(files, sizes, strict=True):
        if shards and shards[-1].bytes + size <= SHARD:
            last = shards[-1]
            last.files.append(file)
            shards[-1] = last._replace(bytes=last.bytes + size)
        else:
            shards.append(Shard(len(shards), [file], size))
    return shards


def is_blank(text: str) -> bool:
    """Whether there is nothing in a text to learn or to score: nothing at all, or white space."""
    return not text or text.isspace()


class Documents:
    """Documents without blank ones and repeated ones, each with its split.

    `is_new` says of a document's digest whether the document comes for the first time.
    """

    def __init__(self, heldout: float, is_new: Callable[[bytes], bool], reading: Reading = AS_TEXT):
        self.heldout, self._is_new, self._reading = heldout, is_new, reading
        self.tally = Tally()
        self.duplicates = 0
        self.empty = 0

    def read(
        self, files: Sequence[Path], advance: Callable[[int], object]
    ) -> Iterator[tuple[Split, Document]]:
        how = (advance, self._reading, self.tally)
        for document in (one for file in files for one in documents_in(file, *how)):
            digest = digest_of(document.text)
            if is_blank(document.text):
                self.empty += 1
            elif not self._is_new(digest):
                self.duplicates += 1
            else:
                yield ("heldout" if is_heldout(digest, self.heldout) else "train"), document


def pack(
    shards: Iterable[Shard],
    documents: Documents,
    writers: dict[Split, SplitWriter],
    tokenizer: Tokenizer,
    *,
    workers: int = 1,
    advance: Callable[[int], object] = lambda _: None,
) -> Packed:
    """Tokenizes and writes the documents of shards.

    Args:
        workers: threads that tokenize; the tokenizer releases Python's lock.
        advance: called with the number of bytes read since the last call.
    """
    inputs: list[InputFile] = []
    for shard in shards:
        chunks = _chunks(documents.read(shard.files, advance))
        for split, document in _tokenized(chunks, tokenizer, workers):
            writers[split].add(document)
        for writer in writers.values():
            writer.cut()
        inputs += [InputFile.of(file) for file in shard.files]
    splits: dict[Split, SplitIndex] = {split: writers[split].finish() for split in SPLITS}
    return Packed(splits, inputs, documents.duplicates, documents.empty, documents.tally)


@contextlib.contextmanager
def open_writers(
    directory: Path, tokenizer: Tokenizer, seq_len: int, *, bare: bool = False
) -> Iterator[dict[Split, SplitWriter]]:
    """A writer of each split's records in the directory; for `bare` see SplitWriter."""
    with contextlib.ExitStack() as stack:
        yield {
            split: stack.enter_context(SplitWriter(directory, split, tokenizer, seq_len, bare=bare))
            for split in SPLITS
        }


def _chunks(documents: Iterable[tuple[Split, Document]]) -> Iterator[Chunk]:
    """Documents in groups that are large enough to be worth a task in another thread."""
    chunk: Chunk = []
    characters = 0
    for split, document in documents:
        chunk.append((split, document))
        characters += len(document.text) + _AROUND * len(document.messages)
        if characters >= _CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def _tokenized(
    chunks: Iterable[Chunk], tokenizer: Tokenizer, workers: int
) -> Iterator[tuple[Split, Tokenized]]:
    """Every document, in order.

    At most about two chunks wait for each of the `workers` threads, which bounds the memory.
    """

    def tokenize(chunk: Chunk) -> list[tuple[Split, Tokenized]]:
        splits, documents = zip(*chunk, strict=True)
        return list(zip(splits, tokenized(documents, tokenizer), strict=True))

    pending: deque[Future[list[tuple[Split, Tokenized]]]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="tokenize")
    try:
        for chunk in chunks:
            pending.append(pool.submit(tokenize, chunk))
            if len(pending) > 2 * workers:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
