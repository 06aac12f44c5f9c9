"""Arrays of NumPy's in files: mapped into memory where they lie on a disk, read by ranges where
they lie in a bucket.

A bucket takes tens of milliseconds to answer, whatever is asked for; records are therefore asked
for many at once (`read_records`), and nothing is kept: memory holds the records that somebody waits
for.
"""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from flexolmo_jax.errors import UserError
from flexolmo_jax.storage.paths import absolute, in_bucket, open_regular, read_range, size_of

AT_ONCE = 64  # records that are asked of a bucket at the same time
MAGIC = b"\x93NUMPY"
_HEADER = 1 << 12  # bytes at most of a header, which NumPy makes 128
_FIELDS = re.compile(
    rb"\{'descr': '(?P<dtype>[<>|][a-z]\d{1,2})', 'fortran_order': (?P<fortran>True|False), "
    rb"'shape': \((?P<shape>|\d{1,15},|\d{1,15}(, \d{1,15}){1,7},?)\),? *\} *\n"
)


class Header(NamedTuple):
    """What a .npy says before its values, and where these start."""

    shape: tuple[int, ...]
    fortran_order: bool
    dtype: np.dtype
    start: int


class BucketArray:
    """A part of an object as an array [N, ...] in C order, of which rows are read when they are
    asked for."""

    def __init__(self, file: Path, dtype: np.dtype, start: int, shape: tuple[int, ...]):
        self.dtype, self.shape = dtype, shape
        self._file, self._start = file, start
        self._row = dtype.itemsize * int(np.prod(shape[1:]))

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int | slice) -> np.ndarray:
        """A row, or rows that follow each other. Raises UserError where the object is not as long
        as it was."""
        first, last, _ = (
            index.indices(len(self)) if isinstance(index, slice) else (index, index + 1, 1)
        )
        rows = max(0, last - first)
        data = (
            read_range(self._file, self._start + first * self._row, self._start + last * self._row)
            if rows
            else b""
        )
        if len(data) != rows * self._row:
            raise UserError(f"{self._file} ended while it was read; is somebody changing it?")
        array = np.frombuffer(data, self.dtype).reshape(rows, *self.shape[1:])
        return array if isinstance(index, slice) else array[0]


def map_array(
    file: Path, dtype: np.dtype, start: int, shape: tuple[int, ...]
) -> np.ndarray | BucketArray:
    """The array whose values lie in a file from byte `start` on."""
    if 0 in shape:  # nothing to map, which mmap refuses
        return np.zeros(shape, dtype)
    return (
        BucketArray(file, dtype, start, shape)
        if in_bucket(file)
        else np.memmap(file, dtype, "r", start, shape)
    )


def read_header(file: Path) -> tuple[Header | None, int]:
    """Of a .npy, None where the file does not begin like one; and the file's bytes.

    Raises OSError for what is no regular file (nor a link to one), ValueError for a header that is
    damaged or cut off.
    """
    if in_bucket(file):
        return parse_header(read_range(file, 0, _HEADER)), size_of(file)
    with open_regular(absolute(file)) as opened:
        return parse_header(opened.read(_HEADER)), os.fstat(opened.fileno()).st_size


def parse_header(beginning: bytes) -> Header | None:
    """As `read_header`, of bytes that a file begins with. NumPy's own reader evaluates the header,
    and warns of what it guesses."""
    if not beginning.startswith(MAGIC):
        return None
    # bytes that the length of the header takes, by the version of the format
    width = 2 if beginning[6:7] == b"\1" else 4
    start = 8 + width + int.from_bytes(beginning[8 : 8 + width], "little")
    text = beginning[8 + width : start]
    fields = _FIELDS.fullmatch(text)
    if len(beginning) < start or fields is None:
        raise ValueError(f"its header is {text[:80]!r}")
    shape = tuple(int(size) for size in fields["shape"].split(b",") if size.strip())
    try:
        dtype = np.dtype(fields["dtype"].decode())
    except TypeError:
        raise ValueError(f"its values are {fields['dtype']!r}") from None
    return Header(shape, fields["fortran"] == b"True", dtype, start)


def read_records(
    get: Callable[[int], dict[str, np.ndarray]], indices: Sequence[int], *, at_once: bool
) -> Iterator[dict[str, np.ndarray]]:
    """`get` of each index, in order; many at the same time where they come out of a bucket
    (`at_once`)."""
    if not at_once:
        yield from map(get, indices)
        return
    with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="records") as readers:
        yield from readers.map(get, indices)
