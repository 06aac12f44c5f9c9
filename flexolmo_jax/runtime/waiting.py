"""How long a process waits for the others at the start, whom it then names as missing, and what it
is told of slices that are gone."""

import os
import socket
import sys
import threading
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager, suppress

from flexolmo_jax.errors import UserError

SLICES = "FLEXOLMO_SLICES"  # how many a job has, as its launcher knows
STALE = "MEGASCALE_"  # how the variables begin that tell a worker of its slices
SECONDS = 5  # in which a host has to answer


def correct(environment: MutableMapping[str, str]) -> None:
    """Puts right what is said of slices.

    A worker that takes another's place may be told of slices that are going away, and JAX would
    wait for them. A job of one slice needs none of it. Raises UserError where this slice is none of
    the job's.
    """
    slices = environment.get(SLICES, "")
    if slices == "1":
        for name in [name for name in environment if name.startswith(STALE)]:
            del environment[name]
    elif slices and "MEGASCALE_NUM_SLICES" in environment:
        environment["MEGASCALE_NUM_SLICES"] = slices
    own, count = (environment.get(f"MEGASCALE_{key}", "") for key in ("SLICE_ID", "NUM_SLICES"))
    if own.isdecimal() and count.isdecimal() and int(own) >= int(count):
        raise UserError(
            f"MEGASCALE_SLICE_ID is {own} on {socket.gethostname()}; expected one of the"
            f" {count} slices of this job (MEGASCALE_NUM_SLICES); delete this worker"
        )


@contextmanager
def at_most(seconds: float, coordinator: str | None, who: str, status: int) -> Iterator[None]:
    """Ends this process with `status` if what is inside takes longer: JAX's own end names nobody.

    Args:
        coordinator: host:port of the first process, where that is known.
        who: this process, in words.
    """
    done = threading.Event()

    def watch() -> None:
        if not done.wait(seconds):
            told = missing(coordinator, os.environ)
            with suppress(OSError):
                print(
                    f"flexolmo: {socket.gethostname()}, {who}, has waited {seconds:.0f} s for the"
                    f" others to start: {told}",
                    file=sys.stderr,
                    flush=True,
                )
            os._exit(status)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        done.set()


def missing(coordinator: str | None, environment: Mapping[str, str]) -> str:
    """Who has not come, as far as can be seen from here."""
    slices = environment.get("MEGASCALE_COORDINATOR_ADDRESS")
    hosts = (environment.get("TPU_WORKER_HOSTNAMES") or "").split(",")
    unknown = [host for host in hosts if host and not _is_known(host)]
    if unknown:
        return f"no host has the name {', '.join(unknown)} (TPU_WORKER_HOSTNAMES)"
    if coordinator and not _answers(coordinator):
        return f"the first process does not answer at {coordinator}"
    if slices and not _is_known(slices.partition(":")[0]):
        return f"no host has the name {slices} (MEGASCALE_COORDINATOR_ADDRESS)"
    count = environment.get("MEGASCALE_NUM_SLICES")
    return f"not all processes{f' of {count} slices' if count else ''} have come"


def _is_known(host: str) -> bool:
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        return False
    return True


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=SECONDS).close()
    except OSError:
        return False
    return True
