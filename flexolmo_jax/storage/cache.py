"""The cache of downloads and other files that can be made again."""

import functools
import os
import tempfile
import threading
from pathlib import Path

from flexolmo_jax.runtime.progress import note
from flexolmo_jax.storage.paths import in_bucket, path_of, reason

CACHE_VARIABLE = "FLEXOLMO_CACHE"
_one_at_a_time = threading.Lock()


def cache_folder(name: str = "", on_disk: bool = False) -> Path:
    """`$FLEXOLMO_CACHE`, or else the folder `name` of ~/.cache/flexolmo-jax.

    If the home folder is missing or read-only, as in some containers, or its path is relative, this
    is a temporary folder, with a note. Only this user can read it, and it is removed when the
    process ends.

    Args:
        name: a folder in the default cache; $FLEXOLMO_CACHE has none of these folders.
        on_disk: ignore a $FLEXOLMO_CACHE that is in a bucket.
    """
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen and not (on_disk and in_bucket(chosen)):
        return path_of(chosen)
    try:
        folder = Path.home() / ".cache" / "flexolmo-jax" / name
        if not folder.is_absolute():  # below the working directory, which may be a stranger's
            raise RuntimeError("its path is relative")
        folder.mkdir(parents=True, exist_ok=True)
        # Write to find out: root may write whatever the modes say, and a disk may be full.
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except (OSError, RuntimeError) as error:  # Path.home() raises RuntimeError
        with _one_at_a_time:
            return Path(_temporary(reason(error)).name) / name


@functools.cache
def _temporary(why: str) -> tempfile.TemporaryDirectory[str]:
    note(
        f"no cache in the home folder ({why}): a temporary one is used; set {CACHE_VARIABLE} to a"
        " folder that you can write to"
    )
    return tempfile.TemporaryDirectory(prefix="flexolmo-cache-")
