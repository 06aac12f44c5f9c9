"""Screening: an owner finds on their own text what no coordinator can see, and says so in one
signed number."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flexolmo_jax.artifact import open_artifact
from flexolmo_jax.cli import main
from flexolmo_jax.coordinator.gate import Gate
from flexolmo_jax.coordinator.merge import append, merge
from flexolmo_jax.coordinator.verify import verify
from flexolmo_jax.data.documents import read_training_documents
from flexolmo_jax.description import canonical_json
from flexolmo_jax.errors import UserError
from flexolmo_jax.exchange.contribution import MANIFEST, SIGNATURE, open_contribution, sealed
from flexolmo_jax.exchange.screening import (
    Verdict,
    check_screening,
    make_verdict,
    read_verdict,
    write_verdict,
)
from flexolmo_jax.exchange.signature import ANY, Trust, keygen, load_key, sign
from flexolmo_jax.loaded import load
from flexolmo_jax.owner.pair import initial_row
from flexolmo_jax.owner.screen import appended, screen
from tests.exchange.test_admission import Tensors, forged
from tests.tiny import pair_config

IDS = np.random.default_rng(0).integers(0, 300, (3, 32))


@pytest.fixture(scope="module")
def keys(tmp_path_factory) -> Path:
    """Private keys of two owners and a stranger; `trusted/` holds the owners' public ones."""
    directory = tmp_path_factory.mktemp("keys")
    (directory / "trusted").mkdir()
    for name in ("code", "care", "mallory"):
        keygen(directory / name)
        if name != "mallory":
            shutil.copy(directory / f"{name}.pub", directory / "trusted")
    return directory


@pytest.fixture(scope="module")
def trust(keys) -> Trust:
    return Trust.of(keys / "trusted")


@pytest.fixture(scope="module")
def of_care(anchor, contributions, tmp_path_factory) -> Path:
    """A model that care's expert is part of."""
    return merge(anchor, [contributions["care"]], tmp_path_factory.mktemp("models") / "care").path


@pytest.fixture(scope="module")
def honest(contributions, keys, tmp_path_factory) -> Path:
    """Code's contribution, signed."""
    return signed(
        Path(shutil.copytree(contributions["code"], tmp_path_factory.mktemp("honest") / "code")),
        keys / "code",
    )


@pytest.fixture(scope="module")
def adversary(anchor, contributions, prepared, keys, tmp_path_factory) -> Path:
    """Rows that point from public text to care's, and FFNs that are mostly noise; signed by code's
    owner."""
    base = open_artifact(anchor)

    def hidden(domain: str) -> np.ndarray:
        run = pair_config(anchor, prepared[domain], "x", "pair.row=hidden")
        assert run.pair is not None
        return np.asarray(initial_row(run.pair, run, base))

    public, care = hidden("public"), hidden("care")
    ours = {name: np.asarray(a, np.float32)[:, 0] for name, a in base.params()["experts"].items()}

    def change(tensors: Tensors) -> Tensors:
        rng, changed = np.random.default_rng(0), {}
        for name, tensor in tensors.items():
            layer, leaf = int(name.split(".")[1]), name.split(".")[-1]
            away, matrix = (
                care[layer] - public[layer],
                (ours[leaf][layer] if leaf in ours else tensor),
            )
            if leaf == "row":
                value = 20 * np.linalg.norm(public[layer]) * away / np.linalg.norm(away)
            elif leaf == "bias":
                value = np.zeros_like(tensor)
            else:
                value = 1.5 * (0.3 * matrix + rng.standard_normal(matrix.shape) * matrix.std())
            changed[name] = np.asarray(value).astype(tensor.dtype)
        return changed

    return signed(
        forged(contributions["code"], tmp_path_factory.mktemp("adversary") / "code", change),
        keys / "code",
    )


def signed(contribution: Path, key: Path) -> Path:
    (contribution / SIGNATURE).write_bytes(
        sign((contribution / MANIFEST).read_bytes(), load_key(key))
    )
    return contribution


