"""Many processes of one run: how they find each other, agree, stop at the same step, and end when
one of them is gone.

Every process runs the same program; JAX joins their devices. The first of them alone writes small
files and speaks. A process that dies is missed within `HEARTBEAT` seconds by JAX's coordination
service, which ends the others (exit status 134), where their own next exchange with it has not
failed before that (75). A step that hangs although all processes live is ended by the watchdog of
the training loop.
"""

import importlib.util
import itertools
import json
import logging
import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from flexolmo_jax.errors import UserError
from flexolmo_jax.runtime import interrupts, progress
from flexolmo_jax.runtime.interrupts import INTERRUPTED

# exit statuses after which the same command goes on from the last checkpoint
PREEMPTED, PEER_LOST = 42, 75
HEARTBEAT = 10  # seconds without a sign of life after which a process is taken for dead
GOODBYE = 8  # seconds that one which ends waits for the others to end too
PATIENCE = 600  # seconds to wait for all others at the start
THREADS = 16  # of each process on CPUs, whatever its host has
_FOR_EVER = 7 * 24 * 3600 * 1000  # ms; whoever is waited for is alive, or all end

_joined = False
_alone = False  # whether the first process does something that the others wait for
_turns = itertools.count()


class Place(NamedTuple):
    """Where a process stands among all."""

    coordinator: str | None  # host:port of the first; None: as JAX finds in the environment
    processes: int | None
    process: int | None


def join(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    *,
    look: bool = True,
) -> None:
    """Joins the other processes of this run, if there are any. To be called before JAX is used.

    Args:
        coordinator, processes, process: host:port that the first process listens on, how many there
            are, and which this is; all or none.
        look: without them, whether to look for what a TPU pod, GKE, Slurm or
            JAX_COORDINATOR_ADDRESS says.

    Raises UserError where these do not fit together; SystemExit with 75 where the others cannot be
    reached.
    """
    given = {"--coordinator": coordinator, "--processes": processes, "--process": process}
    if missing := [name for name, value in given.items() if value is None]:
        if len(missing) < 3:
            raise UserError(
                f"{' and '.join(missing)} not given; expected all of {', '.join(given)}, or none of"
                " them"
            )
        place = detect(os.environ) if look else None
    else:
        place = _checked(str(coordinator), int(processes or 0), int(process or 0))
    if place is None:
        return
    import jax

    # XLA's CPU products are cut up, and summed, by its number of threads: the same one however
    # devices are shared out gives the same bits.
    total = (place.processes or 1) * int(os.environ.get("JAX_NUM_CPU_DEVICES") or 1)
    os.environ.setdefault("PJRT_NPROC", str(max(THREADS, total)))
    options = (
        {}
        if place.coordinator is None
        else {"cluster_detection_method": "deactivate", "local_device_ids": None}
    )
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            place.coordinator,
            place.processes,
            place.process,
            initialization_timeout=PATIENCE,
            heartbeat_timeout_seconds=HEARTBEAT,
            shutdown_timeout_seconds=GOODBYE,
            **options,
        )
    except (RuntimeError, ValueError, OSError) as error:
        told = (
            f"cannot join the other processes ({place.coordinator or 'as the environment says'}):"
            f" {' '.join(str(error).split())[:200]}"
        )
        if not isinstance(error, RuntimeError):
            raise UserError(told) from error
        print(f"flexolmo: {told}", file=sys.stderr)
        raise SystemExit(PEER_LOST) from error  # one that starts too late is no mistake
    global _joined
    _joined = True
    progress.console.quiet = jax.process_index() != 0


def detect(environment: Mapping[str, str]) -> Place | None:
    """What the environment says of other processes; None where there are none.

    Raises UserError where it says half of it.
    """

    def need(*names: str, of: str, hint: str) -> None:
        if missing := [name for name in names if not environment.get(name)]:
            raise UserError(
                f"{of}, but {missing[0]} is not set; {hint}, or --distributed none for one process"
            )

    if environment.get("JAX_COORDINATOR_ADDRESS"):
        names = ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
        need(*names, of="JAX_COORDINATOR_ADDRESS is set", hint=f"set {' and '.join(names)} too")
        try:
            processes, process = (int(environment[name]) for name in names)
        except ValueError:
            raise UserError(
                f"{' and '.join(f'{name}={environment[name]}' for name in names)}; expected two"
                " integers"
            ) from None
        return _checked(environment["JAX_COORDINATOR_ADDRESS"], processes, process)
    if int(environment.get("SLURM_NTASKS") or 1) > 1:
        names = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")
        need(*names, of=f"SLURM_NTASKS is {environment['SLURM_NTASKS']}", hint="start it with srun")
        return Place(None, None, None)
    if len((environment.get("TPU_WORKER_HOSTNAMES") or "").split(",")) > 1 or environment.get(
        "MEGASCALE_COORDINATOR_ADDRESS"
    ):
        return Place(None, None, None)  # GKE
    # A TPU VM: its metadata server knows its pod. What is compiled for a TPU that is not there asks
    # nobody.
    has_tpu = importlib.util.find_spec("libtpu") and any(
        any(Path("/dev").glob(name)) for name in ("accel[0-9]*", "vfio/[0-9]*")
    )
    if has_tpu and not environment.get("TPU_SKIP_MDS_QUERY"):
        return Place(None, None, None)
    return None


