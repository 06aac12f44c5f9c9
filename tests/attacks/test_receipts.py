"""Attacks on receipts. The promise: an owner who left can check that they are gone, and nobody else
is told to leave."""

import base64
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flexolmo_jax.artifact import read_sealed, sealed_json, write_description
from flexolmo_jax.cli import main
from flexolmo_jax.coordinator.merge import append, merge, opt_out
from flexolmo_jax.coordinator.sketch import encoded
from flexolmo_jax.coordinator.verify import verify, verify_receipt
from flexolmo_jax.errors import UserError
from flexolmo_jax.exchange.anchor import open_anchor
from flexolmo_jax.exchange.contribution import MANIFEST, TENSORS, open_contribution, sealed
from flexolmo_jax.exchange.signature import Trust, keygen
from flexolmo_jax.integrity import tensor_digest
from flexolmo_jax.model.tree import flatten
from flexolmo_jax.owner.package import package
from flexolmo_jax.storage.tensorfile import TensorFile, write_tensors


def remade(source: Path, to: Path, name: str, change: Any) -> Path:
    """A contribution of another name whose tensors `change(name, values)` gives."""
    contribution = open_contribution(source)
    values = {key: change(key, array.copy()) for key, array in contribution.tensors()}
    to.mkdir()
    write_tensors(
        to / TENSORS, {key: (str(a.dtype), a.shape) for key, a in values.items()}, values.values()
    )
    entries = {
        key: {"dtype": str(a.dtype), "shape": list(a.shape), "sha256": tensor_digest(a)}
        for key, a in values.items()
    }
    with TensorFile(to / TENSORS) as file:
        header = file.header_sha256
    (to / MANIFEST).write_bytes(
        sealed(contribution.manifest | {"name": name, "tensors": entries, "header": header})
    )
    return to


def flip_one_bit(key: str, values: np.ndarray) -> np.ndarray:
    values.reshape(-1).view(np.uint16)[7 % values.size] ^= 1
    return values


def flip_a_large_bit(key: str, values: np.ndarray) -> np.ndarray:
    values.reshape(-1).view(np.uint16)[7 % values.size] ^= 1 << 12
    return values


def shuffle_hidden_units(key: str, values: np.ndarray) -> np.ndarray:
    """The same function in another order."""
    if ".ffn." not in key:
        return values
    order = np.random.default_rng(int(key.split(".")[1])).permutation(64)
    return values[order] if key.endswith("down") else values[:, order]


@pytest.mark.parametrize("change", [flip_one_bit, flip_a_large_bit, shuffle_hidden_units])
def test_a_near_copy_of_a_leaver_is_found(anchor, contributions, tmp_path, change):
    """One flipped bit in each matrix once evaded a receipt, which compared digests."""
    twin = remade(contributions["law"], tmp_path / "twin", "twin", change)
    both = merge(
        anchor, [contributions["law"], contributions["code"], twin], tmp_path / "both"
    ).path
    with pytest.raises(UserError, match="'twin' is a copy of 'law', or nearly one"):
        opt_out(both, ["law"], tmp_path / "no")
    model = merge(anchor, [contributions["law"], contributions["code"]], tmp_path / "model").path
    one = opt_out(model, ["law"], tmp_path / "one").path
    assert verify_receipt(one / "receipt.json", one)["verified"]
    back = append(one, twin, tmp_path / "back").path
    receipt = read_sealed(one / "receipt.json")
    members = [
        {"name": m["name"], "manifest": m["manifest"]["sha256"]}
        for m in read_sealed(back / "flexolmo.json")["members"]
    ]
    (tmp_path / "receipt.json").write_text(sealed_json(receipt | {"remaining": members}))
    with pytest.raises(UserError, match="still holds 'law', or nearly"):
        verify_receipt(tmp_path / "receipt.json", back)


