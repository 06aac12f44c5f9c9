"""Raw documents -> a prepared directory (data/records.py says what is in one).

Documents are read one by one. Empty ones and exact duplicates (SHA-256 of the text) are dropped.
The digest alone decides whether a document is held out, so it is on the same side in every corpus.
Tokens and EOS are packed into records (data/packing.py), which are written as soon as they are
complete. Memory holds the digests, the open records and a few chunks of text, never the corpus. The
files depend on the documents, their order and the arguments, never on the number of workers.
"""

import contextlib
import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from flexolmo_jax.config import LARGEST
from flexolmo_jax.data.documents import (
    HELDOUT,
    INDEX_FILE,
    digest_of,
    document_files,
    has_documents,
    is_heldout,
    name_of,
    read_documents,
)
from flexolmo_jax.data.records import (
    FORMAT,
    INPUTS,
    SPLITS,
    Index,
    InputFile,
    Split,
    SplitIndex,
    open_records,
    sha256_of,
    token_dtype,
)
from flexolmo_jax.data.split_writer import SplitWriter
from flexolmo_jax.data.tokenizer import Tokenizer
from flexolmo_jax.data.tokens import Source, TokenRecords, has_tokens
from flexolmo_jax.errors import UserError
from flexolmo_jax.runtime.progress import bar, note
from flexolmo_jax.storage.cache import CACHE_VARIABLE, cache_folder
from flexolmo_jax.storage.files import clear, make_folder, new_directory
from flexolmo_jax.storage.locks import locked
from flexolmo_jax.storage.outputs import UNFINISHED, is_whole
from flexolmo_jax.storage.paths import absolute, listing, path_of, reason, size_of

_CHUNK_CHARACTERS = 1 << 18

Chunk = list[tuple[Split, str]]


def prepare(
    inputs: Sequence[Path],
    tokenizer: Tokenizer,
    seq_len: int,
    out: Path,
    *,
    heldout: float = HELDOUT,
    workers: int | None = None,
) -> Index:
    """Tokenizes and packs documents into the new directory `out`; returns its index.

    Args:
        inputs: document files or directories of them.
        seq_len: tokens in a record.
        heldout: the share of documents that are kept for evaluation; a small corpus may have none.
        workers: threads that tokenize (the tokenizer releases Python's lock); by default one for
            each core.

    Raises:
        UserError: there are no documents or they cannot be read; `out` is not new or empty, or
            cannot be written (a full disk). After any error, nothing half-written is left.
    """
    if not 2 <= seq_len <= LARGEST["max_seq_len"]:
        raise UserError(
            f"got records of {seq_len} tokens, expected 2 or more, {LARGEST['max_seq_len']} at most"
        )
    if not 0 <= heldout < 1:
        raise UserError(f"got a held-out share of {heldout}, expected 0 or more and less than 1")
    files = [file for path in inputs for file in document_files(path)]
    if not files:
        raise UserError("got no documents to prepare: expected files or directories of documents")
    if len(files) > INPUTS:
        raise UserError(
            f"got {len(files)} files of documents, expected at most {INPUTS}: join them, as lines"
            " of .jsonl"
        )
    documents = _Documents(files, heldout)
    name = absolute(out).name
    with new_directory(out) as directory:
        return _prepare(documents, tokenizer, seq_len, directory, name, workers or _cores())


def open_data(path: Path, tokenizer: Tokenizer, seq_len: int, split: Split) -> Source:
    """The records of a split: of a prepared directory, of documents, or of token files.

    Documents are prepared into the cache. Token files have no splits: they are opened whole. Raises
    UserError as `prepare_cached` and `TokenRecords` do.
    """
    if has_tokens(path):
        return TokenRecords(path, tokenizer, seq_len)
    return open_records(prepare_cached(path, tokenizer, seq_len), split)


def open_heldout(
    path: Path, tokenizer: Tokenizer, seq_len: int, split: Split = "heldout"
) -> Source:
    """Records to score: as `open_data`, but prepared ones of any length and tokenizer."""
    if (path / INDEX_FILE).exists():
        return open_records(path, split)
    return open_data(path, tokenizer, seq_len, split)


def prepare_cached(
    path: Path, tokenizer: Tokenizer, seq_len: int, cache: Path | None = None
) -> Path:
    """`path` where it is a prepared directory, else documents prepared into a cache.

    The cache is `cache`, or what `cache_folder` finds. The content of the documents, the tokenizer
    and the length are the key under which a preparation is found again. Of several processes that
    ask at once, one prepares and the others wait. A bucket has no locks: where the cache is in one,
    only one process may ask for what is not yet prepared.

    Raises:
        UserError: a directory prepared with another tokenizer or length; what `prepare` raises.
    """
    path = path_of(path)
    if not has_documents(path):
        _check_prepared(path, tokenizer, seq_len)
        return path
    key = hashlib.sha256(f"{FORMAT} {tokenizer.digest} {seq_len} {HELDOUT}".encode())
    for file in document_files(path):
        key.update(f" {file.suffix} {sha256_of(file)}".encode())
    # The digest names the outer directory and the corpus the inner one, because records are named
    # after their directory.
    entry = (cache or cache_folder()) / "prepared" / key.hexdigest()[:32]
    prepared = entry / name_of(path)
    try:
        make_folder(entry)
        with locked(entry):
            if not is_whole(prepared):
                clear(prepared)
                note(f"preparing {path} in {prepared}")
                prepare([path], tokenizer, seq_len, prepared)
    except OSError as error:
        message = (
            f"cannot use the cache {entry}: {reason(error)}; set {CACHE_VARIABLE} to a directory"
            " that can be written"
        )
        raise UserError(message) from error
    return prepared


