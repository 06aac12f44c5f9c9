"""Writing the records of one split, as many as come, in memory that does not grow with them."""

import io
import os
from pathlib import Path
from typing import Any

import numpy as np

from flexolmo_jax.data.packing import Packer, Pieces, lay_out
from flexolmo_jax.data.records import Split, SplitIndex, scored_targets, token_dtype
from flexolmo_jax.data.tokenizer import Tokenizer
from flexolmo_jax.storage.files import write_bytes
from flexolmo_jax.storage.paths import in_bucket, join_objects, open_to_write, remove_objects

_BUFFERED_RECORDS = 64


class SplitWriter:
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

    def __enter__(self) -> "SplitWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._tokens.close()
        self._segments.close()

    def add(self, document: np.ndarray) -> None:
        """Takes the tokens of a document, EOS included."""
        self._documents += 1
        self._write(self._packer.add(document))

    def finish(self) -> SplitIndex:
        """Completes the two files and says what they hold."""
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
        tokens, segments = map(np.stack, zip(*self._buffer, strict=True))
        self._buffer.clear()
        scored = tokens[scored_targets(tokens, segments, self._tokenizer.eos_id)]
        self._filled += int(np.count_nonzero(segments))
        self._scored_tokens += len(scored)
        self._scored_bytes += int(self._tokenizer.byte_lengths[scored].sum(dtype=np.int64))
        self._tokens.append(tokens)
        self._segments.append(segments)


class _ArrayFile:
    """A .npy of shape [R, T] that grows as records come.

    R is known only at the end. A file gets its header first and again at the end: NumPy pads a
    header so that there is room for a larger R. An object in a bucket is written from beginning to
    end once: there the header and the records are two objects, which the store joins.
    """

    def __init__(self, path: Path, dtype: type[np.unsignedinteger], seq_len: int):
        self._dtype, self._seq_len, self._records = np.dtype(dtype), seq_len, 0
        self._path, self._in_bucket = path, in_bucket(path)
        self._parts = [path.with_name(f".{path.name}.{part}.tmp") for part in ("header", "records")]
        self._file = open_to_write(self._parts[1] if self._in_bucket else path)
        if not self._in_bucket:
            self._file.write(self._header())

    def append(self, records: np.ndarray) -> None:
        self._file.write(records.astype(self._dtype, copy=False).tobytes())
        self._records += len(records)

    def finish(self) -> int:
        """Completes the file and returns the number of its records."""
        if self._in_bucket:
            self._file.close()
            write_bytes(self._parts[0], self._header())
            join_objects(self._parts, self._path)
            remove_objects(self._parts)
            return self._records
        self._file.seek(0)
        self._file.write(self._header())
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._records

    def close(self) -> None:
        self._file.close()

    def _header(self) -> bytes:
        header: dict[str, Any] = {
            "descr": self._dtype.str,
            "fortran_order": False,
            "shape": (self._records, self._seq_len),
        }
        content = io.BytesIO()
        np.lib.format.write_array_header_1_0(content, header)
        return content.getvalue()