def test_an_owner_who_shares_matrices_that_training_left_alone_may_stay(
    anchor, contributions, tmp_path
):
    """Equal single matrices are no copies: what nobody trained is the anchor's in every expert."""
    own = {path: np.asarray(a) for path, a in flatten(open_anchor(anchor).params()).items()}

    def untouched_first_layer(key: str, values: np.ndarray) -> np.ndarray:
        _, layer, kind, leaf = key.split(".")
        return (
            own[f"experts/{leaf}"][0, 0].astype(values.dtype)
            if kind == "ffn" and layer == "0"
            else values
        )

    parts = [
        remade(contributions[name], tmp_path / name, name, untouched_first_layer)
        for name in ("code", "law")
    ]
    shared = {
        open_contribution(part).manifest["tensors"]["layers.0.ffn.up"]["sha256"] for part in parts
    }
    assert len(shared) == 1
    both = merge(anchor, parts, tmp_path / "both").path
    one = opt_out(both, ["law"], tmp_path / "one").path
    assert verify_receipt(one / "receipt.json", one)["verified"] and verify(one)["verified"]


def test_honest_experts_are_not_taken_for_each_other(anchor, contributions, tmp_path):
    model = merge(anchor, list(contributions.values()), tmp_path / "model").path
    for name in contributions:
        without = opt_out(model, [name], tmp_path / name).path
        assert verify_receipt(without / "receipt.json", without)["removed"] == [name]


def test_a_receipt_made_from_nothing_is_not_signed_by_the_coordinator(
    anchor, contributions, tmp_path, capsys
):
    """Whoever wants to know who wrote a receipt asks for the coordinator's signature."""
    (tmp_path / "trusted").mkdir()
    keygen(tmp_path / "coordinator")
    shutil.copy(tmp_path / "coordinator.pub", tmp_path / "trusted")
    model = merge(anchor, [contributions["code"], contributions["law"]], tmp_path / "model").path
    arguments = [
        "opt-out",
        str(model),
        "--expert",
        "law",
        "--sign-key",
        str(tmp_path / "coordinator"),
        "--out",
        str(tmp_path / "one"),
    ]
    assert main(arguments) == 0
    receipt = tmp_path / "one" / "receipt.json"
    shown = capsys.readouterr().out
    assert "models_that_still_hold_it: [model]\n" in shown and "signed: true" in shown
    assert len(shown.splitlines()) < 30 and "sketch" not in shown  # --json has it
    check = [
        "verify-receipt",
        str(receipt),
        str(tmp_path / "one"),
        "--trust",
        str(tmp_path / "trusted"),
        "--json",
    ]
    capsys.readouterr()
    assert main(check) == 0
    assert json.loads(capsys.readouterr().out)["signed_by"]["name"] == "coordinator"
    fields = read_sealed(receipt)
    receipt.write_text(sealed_json(fields | {"date": "2020-01-01"}))
    assert main(check) == 2 and "is for other bytes" in capsys.readouterr().err
    receipt.with_name("receipt.sig").unlink()
    assert main(check) == 2 and "receipt.sig; ask the coordinator" in capsys.readouterr().err
    assert main(check[:3]) == 0 and "nobody signed" in capsys.readouterr().err
    assert verify(tmp_path / "one")["verified"]
    with pytest.raises(UserError, match="is not signed"):
        verify_receipt(receipt, tmp_path / "one", Trust(signed=True))


def test_a_receipt_carries_the_leavers_own_signature(anchor, pair_runs, tmp_path):
    """So that nobody can make one of an expert that its owner never signed."""
    keygen(tmp_path / "law")
    law = package(pair_runs["law"], tmp_path / "c", sign_key=tmp_path / "law").path
    model = merge(anchor, [law], tmp_path / "model").path
    (removed,) = read_sealed(opt_out(model, ["law"], tmp_path / "none").path / "receipt.json")[
        "removed"
    ]
    assert removed["manifest"] == open_contribution(law).manifest
    assert removed["signature"].encode() == (law / "manifest.sig").read_bytes()


def test_a_receipt_tells_nothing_of_where_things_lie(anchor, contributions, tmp_path, monkeypatch):
    """A coordinator's paths are nobody's business, however they were given."""
    monkeypatch.chdir(tmp_path)
    merge(anchor, [contributions["code"], contributions["law"]], tmp_path / "model")
    opt_out(Path("model"), ["law"], Path("one"), store_path=tmp_path / "flexolmo-store")
    text = (tmp_path / "one" / "receipt.json").read_text()
    assert str(tmp_path) not in text and "/" not in json.loads(text)["models_that_still_hold_it"][0]


