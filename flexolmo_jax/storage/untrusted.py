"""Files of strangers: read within bounds, parsed strictly, checked against one schema each.

    text = read_bytes(path, limit)          # a regular file, no link, of so many bytes at most
    value = parse_json(text)                # every key once, finite numbers, few levels
    conform(Schema, value)                  # a dataclass: which keys, types and bounds

Nothing is allocated before the size of it is known, and whatever is wrong raises `UserError`,
OSError or ValueError.
"""

import functools
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flexolmo_jax.errors import UserError
from flexolmo_jax.storage.paths import open_regular, size_of

# bytes of a description; one of 64 experts, 100 layers and all digests has 6 MB
JSON_LIMIT = 1 << 24
DEPTH = 32  # levels of nesting


def read_bytes(path: Path, limit: int = JSON_LIMIT) -> bytes:
    """All of a small file. Raises OSError for what is no regular file, UserError for one of more
    than `limit` bytes."""
    with open_regular(path) as file:
        text = file.read(limit + 1)
    if len(text) > limit:
        raise UserError(f"{path} has {size_of(path)} bytes; expected at most {limit}")
    return text


def parse_json(text: bytes | str, signs: int | None = None, keys: int | None = None) -> Any:
    """JSON in UTF-8 that says everything once. Raises ValueError for anything else, deep nesting,
    numbers that are not finite.

    `signs` is how many commas and brackets it may have: each may take 500 bytes of memory, which no
    limit on the file's own bytes tells. `keys` is how many an object may have: a schema takes a
    kilobyte for each that does not belong.
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
        # Half a surrogate pair is no Unicode; UnicodeEncodeError is a ValueError.
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
        groups = [
            outer.values() if isinstance(outer, dict) else outer
            for outer in level
            if isinstance(outer, dict | list)
        ]
        level = [inner for group in groups for inner in group]
        if not level:
            return
    raise ValueError(f"it has more than {DEPTH} levels")


@contextmanager
def no_panic(what: str) -> Iterator[None]:
    """Around calls of libraries written in Rust. Their panics, which are no Exception of Python's,
    become a UserError that names `what`."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise UserError(f"{what} makes its library fail: {error!s:.100}; do not use it") from None


def conform(schema: type, value: Any) -> None:
    """Raises ValueError, in one line, unless a value of JSON's types is what a dataclass says: its
    keys and no others, types, bounds.

    Bounds are written as pydantic's: `Annotated[int, Field(ge=1)]`. Types are taken strictly: "1"
    and true are no integers.
    """
    import pydantic

    try:
        _adapter(schema).validate_json(json.dumps(value), strict=True, extra="forbid")
    except pydantic.ValidationError as error:
        if (mistakes := error.error_count()) > 1000:
            # to list them would take a minute
            raise ValueError(f"it has {mistakes} keys and values that do not belong") from None
        first = error.errors(include_url=False)[0]
        # pydantic's own words have brackets
        where = ".".join(str(part) for part in first["loc"] if "[" not in str(part)) or "it"
        where, message = (
            where[:120] if where.isprintable() else repr(where[:120]),
            first["msg"].removeprefix("Value error, "),
        )
        got = "" if isinstance(first["input"], dict | list) else f", got {first['input']!r:.40}"
        raise ValueError(f"{where}: {message[:120]}{got}") from None


@functools.cache
def _adapter(schema: type) -> Any:
    import pydantic

    return pydantic.TypeAdapter(schema)
