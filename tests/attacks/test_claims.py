"""Claims that sound right. The promise: nobody is believed to be somebody else, and no verdict or
receipt to be of something else."""

import dataclasses
import os
import shutil
from pathlib import Path

import pytest

from flexolmo_jax.coordinator.merge import merge, opt_out
from flexolmo_jax.coordinator.verify import verify
from flexolmo_jax.errors import UserError
from flexolmo_jax.exchange.contribution import MANIFEST, SIGNATURE, open_contribution, sealed
from flexolmo_jax.exchange.screening import (
    check_screening,
    make_verdict,
    read_verdict,
    write_verdict,
)
from flexolmo_jax.exchange.signature import Trust, keygen, load_key, sign
from flexolmo_jax.integrity import RECEIPT, RECEIPT_SIGNATURE
from flexolmo_jax.loaded import load
from tests.attacks.forging import copied


@pytest.fixture
def keys(tmp_path) -> Path:
    """Of three owners, all trusted; one has an accent in its name."""
    for name in ("code", "law", "soci\u00e9t\u00e9"):
        keygen(tmp_path / "keys" / name)
    return tmp_path / "keys"


def signed(contribution: Path, key: Path, out: Path, **changes: str) -> Path:
    shutil.copytree(contribution, out)
    (out / MANIFEST).write_bytes(sealed(open_contribution(out).manifest | changes))
    (out / SIGNATURE).write_bytes(sign((out / MANIFEST).read_bytes(), load_key(key)))
    return out


@pytest.mark.parametrize(
    "owner",
    [
        "Law",
        " law ",
        "LAW",
        "\uff4c\uff41\uff57",
        "socie\u0301te\u0301",
        "SOCI\u00c9T\u00c9",
        "l aw",
    ],
)
def test_an_owner_does_not_look_like_another(contributions, keys, tmp_path, owner):
    """Promise: an expert is its owner's. Capitals, spaces, wide letters and accents apart made an
    owner whom readers take for another."""
    contribution = signed(contributions["code"], keys / "code", tmp_path / "c", owner=owner)
    with pytest.raises(UserError, match="of no owner whom another key is named for"):
        verify(contribution, trust=Trust.of(keys))


@pytest.mark.parametrize(
    "unseen", ["\u034f", "\u115f", "\u17b4", "\u180b", "\u2800", "\u3164", "\ufe0f", "\U000e0100"]
)
@pytest.mark.parametrize("owner", ["la{}w", "law{}", "{}LAW"])
def test_an_owner_with_what_is_not_seen_is_no_other(contributions, keys, tmp_path, owner, unseen):
    """Promise: an expert is its owner's. A joiner or a filler, of which a reader sees nothing, made
    another owner of the same looks."""
    owner = owner.format(unseen)
    contribution = signed(contributions["code"], keys / "code", tmp_path / "c", owner=owner)
    with pytest.raises(UserError, match="of no owner whom another key is named for"):
        verify(contribution, trust=Trust.of(keys))


@pytest.mark.parametrize("name", ["press.PUB", "press.Pub", ".pUb"])
def test_a_key_under_another_name_is_not_overlooked(keys, name):
    """Promise: every other owner has to have screened a contribution. One whose key was written
    with capitals was not asked."""
    shutil.copy(keys / "law.pub", keys / name)
    with pytest.raises(UserError, match=r"is not read; expected .*\.pub; rename it"):
        Trust.of(keys)


def test_a_key_behind_another_is_not_overlooked(keys):
    """Promise: every other owner has to have screened a contribution. Only the first key of a file
    was read."""
    both = (keys / "law.pub").read_bytes() + (keys / "code.pub").read_bytes()
    (keys / "law.pub").write_bytes(both)
    with pytest.raises(UserError, match="holds several keys"):
        Trust.of(keys)


@pytest.mark.parametrize(
    "name", ["Policy.yaml", "POLICY.YML", "policies.yaml", ".policy.yaml", "policy", "policy.yaml~"]
)
def test_a_policy_under_another_name_is_not_overlooked(keys, name):
    """Promise: what a coordinator says of a key holds. Without a word the default held in its
    place."""
    (keys / name).write_text("code: {names: []}\n")
    with pytest.raises(UserError, match=r"is not read; expected policy\.yaml"):
        Trust.of(keys)


