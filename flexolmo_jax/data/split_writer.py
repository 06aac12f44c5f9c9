"""Writing the records of one split, as many as come, in memory that does not grow with them."""

import functools
import io
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from flexolmo_jax.data.packing import Packer, Pieces, lay_out
from flexolmo_jax.data.records import NOT_SPELLED, Split, SplitIndex, scored_targets, token_dtype
from flexolmo_jax.data.tokenized import Tokenized
from flexolmo_jax.data.tokenizer import Tokenizer
from flexolmo_jax.storage.files import remove_file, write_bytes
from flexolmo_jax.storage.paths import (
    in_bucket,
    join_objects,
    open_to_read,
    open_to_write,
    remove_objects,
    size_of,
)

_BUFFERED_RECORDS = 64
_BLOCK = 1 << 24  # bytes that are copied at once
# beside a token's id, which is below 2**24, while documents are packed: it is context
_CONTEXT = np.uint32(1 << 31)


class SplitWriter:
    """Packs the documents of one split and writes its arrays, record after record.

    There are two, and of context a third from the first conversation on. `bare`: without headers,
    for `join_records`.
    """

    def __init__(
        self,
        directory: Path,
        split: Split,
        tokenizer: Tokenizer,
        seq_len: int,
        *,
        bare: bool = False,
    ):
        self._tokenizer, self._seq_len = tokenizer, seq_len
        self._packer = Packer(seq_len)
        kind = _BareFile if bare else _ArrayFile
        self._tokens, self._segments = (
            kind(directory / name, dtype, seq_len)
            for name, dtype in _arrays(split, tokenizer).items()
        )
        self._context: _BareFile | None = None
        self._new_context = functools.partial(
            kind, directory / context_file(split), np.uint8, seq_len
        )
        self._buffer: list[tuple[np.ndarray, np.ndarray]] = []
        self._filled = self._scored_tokens = self._scored_bytes = 0
        self._counts = Counter[str]()

    def __enter__(self) -> "SplitWriter":
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files():
            file.close()

    def add(self, document: Tokenized) -> None:
        """Takes a document."""
        tokens = document.tokens.astype(np.uint32)
        self._counts["documents"] += 1
        for name in NOT_SPELLED:
            self._counts[name] += getattr(document, name)
        if document.context is not None:
            self._counts["conversations"] += 1
            tokens |= document.context * _CONTEXT
        self._write(self._packer.add(tokens))

    def cut(self) -> None:
        """Closes all open records: what comes is of another shard."""
        self._write(self._packer.flush())

    def finish(self) -> SplitIndex:
        """Completes the files and says what they hold."""
        self.cut()
        self._flush()
        counts = [file.finish() for file in self._files()]
        return SplitIndex.of(
            self._seq_len,
            records=counts[0],
            tokens=self._filled,
            scored_tokens=self._scored_tokens,
            scored_bytes=self._scored_bytes,
            **{name: self._counts[name] for name in ("documents", "conversations", *NOT_SPELLED)},
        )

    def _files(self) -> "list[_BareFile]":
        return [self._tokens, self._segments, *([self._context] if self._context else [])]

    def _write(self, closed: list[Pieces]) -> None:
        for pieces in closed:
            self._buffer.append(lay_out(pieces, self._seq_len, self._tokenizer.pad_id))
            if len(self._buffer) == _BUFFERED_RECORDS:
                self._flush()

    def _flush(self) -> None:
        if not self._buffer:
            return
        packed, segments = map(np.stack, zip(*self._buffer, strict=True))
        self._buffer.clear()
        tokens = packed & ~_CONTEXT
        scored = tokens[scored_targets(tokens, segments, self._tokenizer.eos_id)]
        self._filled += int(np.count_nonzero(segments))
        self._scored_tokens += len(scored)
        self._scored_bytes += int(self._tokenizer.byte_lengths[scored].sum(dtype=np.int64))
        if self._counts["conversations"] and self._context is None:
            self._context = self._new_context()
            self._context.append_zeros(self._tokens.records)
        if self._context:
            self._context.append(packed >= _CONTEXT)
        self._tokens.append(tokens)
        self._segments.append(segments)


