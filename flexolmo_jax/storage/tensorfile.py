"""Reads and writes safetensors files, one tensor at a time. Nothing in a file is trusted.

    length of the header, u64 little-endian | header: JSON {name: {dtype, shape, data_offsets}} |
    data: the tensors, without gaps

A tensor is read in blocks, and each block is digested while it is in the processor's cache. No
more memory is allocated than the file has bytes. What the safetensors library refuses is refused
here too: https://huggingface.co/docs/safetensors
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
from flexolmo_jax.storage.paths import open_to_write
from flexolmo_jax.storage.untrusted import open_others, parse_json

NAMES = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
}
DTYPES = {dtype: name for name, dtype in NAMES.items()}
HEADER_LIMIT = 100_000_000  # bytes, as in the safetensors library
NAME_LIMIT = 1000  # characters of a tensor's name
SIGNS_LIMIT = 1 << 19  # commas and brackets in a header; one of 65,000 matrices has fewer
BLOCK = 1 << 22  # bytes read and digested at a time
# what parsing raises for a header that is not as described above
_MALFORMED = ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError
# by dtype: unsigned integers of its size, the bits without the sign, the bits of infinity
_INFINITY = {
    "bfloat16": (np.uint16, 0x7FFF, 0x7F80),
    "float16": (np.uint16, 0x7FFF, 0x7C00),
    "float32": (np.uint32, 2**31 - 1, 0x7F800000),
}


@dataclass(frozen=True)
class Entry:
    """A tensor's dtype and shape, and its first byte and its end in the file."""

    dtype: np.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


class TensorFile:
    """An open safetensors file; a context manager.

    Attributes:
        entries: the tensors by name, in the order of the data.
        header_sha256: SHA-256 of the first 8 bytes and the header.
    """

    def __init__(
        self, path: Path, *, with_metadata: bool = False, header_limit: int = HEADER_LIMIT
    ):
        """Opens a file and reads its header.

        Raises UserError for anything but a complete safetensors file, for `__metadata__` without
        `with_metadata`, and for a header of more than `header_limit` bytes.
        """
        self.path, self._with_metadata, self._header_limit = path, with_metadata, header_limit
        self._file = open_others(path)
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
        """Returns a tensor, the SHA-256 of its bytes, and whether all its values are finite.

        `into` is memory to read it into, of at least its size in bytes.
        """
        entry = self.entries[name]
        size = entry.end - entry.begin
        data = np.empty(size, np.uint8) if into is None else into[:size]
        digest, finite = hashlib.sha256(), FiniteCheck(entry.dtype)
        for block in self._blocks(entry.begin, data):
            digest.update(block.data)
            finite.update(block)
        return data.view(entry.dtype).reshape(entry.shape), digest.hexdigest(), finite.holds

    def check(self, name: str) -> tuple[str, bool]:
        """Returns the SHA-256 and finiteness that `read` does, with one block in memory."""
        entry, block = self.entries[name], np.empty(BLOCK, np.uint8)
        digest, finite = hashlib.sha256(), FiniteCheck(entry.dtype)
        for start in range(entry.begin, entry.end, BLOCK):
            for part in self._blocks(start, block[: entry.end - start]):
                digest.update(part.data)
                finite.update(part)
        return digest.hexdigest(), finite.holds

    def read_part(self, name: str, start: int, shape: tuple[int, ...]) -> tuple[np.ndarray, bool]:
        """Returns values of this shape from the `start`-th on, and whether all are finite."""
        dtype = self.entries[name].dtype
        data, finite = np.empty(math.prod(shape) * dtype.itemsize, np.uint8), FiniteCheck(dtype)
        for block in self._blocks(self.entries[name].begin + start * dtype.itemsize, data):
            finite.update(block)
        return data.view(dtype).reshape(shape), finite.holds

    def _blocks(self, begin: int, data: np.ndarray) -> Iterator[np.ndarray]:
        """Fills `data` from byte `begin` of the file, and yields it block by block."""
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
                f"{self.path} cannot be read as safetensors: its header should have {length}"
                f" bytes, but the file has {size}"
            )
        if length > self._header_limit:
            raise UserError(
                f"{self.path} cannot be read as safetensors: its header has {length} bytes;"
                f" expected at most {self._header_limit}"
            )
        text = self._file.read(length)
        try:
            entries = _parse(text, 8 + length, self._with_metadata)
        except _MALFORMED as error:
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
                f"{self.path} cannot be read as safetensors: it has {size} bytes; its header"
                f" describes {end}"
            )
        return entries, hashlib.sha256(start + text).hexdigest()


