"""Raw documents on disk, read one at a time: `.jsonl` (plain, `.gz`, `.zst`), `.txt`, `.parquet`.

A JSONL line is one object with a `text` string (the Dolma form) or with `messages`, a list of
`{"role": ..., "content": ...}`: a conversation. Other keys are ignored. A `.txt` file is one
document. A Parquet file has a document in each row, by its columns `text` and `messages`. A
directory stands for all such files inside it, in sorted order. Nothing is repaired or skipped
silently: what cannot be read is a `UserError` that names the file and the line.
"""

import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from flexolmo_jax.errors import UserError
from flexolmo_jax.storage.paths import absolute, files_below, open_to_read, path_of, reason, size_of

from .chat import Message, check_messages

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".txt", ".parquet")
HELDOUT = 0.05  # share of documents kept for evaluation
INDEX_FILE = "index.json"  # makes a directory a prepared one: see data/records.py

ASSISTANT = "assistant"  # the role whose messages a model learns to say

_KEYS = ("text", "messages")  # of which a document has one
_EXPECTED_LINE = 'expected one JSON object a line with a "text" string or with "messages"'
LONGEST = 1 << 26  # bytes of a line: a few compressed kilobytes may unpack to gigabytes
_PIECE = 1 << 12  # compressed bytes that are unpacked at once, to at most about 80 MB
_CHUNK = 1 << 20
# bytes of a line beside its strings: as empty lists they take 30 times as much
_LARGE = 1 << 20
_STRING = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"')


class Document(NamedTuple):
    """A text, or a conversation. Only what makes records of it looks at `messages`.

    For everything else a conversation is its text: what its messages say, without their roles,
    with blank lines between them. So the same words are held out, or a duplicate, in both forms.
    """

    text: str
    where: str  # the file and the line
    messages: tuple[Message, ...] = ()


def read_documents(path: Path, advance: Callable[[int], Any] | None = None) -> Iterator[str]:
    """The text of every document: see `documents_in`."""
    return (document.text for document in documents_in(path, advance))


def documents_in(path: Path, advance: Callable[[int], Any] | None = None) -> Iterator[Document]:
    """Every document in a file or directory, in a fixed order.

    Args:
        path: a file with one of `SUFFIXES`, or a directory with such files at any depth.
        advance: called with the number of bytes read since the last call, as they are on disk
            (compressed or not).

    Raises:
        UserError: at the call, where the path is missing, of an unknown kind or a directory without
            documents. While reading, for a line that is not a document, text that is not Unicode, a
            damaged file, and a format that needs a missing package.
    """
    files = document_files(path)
    return (one for file in files for one in _read_file(file, advance or (lambda _: None)))


def read_training_documents(path: Path, heldout: float = HELDOUT) -> Iterator[str]:
    """As `read_documents`, without the held-out ones, from which nothing may be learnt."""
    return (text for text in read_documents(path) if not is_heldout(digest_of(text), heldout))


def digest_of(text: str) -> bytes:
    """SHA-256 of a document: two documents with the same digest are the same."""
    return hashlib.sha256(text.encode()).digest()


def is_heldout(digest: bytes, share: float = HELDOUT) -> bool:
    """Whether the first 8 bytes of a digest, as a fraction of their range, are below the share.

    The digest alone decides, so a document is on the same side in every corpus and for everyone.
    """
    return int.from_bytes(digest[:8], "big") < share * 2**64


def document_files(path: Path) -> list[Path]:
    """A file itself, or all document files in a directory, sorted. Raises UserError."""
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
    """Whether a path holds raw documents (not a prepared directory). UserError where neither."""
    if (path_of(path) / INDEX_FILE).is_file():
        return False
    return bool(document_files(path))


def name_of(path: Path) -> str:
    """The name of a corpus: the directory's, or the file's without its document suffixes."""
    name = absolute(path_of(path)).name
    suffix = max((s for s in SUFFIXES if name.endswith(s)), key=len, default="")
    return name.removesuffix(suffix) or name


def _read_file(path: Path, advance: Callable[[int], Any]) -> Iterator[Document]:
    try:
        with open_to_read(path) as raw:
            if path.name.endswith(".parquet"):
                yield from _read_parquet(path, raw, advance)
            elif path.name.endswith(".txt"):
                data = raw.read(LONGEST + 1)
                if len(data) > LONGEST:
                    raise UserError(
                        f"{path} has more than {LONGEST} bytes; a .txt is one document; cut it into"
                        " several, or make it a .jsonl"
                    )
                advance(len(data))
                yield Document(_decode(data, path, 1), str(path))
            else:
                yield from _read_lines(path, raw, advance)
    except (OSError, EOFError, zlib.error) as error:  # gzip reports damage as any of the three
        raise UserError(f"cannot read {path}: {reason(error)}; is the file complete?") from error


