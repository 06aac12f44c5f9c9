"""Raw documents -> a prepared directory (data/records.py says what is in one).

Documents are read one by one; exact duplicates (SHA-256 of the text) and empty ones are dropped;
the digest alone decides whether a document is held out, so the same document lands on the same side
in every corpus; tokens and EOS are packed into records (data/packing.py) and written as they are
complete. In memory are the digests, the open records and a few chunks of text, never the corpus.
The files depend on the documents, their order and the arguments, never on the number of workers.
"""

import contextlib
import hashlib
import io
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

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
from flexolmo_jax.data.packing import Packer, Pieces, lay_out
from flexolmo_jax.data.records import (
    FORMAT,
    INPUTS,
    SPLITS,
    Index,
    InputFile,
    Split,
    SplitIndex,
    open_records,
    scored_targets,
    sha256_of,
    token_dtype,
)
from flexolmo_jax.data.tokenizer import Tokenizer
from flexolmo_jax.data.tokens import Source, TokenRecords, has_tokens
from flexolmo_jax.errors import UserError
from flexolmo_jax.runtime.progress import bar, note
from flexolmo_jax.storage.cache import CACHE_VARIABLE, cache_folder
from flexolmo_jax.storage.files import (
    UNFINISHED,
    clear,
    is_whole,
    locked,
    make_folder,
    new_directory,
    write_bytes,
)
from flexolmo_jax.storage.paths import (
    absolute,
    in_bucket,
    join_objects,
    listing,
    open_to_write,
    path_of,
    reason,
    remove_objects,
    size_of,
)

