"""Ctrl-C at any moment ends a command with a status and at most one line of its own: no traceback,
no signal, nothing hung."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flexolmo_jax.config import dump_yaml
from tests.tiny import run_config

# Jobs in the background have Ctrl-C ignored; this one has it as on a terminal. It says when Python
# itself is up.
STARTED = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from flexolmo_jax.cli import main
print("started", flush=True)
sys.exit(main())
"""
PATIENCE = 120  # seconds


def interrupted(arguments: list[str], after: float) -> tuple[int, str]:
    """The exit status and stderr of a command that gets Ctrl-C so many seconds after its start, if
    it still runs."""
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1"}
    command = [sys.executable, "-c", STARTED, *arguments]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout and process.stdout.readline() == "started\n"
        time.sleep(0.01)  # until it has its handler
        try:
            _, told = process.communicate(timeout=after)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            _, told = process.communicate(timeout=PATIENCE)
        finally:
            process.kill()
    return process.returncode, told


@pytest.mark.parametrize("times", [2, pytest.param(40, marks=pytest.mark.slow)])
@pytest.mark.parametrize("verb", ["train", "eval", "generate"])
def test_an_interrupt_at_any_moment_ends_in_one_line(
    model, prepared, corpora, tmp_path, verb, times
):
    """Promise: what a user stops, stops. Python's ending was a segmentation fault in every other
    interrupted process."""
    (tmp_path / "run.yaml").write_text(
        dump_yaml(run_config("anchor", prepared["public"], "train.save_every=3"))
    )
    commands = {
        "train": lambda number: [
            "train",
            str(tmp_path / "run.yaml"),
            "--out",
            str(tmp_path / f"run{number}"),
        ],
        "eval": lambda number: [
            "eval",
            str(model),
            "--data",
            str(prepared["code"]),
            str(corpora["law"]),
            "--json",
        ],
        "generate": lambda number: [
            "generate",
            str(model),
            "--prompt",
            "the river",
            "--max-new-tokens",
            "40",
        ],
    }
    rng, longest = random.Random(verb), {"train": 12, "eval": 8, "generate": 6}[verb]
    for number in range(times):
        after = rng.uniform(0, longest)
        status, told = interrupted(commands[verb](number), after)
        where = f"{verb} {number}, {after:.3f} s: {status}\n{told}"
        assert status in (0, 130), where
        assert "Traceback" not in told and "Exception ignored" not in told, where
        if status == 130:
            assert (
                told.splitlines()[-1] == "flexolmo: interrupted"
                or "stopped by a signal at step" in told
            ), where


def test_output_that_cannot_be_written_is_no_success(model):
    """Promise: status 0 means that the result is there."""
    with Path("/dev/full").open("w") as full:
        result = subprocess.run(
            [sys.executable, "-m", "flexolmo_jax.cli", "info", str(model)],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert (result.returncode, result.stderr) == (
        1,
        "flexolmo: the result cannot be written: No space left on device\n",
    )


# sends itself a signal when it writes the first file of its result to the disk
SIGNALLED = """
import os, signal, sys
from flexolmo_jax.storage import files
from flexolmo_jax.cli import main
number = signal.Signals[sys.argv.pop(1)]
def observe(operation, path):
    files.observer = None
    os.kill(os.getpid(), number)
files.observer = observe
sys.exit(main())
"""


@pytest.mark.parametrize(("name", "code"), [("SIGHUP", 129), ("SIGTERM", 42), ("SIGUSR1", 42)])
def test_other_verbs_end_in_one_line_with_nothing_half_written(
    tiny_tokenizer, corpora, tmp_path, name, code
):
    tiny_tokenizer.save(tmp_path / "tokenizer.json")
    verb = ["data", "prepare", "--input", str(corpora["law"]), "--seq-len", "32"]
    how = ["--tokenizer", str(tmp_path / "tokenizer.json"), "--out", str(tmp_path / "out")]
    command = [sys.executable, "-c", SIGNALLED, name, *verb, *how]
    result = subprocess.run(command, capture_output=True, text=True)
    told = [line for line in result.stderr.splitlines() if not line.startswith("prepare ")]
    assert (result.returncode, told) == (code, [f"flexolmo: stopped by {name}"])
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]


def test_work_goes_on_where_nobody_reads_its_progress_any_more(tiny_tokenizer, corpora, tmp_path):
    tiny_tokenizer.save(tmp_path / "tokenizer.json")
    verb = ["data", "prepare", "--input", str(corpora["law"]), "--seq-len", "32"]
    how = ["--tokenizer", str(tmp_path / "tokenizer.json"), "--out", str(tmp_path / "out")]
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "flexolmo_jax.cli", *verb, *how, "--json"]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=writing)
    os.close(writing)
    assert result.returncode == 0 and b'"train"' in result.stdout
