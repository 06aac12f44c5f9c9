"""What commands print of 64 experts: whole, and short enough to be read."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from safetensors.numpy import load_file

from flexolmo_jax.artifact import open_artifact, write_description
from flexolmo_jax.cli import main
from flexolmo_jax.coordinator.gate import Gate
from flexolmo_jax.coordinator.merge import merge
from flexolmo_jax.exchange.contribution import MANIFEST, SIGNATURE, TENSORS, sealed
from flexolmo_jax.exchange.manifest import MEASURED_BY
from flexolmo_jax.exchange.signature import sign
from tests.exchange.test_contribution import rewrite

EXPERTS = 64
LINES = 188
EVIL = "ACME}, signed_by: all}\n- {name: e99}\x1b[2J\u202e"


def words(number: int) -> dict[str, Any]:
    """What no two of the members say alike."""
    figures = {"own": 1 + number / 1000, "public": 2 - number / 1000}
    return {
        "name": f"expert-{number:02}",
        "owner": f"The hospital of town {number}, Ltd.",
        "domain": f"domain-{number}",
        "licence": f"licence {number}, no resale",
        "expires": f"{2030 + number}-12-31",
        "sequence": 1 + number,
        "training": {
            "steps": 1000 + number,
            "tokens": 65_536_000 + number,
            "public_share": number / 100,
            "bits_per_byte": {"anchor": figures, "pair": {"own": 1.0, "public": 0.5 + number}},
        },
    }


def signed(path: Path, number: int) -> Path:
    """A contribution of other weights, words and owner."""
    rng = np.random.default_rng(number)
    tensors = {
        name: np.asarray(a + 0.02 * rng.standard_normal(a.shape), a.dtype)
        for name, a in load_file(path / TENSORS).items()
    }
    rewrite(path, tensors)
    manifest = sealed(json.loads((path / MANIFEST).read_text()) | words(number))
    (path / MANIFEST).write_bytes(manifest)
    (path / SIGNATURE).write_bytes(sign(manifest, Ed25519PrivateKey.generate()))
    return path


@pytest.fixture(scope="module")
def merged(anchor, contributions, tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("many")
    paths = [
        signed(Path(shutil.copytree(contributions["code"], place / f"c{number}")), number)
        for number in range(EXPERTS)
    ]
    return merge(anchor, paths, place / "model", gate=Gate(admission=False)).path


@pytest.fixture
def printed(capsys):
    def run(*command: Any) -> str:
        capsys.readouterr()
        assert main([str(word) for word in command]) == 0
        return capsys.readouterr().out

    return run


def whole(text: str) -> list[dict[str, Any]]:
    """The members as `info --json` has them, put together of what it prints for people."""
    found = yaml.safe_load(text)
    measured = {row["name"]: row["measured"] for row in found["members_measured"]}
    common = {part: found["all_members"][part] for part in ("stated", "measured")}
    return [
        row
        | {"stated": common["stated"] | row["stated"]}
        | {"measured": common["measured"] | measured[row["name"]]}
        for row in found["members"]
    ]


def test_info_says_of_64_members_all_that_it_knows_on_a_few_pages(merged, printed):
    text = printed("info", merged)
    assert len(text.splitlines()) <= LINES
    members = json.loads(printed("info", merged, "--json"))["members"]
    told = whole(text)
    assert len(told) == len(members) == EXPERTS
    for number, (got, member) in enumerate(zip(told, members, strict=True)):
        assert member["signed"] and len(member["signed_by"]) == 44
        cut = {key: member[key][:16] for key in ("manifest", "signed_by")}
        kept = {key: member[key] for key in ("name", "stated", "measured")}
        assert got == kept | cut
        said = words(number)
        assert member["name"] == said.pop("name")
        assert member["measured"] == {"by": MEASURED_BY} | said.pop("training")
        assert member["stated"] == member["stated"] | said
    verified = json.loads(printed("verify", merged, "--json"))["members"]
    signers = [{"public_key": member["signed_by"]} for member in members]
    assert signers == [member["signed_by"] for member in verified]
    assert len({member["signed_by"] for member in told}) == EXPERTS


def test_no_owners_words_look_like_another_members(merged, tmp_path, printed):
    copy = tmp_path / "copy"
    copy.mkdir()
    description = open_artifact(merged).description
    evil = description["members"][3]
    evil["manifest"]["owner"] = EVIL
    evil["signature"] = EVIL
    description["members"][4]["signature"] = None
    write_description(copy, description)
    text = printed("info", copy)
    assert text.replace("\n", "").isprintable() and len(text.splitlines()) <= LINES
    told = whole(text)
    assert [member["name"] for member in told] == [words(n)["name"] for n in range(EXPERTS)]
    assert told[3]["stated"]["owner"] == EVIL.encode("unicode_escape").decode()
    assert (told[3]["signed_by"], told[4]["signed_by"]) == ("damaged", "none")


def test_what_grows_with_experts_is_short(anchor, merged, prepared, tmp_path, printed):
    data = [shutil.copytree(prepared["public"], tmp_path / f"data-{n}") for n in range(EXPERTS)]
    leavers = [word for n in range(0, EXPERTS, 2) for word in ("--expert", words(n)["name"])]
    out = tmp_path / "without"
    texts = [
        printed("verify", merged),
        printed("eval", merged, "--data", *data, "--limit", 1),
        printed("opt-out", merged, *leavers, "--out", out),
        printed("verify-receipt", out / "receipt.json", out),
        printed("info", merged.parent / "flexolmo-store"),
    ]
    for text in texts:
        assert len(text.splitlines()) <= LINES, text
    verified, scores, *_ = map(yaml.safe_load, texts)
    assert [member["name"] for member in verified["members"]] == [
        words(number)["name"] for number in range(EXPERTS)
    ]
    for shares in scores["routing"].values():
        assert all(share == float(f"{share:.6g}") for share in shares.values())
        assert len(shares) == 9 and "(57 more)" in shares
        assert sum(shares.values()) == pytest.approx(1, abs=1e-4)
        assert list(shares.values())[:8] == sorted(list(shares.values())[:8], reverse=True)