def join_records(
    directory: Path,
    parts: Mapping[Path, SplitIndex],
    split: Split,
    tokenizer: Tokenizer,
    seq_len: int,
) -> None:
    """Writes the arrays of a split from the bare files in folders, which are then gone.

    `parts`: what each folder's records hold.
    """
    arrays = _arrays(split, tokenizer)
    if any(part.conversations for part in parts.values()):
        arrays[context_file(split)] = np.uint8
    for name, dtype in arrays.items():
        file = _ArrayFile(directory / name, dtype, seq_len)
        try:
            for folder, part in parts.items():
                if name == context_file(split) and not part.conversations:
                    _write_zeros(folder / name, part.records, seq_len)
                file.take(folder / name)
            file.finish()
        finally:
            file.close()


def _write_zeros(path: Path, records: int, seq_len: int) -> None:
    file = _BareFile(path, np.uint8, seq_len)
    try:
        file.append_zeros(records)
        file.finish()
    finally:
        file.close()


def context_file(split: Split) -> str:
    """The name of the array that a split with conversations has beside the others."""
    return f"{split}.context.npy"


def _arrays(split: Split, tokenizer: Tokenizer) -> dict[str, type[np.unsignedinteger]]:
    """The names of a split's two files, and what their values are."""
    kinds = {"tokens": token_dtype(tokenizer.vocab_size), "segments": np.uint16}
    return {f"{split}.{kind}.npy": dtype for kind, dtype in kinds.items()}


class _BareFile:
    """Records of T values that grow in number: their bytes, one record after another."""

    def __init__(self, path: Path, dtype: type[np.unsignedinteger], seq_len: int):
        self._dtype, self._seq_len, self.records = np.dtype(dtype), seq_len, 0
        self._in_bucket = in_bucket(path)
        self._file = open_to_write(path)

    def append(self, records: np.ndarray) -> None:
        self._file.write(records.astype(self._dtype, copy=False).tobytes())
        self.records += len(records)

    def append_zeros(self, count: int) -> None:
        for start in range(0, count, _BUFFERED_RECORDS):
            size = min(_BUFFERED_RECORDS, count - start)
            self.append(np.zeros((size, self._seq_len), self._dtype))

    def finish(self) -> int:
        """Completes the file and returns the number of its records."""
        if self._in_bucket:
            self._file.close()
        else:
            self._file.flush()
        return self.records

    def close(self) -> None:
        self._file.close()


class _ArrayFile(_BareFile):
    """A .npy of shape [R, T] that grows as records come.

    R is known only at the end. A file gets its header first and again at the end: NumPy pads a
    header so that there is room for a larger R. An object in a bucket is written from beginning to
    end once: there the header and the records are objects, which the store joins.
    """

    def __init__(self, path: Path, dtype: type[np.unsignedinteger], seq_len: int):
        self._path = path
        self._parts = [path.with_name(f".{path.name}.{part}.tmp") for part in ("header", "records")]
        super().__init__(self._parts[1] if in_bucket(path) else path, dtype, seq_len)
        if not self._in_bucket:
            self._file.write(self._header())

    def take(self, bare: Path) -> None:
        """Moves all records of a bare file to the end of this one."""
        self.records += size_of(bare) // (self._seq_len * self._dtype.itemsize)
        if self._in_bucket:
            self._parts.append(bare)
            return
        with open_to_read(bare) as records:
            shutil.copyfileobj(records, self._file, _BLOCK)
        remove_file(bare)

    def finish(self) -> int:
        if self._in_bucket:
            self._file.close()
            write_bytes(self._parts[0], self._header())
            join_objects(self._parts, self._path)
            remove_objects(self._parts)
            return self.records
        self._file.seek(0)
        self._file.write(self._header())
        return super().finish()

    def _header(self) -> bytes:
        header: dict[str, Any] = {
            "descr": self._dtype.str,
            "fortran_order": False,
            "shape": (self.records, self._seq_len),
        }
        content = io.BytesIO()
        np.lib.format.write_array_header_1_0(content, header)
        return content.getvalue()
