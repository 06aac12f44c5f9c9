"""Directories of every kind, changed as a stranger could change them. The promise: a line of error,
or the right result; never a crash.

An example takes a whole contribution, anchor, model, store, run, receipt or Hugging Face folder,
changes one thing in it (and seals what has a digest of its own anew), and gives it to every verb
that would read it. None may take 10 seconds, and all of them together not 500 MB.
"""

import json
import os
import resource
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from flexolmo_jax.artifact import open_artifact, sealed_json
from flexolmo_jax.convert.exporting import export_hf
from flexolmo_jax.convert.importing import import_hf
from flexolmo_jax.coordinator.gate import Gate
from flexolmo_jax.coordinator.info import info
from flexolmo_jax.coordinator.merge import merge, opt_out
from flexolmo_jax.coordinator.store import STORE, Store
from flexolmo_jax.coordinator.verify import verify, verify_receipt
from flexolmo_jax.errors import RunError, UserError
from flexolmo_jax.exchange.anchor import open_anchor
from flexolmo_jax.exchange.contribution import MANIFEST, sealed
from flexolmo_jax.exchange.embedder import load_embedder
from flexolmo_jax.loaded import load
from flexolmo_jax.model.tree import flatten

SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]
SECONDS, BYTES = 10, 500_000_000
SEALED = {"flexolmo.json", "receipt.json", "object.json", "store.json"}
ODD = [
    None, True, -1, 0, 1, 2**31, 10**30, 1e308, 0.5, "", "x", "x" * 100_000, "\x1b[2J\u202e",
    "../../../etc/passwd", "/dev/zero", "\ud800",
    [], {}, [[]], {"a": {}}, [0] * 50_000, json.loads("[" * 60 + "]" * 60),
]  # fmt: skip


@pytest.fixture(scope="session")
def whole(
    tiny, anchor, contributions, model, anchor_run, pair_runs, tmp_path_factory
) -> dict[str, Path]:
    """One of each kind."""
    place = tmp_path_factory.mktemp("whole")
    merged = merge(anchor, [contributions["code"], contributions["law"]], place / "merged").path
    opt_out(merged, ["law"], place / "with-receipt")
    export_hf(model, place / "hf", drop_bias=True)
    return {
        "contribution": contributions["code"],
        "anchor": anchor,
        "model": place / "with-receipt",
        "store": place / STORE,
        "run": anchor_run,
        "pair": pair_runs["code"],
        "receipt": place / "with-receipt",
        "hf": place / "hf",
    }


def uses(kind: str, anchor: Path, whole: dict[str, Path], out: Path) -> list[Callable[[Path], Any]]:
    """What reads such a directory."""
    return {
        "contribution": [
            verify,
            info,
            lambda path: verify(path, anchor),
            lambda path: merge(anchor, [path], out, gate=Gate(admission=False)),
        ],
        "anchor": [
            verify,
            info,
            open_anchor,
            load,
            lambda path: load_embedder(path / "embedder"),
            lambda path: merge(path, [], out),
        ],
        "model": [
            verify,
            info,
            load,
            lambda path: verify(path, anchor),
            lambda path: opt_out(path, ["code"], out),
        ],
        "store": [
            verify,
            info,
            lambda path: merge(
                anchor, [whole["contribution"]], out, store_path=path, gate=Gate(admission=False)
            ),
        ],
        "run": [info, load],
        "pair": [info, load],
        "receipt": [lambda path: verify_receipt(path / "receipt.json", whole["receipt"])],
        "hf": [lambda path: import_hf(path, out)],
    }[kind]


