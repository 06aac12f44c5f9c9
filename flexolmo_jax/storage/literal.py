"""Paths of etils.epath in which every character stands for itself.

epath and gcsfs read [, * and ? in the name of a folder as a pattern: what Orbax looks for in
`lr[0.1]` it would not find, and what it removes in a bucket would be other objects.
"""

import glob
from collections.abc import Iterator

from etils.epath import gpath

from .paths import BUCKETS, file_system, in_bucket, remove_objects


class LiteralPath(gpath.PosixGPath):
    """A path on this machine or in a bucket, which stays of this class in Orbax's hands."""

    def glob(self, pattern: str) -> Iterator["LiteralPath"]:
        literal = gpath.PosixGPath(glob.escape(str(self)))
        return (self._new(found) for found in literal.glob(pattern))

    def unlink(self, missing_ok: bool = False) -> None:
        if not in_bucket(self):
            super().unlink(missing_ok)
            return
        try:
            file_system().rm_file(str(self))
        except FileNotFoundError:
            if not missing_ok:
                raise

    def rmtree(self, missing_ok: bool = False) -> None:
        if not in_bucket(self):
            super().rmtree(missing_ok)
            return
        found = [self._new(BUCKETS + name) for name in file_system().find(str(self))]
        if not (found or missing_ok):
            raise FileNotFoundError(str(self))
        remove_objects(found)  # type: ignore[arg-type]
