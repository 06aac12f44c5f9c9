"""Reads files that others made: within bounds, strictly, and each against a schema.

    text = read_bytes(path, limit)          # a regular file, no link, of at most `limit` bytes
    value = parse_json(text)                # every key once, finite numbers, few levels
    conform(Schema, value)                  # a dataclass with the keys, types and bounds

Sizes are checked before memory is allocated. Every mistake raises UserError, OSError or ValueError.
"""

import functools
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from flexolmo_jax.errors import UserError
from flexolmo_jax.storage.paths import open_regular, reason, size_of

JSON_LIMIT = 1 << 24  # bytes; a description of 64 experts and 100 layers has 6 MB
DEPTH = 32  # levels of nesting


def read_bytes(path: Path, limit: int = JSON_LIMIT) -> bytes:
    """The bytes of a small file.

    Raises OSError for anything but a regular file, UserError for more than `limit` bytes.
    """
    with open_regular(path) as file:
        text = file.read(limit + 1)
    if len(text) > limit:
        raise UserError(f"{path} has {size_of(path)} bytes; expected at most {limit}")
    return text


def open_others(path: Path) -> BinaryIO:
    """Opens a large file. Raises UserError for anything but a regular file."""
    try:
        return open_regular(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {reason(error)}; expected a regular file") from None


def parse_json(text: bytes | str, signs: int | None = None, keys: int | None = None) -> Any:
    """Parses strict JSON in UTF-8.

    Args:
        signs: the most commas and brackets. Each may take 500 bytes of memory when parsed, so a
            limit on the size of the file alone does not bound the memory.
        keys: the most keys of an object. Checking a schema takes a kilobyte per unknown key.

    Raises:
        ValueError: no JSON, a key given twice, deep nesting, or a number that is not finite.
    """
    if signs is not None:
        marks = (b",", b"{", b"[") if isinstance(text, bytes) else (",", "{", "[")
        if (found := sum(map(text.count, marks))) > signs:  # type: ignore[arg-type]
            raise ValueError(f"it has {found} commas and brackets; expected at most {signs}")
    if isinstance(text, bytes):
        text = text.decode("utf-8")  # json.loads would guess UTF-16 and UTF-32 too
    try:
        value = json.loads(
            text,
            object_pairs_hook=functools.partial(_object, keys),
            parse_constant=_constant,
            parse_float=_finite,
            parse_int=_integer,
        )
    except RecursionError:
        raise ValueError(f"it has more than {DEPTH} levels") from None
    _check_depth(value)
    if "\\ud" in text or "\\uD" in text:
        # Refuse half a surrogate pair, which is not Unicode: UnicodeEncodeError is a ValueError.
        json.dumps(value, ensure_ascii=False).encode()
    return value


def _object(keys: int | None, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if keys is not None and len(pairs) > keys:
        raise ValueError(f"an object has {len(pairs)} keys; expected at most {keys}")
    if len(found := dict(pairs)) != len(pairs):
        raise ValueError("a key is given twice")
    return found


def _constant(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _integer(number: str) -> int:
    if number == "-0":
        raise ValueError("-0 is no integer")
    return int(number)


def _finite(number: str) -> float:
    if not math.isfinite(value := float(number)):
        raise ValueError(f"{number[:20]} is beyond the largest number")
    return value


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(DEPTH):
        lists = [value for value in level if isinstance(value, list)]
        lists += [value.values() for value in level if isinstance(value, dict)]
        level = [inner for values in lists for inner in values]
        if not level:
            return
    raise ValueError(f"it has more than {DEPTH} levels")


@contextmanager
def no_panic(what: str) -> Iterator[None]:
    """Turns a panic of a library written in Rust into a UserError that names `what`.

    Such a panic is a BaseException, so `except Exception` would not catch it.
    """
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise UserError(f"{what} makes its library fail: {error!s:.100}; do not use it") from None


def conform(schema: type, value: Any) -> None:
    """Raises ValueError, in one line, unless a JSON value has a dataclass's keys, types and bounds.

    Other keys are refused. Bounds are pydantic's: `Annotated[int, Field(ge=1)]`. Types are strict:
    "1" and true are no integers.
    """
    import pydantic

    try:
        _adapter(schema).validate_json(json.dumps(value), strict=True, extra="forbid")
    except pydantic.ValidationError as error:
        if (mistakes := error.error_count()) > 1000:
            # listing them would take a minute
            raise ValueError(f"it has {mistakes} keys and values that do not belong") from None
        first = error.errors(include_url=False)[0]
        # parts with brackets are pydantic's own, and not keys of the file
        where = ".".join(str(part) for part in first["loc"] if "[" not in str(part)) or "it"
        where = where[:120] if where.isprintable() else repr(where[:120])
        message = first["msg"].removeprefix("Value error, ")
        got = "" if isinstance(first["input"], dict | list) else f", got {first['input']!r:.40}"
        raise ValueError(f"{where}: {message[:120]}{got}") from None


@functools.cache
def _adapter(schema: type) -> Any:
    import pydantic

    return pydantic.TypeAdapter(schema)
