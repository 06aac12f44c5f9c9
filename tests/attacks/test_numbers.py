"""Experts whose every number is finite and whose every digest is right, and that would break a
model all the same."""

import json
from pathlib import Path

import numpy as np
import pytest

from flexolmo_jax.artifact import open_artifact
from flexolmo_jax.cli import main
from flexolmo_jax.coordinator.merge import append, merge, replace
from flexolmo_jax.coordinator.verify import verify
from flexolmo_jax.data.records import open_records
from flexolmo_jax.data.sample import sample_of
from flexolmo_jax.errors import UserError
from flexolmo_jax.exchange.admission import TRIED, _texts, admit
from flexolmo_jax.exchange.contribution import open_contribution
from flexolmo_jax.loaded import load
from tests.exchange.test_admission import Tensors, forged, long_rows

IDS = np.random.default_rng(0).integers(0, 300, (4, 32))


def huge(tensors: Tensors) -> Tensors:
    return {n: np.full_like(a, 3e38) if "ffn" in n else a for n, a in tensors.items()}


def one_huge_weight(tensors: Tensors) -> Tensors:
    changed = tensors["layers.1.ffn.gate"].copy()
    changed[0, 0] = 3e38
    return tensors | {"layers.1.ffn.gate": changed}


@pytest.fixture(scope="module")
def hostile(contributions, tmp_path_factory) -> Path:
    return forged(contributions["code"], tmp_path_factory.mktemp("hostile") / "code", huge)


def test_weights_of_3e38_are_refused_by_every_way_into_a_model(
    anchor, contributions, model, hostile, tmp_path
):
    """A contribution that merges gives a model that runs: its logits are numbers."""
    out, others = tmp_path / "out", [contributions["law"], contributions["care"]]
    without = merge(anchor, others, tmp_path / "without").path
    for way in (
        lambda: merge(anchor, [*others, hostile], out),
        lambda: append(without, hostile, out),
        lambda: replace(model, hostile, out, allow_older=True),
        lambda: verify(hostile, anchor),
    ):
        with pytest.raises(
            UserError,
            match=r"is not admitted: the norm of .* times the anchor's; expected at most 12 times",
        ) as error:
            way()
        assert str(hostile) in str(error.value) and "\n" not in str(error.value)
    assert not out.exists()


def test_what_is_refused_would_have_made_logits_that_are_no_numbers(
    anchor, hostile, tmp_path, capsys
):
    """Refusals are of something real; and whoever merges without admission is told on stderr what
    is not looked at."""
    assert (
        main(
            [
                "merge",
                "--anchor",
                str(anchor),
                str(hostile),
                "--no-admission",
                "--out",
                str(tmp_path / "out"),
            ]
        )
        == 0
    )
    assert "--no-admission" in capsys.readouterr().err
    assert not np.isfinite(load(tmp_path / "out").logits(IDS)).all()


@pytest.mark.parametrize(
    ("change", "finding"),
    [(one_huge_weight, "layers.1.ffn.gate"), (long_rows, "layers.0.router.row")],
)
def test_one_weight_or_row_out_of_bounds_is_refused_by_name(
    anchor, contributions, tmp_path, change, finding
):
    """A refusal names the tensor, so that an honest owner can look at it."""
    with pytest.raises(UserError, match=f"the norm of {finding} is .* times the anchor's"):
        admit(
            open_contribution(forged(contributions["code"], tmp_path / "hostile", change)),
            open_artifact(anchor),
        )


def test_what_computes_no_numbers_is_refused_whatever_its_norms(anchor, hostile, monkeypatch):
    """The trial is a check of its own: it would find what the bounds of the norms let through."""
    monkeypatch.setattr("flexolmo_jax.exchange.admission.MARGIN", 1e60)
    with pytest.raises(
        UserError,
        match=r"layer 0 gives numbers that are not finite for \d+ of \d+ tokens; expected none",
    ):
        admit(open_contribution(hostile), open_artifact(anchor))


def test_the_report_on_such_an_expert_is_json(anchor, hostile, prepared, capsys):
    """Nothing that a stranger sends breaks the programs that read what `--json` prints."""
    capsys.readouterr()
    assert (
        main(
            [
                "verify",
                str(hostile),
                "--anchor",
                str(anchor),
                "--public",
                str(prepared["public"]),
                "--json",
            ]
        )
        == 0
    )

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    report = json.loads(capsys.readouterr().out, parse_constant=refuse)["admission"]
    assert len(report["findings"]) > 5 and report["public_bits_per_byte"]["with_the_expert"] is None


def test_an_expert_is_tried_on_public_text_and_not_on_random_tokens_alone(anchor):
    """Random tokens are not what a model meets: an expert could be made to break on text only."""
    tokens, segments = _texts(open_artifact(anchor))
    records = open_records(anchor / "public", "train")
    rows = [records[i]["tokens"] for i in sample_of(len(records), TRIED[0])]
    assert tokens.shape == (2 * TRIED[0], TRIED[1]) and segments[: TRIED[0]].all()
    for got, used, row in zip(tokens[TRIED[0] :], segments[TRIED[0] :], rows, strict=True):
        assert (
            got[: len(row)].tolist() == row.tolist()
            and used[: len(row)].any()
            and not used[len(row) :].any()
        )
