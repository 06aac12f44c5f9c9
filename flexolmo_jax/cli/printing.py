"""A verb's result on stdout."""

import errno
import json
import os
import sys
from typing import Any

from flexolmo_jax.errors import printable


def show(result: dict[str, Any], as_json: bool) -> None:
    """Prints a verb's result. Raises OSError where that cannot be written."""
    if sys.stdout is None:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))
    if as_json:
        print(json.dumps(result))
    elif "text" in result:
        print(for_terminal(result["text"]))
    else:
        from .lines import text_of

        print(text_of(_printable(json.loads(json.dumps(result)))), end="")
    sys.stdout.flush()


def for_terminal(text: str) -> str:
    """A model's own words. A file or a pipe gets them as they are; in a terminal no escape takes
    effect."""
    return printable(text, keep="\n\t") if sys.stdout and sys.stdout.isatty() else text


def _printable(value: Any) -> Any:
    """The value with its words printable, and six digits of its numbers."""
    if isinstance(value, dict):
        return {printable(key): _printable(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_printable(inner) for inner in value]
    if isinstance(value, float):
        return float(f"{value:.6g}")
    return printable(value) if isinstance(value, str) else value
