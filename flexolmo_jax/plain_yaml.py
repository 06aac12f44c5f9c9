"""The one reader of YAML: files are small and shallow, and give every key once.

    parse_yaml(b"lr: 1e-3")                # {"lr": 0.001}: values as in YAML 1.2
    parse_yaml(b"lr: 1e-3", strings=True)  # {"lr": "1e-3"}: so that `true` and `1` can be names

YAML 1.1, as PyYAML reads it, takes `1:30` for 90, `017` for 15, and `on` and `no` for truth values.
Version 1.2 does not: its core schema has null, true and false, numbers in decimal, 0o and 0x.
Aliases are refused: a few lines of them expand to gigabytes. Tags are refused: they create objects.
"""

import os
import re
from pathlib import Path, PurePath
from typing import Any

import yaml

from flexolmo_jax.errors import UserError

LIMIT = 1 << 18  # bytes; a config with a thousand sources is smaller
DEPTH = 32  # levels of nesting
NUMBER = 100  # characters of a number
# Of the core schema of YAML 1.2 (section 10.3.2): what a value looks like, and what it begins with.
CORE = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    "float": (
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
}


def read_yaml(path: Path, what: str = "config") -> dict[Any, Any]:
    """The sections of a YAML file; an empty file has none. Errors call it `what`.

    Raises UserError for anything but a regular file, or a link to one, with such YAML.
    """
    if not isinstance(path, PurePath) or str(path).startswith("~"):  # from Python
        path = Path(os.path.expanduser(path))
    try:
        if path.exists() and not path.is_file():  # reading a pipe may never end
            raise UserError(f"{path} is not a regular file; expected a YAML file")
        with path.open("rb") as file:
            tree = parse_yaml(file.read(LIMIT + 1)) or {}
    except FileNotFoundError:
        raise UserError(f"no {what} at {path}; expected a YAML file") from None
    except OSError as error:
        said = error.strerror or error
        raise UserError(f"cannot read {path}: {said}; expected a YAML file") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path} holds {tree!r:.80}; expected sections with keys")
    return tree


def parse_yaml(text: bytes | str, *, strings: bool = False) -> Any:
    """The mappings, lists and values of a YAML text; with `strings`, all values stay strings.

    Raises ValueError, in one line, for anything else.
    """
    if len(text) > LIMIT:
        raise ValueError(f"it has more than {LIMIT} bytes")
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8")  # yaml would guess UTF-16 too
        return yaml.load(text, _Strings if strings else _Values)
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise ValueError(" ".join(str(error).split())[:200]) from None


class _Bounded:
    """Refuses aliases, tags and deep nesting while it reads, before any object is built."""

    _level = 0

    def compose_node(self: Any, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise ValueError("it has an alias (*name); write what it stands for")
        if event.tag is not None:
            raise ValueError(f"it has a tag ({event.tag[:40]!r}); write the value without it")
        if self._level == DEPTH:
            raise ValueError(f"it has more than {DEPTH} levels")
        self._level += 1
        node = super().compose_node(parent, index)  # type: ignore[misc]
        self._level -= 1
        return node

    def construct_mapping(self: Any, node: Any, deep: bool = False) -> Any:
        found = super().construct_mapping(node, deep)  # type: ignore[misc]
        if len(found) != len(node.value):
            raise ValueError("a key is given twice")
        return found


def to_yaml(tree: Any) -> str:
    """The YAML text of mappings, lists and values, which version 1.1 and 1.2 read alike."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False)


class _Strings(_Bounded, yaml.BaseLoader): ...


class _Values(_Bounded, yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - PyYAML's; filled in below

    def construct_yaml_int(self, node: Any) -> int:
        text = self.construct_scalar(node)
        return int(text, 0 if text.startswith(("0o", "0x")) else 10)

    def construct_scalar(self, node: Any) -> Any:
        is_number = node.tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
        if is_number and (length := len(node.value)) > NUMBER:
            raise ValueError(f"a number has {length} characters; expected at most {NUMBER}")
        return super().construct_scalar(node)


class _Dumper(yaml.SafeDumper):
    """Puts quotes around what either version would read as something else than text."""


for _name, (_pattern, _first) in CORE.items():
    for _class in (_Values, _Dumper):
        _tag = f"tag:yaml.org,2002:{_name}"
        _class.add_implicit_resolver(_tag, re.compile(f"^(?:{_pattern})$"), _first)
_Values.add_constructor("tag:yaml.org,2002:int", _Values.construct_yaml_int)
