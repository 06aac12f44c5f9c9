"""Many processes of one run: how they find each other, agree, stop at the same step, and end when
one of them is gone.

Every process runs the same program; JAX joins their devices. Only the first one writes small files
and prints. When a process dies, the others end: their next exchange with it fails (exit status 75),
or JAX's coordination service misses it after `HEARTBEAT` seconds (134). When all live but a step
hangs, the training loop's watchdog ends them.
"""

import importlib.util
import itertools
import json
import logging
import os
import re
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
from flexolmo_jax.runtime import interrupts, progress, waiting
from flexolmo_jax.runtime.interrupts import ENDING, PREEMPTED, Ended

# After these, as after PREEMPTED, the same command resumes; after the second on another host.
PEER_LOST, BAD_HOST = 75, 76
HEARTBEAT = 10  # seconds without a sign of life after which a process counts as dead
GOODBYE = 8  # seconds that a process waits at its end for the others to end too
PATIENCE = 600  # seconds to wait for all others at the start
THREADS = 16  # of each process on CPUs, whatever its host has
# statuses of XLA's errors, and words in the text of others, by which a peer is lost
_PASSING = ("UNAVAILABLE", "ABORTED", "CANCELLED", "DEADLINE_EXCEEDED")
_GONE = re.compile(
    r"connection|connect |timed? ?out|heartbeat|broken pipe|socket|by peer|remote process"
    r"|network|unreachable|barrier|coordination",
    re.IGNORECASE,
)
# an accelerator that another process holds, often one of a run that was preempted there
_HELD = re.compile(
    r"(TPU|device) is already in use|device or resource busy|couldn't open iommu group",
    re.IGNORECASE,
)
_FOR_EVER = 7 * 24 * 3600 * 1000  # ms; if the awaited process dies, all end

_joined = False
_alone = False  # whether the first process is in `by_the_first`, where the others wait for it
_turns = itertools.count()
_asked = itertools.count()  # how often JAX was asked whether all are to stop


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
    """Joins the other processes of this run, if there are any. Call it before JAX is used.

    Args:
        coordinator, processes, process: host:port that the first process listens on, how many there
            are, and which this is; all or none.
        look: without them, whether to look for what a TPU pod, GKE, Slurm or
            JAX_COORDINATOR_ADDRESS says.

    Raises UserError where these do not fit together; SystemExit with 75 where the others cannot be
    reached.
    """
    given = {"--coordinator": coordinator, "--processes": processes, "--process": process}
    missing = [name for name, value in given.items() if value is None]
    if not missing:
        place = _checked(str(coordinator), int(processes or 0), int(process or 0))
    elif len(missing) < len(given):
        raise UserError(
            f"{' and '.join(missing)} not given; expected all of {', '.join(given)}, or none of"
            " them"
        )
    else:
        waiting.correct(os.environ)
        place = detect(os.environ) if look else None
    if place is not None:
        _join(place)


def _join(place: Place) -> None:
    import jax

    # XLA splits a CPU's matrix products over its threads, and sums in that order. With the same
    # number of threads the bits are the same, however a run's devices are spread over processes.
    total = (place.processes or 1) * int(os.environ.get("JAX_NUM_CPU_DEVICES") or 1)
    os.environ.setdefault("PJRT_NPROC", str(max(THREADS, total)))
    options: dict[str, Any] = {}
    if place.coordinator is not None:
        options = {"cluster_detection_method": "deactivate", "local_device_ids": None}
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    who = "a process" if place.process is None else f"process {place.process} of {place.processes}"
    try:
        with waiting.at_most(PATIENCE, place.coordinator, who, PEER_LOST):
            jax.distributed.initialize(
                place.coordinator,
                place.processes,
                place.process,
                initialization_timeout=PATIENCE + 60,  # later: it aborts, and names nobody
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
        raise SystemExit(PEER_LOST) from error  # a process that starts too late is no user's error
    global _joined
    _joined = True
    progress.console.quiet = jax.process_index() != 0


def detect(environment: Mapping[str, str]) -> Place | None:
    """What the environment says of other processes; None where there are none.

    Raises UserError where only a part of it is set.
    """

    def need(*names: str, because: str, hint: str) -> None:
        if missing := [name for name in names if not environment.get(name)]:
            raise UserError(
                f"{because}, but {missing[0]} is not set; {hint}, or --distributed none for"
                " one process"
            )

    if environment.get("JAX_COORDINATOR_ADDRESS"):
        names = ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
        need(
            *names, because="JAX_COORDINATOR_ADDRESS is set", hint=f"set {' and '.join(names)} too"
        )
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
        need(
            *names,
            because=f"SLURM_NTASKS is {environment['SLURM_NTASKS']}",
            hint="start it with srun",
        )
        return Place(None, None, None)
    hosts = (environment.get("TPU_WORKER_HOSTNAMES") or "").split(",")
    if len(hosts) > 1 or environment.get("MEGASCALE_COORDINATOR_ADDRESS"):
        return Place(None, None, None)  # GKE
    # A TPU VM: its metadata server knows its pod. Programs compiled for a TPU elsewhere have none.
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
    """Whether `join` has joined this process to others, or to a run of one process."""
    return _joined


def is_first() -> bool:
    """Whether this is the process that writes and prints for all."""
    if not _joined:
        return True
    import jax

    return jax.process_index() == 0


def by_the_first(function: Callable[[], Any]) -> Any:
    """Calls `function` on the first process only; returns its result, or raises its UserError, on
    every process. All have to call this, in the same order.

    The result has to be made of JSON's types. Inside of `function` this is a plain call.
    """
    global _alone
    if not _joined or _alone:
        return function()
    values, key = _key_value_store(), f"flexolmo/{next(_turns)}"
    if not is_first():
        outcome = json.loads(values.blocking_key_value_get(key, _FOR_EVER))
    else:
        _alone = True
        try:
            outcome = {"result": function()}
        except UserError as error:
            outcome = {"error": str(error)}
        finally:
            _alone = False
        values.key_value_set(key, json.dumps(outcome))
    if "error" in outcome:
        raise UserError(outcome["error"])
    return outcome["result"]


def compile_for_all(function: Any, *arguments: Any) -> None:
    """Compiles a jitted function for these arguments, and waits until all processes have: in their
    first exchange they do not wait long for each other."""
    function.lower(*arguments).compile()
    by_the_first(lambda: None)


def _key_value_store() -> Any:
    """JAX's key-value store of a run's processes, which has no public name."""
    from jax._src import distributed

    return distributed.global_state.client


@contextmanager
def stop_requests() -> Iterator[Callable[[], int | None]]:
    """Yields a function that returns the exit status to stop with, or None. All processes of a run
    have to call it equally often, after every step and wherever else they can stop.

    The signals of ENDING ask for a stop, but for those that are ignored and, beside Ctrl-C and
    SIGTERM, those that the program itself has a use for. A save that goes on is completed. A second
    Ctrl-C kills as usual. Of several processes one gets the signal, and all stop at the same place,
    with the status of SIGTERM. Outside of the main thread, signals are not caught.
    """
    caught: list[int] = []  # signals

    def catch(number: int, _frame: object) -> None:
        if caught and number == signal.SIGINT:
            raise Ended
        caught.append(number)
        if _joined:
            signal.raise_signal(signal.SIGTERM)

    in_main = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, catch) for number in _to_catch()} if in_main else {}
    try:
        yield (
            _agreed() if _joined else lambda: ENDING[signal.Signals(caught[0])] if caught else None
        )
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _to_catch() -> Iterator[signal.Signals]:
    for number in ENDING:
        is_free = interrupts.is_default(number) or interrupts.is_ours(number)
        is_known = signal.getsignal(number) not in (signal.SIG_IGN, None)
        if number == signal.SIGTERM and _joined:  # JAX catches it itself
            continue
        if is_free or (is_known and number in (signal.SIGINT, signal.SIGTERM)):
            yield number


