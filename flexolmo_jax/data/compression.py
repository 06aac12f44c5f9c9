"""Compressed files, unpacked while they are read.

What a file begins with says how it is compressed: gzip, zstd, bzip2, xz or lz4. It may have any
number of members, streams or frames, one behind another, and zeros behind them; of zstd also
skippable frames and windows of 2 GiB. A file that is cut short is an OSError, never a short
document: that is why none of the libraries' own file objects is used, which miss some of it.
"""

import bz2
import io
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from flexolmo_jax.config import suffixes_of
from flexolmo_jax.errors import UserError

_PIECE = 1 << 12  # compressed bytes that are unpacked at once, to at most about 80 MB
_CHUNK = 1 << 20  # bytes that bzip2 and xz unpack at once, of which 4 kB may become gigabytes
_WINDOW = 1 << 31  # bytes of a zstd window: `zstd --long=31`
_BUFFER = 1 << 16
_MAGIC = {
    "gzip": re.compile(rb"\x1f\x8b"),
    "zstd": re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18", re.DOTALL),
    "bzip2": re.compile(rb"BZh[1-9](1AY&SY|\x17\x72\x45\x38\x50\x90)"),
    "xz": re.compile(rb"\xfd7zXZ\0"),
    "lz4": re.compile(rb"\x04\x22\x4d\x18"),
}
_NEW = {
    "gzip": lambda: zlib.decompressobj(wbits=31),
    "bzip2": bz2.BZ2Decompressor,
    "xz": lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ),
}


def unpacked(path: Path, raw: BinaryIO) -> BinaryIO:
    """The content of a file that is open at its beginning, or the file itself if it is not packed.

    Raises UserError for a name that says otherwise and for a package that is missing; reading
    raises OSError for a damaged file.
    """
    begins = raw.read(10)
    raw.seek(0)
    kind = next((kind for kind, magic in _MAGIC.items() if magic.match(begins)), None)
    if kind is None:
        if begins and (suffix := suffixes_of(path.name)[1]):
            raise UserError(
                f"cannot read {path}: it is not compressed, as its name says; take {suffix} off its"
                " name, or copy it again"
            )
        return raw
    if kind == "lz4":
        return io.BufferedReader(_Pieces(_lz4(raw, path)), _BUFFER)
    new: Callable[[], Any] = _zstd(path) if kind == "zstd" else _NEW[kind]
    return io.BufferedReader(_Pieces(_streams(raw, new)), _BUFFER)


class _Pieces(io.RawIOBase):
    """Pieces of bytes as one file. A read gives all that is asked for, but at the end."""

    def __init__(self, pieces: Iterator[bytes]):
        self._pieces, self._left = pieces, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        done = 0
        while done < len(buffer):
            if not self._left:
                if (piece := next(self._pieces, None)) is None:
                    break
                self._left = memoryview(piece)
            size = min(len(buffer) - done, len(self._left))
            buffer[done : done + size] = self._left[:size]
            self._left, done = self._left[size:], done + size
        return done


def _streams(raw: BinaryIO, new: Callable[[], Any]) -> Iterator[bytes]:
    """What all streams of a file hold; `new` makes what unpacks one of them."""
    stream, rest = None, b""
    while chunk := rest or raw.read(_PIECE):
        rest = b""
        if stream is None:
            if not (chunk := chunk.lstrip(b"\0")):  # behind a stream: padding
                continue
            stream = new()
        try:
            yield from _one(stream, chunk)
        except MemoryError:
            raise
        except Exception as error:  # each library has its own
            raise OSError(str(error)) from error
        if stream.eof:
            stream, rest = None, stream.unused_data
    if stream is not None:
        raise OSError("it ends inside what is compressed")


def _one(stream: Any, chunk: bytes) -> Iterator[bytes]:
    if not hasattr(stream, "needs_input"):  # of zlib and zstd
        yield stream.decompress(chunk)
        return
    yield stream.decompress(chunk, _CHUNK)
    while not (stream.eof or stream.needs_input):
        yield stream.decompress(b"", _CHUNK)


def _zstd(path: Path) -> Callable[[], Any]:
    try:
        import zstandard
    except ImportError as error:
        raise UserError(
            f"reading {path} needs the package zstandard: pip install zstandard"
        ) from error
    return lambda: zstandard.ZstdDecompressor(max_window_size=_WINDOW).decompressobj()


def _lz4(raw: BinaryIO, path: Path) -> Iterator[bytes]:
    try:
        import pyarrow
    except ImportError as error:
        raise UserError(f"reading {path} needs the package pyarrow: pip install pyarrow") from error
    # it would close the file itself
    pieces = pyarrow.PythonFile(_Pieces(iter(lambda: raw.read(_BUFFER), b"")), "r")
    with pyarrow.CompressedInputStream(pieces, "lz4") as stream:
        while piece := stream.read(_CHUNK):
            yield piece