class FiniteCheck:
    """Checks that blocks of numbers are finite, by their exponent bits.

    This is several times as fast as np.isfinite.
    """

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


def finite(values: np.ndarray, what: str, dtype: str | None = None) -> np.ndarray:
    """Values in a dtype, by default their own.

    Raises UserError, naming `what` they are, for infinities and NaN, and for a value that is beyond
    the dtype.
    """
    if (place := _not_finite(values)) is not None:
        raise UserError(
            f"{what} has the value {float(values.flat[place])}; expected finite numbers: these"
            " weights are broken, use others"
        )
    with np.errstate(over="ignore"):  # that is what is looked for
        result = values.astype(dtype or values.dtype, copy=False)
    if result is not values and (place := _not_finite(result)) is not None:
        raise UserError(
            f"{what} has the value {float(values.flat[place])}, which is beyond {dtype}; choose"
            " another dtype (--dtype)"
        )
    return result


def _not_finite(values: np.ndarray) -> int | None:
    """The place, in C order, of the first value that is not finite."""
    flat, check = np.ascontiguousarray(values).reshape(-1), FiniteCheck(values.dtype)
    for start in range(0, flat.size, BLOCK):
        check.update(block := flat[start : start + BLOCK])
        if not check.holds:
            return start + int(np.argmin(np.isfinite(block)))
    return None


def write_tensors(
    path: Path,
    entries: Mapping[str, tuple[str, tuple[int, ...]]],
    tensors: Iterable[np.ndarray],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes tensors one by one. `entries` has their dtypes and shapes, in the same order."""
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
    """The entries of a header, in the order of the data, which starts at byte `data`."""
    entries = {}
    for name, fields in _objects(text).items():
        if name == "__metadata__":
            if not with_metadata:
                raise ValueError("it has __metadata__; nothing but tensors is expected")
            if not isinstance(fields, dict) or not _are_strings(fields.values()):
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
        if not (_are_sizes(shape, most=8) and _are_sizes(offsets, most=2) and len(offsets) == 2):
            raise ValueError(f"{name!r:.80} is described as {fields!r:.80}")
        (begin, end), dtype = offsets, NAMES[kind]
        # Sizes of 0 count as 1 here. The library multiplies the sizes in order, and refuses a shape
        # when the product overflows 64 bits on the way.
        is_too_large = math.prod(n or 1 for n in shape) >= 2**60
        if is_too_large or end - begin != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{name!r:.80} has {end - begin} bytes for {dtype} {shape!r:.80}")
        entries[name] = Entry(dtype, tuple(shape), data + begin, data + end)
    return dict(sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)))


def _objects(text: bytes) -> dict[str, Any]:
    """A header's JSON. Bounds the memory that parsing takes before it parses."""
    if not text.startswith(b"{") or not text.rstrip(b" ").endswith(b"}"):
        raise ValueError("it is not a JSON object followed only by spaces")
    if len(text) > HEADER_LIMIT // 4 and not (text.isascii() and b"\\u" not in text):
        raise ValueError(
            "it is long and has characters beyond ASCII, which take four bytes each in memory"
        )
    return parse_json(text, SIGNS_LIMIT)


def _are_strings(values: Iterable[Any]) -> bool:
    return all(isinstance(value, str) for value in values)


def _are_sizes(numbers: Any, most: int) -> bool:
    if not isinstance(numbers, list) or len(numbers) > most:
        return False
    return all(type(n) is int and 0 <= n < 2**48 for n in numbers)
