"""Progress bars and notes, all on stderr, so that stdout carries results only."""

import contextlib
import functools
import sys
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.filesize import decimal
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from flexolmo_jax.errors import printable

# Where FORCE_COLOR is set, as Jupyter does for commands, rich takes a pipe for a terminal.
console = Console(
    stderr=True, highlight=False, force_terminal=sys.stderr is not None and sys.stderr.isatty()
)


def note(message: str) -> None:
    """Prints one line on stderr, above any bar that is running."""
    console.print(printable(message), markup=False, soft_wrap=True)


@functools.cache
def note_once(message: str) -> None:
    """The same, but only the first time that a command says it."""
    note(message)


@contextlib.contextmanager
def bar(
    description: str, total: float | None, *, in_bytes: bool = False
) -> Iterator[Callable[..., None]]:
    """A progress bar; yields `advance(n=1, text="")`, where text is shown after the bar (a loss).
    Bytes are shown with their rate.

    A terminal shows a bar. A file or a pipe gets a line after about every tenth. A quiet console
    shows nothing.
    """
    if console.quiet:
        yield lambda n=1, text="": None
    elif console.is_terminal:
        with _drawn(printable(description), total, in_bytes) as draw:
            yield draw
    else:
        yield _in_lines(printable(description), total, in_bytes)


@contextlib.contextmanager
def _drawn(description: str, total: float | None, in_bytes: bool) -> Iterator[Callable[..., None]]:
    count = (DownloadColumn(), TransferSpeedColumn()) if in_bytes else (MofNCompleteColumn(),)
    title = TextColumn("{task.description}", markup=False)
    after = TextColumn("{task.fields[text]}", markup=False)
    columns = (title, BarColumn(), *count, TimeRemainingColumn(), after)
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(description, total=total, text="")

        def draw(n: float = 1, text: str | None = None) -> None:
            if text is None:
                progress.advance(task, n)
            else:
                progress.update(task, advance=n, text=printable(text))

        yield draw


def _in_lines(description: str, total: float | None, in_bytes: bool) -> Callable[..., None]:
    done, written, start = 0.0, 0, time.monotonic()

    def write(n: float = 1, text: str | None = None) -> None:
        nonlocal done, written
        done += n
        if not total or done * 10 // total <= written:
            return
        written = int(done * 10 // total)
        if in_bytes:
            rate = done / max(time.monotonic() - start, 1e-3)
            text = f"of {decimal(int(total))}, {decimal(int(rate))}/s {text or ''}"
        line = f"{description}: {min(done / total, 1):.0%} {printable(text or '')}".rstrip()
        print(line, file=sys.stderr, flush=True)

    return write
