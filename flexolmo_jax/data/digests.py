"""The digests of all documents read so far, in bounded memory.

Up to IN_MEMORY of them are in a set. When it is full, they go into a table on disk, which is a
B-tree (SQLite), and the set starts again. The table's file has no name once it is open: the system
removes it with the process, however that ends.
"""

import errno
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from flexolmo_jax.storage.files import remove_file
from flexolmo_jax.storage.paths import in_bucket

IN_MEMORY = 1 << 22  # digests in the set, which take half a gigabyte
_PAGES = 1 << 16  # KiB of the table that are kept in memory


class Digests:
    """A set of SHA-256 digests."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._recent: set[bytes] = set()
        self._table: sqlite3.Connection | None = None

    def add(self, digest: bytes) -> bool:
        """Whether the digest is a new one. Raises OSError where the table cannot be written."""
        if digest in self._recent or self._is_in_table(digest):
            return False
        self._recent.add(digest)
        if len(self._recent) >= IN_MEMORY:
            self._spill()
        return True

    def close(self) -> None:
        if self._table is not None:
            self._table.close()

    def _is_in_table(self, digest: bytes) -> bool:
        if self._table is None:
            return False
        found = self._table.execute("SELECT 1 FROM digests WHERE digest = ?", (digest,))
        return found.fetchone() is not None

    def _spill(self) -> None:
        try:
            if self._table is None:
                self._table = _new_table(self._folder)
            # in order, so that neighbours in the tree are written together
            rows = ((digest,) for digest in sorted(self._recent))
            with self._table:
                self._table.executemany("INSERT INTO digests VALUES (?)", rows)
        except sqlite3.OperationalError as error:
            is_full = error.sqlite_errorcode == sqlite3.SQLITE_FULL
            number = errno.ENOSPC if is_full else errno.EIO
            raise OSError(number, os.strerror(number), str(self._folder)) from error
        self._recent = set()


@contextmanager
def open_digests(folder: Path) -> Iterator[Digests]:
    """No digests yet. The table lies in the folder; of a bucket, where SQLite keeps temporary files
    ($TMPDIR)."""
    with closing(Digests(folder)) as digests:
        yield digests


def _new_table(folder: Path) -> sqlite3.Connection:
    file = folder / ".digests"
    # without a name, SQLite makes a temporary file
    table = sqlite3.connect("" if in_bucket(folder) else file)
    # nothing of it has to outlive the process
    for setting in ("journal_mode = OFF", "synchronous = OFF", "locking_mode = EXCLUSIVE"):
        table.execute(f"PRAGMA {setting}")
    table.execute(f"PRAGMA cache_size = -{_PAGES}")
    table.execute("CREATE TABLE digests (digest BLOB PRIMARY KEY) WITHOUT ROWID")
    table.commit()
    if not in_bucket(folder):
        remove_file(file)
    return table
