"""Tables as records: CSV, TSV and Parquet. A column is a key (formats.py)."""

import csv
from collections.abc import Callable, Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO

from flexolmo_jax.errors import UserError
from flexolmo_jax.storage.paths import size_of

from .formats import (
    LONGEST,
    MESSAGES,
    BadRecord,
    Document,
    File,
    NoDocument,
    Records,
    attempt,
    decode,
    document_of,
)

_FIELDS = 1 << 22  # of a record: each takes more memory than its bytes


def read_csv(content: BufferedReader, file: File) -> Records:
    """The records of a table whose first one names the columns; fields in quotes may hold lines."""
    return _read(content, file, ",")


def read_tsv(content: BufferedReader, file: File) -> Records:
    """The same with tabs between fields."""
    return _read(content, file, "\t")


def _read(content: BufferedReader, file: File, delimiter: str) -> Records:
    csv.field_size_limit(LONGEST)
    lines = _Lines(content, file.path, delimiter)
    records = csv.reader(lines, delimiter=delimiter, strict=True)
    column: int | None = None
    width, line = 0, 1
    while True:
        try:
            fields = next(records, None)
        except csv.Error as error:
            if "end of data" in str(error) or "field limit" in str(error):
                raise UserError(
                    f"{file.path}, line {line}: a field in quotes does not end ({error}); is the"
                    " file complete?"
                ) from error
            yield BadRecord(f"{file.path}, line {line}: {error}; put quotes around the field")
        else:
            if fields is None:
                return
            if column is None and fields:
                column, width = _column(fields, file), len(fields)
            elif fields:
                yield attempt(_document, fields, column, width, file, line)
        lines.end_record()
        line = lines.number + 1


class _Lines:
    """Lines of text, within the bounds of a document. What is not UTF-8 is told of its record."""

    def __init__(self, content: BufferedReader, path: Path, delimiter: str):
        self._content, self._path, self._delimiter = content, path, delimiter.encode()
        self.number = self._size = self._fields = 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        if not (line := self._content.readline(LONGEST + 1)):
            raise StopIteration
        self.number += 1
        self._size += len(line)
        self._fields += line.count(self._delimiter)
        if self._size > LONGEST or self._fields > _FIELDS:
            raise UserError(
                f"{self._path}, line {self.number}: its record has more than {LONGEST} bytes or"
                f" {_FIELDS} {self._delimiter.decode()!r}; cut the document into several"
            )
        return line.decode("utf-8", "surrogateescape")

    def end_record(self) -> None:
        self._size = self._fields = 0


def _column(names: list[str], file: File) -> int:
    """Where the text is. Raises NoDocument."""
    key = file.reading.text_key
    if names.count(key) != 1:
        raise NoDocument(
            f"{file.path} is a table of an unknown kind: it has the columns"
            f" {', '.join(names)!r:.120}; expected one named {key!r}"
        )
    return names.index(key)


def _document(fields: list[str], column: int, width: int, file: File, line: int) -> Document:
    where = f"{file.path}, line {line}"
    if len(fields) != width:
        raise BadRecord(f"{where}: got {len(fields)} fields; expected {width}, as its first line")
    text = fields[column].encode("utf-8", "surrogateescape")
    return Document(decode(text, file.path, line), where)


def read_parquet(raw: BinaryIO, file: File, advance: Callable[[int], Any]) -> Records:
    """The records of a Parquet file; `advance` is called with bytes, as `documents_in` does."""
    path, key = file.path, file.reading.text_key
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"reading {path} needs the package pyarrow: pip install pyarrow") from error
    size, number = size_of(path), 0
    try:
        with pyarrow.parquet.ParquetFile(raw) as table:
            names = table.schema_arrow.names
            columns = [k for k in (key, MESSAGES) if k in names or k.partition(".")[0] in names]
            twice = [k for k in columns if max(map(names.count, (k, k.partition(".")[0]))) > 1]
            if twice or not columns:
                raise NoDocument(
                    f"{path} has the columns {', '.join(names)}; expected one named"
                    f' "{key}" or "{MESSAGES}"'
                )
            for batch in table.iter_batches(batch_size=32, columns=columns):
                for record in batch.to_pylist():
                    number += 1
                    yield attempt(document_of, record, f"{path}, document {number}", file.reading)
                advance(size * batch.num_rows // table.metadata.num_rows)
    except pyarrow.ArrowException as error:
        raise UserError(
            f"cannot read {path}: {str(error).splitlines()[0]}; is the file complete?"
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}, after document {number}: not UTF-8; convert the column to UTF-8"
        ) from error
