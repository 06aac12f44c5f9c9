"""Raw documents on disk, read one at a time, in bounded memory.

A file's name says what it is, in capitals or not: `.jsonl` (also `.ndjson`, `.jsonlines`), `.json`,
`.txt`, `.csv`, `.tsv` or `.parquet`; all but the last may be compressed (compression.py). Without
such a name, a file that begins as JSON or Parquet is that. formats.py says what a record is.

A directory stands for the documents inside it, in sorted order, at any depth. What it holds beside
them is left out, named and counted: hidden files and folders, links to folders, what cannot be
read, files of another kind, and files without documents. A file that cannot be taken for anything
else (SURE) is a document come what may: what is wrong in it is a `UserError` that names the file
and the line. So nothing is repaired or skipped silently.
"""

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from flexolmo_jax.config import COMPRESSIONS, FORMATS, Reading, suffixes_of, without_suffixes
from flexolmo_jax.errors import UserError
from flexolmo_jax.runtime.progress import note_once
from flexolmo_jax.storage.folders import below
from flexolmo_jax.storage.paths import absolute, open_to_read, path_of, reason

from .compression import unpacked
from .formats import ASSISTANT as ASSISTANT
from .formats import (
    BOM,
    BadRecord,
    Document,
    File,
    NoDocument,
    NotJSON,
    Records,
    Tally,
    read_json,
    read_lines,
    read_text,
)
from .formats import LONGEST as LONGEST
from .tables import read_csv, read_parquet, read_tsv

SURE = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".txt", ".parquet")
HELDOUT = 0.05  # share of documents kept for evaluation
INDEX_FILE = "index.json"  # makes a directory a prepared one: see data/records.py
AS_TEXT = Reading()

_READERS = {
    ".jsonl": read_lines,
    ".jsonlines": read_lines,
    ".ndjson": read_lines,
    ".json": read_json,
    ".txt": read_text,
    ".csv": read_csv,
    ".tsv": read_tsv,
}
OTHER, _WITHOUT = "of another kind", "without documents"  # why a file is left out
_OPTIONS = (
    "--text-key (data.text_key) names another key, --skip-bad (data.skip_bad) leaves such records"
    " out"
)
_LOOKED_AT = 100  # records of a file that may hold documents or not
_SHOWN = 10  # names of what is left out, for each reason


class UnknownKind(UserError):
    """Neither its name nor its beginning is that of a file of documents."""


class Found(NamedTuple):
    """The files of documents at a path, and what a directory holds beside them: reasons, names."""

    files: list[Path]
    left_out: list[tuple[str, str]]


def read_documents(
    path: Path, advance: Callable[[int], Any] | None = None, reading: Reading = AS_TEXT
) -> Iterator[str]:
    """The text of every document: see `documents_in`."""
    return (document.text for document in documents_in(path, advance, reading))


def documents_in(
    path: Path,
    advance: Callable[[int], Any] | None = None,
    reading: Reading = AS_TEXT,
    tally: Tally | None = None,
) -> Iterator[Document]:
    """Every document in a file or directory, in a fixed order.

    Args:
        path: a file of documents, or a directory with such files at any depth.
        advance: called with the number of bytes read since the last call, as they are on disk
            (compressed or not).
        tally: counts what is left out. By default a note tells it when all is read.

    Raises:
        UserError: at the call, where the path is missing, of an unknown kind or a directory without
            documents. While reading, for a record that is no document (unless `reading` leaves it
            out), a damaged file, and a format that needs a missing package.
    """
    files = document_files(path, reading)
    own = Tally()
    found = (
        one for file in files for one in _read_file(file, reading, tally or own, advance or _ignore)
    )
    return found if tally else _told(found, own, path, reading)


def _told(
    found: Iterator[Document], tally: Tally, path: Path, reading: Reading
) -> Iterator[Document]:
    try:
        yield from found
    finally:
        tell(tally, path, reading)


def tell(tally: Tally, what: Path | str, reading: Reading) -> None:
    """Says what reading left out and cut."""
    for line in tally.told(reading):
        note_once(f"{what}: {line}")


