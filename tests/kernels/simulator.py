"""The simulator of TPU memory, which records races but does not fail because of them."""

import contextlib
import dataclasses
from collections.abc import Iterator

# the simulator's race flag has no public name
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

MODES = ("eager", "on_wait")  # when a copy is made: at once, or when it is waited for


@contextlib.contextmanager
def simulated(mode: str) -> Iterator[pltpu.InterpretParams]:
    """No memory is touched while a copy may still be writing or reading it, or this fails."""
    # with few clocks copies share them
    parameters = {"detect_races": True, "dma_execution_mode": mode, "vector_clock_size": 128}
    # newer jax raises otherwise, inside a callback
    if "on_race" in {field.name for field in dataclasses.fields(pltpu.InterpretParams)}:
        parameters["on_race"] = "warn"
    try:
        yield pltpu.InterpretParams(**parameters)
        races = interpret_pallas_call.races
        assert races is not None
        assert not races.races_found, f"races with {mode} copies"
    finally:
        pltpu.reset_tpu_interpret_mode_state()
