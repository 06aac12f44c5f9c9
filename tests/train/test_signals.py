"""What ends a run from outside: a signal saves first, whichever it is, and a second start of the
same run changes nothing."""

import os
import pty
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from flexolmo_jax.artifact import open_artifact
from flexolmo_jax.config import RunConfig, dump_yaml
from flexolmo_jax.runtime.processes import stop_requests
from flexolmo_jax.storage.checkpoint import StepCheckpoints
from flexolmo_jax.train import heldout
from flexolmo_jax.train.metrics import MetricsWriter, read_metrics
from flexolmo_jax.train.pretrain import pretrain
from tests.tiny import run_config
from tests.train.test_loop import assert_same_bits, saved

EVERY = ("train.eval_every=10", "train.save_every=5")
# takes the terminal as its own, as a login does
ON_A_TERMINAL = """
import fcntl, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
from flexolmo_jax.cli import main
sys.exit(main())
"""


@pytest.fixture(scope="module")
def config(prepared: dict[str, Path]) -> RunConfig:
    return run_config("anchor", prepared["public"], *EVERY)


@pytest.fixture(scope="module")
def uninterrupted(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("signals") / "run"
    pretrain(config, run)
    return run


def scores_of(run: Path) -> dict[int, dict[str, float]]:
    entries = (entry for entry in read_metrics(run) if "bits_per_byte" in entry)
    return {entry["step"]: entry["bits_per_byte"] for entry in entries}


def newest(run: Path) -> int:
    with StepCheckpoints(run / "checkpoints") as checkpoints:
        return checkpoints.steps()[0]


def test_every_signal_by_which_a_system_ends_a_program_saves_first(
    config, uninterrupted, tmp_path, monkeypatch
):
    """Promise: a closed terminal or a batch system's warning loses no step."""
    codes = {"SIGHUP": 129, "SIGUSR2": 42, "SIGXCPU": 42}
    for step, (name, code) in enumerate(codes.items(), 1):
        number = signal.Signals[name]

        def write(self, at, values, write=MetricsWriter.write, number=number, step=4 * step):
            write(self, at, values)
            if at == step:
                signal.raise_signal(number)

        with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
            patch.setattr(MetricsWriter, "write", write)
            pretrain(config, tmp_path / "run")
        assert stopped.value.code == code, name
        assert newest(tmp_path / "run") == 4 * step + 1
        assert signal.getsignal(number) == signal.SIG_DFL
    pretrain(config, tmp_path / "run")
    assert_same_bits(saved(tmp_path / "run", 20), saved(uninterrupted, 20))


def test_a_signal_that_is_ignored_stays_so_and_a_programs_own_stays_its_own():
    own: list[int] = []
    before = {
        signal.SIGHUP: signal.signal(signal.SIGHUP, signal.SIG_IGN),  # as nohup does
        signal.SIGUSR1: signal.signal(signal.SIGUSR1, lambda number, _: own.append(number)),
    }
    try:
        with stop_requests() as requested:
            for number in before:
                signal.raise_signal(number)
            assert requested() is None and own == [signal.SIGUSR1]
            signal.raise_signal(signal.SIGTERM)
            assert requested() == 42
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize(("call", "step"), [(1, 10), (2, 20)])
def test_a_signal_during_an_evaluation_ends_it_and_saves_and_the_next_start_makes_up_for_it(
    config, uninterrupted, tmp_path, monkeypatch, call, step
):
    """An evaluation may take longer than a system waits for a program to end."""
    calls = []

    def score(*args, score=heldout.score_records, **options):
        calls.append(args)
        if len(calls) == call:
            signal.raise_signal(signal.SIGTERM)
        return score(*args, **options)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(heldout, "score_records", score)
        pretrain(config, tmp_path / "run")
    assert stopped.value.code == 42 and newest(tmp_path / "run") == step
    assert step not in scores_of(tmp_path / "run")
    result = pretrain(config, tmp_path / "run")
    assert scores_of(tmp_path / "run") == scores_of(uninterrupted)
    assert result["bits_per_byte"] == scores_of(uninterrupted)[20]
    assert_same_bits(saved(tmp_path / "run", 20), saved(uninterrupted, 20))


def test_a_second_start_of_a_run_is_refused_and_the_first_goes_on(config, tmp_path, monkeypatch):
    refused = []

    def write(self, step, values, write=MetricsWriter.write):
        write(self, step, values)
        if step == 3:
            command = ["train", str(tmp_path / "run.yaml"), "--out", str(tmp_path / "run")]
            second = [sys.executable, "-m", "flexolmo_jax.cli", *command]
            refused.append(subprocess.run(second, capture_output=True, text=True, env=os.environ))

    monkeypatch.setattr(MetricsWriter, "write", write)
    (tmp_path / "run.yaml").write_text(dump_yaml(config))
    assert pretrain(config, tmp_path / "run")["step"] == 20
    assert refused[0].returncode == 2 and refused[0].stderr.count("\n") == 1
    assert f"run is being written by another process (pid {os.getpid()} " in refused[0].stderr
    steps = [entry["step"] for entry in read_metrics(tmp_path / "run") if "loss" in entry]
    assert steps == list(range(1, 21))
    assert {path.name for path in tmp_path.iterdir()} == {"run", "run.yaml"}


def test_a_closed_terminal_saves_though_nothing_can_be_printed_any_more(config, tmp_path):
    (tmp_path / "run.yaml").write_text(dump_yaml(config))
    sets = ["--set", "train.steps=100000", "--set", "train.save_every=0"]
    command = ["train", str(tmp_path / "run.yaml"), "--out", str(tmp_path / "run"), *sets]
    terminal, other = pty.openpty()
    closing = threading.Event()

    def show() -> None:
        while not closing.is_set():
            if select.select([terminal], [], [], 0.05)[0]:
                os.read(terminal, 1 << 16)
        os.close(terminal)

    with subprocess.Popen(
        [sys.executable, "-c", ON_A_TERMINAL, *command],
        stdin=other,
        stdout=other,
        stderr=other,
        start_new_session=True,
        env=os.environ,
    ) as process:
        os.close(other)
        threading.Thread(target=show, daemon=True).start()
        deadline = time.monotonic() + 120
        while len(read_metrics(tmp_path / "run")) < 3 and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        closing.set()
        try:
            assert process.wait(120) == 129
        finally:
            process.kill()
    assert open_artifact(tmp_path / "run").step() >= 3