def test_a_verdict_is_of_a_candidate_on_its_anchor(contributions, keys, tmp_path):
    """Promise: a verdict is of one candidate. One that names another anchor, no day, or a loss
    below nothing counted like any other."""
    candidate = open_contribution(signed(contributions["code"], keys / "code", tmp_path / "c"))
    about = {
        "candidate": candidate.manifest["sha256"],
        "model": "0" * 64,
        "tokens": 1,
        "bytes": 1,
        "change": 0.0,
        "max_worse": 0.02,
    }
    (keys / "soci\u00e9t\u00e9.pub").unlink()
    trust, key = Trust.of(keys), load_key(keys / "law")
    right = make_verdict(anchor=candidate.fingerprint, **about)
    write_verdict(right, key, tmp_path / "right.json")
    check_screening([candidate], [tmp_path / "right.json"], trust)
    write_verdict(dataclasses.replace(right, anchor="0" * 64), key, tmp_path / "other.json")
    with pytest.raises(UserError, match="is not screened by law"):
        check_screening([candidate], [tmp_path / "other.json"], trust)
    for number, wrong in enumerate(
        ({"date": "9999-99-99"}, {"date": "2026-02-30"}, {"change": -1.5}, {"change": -1e308})
    ):
        write_verdict(dataclasses.replace(right, **wrong), key, tmp_path / f"{number}.json")
        with pytest.raises(UserError, match="is not a verdict"):
            read_verdict(tmp_path / f"{number}.json", trust)


def test_a_verdict_under_another_name_is_not_overlooked(contributions, keys, tmp_path):
    """Promise: one verdict `fail` refuses. In a file called .JSON it was overlooked, and the
    contribution merged."""
    candidate = open_contribution(signed(contributions["code"], keys / "code", tmp_path / "c"))
    verdict = make_verdict(
        anchor=candidate.fingerprint,
        candidate=candidate.manifest["sha256"],
        model="0" * 64,
        tokens=1,
        bytes=1,
        change=0.0,
        max_worse=0.02,
    )
    fail = dataclasses.replace(verdict, change=0.5, verdict="fail")
    (tmp_path / "verdicts").mkdir()
    (keys / "soci\u00e9t\u00e9.pub").unlink()
    for name, each in {"one.json": verdict, "two.JSON": fail}.items():
        write_verdict(each, load_key(keys / "law"), tmp_path / "verdicts" / name)
    with pytest.raises(UserError, match=r"two\.JSON is not read; expected names that end in"):
        check_screening([candidate], [tmp_path / "verdicts"], Trust.of(keys))


def test_a_receipt_in_a_model_is_of_this_model(anchor, contributions, keys, tmp_path):
    """Promise: no receipt is believed to be of something else. A model verified that carried
    another's receipt, or another's signature of one."""
    everybody = list(contributions.values())
    whole = merge(anchor, everybody, tmp_path / "whole").path
    one, two = (
        opt_out(whole, [name], tmp_path / name, sign_key=keys / "law").path
        for name in ("code", "care")
    )
    assert verify(one)["verified"] and verify(two)["verified"]
    for name in (RECEIPT_SIGNATURE, RECEIPT):
        shutil.copy(two / name, one / name)
        with pytest.raises(UserError, match=r"is for other bytes|still holds 'care'"):
            verify(one)
    shutil.copy(two / RECEIPT, whole / RECEIPT)
    with pytest.raises(UserError, match="still holds 'care'"):
        verify(whole)


def test_a_receipt_lies_in_models_only_and_is_a_file(anchor, model, tmp_path):
    """Promise: a directory holds exactly its own files, and regular ones. An anchor could carry any
    receipt; and pipes passed for one."""
    for source in (anchor, model):
        for name in ("receipt.json", "receipt.sig"):
            fake = copied(source, tmp_path / source.name / name / "fake")
            os.mkfifo(fake / name)
            for use in (verify, load):
                with pytest.raises(
                    UserError,
                    match=r"is not a regular file|holds unknown files|cannot read the receipt",
                ):
                    use(fake)
    fake = copied(anchor, tmp_path / "anchor-with-receipt")
    (fake / "receipt.json").write_text("{}")
    with pytest.raises(UserError, match="holds unknown files"):
        verify(fake)
