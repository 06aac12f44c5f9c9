"""Ends a process that makes no progress: a peer that lives but does not answer, a device or a file
system that hangs.

Before it does, it writes where every thread stands to stderr.
"""

import faulthandler
import os
import sys
import threading
import time

from flexolmo_jax.runtime.processes import PEER_LOST

LONGEST = 3600.0  # seconds: to compile, to evaluate, to save


class Watchdog:
    """A context manager with a thread. Each `expect` says by when the next one comes at the
    latest."""

    def __init__(self) -> None:
        self._deadline, self._doing = float("inf"), ""
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def expect(self, doing: str, seconds: float) -> None:
        """From now on the process does something that takes less than so many seconds; 0: nobody
        knows, but not an hour."""
        seconds = seconds or LONGEST
        self._doing = f"{doing} took more than {seconds:g} s"
        self._deadline = time.monotonic() + seconds

    def _watch(self) -> None:
        while not self._over.wait(0.2):
            if time.monotonic() > self._deadline:
                print(
                    f"flexolmo: {self._doing}; this process ends here. Its threads:",
                    file=sys.stderr,
                    flush=True,
                )
                faulthandler.dump_traceback(all_threads=True)
                os._exit(PEER_LOST)
