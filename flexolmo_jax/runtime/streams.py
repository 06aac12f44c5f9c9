"""What a command prints to."""

import contextlib
import io
import os
import sys


class _Lasting(io.TextIOWrapper):
    """A stream for progress and notes. Work goes on without them where the terminal, or who reads
    the pipe, is gone."""

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            super().write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            super().flush()


def set_streams() -> None:
    """For a command of its own, before it opens anything: what it cannot spell in the terminal's
    encoding it spells out, and where it was started with a stream closed, the stream's number leads
    nowhere: the next file would get it, and a library's warnings with it."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w")
    if isinstance(sys.stderr, io.TextIOWrapper):
        encoding = sys.stderr.encoding
        sys.stderr = sys.__stderr__ = _Lasting(
            sys.stderr.detach(), encoding, errors="backslashreplace", line_buffering=True
        )
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
