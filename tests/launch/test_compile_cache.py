"""What the launchers tell JAX of its compile cache, told to real runs: what one start has compiled
the next one does not compile again."""

import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from flexolmo_jax.config import dump_yaml
from flexolmo_jax.storage.paths import listing
from flexolmo_jax.train.metrics import read_metrics
from launch.job import ROOT, load_job
from tests.tiny import run_config

JOB = load_job(ROOT / "launch/jobs/biomed.yaml")
STEPS = 40
# Programs that JAX asks its cache for, and those that are there.
ASKED, FOUND = (f"/jax/compilation_cache/{x}" for x in ("compile_requests_use_cache", "cache_hits"))
PROGRAM = """
import sys, jax
events = open(sys.argv.pop(), "a", buffering=1)
jax.monitoring.register_event_listener(lambda event, **_: print(event, file=events))
from flexolmo_jax.cli import main
sys.exit(main())
"""


@pytest.fixture
def config(prepared: dict[str, Path], tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(dump_yaml(run_config("anchor", prepared["public"], f"train.steps={STEPS}")))
    return path


def environment(cache: object) -> dict[str, str]:
    """The launchers', with the cache in another place than the owner's bucket."""
    assert JOB.command[0] == "env"
    told = dict(word.split("=", 1) for word in JOB.command[1 : JOB.command.index("flexolmo")])
    assert told["JAX_COMPILATION_CACHE_DIR"] == JOB.compile_cache
    kept = {name: value for name, value in os.environ.items() if "CACHE_M" not in name}
    return kept | told | {"JAX_COMPILATION_CACHE_DIR": str(cache)}


def start(config: Path, out: object, cache: object, log: Path, *more: object) -> subprocess.Popen:
    command = [sys.executable, "-c", PROGRAM, "train", config, "--out", out, *more, log]
    return subprocess.Popen([*map(str, command)], env=environment(cache), stderr=subprocess.PIPE)


def both(config: Path, out: Path, cache: Path) -> list[Counter[str]]:
    """What two processes of one run asked for."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    logs = [out.with_name(f"{out.name}.{number}.log") for number in (0, 1)]
    running = [
        start(
            config, out, cache, log, "--coordinator", address, "--processes", 2,
            "--process", number, "--set", "mesh.fsdp=8",
        )
        for number, log in enumerate(logs)
    ]  # fmt: skip
    return [ends(process, log) for process, log in zip(running, logs, strict=True)]


def ends(process: subprocess.Popen, log: Path, status: int = 0) -> Counter[str]:
    """How often it asked for what, when it is over."""
    told = process.communicate(timeout=600)[1]
    assert process.returncode == status, told
    return Counter(log.read_text().splitlines())


@pytest.mark.slow
def test_a_second_process_compiles_nothing(config, tmp_path):
    cache = tmp_path / ".compiled"
    for name in ("one", "two"):
        process = start(config, tmp_path / name, cache, tmp_path / f"{name}.log")
        events = ends(process, tmp_path / f"{name}.log")
        assert events[ASKED] > 3
        assert (events[FOUND] == events[ASKED]) == (name == "two"), events
    seconds = [
        next(entry["seconds"]["compile"] for entry in read_metrics(tmp_path / name)[::-1]
             if "seconds" in entry)
        for name in ("one", "two")
    ]  # fmt: skip
    assert seconds[1] < seconds[0] / 2, seconds


@pytest.mark.slow
def test_two_processes_compile_nothing_where_two_have_before(config, tmp_path, monkeypatch):
    """The first one writes, both read."""
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "4")
    cache = tmp_path / ".compiled"
    first, second = (both(config, tmp_path / name, cache) for name in ("one", "two"))
    # the other one may come late enough to find what the first has written
    assert first[0][FOUND] < first[0][ASKED], first
    assert all(events[FOUND] == events[ASKED] > 3 for events in second), second


@pytest.mark.slow
def test_a_cache_in_a_bucket_is_found_again(config, bucket, tmp_path):
    for name in ("one", "two"):
        process = start(config, tmp_path / name, bucket / ".compiled", tmp_path / f"{name}.log")
        events = ends(process, tmp_path / f"{name}.log")
        assert (events[FOUND] == events[ASKED]) == (name == "two"), events
    assert any(name.startswith("jit_step-") for name in listing(bucket / ".compiled"))


@pytest.mark.slow
def test_a_run_that_was_preempted_goes_on_without_compiling_its_step(config, tmp_path):
    cache, out, log = tmp_path / ".compiled", tmp_path / "run", tmp_path / "log"
    process = start(config, out, cache, log, "--set", "train.steps=100000")
    while not any(entry["step"] > 2 for entry in read_metrics(out)):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    ends(process, log, 42)
    steps = sorted(path.name for path in cache.glob("jit_step-*-cache"))
    assert steps
    process = start(config, out, cache, tmp_path / "again", "--set", "train.steps=100000")
    while process.poll() is None and len(read_metrics(out)) < 20:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    ends(process, tmp_path / "again", 42)
    assert sorted(path.name for path in cache.glob("jit_step-*-cache")) == steps


def test_only_the_owner_may_write_to_the_cache_of_a_job():
    jobs = [load_job(path) for path in sorted((ROOT / "launch/jobs").glob("*.yaml"))]
    assert all(job.compile_cache.startswith(f"gs://{job.bucket}/") for job in jobs)
    assert all(job.run != Path(job.compile_cache).name for job in jobs)
    assert len({job.compile_cache for job in jobs}) == len({job.owner for job in jobs})
    for job in jobs:
        assert f"JAX_COMPILATION_CACHE_DIR={job.compile_cache}" in shlex.split(
            shlex.join(job.command)
        )
