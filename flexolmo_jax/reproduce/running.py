"""Cells: steps that each make one output of earlier ones, each in a process of its own.

    DIR/logs/<cell>.log   DIR/seconds.jsonl   DIR/.compiled

They may be stopped or killed at any time. Started again they continue: a cell is done when its
output exists, and a training run has its checkpoints.
"""

import collections
import dataclasses
import json
import os
import runpy
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from flexolmo_jax.errors import RunError, UserError
from flexolmo_jax.runtime.progress import bar, note
from flexolmo_jax.storage.files import append_bytes

SECONDS = "seconds.jsonl"


@dataclasses.dataclass(frozen=True)
class Cell:
    """`do` makes `output`, whole or not at all, from the outputs of the cells that it needs.

    A cell is done when its output exists. A training run that was stopped continues from its last
    checkpoint.
    """

    output: Path
    needs: tuple[str, ...]
    do: Callable[[], Any]

    @property
    def is_done(self) -> bool:
        return self.output.exists()


@dataclasses.dataclass(frozen=True)
class Command:
    """A command of `flexolmo`. Called, it runs in the place of this process."""

    arguments: tuple[str, ...]

    def __call__(self) -> None:
        sys.argv = ["flexolmo", *self.arguments]
        runpy.run_module("flexolmo_jax.cli", run_name="__main__")

    def __str__(self) -> str:
        return shlex.join(["flexolmo", *self.arguments])


def run_cells(all_cells: Mapping[str, Cell], root: Path, workers: int, program: str) -> None:
    """Runs as many cells at a time as there are workers; on an accelerator, of which one process
    takes most of the memory, one.

    If one fails, those that run are stopped. Raises RunError then, with the last line of its log.
    program: the module that runs one, given the root and the cell's name: see `run_cell`.
    """
    (root / "logs").mkdir(exist_ok=True)
    waiting = collections.deque(name for name, cell in all_cells.items() if not cell.is_done)
    environment, workers = _sharing(root, workers) if waiting else ({}, workers)
    running: dict[str, tuple[subprocess.Popen, float]] = {}
    with bar("cells", len(all_cells)) as advance:
        advance(len(all_cells) - len(waiting))
        try:
            while waiting or running:
                ready = [
                    name
                    for name in waiting
                    if all(all_cells[need].is_done for need in all_cells[name].needs)
                ]
                for name in ready[: workers - len(running)]:
                    waiting.remove(name)
                    running[name] = _start(program, name, root, environment), time.monotonic()
                if waiting and not running:
                    needs = ", ".join(all_cells[waiting[0]].needs)
                    raise RunError(f"{waiting[0]} waits for what no cell makes: {needs}")
                time.sleep(0.2)
                for name, (process, start) in list(running.items()):
                    if process.poll() is None:
                        continue
                    del running[name]
                    _close(process)
                    if process.returncode or not all_cells[name].is_done:
                        raise RunError(
                            f"{name} ended with status {process.returncode}:"
                            f" {_last_line(root, name)}; see {_log(root, name)}"
                        )
                    seconds = {"cell": name, "seconds": round(time.monotonic() - start, 1)}
                    append_bytes(root / SECONDS, (json.dumps(seconds) + "\n").encode())
                    advance(1, text=name)
        finally:
            for process, _ in running.values():
                process.terminate()  # runs save where they are
            for process, _ in running.values():
                _close(process)


def _sharing(root: Path, workers: int) -> tuple[dict[str, str], int]:
    """The environment of cells that run at the same time, and how many can."""
    # huge pages save a tenth of a step's time on a CPU
    environment = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"} | dict(os.environ)
    environment |= {
        # cells share their compiled programs
        "JAX_COMPILATION_CACHE_DIR": str((root / ".compiled").absolute()),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    if workers > 1 and (platform := _platform(environment)) != "cpu":
        note(f"one cell at a time, as they share the {platform}")
        return environment, 1
    if workers > 1:  # several processes are faster with one thread each
        flags = environment.get("XLA_FLAGS", "")
        environment["XLA_FLAGS"] = f"{flags} --xla_cpu_multi_thread_eigen=false"
    return environment, workers


def _platform(environment: Mapping[str, str]) -> str:
    """What JAX runs on, as a process that ends tells: this one is not to hold a device."""
    ask = [sys.executable, "-P", "-c", "import jax; print(jax.default_backend())"]
    done = subprocess.run(ask, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RunError(f"JAX cannot start: {(done.stderr.splitlines() or ['no reason given'])[-1]}")
    return done.stdout.strip()


def _start(program: str, name: str, root: Path, environment: Mapping[str, str]) -> subprocess.Popen:
    # -P: else modules of the working directory would be imported in the place of the real ones
    command = [sys.executable, "-P", "-m", program, str(root), name]
    with _log(root, name).open("a") as log:
        return subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment
        )


def _close(process: subprocess.Popen) -> None:
    """Waits until it ends."""
    process.wait()
    assert process.stdin is not None
    process.stdin.close()


def _log(root: Path, name: str) -> Path:
    return root / "logs" / f"{name}.log"


def _last_line(root: Path, name: str) -> str:
    lines = [
        line for line in _log(root, name).read_text(errors="replace").splitlines() if line.strip()
    ]
    return lines[-1].removeprefix("flexolmo: ") if lines else "it wrote nothing"


def _end_with_parent() -> None:
    """Ends a cell when its study is killed, as the next start may run the same cell.

    The study holds the other end of the cell's standard input, which closes when the study ends.
    """

    def wait() -> None:
        os.read(0, 1)  # not sys.stdin: an interpreter that ends waits for its lock
        os._exit(75)

    threading.Thread(target=wait, daemon=True).start()


def run_cell(cell: Cell) -> int:
    """Runs one cell, in the process that `run_cells` started for it. Returns the exit status."""
    _end_with_parent()
    try:
        cell.do()
    except (UserError, RunError) as error:
        note(f"flexolmo: {error}")
        return 1
    return 0


def seconds_of(root: Path) -> dict[str, float]:
    """Seconds of every cell; of one that ran more than once, its last run.

    A crash may leave no file, or lines that are no entries: a log never decides whether work goes
    on.
    """
    took: dict[str, float] = {}
    with suppress(OSError):
        for line in (root / SECONDS).read_bytes().splitlines():
            with suppress(ValueError, TypeError, KeyError):
                entry = json.loads(line)
                took[str(entry["cell"])] = float(entry["seconds"])
    return took
