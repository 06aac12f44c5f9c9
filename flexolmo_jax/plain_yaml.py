"""YAML, in whoever's file: small, of few levels, every key once. All YAML of the package is read
here.

    parse_yaml(b"lr: 1.5")                 # {"lr": 1.5}: numbers and dates as in YAML 1.1
    parse_yaml(b"lr: 1.5", strings=True)   # {"lr": "1.5"}: `no` and `1` are names too

Refused are aliases, which make gigabytes of a few lines, and tags, which make objects.
"""

from pathlib import Path
from typing import Any

import yaml

from flexolmo_jax.errors import UserError

LIMIT = 1 << 18  # bytes; a config of a thousand sources has fewer
DEPTH = 32  # levels of nesting
NUMBER = 100  # characters; digits to the base of 60 take quadratic time


def read_yaml(path: Path) -> dict[Any, Any]:
    """The sections of a YAML file, {} for nothing. Raises UserError for what is no regular file
    (nor a link to one), or no such YAML."""
    try:
        if path.exists() and not path.is_file():  # a pipe would wait for ever, a device never end
            raise UserError(f"{path} is not a regular file; expected a YAML file")
        with path.open("rb") as file:
            tree = parse_yaml(file.read(LIMIT + 1)) or {}
    except FileNotFoundError:
        raise UserError(f"no config at {path}; expected a YAML file") from None
    except OSError as error:
        raise UserError(
            f"cannot read {path}: {error.strerror or error}; expected a YAML file"
        ) from None
    except ValueError as error:
        raise UserError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path} holds {tree!r:.80}; expected sections with keys")
    return tree


def parse_yaml(text: bytes | str, *, strings: bool = False) -> Any:
    """Mappings, lists and values; of `strings`, values and keys are all strings. Raises ValueError,
    in one line, for anything else."""
    if len(text) > LIMIT:
        raise ValueError(f"it has more than {LIMIT} bytes")
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8")  # yaml would guess UTF-16 too
        return yaml.load(text, _Strings if strings else _Values)
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise ValueError(" ".join(str(error).split())[:200]) from None


class _Bounded:
    """What is refused while a document is read, before anything is made of it."""

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


class _Strings(_Bounded, yaml.BaseLoader): ...


class _Values(_Bounded, yaml.SafeLoader):
    def construct_scalar(self, node: Any) -> Any:
        if (
            node.tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
            and len(node.value) > NUMBER
        ):
            raise ValueError(
                f"a number has {len(node.value)} characters; expected at most {NUMBER}"
            )
        return super().construct_scalar(node)
