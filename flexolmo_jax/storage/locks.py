"""Locks, which keep processes of one file system apart. What keeps them apart in a bucket is in
leases.py."""

import fcntl
import functools
import inspect
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import ParamSpec, TypeVar

from flexolmo_jax.errors import UserError
from flexolmo_jax.runtime.processes import by_the_first
from flexolmo_jax.storage import lacks
from flexolmo_jax.storage.leases import Holder, leased
from flexolmo_jax.storage.outputs import check_outside
from flexolmo_jax.storage.paths import LOCK, absolute, in_bucket

P = ParamSpec("P")
R = TypeVar("R")
_held: dict[Path, int] = {}  # what this process is alone at, and in which thread


@contextmanager
def locked(path: Path, *, shared: bool = False, wait: bool = True) -> Iterator[None]:
    """Holds the lock of a file or directory; the system releases it when the process ends.

    Without `wait`, raises OSError where another process holds it. Buckets and some file systems
    have no locks: the work there goes on without one.
    """
    if in_bucket(path):
        yield
        return
    how = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, how)
        except OSError as error:
            if not wait or error.errno not in lacks.LOCKS:
                raise
        yield
    finally:
        os.close(descriptor)


@contextmanager
def alone(place: Path) -> Iterator[None]:
    """Keeps other processes from writing the file or directory `place`, which need not exist yet.

    The lock is the file `.NAME.flexolmo-lock` beside it, which is removed at the end; the lock of a
    process that was killed holds nobody up. In a bucket it is a lease. Where neither can be had,
    the work goes on without. Of several processes of a run, the first has it for all. A thread may
    have it twice.

    Raises UserError at once where another process has it.
    """
    place = absolute(place)
    with ExitStack() as stack:
        by_the_first(lambda: stack.enter_context(_alone(place)))
        yield


def alone_at(name: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Lets a function run only while it is `alone` at its argument of this name, a path."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def run_alone(*args: P.args, **options: P.kwargs) -> R:
            with alone(signature.bind(*args, **options).arguments[name]):
                return function(*args, **options)

        return run_alone

    return decorate


@contextmanager
def _alone(place: Path) -> Iterator[None]:
    if not place.name or _held.get(place) == threading.get_ident():
        yield
        return
    check_outside(place)
    lock = place.with_name(f".{place.name}{LOCK}")
    with leased(place, lock, place in _held) if in_bucket(place) else _file_locked(place, lock):
        _held[place] = threading.get_ident()
        try:
            yield
        finally:
            del _held[place]


@contextmanager
def _file_locked(place: Path, lock: Path) -> Iterator[None]:
    made = [folder for folder in lock.parents if not os.path.lexists(folder)]
    with suppress(OSError):  # what writes there says so
        lock.parent.mkdir(parents=True, exist_ok=True)
    descriptor = _take(place, lock)
    try:
        yield
    finally:
        if descriptor is not None:
            with suppress(OSError):
                lock.unlink()  # before its lock goes: nobody else's is removed
            os.close(descriptor)
        with suppress(OSError):
            for folder in made:
                folder.rmdir()


def _take(place: Path, lock: Path) -> int | None:
    """The open, locked file; None where there are no locks. Raises UserError where another process
    has it."""
    while (descriptor := _opened(lock)) is not None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.exists(lock) and os.path.samestat(os.fstat(descriptor), os.stat(lock)):
                with suppress(OSError):  # another user's
                    os.ftruncate(descriptor, 0)
                    os.pwrite(descriptor, Holder.this().written(), 0)
                return descriptor
        except BlockingIOError:
            holder = Holder.read(os.pread(descriptor, 1 << 12, 0))
            os.close(descriptor)
            raise UserError(holder.refusal(place)) from None
        except OSError as error:
            os.close(descriptor)
            if error.errno not in lacks.LOCKS:
                raise
            with suppress(OSError):
                lock.unlink()
            return None
        os.close(descriptor)  # who had it has just removed it
    return None


def _opened(lock: Path) -> int | None:
    # NFS locks only what is open for writing; another user's may only be read
    for flags in (os.O_RDWR | os.O_CREAT, os.O_RDONLY):
        with suppress(OSError):
            return os.open(lock, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    return None
