"""A run of several processes: bit for bit what one process computes, and an end for all when one of
them is stopped, killed or hangs.

Real processes, joined by jax.distributed with gloo, share out eight CPU devices.
"""

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from flexolmo_jax.artifact import open_artifact
from flexolmo_jax.config import dump_yaml
from flexolmo_jax.data.prepare import prepare
from flexolmo_jax.model.tree import flatten
from flexolmo_jax.storage.checkpoint import StepCheckpoints
from flexolmo_jax.train.metrics import read_metrics
from tests.object_store import upload
from tests.tiny import pair_config, run_config
from tests.train.test_loop import assert_same_bits, saved

STEPS = 30
# of a process that has lost another: its own word, or the runtime's
ENDINGS = {75, -signal.SIGABRT}
WITHIN = 15  # seconds
ROUNDING = 1e-6  # of another mesh and other microbatches; measured: 1.2e-7


class Processes:
    """The processes of one run, each with its share of the devices. A context manager that leaves
    none behind."""

    def __init__(
        self,
        count: int,
        config: Path,
        out: Path,
        *overrides: str,
        out_of: dict[int, Path] | None = None,
        first: str = "",
        of: int = -1,
        devices: int = 8,
    ):
        """`out_of`: other directories for some of them. `first`: Python that process `of` runs
        before all else."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{probe.getsockname()[1]}"
        flags = os.environ.get("XLA_FLAGS", "").replace(
            "--xla_force_host_platform_device_count=8", ""
        )
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(devices // count),
            "XLA_FLAGS": flags,
        }
        sets = [word for override in overrides for word in ("--set", override)]
        self.out = out
        self.logs = [out.with_name(f"{out.name}.{i}.log") for i in range(count)]
        self.all = []
        for i, path in enumerate(self.logs):
            with path.open("w") as log:
                program = (
                    f"{first if i == of else ''}\nimport sys\nfrom flexolmo_jax.cli import"
                    " main\nsys.exit(main())"
                )
                own = str((out_of or {}).get(i, out))
                joining = ["--coordinator", address, "--processes", str(count), "--process", str(i)]
                arguments = [
                    sys.executable,
                    "-c",
                    program,
                    "train",
                    str(config),
                    "--out",
                    own,
                    *joining,
                    *sets,
                ]
                self.all.append(
                    subprocess.Popen(arguments, stdout=log, stderr=log, env=environment)
                )

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
        while not any(entry["step"] >= step for entry in read_metrics(self.out)):
            assert time.monotonic() < deadline and all(
                process.poll() is None for process in self.all
            ), self.told()
            time.sleep(0.01)

    def statuses(self, of: Sequence[int] | None = None, within: float = 240) -> list[int]:
        """Exit statuses of these processes (of all), which have to end in time."""
        deadline = time.monotonic() + within
        chosen = [self.all[i] for i in of] if of else self.all
        try:
            return [process.wait(max(0.1, deadline - time.monotonic())) for process in chosen]
        except subprocess.TimeoutExpired:
            pytest.fail(f"still there after {within} s\n{self.told()}")


def finish(count: int, config: Path, out: Path, *overrides: str, devices: int = 8) -> Path:
    with Processes(count, config, out, *overrides, devices=devices) as processes:
        assert processes.statuses() == [0] * count, processes.told()
    return out


@pytest.fixture(scope="module")
def config(prepared: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    overrides = (
        f"train.steps={STEPS}",
        "mesh.fsdp=8",
        "train.save_every=10",
        "train.eval_every=15",
        "train.eval_records=8",
    )
    path = tmp_path_factory.mktemp("processes") / "run.yaml"
    path.write_text(dump_yaml(run_config("anchor", prepared["public"], *overrides)))
    return path


@pytest.fixture(scope="module")
def whole(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process that nothing has interrupted."""
    return finish(1, config, tmp_path_factory.mktemp("whole") / "run")


def assert_ended_alike(run: Path, whole: Path) -> None:
    assert_same_bits(saved(run, STEPS), saved(whole, STEPS))
    entries, expected = (
        [entry for entry in read_metrics(path) if "loss" in entry] for path in (run, whole)
    )
    assert [(entry["step"], entry["loss"]) for entry in entries] == [
        (entry["step"], entry["loss"]) for entry in expected
    ]


@pytest.mark.slow
def test_four_processes_equal_one_where_products_are_large_enough_for_many_threads(
    corpora, tiny_tokenizer, tmp_path
):
    """XLA cuts large products up by its number of threads; the demo's are, those of other tests are
    not."""
    prepare([corpora["public"]], tiny_tokenizer, 256, tmp_path / "data", workers=1)
    large = [
        "model.d_model=128",
        "model.n_layers=4",
        "model.d_ffn=512",
        "model.max_seq_len=256",
        "model.vocab_size=4096",
        "mesh.fsdp=8",
    ]
    run = run_config(
        "anchor", tmp_path / "data", "data.seq_len=256", f"train.steps={STEPS}", *large
    )
    (tmp_path / "run.yaml").write_text(dump_yaml(run))
    one, four = (finish(count, tmp_path / "run.yaml", tmp_path / f"run{count}") for count in (1, 4))
    assert_ended_alike(four, one)


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_several_processes_equal_one_bit_for_bit(config, whole, tmp_path, count):
    run = finish(count, config, tmp_path / "run")
    assert_ended_alike(run, whole)
    # one of them writes
    assert [entry["step"] for entry in read_metrics(run) if "loss" in entry] == list(
        range(1, STEPS + 1)
    )


