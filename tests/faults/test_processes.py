"""A run of several processes: bit for bit what one process computes, and an end for all when one of them is stopped, killed or hangs.

Real processes, joined by jax.distributed with gloo, share out eight CPU devices.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from flexolmo_jax.config import dump_yaml
from flexolmo_jax.train.metrics import read_metrics
from tests.tiny import run_config
from tests.train.test_loop import assert_same_bits, saved

STEPS = 30
ENDINGS = {75, -signal.SIGABRT}  # of a process that has lost another: its own word, or the runtime's
WITHIN = 15  # seconds


class Processes:
    """The processes of one run, each with its share of eight devices. A context manager that leaves none behind."""

    def __init__(self, count: int, config: Path, out: Path, *overrides: str):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{probe.getsockname()[1]}"
        flags = os.environ.get("XLA_FLAGS", "").replace("--xla_force_host_platform_device_count=8", "")
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(8 // count), "XLA_FLAGS": flags}
        command = [sys.executable, "-m", "flexolmo_jax.cli", "train", str(config), "--out", str(out), "--coordinator", address]
        sets = [word for override in overrides for word in ("--set", override)]
        self.out = out
        self.logs = [out.with_name(f"{out.name}.{i}.log") for i in range(count)]
        self.all = []
        for i, path in enumerate(self.logs):
            with path.open("w") as log:
                arguments = [*command, "--processes", str(count), "--process", str(i), *sets]
                self.all.append(subprocess.Popen(arguments, stdout=log, stderr=log, env=environment))

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.all:
            process.kill()  # also of one that is stopped
            process.wait()

    def told(self) -> str:
        return "\n".join(f"--- {path.name}\n{path.read_text()}" for path in self.logs)

    def wait_for_step(self, step: int) -> None:
        deadline = time.monotonic() + 240
        while not any(row["step"] >= step for row in read_metrics(self.out)):
            assert time.monotonic() < deadline and all(process.poll() is None for process in self.all), self.told()
            time.sleep(0.01)

    def statuses(self, of: Sequence[int] | None = None, within: float = 240) -> list[int]:
        """Exit statuses of these processes (of all), which have to end in time."""
        deadline = time.monotonic() + within
        chosen = [self.all[i] for i in of] if of else self.all
        try:
            return [process.wait(max(0.1, deadline - time.monotonic())) for process in chosen]
        except subprocess.TimeoutExpired:
            pytest.fail(f"still there after {within} s\n{self.told()}")


def finish(count: int, config: Path, out: Path, *overrides: str) -> Path:
    with Processes(count, config, out, *overrides) as processes:
        assert processes.statuses() == [0] * count, processes.told()
    return out


@pytest.fixture(scope="module")
def config(prepared: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    overrides = (f"train.steps={STEPS}", "mesh.fsdp=8", "train.save_every=10", "train.eval_every=15", "train.eval_records=8")
    path = tmp_path_factory.mktemp("processes") / "run.yaml"
    path.write_text(dump_yaml(run_config("anchor", prepared["public"], *overrides)))
    return path


@pytest.fixture(scope="module")
def whole(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process that nothing has interrupted."""
    return finish(1, config, tmp_path_factory.mktemp("whole") / "run")


def assert_ended_alike(run: Path, whole: Path) -> None:
    assert_same_bits(saved(run, STEPS), saved(whole, STEPS))
    rows, expected = ([row for row in read_metrics(path) if "loss" in row] for path in (run, whole))
    assert [(row["step"], row["loss"]) for row in rows] == [(row["step"], row["loss"]) for row in expected]


def kill(number: int, which: int) -> Callable[[Processes], None]:
    return lambda processes: processes.all[which].send_signal(number)


def test_four_processes_equal_one_bit_for_bit(config, whole, tmp_path):
    run = finish(4, config, tmp_path / "run")
    assert_ended_alike(run, whole)
    assert [row["step"] for row in read_metrics(run) if "loss" in row] == list(range(1, STEPS + 1))  # one of them writes


@pytest.mark.parametrize("which", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_sigterm_to_any_process_saves_the_same_step_of_all_and_fewer_processes_go_on(config, whole, tmp_path, which):
    with Processes(4, config, tmp_path / "run") as processes:
        processes.wait_for_step(12)
        processes.all[which].terminate()
        assert processes.statuses(within=60) == [42] * 4, processes.told()
    steps = sorted(int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert 12 < steps[-1] < STEPS and steps[-1] % 10, "not a regular save"
    assert f"stopped by a signal at step {steps[-1]}" in processes.logs[0].read_text()
    assert_ended_alike(finish(2, config, tmp_path / "run"), whole)


@pytest.mark.parametrize(
    ("number", "which", "resumed_on"),
    [(signal.SIGKILL, 1, 1), (signal.SIGKILL, 0, 4), (signal.SIGSTOP, 3, 2)],
    ids=["worker killed", "coordinator killed", "worker stopped"],
)
def test_the_others_end_when_one_is_gone_and_any_number_goes_on(config, whole, tmp_path, number, which, resumed_on):
    with Processes(4, config, tmp_path / "run") as processes:
        processes.wait_for_step(12)
        processes.all[which].send_signal(number)
        others = [i for i in range(4) if i != which]
        assert set(processes.statuses(others, within=WITHIN)) <= ENDINGS, processes.told()
    assert_ended_alike(finish(resumed_on, config, tmp_path / "run"), whole)