KEYS = (
    "format",
    "date",
    "anchor",
    "removed",
    "remaining",
    "grade",
    "models_that_still_hold_it",
    "store_still_holds_it",
)


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize(
    "value", [None, "x" * 5000, -1, 1e308, [], {}, [[]], {"a": {}}, True, ["\x1b[2J"]]
)
def test_odd_values_in_a_receipt_are_told_in_a_line(
    anchor, contributions, tmp_path_factory, key, value
):
    """Of 104 such values 17 once ended in a traceback."""
    place = tmp_path_factory.getbasetemp() / "odd-receipt"
    if not (place / "one").exists():
        model = merge(anchor, [contributions["code"], contributions["law"]], place / "model").path
        opt_out(model, ["law"], place / "one")
    fields = read_sealed(place / "one" / "receipt.json")
    for changed in (fields | {key: value}, {k: v for k, v in fields.items() if k != key}):
        (place / "receipt.json").write_text(sealed_json(changed))
        try:
            verify_receipt(place / "receipt.json", place / "one")
        except UserError as error:
            assert "\n" not in str(error) and "\x1b" not in str(error)


def flipped_file(model: Path, pattern: str) -> None:
    file = next(each for each in sorted(model.glob(pattern)) if each.is_file())
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.chmod(0o644)
    file.write_bytes(content)


@pytest.fixture
def without_law(anchor, contributions, tmp_path) -> Path:
    """A model that law has left, with its receipt; it shares no file with others."""
    model = merge(anchor, [contributions["law"], contributions["code"]], tmp_path / "both").path
    return opt_out(model, ["law"], tmp_path / "without", ways=("copy",)).path


@pytest.mark.parametrize(
    "file", ["weights/trunk.norm.scale/c/**/*", "weights/experts.row/c/**/*", "tokenizer.json"]
)
def test_a_receipt_is_of_files_that_are_all_what_the_model_says(without_law, file):
    """Promise: who checks a receipt checks the model. What says no expert's name could hold
    anything."""
    flipped_file(without_law, file)
    with pytest.raises(UserError, match=r"bytes of|cannot be read|tokenizer"):
        verify_receipt(without_law / "receipt.json", without_law)


def test_a_receipt_is_of_models_on_its_own_anchor(anchor, anchor32, without_law, tmp_path):
    """Promise: a receipt says that a model of this anchor is without an expert. Any other model is
    without it too, and proves nothing."""
    receipt = read_sealed(without_law / "receipt.json")
    (tmp_path / "receipt.json").write_text(sealed_json(receipt | {"remaining": []}))
    assert verify_receipt(tmp_path / "receipt.json", merge(anchor, [], tmp_path / "right").path)[
        "verified"
    ]
    with pytest.raises(UserError, match="the receipt is for a model made from"):
        verify_receipt(tmp_path / "receipt.json", merge(anchor32, [], tmp_path / "wrong").path)


def test_a_leaver_is_found_by_digests_where_a_sketch_does_not_tell(
    anchor, contributions, without_law, tmp_path
):
    """Promise: who left can check that they are gone. A coordinator who writes the sketch has not
    written the digests of their manifest."""
    receipt = read_sealed(without_law / "receipt.json")
    (removed,) = receipt["removed"]
    back = append(without_law, contributions["law"], tmp_path / "back").path
    members = [
        {"name": m["name"], "manifest": m["manifest"]["sha256"]}
        for m in read_sealed(back / "flexolmo.json")["members"]
    ]
    nothing = encoded(np.zeros((6, 32)))
    lie = receipt | {"remaining": members, "removed": [removed | {"sketch": nothing}]}
    (tmp_path / "receipt.json").write_text(sealed_json(lie))
    with pytest.raises(
        UserError, match="still holds 'law', which the receipt says is removed, as 'law'"
    ):
        verify_receipt(tmp_path / "receipt.json", back)


