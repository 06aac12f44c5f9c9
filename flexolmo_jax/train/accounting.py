"""Where the time of a run goes, and how much of what its chips can do it uses.

goodput    seconds spent in steps / seconds since the run was started
MFU        FLOPs that a step's mathematics needs (flops.py) / FLOPs that the devices could do in
           its time, in bfloat16
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jax.sharding import Mesh

from flexolmo_jax.config import ModelConfig, RunConfig
from flexolmo_jax.runtime.tpus import CHIPS

from .flops import step_flops

# the rest of a run's time is the loop's own
PHASES = ("init", "restore", "compile", "data", "step", "eval", "save")
# 10^12 bfloat16 FLOPs a second, dense; of NVIDIA's data sheets
GPUS = {"A100": 312.0, "H100": 989.0, "H200": 989.0, "B200": 2250.0}


class Accounting:
    """Seconds by phase since it was made."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._seconds: dict[str, float] = {phase: 0.0 for phase in PHASES}

    @contextmanager
    def spent(self, phase: str) -> Iterator[None]:
        """Counts what is done inside towards a phase."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[phase] += time.perf_counter() - start

    def seconds(self) -> dict[str, float]:
        """By phase; "other" is the rest of "total"."""
        total = time.perf_counter() - self._start
        return self._seconds | {"other": total - sum(self._seconds.values()), "total": total}

    def goodput(self) -> float:
        return self._seconds["step"] / (time.perf_counter() - self._start)


def peak_flops(device: Any) -> float | None:
    """A device's most bfloat16 FLOPs a second; None where that is not known, as for CPUs."""
    kind = device.device_kind
    if device.platform == "tpu":
        return next(
            (1e12 * chip.tflops / chip.devices for chip in CHIPS.values() if kind in chip.kinds),
            None,
        )
    return next((1e12 * tflops for name, tflops in GPUS.items() if name in kind), None)


def least_step_seconds(run: RunConfig, model: ModelConfig, mesh: Mesh) -> float | None:
    """What a step would take if all devices worked at their peak; None where that is not known."""
    peak = peak_flops(mesh.devices.flat[0])
    return peak and step_flops(run, model).model / (peak * mesh.size)
