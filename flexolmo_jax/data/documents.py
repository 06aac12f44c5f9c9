"""Raw documents on disk, read one at a time: `.jsonl` (plain, `.gz`, `.zst`), `.txt` and
`.parquet`.

A JSONL line is one object with a `text` string (the Dolma form; other keys are ignored); a `.txt`
file is one document; a Parquet file gives its `text` column. A directory stands for all such files
inside it, in sorted order. Nothing is repaired or skipped silently: what cannot be read is a
`UserError` that names the file and the line.
"""

import gzip
import hashlib
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from flexolmo_jax.errors import UserError
from flexolmo_jax.storage.paths import absolute, files_below, open_to_read, path_of, reason, size_of

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".txt", ".parquet")
HELDOUT = 0.05  # share of documents kept for evaluation
INDEX_FILE = "index.json"  # what makes a directory a prepared one: see data/records.py

_LINE_FORM = 'expected one JSON object a line with a "text" string'
LONGEST = 1 << 26  # bytes of a line: some kilobytes may unpack to gigabytes
_PIECE = 1 << 12  # compressed bytes that are unpacked at once: at most some 80 MB
_CHUNK = 1 << 20


def read_documents(path: Path, advance: Callable[[int], Any] | None = None) -> Iterator[str]:
    """The text of every document in a file or directory, in a fixed order.

    Args:
        path: a file with one of `SUFFIXES`, or a directory with such files at any depth.
        advance: called with the number of bytes on disk (compressed, where they are) read since the
            last call.

    Raises:
        UserError: at once, where the path is missing, of an unknown kind or a directory without
            documents; while reading, for a line that is no document, for text that is not Unicode,
            for a damaged file, and where the format needs a package that is missing.
    """
    files = document_files(path)
    return (text for file in files for text in _read_file(file, advance or (lambda _: None)))


def read_training_documents(path: Path, heldout: float = HELDOUT) -> Iterator[str]:
    """As `read_documents`, without those that are held out for evaluation: what may be learnt from,
    by whatever it is that learns."""
    return (text for text in read_documents(path) if not is_heldout(digest_of(text), heldout))


def digest_of(text: str) -> bytes:
    """SHA-256 of a document: what makes two documents the same."""
    return hashlib.sha256(text.encode()).digest()


def is_heldout(digest: bytes, share: float = HELDOUT) -> bool:
    """Whether a document is held out: the first 8 bytes of its digest, as a fraction of their
    range, are below the share.

    The digest alone decides, so that a document is on the same side in every corpus and for
    everyone.
    """
    return int.from_bytes(digest[:8], "big") < share * 2**64


def document_files(path: Path) -> list[Path]:
    """The files that a path stands for: itself, or all document files inside it, sorted; UserError
    as in `read_documents`."""
    path = path_of(path)
    if path.is_dir():
        inside = files_below(path, SUFFIXES)
        if not inside:
            raise UserError(
                f"{path} holds no documents: expected {', '.join(SUFFIXES)} files inside it"
            )
        return inside
    if not path.exists():
        raise UserError(
            f"{path} does not exist: expected a file of documents or a directory of them"
        )
    if not path.name.endswith(SUFFIXES):
        raise UserError(
            f"{path} is of an unknown kind: expected a name that ends in {', '.join(SUFFIXES)}"
        )
    return [path]


def has_documents(path: Path) -> bool:
    """True where a path holds raw documents, False where it is a prepared directory. Raises
    UserError where it is neither."""
    if (path_of(path) / INDEX_FILE).is_file():
        return False
    return bool(document_files(path))


def name_of(path: Path) -> str:
    """The name of a corpus: the directory's, or the file's without its document suffixes."""
    name = absolute(path_of(path)).name
    suffix = max((s for s in SUFFIXES if name.endswith(s)), key=len, default="")
    return name.removesuffix(suffix) or name


def _read_file(path: Path, advance: Callable[[int], Any]) -> Iterator[str]:
    try:
        with open_to_read(path) as raw:
            if path.name.endswith(".parquet"):
                yield from _read_parquet(path, raw, advance)
            elif path.name.endswith(".txt"):
                data = raw.read()
                advance(len(data))
                yield _decode(data, path, 1)
            else:
                yield from _read_lines(path, raw, advance)
    except (OSError, EOFError, zlib.error) as error:  # gzip reports damage as any of the three
        raise UserError(f"cannot read {path}: {reason(error)}; is the file complete?") from error


