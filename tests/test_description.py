"""Descriptions whose digest is right and which contradict themselves: none is believed."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flexolmo_jax.artifact import open_artifact, write_description
from flexolmo_jax.description import FORMAT
from flexolmo_jax.errors import UserError

Description = dict[str, Any]


def of_dense_models(description: dict[str, Any]) -> None:
    """As a model that was assembled says of itself, but for its digests."""
    del description["anchor"]
    description.update(fingerprint=None, members=[])


CONTRADICTIONS: dict[str, tuple[Callable[[Description], object], str]] = {
    "an expert twice": (
        lambda d: d.update(experts=["anchor", "code", "code", "care"]),
        "different ones",
    ),
    "an expert too few": (lambda d: d.update(experts=d["experts"][:-1]), "different ones"),
    "experts in another order": (lambda d: d["experts"].reverse(), "in their order"),
    "members in another order": (lambda d: d["members"].reverse(), "in their order"),
    "no anchor first": (lambda d: d.update(experts=["first", *d["experts"][1:]]), "in their order"),
    "tensors of two dtypes": (
        lambda d: d["tensors"]["trunk/norm/scale"].update(dtype="float32"),
        "several dtypes",
    ),
    "no digests": (of_dense_models, "has no SHA-256"),
    "a newer format": (lambda d: d.update(format=FORMAT + 1), "upgrade flexolmo-jax"),
    "an unknown kind": (lambda d: d.update(kind="store"), "its kind is 'store'"),
    "a key that nobody knows": (lambda d: d.update(notes="hello"), "notes"),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_a_model_that_contradicts_itself_is_not_opened(model, tmp_path, case):
    change, told = CONTRADICTIONS[case]
    copy = Path(shutil.copytree(model, tmp_path / "copy"))
    description = json.loads((copy / "flexolmo.json").read_text())
    change(description)
    write_description(copy, description)
    with pytest.raises(UserError, match=told) as error:
        open_artifact(copy)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("change", [{"experts": ["other"]}, {"experts": ["anchor", "more"]}])
def test_an_anchor_has_one_expert_its_own(anchor, tmp_path, change):
    copy = Path(shutil.copytree(anchor, tmp_path / "copy"))
    write_description(copy, json.loads((copy / "flexolmo.json").read_text()) | change)
    with pytest.raises(UserError, match=r"expected one, 'anchor'|different ones"):
        open_artifact(copy)


@pytest.mark.parametrize("what", ["a space", "a digit", "a key"])
def test_a_description_whose_bytes_are_not_those_of_its_digest_is_not_read(model, tmp_path, what):
    copy = Path(shutil.copytree(model, tmp_path / "copy"))
    text = (copy / "flexolmo.json").read_text()
    changed = {
        "a space": text + " ",
        "a digit": text.replace('"n_active": 2', '"n_active": 3'),
        "a key": text.replace("{", '{"a": 1,', 1),
    }
    assert changed[what] != text
    (copy / "flexolmo.json").write_text(changed[what])
    with pytest.raises(UserError, match="bytes do not match its digest"):
        open_artifact(copy)
