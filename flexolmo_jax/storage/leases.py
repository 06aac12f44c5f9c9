"""Who writes where, and leases: what keeps processes apart in a bucket, which has no locks.

A lease is an object that says who holds it. The holder writes it anew every RENEWED seconds. Who
finds one looks for the process, where that is one of this machine, and else watches the object: it
is refused once the lease is renewed, and takes over what is not renewed for EXPIRED seconds. No two
clocks are compared.
"""

import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from flexolmo_jax.errors import UserError, printable
from flexolmo_jax.runtime.processes import PEER_LOST
from flexolmo_jax.runtime.progress import note
from flexolmo_jax.storage.paths import file_system

RENEWED, EXPIRED = 20.0, 120.0  # seconds
LOOKED_AT = 1.0  # seconds between two looks at somebody else's lease


class Holder(NamedTuple):
    """A process that writes somewhere."""

    host: str
    pid: int
    since: str
    machine: str = ""  # as it was booted, with the numbering of its processes, if that is known
    started: str = ""  # the process, in the system's ticks, if that is known
    token: str = ""  # of this very lock

    @classmethod
    def this(cls) -> "Holder":
        """This process, with a new token."""
        since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
        pid = os.getpid()
        return cls(
            socket.gethostname(), pid, since, _machine(), _started(pid), token=uuid.uuid4().hex
        )

    @classmethod
    def read(cls, content: bytes) -> "Holder":
        """What `written` wrote. Of anything else, nobody in particular."""
        try:
            said = json.loads(content)
            return cls(**{key: cls.__annotations__[key](said[key]) for key in cls._fields})
        except (ValueError, TypeError, KeyError, RecursionError):
            return cls("a host that is not known", 0, "some time ago")

    def written(self) -> bytes:
        """For a lock; never the same twice."""
        return json.dumps(self._asdict() | {"renewed": time.time_ns()}).encode()

    def refusal(self, place: Path) -> str:
        """What a user is told who wants to write there too."""
        return (
            f"{place} is being written by another process (pid {self.pid} on"
            f" {printable(self.host):.80}, since {printable(self.since):.30}); wait until it ends,"
            " or stop it"
        )

    def is_here(self) -> bool:
        """Whether it was a process of this machine, as it was booted last."""
        return bool(self.machine) and self.machine == _machine()

    def is_gone(self) -> bool:
        """Whether this process of this machine has ended."""
        return _started(self.pid) != self.started or self.pid == os.getpid()


def _machine() -> str:
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return ""


def _started(pid: int) -> str:
    with suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    return ""


@contextmanager
def leased(place: Path, lease: Path, is_ours: bool) -> Iterator[None]:
    """Holds the object `lease` for `place`. Without one where none can be written.

    `is_ours`: this very process has it, in another thread. Raises UserError where somebody else, or
    another thread, has it.
    """
    mine = Holder.this()
    try:
        _take(place, lease, mine, is_ours)
    except UserError:
        raise
    except Exception:  # gcsfs has errors of its own; what writes there says why it cannot
        yield
        return
    over = threading.Event()
    renewing = threading.Thread(target=_renew, args=(place, lease, mine, over), daemon=True)
    renewing.start()
    try:
        yield
    finally:
        over.set()
        renewing.join(RENEWED)
        with suppress(Exception):
            if _is(lease, mine):
                file_system().rm_file(str(lease))


def _take(place: Path, lease: Path, mine: Holder, is_ours: bool) -> None:
    while True:
        with suppress(FileExistsError):
            file_system().pipe_file(str(lease), mine.written(), mode="create")
            return
        if (content := _content(lease)) is None:  # removed in between
            continue
        holder = Holder.read(content)
        gone = not is_ours and holder.is_gone() if holder.is_here() else _expires(lease, content)
        if not gone:
            raise UserError(holder.refusal(place))
        with suppress(FileNotFoundError):
            file_system().rm_file(str(lease))


def _expires(lease: Path, content: bytes) -> bool:
    """Waits whether a lease is renewed."""
    note(f"{lease} is there; waiting at most {EXPIRED:g} s, to see whether its holder lives")
    end = time.monotonic() + EXPIRED
    while time.monotonic() < end:
        time.sleep(LOOKED_AT)
        if (now := _content(lease)) != content:
            return now is None
    return True


def _renew(place: Path, lease: Path, mine: Holder, over: threading.Event) -> None:
    while not over.wait(RENEWED):
        with suppress(Exception):  # of the network; the next time, then
            if not _is(lease, mine) and (content := _content(lease)) is not None:
                told = Holder.read(content).refusal(place)
                print(f"flexolmo: {told}; this process ends here", file=sys.stderr, flush=True)
                os._exit(PEER_LOST)  # both would write
            file_system().pipe_file(str(lease), mine.written())


def _is(lease: Path, mine: Holder) -> bool:
    return Holder.read(_content(lease) or b"").token == mine.token


def _content(lease: Path) -> bytes | None:
    with suppress(FileNotFoundError):
        return file_system().cat_file(str(lease))
    return None