def _check_prepared(path: Path, tokenizer: Tokenizer, seq_len: int) -> None:
    index = Index.read(path)
    if (index.tokenizer_digest, index.vocab_size) != (tokenizer.digest, tokenizer.vocab_size):
        raise UserError(
            f"{path} was prepared with another tokenizer than the one asked for: prepare it"
            " again with that one"
        )
    if index.seq_len != seq_len:
        raise UserError(
            f"{path} has records of {index.seq_len} tokens, not {seq_len}: prepare it again or"
            " set data.seq_len"
        )


class _Documents:
    """The documents of some files, without empty ones and exact duplicates, each with its split."""

    def __init__(self, files: Sequence[Path], heldout: float):
        self.files = files
        self.heldout = heldout
        self.duplicates = 0
        self.empty = 0
        self._digests: set[bytes] = set()

    def read(self, advance: Callable[[int], None]) -> Iterator[tuple[Split, str]]:
        texts = (text for file in self.files for text in read_documents(file, advance))
        for text in texts:
            digest = digest_of(text)
            if not text:
                self.empty += 1
            elif digest in self._digests:
                self.duplicates += 1
            else:
                self._digests.add(digest)
                yield ("heldout" if is_heldout(digest, self.heldout) else "train"), text


def _prepare(
    documents: _Documents,
    tokenizer: Tokenizer,
    seq_len: int,
    directory: Path,
    name: str,
    workers: int,
) -> Index:
    sizes = [size_of(file) for file in documents.files]
    with bar(f"prepare {name}", sum(sizes), in_bytes=True) as advance:
        tokenized = _tokenized(_chunks(documents.read(advance)), tokenizer, workers)
        splits = _write_splits(directory, tokenized, tokenizer, seq_len)
    if not any(split.records for split in splits.values()):
        raise UserError(
            f"no text in {', '.join(map(str, documents.files))}: expected documents that are not"
            " empty"
        )
    tokenizer.save(directory)
    index = Index(
        format=FORMAT,
        name=name,
        seq_len=seq_len,
        tokenizer_digest=tokenizer.digest,
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
        pad_id=tokenizer.pad_id,
        heldout=documents.heldout,
        splits=splits,
        inputs=[
            InputFile(file.name, size, sha256_of(file))
            for file, size in zip(documents.files, sizes, strict=True)
        ],
        duplicates_removed=documents.duplicates,
        empty_removed=documents.empty,
        files={
            name: sha256_of(directory / name)
            for name in sorted(listing(directory).keys() - {UNFINISHED})
        },
    )
    index.write(directory)
    return index


def _write_splits(
    directory: Path,
    documents: Iterable[tuple[Split, np.ndarray]],
    tokenizer: Tokenizer,
    seq_len: int,
) -> dict[Split, SplitIndex]:
    with contextlib.ExitStack() as stack:
        writers: dict[Split, SplitWriter] = {
            split: stack.enter_context(SplitWriter(directory, split, tokenizer, seq_len))
            for split in SPLITS
        }
        for split, tokens in documents:
            writers[split].add(tokens)
        return {split: writer.finish() for split, writer in writers.items()}


def _chunks(documents: Iterable[tuple[Split, str]]) -> Iterator[Chunk]:
    """Documents in groups that are large enough to be worth a task in another thread."""
    chunk: Chunk = []
    characters = 0
    for split, text in documents:
        chunk.append((split, text))
        characters += len(text)
        if characters >= _CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def _tokenized(
    chunks: Iterable[Chunk], tokenizer: Tokenizer, workers: int
) -> Iterator[tuple[Split, np.ndarray]]:
    """Tokens and EOS of every document, in order.

    At most about two chunks wait for each of the `workers` threads, which bounds the memory.
    """
    dtype = token_dtype(tokenizer.vocab_size)

    def tokenize(chunk: Chunk) -> list[tuple[Split, np.ndarray]]:
        # One document at a time: for several, the tokenizer would start threads of its own.
        return [
            (split, np.array([*tokenizer.encode(text), tokenizer.eos_id], dtype))
            for split, text in chunk
        ]

    pending: deque[Future[list[tuple[Split, np.ndarray]]]] = deque()
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


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