def test_an_expert_of_the_same_digests_has_to_leave_too(anchor, contributions, tmp_path):
    """Promise: who left is gone, under whatever name."""
    twin = remade(contributions["law"], tmp_path / "twin", "twin", lambda key, values: values)
    model = merge(anchor, [contributions["law"], twin], tmp_path / "model").path
    with pytest.raises(UserError, match="'twin' is a copy of 'law'"):
        opt_out(model, ["law"], tmp_path / "out")


def test_a_receipt_names_every_model_of_the_store_that_still_holds_the_leaver(
    anchor, contributions, tmp_path
):
    """Promise: an owner who left is told where they are still to be found; and of no model that
    they never were in."""
    law, code = contributions["law"], contributions["code"]
    for name, parts in (("both", [law, code]), ("another", [law]), ("neither", [code])):
        merge(anchor, parts, tmp_path / name)
    one = opt_out(tmp_path / "both", ["law"], tmp_path / "one").path
    assert read_sealed(one / "receipt.json")["models_that_still_hold_it"] == ["another", "both"]


@pytest.mark.parametrize("names", [["nobody"], ["anchor"], ["law", "nobody"]])
def test_there_is_no_receipt_of_somebody_who_was_not_there(anchor, contributions, tmp_path, names):
    """Promise: a receipt is of an expert that was in the model."""
    model = merge(anchor, [contributions["law"]], tmp_path / "model").path
    with pytest.raises(UserError, match=r"no expert 'nobody'|the anchor cannot be excluded"):
        opt_out(model, names, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("forged", ["zeros", "another's", "no base 64", "of another shape"])
def test_a_sketch_that_is_not_that_of_the_weights_is_refused(
    anchor, contributions, tmp_path, forged
):
    """Receipts are made of sketches: zeros would hide every copy, another's would have an innocent
    leave."""
    model = merge(anchor, [contributions["code"], contributions["law"]], tmp_path / "model").path
    fake = Path(shutil.copytree(model, tmp_path / "fake"))
    description = json.loads((fake / "flexolmo.json").read_text())
    members = description["members"]
    zeros = base64.b64encode(bytes(len(base64.b64decode(members[0]["sketch"])))).decode()
    members[0]["sketch"] = {
        "zeros": zeros,
        "another's": members[1]["sketch"],
        "no base 64": "!!!",
        "of another shape": zeros[:64],
    }[forged]
    write_description(fake, description)
    for use in (lambda: verify(fake), lambda: opt_out(fake, ["code"], tmp_path / "out")):
        with pytest.raises(UserError, match="the sketch of 'code'"):
            use()
    assert not (tmp_path / "out").exists()


def test_a_receipt_names_who_it_looks_for(anchor, pair_runs, tmp_path):
    """Promise: a claim can be checked. A coordinator's signed receipt could carry the leaver's
    manifest, and other digests: the leaver was said to be gone from a model that still had all of
    it. Nor did anybody look at the leaver's own signature."""
    keygen(tmp_path / "law")
    law = package(pair_runs["law"], tmp_path / "signed", sign_key=tmp_path / "law").path
    again = remade(law, tmp_path / "again", "helper", lambda key, values: values)
    before = merge(anchor, [law], tmp_path / "before").path
    still = merge(anchor, [again], tmp_path / "still").path
    honest = read_sealed(opt_out(before, ["law"], tmp_path / "after").path / "receipt.json")
    gone, remaining = (
        honest["removed"][0],
        [{"name": "helper", "manifest": open_contribution(again).manifest["sha256"]}],
    )
    sketch = base64.b64encode(np.full(2 * 3 * 32, 1e3, "<f4").tobytes()).decode()
    lies: dict[str, dict[str, Any]] = {
        "other digests than its manifest": {"digests": ["0" * 64], "sketch": sketch},
        "has the manifest of 'law'": {"name": "somebody"},
        "signature of .* is damaged": {"signature": "{}"},
        "manifest of 'law' is damaged": {"manifest": gone["manifest"] | {"owner": "nobody"}},
    }
    for told, lie in lies.items():
        receipt = tmp_path / "receipt.json"
        receipt.write_text(sealed_json(honest | {"removed": [gone | lie], "remaining": remaining}))
        with pytest.raises(UserError, match=told):
            verify_receipt(receipt, still)