def test_an_expert_that_ruins_another_domain_passes_admission_and_fails_its_owners_screening(
    anchor, of_care, adversary, prepared, keys, trust, tmp_path
):
    assert (
        verify(adversary, anchor, public=prepared["public"], refuse=True)["admission"]["findings"]
        == []
    )
    merge(anchor, [adversary], tmp_path / "unseen")
    out = tmp_path / "verdict.json"
    told = screen(adversary, anchor, of_care, [prepared["care"]], out, sign_key=keys / "care")
    assert told["verdict"] == "fail" and told["change"] > 0.02
    with pytest.raises(
        UserError, match=r"is refused by care: it makes their text .* worse"
    ) as error:
        append(of_care, adversary, tmp_path / "out", gate=Gate(trust, screening=[out]))
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_an_honest_expert_passes_and_is_merged(
    anchor, of_care, honest, contributions, prepared, keys, trust, tmp_path, capsys
):
    out, command = (
        tmp_path / "verdicts" / "care.json",
        [
            "screen",
            honest,
            "--anchor",
            anchor,
            "--model",
            of_care,
            "--json",
        ],
    )
    out.parent.mkdir()
    capsys.readouterr()
    assert (
        main(
            [
                str(w)
                for w in (
                    *command,
                    "--documents",
                    prepared["care"],
                    "--sign-key",
                    keys / "care",
                    "--out",
                    out,
                )
            ]
        )
        == 0
    )
    told = json.loads(capsys.readouterr().out)
    verdict, key = read_verdict(out, trust)
    assert (
        verdict.verdict == told["verdict"] == "pass"
        and trust.keys is not None
        and trust.keys[str(key)] == "care"
    )
    bits = told["not_in_the_verdict"]["bits_per_byte"]
    assert verdict.change == pytest.approx(
        bits["with_the_candidate"] / bits["without"] - 1, abs=1e-4
    )
    assert verdict.candidate == open_contribution(honest).manifest["sha256"]
    assert verdict.model == open_artifact(of_care).description["sha256"]
    add = [
        "append",
        of_care,
        honest,
        "--trust",
        keys / "trusted",
        "--require-screening",
        out.parent,
        "--out",
        tmp_path / "out",
    ]
    assert main([str(word) for word in add]) == 0


def test_a_verdict_tells_nothing_of_the_documents_but_how_many_tokens_and_bytes_were_scored(
    anchor, honest, prepared, tmp_path
):
    out = tmp_path / "verdict.json"
    screen(honest, anchor, anchor, [prepared["care"]], out)
    value = json.loads(out.read_text())
    assert value["signature"] is None and value["verdict"].keys() == {
        "kind", "format", "date", "anchor", "candidate", "model", "tokens", "bytes", "change",
        "max_worse", "verdict"
    }  # fmt: skip
    assert value["verdict"]["change"] == round(value["verdict"]["change"], 4)


def test_documents_to_screen_with_may_lie_in_files_of_one_name(
    anchor, honest, corpora, tmp_path, capsys
):
    (tmp_path / "more").mkdir()
    lines = corpora["care"].read_text().splitlines(keepends=True)
    files = [tmp_path / "care.jsonl", tmp_path / "more" / "care.jsonl"]
    for number, file in enumerate(files):
        file.write_text("".join(lines[number::2]))
    outs = [tmp_path / "0.json", tmp_path / "1.json"]
    apart = [
        screen(honest, anchor, anchor, [file], out) for file, out in zip(files, outs, strict=True)
    ]
    (trained_on := tmp_path / "one.txt").write_text(next(iter(read_training_documents(files[0]))))
    files.append(trained_on)  # of a single document nothing is held out
    together = screen(honest, anchor, anchor, files, tmp_path / "both.json")
    assert together["bytes"] == sum(told["bytes"] for told in apart)
    assert "one.txt: none of its documents is held out, so nothing" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"one\.txt: none of the documents is held out"):
        screen(honest, anchor, anchor, [trained_on], tmp_path / "none.json")


