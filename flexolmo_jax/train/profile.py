"""A profile of some steps, for xprof (TensorBoard's profile page): `--profile START:STOP`."""

import tempfile
from pathlib import Path

import jax

from flexolmo_jax.runtime.progress import note
from flexolmo_jax.storage.files import write_bytes
from flexolmo_jax.storage.paths import in_bucket

FOLDER = "profile"  # in a run's directory: plugins/profile/<when>/<host>.xplane.pb


class Profile:
    """A context manager: leaving it ends a trace that is still running. Every process writes its
    own."""

    def __init__(self, steps: tuple[int, int] | None, out: Path):
        self._steps, self._out = steps, out / FOLDER
        self._local: tempfile.TemporaryDirectory[str] | None = None
        self._running = False

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def before(self, number: int) -> None:
        """Call it before a step is dispatched."""
        if self._steps is not None and number == self._steps[0]:
            # JAX writes to local directories; files for a bucket are copied there at the end.
            self._local = tempfile.TemporaryDirectory() if in_bucket(self._out) else None
            jax.profiler.start_trace(self._local.name if self._local else str(self._out))
            self._running = True

    def ends(self, number: int) -> bool:
        """Whether this step is the last of the profile: it has to end before `after` is called."""
        return self._running and self._steps is not None and number == self._steps[1]

    def after(self, number: int) -> None:
        """Call it after a step is dispatched; after the profile's last, once that has ended."""
        if self.ends(number):
            self._stop()
            note(
                f"a profile up to step {number} is in {self._out}; see it with xprof --logdir"
                f" {self._out}"
            )

    def _stop(self) -> None:
        if not self._running:
            return
        self._running = False
        jax.profiler.stop_trace()
        if self._local is not None:
            local = Path(self._local.name)
            for file in local.rglob("*"):
                if file.is_file():
                    write_bytes(self._out / str(file.relative_to(local)), file.read_bytes())
            self._local.cleanup()