@pytest.mark.parametrize(
    ("count", "which", "resumed_on"),
    [
        pytest.param(2, 1, 1, marks=pytest.mark.slow),
        pytest.param(4, 0, 2, marks=pytest.mark.slow),
        pytest.param(4, 2, 4, marks=pytest.mark.slow),
    ],
)
def test_sigterm_to_any_process_saves_the_same_step_of_all_and_any_number_goes_on(
    config, whole, tmp_path, count, which, resumed_on
):
    with Processes(count, config, tmp_path / "run") as processes:
        processes.wait_for_step(12)
        processes.all[which].terminate()
        assert processes.statuses(within=240) == [42] * count, processes.told()
    steps = sorted(int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert 12 < steps[-1] < STEPS and steps[-1] % 10, "not a regular save"
    assert f"stopped by a signal at step {steps[-1]}" in processes.logs[0].read_text()
    assert_ended_alike(finish(resumed_on, config, tmp_path / "run"), whole)


@pytest.mark.parametrize(
    ("count", "number", "which", "resumed_on"),
    [
        pytest.param(2, signal.SIGKILL, 1, 1, marks=pytest.mark.slow),
        pytest.param(4, signal.SIGKILL, 1, 1, marks=pytest.mark.slow),
        pytest.param(4, signal.SIGKILL, 0, 4, marks=pytest.mark.slow),
        pytest.param(4, signal.SIGSTOP, 3, 2, marks=pytest.mark.slow),
    ],
    ids=["one of two killed", "worker killed", "coordinator killed", "worker stopped"],
)
def test_the_others_end_when_one_is_gone_and_any_number_goes_on(
    config, whole, tmp_path, count, number, which, resumed_on
):
    with Processes(count, config, tmp_path / "run") as processes:
        processes.wait_for_step(12)
        processes.all[which].send_signal(number)
        others = [i for i in range(count) if i != which]
        assert set(processes.statuses(others, within=WITHIN)) <= ENDINGS, processes.told()
    assert_ended_alike(finish(resumed_on, config, tmp_path / "run"), whole)


@pytest.mark.slow
def test_a_process_that_lives_but_does_not_move_ends_all(config, tmp_path):
    """Its heart beats; what waits for it in vain is the others' step, until their watchdogs
    bite."""
    hang = (
        "import time\n"
        "from flexolmo_jax.data import mixture\n"
        "at = mixture.Batches.at\n"
        "def stuck(self, step, places=None):\n"
        "    if step >= 14: time.sleep(600)\n"
        "    return at(self, step, places)\n"
        "mixture.Batches.at = stuck\n"
    )
    with Processes(2, config, tmp_path / "run", "train.watchdog=8", first=hang, of=1) as processes:
        assert set(processes.statuses()) <= ENDINGS, processes.told()
    assert any(
        "took more than 8 s" in path.read_text() and "Thread" in path.read_text()
        for path in processes.logs
    )


@pytest.mark.slow
def test_all_processes_save_the_same_steps_by_time_whatever_their_clocks(config, whole, tmp_path):
    """The second one's goes a hundred times as fast."""
    fast = (
        "import time, types\n"
        "from flexolmo_jax.train import loop\n"
        "loop.time = types.SimpleNamespace(monotonic=lambda: 100 * time.monotonic())\n"
    )
    by_time = ("train.save_minutes=0.02", "train.save_every=0")  # 1.2 s
    with Processes(2, config, tmp_path / "run", *by_time, first=fast, of=1) as processes:
        assert processes.statuses() == [0, 0], processes.told()
    steps = [entry["step"] for entry in read_metrics(tmp_path / "run") if "seconds" in entry]
    assert set(steps) - {15, STEPS}, "not one save by time"
    assert_ended_alike(tmp_path / "run", whole)


@pytest.mark.slow
def test_half_of_the_processes_go_on_with_twice_the_microbatches(config, whole, tmp_path):
    """As where half of the devices are left: a device holds as many records at once as before."""
    with Processes(4, config, tmp_path / "run") as processes:
        processes.wait_for_step(12)
        processes.all[1].terminate()
        assert processes.statuses() == [42] * 4, processes.told()
    stopped = max(int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir())
    fewer = ("mesh.fsdp=4", "train.accumulate=2")
    run = finish(2, config, tmp_path / "run", *fewer, devices=4)
    entries, expected = (
        [entry for entry in read_metrics(path) if "loss" in entry] for path in (run, whole)
    )
    assert [entry["step"] for entry in entries] == list(range(1, STEPS + 1))
    for name in ("loss", "gradient_norm"):
        found, wanted = ([entry[name] for entry in path] for path in (entries, expected))
        assert found[:stopped] == wanted[:stopped]  # bit for bit, on the first mesh
        np.testing.assert_allclose(found, wanted, rtol=ROUNDING, err_msg=name)
    ran_on = [entry["ran_on"] for entry in read_metrics(run) if "ran_on" in entry]
    assert {(on["processes"], on["accumulate"], on["fsdp"]) for on in ran_on} == {
        (4, 1, 8),
        (2, 2, 4),
    }


@pytest.mark.slow
def test_twenty_runs_killed_at_random_end_like_the_one_that_was_not(config, whole, tmp_path):
    """Any process, at any moment from its start on, by any of the signals; then on 4, 2 or 1
    processes."""
    rng = random.Random(0)
    for number in range(20):
        out = tmp_path / f"run{number}"
        which, delay = rng.randrange(4), rng.uniform(4, 30)
        with Processes(4, config, out) as processes:
            time.sleep(delay)
            sent = rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM])
            processes.all[which].send_signal(sent)
            others = [i for i in range(4) if i != which]
            print(f"{number}: {sent.name} to {which} after {delay:.1f} s")
            # Before they have joined, nobody misses anybody: they wait for each other as long as
            # for one that starts late.
            joined = (out / "checkpoints").exists()
            statuses = (
                processes.statuses(others, within=240 if sent == signal.SIGTERM else WITHIN)
                if joined
                else []
            )
            assert set(statuses) <= {0, 42, -signal.SIGTERM, *ENDINGS}, processes.told()
        assert_ended_alike(finish(rng.choice([4, 2, 1]), config, out), whole)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pair", "pair of hidden states", "router"])
