"""Reads a GGUF file: what it says of itself, and its tensors as floats, one at a time.

    "GGUF" | version u32 | tensors u64 | fields u64 | each field: name, type u32, value
    | each tensor: name, dimensions u32, their sizes u64, type u32, offset u64 | padding | data

A string is its length, u64, and its UTF-8 bytes. Numbers are little-endian.
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md

Nothing in the file is trusted. The gguf package's own reader believes every count, and a wrong one
keeps it busy for ever; from that package come the types, their sizes, and what they mean in floats.
"""

import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import ml_dtypes
import numpy as np

from flexolmo_jax.errors import UserError
from flexolmo_jax.storage.untrusted import open_others

VERSIONS = (2, 3)
HEADER_LIMIT = 1 << 26  # bytes; one of 150,000 tokens and as many merges has 6 MB
FIELDS = 4096
TENSORS = 1 << 17
DIMENSIONS = 4
BLOCK = 1 << 22  # values that become floats at a time
STRING, ARRAY = gguf.GGUFValueType.STRING, gguf.GGUFValueType.ARRAY
NUMBERS = {kind: np.dtype(found) for kind, found in gguf.GGUFReader.gguf_scalar_to_np.items()}


class Tensor(NamedTuple):
    """Where a tensor is. A row is its last dimension: whole blocks of its type."""

    type: gguf.GGMLQuantizationType
    shape: tuple[int, ...]
    begin: int  # in the file
    row_bytes: int


