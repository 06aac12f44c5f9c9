"""What is handed over: nothing but weights and a manifest, measured as released; and everything
else is refused in one line."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from flexolmo_jax.coordinator.info import info
from flexolmo_jax.coordinator.merge import merge, replace
from flexolmo_jax.coordinator.verify import verify
from flexolmo_jax.data.documents import read_documents
from flexolmo_jax.errors import UserError
from flexolmo_jax.evals.bits_per_byte import evaluate
from flexolmo_jax.exchange.contribution import (
    MANIFEST,
    TENSORS,
    open_contribution,
    sealed,
)
from flexolmo_jax.integrity import tensor_digest
from flexolmo_jax.loaded import load
from flexolmo_jax.owner.package import package


def manifest_of(path: Path) -> dict[str, Any]:
    return json.loads((path / MANIFEST).read_text())


def rewrite(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """What an owner with a broken tool would hand over: every digest is right, what they are taken
    of is not."""
    save_file(tensors, path / TENSORS)
    data = (path / TENSORS).read_bytes()
    header = data[: 8 + int.from_bytes(data[:8], "little")]
    manifest: dict[str, Any] = manifest_of(path) | {"header": hashlib.sha256(header).hexdigest()}
    entries = {
        name: {"dtype": str(t.dtype), "shape": list(t.shape), "sha256": tensor_digest(t)}
        for name, t in tensors.items()
    }
    manifest["tensors"] |= {
        name: entry for name, entry in entries.items() if name in manifest["tensors"]
    }
    (path / MANIFEST).write_bytes(sealed(manifest))


def test_what_is_merged_is_what_was_measured(anchor, contributions, prepared, tmp_path):
    """The manifest's figures are of the weights as released: the merge of that one expert gives
    them again."""
    measured = manifest_of(contributions["code"])["training"]["bits_per_byte"]
    merged = load(merge(anchor, [contributions["code"]], tmp_path / "model").path)
    for name, path in (("code", prepared["code"]), ("public", anchor / "public")):
        pair = evaluate(merged, [path], limit=64)["bits_per_byte"][name]
        alone = evaluate(load(anchor), [path], limit=64)["bits_per_byte"][name]
        assert pair == pytest.approx(measured["pair"][name], rel=2e-6)
        assert alone == pytest.approx(measured["anchor"][name], rel=2e-6)
    assert measured["pair"]["code"] < measured["anchor"]["code"]
    assert {str(t.dtype) for t in load_file(contributions["code"] / TENSORS).values()} == {
        "bfloat16"
    }


def test_info_says_exactly_what_leaves(contributions):
    told = info(contributions["code"])
    assert set(told["leaves_the_owner"]) == {p.name for p in contributions["code"].iterdir()} | {
        "documents"
    }
    numbers = sum(t.size for t in load_file(contributions["code"] / TENSORS).values())
    assert f"{numbers:,} bfloat16 numbers" in told["leaves_the_owner"][TENSORS]
    assert told["leaves_the_owner"]["documents"] == "none" and told["measured"]["steps"] == 8


def test_no_private_text_is_in_a_contribution(contributions, corpora, prepared):
    data = b"".join(path.read_bytes() for path in contributions["care"].iterdir())
    for text in read_documents(corpora["care"]):
        for start in range(0, len(text) - 12, 5):
            assert text[start : start + 12].encode() not in data
    assert str(prepared["care"]).encode() not in data  # nor where it lies


def test_an_expert_of_the_same_name_is_refused(anchor, contributions, tmp_path):
    with pytest.raises(UserError, match="two experts are called 'code'"):
        merge(
            anchor,
            [contributions["code"], contributions["law"], contributions["code"]],
            tmp_path / "model",
        )


def test_a_file_that_does_not_belong_is_refused(copy):
    (copy / "notes.txt").write_text("hello")
    with pytest.raises(UserError, match=r"notes\.txt"):
        open_contribution(copy)


BAD_TENSORS = {
    "misses": lambda up: {},
    "unknown": lambda up: {"layers.1.ffn.up": up, "layers.2.ffn.up": up},
    "float16": lambda up: {"layers.1.ffn.up": up.astype(np.float16)},
    r"\[64\]": lambda up: {"layers.1.ffn.up": up[0]},
    "has values that are not finite": lambda up: {
        "layers.1.ffn.up": np.where(np.arange(64) == 3, np.nan, up).astype(up.dtype)
    },
}


@pytest.mark.parametrize("message", BAD_TENSORS)
def test_tensors_that_do_not_fit_are_refused_whatever_their_digests_say(
    anchor, copy, tmp_path, message
):
    whole = load_file(copy / TENSORS)
    up = whole.pop("layers.1.ffn.up")
    rewrite(copy, whole | BAD_TENSORS[message](up))
    for read in (lambda: verify(copy, anchor), lambda: merge(anchor, [copy], tmp_path / "model")):
        with pytest.raises(UserError, match=message):
            read()
    assert not (tmp_path / "model").exists()


def resealed(path: Path, **changes: Any) -> Path:
    (path / MANIFEST).write_bytes(sealed(manifest_of(path) | changes))
    return path


def test_nothing_is_packaged_that_would_be_refused(pair_runs, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "flexolmo_jax.owner.package._evaluate",
        lambda *_: {"anchor": {"code": 1.0}, "pair": {"code": float("nan")}},
    )
    with pytest.raises(UserError, match="no contribution can be made of this expert: NaN"):
        package(pair_runs["code"], tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("key", "change"),
    [("model", {"rope_theta": 1e4}), ("model", {"max_seq_len": 32}), ("model", {"n_kv_heads": 4})],
)
def test_another_architecture_under_the_right_fingerprint_is_refused(
    anchor, copy, model, tmp_path, key, change
):
    """The tensors are of the same shapes: nothing but the manifest tells that they were trained in
    another model."""
    resealed(copy, model=manifest_of(copy)["model"] | change)
    for read in (
        lambda: verify(copy, anchor),
        lambda: merge(anchor, [copy], tmp_path / "out"),
        lambda: replace(model, copy, tmp_path / "out", allow_older=True),
    ):
        with pytest.raises(
            UserError, match=r"names the fingerprint of .* but has another model; ask its owner"
        ):
            read()
    assert not (tmp_path / "out").exists()


def test_another_dtype_under_the_right_fingerprint_is_refused(anchor, copy, tmp_path):
    whole = {name: tensor.astype(np.float32) for name, tensor in load_file(copy / TENSORS).items()}
    rewrite(resealed(copy, dtype="float32"), whole)
    assert verify(copy)["verified"]
    for read in (lambda: verify(copy, anchor), lambda: merge(anchor, [copy], tmp_path / "out")):
        with pytest.raises(UserError, match="has another dtype"):
            read()


def test_a_header_that_says_the_same_in_other_bytes_is_refused(anchor, copy, tmp_path):
    """Every tensor is where it was: only the header's own digest tells that somebody was at the
    file."""
    data = (copy / TENSORS).read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    fields = json.loads(data[8:end])
    for header in (
        json.dumps(fields).encode(),
        json.dumps(dict(reversed(fields.items())), separators=(",", ":")).encode() + b" ",
    ):
        (copy / TENSORS).write_bytes(len(header).to_bytes(8, "little") + header + data[end:])
        for read in (lambda: verify(copy), lambda: merge(anchor, [copy], tmp_path / "out")):
            with pytest.raises(UserError, match="does not have the header of the manifest"):
                read()


def test_the_right_bytes_in_another_shape_are_refused(anchor, copy, tmp_path):
    """Their digest is right, and so is the header's: they would go into other places of a
    matrix."""
    data = (copy / TENSORS).read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    fields = json.loads(data[8:end])
    fields["layers.1.ffn.up"]["shape"].reverse()
    text = json.dumps(fields).encode()
    header = len(text).to_bytes(8, "little") + text
    (copy / TENSORS).write_bytes(header + data[end:])
    resealed(copy, header=hashlib.sha256(header).hexdigest())
    for read in (lambda: verify(copy), lambda: merge(anchor, [copy], tmp_path / "out")):
        with pytest.raises(
            UserError,
            match=r"layers\.1\.ffn\.up is bfloat16 \[64, 32\]; expected bfloat16 \[32, 64\]",
        ):
            read()
