"""A run that is killed at any moment and started again ends with the bits of the uninterrupted
one."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from flexolmo_jax.artifact import open_artifact
from flexolmo_jax.cli import main
from flexolmo_jax.config import dump_yaml
from flexolmo_jax.model.tree import flatten
from flexolmo_jax.train.metrics import read_metrics
from tests.tiny import pair_config, run_config

STEPS = 40


def final_bits(run: Path) -> dict[str, bytes]:
    assert open_artifact(run).step() == STEPS
    return {
        path: np.asarray(array).tobytes()
        for path, array in flatten(open_artifact(run).params()).items()
    }


def killed(arguments: list[str], out: Path, step: int, delay: float) -> None:
    """Starts a run and kills it `delay` seconds after the metrics of a step are there."""
    process = subprocess.Popen(
        [sys.executable, "-m", "flexolmo_jax.cli", *arguments],
        stderr=subprocess.DEVNULL,
        env=os.environ,
    )
    try:
        deadline = time.monotonic() + 180
        while process.poll() is None and time.monotonic() < deadline:
            if any(entry["step"] >= step for entry in read_metrics(out)):
                time.sleep(delay)
                break
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert process.returncode == -signal.SIGKILL


@pytest.mark.parametrize("kills", [1, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", [pytest.param("anchor", marks=pytest.mark.slow), "pair"])
def test_a_killed_run_ends_like_the_uninterrupted_one(anchor, prepared, tmp_path, kind, kills):
    # A save every other step: many kills hit one.
    overrides = (
        f"train.steps={STEPS}",
        "train.save_every=2",
        "train.eval_every=10",
        "train.eval_records=8",
    )
    if kind == "anchor":
        config = run_config("anchor", prepared["public"], *overrides)
    else:
        config = pair_config(anchor, prepared["code"], "code", *overrides)
    (tmp_path / "run.yaml").write_text(dump_yaml(config))
    assert main(["train", str(tmp_path / "run.yaml"), "--out", str(tmp_path / "whole")]) == 0
    again = ["train", str(tmp_path / "run.yaml"), "--out", str(tmp_path / "killed")]
    rng = random.Random(f"{kind} {kills}")
    for number in range(kills):
        step, delay = (
            rng.randint(1 + number * STEPS // kills, (number + 1) * STEPS // kills - 4),
            rng.uniform(0, 0.05),
        )
        print(f"kill {number + 1} of {kills}: {delay:.3f} s after step {step}")
        killed(again, tmp_path / "killed", step, delay)
    assert main(again) == 0
    assert final_bits(tmp_path / "killed") == final_bits(tmp_path / "whole")
    steps = [entry["step"] for entry in read_metrics(tmp_path / "killed") if "loss" in entry]
    assert steps == list(range(1, STEPS + 1))
