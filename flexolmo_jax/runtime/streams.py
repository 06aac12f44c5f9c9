"""What a command prints to."""

import io
import os
import sys


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
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