def test_pairs_and_router_runs_of_four_processes_equal_those_of_one(
    anchor, model, prepared, corpora, tmp_path, kind
):
    """With what they read beside their records: raw documents, which one of them prepares and
    embeds; frozen weights, of which each reads its share."""
    overrides = ("train.steps=6", "mesh.fsdp=4", "mesh.tensor=2", "train.save_every=3")
    if kind != "router":
        row = "pair.row=" + ("hidden" if "hidden" in kind else "embedding")
        run = pair_config(anchor, corpora["code"], "code", row, *overrides)
    else:
        run = run_config("router", prepared["public"], *overrides, router={"model": str(model)})
    (tmp_path / "run.yaml").write_text(dump_yaml(run))
    one, four = (finish(count, tmp_path / "run.yaml", tmp_path / f"of{count}") for count in (1, 4))
    assert_same_bits(saved(four, 6), saved(one, 6))


@pytest.mark.slow
def test_a_directory_that_not_all_processes_see_is_refused(config, tmp_path):
    """As on hosts without a disk in common; here each is given another path."""
    with Processes(2, config, tmp_path / "run", out_of={1: tmp_path / "elsewhere"}) as processes:
        assert set(processes.statuses()) <= {2, *ENDINGS}, processes.told()
    assert "is not the same place for all processes" in processes.logs[1].read_text()


@pytest.mark.slow
def test_two_processes_train_in_a_bucket_and_go_on_there(bucket, prepared, tmp_path):
    """Data, checkpoints and metrics; one is killed. What comes of it are the bits of one process on
    a disk."""
    run = run_config(
        "anchor", prepared["public"], "train.steps=12", "mesh.fsdp=8", "train.save_every=4"
    )
    (tmp_path / "disk.yaml").write_text(dump_yaml(run))
    upload(prepared["public"], bucket / "public")
    (tmp_path / "bucket.yaml").write_text(
        dump_yaml(run).replace(str(prepared["public"]), str(bucket / "public"))
    )
    outs = {0: bucket / "run", 1: bucket / "run"}
    with Processes(2, tmp_path / "bucket.yaml", tmp_path / "killed", out_of=outs) as processes:
        while not StepCheckpoints(bucket / "run" / "checkpoints").steps():
            assert all(process.poll() is None for process in processes.all), processes.told()
            time.sleep(0.1)
        processes.all[1].kill()
        assert set(processes.statuses([0], within=WITHIN)) <= ENDINGS, processes.told()
    with Processes(2, tmp_path / "bucket.yaml", tmp_path / "resumed", out_of=outs) as processes:
        assert processes.statuses() == [0, 0], processes.told()
    expected, found = (
        flatten(open_artifact(path).params())
        for path in (finish(1, tmp_path / "disk.yaml", tmp_path / "disk"), bucket / "run")
    )
    for name, array in expected.items():
        np.testing.assert_array_equal(np.asarray(found[name]), np.asarray(array), err_msg=name)
    assert [entry["step"] for entry in read_metrics(bucket / "run") if "loss" in entry] == list(
        range(1, 13)
    )
