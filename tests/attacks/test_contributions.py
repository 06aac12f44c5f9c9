"""What a stranger, or one owner against another, can hand over as a contribution: it is refused in
a line, at little cost."""

import contextlib
import hashlib
import json
import os
import shutil
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flexolmo_jax import cli
from flexolmo_jax.coordinator.gate import Gate
from flexolmo_jax.coordinator.info import info
from flexolmo_jax.coordinator.merge import append, merge, replace
from flexolmo_jax.coordinator.verify import verify
from flexolmo_jax.errors import UserError
from flexolmo_jax.exchange.contribution import (
    MANIFEST,
    MANIFEST_LIMIT,
    MANIFEST_SIGNS,
    SIGNATURE,
    TENSORS,
    open_contribution,
    sealed,
)
from flexolmo_jax.exchange.signature import Trust, keygen, load_key, sign
from flexolmo_jax.storage.tensorfile import TensorFile

MIB = 1 << 20


@pytest.fixture
def copy(contributions, tmp_path) -> Path:
    return Path(shutil.copytree(contributions["code"], tmp_path / "copy"))


def manifest_of(path: Path) -> dict[str, Any]:
    return json.loads((path / MANIFEST).read_text())


def resealed(path: Path, **changes: Any) -> Path:
    (path / MANIFEST).write_bytes(sealed(manifest_of(path) | changes))
    return path


def with_header(path: Path, header: bytes, size: int = 0) -> Path:
    """A contribution whose tensors have another header, which its manifest vouches for, and so many
    bytes of data, none of them written."""
    start = len(header).to_bytes(8, "little") + header
    (path / TENSORS).write_bytes(start)
    os.truncate(path / TENSORS, len(start) + size)
    return resealed(path, header=hashlib.sha256(start).hexdigest())


@contextlib.contextmanager
def costing_at_most(megabytes: float, seconds: float) -> Iterator[None]:
    """Fails where what is done inside takes more: memory of Python and numpy at its peak, and CPU
    time, which no other process adds to.

    Counting memory slows it down.
    """
    tracemalloc.start()
    started = time.process_time()
    try:
        yield
        taken, peak = time.process_time() - started, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < megabytes * MIB and taken < seconds, f"{peak / MIB:.0f} MiB, {taken:.1f} s"


def refused(read: Callable[[], Any], match: str) -> None:
    with pytest.raises(UserError, match=match) as error:
        read()
    assert (
        "\n" not in str(error.value)
        and "\x1b" not in str(error.value)
        and len(str(error.value)) < 1500
    )


def everywhere(path: Path, anchor: Path, out: Path) -> list[Callable[[], Any]]:
    """Every way in."""
    return [
        lambda: info(path),
        lambda: verify(path),
        lambda: verify(path, anchor),
        lambda: merge(anchor, [path], out),
    ]


def filled(piece: Callable[[int], str], limit: int = MANIFEST_SIGNS) -> bytes:
    """A manifest of as many commas and brackets as are let in."""
    pieces, signs = [], 10
    while signs < limit:
        pieces.append(piece(len(pieces)))
        signs += 1 + sum(map(pieces[-1].count, ",{["))
    return f'{{"format":2,{",".join(pieces)}}}'.encode()


