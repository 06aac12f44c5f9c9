"""Where JAX runs on the CPU of a machine that has an accelerator, one line says so."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

LOAD = """
import sys
from flexolmo_jax.runtime import devices
devices.ACCELERATORS = {"tpu": ("TPU", (sys.argv[1],))}
for _ in range(2):
    devices.all_devices()
"""


def told(driver: Path, platforms: str) -> str:
    """What a process says that finds this driver's file."""
    environment = os.environ | {"JAX_PLATFORMS": platforms}
    command = [sys.executable, "-c", LOAD, str(driver)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return done.stderr


@pytest.fixture
def driver(tmp_path: Path) -> Path:
    (tmp_path / "accel0").touch()
    return tmp_path / "accel[0-9]*"


def test_running_on_the_cpu_beside_an_accelerator_is_said_once(driver: Path):
    lines = [line for line in told(driver, "").splitlines() if "seems to have" in line]
    assert len(lines) == 1 and "flexolmo-jax, pip install -e '.[tpu]'" in lines[0]


def test_nothing_is_said_where_the_cpu_was_asked_for_or_is_all_there_is(driver: Path):
    assert "seems to have" not in told(driver, "cpu")
    assert "seems to have" not in told(driver.with_name("none*"), "")