class GgufFile:
    """An open GGUF file; a context manager.

    Attributes:
        fields: what the file says of itself, by name: text, numbers, or lists of these.
        tensors: by name.
    """

    def __init__(self, path: Path):
        """Reads all but the tensors. Raises UserError for anything but a whole GGUF file."""
        self.path = path
        self._file = open_others(path)
        try:
            self._size = self._file.seek(0, os.SEEK_END)
            header = _Header(path, self._read(0, min(self._size, HEADER_LIMIT)))
            self.fields, self.tensors = header.fields, header.tensors
            self._check_size()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "GgufFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self, name: str, dtype: Any = ml_dtypes.bfloat16) -> tuple[np.ndarray, bool]:
        """Returns a tensor in a dtype, and whether all its values are finite there."""
        tensor = self.tensors[name]
        values = np.empty((math.prod(tensor.shape[:-1]), tensor.shape[-1]), dtype)
        rows, is_finite = max(1, BLOCK // max(tensor.shape[-1], 1)), True
        for start in range(0, len(values), rows):
            count = min(rows, len(values) - start)
            begin = tensor.begin + start * tensor.row_bytes
            content = np.frombuffer(self._read(begin, count * tensor.row_bytes), np.uint8)
            floats = _floats(content.reshape(count, tensor.row_bytes), tensor.type)
            values[start : start + count] = floats
            is_finite = is_finite and bool(np.isfinite(values[start : start + count]).all())
        return values.reshape(tensor.shape), is_finite

    def _read(self, begin: int, size: int) -> bytes:
        self._file.seek(begin)
        content = self._file.read(size)
        if len(content) != size:
            raise UserError(f"{self.path} ended while it was read; is somebody changing it?")
        return content

    def _check_size(self) -> None:
        for name, tensor in self.tensors.items():
            end = tensor.begin + math.prod(tensor.shape[:-1]) * tensor.row_bytes
            if end > self._size:
                raise UserError(
                    f"{self.path} has {self._size} bytes; expected {end} or more, for"
                    f" {name!r:.80}; download it again"
                )


class _Header:
    """A file's beginning, parsed."""

    def __init__(self, path: Path, content: bytes):
        self._path, self._content, self._at = path, content, 0
        if self._take(4) != b"GGUF":
            raise UserError(f"{path} is not a GGUF file: it does not begin with GGUF")
        if (version := self._number(4)) not in VERSIONS:
            raise self._error(f"it is of version {version}; expected one of {VERSIONS}")
        tensors, fields = self._count(TENSORS, "tensors"), self._count(FIELDS, "fields")
        self.fields: dict[str, Any] = {}
        for _ in range(fields):
            name = self._text()
            self._check_new(name, self.fields)
            self.fields[name] = self._value(self._type(name))
        self.tensors: dict[str, Tensor] = {}
        for _ in range(tensors):
            name = self._text()
            self._check_new(name, self.tensors)
            self.tensors[name] = self._tensor(name)
        self._place_tensors()

    def _error(self, what: str) -> UserError:
        return UserError(f"{self._path} cannot be read as GGUF: {what}")

    def _take(self, size: int) -> bytes:
        if size > len(self._content) - self._at:
            raise self._error(
                f"at byte {self._at} it needs {size} bytes more, and its header ends after"
                f" {len(self._content)}; download it again"
            )
        self._at += size
        return self._content[self._at - size : self._at]

    def _number(self, size: int) -> int:
        return int.from_bytes(self._take(size), "little")

    def _count(self, most: int, what: str) -> int:
        count = self._number(8)
        if count > most:
            raise self._error(f"it says that it has {count} {what}; expected at most {most}")
        return count

    def _text(self) -> str:
        content = self._take(self._number(8))
        try:
            return content.decode()
        except UnicodeDecodeError:
            raise self._error(f"{content!r:.80} is not UTF-8") from None

    def _check_new(self, name: str, known: dict[str, Any]) -> None:
        if name in known:
            raise self._error(f"it has {name!r:.80} twice")

    def _type(self, name: str) -> gguf.GGUFValueType:
        number = self._number(4)
        try:
            return gguf.GGUFValueType(number)
        except ValueError:
            raise self._error(f"{name!r:.80} is of type {number}, which is unknown") from None

    def _value(self, kind: gguf.GGUFValueType) -> Any:
        if kind is STRING:
            return self._text()
        if kind is not ARRAY:
            return self._numbers(kind, 1)[0]
        kind, count = self._type("an array"), self._number(8)
        if kind is ARRAY:
            raise self._error("it has arrays of arrays")
        if kind is not STRING:
            return self._numbers(kind, count)
        if count > len(self._content) // 8:  # no text is shorter than its length
            raise self._error(f"it has an array of {count} texts; its header is too short for them")
        return [self._text() for _ in range(count)]

    def _numbers(self, kind: gguf.GGUFValueType, count: int) -> list[Any]:
        dtype = NUMBERS[kind].newbyteorder("<")
        return np.frombuffer(self._take(count * dtype.itemsize), dtype).tolist()

    def _tensor(self, name: str) -> Tensor:
        dimensions = self._number(4)
        if not 1 <= dimensions <= DIMENSIONS:
            raise self._error(
                f"{name!r:.80} has {dimensions} dimensions; expected 1 to {DIMENSIONS}"
            )
        shape = tuple(self._number(8) for _ in range(dimensions))[::-1]
        number = self._number(4)
        try:
            kind = gguf.GGMLQuantizationType(number)
            block, size = gguf.GGML_QUANT_SIZES[kind]
            _floats(np.zeros((1, size), np.uint8), kind)
        except (ValueError, KeyError, NotImplementedError):
            raise self._error(
                f"{name!r:.80} is of type {number}, which the gguf package cannot turn into floats;"
                " give another file of the model"
            ) from None
        if math.prod(shape) >= 2**48 or shape[-1] % block:
            raise self._error(
                f"{name!r:.80} has shape {shape}; {kind.name} is in blocks of {block}"
            )
        return Tensor(kind, shape, self._number(8), shape[-1] // block * size)

    def _place_tensors(self) -> None:
        """Makes the tensors' offsets places in the file."""
        alignment = self.fields.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
        if type(alignment) is not int or not 8 <= alignment <= 2**20 or alignment % 8:
            raise self._error(f"its alignment is {alignment!r:.40}; expected a multiple of 8")
        start = math.ceil(self._at / alignment) * alignment
        for name, tensor in self.tensors.items():
            self.tensors[name] = tensor._replace(begin=start + tensor.begin)


def names_of(architecture: str, layers: int) -> gguf.TensorNameMap:
    """From Hugging Face's names of tensors to those of an architecture here."""
    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    return gguf.get_tensor_name_map(kind, layers)


def _floats(content: np.ndarray, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """uint8 [rows, bytes of a row] -> float32 [rows, values of a row]."""
    with np.errstate(over="ignore", invalid="ignore"):  # a scale may be infinite
        return gguf.quants.dequantize(content, kind)
