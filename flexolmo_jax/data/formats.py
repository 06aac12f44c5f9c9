"""The records of a file of documents: lines of JSON, one JSON value, text. tables.py has the rest.

A record is an object with a text string, under the key "text" or another that the user names, or
with `messages`, a list of `{"role": ..., "content": ...}`: a conversation. Other keys are ignored.
A reader yields a Document, or the BadRecord that says why there is none: a reader of them decides
whether that is the end. What makes the file itself unusable is raised.
"""

import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from io import BufferedReader, BytesIO
from pathlib import Path
from typing import Any, NamedTuple

from flexolmo_jax.config import END, Reading
from flexolmo_jax.errors import UserError

from .chat import Message, check_messages

ASSISTANT = "assistant"  # the role whose messages a model learns to say
MESSAGES = "messages"

LONGEST = 1 << 26  # bytes of a document: a few compressed kilobytes may unpack to gigabytes
BOM = b"\xef\xbb\xbf"
_CHUNK = 1 << 20
_NOTHING = object()  # where there is no such key
# bytes of a record beside its strings: as empty lists they take 30 times as much
_LARGE = 1 << 20
_STRING = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"')
_SIGNS = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[\[\]{},"]', re.DOTALL)
# lines with which other tokenizers' documents end
_ENDS = {name.encode() for name in (END, "<|end_of_text|>", "</s>", "<eos>")}


class Document(NamedTuple):
    """A text, or a conversation. Only what makes records of it looks at `messages`.

    For everything else a conversation is its text: what its messages say, without their roles,
    with blank lines between them. So the same words are held out, or a duplicate, in both forms.
    """

    text: str
    where: str  # the file and the line
    messages: tuple[Message, ...] = ()


class BadRecord(UserError):
    """A record of which no document can be made."""


class NotJSON(BadRecord):
    """It is no JSON value."""


class NoDocument(BadRecord):
    """It is no document at all: it has no text, not a wrong one."""


@dataclass
class Tally:
    """What readers left out, and what they cut."""

    bad: int = 0
    first_bad: str = ""
    cut: int = 0  # documents of .txt files that are one of several
    ends: dict[str, int] = field(default_factory=dict)  # lines that look like the end of one

    def leave_out(self, bad: BadRecord) -> None:
        self.first_bad = self.first_bad or str(bad)
        self.bad += 1

    def add(self, other: "Tally") -> None:
        self.first_bad = self.first_bad or other.first_bad
        self.bad += other.bad
        self.cut += other.cut
        for line, count in other.ends.items():
            self.see(line, count)

    def see(self, line: str, count: int = 1) -> None:
        """Counts a line that looks like the end of a document."""
        self.ends[line] = self.ends.get(line, 0) + count

    def told(self, reading: Reading) -> Iterator[str]:
        """What the user should know of it."""
        if self.bad:
            yield (
                f"left out {self.bad} records that are no documents; the first: {self.first_bad}"
            )
        if self.cut:
            yield f"{self.cut} documents of .txt files end at a line {reading.separator}"
        for line, count in self.ends.items():
            yield (
                f"warning: {count} lines are {line}, and are learnt as text; if documents end"
                f" there, give --separator '{line}' (data.separator)"
            )


class File(NamedTuple):
    """What a reader knows of the file that it reads."""

    path: Path
    reading: Reading
    tally: Tally


Records = Iterator[Document | BadRecord]


def read_lines(content: BufferedReader, file: File) -> Records:
    """A record each line that is not blank."""
    return _of_lines(_numbered(content, file.path), file)


def read_json(content: BufferedReader, file: File) -> Records:
    """A list of records, one record, or a record each line."""
    if content.peek(1).lstrip()[:1] == b"[":
        for i, (at, part) in enumerate(_elements(content, file.path), 1):
            yield attempt(from_json, part, file, at, f", record {i}")
        return
    lines = _numbered(content, file.path)
    number, line = next((one for one in lines if one[1].strip()), (1, b""))
    if not line:
        return
    first = attempt(from_json, line, file, number)
    if isinstance(first, NotJSON):  # it goes on in the next lines, or is broken
        data = line + content.read(LONGEST) + content.readline(LONGEST)
        whole = attempt(from_json, data, file, number)
        if not isinstance(whole, NotJSON) and not content.read(1):
            yield whole
            return
        lines = itertools.chain(enumerate(BytesIO(data), number), lines)
    else:
        yield first
    yield from _of_lines(lines, file)


def read_text(content: BufferedReader, file: File) -> Records:
    """A document, or several between lines that are `separator`, without the line end before it."""
    mark, text, first, is_cut = file.reading.separator.encode(), bytearray(), 1, False
    ends = _ENDS | ({mark} if mark else set())
    for number, line in enumerate(iter(lambda: content.readline(LONGEST + 1), b""), 1):
        if (word := line.strip()) in ends:
            if word == mark:
                yield from _cut(text, first, file)
                text, first, is_cut = bytearray(), number + 1, True
                continue
            file.tally.see(word.decode())
        text += line
        if len(text) > LONGEST:
            raise UserError(
                f"{file.path} has more than {LONGEST} bytes in one document; cut it into several,"
                f" with a line {file.reading.separator or END} between them, or make it a .jsonl"
            )
    if is_cut:
        yield from _cut(text, first, file)
    else:
        yield attempt(_from_text, bytes(text), file.path, 1, str(file.path))


def _cut(text: bytearray, first: int, file: File) -> Records:
    """One of several documents, unless it is blank."""
    if text.strip():
        file.tally.cut += 1
        content = bytes(text).removesuffix(b"\n").removesuffix(b"\r")
        yield attempt(_from_text, content, file.path, first, f"{file.path}, line {first}")


def _from_text(data: bytes, path: Path, first: int, where: str) -> Document:
    return Document(decode(data, path, first), where)


def _numbered(content: BufferedReader, path: Path) -> Iterator[tuple[int, bytes]]:
    """Every line and its number. Raises UserError for one that is longer than a document may be."""
    for number, line in enumerate(iter(lambda: content.readline(LONGEST + 1), b""), 1):
        check_length(line, path, number)
        yield number, line


def check_length(record: bytes, path: Path, line: int) -> None:
    if len(record) > LONGEST:
        raise UserError(
            f"{path}, line {line}: it has more than {LONGEST} bytes; cut the document into several"
        )


def _of_lines(lines: Iterable[tuple[int, bytes]], file: File) -> Records:
    for number, line in lines:
        if line.removeprefix(BOM).strip():
            yield attempt(from_json, line, file, number)


def _elements(content: BufferedReader, path: Path) -> Iterator[tuple[int, bytes]]:
    """The elements of a JSON list as they are written, and the lines in which they begin.

    Only strings, brackets and commas are looked at: no more than one element has to be in memory.
    """
    data, start, at, depth, line, counted = b"", 0, 0, 0, 1, 0
    is_open = False
    while more := content.read(min(max(_CHUNK, len(data)), LONGEST)):
        data += more
        for sign in _SIGNS.finditer(data, at):
            if sign[0] == b'"':  # a string that goes on behind what is read
                at = sign.start()
                break
            at = sign.end()
            depth += (sign[0] in (b"[", b"{")) - (sign[0] in (b"]", b"}"))
            if depth > 1 or (depth == 1 and is_open and sign[0] != b","):
                continue
            is_open = True
            if part := data[start : at - 1].strip():
                begin = data.index(part, start)
                line, counted = line + data.count(b"\n", counted, begin), begin
                yield line, part
            start = at
            if depth == 0:
                if sign[0] != b"]" or (data[at:] + content.read(_CHUNK)).strip():
                    raise UserError(f"{path}: something is wrong where its list of records ends")
                return
        else:
            at = len(data)
        line += data.count(b"\n", counted, start)
        data, at, start, counted = data[start:], at - start, 0, 0
        check_length(data, path, line)
    raise UserError(f"cannot read {path}: it ends inside a list; is the file complete?")


def attempt(make: Callable[..., Document], *arguments: Any) -> Document | BadRecord:
    """What is made, or the reason that there is none."""
    try:
        return make(*arguments)
    except BadRecord as bad:
        return bad


def from_json(data: bytes, file: File, line: int, part: str = "") -> Document:
    """The document of one JSON object. Raises BadRecord."""
    where = f"{file.path}, line {line}{part}"
    content = decode(data.removeprefix(BOM), file.path, line)
    if len(data) > _LARGE and len(_STRING.sub("", content)) > _LARGE:
        raise BadRecord(
            f"{where}: it has more than {_LARGE} bytes that are no text; keep only"
            f' "{file.reading.text_key}" or "{MESSAGES}"'
        )
    twice: set[str] = set()
    try:
        fields = json.loads(content, object_pairs_hook=partial(_object, twice))
    except (ValueError, RecursionError) as error:
        raise NotJSON(f"{where}: not JSON ({error}); {_expected(file.reading)}") from error
    key = file.reading.text_key
    if again := twice & {key, *key.split("."), MESSAGES, "role", "content"}:
        raise BadRecord(f'{where}: it has "{min(again)}" twice; expected it once: take one out')
    if not isinstance(fields, dict):
        raise NoDocument(f"{where}: got a JSON {type(fields).__name__}; {_expected(file.reading)}")
    return document_of(fields, where, file.reading)


def _object(twice: set[str], pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these pairs; keys that stand in it more than once are added to `twice`."""
    fields = dict(pairs)
    if len(fields) != len(pairs):
        counts = Counter(name for name, _ in pairs)
        twice.update(name for name, number in counts.items() if number > 1)
    return fields


def document_of(fields: Mapping[str, Any], where: str, reading: Reading) -> Document:
    """The document of an object or a row. What is null is not there. Raises BadRecord."""
    key = reading.text_key
    found = {name: _under(fields, name) for name in (key, MESSAGES)}
    if all(value is _NOTHING for value in found.values()):
        keys = ", ".join(map(str, fields))
        raise NoDocument(
            f'{where}: the object has no "{key}" and no "{MESSAGES}" (but {keys!r:.80});'
            f" {_expected(reading)}"
        )
    text, messages = (None if value is _NOTHING else value for value in found.values())
    if messages is None or key == MESSAGES:
        return Document(_checked_text(text, where, key), where)
    if text is not None:
        raise BadRecord(
            f'{where}: it has "{key}" and "{MESSAGES}"; expected one of them: take the other out'
        )
    checked = _checked_messages(messages, where)
    return Document("\n\n".join(one["content"] for one in checked), where, checked)


def _expected(reading: Reading) -> str:
    return f'expected JSON objects with a "{reading.text_key}" string or with "{MESSAGES}"'


def _under(fields: Any, key: str) -> Any:
    """What is under a key; under a.b: what is under b of that which is under a."""
    if key in fields:
        return fields[key]
    for part in key.split("."):
        if not isinstance(fields, Mapping) or part not in fields:
            return _NOTHING
        fields = fields[part]
    return fields


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
        raise BadRecord(f"{where}: {error}") from None
    if all(one["role"] != ASSISTANT for one in checked):
        roles = ", ".join(sorted({one["role"] for one in checked}))
        raise BadRecord(
            f"{where}: its messages are of {roles!r:.80}; expected one or more of the role"
            f" {ASSISTANT!r}, from which a model learns to answer"
        )
    return checked


def _checked_text(text: object, where: str, key: str) -> str:
    if not isinstance(text, str):
        raise BadRecord(f'{where}: "{key}" is a {type(text).__name__}; expected a string')
    try:
        text.encode()
    # JSON can spell half a surrogate pair, for which there is no UTF-8
    except UnicodeEncodeError as error:
        message = (
            f"{where}: the text is not Unicode (half a surrogate pair at character {error.start});"
            " repair the document"
        )
        raise BadRecord(message) from error
    return text


def decode(data: bytes, path: Path, first_line: int) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = first_line + data[: error.start].count(b"\n")
        raise BadRecord(
            f"{path}, line {line}: not UTF-8 (byte 0x{data[error.start]:02x}); convert the file to"
            " UTF-8"
        ) from error
