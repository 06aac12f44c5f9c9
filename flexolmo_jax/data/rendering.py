"""Renders the Jinja templates of strangers, in a process of their own.

A template runs in Jinja's immutable sandbox: it reaches no attribute that begins with an underscore
and changes no value. A sandbox does not bound time and memory: `{{ 9 ** 999999999 }}`, or text that
doubles itself, would take all there is. So the process that renders (rendering_process.py) has
bounds on its CPU time and its memory. Each call starts one.
"""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PROGRAM = Path(__file__).with_name("rendering_process.py")
SECONDS = 10  # of CPU time, for starting Python too
WAIT = 120  # seconds, as the machine may be busy
MIB = 1024  # of memory; macOS does not bound it
CHARACTERS = 1 << 24  # of what is rendered


class TemplateError(Exception):
    """A template is malformed, refuses its input, or takes too much. The text says which."""


def render(template: str, *variables: Mapping[str, Any]) -> list[str | None]:
    """The texts that a template makes of JSON values, once for each set of them.

    Raises TemplateError where the first cannot be rendered; another one's text is then None.
    """
    return _answer({"template": template, "variables": variables})


def check_syntax(template: str) -> None:
    """Raises TemplateError for a template that Jinja cannot read. Renders nothing."""
    _answer({"template": template, "variables": ()})


def _answer(request: dict[str, Any]) -> list[str | None]:
    # -P: a module of the standard library is not the one of its name beside the program
    command = [sys.executable, "-P", str(PROGRAM), str(SECONDS), str(MIB), str(CHARACTERS)]
    content = json.dumps(request).encode()
    try:
        done = subprocess.run(command, input=content, capture_output=True, timeout=WAIT)
    except subprocess.TimeoutExpired:
        raise TemplateError(f"it takes more than {WAIT} seconds") from None
    except OSError as error:
        raise TemplateError(f"Python cannot be started to render it: {error}") from None
    if done.returncode < 0:  # ended by a signal
        raise TemplateError(f"it takes more than {SECONDS} seconds or {MIB} MiB")
    if done.returncode:
        told = done.stderr.decode(errors="replace").strip().splitlines()
        raise TemplateError(f"it cannot be rendered: {told[-1] if told else 'no reason given'}")
    answer = json.loads(done.stdout)
    if "error" in answer:
        raise TemplateError(answer["error"])
    return answer["texts"]
