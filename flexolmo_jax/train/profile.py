"""A profile of some steps, for xprof (TensorBoard's profile page): `--profile START:STOP`."""

import tempfile
from pathlib import Path

import jax

from flexolmo_jax.runtime.progress import note
from flexolmo_jax.storage.files import write_bytes
from flexolmo_jax.storage.paths import in_bucket

PLACE = "profile"  # in a run's directory: plugins/profile/<when>/<host>.xplane.pb


class Profile:
    """A context manager: leaving it ends a trace that is under way. Every process writes its
    own."""

    def __init__(self, steps: tuple[int, int] | None, out: Path):
        self._steps, self._out = steps, out / PLACE
        self._local: tempfile.TemporaryDirectory[str] | None = None
        self._running = False

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def before(self, number: int) -> None:
        """To be called before a step is dispatched."""
        if self._steps is not None and number == self._steps[0]:
            # JAX writes to directories; a bucket gets what it wrote.
            self._local = tempfile.TemporaryDirectory() if in_bucket(self._out) else None
            jax.profiler.start_trace(self._local.name if self._local else str(self._out))
            self._running = True

    def ends(self, number: int) -> bool:
        """Whether the profile ends with this step, which then has to be waited for."""
        return self._running and self._steps is not None and number == self._steps[1]

    def after(self, number: int) -> None:
        """To be called after a step, of the last after it has ended."""
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
            for file in Path(self._local.name).rglob("*"):
                if file.is_file():
                    write_bytes(
                        self._out / str(file.relative_to(self._local.name)), file.read_bytes()
                    )
            self._local.cleanup()
