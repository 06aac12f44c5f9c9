"""Packages of public registries, pinned by digest: getting one, and the files inside it.

They come through the clients a machine has (pip, npm, apt), as those are configured. Downloads are
kept in the cache (storage/cache.py) and checked again each time they are used.
"""

import concurrent.futures
import fnmatch
import hashlib
import importlib.util
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import urllib.parse
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from flexolmo_jax.runtime import progress
from flexolmo_jax.storage import files
from flexolmo_jax.storage.cache import cache_folder
from flexolmo_jax.storage.paths import children

CLIENT_TIMEOUT_S = 600
_ARCHIVES = (".whl", ".gz", ".zip", ".tgz", ".deb")


class Package(NamedTuple):
    """What a registry is asked for.

    pip and npm must give exactly this version and digest. apt serves its current build only: there
    `version` is a prefix of what is accepted, and another digest is noted instead of refused.
    """

    client: str  # pip, npm or apt
    name: str
    version: str
    sha256: str
    kind: str = "wheel"  # pip only: wheel or sdist
    # pip only: options that choose one binary wheel, the same on every machine
    tags: tuple[str, ...] = ()


class Missing(Exception):
    """A package that cannot be had here, and why, in one line."""


def download_all(packages: Iterable[Package]) -> tuple[dict[Package, Path], dict[Package, str]]:
    """Returns the archive of each package that could be had, and why the others could not."""
    archives: dict[Package, Path] = {}
    reasons: dict[Package, str] = {}
    # Most of the time goes into pip asking source distributions for their metadata: they start
    # first, and four packages run at once.
    packages = sorted(packages, key=lambda package: package.kind != "sdist")
    with (
        progress.bar("fetching packages", len(packages)) as advance,
        concurrent.futures.ThreadPoolExecutor(4) as pool,
    ):
        jobs = {pool.submit(download, package): package for package in packages}
        for job in concurrent.futures.as_completed(jobs):
            package = jobs[job]
            try:
                archives[package] = job.result()
            except (Missing, OSError) as error:
                reasons[package] = str(error)
                progress.note(f"{package.client} {package.name} {package.version}: {error}")
            advance(1, package.name)
    return archives, reasons


def download(package: Package) -> Path:
    """One package's archive, from the cache or its client, its digest checked. Raises Missing."""
    cache = cache_folder("downloads", on_disk=True)
    name = package.name.strip("@").replace("/", "-")
    folder = cache / f"{package.client}-{name}-{package.version}"
    for path in children(folder):
        if path.is_file() and (package.client == "apt" or digest_of_file(path) == package.sha256):
            return path
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".incoming-") as incoming:
        _CLIENTS[package.client](package, Path(incoming))
        found = [path for path in Path(incoming).iterdir() if path.suffix in _ARCHIVES]
        if len(found) != 1:
            raise Missing(f"{package.client} gave {len(found)} files: expected one")
        _check(package, found[0])
        target = folder / found[0].name
        folder.mkdir(exist_ok=True)
        files.move_file(found[0], target)
    return target


def digest_of_file(path: Path) -> str:
    """SHA-256 in hex. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_in(archive: Path, *patterns: str) -> Iterator[tuple[str, bytes]]:
    """(path, content) of the files in a wheel, tar archive, Debian package or folder that match.

    In a pattern, `*` matches slashes too.
    """

    def wanted(name: str) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)

    if archive.suffix == ".deb":
        with tempfile.TemporaryDirectory(prefix="flexolmo-deb-") as folder:
            _run(["dpkg", "-x", str(archive), folder], Path(folder))
            yield from files_in(Path(folder), *patterns)
    elif archive.is_dir():
        for path in sorted(archive.rglob("*")):
            name = path.relative_to(archive).as_posix()
            if wanted(name) and path.is_file() and not path.is_symlink():
                yield name, path.read_bytes()
    elif zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as wheel:
            for name in filter(wanted, wheel.namelist()):
                yield name, wheel.read(name)
    else:
        with tarfile.open(archive) as tar:
            for entry in tar:
                # source distributions and npm packages hold everything in one folder
                name = entry.name.partition("/")[2]
                if wanted(name) and (file := tar.extractfile(entry)):
                    yield name, file.read()


def texts_in(archive: Path, *patterns: str) -> Iterator[tuple[str, str]]:
    """(path, text) of the files that match: UTF-8, or Latin-1 where they are not."""
    for name, content in files_in(archive, *patterns):
        try:
            yield name, content.decode("utf-8-sig")
        except UnicodeDecodeError:
            yield name, content.decode("latin-1")


def _check(package: Package, path: Path) -> None:
    digest = digest_of_file(path)
    if package.client == "apt":
        served = urllib.parse.unquote(path.name).split("_")[1]
        if not served.startswith(package.version):
            raise Missing(f"apt serves version {served}: expected {package.version}")
        if digest != package.sha256:
            progress.note(
                f"apt {package.name}: {served} has sha256 {digest}, another build than expected:"
                " taken and recorded"
            )
    elif digest != package.sha256:
        raise Missing(f"wrong digest: got sha256 {digest}, expected {package.sha256}; not used")


# pip and npm have caches of their own in the home folder, and fail where they cannot write there:
# here their caches are folders beside ours.


def _pip(package: Package, incoming: Path) -> None:
    if importlib.util.find_spec("pip") is None:
        raise Missing("this Python has no pip (`python -m ensurepip` adds it)")
    # pip runs a source distribution's own code to learn its metadata. It checks a hash before that
    # only when a requirements file gives one.
    requirements = incoming / "requirements.txt"
    requirements.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n")
    options = ["--quiet", "--no-input", "--no-deps", "--ignore-requires-python", "--require-hashes"]
    options += ["--cache-dir", str(incoming.parent / ".pip")]
    if package.kind == "sdist":
        options += ["--no-binary", ":all:"]
    else:
        options += ["--only-binary", ":all:", *package.tags]
    options += ["-d", str(incoming), "-r", str(requirements)]
    _run([sys.executable, "-m", "pip", "download", *options], incoming)


def _npm(package: Package, incoming: Path) -> None:
    options = ["--silent", "--ignore-scripts", "--logs-max=0"]
    options += ["--cache", str(incoming.parent / ".npm")]
    _run([_program("npm"), "pack", *options, f"{package.name}@{package.version}"], incoming)


def _apt(package: Package, incoming: Path) -> None:
    _program("dpkg")  # unpacks it afterwards
    _run([_program("apt-get"), "--quiet", "download", package.name], incoming)


_CLIENTS = {"pip": _pip, "npm": _npm, "apt": _apt}


def _program(name: str) -> str:
    if (path := shutil.which(name)) is None:
        raise Missing(f"{name} is not on this machine")
    return path


def _run(command: list[str], folder: Path) -> None:
    """Runs a client. Raises Missing with the line of its output that says most."""
    name = "pip" if "pip" in command else Path(command[0]).name
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            timeout=CLIENT_TIMEOUT_S,
            capture_output=True,
            text=True,
            errors="replace",
        )
    except subprocess.TimeoutExpired:
        raise Missing(f"{name} gave no answer within {CLIENT_TIMEOUT_S} s") from None
    except OSError as error:
        raise Missing(f"{name} cannot be run: {error.strerror}") from None
    if done.returncode:
        lines = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        errors = [line for line in lines if re.match(r"(ERROR|E|npm (ERR!|error))\b", line)]
        said = errors or lines[-1:] or ["no message"]
        raise Missing(f"{name} failed: {said[0][:300]}")