HALF = MANIFEST_LIMIT // 2 - 100
LARGE = {
    "one string of 60 MiB": lambda: b'{"format":2,"owner":"' + b"x" * 60 * MIB + b'"}',
    "numbers": lambda: b'{"format":2,"training":[' + b"1," * (MANIFEST_LIMIT // 2 - 20) + b"1]}",
    "objects": lambda: b'{"format":2,"training":[' + b"{}," * (MANIFEST_LIMIT // 3 - 20) + b"{}]}",
    "levels": lambda: b'{"format":2,"training":' + b"[" * HALF + b"]" * HALF + b"}",
    "keys, as many as are let in": lambda: filled(lambda i: f'"{i}":0'),
    "objects, as many as are let in": lambda: filled(lambda i: f'"{i}":{{"a":0}}'),
    "tensors, as many as are let in": (
        lambda: b'{"tensors":' + filled(lambda i: f'"{i}":{{"a":0}}') + b',"format":2}'
    ),
}


@pytest.mark.parametrize("make", LARGE.values(), ids=LARGE.keys())
def test_a_manifest_of_any_size_costs_little(copy, make):
    """Promise: nothing a stranger sends fills the machine. 60 MB once took 1.8 GB."""
    (copy / MANIFEST).write_bytes(make())
    with costing_at_most(200, 10):
        refused(lambda: open_contribution(copy), r"manifest\.json")


def test_a_signature_of_any_size_costs_little(copy):
    """Promise: nothing a stranger sends fills the machine."""
    (copy / SIGNATURE).write_bytes(b"[" * 60 * MIB)
    with costing_at_most(50, 5):
        refused(lambda: open_contribution(copy), "expected at most 4096")


def test_a_header_of_a_million_empty_tensors_costs_little(copy):
    """Promise: nothing a stranger sends hangs or fills the machine. 94 MB of them once took 1.9 GB
    and 50 s."""
    entries = (
        b'"a%d":{"dtype":"BF16","shape":[0],"data_offsets":[0,0]}' % i for i in range(1_600_000)
    )
    with_header(copy, b"{" + b",".join(entries) + b"}")
    with costing_at_most(5, 5):  # of a contribution, the manifest says how many tensors to expect
        refused(lambda: verify(copy), "its header has 9[0-9]+ bytes; expected at most 5632")
    with costing_at_most(200, 10):  # a checkpoint of somebody else may have a long one
        refused(lambda: TensorFile(copy / TENSORS), "commas and brackets; expected at most 524288")


def test_nesting_is_refused_before_anything_walks_it(copy, anchor, tmp_path):
    """Promise: nothing a stranger sends crashes. 900 levels in `training` were once merged, and a
    traceback in `info`."""
    deep: Any = {}
    for _ in range(900):
        deep = {"a": deep}
    few: Any = {"a": {"a": {"a": {}}}}
    for training in (deep, few, {"bits_per_byte": {"pair": deep}}):
        resealed(copy, training=training)
        for read in everywhere(copy, anchor, tmp_path / "model"):
            refused(read, r"manifest\.json")
    assert not (tmp_path / "model").exists()


def test_bytes_have_one_meaning_whoever_reads_them(copy):
    """Promise: what is verified is what runs. A header in UTF-16 was read here and refused by every
    other program."""
    data = (copy / TENSORS).read_bytes()
    header = data[8 : 8 + int.from_bytes(data[:8], "little")]
    for other in (
        header.decode().encode("utf-16"),
        b"\xef\xbb\xbf" + header,
        b"\n" + header,
        header + b"\0",
    ):
        with_header(copy, other, len(data) - 8 - len(header))
        refused(lambda: verify(copy), "cannot be read as safetensors")


HUGE = {
    "n_layers": 10**9,
    "n_experts": 10**9,
    "d_model": 2**40,
    "d_ffn": 2**40,
    "n_heads": 2**20,
    "vocab_size": 2**40,
    "max_seq_len": 2**40,
}


@pytest.mark.parametrize("key", HUGE)
def test_a_model_beyond_all_bounds_is_refused_before_anything_is_counted(
    copy, anchor, tmp_path, key
):
    """Promise: nothing a stranger sends hangs or fills the machine."""
    resealed(copy, model=manifest_of(copy)["model"] | {key: HUGE[key]})
    for read in everywhere(copy, anchor, tmp_path / "model"):
        with costing_at_most(20, 5):
            refused(read, rf"manifest\.json: model\.{key} is")


@pytest.mark.parametrize(
    ("key", "value"),
    [("rope_theta", 0.0), ("norm_eps", -1.0), ("init_std", 0.0), ("n_heads", 0), ("d_ffn", -8)],
)
def test_numbers_that_no_model_has_are_refused(copy, key, value):
    """Promise: what is verified is what runs."""
    resealed(copy, model=manifest_of(copy)["model"] | {key: value})
    refused(lambda: verify(copy), rf"manifest\.json: model\.{key} is")


def test_tensors_of_which_no_byte_was_sent_cost_no_memory(copy):
    """Promise: nothing a stranger sends fills the machine. A file with a hole is small to send, and
    a tensor of it as large as it says."""
    model = manifest_of(copy)["model"] | {"n_layers": 1, "d_model": 2**12, "d_ffn": 2**14}
    D, F, row = 2**12, 2**14, {"dtype": "bfloat16", "shape": [2**12]}
    shapes = {"ffn.down": [F, D], "ffn.gate": [D, F], "ffn.up": [D, F], "router.row": [D]}
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * D * (F if len(shape) == 2 else 1)
        header[f"layers.0.{name}"] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    zeros = {
        2 * D * F: hashlib.sha256(bytes(2 * D * F)).hexdigest(),
        2 * D: hashlib.sha256(bytes(2 * D)).hexdigest(),
    }
    tensors = {
        f"layers.0.{name}": (
            row | {"shape": shape, "sha256": zeros[2 * D * (F if len(shape) == 2 else 1)]}
        )
        for name, shape in shapes.items()
    }
    with_header(
        resealed(copy, model=model, tensors=tensors, router_bias=False),
        json.dumps(header).encode(),
        end,
    )
    with costing_at_most(30, 60):
        assert verify(copy)["tensors"] == 4  # 402 MB


def test_privacy_that_no_training_gave_cannot_be_claimed(
    pair_runs, corpora, anchor, tmp_path, capsys
):
    """Promise: what a manifest says was measured was, and what only an owner says is told apart.
    Training here has no such privacy."""
    common = [
        "contribute",
        "--anchor",
        str(anchor),
        "--documents",
        str(corpora["code"]),
        "--name",
        "code",
        "--out",
        str(tmp_path / "out"),
    ]
    for claim in (
        "pair.privacy.epsilon=8",
        "pair.privacy={epsilon: 8.0, delta: 1e-6}",
        "pair.privacy=none",
    ):
        assert cli.main([*common, "--set", claim]) == 2
        told = capsys.readouterr().err
        assert "training here has no differential privacy yet" in told and told.count("\n") == 1
    run = Path(shutil.copytree(pair_runs["code"], tmp_path / "run"))
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(
        text.replace("pair:\n", "pair:\n  privacy: {epsilon: 8.0, delta: 1.0e-06}\n")
    )
    assert cli.main(["package", str(run), "--out", str(tmp_path / "out")]) == 2
    assert "training here has no differential privacy yet" in capsys.readouterr().err
    # a run of an earlier version
    (run / "config.yaml").write_text(text.replace("pair:\n", "pair:\n  privacy: null\n"))
    assert cli.main(["package", str(run), "--out", str(tmp_path / "out")]) == 0
    assert manifest_of(tmp_path / "out")["privacy"] == "none"


@pytest.fixture
def keys(tmp_path) -> Path:
    """Of two owners; both are trusted."""
    for name in ("code", "law"):
        keygen(tmp_path / "keys" / name)
    return tmp_path / "keys"


def signed(path: Path, key: Path, **changes: Any) -> Path:
    resealed(path, **changes)
    (path / SIGNATURE).write_bytes(sign((path / MANIFEST).read_bytes(), load_key(key)))
    return path


def test_a_trusted_owner_cannot_take_the_place_of_another(copy, model, anchor, keys, tmp_path):
    """Promise: an expert is its owner's. Any listed key could once sign any expert, so that one
    owner could replace another's."""
    trust = Trust.of(keys)
    without = merge(anchor, [], tmp_path / "without").path
    for changes in ({"name": "law"}, {"name": "law", "owner": "code"}, {"owner": "law"}):
        signed(
            copy,
            keys / "code",
            **({"name": "code", "owner": "unspecified", "sequence": 2} | changes),
        )
        for read in (
            lambda: verify(copy, trust=trust),
            lambda: merge(anchor, [copy], tmp_path / "out", gate=Gate(trust)),
            lambda: append(without, copy, tmp_path / "out", gate=Gate(trust)),
            lambda: replace(model, copy, tmp_path / "out", gate=Gate(trust)),
        ):
            refused(read, r"signed by the key code\.pub, which may sign experts called 'code'")
    assert not (tmp_path / "out").exists()
    signed(copy, keys / "code", name="code", owner="The Coders")
    assert verify(copy, trust=trust)["signed_by"]["name"] == "code"


def test_an_old_contribution_cannot_be_handed_over_again(copy, anchor, keys, tmp_path):
    """Promise: what an owner replaced stays replaced. A signature stays right for ever: an old one
    could come back."""
    old = signed(Path(shutil.copytree(copy, tmp_path / "old")), keys / "code")
    new = signed(copy, keys / "code", sequence=2)
    model = replace(
        merge(anchor, [old], tmp_path / "model").path,
        new,
        tmp_path / "replaced",
        gate=Gate(Trust.of(keys)),
    ).path
    refused(
        lambda: replace(model, old, tmp_path / "out", gate=Gate(Trust.of(keys))),
        "has sequence 1; expected more than the model's, 2",
    )
    assert cli.main(["replace", str(model), str(old), "--out", str(tmp_path / "out")]) == 2
    assert (
        cli.main(["replace", str(model), str(old), "--out", str(tmp_path / "out"), "--allow-older"])
        == 0
    )
