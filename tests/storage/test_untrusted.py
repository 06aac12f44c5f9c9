"""What is read of strangers' files: within bounds, once, and as one thing only."""

import json
from dataclasses import dataclass
from typing import Annotated, Any

import pytest
from pydantic import Field

from flexolmo_jax.errors import UserError
from flexolmo_jax.storage.untrusted import DEPTH, conform, parse_json, read_bytes


def test_a_file_is_read_up_to_its_limit_and_not_a_byte_further(tmp_path):
    (tmp_path / "file").write_bytes(b"12345")
    assert read_bytes(tmp_path / "file", 5) == b"12345"
    with pytest.raises(UserError, match="has 5 bytes; expected at most 4"):
        read_bytes(tmp_path / "file", 4)


def nested(levels: int) -> bytes:
    return b"[" * levels + b"]" * levels


def test_as_many_levels_as_are_let_in_are_read_and_no_more():
    assert parse_json(nested(DEPTH))
    for text in (
        nested(DEPTH + 1),
        nested(100_000),
        b'{"a":' * (DEPTH + 1) + b"1" + b"}" * (DEPTH + 1),
    ):
        with pytest.raises(ValueError, match=f"more than {DEPTH} levels"):
            parse_json(text)


def test_as_many_signs_as_are_let_in_are_read_and_no_more():
    for text in (b"[1,{}]", "[1,{}]"):
        assert parse_json(text, 3) == [1, {}]
        with pytest.raises(ValueError, match="has 3 commas and brackets; expected at most 2"):
            parse_json(text, 2)


@pytest.mark.parametrize(
    "text",
    [b'{"a":1,"a":1}', b'[{"a":1,"\\u0061":2}]', b"NaN", b"Infinity", b"[-Infinity]", b"1e999",
    b"[-1e999]", b"-0", b'"\\ud800"',
     b'{"\\uDfff":1}', b"\xff", b"\xef\xbb\xbf1", "1".encode("utf-16"), b"1 2", b"", b"01"],
)  # fmt: skip
def test_json_that_others_could_read_differently_is_refused(text):
    with pytest.raises(ValueError):
        parse_json(text)


@pytest.mark.parametrize(
    "text",
    [
        b'{"a":1,"b":1}',
        b"1e308",
        b"-0.0",
        b'"\\ud83d\\ude00"',
        b'"\\\\ud800"',
        "é".encode().join([b'"', b'"']),
    ],
)
def test_json_that_says_one_thing_is_read(text):
    assert parse_json(text) == json.loads(text)


@dataclass(frozen=True)
class Schema:
    count: Annotated[int, Field(ge=1, lt=10)]
    share: float = 0.0


@pytest.mark.parametrize("value", [{"count": 1}, {"count": 9, "share": 1}])
def test_what_conforms_is_let_in(value):
    conform(Schema, value)


@pytest.mark.parametrize(
    "value", [{}, [], None, {"count": 0}, {"count": 10}, {"count": "1"}, {"count": True},
    {"count": 1.0}, {"count": 1, "more": 1},
              {"count": 1, "share": "0.5"}, {"count": 1, "share": None}, {"count": 1,
              "\x1b[2J": 1}],
)  # fmt: skip
def test_what_does_not_conform_is_told_in_a_line(value: Any):
    with pytest.raises(ValueError) as error:
        conform(Schema, value)
    assert "\n" not in str(error.value) and "\x1b" not in str(error.value)