def read_training_documents(
    path: Path, heldout: float = HELDOUT, reading: Reading = AS_TEXT
) -> Iterator[str]:
    """As `read_documents`, without the held-out ones, from which nothing may be learnt."""
    texts = read_documents(path, reading=reading)
    return (text for text in texts if not is_heldout(digest_of(text), heldout))


def digest_of(text: str) -> bytes:
    """SHA-256 of a document: two documents with the same digest are the same."""
    return hashlib.sha256(text.encode()).digest()


def is_heldout(digest: bytes, share: float = HELDOUT) -> bool:
    """Whether the first 8 bytes of a digest, as a fraction of their range, are below the share.

    The digest alone decides, so a document is on the same side in every corpus and for everyone.
    """
    return int.from_bytes(digest[:8], "big") < share * 2**64


def document_files(path: Path, reading: Reading = AS_TEXT) -> list[Path]:
    """A file itself, or all document files in a directory, sorted. Raises UserError.

    A note tells what the directory holds beside them; with `reading.strict` it is the error.
    """
    return found_in(path, reading).files


def found_in(path: Path, reading: Reading = AS_TEXT) -> Found:
    """As `document_files`, with what is left out."""
    path = path_of(path)
    if path.is_dir():
        found = _in_directory(path, reading)
        if not found.files:
            told = _in_words(found.left_out)
            what = f'with a "{reading.text_key}" ' if _WITHOUT in grouped(found.left_out) else ""
            raise UserError(
                f"{path} holds no documents: expected {', '.join(FORMATS)} files {what}inside it"
                + (f"; left out: {told}" if told else "")
                + (f"; {_OPTIONS}" if what else "")
            )
        tell_left_out(path, found.left_out, reading)
        return found
    if not path.exists():
        raise UserError(
            f"{path} does not exist: expected a file of documents or a directory of them"
        )
    if not path.name.endswith(SURE):
        _check(path, reading)
    return Found([path], [])


def tell_left_out(directory: Path, left_out: list[tuple[str, str]], reading: Reading) -> None:
    """A note of it; with `reading.strict` a UserError."""
    if not (told := _in_words(left_out)):
        return
    if reading.strict:
        raise UserError(
            f"{directory} holds {told}; expected nothing else than what is read; take these out, or"
            " leave out --strict (data.strict)"
        )
    note_once(f"{directory}: left out {told}; --strict (data.strict) makes this an error")


def _check(path: Path, reading: Reading) -> None:
    """Raises UserError for a file of another kind, and for a table without a column of text."""
    try:
        first = _first(path, reading, 1)
        if isinstance(first, NotJSON) and not suffixes_of(path.name)[0]:
            raise UnknownKind("it only begins as JSON") from first
    except UnknownKind as error:
        raise UserError(
            f"{path} is of an unknown kind: expected a name that ends in {', '.join(FORMATS)}, with"
            f" {', '.join(COMPRESSIONS)} behind it where it is compressed"
        ) from error
    except BadRecord as bad:
        raise UserError(f"{bad}; {_OPTIONS}") from bad
    except (UserError, OSError):  # told when it is read
        return


def _first(path: Path, reading: Reading, count: int) -> Document | BadRecord | None:
    """The first document among the first records of a file; without one, the first record."""
    first = None
    with open_to_read(path) as raw:
        records = _records(raw, File(path, reading, Tally()), _ignore)
        for one in itertools.islice(records, count):
            if isinstance(one, Document):
                return one
            first = first or one
    return first


def _in_directory(directory: Path, reading: Reading) -> Found:
    found = Found([], [])
    for entry in below(directory):
        problem = entry.problem
        if not problem or problem == "empty":
            is_sure = entry.path.name.endswith(SURE)
            why = "" if is_sure else _problem_of(entry.path, reading)
            if not why:
                found.files.append(entry.path)
            problem = problem or why
        if problem:
            found.left_out.append((problem, entry.shown))
    return found


