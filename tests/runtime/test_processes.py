"""What is taken for several processes, and mistakes with them; tests/faults has the processes
themselves."""

import socket
import subprocess
import sys

import jax
import pytest

from flexolmo_jax.cli import main
from flexolmo_jax.config import dump_yaml
from flexolmo_jax.errors import UserError
from flexolmo_jax.runtime import processes
from flexolmo_jax.runtime.processes import Place, by_the_first, detect, is_first
from flexolmo_jax.runtime.waiting import correct, missing
from tests.tiny import run_config

FOUND = Place(None, None, None)  # JAX reads the rest out of the environment
SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_NODELIST": "n[1-4]",
}
JAX = {"JAX_COORDINATOR_ADDRESS": "localhost:1234", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({}, None),
        ({"SLURM_NTASKS": "1"}, None),
        (SLURM, FOUND),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        ({"TPU_WORKER_HOSTNAMES": "host-0,host-1"}, FOUND),
        ({"TPU_WORKER_HOSTNAMES": "host-0", "MEGASCALE_COORDINATOR_ADDRESS": "slice-0"}, FOUND),
        (JAX, Place("localhost:1234", 4, 3)),
    ],
)
def test_the_environment_tells_whether_there_are_others(environment, place):
    assert detect(environment) == place


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        (
            {name: value for name, value in SLURM.items() if name != "SLURM_STEP_NODELIST"},
            "SLURM_STEP_NODELIST is not set; start it with srun",
        ),
        ({"JAX_COORDINATOR_ADDRESS": "host:1"}, "JAX_NUM_PROCESSES is not set"),
        (JAX | {"JAX_PROCESS_ID": "4"}, "process 4 of 4; expected one of 0 to 3"),
        (JAX | {"JAX_PROCESS_ID": "first"}, "expected two integers"),
        (JAX | {"JAX_COORDINATOR_ADDRESS": "localhost"}, "expected HOST:PORT"),
    ],
)
def test_an_environment_that_says_half_of_it_is_refused(environment, told):
    with pytest.raises(UserError, match=told):
        detect(environment)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--coordinator", "localhost:1234"], "--processes and --process not given"),
        (["--process", "1"], "--coordinator and --processes not given"),
        (
            ["--coordinator", "localhost", "--processes", "2", "--process", "0"],
            "expected HOST:PORT",
        ),
        (
            ["--coordinator", "localhost:1234", "--processes", "2", "--process", "2"],
            "process 2 of 2; expected one of 0 to 1",
        ),
        (
            ["--coordinator", "no.such.host.invalid:1234", "--processes", "2", "--process", "1"],
            "'no.such.host.invalid' is not known here",
        ),
        (["--profile", "5"], "train.profile is '5'; expected START:STOP"),
        (["--profile", "9:5"], "train.profile is '9:5'; expected START:STOP"),
    ],
)
def test_mistakes_are_told_in_one_line_and_nothing_is_made(prepared, tmp_path, capsys, flags, told):
    (tmp_path / "run.yaml").write_text(dump_yaml(run_config("anchor", prepared["public"])))
    assert main(["train", str(tmp_path / "run.yaml"), "--out", str(tmp_path / "run"), *flags]) == 2
    error = capsys.readouterr().err
    assert told in error and len(error.splitlines()) == 1 and not (tmp_path / "run").exists()


def test_one_process_is_the_first_and_asks_nobody():
    assert is_first() and by_the_first(lambda: {"a": [1.5]}) == {"a": [1.5]}
    with pytest.raises(UserError, match="mine"):
        by_the_first(lambda: (_ for _ in ()).throw(UserError("mine")))


def test_others_that_cannot_be_reached_are_lost_not_a_mistake():
    """Nobody listens there; the launchers start again after 75 and after the runtime's own
    abort."""
    program = (
        "from flexolmo_jax.runtime import processes\nprocesses.PATIENCE ="
        " 2\nprocesses.join('127.0.0.1:9', 2, 1)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=100
    )
    assert ended.returncode == 75, ended.stderr
    assert "process 1 of 2, has waited 2 s for the others to start: the first" in ended.stderr
    assert "does not answer at 127.0.0.1:9" in ended.stderr


def test_the_first_process_says_that_others_have_not_come():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = (
        "from flexolmo_jax.runtime import processes\nprocesses.PATIENCE ="
        f" 2\nprocesses.join('127.0.0.1:{port}', 3, 0)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=100
    )
    assert ended.returncode == 75, ended.stderr
    assert "process 0 of 3, has waited 2 s for the others to start: not all" in ended.stderr


def test_hosts_that_have_no_address_are_named_as_missing():
    hosts = {"TPU_WORKER_HOSTNAMES": "localhost,gone.invalid"}
    assert missing(None, hosts) == "no host has the name gone.invalid (TPU_WORKER_HOSTNAMES)"
    slices = {"MEGASCALE_COORDINATOR_ADDRESS": "gone.invalid:8476", "MEGASCALE_NUM_SLICES": "3"}
    assert missing(None, slices).startswith("no host has the name gone.invalid:8476")
    slices["MEGASCALE_COORDINATOR_ADDRESS"] = "localhost"
    assert missing(None, slices) == "not all processes of 3 slices have come"


STALE = {
    "MEGASCALE_COORDINATOR_ADDRESS": "old-0:8476",
    "MEGASCALE_NUM_SLICES": "3",
    "MEGASCALE_SLICE_ID": "1",
}


@pytest.mark.parametrize(
    ("slices", "left"),
    [
        ({}, STALE),
        ({"FLEXOLMO_SLICES": "1"}, {}),
        ({"FLEXOLMO_SLICES": "2"}, STALE | {"MEGASCALE_NUM_SLICES": "2"}),
    ],
)
def test_a_worker_that_takes_anothers_place_believes_its_job_about_slices(slices, left):
    environment = STALE | slices | {"HOME": "/root"}
    correct(environment)
    assert environment == left | slices | {"HOME": "/root"}


