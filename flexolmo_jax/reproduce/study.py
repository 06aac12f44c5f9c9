"""`flexolmo reproduce`: runs a study's cells, each in its own process, and writes its results.

    DIR/spec.yaml   DIR/text   DIR/data   DIR/seed0 ...   DIR/logs/<cell>.log   DIR/results.json
    DIR/results.md   DIR/report.html

It may be stopped or killed at any time. Started again it continues: a cell is done when its output
exists, and a training run has its checkpoints.
"""

import collections
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flexolmo_jax.errors import RunError, UserError
from flexolmo_jax.runtime.progress import bar, note
from flexolmo_jax.storage.files import append_bytes, make_folder, write_text
from flexolmo_jax.storage.locks import locked

from .cells import Cell, cells
from .results import write_results
from .spec import load_spec

SPEC, SECONDS = "spec.yaml", "seconds.jsonl"


def reproduce(spec_path: Path, root: Path) -> dict[str, Any]:
    """Runs a study in a directory and returns its results.

    Raises UserError for a directory that holds anything else, RunError if a cell fails.
    """
    spec = load_spec(spec_path)
    content = spec_path.read_text()
    make_folder(root)
    kept = root / SPEC
    if not kept.exists():
        if others := sorted(path.name for path in root.iterdir()):
            raise UserError(
                f"{root} holds {others[0]}, but no study; give a new or an empty directory"
            )
        write_text(kept, content)
    elif load_spec(kept) != spec:
        raise UserError(
            f"{root} holds another study; give a new --out, or the file that it was started with"
            f" ({kept})"
        )
    try:
        with locked(kept, wait=False):
            run_cells(cells(spec, root), root, spec.workers)
            return write_results(spec, root)
    except OSError as error:
        if isinstance(error, BlockingIOError):
            raise UserError(f"another process is at work in {root}; wait for it") from None
        raise


def run_cells(all_cells: Mapping[str, Cell], root: Path, workers: int) -> None:
    """Runs as many cells at a time as there are workers.

    If one fails, those that run are stopped. Raises RunError then, with the last line of its log.
    """
    (root / "logs").mkdir(exist_ok=True)
    waiting = collections.deque(name for name, cell in all_cells.items() if not cell.is_done)
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
                    running[name] = _start(name, root, workers), time.monotonic()
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


def _start(name: str, root: Path, workers: int) -> subprocess.Popen:
    # huge pages save a tenth of a step's time on a CPU
    environment = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"} | os.environ
    environment |= {
        # cells share their compiled programs
        "JAX_COMPILATION_CACHE_DIR": str((root / ".compiled").absolute()),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    # several processes are faster with one thread each
    if workers > 1 and environment.get("JAX_PLATFORMS") == "cpu":
        environment["XLA_FLAGS"] = (
            f"{environment.get('XLA_FLAGS', '')} --xla_cpu_multi_thread_eigen=false"
        )
    # -P: else modules of the working directory would be imported in the place of the real ones
    command = [sys.executable, "-P", "-m", "flexolmo_jax.reproduce.study", str(root), name]
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


def main(root: Path, name: str) -> int:
    """Runs one cell."""
    _end_with_parent()
    try:
        cells(load_spec(root / SPEC), root)[name].do()
    except (UserError, RunError) as error:
        note(f"flexolmo: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2]))
