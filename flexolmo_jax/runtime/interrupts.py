"""Ctrl-C at any moment of a command ends it in one line, whatever code is running. So do the other
signals by which a system ends a program.

Python raises KeyboardInterrupt wherever its main thread stands. In two places that does harm. In an
import, compiled modules turn it into other errors, or crash. While a verb imports its modules
nothing has begun, so the process ends at once; in any other import the interrupt is sent again
later. And code that the garbage collector or C calls throws the exception away: it is sent again
too. Before `catch` is called, Python behaves as usual.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from types import FrameType
from typing import Any

INTERRUPTED, HUNG_UP, PREEMPTED = 130, 129, 42  # exit statuses
# The signals that ask a program to end, by the exit status. Some batch systems send SIGUSR1,
# SIGUSR2 or SIGXCPU before the time is up. SIGQUIT is left to who wants an end without more ado.
ENDING = {
    signal.SIGINT: INTERRUPTED,
    signal.SIGHUP: HUNG_UP,
    signal.SIGTERM: PREEMPTED,
    signal.SIGUSR1: PREEMPTED,
    signal.SIGUSR2: PREEMPTED,
    signal.SIGXCPU: PREEMPTED,
}
AGAIN = 0.05  # seconds until an interrupt that was put off or thrown away is sent again
UNWINDING = 10.0  # seconds for which the next of these signals, but for Ctrl-C, changes nothing
_IMPORTING = "<frozen importlib"  # what the files of Python's import machinery are called

_raised: list[tuple[int, float]] = []  # the last signal that ended something, and when


class Ended(KeyboardInterrupt):
    """A signal that asks the program to end."""

    def __init__(self, number: int = signal.SIGINT):
        super().__init__()
        self.number = signal.Signals(number)

    @property
    def status(self) -> int:
        return ENDING[self.number]

    @property
    def told(self) -> str:
        """What stands on stderr at the end."""
        if self.number == signal.SIGINT:
            return "flexolmo: interrupted"
        return f"flexolmo: stopped by {self.number.name}"


def catch(command: Sequence[str]) -> None:
    """From now on Ctrl-C raises KeyboardInterrupt in the main thread where that is safe, and the
    other signals of ENDING do so too.

    `command`: the Python files that only choose what to do; what they import is imported before
    anything has begun. A signal that the parent process ignores, as nohup and jobs in the
    background do, stays ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    for number in filter(is_default, ENDING):
        signal.signal(number, lambda number, frame: _interrupt(number, frame, command))
    report = sys.unraisablehook

    def thrown_away(unraisable: Any) -> None:
        if isinstance(unraisable.exc_value, KeyboardInterrupt):
            _put_off(getattr(unraisable.exc_value, "number", signal.SIGINT))
        else:
            report(unraisable)

    sys.unraisablehook = thrown_away


def is_default(number: int) -> bool:
    """Whether a signal does what it does in any Python program."""
    return signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)


def is_ours(number: int) -> bool:
    """Whether `catch` has taken a signal."""
    return getattr(signal.getsignal(number), "__module__", "") == __name__


def raised() -> Ended | None:
    """The last signal that was raised: other code may have turned it into the error that comes up
    afterwards."""
    return Ended(_raised[0][0]) if _raised else None


def _interrupt(number: int, frame: FrameType | None, command: Sequence[str]) -> None:
    if number != signal.SIGINT and _raised and time.monotonic() - _raised[0][1] < UNWINDING:
        return
    files = []  # of the functions that are running, the outermost first
    while frame is not None:
        files.insert(0, frame.f_code.co_filename)
        frame = frame.f_back
    first = next((number for number, file in enumerate(files) if file.startswith(_IMPORTING)), None)
    if first is None:
        _raised[:] = [(number, time.monotonic())]
        raise Ended(number)
    if files[first - 1] not in command:
        _put_off(number)
        return
    ended = Ended(number)
    with contextlib.suppress(OSError):  # the terminal may be gone
        os.write(2, f"{ended.told}\n".encode())
    os._exit(ended.status)


def _put_off(number: int) -> None:
    _raised.clear()
    timer = threading.Timer(AGAIN, os.kill, (os.getpid(), number))
    timer.daemon = True
    timer.start()