def _problem_of(path: Path, reading: Reading) -> str:
    """Why a file in a directory holds no documents, by its beginning; "" if it does, or should.

    One whose name ends in something else is not even opened.
    """
    form, compression = suffixes_of(path.name)
    if not form and Path(path.name[: len(path.name) - len(compression)]).suffix:
        return OTHER
    try:
        first = _first(path, reading, _LOOKED_AT)
    except (UnknownKind, NoDocument) as error:
        return OTHER if isinstance(error, UnknownKind) else _WITHOUT
    except (UserError, OSError):  # told when it is read
        return "" if form or compression else OTHER
    if isinstance(first, NotJSON):
        return {"": OTHER, ".json": _WITHOUT}.get(form, "")
    return _WITHOUT if isinstance(first, NoDocument) else ""


def grouped(left_out: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """The names of what is left out, by the reason."""
    groups: dict[str, list[str]] = {}
    for why, name in left_out:
        groups.setdefault(why, []).append(name)
    return groups


def _in_words(left_out: list[tuple[str, str]]) -> str:
    groups = []
    for why, names in grouped(left_out).items():
        different = list(dict.fromkeys(names))
        shown = ", ".join(different[:_SHOWN]) + (", ..." if len(different) > _SHOWN else "")
        groups.append(f"{len(names)} {why} ({shown})")
    return ", ".join(groups)


def has_documents(path: Path, reading: Reading = AS_TEXT) -> bool:
    """Whether a path holds raw documents (not a prepared directory). UserError where neither."""
    if (path_of(path) / INDEX_FILE).is_file():
        return False
    return bool(document_files(path, reading))


def name_of(path: Path) -> str:
    """The name of a corpus: the directory's, or the file's without its document suffixes."""
    path = absolute(path_of(path))
    return path.name if path.is_dir() else without_suffixes(path.name)


def _ignore(_: int) -> None: ...


def _read_file(
    path: Path, reading: Reading, tally: Tally, advance: Callable[[int], Any]
) -> Iterator[Document]:
    try:
        with open_to_read(path) as raw:
            for one in _records(raw, File(path, reading, tally), advance):
                if isinstance(one, Document):
                    yield one
                elif reading.skip_bad:
                    tally.leave_out(one)
                else:
                    raise one
    except BadRecord as bad:
        raise UserError(f"{bad}; {_OPTIONS}") from bad
    except OSError as error:
        raise UserError(f"cannot read {path}: {reason(error)}; is the file complete?") from error


def _records(raw: BinaryIO, file: File, advance: Callable[[int], Any]) -> Records:
    """Every record of a file that is open at its beginning, or what is wrong with it."""
    content = cast(BufferedReader, unpacked(file.path, raw))
    begins = content.peek(4)
    form = suffixes_of(file.path.name)[0] or _form_of(begins)
    if form == ".parquet":
        if content is not raw:
            raise UnknownKind(f"{file.path} is a compressed .parquet; unpack it")
        if begins:  # an empty file is told, and is no error, as of any other kind
            yield from read_parquet(raw, file, advance)
        return
    if _is_utf_16(begins):
        raise UserError(f"{file.path} is UTF-16; expected UTF-8; convert it")
    if begins.startswith(BOM):
        content.read(len(BOM))
    done = 0
    for record in _READERS[form](content, file):
        yield record
        done, before = raw.tell(), done
        advance(done - before)
    advance(raw.tell() - done)


def _form_of(begins: bytes) -> str:
    """What a file is that its name does not tell. Raises UnknownKind."""
    if begins.startswith(b"PAR1"):
        return ".parquet"
    if begins.removeprefix(BOM).lstrip()[:1] in (b"{", b"["):
        return ".json"
    raise UnknownKind("it begins as no file of documents does")


def _is_utf_16(begins: bytes) -> bool:
    odd, even = begins[:4:2] == b"\0\0", begins[1:4:2] == b"\0\0"
    return begins.startswith((b"\xff\xfe", b"\xfe\xff")) or odd != even
