"""Ctrl-C at any moment of a command ends it in one line, whatever code is running.

Python raises KeyboardInterrupt wherever its main thread stands. In two places that does harm. In an
import, compiled modules turn it into other errors, or crash. While a verb imports its modules
nothing has begun, so the process ends at once; in any other import the interrupt is sent again
later. And code that the garbage collector or C calls throws the exception away: it is sent again
too. Before `catch` is called, Python behaves as usual.
"""

import os
import signal
import sys
import threading
from collections.abc import Sequence
from types import FrameType
from typing import Any

INTERRUPTED = 130  # the exit status
AGAIN = 0.05  # seconds until an interrupt that was put off or thrown away is sent again
TOLD = "flexolmo: interrupted"
_IMPORTING = "<frozen importlib"  # what the files of Python's import machinery are called

_raised = threading.Event()


def catch(command: Sequence[str]) -> None:
    """From now on Ctrl-C raises KeyboardInterrupt in the main thread where that is safe.

    `command`: the Python files that only choose what to do; what they import is imported before
    anything has begun. Where the parent process ignores the signal, as for jobs in the background,
    it stays ignored.
    """
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    ):
        return
    signal.signal(signal.SIGINT, lambda _, frame: _interrupt(frame, command))
    report = sys.unraisablehook

    def thrown_away(unraisable: Any) -> None:
        if isinstance(unraisable.exc_value, KeyboardInterrupt):
            _put_off()
        else:
            report(unraisable)

    sys.unraisablehook = thrown_away


def was_raised() -> bool:
    """Whether a KeyboardInterrupt has been raised: other code may have turned it into the error
    that comes up afterwards."""
    return _raised.is_set()


def _interrupt(frame: FrameType | None, command: Sequence[str]) -> None:
    files = []  # of the functions that are running, the outermost first
    while frame is not None:
        files.insert(0, frame.f_code.co_filename)
        frame = frame.f_back
    first = next((number for number, file in enumerate(files) if file.startswith(_IMPORTING)), None)
    if first is None:
        _raised.set()
        raise KeyboardInterrupt
    if files[first - 1] not in command:
        _put_off()
        return
    os.write(2, f"{TOLD}\n".encode())
    os._exit(INTERRUPTED)


def _put_off() -> None:
    timer = threading.Timer(AGAIN, os.kill, (os.getpid(), signal.SIGINT))
    timer.daemon = True
    timer.start()
