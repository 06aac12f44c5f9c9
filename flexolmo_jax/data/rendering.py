"""Renders the Jinja templates of strangers, in a process of their own.

A template runs in Jinja's immutable sandbox: it reaches no attribute that begins with an underscore
and changes no value. A sandbox does not bound time and memory: `{{ 9 ** 999999999 }}`, or text that
doubles itself, would take all there is. So the process that renders (rendering_process.py) has
bounds on its CPU time and its memory. Each call starts one, for all that it is given; where that is
too much for one, the halves have a process each, and so on.
"""

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

PROGRAM = Path(__file__).with_name("rendering_process.py")
SECONDS = 10  # of CPU time, for starting Python too
WAIT = 120  # seconds, as the machine may be busy
MIB = 1024  # of memory; macOS does not bound it
CHARACTERS = 1 << 24  # of what is rendered


class TemplateError(Exception):
    """A template is malformed, refuses its input, or takes too much. The text says which."""


class Asked(NamedTuple):
    """What a template is to render.

    `beginnings`: how many of the messages, and whether the model speaks next. Is what they give a
    beginning of the text? `around`: what stands before and behind that which the template marks
    with `{% generation %}`.
    """

    variables: Mapping[str, Any]
    beginnings: Sequence[tuple[int, bool]] = ()
    around: tuple[str, str] = ("", "")


class Rendered(NamedTuple):
    """A text, and how long its beginnings are: None for what is none."""

    text: str
    beginnings: list[int | None]


def render(template: str, *variables: Mapping[str, Any]) -> list[str | None]:
    """The texts that a template makes of JSON values, once for each set of them.

    Raises TemplateError where the first cannot be rendered; another one's text is then None.
    """
    first, *others = _answer(template, [Asked(each) for each in variables], "")
    if isinstance(first, TemplateError):
        raise first
    return [first.text, *(one.text if isinstance(one, Rendered) else None for one in others)]


def render_all(
    template: str, asked: Sequence[Asked], date: str = ""
) -> Iterator[Rendered | TemplateError]:
    """What a template makes of each, or why it makes nothing, in order.

    `date`: the day that a template is told (as 2024-07-26); today where it is empty.
    """
    try:
        yield from _answer(template, asked, date)
    except TemplateError as error:
        if len(asked) < 2:
            yield error
            return
        for half in (asked[: len(asked) // 2], asked[len(asked) // 2 :]):
            yield from render_all(template, half, date)


def check_syntax(template: str) -> None:
    """Raises TemplateError for a template that Jinja cannot read. Renders nothing."""
    _answer(template, (), "")


def _answer(template: str, asked: Sequence[Asked], date: str) -> list[Rendered | TemplateError]:
    # -P: a module of the standard library is not the one of its name beside the program
    command = [sys.executable, "-P", str(PROGRAM), str(SECONDS), str(MIB), str(CHARACTERS)]
    request = {"template": template, "date": date, "asked": [one._asdict() for one in asked]}
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
    return [
        TemplateError(one["error"]) if "error" in one else Rendered(**one)
        for one in answer["rendered"]
    ]
