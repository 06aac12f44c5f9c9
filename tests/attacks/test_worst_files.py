"""The worst of strangers' files: each is refused in one line, soon and in little memory."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flexolmo_jax.convert import importing as convert
from flexolmo_jax.convert.importing import INDEX
from flexolmo_jax.data import records
from flexolmo_jax.exchange import embedder_file
from tests.attacks.foreign import FILES, laughs


def link(path: Path, target: str) -> None:
    path.unlink()
    path.symlink_to(target)


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def holding(text: bytes | str) -> Callable[[Path], Any]:
    return lambda path: path.write_bytes(text if isinstance(text, bytes) else text.encode())


def setting(**values: Any) -> Callable[[Path], Any]:
    return lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | values))


def sparse(path: Path) -> None:
    os.truncate(path, 8 << 30)


def bomb(path: Path) -> None:
    """Half a megabyte that unpacks to 600 MB."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name in ("idf.npy", "signs.npy"):
            with archive.open(name, "w") as member:
                for _ in range(30):
                    member.write(bytes(10 << 20))


def crowd(path: Path) -> None:
    """A zip file's directory of more members than its size tells."""
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(2000):
            archive.writestr(f"{number}", b"")


# What lies where, and in which way it is bad. Each once hung, took gigabytes or ended in a
# traceback.
WORST: dict[str, tuple[str, str, Callable[[Path], Any]]] = {
    **{f"{name}, a pipe": (kind, name, pipe) for name, (kind, _) in FILES.items()},
    **{
        f"{name}, a device": (kind, name, lambda path: link(path, "/dev/zero"))
        for name, (kind, _) in FILES.items()
    },
    **{f"{name}, a folder": (kind, name, folder) for name, (kind, _) in FILES.items()},
    **{f"{name}, 8 GB": (kind, name, sparse) for name, (kind, _) in FILES.items()},
    **{f"{name}, deep": (kind, name, holding("[" * 200_000)) for name, (kind, _) in FILES.items()},
    "a billion layers": ("hf", "config.json", setting(num_hidden_layers=10**9)),
    "a billion experts": ("hf", "config.json", setting(num_experts=10**9)),
    "as many as each may be": (
        "hf",
        "config.json",
        setting(num_hidden_layers=1024, num_experts=4096),
    ),
    "a map to a device": ("hf", INDEX, holding('{"weight_map": {"a": "/dev/zero"}}')),
    "a map out of the folder": (
        "hf",
        INDEX,
        holding('{"weight_map": {"a": "../../x.safetensors"}}'),
    ),
    "a map of millions": ("hf", INDEX, holding(b'{"weight_map": [' + b"{}," * 5_000_000 + b"{}]}")),
    "objects in a config": (
        "hf",
        "config.json",
        setting(vocab_size=0, x=[{}] * (convert.SIGNS // 2 - 50)),
    ),
    "tensors without a file": (
        "hf",
        INDEX,
        holding(json.dumps({"weight_map": {f"{i}": 0 for i in range(convert.SIGNS - 10)}})),
    ),
    "inputs that are none": (
        "prepared",
        "index.json",
        setting(inputs=[{}] * (records.SIGNS // 2 - 50)),
    ),
    "files that are none": (
        "prepared",
        "index.json",
        setting(files={f"{i}": 0 for i in range(records.SIGNS - 100)}),
    ),
    "words that are none": (
        "embedder",
        "embedder.json",
        setting(words=[{}] * (embedder_file.SIGNS // 2 - 50)),
    ),
    "weights, a pipe": ("hf", "model.safetensors", pipe),
    "weights, a device": ("hf", "model.safetensors", lambda path: link(path, "/dev/zero")),
    "records named out of the folder": (
        "prepared",
        "index.json",
        setting(files={"../../../../../../../dev/zero": "0" * 64}),
    ),
    "records named by a device": ("prepared", "index.json", setting(files={"/dev/zero": "0" * 64})),
    "records, a pipe": ("prepared", "train.tokens.npy", pipe),
    "records, a device": ("prepared", "train.tokens.npy", lambda path: link(path, "/dev/zero")),
    "held-out records, a pipe": ("prepared", "heldout.segments.npy", pipe),
    "a header that nests": (
        "prepared",
        "train.tokens.npy",
        holding(b"\x93NUMPY\x01\x00\xff\x7f" + b"(" * 0x7FFF),
    ),
    "embedder.npz, a bomb": ("embedder", "embedder.npz", bomb),
    "embedder.npz, a crowd": ("embedder", "embedder.npz", crowd),
    "embedder.npz, a pipe": ("embedder", "embedder.npz", pipe),
    "embedder.npz, a device": ("embedder", "embedder.npz", lambda path: link(path, "/dev/zero")),
    "an embedder of any width": ("embedder", "embedder.json", setting(dim=10**12)),
    "aliases of aliases": ("run", "config.yaml", holding(laughs(12))),
    "digits to the base of 60": ("run", "config.yaml", holding("a: 1" + ":1" * 120_000)),
}

READ_ALL = """
import json, re, sys, time
from pathlib import Path
from flexolmo_jax.errors import UserError
from tests.attacks.test_worst_files import READERS

def peak():  # ru_maxrss would have that of the process before exec
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024

outcomes, start = {}, peak()
for name, (kind, path) in json.loads(Path(sys.argv[1]).read_text()).items():
    begun, error = time.monotonic(), "read"
    try:
        READERS[kind](Path(path), Path(path + ".out"))
    except UserError as refusal:
        error = f"UserError {refusal}"
    except BaseException as other:
        error = f"{type(other).__name__} {other}"
    outcomes[name] = [error, time.monotonic() - begun, peak() - start]
    print(json.dumps(outcomes[name]), name, file=sys.stderr, flush=True)
print(json.dumps(outcomes))
"""
READERS = {kind: read for kind, read in FILES.values()}


def test_the_worst_files_cost_neither_memory_nor_time(sources, tmp_path):
    """Promise: nothing a stranger sends hangs or fills the machine. These once took gigabytes, or
    for ever."""
    cases = {}
    for number, (name, (kind, file, spoil)) in enumerate(WORST.items()):
        source, target = sources[kind], tmp_path / f"{number}"
        target = Path(
            shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
        )
        spoil(target / file if target.is_dir() else target)
        cases[name] = (kind, str(target))
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    result = subprocess.run(
        [sys.executable, "-c", READ_ALL, str(tmp_path / "cases.json")],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    outcomes = json.loads(result.stdout.splitlines()[-1])
    assert outcomes.keys() == WORST.keys()
    for name, (outcome, seconds, megabytes) in outcomes.items():
        assert outcome.startswith("UserError ") and "\n" not in outcome and len(outcome) < 1500, (
            name,
            outcome[:2000],
        )
        # JAX and the package take 300 of their own
        assert seconds < 10 and megabytes < 150, (name, seconds, megabytes)
