"""Locks of files and directories, which keep processes of one file system apart."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flexolmo_jax.storage import lacks
from flexolmo_jax.storage.paths import in_bucket


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