def test_a_verdict_that_would_not_count_is_told(anchor, honest, prepared, tmp_path, capsys):
    with pytest.raises(UserError, match=r"has to end in \.json"):
        screen(honest, anchor, anchor, [prepared["care"]], tmp_path / "verdict")
    screen(honest, anchor, anchor, [prepared["care"]], tmp_path / "verdict.json")
    assert "verdict.json is not signed, so --require-screening" in capsys.readouterr().err


@pytest.mark.parametrize("domain", ["care", None])
def test_what_is_screened_is_the_model_that_append_writes(
    anchor, of_care, honest, tmp_path, domain
):
    base = of_care if domain else merge(anchor, [], tmp_path / "nothing").path
    expected = load(append(base, honest, tmp_path / "model").path)
    got = appended(load(base), open_contribution(honest))
    assert (got.experts, got.config) == (expected.experts, expected.config)
    np.testing.assert_array_equal(got.logits(IDS), expected.logits(IDS))


def test_every_other_trusted_key_has_to_have_passed_it(
    anchor, of_care, honest, contributions, prepared, keys, trust, tmp_path
):
    (tmp_path / "empty").mkdir()
    contribution, own = open_contribution(honest), tmp_path / "own.json"
    screen(honest, anchor, of_care, [prepared["care"]], own, sign_key=keys / "code")
    with pytest.raises(UserError, match="is not screened by care"):
        check_screening([contribution], [own], trust)
    with pytest.raises(UserError, match="holds no verdicts"):
        check_screening([contribution], [tmp_path / "empty"], trust)
    with pytest.raises(UserError, match="give --trust"):
        check_screening([contribution], [own], ANY)
    (tmp_path / "one").mkdir()
    shutil.copy(keys / "code.pub", tmp_path / "one")
    with pytest.raises(UserError, match="nobody could have screened"):
        check_screening([contribution], [own], Trust.of(tmp_path / "one"))


def test_a_verdict_that_is_changed_unsigned_or_a_strangers_is_refused(
    anchor, of_care, honest, prepared, keys, trust, tmp_path
):
    out = tmp_path / "verdict.json"
    for key, says in (
        (None, "its owner to screen again"),
        ("mallory", "expected one of the listed ones"),
    ):
        screen(
            honest, anchor, of_care, [prepared["care"]], out, sign_key=keys / key if key else None
        )
        with pytest.raises(UserError, match=says):
            check_screening([open_contribution(honest)], [out], trust)
        out = out.with_name("another.json")
    out = tmp_path / "care.json"
    screen(honest, anchor, of_care, [prepared["care"]], out, sign_key=keys / "care")
    value, text = json.loads(out.read_text()), out.read_bytes()
    for changed in (
        {"change": -0.5},
        {"change": 0.5},
        {"candidate": "0" * 64},
        {"kind": "manifest"},
        {"tokens": "many"},
        {"more": 1},
    ):
        out.write_text(canonical_json(value | {"verdict": value["verdict"] | changed}) + "\n")
        with pytest.raises(UserError, match=r"signature of|is not a verdict") as error:
            read_verdict(out, trust)
        assert "\n" not in str(error.value)
    for content in (b"", b"[]", b"{}", b"null", text[:-1], text * 2, b"[" * 9999, b" " * (1 << 17)):
        out.write_bytes(content)
        with pytest.raises(UserError, match=r"verdict|expected at most"):
            read_verdict(out, trust)
    out.unlink()
    out.symlink_to(keys / "code")
    with pytest.raises(UserError, match="cannot read the verdict"):
        read_verdict(out, trust)


def test_mistakes_are_told_before_anything_is_scored(
    anchor, anchor32, of_care, contributions, pair_runs, keys, prepared, tmp_path
):
    out, documents = tmp_path / "verdict.json", [prepared["care"]]
    for model, says in (
        (pair_runs["care"], "is a run"),
        (anchor32, "was made from the anchor"),
        (of_care, "already has an expert 'care'"),
    ):
        with pytest.raises(UserError, match=says):
            screen(contributions["care"], anchor, model, documents, out)
    with pytest.raises(UserError, match="--max-worse is nan"):
        screen(contributions["code"], anchor, of_care, documents, out, max_worse=float("nan"))
    assert not out.exists()
    out.write_text("mine")
    with pytest.raises(UserError, match="exists"):
        screen(contributions["code"], anchor, of_care, documents, out)
    assert out.read_text() == "mine"