def _agreed() -> Callable[[], int | None]:
    """Asks JAX, which agrees with the others when to stop, and does not say it twice."""
    from jax.experimental import multihost_utils

    stopped = False

    def request() -> int | None:
        nonlocal stopped
        stopped = stopped or multihost_utils.reached_preemption_sync_point(next(_asked))
        return PREEMPTED if stopped else None

    return request


def ending(run: Callable[[], int], *, whole: bool = False) -> int:
    """The exit status of `run()`, which may end in SystemExit and KeyboardInterrupt too.

    `whole`: the process has nothing else to do and ends here. A process that has joined others ends
    here too, together with those it can still reach. Both skip Python's own shutdown. That waits
    for processes that are gone. It also takes modules apart while their threads run, and frees
    objects too late: an exception whose frames held compiled modules made two of five interrupted
    processes end in a segmentation fault.
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
        ended = error if isinstance(error, Ended) else Ended()
        print(ended.told, file=sys.stderr)
        return ended.status
    if isinstance(error, RuntimeError) and _HELD.search(str(error)):
        told = " ".join(str(error).split())[:300]
        print(f"flexolmo: host {socket.gethostname()} cannot be used: {told}", file=sys.stderr)
        return BAD_HOST
    if _joined and _is_loss(error):
        told = " ".join(str(error).split())[:300]
        print(f"flexolmo: another process, or the way to it, is lost: {told}", file=sys.stderr)
        return PEER_LOST
    traceback.print_exception(error)
    return 1


def _is_loss(error: BaseException) -> bool:
    """Whether an error says that another process, or the way to it, is gone: a restart mends that.

    A mistake of the program comes again. XLA calls some losses INTERNAL or UNKNOWN too, so their
    text decides. Gloo's "enforce fail" means that processes exchanged tensors of other sizes.
    """
    import jax

    if not isinstance(error, jax.errors.JaxRuntimeError):
        return False
    status, _, text = str(error).partition(":")
    if status.strip() in _PASSING:
        return True
    is_open = status.strip() in ("INTERNAL", "UNKNOWN", "FAILED_PRECONDITION", "DATA_LOSS")
    return is_open and bool(_GONE.search(text)) and "enforce fail" not in text


def _leave(status: int) -> None:
    """Ends this process once its output is flushed. Verbs have closed their files and ended their
    threads by now, after errors too."""
    if threading.current_thread() is threading.main_thread():
        for number in ENDING:
            signal.signal(number, signal.SIG_IGN)  # it is over
    logging.shutdown()
    for stream in filter(None, (sys.stdout, sys.stderr)):  # None: closed before this began
        with suppress(OSError):  # a result has been flushed where it was printed, and errors told
            stream.flush()
    if _joined and status != PEER_LOST:
        import jax

        # The first process that leaves ends the others; so all wait for each other, for a while.
        leaving = threading.Thread(target=jax.distributed.shutdown, daemon=True)
        leaving.start()
        leaving.join(GOODBYE + 2)
    os._exit(status)
