"""Fresh processes that load, evaluate, generate and merge, two at once and short of memory: none
ends by a signal.

FLEXOLMO_SOAK is how many it runs (1000 unless it says otherwise).
"""

import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

# A process that keeps writing to this much memory beside those that are looked at: their pages go
# and come.
PRESSURE = (
    "import time\nmemory = bytearray(1 << 30)\nwhile True:\n    for at in range(0, 1 << 30, 4096):"
    " memory[at] = 1\n    time.sleep(0.1)"
)
COUNT = int(os.environ.get("FLEXOLMO_SOAK", "1000"))
LOAD = "import sys, flexolmo_jax; flexolmo_jax.load(sys.argv[1])"


@pytest.mark.slow
def test_no_fresh_process_crashes(anchor, contributions, model, prepared, corpora, tmp_path):
    """Promise: a command does not crash; one of `eval` once did, in a thread of what had loaded its
    weights."""
    cli = ["-m", "flexolmo_jax.cli"]

    def one(number: int) -> tuple[int, str]:
        with tempfile.TemporaryDirectory(dir=tmp_path) as folder:
            command = [
                ["-c", LOAD, str(model)],
                [
                    *cli,
                    "eval",
                    str(model),
                    "--data",
                    str(prepared["code"]),
                    str(corpora["law"]),
                    "--json",
                ],
                [*cli, "generate", str(model), "--prompt", "the river", "--max-new-tokens", "8"],
                [
                    *cli,
                    "merge",
                    "--anchor",
                    str(anchor),
                    str(contributions["code"]),
                    "--out",
                    str(Path(folder) / "model"),
                ],
            ][number % 4]
            environment = os.environ | {
                "JAX_NUM_CPU_DEVICES": "1",
                "MALLOC_ARENA_MAX": "1",
                "MALLOC_PERTURB_": "165",
            }
            result = subprocess.run(
                [sys.executable, *command],
                capture_output=True,
                text=True,
                env=environment,
                timeout=300,
            )
            return result.returncode, f"{command}\n{result.stderr[-2000:]}"

    balloon = subprocess.Popen([sys.executable, "-c", PRESSURE])
    try:
        with ThreadPoolExecutor(2) as pool:
            ended = list(pool.map(one, range(COUNT)))
    finally:
        balloon.kill()
        balloon.wait()
    failed = [told for status, told in ended if status]
    assert not failed, f"{len(failed)} of {COUNT}: {failed[0]}"
