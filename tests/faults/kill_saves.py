"""Kills a run's saves into a bucket at every single request that changes something there, and looks
at what is there afterwards.

    python -m tests.faults.kill_saves PLACE EVERY

Run as a process of its own, with the object store's address in the environment. Between it and its
children, which save, lies a proxy that kills the child before it passes on the request. EVERY is
the distance between the requests that are tried. Prints how many.
"""

import http.client
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

STEPS = 4
# requests until the kill; whom; the last step that was saved
left, victim, done = (multiprocessing.Value("i", 0) for _ in range(3))


def start_proxy(store: str) -> int:
    """Forks it and returns its port."""
    host = store.removeprefix("http://")

    class Proxy(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        # an answer is one packet, which nobody waits 40 ms for
        disable_nagle_algorithm, wbufsize = True, -1

        def forward(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.command not in ("GET", "HEAD"):
                with left.get_lock():
                    left.value -= 1
                    if left.value == 0:
                        os.kill(victim.value, signal.SIGKILL)
                        self.close_connection = True
                        return
            there = http.client.HTTPConnection(host)
            there.request(
                self.command,
                self.path,
                body,
                {name: value for name, value in self.headers.items() if name != "Host"},
            )
            answer = there.getresponse()
            content = answer.read()
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name not in ("Content-Length", "Transfer-Encoding", "Connection", "Date"):
                    # where an upload goes on
                    self.send_header(name, value.replace(store, f"http://{self.headers['Host']}"))
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
            there.close()

        do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = forward

        def log_message(self, *_: object) -> None: ...

        def handle(self) -> None:
            try:
                super().handle()
            except ConnectionError:
                return  # the child is dead

    server = ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    parent = os.getpid()
    if os.fork() == 0:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        while os.getppid() == parent:
            threading.Event().wait(0.2)
        os._exit(0)
    return server.server_port


def in_child(act: Callable[[], None], kill_before: int = 0) -> int:
    """The exit status of a forked process that is killed before it changes something for the
    so-manieth time."""
    pid = os.fork()
    if pid:
        status = os.waitpid(pid, 0)[1]
        left.value = 0
        return status
    try:
        victim.value, left.value = os.getpid(), kill_before
        act()
    except BaseException:
        traceback.print_exc(file=sys.stdout)
        sys.stdout.flush()
        os._exit(1)
    os._exit(0)


def state(step: int) -> dict[str, Any]:
    import numpy as np

    return {"params": {"a": np.full((64, 3), step, np.float32), "b": np.arange(5.0) * step}}


def saves(place: str) -> None:
    """What a run does: it goes on from its newest checkpoint, keeps that and the best, which is the
    second, and removes the others."""
    import jax

    from flexolmo_jax.storage.checkpoint import StepCheckpoints
    from flexolmo_jax.storage.paths import path_of

    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with StepCheckpoints(path_of(place), keep=1) as checkpoints:
        restored = checkpoints.restore_latest(
            jax.tree.map(
                lambda a: jax.ShapeDtypeStruct(a.shape, jax.numpy.float32, sharding=device),
                state(0),
            )
        )
        start, found = restored or (0, state(0))
        assert start >= done.value, f"step {done.value} was saved; what is left is {start}"
        assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), found, state(start))), (
            f"step {start} is not what was saved"
        )
        for step in range(start + 1, STEPS + 1):
            checkpoints.save(step, state(step), loss=1.0 if step == 2 else 2.0)
            checkpoints.wait()
            done.value = step


def look(place: str) -> None:
    """At what must be there when all is done."""
    from flexolmo_jax.storage.checkpoint import StepCheckpoints
    from flexolmo_jax.storage.paths import children, listing, path_of

    directory = path_of(place)
    names = listing(directory).keys()
    steps = [int(path.name) for path in children(directory)]
    # Killed before the last of all removals, it leaves one that only the next save, which there is
    # not, removes.
    assert steps in ([2, STEPS], [2, STEPS - 1, STEPS]), sorted(names)
    assert StepCheckpoints(directory).steps() == steps[::-1] and not any(
        ".unfinished" in name for name in names
    ), sorted(names)


def main() -> None:
    place, every = sys.argv[1], int(sys.argv[2])
    proxy = f"http://127.0.0.1:{start_proxy(os.environ['STORAGE_EMULATOR_HOST'])}"
    os.environ |= {"STORAGE_EMULATOR_HOST": proxy, "TENSORSTORE_GCS_HTTP_URL": proxy}
    # once for all; a bucket is first asked in a child: the client survives no fork
    import flexolmo_jax.storage.checkpoint  # noqa: F401

    tried, at = 0, 1
    while True:
        directory, done.value = f"{place}/{at}/checkpoints", 0
        status = in_child(lambda directory=directory: saves(directory), kill_before=at)
        assert status in (0, signal.SIGKILL), f"request {at}: the child ended with {status}"
        if status == 0:
            break
        assert in_child(lambda directory=directory: saves(directory)) == 0, (
            f"request {at}: going on failed"
        )
        assert in_child(lambda directory=directory: look(directory)) == 0, f"request {at}"
        tried, at = tried + 1, at + every
    print(tried)


if __name__ == "__main__":
    main()