def _read_lines(path: Path, raw: BinaryIO, advance: Callable[[int], Any]) -> Iterator[str]:
    if path.name.endswith(".zst"):
        lines = _zstd_lines(path, raw)
    else:
        file = gzip.GzipFile(fileobj=raw) if path.name.endswith(".gz") else raw
        lines = iter(lambda: file.readline(LONGEST + 1), b"")
    done = 0
    for number, line in enumerate(lines, 1):
        if len(line) > LONGEST:
            raise UserError(
                f"{path}, line {number}: it has more than {LONGEST} bytes; cut the document into"
                " several"
            )
        if line.strip():
            yield _document(line, path, number)
        done, before = raw.tell(), done
        advance(done - before)


def _document(line: bytes, path: Path, number: int) -> str:
    content = _decode(line, path, number)
    try:
        document = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}, line {number}: not JSON ({error}); {_LINE_FORM}") from error
    if not isinstance(document, dict):
        raise UserError(
            f"{path}, line {number}: got a JSON {type(document).__name__}; {_LINE_FORM}"
        )
    if "text" not in document:
        raise UserError(f'{path}, line {number}: the object has no "text"; {_LINE_FORM}')
    return _checked_text(document["text"], f"{path}, line {number}")


def _checked_text(text: object, where: str) -> str:
    if not isinstance(text, str):
        raise UserError(f'{where}: "text" is a {type(text).__name__}; expected a string')
    try:
        text.encode()
    # JSON can spell half a surrogate pair, which no UTF-8 stands for
    except UnicodeEncodeError as error:
        message = (
            f"{where}: the text is not Unicode (half a surrogate pair at character {error.start});"
            " repair the document"
        )
        raise UserError(message) from error
    return text


def _decode(data: bytes, path: Path, first_line: int) -> str:
    try:
        return data.decode("utf-8-sig" if first_line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        line = first_line + data[: error.start].count(b"\n")
        raise UserError(
            f"{path}, line {line}: not UTF-8 (byte 0x{data[error.start]:02x}); convert the file to"
            " UTF-8"
        ) from error


def _zstd_lines(path: Path, raw: BinaryIO) -> Iterator[bytes]:
    """Lines of a zstd file of any number of frames. The package's own stream reader takes a
    truncated file for a complete one."""
    try:
        import zstandard
    except ImportError as error:
        raise UserError(
            f"reading {path} needs the package zstandard: pip install zstandard"
        ) from error
    frame, rest = None, b""
    try:
        while chunk := raw.read(_CHUNK):
            while chunk:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                piece, chunk = chunk[:_PIECE], chunk[_PIECE:]
                *lines, rest = (rest + frame.decompress(piece)).split(b"\n")
                yield from lines
                if len(rest) > LONGEST:
                    yield rest  # refused
                chunk = (frame.unused_data if frame.eof else b"") + chunk
                frame = None if frame.eof else frame
    except zstandard.ZstdError as error:
        raise UserError(f"cannot read {path}: {error}; is the file complete?") from error
    if frame is not None:
        raise UserError(f"cannot read {path}: it ends inside a zstd frame; is the file complete?")
    if rest:
        yield rest


def _read_parquet(path: Path, raw: BinaryIO, advance: Callable[[int], Any]) -> Iterator[str]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"reading {path} needs the package pyarrow: pip install pyarrow") from error
    size = size_of(path)
    row = 0
    try:
        with pyarrow.parquet.ParquetFile(raw) as table:
            if "text" not in table.schema_arrow.names:
                raise UserError(
                    f"{path} has the columns {', '.join(table.schema_arrow.names)}; expected one"
                    ' named "text"'
                )
            for batch in table.iter_batches(batch_size=1024, columns=["text"]):
                for text in batch.column(0).to_pylist():
                    row += 1
                    yield _checked_text(text, f"{path}, row {row}")
                advance(size * batch.num_rows // table.metadata.num_rows)
    except pyarrow.ArrowException as error:
        raise UserError(
            f"cannot read {path}: {str(error).splitlines()[0]}; is the file complete?"
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}, after row {row}: not UTF-8; convert the column to UTF-8"
        ) from error