def _read_lines(path: Path, raw: BinaryIO, advance: Callable[[int], Any]) -> Iterator[Document]:
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


def _document(line: bytes, path: Path, number: int) -> Document:
    content = _decode(line, path, number)
    if len(line) > _LARGE and len(_STRING.sub("", content)) > _LARGE:
        raise UserError(
            f"{path}, line {number}: it has more than {_LARGE} bytes that are no text; keep only"
            ' "text" or "messages"'
        )
    try:
        document = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}, line {number}: not JSON ({error}); {_EXPECTED_LINE}") from error
    if not isinstance(document, dict):
        raise UserError(
            f"{path}, line {number}: got a JSON {type(document).__name__}; {_EXPECTED_LINE}"
        )
    if not any(key in document for key in _KEYS):
        raise UserError(
            f'{path}, line {number}: the object has no "text" and no "messages"; {_EXPECTED_LINE}'
        )
    return _checked(document, f"{path}, line {number}")


def _checked(fields: Mapping[str, Any], where: str) -> Document:
    """The document of an object or a row. What is null is not there."""
    text, messages = map(fields.get, _KEYS)
    if messages is None:
        return Document(_checked_text(text, where), where)
    if text is not None:
        raise UserError(
            f'{where}: it has "text" and "messages"; expected one of them: take the other out'
        )
    messages = _checked_messages(messages, where)
    return Document("\n\n".join(one["content"] for one in messages), where, messages)


def _checked_messages(messages: object, where: str) -> tuple[Message, ...]:
    if isinstance(messages, list):  # a Parquet file has every key in every message
        messages = [
            {key: value for key, value in one.items() if value is not None}
            if isinstance(one, dict)
            else one
            for one in messages
        ]
    try:
        checked = check_messages(messages)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    if all(one["role"] != ASSISTANT for one in checked):
        roles = ", ".join(sorted({one["role"] for one in checked}))
        raise UserError(
            f"{where}: its messages are of {roles!r:.80}; expected one or more of the role"
            f" {ASSISTANT!r}, from which a model learns to answer"
        )
    return checked


def _checked_text(text: object, where: str) -> str:
    if not isinstance(text, str):
        raise UserError(f'{where}: "text" is a {type(text).__name__}; expected a string')
    try:
        text.encode()
    # JSON can spell half a surrogate pair, for which there is no UTF-8
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
    """Lines of a zstd file of any number of frames.

    The package's own stream reader is not used: it does not notice that a file is truncated.
    """
    try:
        import zstandard
    except ImportError as error:
        raise UserError(
            f"reading {path} needs the package zstandard: pip install zstandard"
        ) from error
    frame, rest, size = None, [], 0  # of the last line, its pieces so far
    try:
        while chunk := raw.read(_CHUNK):
            while chunk:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                piece, chunk = chunk[:_PIECE], chunk[_PIECE:]
                first, *more = frame.decompress(piece).split(b"\n")
                rest.append(first)
                size += len(first)
                if more:
                    yield b"".join(rest)
                    yield from more[:-1]
                    rest, size = [more[-1]], len(more[-1])
                if size > LONGEST:
                    yield b"".join(rest)  # refused
                chunk = (frame.unused_data if frame.eof else b"") + chunk
                frame = None if frame.eof else frame
    except zstandard.ZstdError as error:
        raise UserError(f"cannot read {path}: {error}; is the file complete?") from error
    if frame is not None:
        raise UserError(f"cannot read {path}: it ends inside a zstd frame; is the file complete?")
    if size:
        yield b"".join(rest)


def _read_parquet(path: Path, raw: BinaryIO, advance: Callable[[int], Any]) -> Iterator[Document]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"reading {path} needs the package pyarrow: pip install pyarrow") from error
    size = size_of(path)
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(raw) as table:
            columns = [key for key in _KEYS if key in table.schema_arrow.names]
            if not columns:
                raise UserError(
                    f"{path} has the columns {', '.join(table.schema_arrow.names)}; expected one"
                    ' named "text" or "messages"'
                )
            for batch in table.iter_batches(batch_size=32, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield _checked(row, f"{path}, document {number}")
                advance(size * batch.num_rows // table.metadata.num_rows)
    except pyarrow.ArrowException as error:
        raise UserError(
            f"cannot read {path}: {str(error).splitlines()[0]}; is the file complete?"
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}, after document {number}: not UTF-8; convert the column to UTF-8"
        ) from error
