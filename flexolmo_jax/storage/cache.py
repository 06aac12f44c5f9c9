"""Where what can be had again is kept: `$FLEXOLMO_CACHE`, or a folder of the user's home, or for
lack of one nowhere for long."""

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
    """`$FLEXOLMO_CACHE`, where it is set (to a bucket: unless it must be `on_disk`); else
    ~/.cache/flexolmo-jax, or its folder `name`.

    Where there is no home folder or it cannot be written, as in a container, a temporary folder
    takes its place, which only this user may read and which is removed when this process ends. A
    note says so.
    """
    said = os.environ.get(CACHE_VARIABLE)
    if said and not (on_disk and in_bucket(said)):
        return path_of(said)
    try:
        folder = Path.home() / ".cache" / "flexolmo-jax" / name
        folder.mkdir(parents=True, exist_ok=True)
        # modes say nothing to root, nor of a disk that is full or read-only
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except (OSError, RuntimeError) as error:  # Path.home() raises RuntimeError
        with _one_at_a_time:
            return Path(_temporary(reason(error)).name) / name


@functools.cache
def _temporary(why: str) -> tempfile.TemporaryDirectory[str]:
    note(
        f"no cache in the home folder ({why}): a temporary one is used; set {CACHE_VARIABLE} to a"
        " folder that can be written"
    )
    return tempfile.TemporaryDirectory(prefix="flexolmo-cache-")
