"""A Ray cluster that a command's work is spread over (extra `ray`).

    with connected(address):                # "" is $RAY_ADDRESS, or this machine alone
        dataset.map_batches(on_workers("flexolmo_jax.data.spread", "read_digests"))

Ray schedules, retries what a lost machine was doing, and shuffles. Here are the ways in and out: a
cluster that cannot be used, or workers with another version of this package, are a user's error.
"""

import functools
import hashlib
import importlib.util
import logging
import os
import pkgutil
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata, resources
from typing import Any

from flexolmo_jax.errors import RunError, UserError, from_a_clone

ADDRESS = "RAY_ADDRESS"  # what Ray sets for a job that it runs
# a cluster of this machine: it listens to this machine only, and keeps idle processes, which take
# seconds to start
ALONE = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_num_workers_soft_limit": "8"}
_SECONDS = 10  # in which a cluster has to answer
_PACKAGES = ("numpy", "ray", "tokenizers")  # whose versions may change what is written


@contextmanager
def connected(address: str) -> Iterator[None]:
    """A connection to the cluster, or to one of this machine that ends with it.

    `address`: host:port of the cluster's head, "auto" for one that runs on this machine, or "" for
    $RAY_ADDRESS and, without it, a new one of this machine, which no other machine can reach. A
    process that is connected already stays so.

    Raises UserError where Ray is not installed, and where the cluster does not answer or is of
    another version. Errors of the work are raised as `_told` has them.
    """
    if missing := [name for name in ("ray", "pandas") if importlib.util.find_spec(name) is None]:
        raise UserError(
            f"--ray needs the package {missing[0]}, which is missing: {from_a_clone('ray')}"
        )
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    address = address or os.environ.get(ADDRESS, "")
    if not address:
        os.environ.update(ALONE)
    import ray
    from ray.exceptions import RayError

    is_callers = ray.is_initialized()
    with _sigterm_kept():
        if not is_callers:
            _connect(address)
        try:
            _set_up_data()
            yield
        except RayError as error:
            raise _told(error) from error
        finally:
            if not is_callers:
                ray.shutdown()


@contextmanager
def _sigterm_kept() -> Iterator[None]:
    """Puts the handler of SIGTERM back, as Ray leaves its own there."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def _connect(address: str) -> None:
    import ray

    if address not in ("", "auto"):
        _check_answers(address)
    try:
        ray.init(address or "local", log_to_driver=False, logging_level=logging.CRITICAL)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UserError(
            f"the Ray cluster at {address} cannot be used: {' '.join(str(error).split())[:300]}"
        ) from error


def _set_up_data() -> None:
    from ray.data import DataContext
    from ray.data.context import ShuffleStrategy

    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    context = DataContext.get_current()
    # by tasks, which are run again where a machine is lost; older ones keep parts in actors
    context.shuffle_strategy = ShuffleStrategy.SHUFFLE_V2
    context.raise_original_map_exception = True
    context.enable_progress_bars = False


def on_workers(module: str, function: str) -> Callable[..., Any]:
    """A function for workers: it calls that function there.

    Ray sends it as code rather than by name. So it can tell on the worker that this package is of
    another version there.
    """
    expected = versions()

    def call(*args: Any, **kwargs: Any) -> Any:
        import importlib

        from flexolmo_jax.runtime.cluster import check_versions

        check_versions(expected)
        return getattr(importlib.import_module(module), function)(*args, **kwargs)

    return call


def check_versions(expected: dict[str, str]) -> None:
    """Raises UserError, on a worker, where its packages are not those of the command."""
    for name, version in versions().items():
        if version != expected.get(name):
            raise UserError(
                f"the worker {socket.gethostname()} has {name} {version}, the command"
                f" {expected.get(name)}; install the same versions on all machines"
            )


@functools.cache
def versions() -> dict[str, str]:
    """The versions of what decides which bytes are written; this package's is of its source."""
    digest = hashlib.sha256()
    root = resources.files("flexolmo_jax")
    for name in sorted(_modules(root)):
        digest.update(name.encode() + (pkgutil.get_data("flexolmo_jax", name) or b""))
    return {"flexolmo-jax": digest.hexdigest()[:12]} | {
        name: metadata.version(name) for name in _PACKAGES
    }


def shared_path_error(path: object) -> UserError:
    """What is wrong where a worker does not find a path."""
    return UserError(
        f"the worker {socket.gethostname()} does not see {path}; give paths that all machines"
        " share: a shared file system or gs://"
    )


def _modules(folder: Any, above: str = "") -> Iterator[str]:
    for entry in folder.iterdir():
        if entry.name.endswith(".py"):
            yield above + entry.name
        elif entry.is_dir():
            yield from _modules(entry, f"{above}{entry.name}/")


def _check_answers(address: str) -> None:
    """Raises UserError at once where Ray itself would try for minutes."""
    host, _, port = address.rpartition("/")[2].rpartition(":")
    if not host or not port.isdecimal():
        raise UserError(f"got the Ray cluster {address!r:.80}, expected host:port or auto")
    try:
        socket.create_connection((host, int(port)), timeout=_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise UserError(
            f"no Ray cluster answers at {address}: {error}; start one there (ray start --head), or"
            " give its address"
        ) from error


def _told(error: Exception) -> Exception:
    """The error of the work itself; a lost cluster, and what is left, as a RunError."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, ImportError):
        return UserError(
            f"a worker lacks a package ({cause}); on every machine, all of the same version:"
            f" {from_a_clone('ray')}"
        )
    if isinstance(cause, Exception):
        return cause
    return RunError(f"the Ray cluster failed: {' '.join(str(error).split())[:300]}")
