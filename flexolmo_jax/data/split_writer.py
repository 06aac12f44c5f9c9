"""Writing the records of one split, as many as come, in memory that does not grow with them."""

import io
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flexolmo_jax.data.packing import Packer, Pieces, lay_out
from flexolmo_jax.data.records import Split, SplitIndex, scored_targets, token_dtype
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


class SplitWriter:
    """Packs the documents of one split and writes its two arrays, record after record.

    `bare`: without headers, for `join_records`.
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
        self._buffer: list[tuple[np.ndarray, np.ndarray]] = []
        self._documents = self._filled = self._scored_tokens = self._scored_bytes = 0
        self._lost_bytes = 0

    def __enter__(self) -> "SplitWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._tokens.close()
        self._segments.close()

    def add(self, document: np.ndarray, lost_bytes: int = 0) -> None:
        """Takes the tokens of a document, EOS included, and how many bytes they do not spell."""
        self._documents += 1
        self._lost_bytes += lost_bytes
        self._write(self._packer.add(document))

    def cut(self) -> None:
        """Closes all open records: what comes is of another shard."""
        self._write(self._packer.flush())

    def finish(self) -> SplitIndex:
        """Completes the two files and says what they hold."""
        self.cut()
        self._flush()
        records = self._tokens.finish()
        self._segments.finish()
        return SplitIndex.of(
            self._seq_len,
            records=records,
            documents=self._documents,
            tokens=self._filled,
            scored_tokens=self._scored_tokens,
            scored_bytes=self._scored_bytes,
            lost_bytes=self._lost_bytes,
        )

    def _write(self, closed: list[Pieces]) -> None:
        for pieces in closed:
            self._buffer.append(lay_out(pieces, self._seq_len, self._tokenizer.pad_id))
            if len(self._buffer) == _BUFFERED_RECORDS:
                self._flush()

    def _flush(self) -> None:
        if not self._buffer:
            return
        tokens, segments = map(np.stack, zip(*self._buffer, strict=True))
        self._buffer.clear()
        scored = tokens[scored_targets(tokens, segments, self._tokenizer.eos_id)]
        self._filled += int(np.count_nonzero(segments))
        self._scored_tokens += len(scored)
        self._scored_bytes += int(self._tokenizer.byte_lengths[scored].sum(dtype=np.int64))
        self._tokens.append(tokens)
        self._segments.append(segments)


def join_records(
    directory: Path, folders: Sequence[Path], split: Split, tokenizer: Tokenizer, seq_len: int
) -> None:
    """Writes the arrays of a split from the bare files in the folders, which are then gone."""
    for name, dtype in _arrays(split, tokenizer).items():
        file = _ArrayFile(directory / name, dtype, seq_len)
        try:
            for folder in folders:
                file.take(folder / name)
            file.finish()
        finally:
            file.close()


def _arrays(split: Split, tokenizer: Tokenizer) -> dict[str, type[np.unsignedinteger]]:
    """The names of a split's two files, and what their values are."""
    kinds = {"tokens": token_dtype(tokenizer.vocab_size), "segments": np.uint16}
    return {f"{split}.{kind}.npy": dtype for kind, dtype in kinds.items()}


class _BareFile:
    """Records of T values that grow in number: their bytes, one record after another."""

    def __init__(self, path: Path, dtype: type[np.unsignedinteger], seq_len: int):
        self._dtype, self._seq_len, self._records = np.dtype(dtype), seq_len, 0
        self._in_bucket = in_bucket(path)
        self._file = open_to_write(path)

    def append(self, records: np.ndarray) -> None:
        self._file.write(records.astype(self._dtype, copy=False).tobytes())
        self._records += len(records)

    def finish(self) -> int:
        """Completes the file and returns the number of its records."""
        if self._in_bucket:
            self._file.close()
        else:
            self._file.flush()
            os.fsync(self._file.fileno())
        return self._records

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
        self._records += size_of(bare) // (self._seq_len * self._dtype.itemsize)
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
            return self._records
        self._file.seek(0)
        self._file.write(self._header())
        return super().finish()

    def _header(self) -> bytes:
        header: dict[str, Any] = {
            "descr": self._dtype.str,
            "fortran_order": False,
            "shape": (self._records, self._seq_len),
        }
        content = io.BytesIO()
        np.lib.format.write_array_header_1_0(content, header)
        return content.getvalue()
