"""Ends a process that makes no progress: its peer lives but does not answer, or a device or a file
system hangs.

Nothing else would end it: in a collective, Python waits inside XLA and sees no signal, and JAX's
heartbeats are sent by another thread, which still runs. First it writes the stacks of all threads
to stderr.
"""

import faulthandler
import os
import statistics
import sys
import threading
import time
from collections import deque

from flexolmo_jax.runtime.processes import PEER_LOST

# seconds; for compiling, first steps, evaluating and saving, whose time nobody can foresee
LONGEST = 3600.0
SLACK = 4.0  # times the median of the last steps: what a step may take
LAST = 9  # steps


class Watchdog:
    """A context manager with a thread. Each `expect` sets a deadline for the next."""

    def __init__(self, least: float = 0.0) -> None:
        """`least`: seconds that any step may take, however fast the steps before it were; 0:
        `LONGEST`."""
        self._deadline, self._doing = float("inf"), ""
        self._least = least or LONGEST
        self._steps: deque[float] = deque(maxlen=LAST)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def expect(self, doing: str, seconds: float = LONGEST) -> None:
        """What the process does from now on, and in how many seconds at most."""
        self._doing = f"{doing} took more than {seconds:g} s"
        self._deadline = time.monotonic() + seconds

    def expect_step(self, number: int) -> None:
        """The process waits for a step from now on."""
        usual = SLACK * statistics.median(self._steps) if self._steps else LONGEST
        self.expect(f"step {number}", max(self._least, usual))

    def measured(self, seconds: float) -> None:
        """What a step took, without compiling."""
        self._steps.append(seconds)

    def _watch(self) -> None:
        while not self._over.wait(0.2):
            if time.monotonic() > self._deadline:
                told = f"flexolmo: {self._doing}; this process ends here. Its threads:"
                print(told, file=sys.stderr, flush=True)
                faulthandler.dump_traceback(all_threads=True)
                # Python's own ending would wait for the thread that hangs.
                os._exit(PEER_LOST)