def _checked(coordinator: str, processes: int, process: int) -> Place:
    host, colon, port = coordinator.rpartition(":")
    if not (host and colon and port.isdigit()):
        raise UserError(
            f"the coordinator is {coordinator!r}; expected HOST:PORT of the first process"
        )
    if not 0 <= process < processes:
        raise UserError(
            f"this is process {process} of {processes}; expected one of 0 to {processes - 1}"
        )
    if process != 0:
        try:
            socket.getaddrinfo(host.strip("[]"), int(port))
        except OSError as error:
            raise UserError(
                f"the coordinator's host {host!r} is not known here: {error.strerror or error}"
            ) from None
    return Place(coordinator, processes, process)


def joined() -> bool:
    """Whether this process runs under `join`, be it with others or as the only one."""
    return _joined


def is_first() -> bool:
    """Whether this is the process that writes and speaks for all."""
    if not _joined:
        return True
    import jax

    return jax.process_index() == 0


def by_the_first(function: Callable[[], Any]) -> Any:
    """What `function`, called by the first process alone, returns or raises, on every process. All
    have to call this, in the same order.

    What it returns has to be made of JSON's types. Called by `function` itself it is a plain call.
    Raises UserError if that does.
    """
    global _alone
    if not _joined or _alone:
        return function()
    store, key = _store(), f"flexolmo/{next(_turns)}"
    if not is_first():
        outcome = json.loads(store.blocking_key_value_get(key, _FOR_EVER))
    else:
        _alone = True
        try:
            outcome = {"result": function()}
        except UserError as error:
            outcome = {"error": str(error)}
        finally:
            _alone = False
        store.key_value_set(key, json.dumps(outcome))
    if "error" in outcome:
        raise UserError(outcome["error"])
    return outcome["result"]


def compile_for_all(function: Any, *arguments: Any) -> None:
    """Compiles a jitted function for these arguments, and waits until all processes have: in their
    first exchange they do not wait long for each other."""
    function.lower(*arguments).compile()
    by_the_first(lambda: None)


def _store() -> Any:
    """JAX's key-value store of a run's processes, which has no public name."""
    from jax._src import distributed

    return distributed.global_state.client


@contextmanager
def stop_requests() -> Iterator[Callable[[int], int | None]]:
    """Yields a function to be called once after every step with its number: the exit status to stop
    with after this step, or None.

    SIGTERM asks for it, and Ctrl-C; a second Ctrl-C kills as usual. With several processes it is
    enough that one of them is asked: all get the answer at the same step. Threads cannot catch
    signals.
    """
    if _joined:
        from jax.experimental import multihost_utils

        # JAX catches SIGTERM itself, and agrees on a step with the others.
        before = {
            signal.SIGINT: signal.signal(
                signal.SIGINT, lambda *_: signal.raise_signal(signal.SIGTERM)
            )
        }

        def request(step: int) -> int | None:
            return PREEMPTED if multihost_utils.reached_preemption_sync_point(step) else None

    else:
        statuses = {signal.SIGINT: INTERRUPTED, signal.SIGTERM: PREEMPTED}
        caught: list[int] = []

        def catch(number: int, _frame: object) -> None:
            if caught and number == signal.SIGINT:
                raise KeyboardInterrupt
            caught.append(statuses[signal.Signals(number)])

        in_main = threading.current_thread() is threading.main_thread()
        before = {number: signal.signal(number, catch) for number in statuses} if in_main else {}

        def request(step: int) -> int | None:
            return caught[0] if caught else None

    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ending(run: Callable[[], int], *, whole: bool = False) -> int:
    """The exit status of `run()`, which may end in SystemExit and KeyboardInterrupt too.

    `whole`: this is all that the process is for, and it ends here. So does one that has joined
    others, with all of them where they can still be reached. Neither goes through Python's own
    ending. That waits for processes that are gone. It also takes modules apart while their threads
    run, and frees last what somebody still holds: an exception with the compiled modules in its
    frames was a segmentation fault in two of five interrupted processes.
    """
    try:
        status = run()
    except BaseException as error:
        if not (whole or _joined or isinstance(error, KeyboardInterrupt)):
            raise
        status = _status_of(error)
    if whole or _joined:
        _leave(status)
    return status


def _status_of(error: BaseException) -> int:
    if isinstance(error, SystemExit):
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    if isinstance(error, KeyboardInterrupt):
        print(interrupts.TOLD, file=sys.stderr)
        return INTERRUPTED
    if _joined and _is_loss(error):
        print(
            "flexolmo: another process, or the way to it, is lost:"
            f" {' '.join(str(error).split())[:300]}",
            file=sys.stderr,
        )
        return PEER_LOST
    traceback.print_exception(error)
    return 1


def _is_loss(error: BaseException) -> bool:
    import jax

    return isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error)


def _leave(status: int) -> None:
    """Ends this process, with all that it printed. Verbs have closed what they opened and waited
    for what they started, errors or not."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is over
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # whoever printed a result has flushed it, and told
            stream.flush()
    if _joined and status != PEER_LOST:
        import jax

        # Whoever leaves first takes the others with it; so all wait for each other, but not for
        # ever.
        leaving = threading.Thread(target=jax.distributed.shutdown, daemon=True)
        leaving.start()
        leaving.join(GOODBYE + 2)
    os._exit(status)
