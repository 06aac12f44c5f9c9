"""CPU seconds of two libraries that take turns, each in a process of its own, beside its own 2048^3
matmul.

A process of its own, so that neither finds its heap in the state the other left it in. In each turn
a function runs twice and the second run counts, as in a training loop: memory that was freed before
a pause of seconds may have gone back to a virtual machine's host, and was seen to cost up to a
second of system time to get again. Both run on one core, or CPU seconds would count threads that
wait. Imported before jax.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"

import datetime
import multiprocessing
import platform
import time
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import torch
import transformers

SQUARE = 2048
HEADER = f"{'here, s':>9} {'torch, s':>9} {'ratio':>6} {'here, matmuls':>14} {'torch, matmuls':>15}"

torch.set_num_threads(1)


def jax_matmul() -> Callable[[], object]:
    square, multiply = jnp.ones((SQUARE, SQUARE)), jax.jit(jnp.matmul)
    return lambda: jax.block_until_ready(multiply(square, square))


def torch_matmul() -> Callable[[], object]:
    square = torch.ones(SQUARE, SQUARE)
    return lambda: square @ square


class Worker:
    """A process that holds the functions that `make(*arguments)` returns by name, and calls them
    when told to."""

    def __init__(self, make: Callable[..., dict[str, Callable[[], Any]]], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, its_end = context.Pipe()
        context.Process(target=_serve, args=(its_end, make, arguments), daemon=True).start()
        its_end.close()  # so that its death is seen here

    def call(self, name: str) -> Any:
        """What the function returns, and its CPU seconds."""
        self._pipe.send(name)
        return self._pipe.recv()

    def close(self) -> None:
        self._pipe.close()


def _serve(
    pipe: Connection, make: Callable[..., dict[str, Callable[[], Any]]], arguments: tuple
) -> None:
    # Some of XLA's products run in as many threads as a process has cores, whatever XLA_FLAGS say.
    os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
    functions = make(*arguments)
    while True:
        try:
            name = pipe.recv()
        except EOFError:
            return
        start = time.process_time()
        value = functions[name]()
        pipe.send((value, time.process_time() - start))


def in_turns(
    sides: dict[str, Worker], names: Iterable[str], repetitions: int
) -> dict[str, dict[str, dict[str, float]]]:
    """By name and side the best CPU seconds (another load on the machine only ever adds), and the
    same in the side's own "matmul"."""
    results = {}
    for name in names:
        for worker in sides.values():
            for each in (name, "matmul"):
                worker.call(each)  # compiles
        taken: dict[str, dict[str, list[float]]] = {
            side: {name: [], "matmul": []} for side in sides
        }
        for _ in range(repetitions):
            for side, worker in sides.items():
                for each, seconds in taken[side].items():
                    worker.call(each)
                    seconds.append(worker.call(each)[1])
        best = {
            side: (min(seconds[name]), min(seconds["matmul"])) for side, seconds in taken.items()
        }
        results[name] = {
            side: {"cpu_s": mine, "matmuls": mine / square} for side, (mine, square) in best.items()
        }
    return results


def row(result: dict[str, dict[str, float]]) -> str:
    """One line under `HEADER`."""
    here, there = result["here"], result["torch"]
    ratio = here["cpu_s"] / there["cpu_s"]
    return (
        f"{here['cpu_s']:>9.4f} {there['cpu_s']:>9.4f} {ratio:>6.2f} {here['matmuls']:>14.3f}"
        f" {there['matmuls']:>15.3f}"
    )


def machine() -> dict[str, str]:
    cpu = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        "",
    )
    versions = {
        "jax": jax.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    where = {"cpu": cpu, "cores": str(os.cpu_count()), "python": platform.python_version()}
    malloc = {"GLIBC_TUNABLES": os.environ.get("GLIBC_TUNABLES", "")}
    return where | versions | malloc | {"date": datetime.date.today().isoformat()}