def test_a_verdict_is_of_one_candidate_and_of_no_other(
    anchor, of_care, honest, contributions, prepared, keys, trust, tmp_path
):
    """An owner who passed one expert has not passed the next of the same name."""
    out = tmp_path / "verdict.json"
    screen(contributions["law"], anchor, of_care, [prepared["care"]], out, sign_key=keys / "care")
    assert read_verdict(out, trust)[0].verdict == "pass"
    with pytest.raises(UserError, match="is not screened by care"):
        check_screening([open_contribution(honest)], [out], trust)


def verdict(**changes: float) -> Verdict:
    digest = "0" * 64
    fields: dict[str, Any] = {"tokens": 1, "bytes": 1, "change": 0.02, "max_worse": 0.02} | changes
    return make_verdict(anchor=digest, candidate=digest, model=digest, **fields)


@pytest.mark.parametrize(
    ("change", "says"),
    [(-0.5, "pass"), (0.02, "pass"), (0.020049, "pass"), (0.0201, "fail"), (0.5, "fail")],
)
def test_as_much_worse_as_is_allowed_passes_and_no_more(change, says):
    assert verdict(change=change).verdict == says


@pytest.mark.parametrize("changes", [{"change": 0.5}, {"max_worse": 0.01}, {"verdict": "fail"}])
def test_a_signed_verdict_that_its_own_number_contradicts_is_refused(
    keys, trust, tmp_path, changes
):
    """Whoever reads the number and whoever reads the word would take it for two different
    verdicts."""
    write_verdict(
        dataclasses.replace(verdict(), **changes),
        load_key(keys / "care"),
        tmp_path / "verdict.json",
    )
    with pytest.raises(UserError, match="is not a verdict of `flexolmo screen`"):
        read_verdict(tmp_path / "verdict.json", trust)


def test_a_candidate_that_may_not_be_merged_is_not_screened(
    anchor, anchor32, honest, prepared, tmp_path
):
    out = tmp_path / "verdict.json"
    with pytest.raises(UserError, match="was made from the anchor"):
        screen(honest, anchor32, anchor32, [prepared["care"]], out)
    expired = Path(shutil.copytree(honest, tmp_path / "expired"))
    (expired / SIGNATURE).unlink()
    (expired / MANIFEST).write_bytes(
        sealed(json.loads((expired / MANIFEST).read_text()) | {"expires": "2020-01-01"})
    )
    with pytest.raises(UserError, match="expired on 2020-01-01"):
        screen(expired, anchor, anchor, [prepared["care"]], out)
    assert not out.exists()


def test_an_expert_that_makes_no_numbers_gets_no_verdict(
    anchor, of_care, contributions, prepared, tmp_path
):
    """Not a number is neither better nor worse."""
    huge = forged(
        contributions["code"],
        tmp_path / "huge",
        lambda t: {n: np.full_like(a, 3e38) if "ffn" in n else a for n, a in t.items()},
    )
    with pytest.raises(UserError, match="gives numbers that are not finite for your text"):
        screen(huge, anchor, of_care, [prepared["care"]], tmp_path / "verdict.json")
    assert not (tmp_path / "verdict.json").exists()


def test_a_verdict_of_the_candidates_own_owner_counts_for_nothing(honest, keys, trust, tmp_path):
    """It is the others who are asked: neither does an owner pass their own expert, nor can one fail
    be left lying about."""
    contribution = open_contribution(honest)
    for name, change in (("care", 0.0), ("code", 0.5)):
        about = {"candidate": contribution.manifest["sha256"], "anchor": contribution.fingerprint}
        of_it = dataclasses.replace(verdict(change=change), **about)
        write_verdict(of_it, load_key(keys / name), tmp_path / f"{name}.json")
    check_screening([contribution], [tmp_path / "care.json", tmp_path / "code.json"], trust)
    with pytest.raises(UserError, match="is not screened by care"):
        check_screening([contribution], [tmp_path / "code.json"], trust)