@contextmanager
def in_time() -> Iterator[None]:
    def late(*_: object) -> None:
        raise TimeoutError(f"it took more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def change(directory: Path, data: st.DataObject) -> str:
    """Changes one thing; says what."""
    files = [path for path in sorted(directory.rglob("*")) if path.is_file()]
    texts = [
        path
        for path in files
        if path.suffix == ".json" or path.name in ("_METADATA", "_CHECKPOINT_METADATA", "_DIGESTS")
    ]
    file = data.draw(st.sampled_from(files), label="file")
    how = data.draw(
        st.sampled_from(
            ["json"] * 6
            + ["cut", "flip", "empty", "link", "device", "pipe", "folder", "gone", "more", "swap"]
        )
    )
    if how == "json" and texts:
        file = data.draw(st.sampled_from(texts), label="JSON")
        change_json(file, data)
        return f"json in {file}"
    content = bytearray(file.read_bytes())
    if how == "more":
        (
            file.parent
            / data.draw(
                st.sampled_from(
                    ["x", "manifest.ocdbt", "model.safetensors", ".unfinished", "\x1b[2J"]
                )
            )
        ).write_text("x")
        return f"more beside {file}"
    file.unlink()
    if how == "cut":
        file.write_bytes(content[: data.draw(st.integers(0, max(len(content) - 1, 0)))])
    elif how == "flip" and content:
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
        file.write_bytes(content)
    elif how == "link":
        (directory.parent / "elsewhere").write_bytes(content)
        file.symlink_to(directory.parent / "elsewhere")
    elif how == "device":
        file.symlink_to("/dev/zero")
    elif how == "pipe":
        os.mkfifo(file)
    elif how == "folder":
        file.mkdir()
    elif how == "swap":
        file.write_bytes(
            data.draw(st.sampled_from([path for path in files if path != file])).read_bytes()
        )
    elif how != "gone":
        file.write_bytes(b"")
    return f"{how} of {file}"


def change_json(file: Path, data: st.DataObject) -> None:
    root = json.loads(file.read_text())
    holder: Any = {"": root}
    node: Any = holder
    key: Any = ""
    while True:
        inner = node[key]
        if (
            not inner
            or not isinstance(inner, dict | list)
            or (node is not holder and data.draw(st.integers(0, 3)) == 0)
        ):
            break
        node, key = (
            inner,
            data.draw(
                st.sampled_from(
                    sorted(inner) if isinstance(inner, dict) else list(range(len(inner)))
                )
            ),
        )
    odd = data.draw(st.sampled_from(ODD), label="value")
    if odd == "" and isinstance(node, dict) and key != "":
        del node[key]
    else:
        node[key] = odd
    root = holder[""]
    try:
        if file.name == MANIFEST and isinstance(root, dict):
            file.write_bytes(sealed(root))
        else:
            file.write_text(
                sealed_json(root)
                if file.name in SEALED and isinstance(root, dict)
                else json.dumps(root)
            )
    except (UnicodeEncodeError, ValueError):
        file.write_text("{")


def check(
    whole: dict[str, Path], anchor: Path, right: dict[str, dict[str, bytes]], data: st.DataObject
) -> None:
    kind = data.draw(st.sampled_from(sorted(whole)), label="kind")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(shutil.copytree(whole[kind], Path(folder) / kind))
        for path in copy.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)
        what = change(copy, data)
        for number, use in enumerate(uses(kind, anchor, whole, Path(folder) / "out")):
            try:
                with in_time():
                    result = use(copy)
            except (UserError, RunError) as error:
                assert "\n" not in str(error), what
                continue
            except Exception as error:
                raise AssertionError(
                    f"{what}: use {number} of a {kind} ended with {type(error).__name__}: {error}"
                ) from error
            finally:
                shutil.rmtree(Path(folder) / "out", ignore_errors=True)
            if use is load:
                assert {
                    path: np.asarray(a).tobytes() for path, a in flatten(result.params).items()
                } == right[kind], what


@pytest.fixture(scope="session")
def right(whole) -> dict[str, dict[str, bytes]]:
    """What loads."""
    kinds = ("anchor", "model", "run", "pair")
    return {
        kind: {
            path: np.asarray(a).tobytes()
            for path, a in flatten(open_artifact(whole[kind]).params()).items()
        }
        for kind in kinds
    }


many = settings(
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=SLOW,
)


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning", "ignore:coroutine:RuntimeWarning"
)
@pytest.mark.parametrize("examples", [80, pytest.param(5000, marks=pytest.mark.slow)])
def test_a_changed_directory_of_any_kind_is_told_in_a_line_or_read_right(
    whole, anchor, right, examples
):
    for use in (info, load):
        use(whole["model"])  # what is imported and compiled counts for nobody
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    @settings(many, max_examples=examples)
    @given(data=st.data())
    def one(data: st.DataObject) -> None:
        check(whole, anchor, right, data)

    one()
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < BYTES
    assert Store.existing(whole["store"]).verify() >= 3
