"""Safetensors files, tensor by tensor: reading, trusting nothing in them, and writing.

    u64 little-endian: bytes of the header | header: JSON {name: {dtype, shape, data_offsets}} |
    data: the tensors, without gaps

A header is read whole; a tensor is read in blocks that are digested while they are in the cache.
Nothing is allocated that the file's size does not cover. What the safetensors library refuses is
refused here: https://huggingface.co/docs/safetensors
"""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from flexolmo_jax.errors import UserError
from flexolmo_jax.storage.files import before_change
from flexolmo_jax.storage.paths import open_regular, open_to_write, reason
from flexolmo_jax.storage.untrusted import parse_json

NAMES = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
}
DTYPES = {dtype: name for name, dtype in NAMES.items()}
HEADER_LIMIT = 100_000_000  # bytes, as in the safetensors library
NAME_LIMIT = 1000  # characters of a tensor's name
SIGNS_LIMIT = 1 << 19  # commas and brackets in a header: 65,000 matrices have fewer
BLOCK = 1 << 22  # bytes read and digested at a time
_INFINITY = {
    "bfloat16": (np.uint16, 0x7FFF, 0x7F80),
    "float16": (np.uint16, 0x7FFF, 0x7C00),
    "float32": (np.uint32, 2**31 - 1, 0x7F800000),
}


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies in the file."""

    dtype: np.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


class TensorFile:
    """An open file; a context manager. `entries` in the order of the data; `header_sha256` of the
    length and the header."""

    def __init__(
        self, path: Path, *, with_metadata: bool = False, header_limit: int = HEADER_LIMIT
    ):
        """Raises UserError for anything that is not a whole, regular safetensors file; for one with
        `__metadata__`, unless allowed; and for a header of more bytes than `header_limit`."""
        self.path, self._with_metadata, self._header_limit = path, with_metadata, header_limit
        try:
            self._file = open_regular(path)
        except OSError as error:
            raise UserError(
                f"cannot read {path}: {reason(error)}; expected a regular file"
            ) from None
        try:
            self.entries, self.header_sha256 = self._read_header(self._file.seek(0, os.SEEK_END))
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "TensorFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()

    def read(self, name: str, into: np.ndarray | None = None) -> tuple[np.ndarray, str, bool]:
        """A tensor, the SHA-256 of its bytes, and whether all its values are finite. `into`: bytes
        to lay it in, at least its size."""
        entry = self.entries[name]
        size = entry.end - entry.begin
        data = np.empty(size, np.uint8) if into is None else into[:size]
        digest, finite = hashlib.sha256(), FiniteCheck(entry.dtype)
        for block in self._blocks(entry.begin, data):
            digest.update(block.data)
            finite.update(block)
        return data.view(entry.dtype).reshape(entry.shape), digest.hexdigest(), finite.holds

    def check(self, name: str) -> tuple[str, bool]:
        """What `read` tells of a tensor, whatever its size, in the memory of a block."""
        entry, block = self.entries[name], np.empty(BLOCK, np.uint8)
        digest, finite = hashlib.sha256(), FiniteCheck(entry.dtype)
        for start in range(entry.begin, entry.end, BLOCK):
            for part in self._blocks(start, block[: entry.end - start]):
                digest.update(part.data)
                finite.update(part)
        return digest.hexdigest(), finite.holds

    def read_part(self, name: str, start: int, shape: tuple[int, ...]) -> tuple[np.ndarray, bool]:
        """So many values from the `start`-th on, and whether all of them are finite."""
        dtype = self.entries[name].dtype
        data, finite = np.empty(math.prod(shape) * dtype.itemsize, np.uint8), FiniteCheck(dtype)
        for block in self._blocks(self.entries[name].begin + start * dtype.itemsize, data):
            finite.update(block)
        return data.view(dtype).reshape(shape), finite.holds

    def _blocks(self, begin: int, data: np.ndarray) -> Iterator[np.ndarray]:
        """The parts of `data`, filled from this place of the file on."""
        self._file.seek(begin)
        for start in range(0, len(data), BLOCK):
            block = data[start : start + BLOCK]
            if self._file.readinto(block.data) != len(block):  # type: ignore[attr-defined]
                raise UserError(f"{self.path} ended while it was read; is somebody changing it?")
            yield block

    def _read_header(self, size: int) -> tuple[dict[str, Entry], str]:
        self._file.seek(0)
        start = self._file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > size - 8:
            raise UserError(
                f"{self.path} cannot be read as safetensors: its header is said to be {length}"
                f" bytes long, in a file of {size}"
            )
        if length > self._header_limit:
            raise UserError(
                f"{self.path} cannot be read as safetensors: its header has {length} bytes;"
                f" expected at most {self._header_limit}"
            )
        text = self._file.read(length)
        try:
            entries = _parse(text, 8 + length, self._with_metadata)
        except (
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            OverflowError,
            RecursionError,
        ) as error:
            raise UserError(
                f"{self.path} cannot be read as safetensors: {type(error).__name__} in its header:"
                f" {error!s:.80}"
            ) from None
        end = 8 + length
        for name, entry in entries.items():
            if entry.begin != end:
                raise UserError(
                    f"{self.path} cannot be read as safetensors: {name!r:.80} starts at byte"
                    f" {entry.begin}; expected {end}"
                )
            end = entry.end
        if end != size:
            raise UserError(
                f"{self.path} cannot be read as safetensors: it has {size} bytes, its header tells"
                f" of {end}"
            )
        return entries, hashlib.sha256(start + text).hexdigest()


class FiniteCheck:
    """Whether bytes of whole numbers, block after block, are finite ones: by their exponent bits,
    several times as fast as isfinite."""

    def __init__(self, dtype: np.dtype):
        self.holds = True
        self._kind, self._mask, self._infinity = _INFINITY[dtype.name]
        self._scratch = np.empty(0, self._kind)

    def update(self, block: np.ndarray) -> None:
        numbers = block.view(self._kind)
        if self._scratch.size < numbers.size:
            self._scratch = np.empty(numbers.size, self._kind)
        magnitudes = np.bitwise_and(
            numbers, self._kind(self._mask), out=self._scratch[: numbers.size]
        )
        self.holds = self.holds and (not magnitudes.size or int(magnitudes.max()) < self._infinity)


def write_tensors(
    path: Path,
    entries: Mapping[str, tuple[str, tuple[int, ...]]],
    tensors: Iterable[np.ndarray],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a file of tensors that come one by one, in the order in which `entries` tells their
    dtypes and shapes."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, (dtype, shape) in entries.items():
        begin, end = end, end + math.prod(shape) * np.dtype(dtype).itemsize
        header[name] = {
            "dtype": DTYPES[np.dtype(dtype)],
            "shape": list(shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data is aligned
    before_change("write", path)
    with open_to_write(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for (name, (dtype, shape)), tensor in zip(entries.items(), tensors, strict=True):
            assert (tensor.dtype, tensor.shape) == (np.dtype(dtype), shape), name
            file.write(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data)


def _parse(text: bytes, data: int, with_metadata: bool) -> dict[str, Entry]:
    """The entries of a header, by position; `data` is where the data starts."""
    entries = {}
    for name, fields in _objects(text).items():
        if name == "__metadata__":
            if not with_metadata:
                raise ValueError("it has __metadata__; nothing but tensors is expected")
            if not isinstance(fields, dict) or not all(
                isinstance(value, str) for value in fields.values()
            ):
                raise ValueError("its __metadata__ is not of strings")
            continue
        if len(name) > NAME_LIMIT:
            raise ValueError(
                f"a tensor has a name of {len(name)} characters; expected at most {NAME_LIMIT}"
            )
        if not isinstance(fields, dict) or fields.keys() != {"dtype", "shape", "data_offsets"}:
            raise ValueError(f"{name!r:.80} is described as {fields!r:.80}")
        kind, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
        if not isinstance(kind, str) or kind not in NAMES:
            raise ValueError(f"{name!r:.80} has dtype {kind!r:.20}; expected {', '.join(NAMES)}")
        if not (
            _are_sizes(shape) and len(shape) <= 8 and _are_sizes(offsets) and len(offsets) == 2
        ):
            raise ValueError(f"{name!r:.80} is described as {fields!r:.80}")
        (begin, end), dtype = offsets, NAMES[kind]
        # Sizes of 0 count as 1 in the bound: the library multiplies them in their order, and
        # refuses what is beyond 64 bits on the way.
        if (
            end - begin != math.prod(shape) * dtype.itemsize
            or math.prod(n or 1 for n in shape) >= 2**60
        ):
            raise ValueError(f"{name!r:.80} has {end - begin} bytes for {dtype} {shape!r:.80}")
        entries[name] = Entry(dtype, tuple(shape), data + begin, data + end)
    return dict(sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)))


def _objects(text: bytes) -> dict[str, Any]:
    """A header's JSON. What it would take to parse is bounded before it is parsed."""
    if not text.startswith(b"{") or not text.rstrip(b" ").endswith(b"}"):
        raise ValueError("it is no JSON object with nothing but spaces behind")
    if len(text) > HEADER_LIMIT // 4 and not (text.isascii() and b"\\u" not in text):
        raise ValueError(
            "it is long and has characters beyond ASCII, which take four bytes each in memory"
        )
    return parse_json(text, SIGNS_LIMIT)


def _are_sizes(numbers: Any) -> bool:
    return isinstance(numbers, list) and all(type(n) is int and 0 <= n < 2**48 for n in numbers)
