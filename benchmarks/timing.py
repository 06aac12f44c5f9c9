"""CPU seconds of two libraries that take turns in one process, each beside its own 2048^3 matmul.

Imported before jax: both libraries run one thread, or CPU seconds would count threads that wait.
"""

import os

os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false " + os.environ.get("XLA_FLAGS", "")
os.environ["JAX_PLATFORMS"] = "cpu"

import datetime
import platform
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import torch
import transformers

SQUARE = 2048
HEADER = f"{'here, s':>9} {'torch, s':>9} {'ratio':>6} {'here, matmuls':>14} {'torch, matmuls':>15}"

torch.set_num_threads(1)


def in_turns(here: Callable[[], object], there: Callable[[], object], repetitions: int) -> dict[str, dict[str, float]]:
    """The best CPU seconds of each (another load on the machine only ever adds), and the same in matmuls of its own library."""
    ours, theirs = jnp.ones((SQUARE, SQUARE)), torch.ones(SQUARE, SQUARE)
    multiply = jax.jit(jnp.matmul)
    sides = {
        "here": (here, lambda: jax.block_until_ready(multiply(ours, ours))),
        "torch": (there, lambda: theirs @ theirs),
    }
    for functions in sides.values():
        for function in functions:
            function()  # compiles
    seconds = {side: ([], []) for side in sides}
    for _ in range(repetitions):
        for side, functions in sides.items():
            for function, taken in zip(functions, seconds[side], strict=True):
                taken.append(cpu_seconds(function))
    best = {side: [min(taken) for taken in both] for side, both in seconds.items()}
    return {side: {"cpu_s": mine, "matmuls": mine / square} for side, (mine, square) in best.items()}


def row(result: dict[str, dict[str, float]]) -> str:
    """One line under `HEADER`."""
    here, there = result["here"], result["torch"]
    ratio = here["cpu_s"] / there["cpu_s"]
    return f"{here['cpu_s']:>9.4f} {there['cpu_s']:>9.4f} {ratio:>6.2f} {here['matmuls']:>14.3f} {there['matmuls']:>15.3f}"


def cpu_seconds(function: Callable[[], object]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def machine() -> dict[str, str]:
    cpu = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "")
    versions = {"jax": jax.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    where = {"cpu": cpu, "cores": str(os.cpu_count()), "python": platform.python_version()}
    return where | versions | {"date": datetime.date.today().isoformat()}