def test_a_slice_that_is_none_of_the_jobs_is_refused():
    with pytest.raises(UserError, match=r"MEGASCALE_SLICE_ID is 2 on .*; expected one of the 2 "):
        correct(STALE | {"FLEXOLMO_SLICES": "2", "MEGASCALE_SLICE_ID": "2"})


@pytest.mark.parametrize(
    "told",
    [
        "Unable to initialize backend 'tpu': UNKNOWN: TPU initialization failed: open(/dev/vfio/0):"
        " Device or resource busy: Device or resource busy; Couldn't open iommu group /dev/vfio/0",
        "ABORTED: The TPU is already in use by process with pid 4711. Not attempting to load it",
    ],
)
@pytest.mark.parametrize("is_joined", [False, True])
def test_an_accelerator_that_is_held_ends_with_a_status_of_its_own_and_names_the_host(
    told, is_joined, monkeypatch, capsys
):
    monkeypatch.setattr(processes, "_joined", is_joined)
    left: list[int] = []
    monkeypatch.setattr(processes, "_leave", left.append)

    def run() -> int:
        raise jax.errors.JaxRuntimeError(told)

    assert processes.ending(run, whole=True) == 76 and left == [76]
    error = capsys.readouterr().err
    assert error.startswith(f"flexolmo: host {socket.gethostname()} cannot be used: ")
    assert len(error.splitlines()) == 1


def test_the_watchdog_ends_what_hangs_and_shows_where():
    program = (
        "import time\n"
        "from flexolmo_jax.train.watchdog import Watchdog\n"
        "def hangs():\n"
        "    time.sleep(60)\n"
        "with Watchdog() as watchdog:\n"
        "    watchdog.expect('step 1', 30)\n"
        "    watchdog.expect('step 2', 0.3)\n"
        "    hangs()\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=50
    )
    assert ended.returncode == 75
    assert (
        "step 2 took more than 0.3 s; this process ends here" in ended.stderr
        and "in hangs" in ended.stderr
    )


def test_the_watchdog_leaves_alone_what_is_in_time():
    program = (
        "import time\n"
        "from flexolmo_jax.train.watchdog import Watchdog\n"
        "with Watchdog() as watchdog:\n"
        "    for step in range(4):\n"
        "        watchdog.expect(f'step {step}', 0.5)\n"
        "        time.sleep(0.3)\n"
        "print('done')\n"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, timeout=50
        ).stdout
        == "done\n"
    )


def test_what_the_first_process_does_for_all_may_itself_be_done_by_the_first(monkeypatch):
    """Otherwise it would wait for an answer that nobody else asks for: all turns after it would be
    other ones."""
    told: dict[str, str] = {}

    class Store:
        key_value_set = told.__setitem__

    monkeypatch.setattr(processes, "_joined", True)
    monkeypatch.setattr(processes, "_key_value_store", Store)
    assert by_the_first(lambda: by_the_first(lambda: 1) + 1) == 2
    assert list(told.values()) == ['{"result": 2}']
    with pytest.raises(UserError, match="inner"):
        by_the_first(lambda: by_the_first(lambda: (_ for _ in ()).throw(UserError("inner"))))
    assert by_the_first(lambda: 3) == 3 and len(told) == 3


@pytest.mark.parametrize(
    ("told", "is_loss"),
    [
        ("UNAVAILABLE: failed to connect to all addresses", True),
        ("ABORTED: Task 1 is gone", True),
        ("DEADLINE_EXCEEDED: Barrier timed out", True),
        ("CANCELLED: call", True),
        ("FAILED_PRECONDITION: Buffer Definition Event: Gloo all-reduce failed: Connection closed"
         " by peer [10.0.0.2]:5000", True),
        ("UNKNOWN: Gloo AllGather failed: Timed out waiting 1800000ms for recv", True),
        ("INTERNAL: NCCL failed: remote process exited or there was a network error", True),
        ("INTERNAL: Gloo all-reduce failed: [enforce fail at pair.cc:547] op.preamble.length <="
         " op.nbytes. 8 vs 4. connection", False),
        ("INVALID_ARGUMENT: Executable expected parameter 0 of size 4 but got 8", False),
        ("INVALID_ARGUMENT: the network has no such connection", False),
        ("INTERNAL: during context [hlo verifier]: mixed precision in all-reduce", False),
        ("UNIMPLEMENTED: 64 bit floats", False),
        ("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes", False),
        ("NOT_FOUND: no kernel image", False),
    ],
)  # fmt: skip
def test_only_the_loss_of_a_peer_asks_for_a_restart(told, is_loss):
    import jax

    assert processes._is_loss(jax.errors.JaxRuntimeError(told)) == is_loss
    assert not processes._is_loss(RuntimeError(told))


FAILING = """
import sys, socket
import numpy as np
from flexolmo_jax.runtime import processes

with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
processes.join(f"localhost:{port}", 1, 0)
import jax

def wrong(_):
    return np.zeros(3)

processes.ending(
    lambda: jax.jit(lambda x: jax.pure_callback(wrong, jax.ShapeDtypeStruct((2,), "float32"), x))(0)
)
"""


def test_a_mistake_of_the_program_in_a_run_of_processes_is_no_lost_peer():
    ended = subprocess.run([sys.executable, "-c", FAILING], capture_output=True, text=True)
    assert "JaxRuntimeError" in ended.stderr, ended.stderr
    assert ended.returncode == 1 and "is lost" not in ended.stderr