_CHUNK_CHARACTERS = 1 << 18
_BUFFERED_RECORDS = 64

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
    """Tokenizes and packs documents into records of `seq_len` tokens in the new directory `out`;
    returns its index.

    Args:
        inputs: document files or directories of them.
        heldout: the share of documents that are kept for evaluation; a small corpus may have none.
        workers: threads that tokenize (the tokenizer runs outside Python's lock); every core by
            default.

    Raises:
        UserError: documents that cannot be read or are none, an output directory that is not new or
            empty, or that cannot be written (a full disk). Whatever happens, nothing half-written
            is left.
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
    with new_directory(out) as directory:
        return _prepare(
            files, tokenizer, seq_len, directory, absolute(out).name, heldout, workers or _cores()
        )


def open_data(path: Path, tokenizer: Tokenizer, seq_len: int, split: Split) -> Source:
    """Records of whatever a path is: a split of prepared data, or of documents, prepared into the
    cache; token files as they lie.

    Raises UserError as `prepare_cached` and `TokenRecords` do.
    """
    if has_tokens(path):
        return TokenRecords(path, tokenizer, seq_len)
    return open_records(prepare_cached(path, tokenizer, seq_len), split)


def open_heldout(
    path: Path, tokenizer: Tokenizer, seq_len: int, split: Split = "heldout"
) -> Source:
    """Records to score: as `open_data` opens them, but of a prepared directory whatever their
    length and tokenizer."""
    if (path / INDEX_FILE).exists():
        return open_records(path, split)
    return open_data(path, tokenizer, seq_len, split)


def prepare_cached(
    path: Path, tokenizer: Tokenizer, seq_len: int, cache: Path | None = None
) -> Path:
    """The prepared directory for `path`: itself where it is one, else what `prepare` makes of it,
    kept in a cache.

    The cache is `cache`, or what `cache_folder` finds; a preparation is found again by the content
    of the documents, the tokenizer and the length. Of several processes that ask at once, one
    prepares and the others wait. A cache may be in a bucket, which has no locks: there only one
    process may ask for what is not yet prepared.

    Raises:
        UserError: a directory prepared with another tokenizer or length; what `prepare` raises.
    """
    path = path_of(path)
    if not has_documents(path):
        index = Index.read(path)
        if index.tokenizer_digest != tokenizer.digest:
            raise UserError(
                f"{path} was prepared with another tokenizer than the one asked for: prepare it"
                " again with that one"
            )
        if index.seq_len != seq_len:
            raise UserError(
                f"{path} has records of {index.seq_len} tokens, not {seq_len}: prepare it again or"
                " set data.seq_len"
            )
        return path
    key = hashlib.sha256(f"{FORMAT} {tokenizer.digest} {seq_len} {HELDOUT}".encode())
    for file in document_files(path):
        key.update(f" {file.suffix} {sha256_of(file)}".encode())
    # The corpus names the directory, and the digest the one around it: what is read from it goes by
    # the corpus's name.
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


def _prepare(
    files: list[Path],
    tokenizer: Tokenizer,
    seq_len: int,
    directory: Path,
    name: str,
    heldout: float,
    workers: int,
) -> Index:
    sizes = [size_of(file) for file in files]
    seen = _Seen(heldout)
    with contextlib.ExitStack() as stack:
        advance = stack.enter_context(bar(f"prepare {name}", sum(sizes), in_bytes=True))
        writers = {
            split: stack.enter_context(_SplitWriter(directory, split, tokenizer, seq_len))
            for split in SPLITS
        }
        texts = (text for file in files for text in read_documents(file, advance))
        for split, tokens in _tokenized(_chunks(seen.sort(texts)), tokenizer, workers):
            writers[split].add(tokens)
        splits: dict[Split, SplitIndex] = {split: writers[split].finish() for split in SPLITS}
    if not any(split.records for split in splits.values()):
        raise UserError(
            f"no text in {', '.join(str(file) for file in files)}: expected documents that are not"
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
        heldout=heldout,
        splits=splits,
        inputs=[
            InputFile(file.name, size, sha256_of(file))
            for file, size in zip(files, sizes, strict=True)
        ],
        duplicates_removed=seen.duplicates,
        empty_removed=seen.empty,
        files={
            name: sha256_of(directory / name)
            for name in sorted(listing(directory).keys() - {UNFINISHED})
        },
    )
    index.write(directory)
    return index


class _Seen:
    """Drops empty documents and exact duplicates, and says which split each other one belongs
    to."""

    def __init__(self, heldout: float):
        self.duplicates = 0
        self.empty = 0
        self._heldout = heldout
        self._digests: set[bytes] = set()

    def sort(self, texts: Iterable[str]) -> Iterator[tuple[Split, str]]:
        for text in texts:
            digest = digest_of(text)
            if not text:
                self.empty += 1
            elif digest in self._digests:
                self.duplicates += 1
            else:
                self._digests.add(digest)
                yield ("heldout" if is_heldout(digest, self._heldout) else "train"), text


def _chunks(documents: Iterable[tuple[Split, str]]) -> Iterator[Chunk]:
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
    """Tokens and EOS of every document, in order, from `workers` threads and never more than two
    chunks each."""
    dtype = token_dtype(tokenizer.vocab_size)

    def tokenize(chunk: Chunk) -> list[tuple[Split, np.ndarray]]:
        # One document a call: a longer batch would make the tokenizer start threads of its own
        # beside these.
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


class _SplitWriter:
    """Packs the documents of one split and writes its two arrays, record after record."""

    def __init__(self, directory: Path, split: Split, tokenizer: Tokenizer, seq_len: int):
        self._tokenizer, self._seq_len = tokenizer, seq_len
        self._packer = Packer(seq_len)
        self._tokens = _ArrayFile(
            directory / f"{split}.tokens.npy", token_dtype(tokenizer.vocab_size), seq_len
        )
        self._segments = _ArrayFile(directory / f"{split}.segments.npy", np.uint16, seq_len)
        self._buffer: list[tuple[np.ndarray, np.ndarray]] = []
        self._documents = self._filled = self._scored_tokens = self._scored_bytes = 0

    def __enter__(self) -> "_SplitWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._tokens.close()
        self._segments.close()

    def add(self, document: np.ndarray) -> None:
        self._documents += 1
        self._write(self._packer.add(document))

    def finish(self) -> SplitIndex:
        self._write(self._packer.flush())
        self._flush()
        records = self._tokens.finish()
        self._segments.finish()
        return SplitIndex(
            records=records,
            documents=self._documents,
            tokens=self._filled,
            scored_tokens=self._scored_tokens,
            scored_bytes=self._scored_bytes,
            fill=round(self._filled / (records * self._seq_len), 6) if records else 0.0,
        )

    def _write(self, closed: list[Pieces]) -> None:
        for pieces in closed:
            self._buffer.append(lay_out(pieces, self._seq_len, self._tokenizer.pad_id))
            if len(self._buffer) == _BUFFERED_RECORDS:
                self._flush()

    def _flush(self) -> None:
        if not self._buffer:
            return
        tokens, segments = (np.stack(rows) for rows in zip(*self._buffer, strict=True))
        self._buffer.clear()
        scored = tokens[scored_targets(tokens, segments, self._tokenizer.eos_id)]
        self._filled += int(np.count_nonzero(segments))
        self._scored_tokens += len(scored)
        self._scored_bytes += int(self._tokenizer.byte_lengths[scored].sum(dtype=np.int64))
        self._tokens.append(tokens)
        self._segments.append(segments)


class _ArrayFile:
    """A .npy of shape [R, T] that grows row by row; NumPy leaves room in the header for the R that
    is known only at the end.

    What an object begins with cannot be written last: in a bucket header and rows are two objects,
    which its store joins.
    """

    def __init__(self, path: Path, dtype: type[np.unsignedinteger], width: int):
        self._dtype, self._width, self._rows = np.dtype(dtype), width, 0
        self._path, self._in_bucket = path, in_bucket(path)
        self._parts = [path.with_name(f".{path.name}.{part}.tmp") for part in ("header", "rows")]
        self._file = open_to_write(self._parts[1] if self._in_bucket else path)
        if not self._in_bucket:
            self._file.write(self._header())

    def append(self, rows: np.ndarray) -> None:
        self._file.write(rows.astype(self._dtype, copy=False).tobytes())
        self._rows += len(rows)

    def finish(self) -> int:
        """Completes the file and returns its rows."""
        if self._in_bucket:
            self._file.close()
            write_bytes(self._parts[0], self._header())
            join_objects(self._parts, self._path)
            remove_objects(self._parts)
            return self._rows
        self._file.seek(0)
        self._file.write(self._header())
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._rows

    def close(self) -> None:
        self._file.close()

    def _header(self) -> bytes:
        header: dict[str, Any] = {
            "descr": self._dtype.str,
            "fortran_order": False,
            "shape": (self._rows, self._width),
        }
        content = io.BytesIO()
        np.lib.format.write_array_header_1_0(content, header)
        return content.getvalue()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
