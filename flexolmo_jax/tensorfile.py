"""Reading safetensors files tensor by tensor, trusting nothing in them.

    u64 little-endian: bytes of the header | header: JSON {name: {dtype, shape, data_offsets}} | data: the tensors, without gaps

A header is read whole; a tensor is read in blocks that are digested while they are in the cache. Nothing is allocated that the
file's size does not cover. https://huggingface.co/docs/safetensors
"""

import hashlib
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from flexolmo_jax.errors import UserError
from flexolmo_jax.paths import open_regular

DTYPES = {"BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16), "F32": np.dtype(np.float32)}
HEADER_LIMIT = 100_000_000  # bytes, as in the safetensors library
BLOCK = 1 << 22  # bytes read and digested at a time
_INFINITY = {"bfloat16": (np.uint16, 0x7FFF, 0x7F80), "float16": (np.uint16, 0x7FFF, 0x7C00), "float32": (np.uint32, 2**31 - 1, 0x7F800000)}


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies in the file."""

    dtype: np.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


class TensorFile:
    """An open file; a context manager. `entries` in the order of the data; `header_sha256` of the length and the header."""

    def __init__(self, path: Path):
        """Raises UserError for anything that is not a whole, regular safetensors file."""
        self.path = path
        try:
            self._file = open_regular(path)
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror or error}; expected a regular file") from None
        try:
            self.entries, self.header_sha256 = self._read_header(self._file.seek(0, os.SEEK_END))
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "TensorFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self, name: str, into: np.ndarray | None = None) -> tuple[np.ndarray, str, bool]:
        """A tensor, the SHA-256 of its bytes, and whether all its values are finite. `into`: bytes to lay it in, at least its size."""
        entry = self.entries[name]
        size = entry.end - entry.begin
        data = np.empty(size, np.uint8) if into is None else into[:size]
        digest, finite = hashlib.sha256(), FiniteCheck(entry.dtype)
        self._file.seek(entry.begin)
        for start in range(0, size, BLOCK):
            block = data[start : start + BLOCK]
            if self._file.readinto(block.data) != len(block):  # type: ignore[attr-defined]
                raise UserError(f"{self.path} ended while it was read; is somebody changing it?")
            digest.update(block.data)
            finite.update(block)
        return data.view(entry.dtype).reshape(entry.shape), digest.hexdigest(), finite.holds

    def _read_header(self, size: int) -> tuple[dict[str, Entry], str]:
        self._file.seek(0)
        start = self._file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > min(size - 8, HEADER_LIMIT):
            raise UserError(f"{self.path} cannot be read as safetensors: its header is said to be {length} bytes long, in a file of {size}")
        text = self._file.read(length)
        try:
            entries = _parse(text, 8 + length)
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise UserError(f"{self.path} cannot be read as safetensors: {type(error).__name__} in its header: {error!s:.80}") from None
        end = 8 + length
        for name, entry in entries.items():
            if entry.begin != end:
                raise UserError(f"{self.path} cannot be read as safetensors: {name!r:.80} starts at byte {entry.begin}; expected {end}")
            end = entry.end
        if end != size:
            raise UserError(f"{self.path} cannot be read as safetensors: it has {size} bytes, its header tells of {end}")
        return entries, hashlib.sha256(start + text).hexdigest()


class FiniteCheck:
    """Whether bytes of whole numbers, block after block, are finite ones: by their exponent bits, several times as fast as isfinite."""

    def __init__(self, dtype: np.dtype):
        self.holds = True
        self._kind, self._mask, self._infinity = _INFINITY[dtype.name]
        self._scratch = np.empty(0, self._kind)

    def update(self, block: np.ndarray) -> None:
        numbers = block.view(self._kind)
        if self._scratch.size < numbers.size:
            self._scratch = np.empty(numbers.size, self._kind)
        magnitudes = np.bitwise_and(numbers, self._kind(self._mask), out=self._scratch[: numbers.size])
        self.holds = self.holds and (not magnitudes.size or int(magnitudes.max()) < self._infinity)


def strict_json(text: bytes | str) -> Any:
    """JSON that says everything once. Raises ValueError or RecursionError."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(found := dict(pairs)) != len(pairs):
            raise ValueError("a key is given twice")
        return found

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    return json.loads(text, object_pairs_hook=unique, parse_constant=refuse)


def _parse(text: bytes, data: int) -> dict[str, Entry]:
    """The entries of a header, by position; `data` is where the data starts."""
    header = strict_json(text)
    entries = {}
    for name, fields in header.items():
        if name == "__metadata__":
            raise ValueError("it has __metadata__; nothing but tensors is expected")
        dtype, shape, (begin, end) = DTYPES[fields["dtype"]], fields["shape"], fields["data_offsets"]
        if len(fields) != 3 or len(shape) > 8 or not all(type(n) is int and 0 <= n < 2**48 for n in (*shape, begin, end)):
            raise ValueError(f"{name!r:.80} is described as {fields!r:.80}")
        if end - begin != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{name!r:.80} has {end - begin} bytes for {dtype} {shape}")
        entries[name] = Entry(dtype, tuple(shape), data + begin, data + end)
    return dict(sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)))
