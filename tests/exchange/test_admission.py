"""The admission report finds hostile and broken experts, whose digests and signatures are right,
and lets good ones in."""

import copy
import dataclasses
import functools
import hashlib
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from flexolmo_jax.artifact import open_artifact
from flexolmo_jax.config import MeshConfig
from flexolmo_jax.coordinator.verify import verify
from flexolmo_jax.errors import UserError
from flexolmo_jax.exchange import admission as admission_module
from flexolmo_jax.exchange.admission import DEFAULT, _findings, admit
from flexolmo_jax.exchange.contribution import MANIFEST, TENSORS, open_contribution, sealed
from flexolmo_jax.owner.pair import initial_row
from flexolmo_jax.plan.report import size_of
from flexolmo_jax.runtime.sharding import make_mesh
from flexolmo_jax.train.state import abstract_params
from tests.tiny import Held, pair_config

Tensors = dict[str, np.ndarray]
OTHERS = 2**11  # bytes of constants; anchor and expert have 2**17, each of 8 devices holds 2**14


def forged(contribution: Path, out: Path, change: Callable[[Tensors], Tensors]) -> Path:
    """A contribution with other weights and digests that fit them."""
    shutil.copytree(contribution, out)
    tensors = change(load_file(out / TENSORS))
    save_file(tensors, out / TENSORS)
    data = (out / TENSORS).read_bytes()
    manifest = json.loads((out / MANIFEST).read_text())
    manifest["header"] = hashlib.sha256(data[: 8 + int.from_bytes(data[:8], "little")]).hexdigest()
    for name, tensor in tensors.items():
        manifest["tensors"][name]["sha256"] = hashlib.sha256(tensor.tobytes()).hexdigest()
    (out / MANIFEST).write_bytes(sealed(manifest))
    return out


def long_rows(tensors: Tensors) -> Tensors:
    """Router rows that decide everything they meet, and no bias to hold them."""
    return {
        n: (
            (a * 300).astype(a.dtype)
            if n.endswith("row")
            else np.zeros_like(a)
            if n.endswith("bias")
            else a
        )
        for n, a in tensors.items()
    }


def noise(tensors: Tensors) -> Tensors:
    """Weights that were never trained, as large as the trained ones."""
    rng = np.random.default_rng(0)
    return {
        n: (
            (rng.standard_normal(a.shape) * a.astype(np.float32).std()).astype(a.dtype)
            if "ffn" in n
            else a
        )
        for n, a in tensors.items()
    }


def too_large(tensors: Tensors) -> Tensors:
    return {n: (a * 8).astype(a.dtype) if "ffn" in n else a for n, a in tensors.items()}


def test_good_experts_are_admitted(anchor, contributions, prepared):
    for path in contributions.values():
        report = verify(path, anchor, public=prepared["public"], refuse=True)["admission"]
        assert report["findings"] == []
        assert 0 < report["public_share"] < 1 and report["public_tokens"] > 100
        bits = report["public_bits_per_byte"]
        assert bits["with_the_expert"] != bits["anchor"] > 0
        for measures in report["weights"].values():
            assert (
                0.9 < measures["Frobenius"]["least"] <= measures["Frobenius"]["most"] < 1.2
                and measures["cosine"]["least"] > 0.9
            )


@pytest.mark.parametrize(
    ("change", "finding"),
    [
        (long_rows, "router row"),
        (noise, "little in common"),
        (too_large, "Frobenius norm of gate is 8"),
    ],
)
def test_hostile_experts_are_found(
    anchor, contributions, prepared, tmp_path, capsys, change, finding
):
    hostile = forged(contributions["code"], tmp_path / "hostile", change)
    report = verify(hostile, anchor, public=prepared["public"])["admission"]
    assert any(finding in found for found in report["findings"])
    assert "warning" in capsys.readouterr().err
    with pytest.raises(UserError, match="is not admitted") as error:
        verify(hostile, anchor, public=prepared["public"], refuse=True)
    assert finding in str(error.value) and "\n" not in str(error.value)


def test_an_expert_that_takes_public_text_for_itself_is_found(
    anchor, contributions, prepared, tmp_path
):
    """Its rows are what routers read of public text on average, longer."""
    run = pair_config(anchor, prepared["public"], "hostile", "pair.row=hidden")
    assert run.pair is not None
    rows = np.asarray(initial_row(run.pair, run, open_artifact(anchor)))

    def capture(tensors: Tensors) -> Tensors:
        captured = {
            f"layers.{layer}.router.row": (
                (20 * row).astype(np.asarray(tensors["layers.0.router.row"]).dtype)
            )
            for layer, row in enumerate(rows)
        }
        return (
            tensors
            | captured
            | {n: np.zeros_like(a) for n, a in tensors.items() if n.endswith("bias")}
        )

    report = verify(
        forged(contributions["code"], tmp_path / "hostile", capture),
        anchor,
        public=prepared["public"],
    )["admission"]
    assert report["public_share"] > 0.75 and any(
        "of the mixture on public text" in found for found in report["findings"]
    )


def test_the_largest_singular_value_is_that_of_linear_algebra():
    from flexolmo_jax.exchange.admission import _largest_singular_value

    for shape in ((32, 64), (64, 32)):
        matrix = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
        assert _largest_singular_value(matrix) == pytest.approx(
            np.linalg.svd(matrix)[1][0], rel=0.05
        )


def test_a_report_needs_the_anchor(contributions, prepared):
    with pytest.raises(UserError, match="give --anchor"):
        verify(contributions["code"], public=prepared["public"])
    with pytest.raises(UserError, match="give --public"):
        verify(contributions["code"], refuse=True)


def test_every_honest_expert_is_admitted_to_the_anchor_and_to_models_on_it(
    anchor, model, contributions
):
    for base in (anchor, model):
        for path in contributions.values():
            admit(open_contribution(path), open_artifact(base))


def test_an_expert_up_to_four_times_out_of_the_policy_is_left_to_the_report(
    anchor, contributions, prepared, tmp_path
):
    contribution = forged(contributions["code"], tmp_path / "large", too_large)
    admit(open_contribution(contribution), open_artifact(anchor))
    assert verify(contribution, anchor, public=prepared["public"])["admission"]["findings"]


def test_a_changed_byte_is_refused_by_admission_too(anchor, contributions, tmp_path):
    shutil.copytree(contributions["code"], tmp_path / "changed")
    data = bytearray((tmp_path / "changed" / TENSORS).read_bytes())
    data[-1] ^= 1
    (tmp_path / "changed" / TENSORS).write_bytes(data)
    with pytest.raises(UserError, match="are not those of the manifest"):
        admit(open_contribution(tmp_path / "changed"), open_artifact(anchor))


def in_one_direction(tensors: Tensors) -> Tensors:
    """Gates whose norm is in one singular value: twice as large as an honest one's, by the sum of
    their squares."""

    def bent(matrix: np.ndarray) -> np.ndarray:
        wide = matrix.astype(np.float32)
        spike = np.outer(np.ones(len(wide)), np.ones(wide.shape[1])) / np.sqrt(wide.size)
        return (wide + 2 * np.linalg.norm(wide) * spike).astype(matrix.dtype)

    return {n: bent(a) if n.endswith("gate") else a for n, a in tensors.items()}


def test_a_matrix_that_is_large_in_one_direction_is_found(
    anchor, contributions, prepared, tmp_path
):
    """Its Frobenius norm is within the policy; what it does to the inputs that it is made for is
    not."""
    hostile = forged(contributions["code"], tmp_path / "hostile", in_one_direction)
    findings = verify(hostile, anchor, public=prepared["public"])["admission"]["findings"]
    assert any("the spectral norm of gate" in found for found in findings) and not any(
        "Frobenius" in found for found in findings
    )


def figures(report: Any) -> list[float]:
    """All numbers of a report, in its own order."""
    if isinstance(report, dict):
        report = list(report.values())
    if isinstance(report, list):
        return [figure for inner in report for figure in figures(inner)]
    return [report] if isinstance(report, float) else []


@pytest.mark.parametrize("mesh", [MeshConfig(fsdp=8), MeshConfig(data=2, fsdp=2, tensor=2)])
def test_a_mesh_changes_a_report_by_rounding_and_no_device_holds_all_of_anchor_and_expert(
    mesh, anchor, contributions, prepared, report, held: Held
):
    found = held(admission_module, "score_model")
    asked = {"public": prepared["public"], "mesh": mesh}
    on_mesh = verify(contributions["code"], anchor, **asked)["admission"]
    assert len(figures(report)) > 20
    np.testing.assert_allclose(figures(on_mesh), figures(report), rtol=1e-5)
    config = dataclasses.replace(open_artifact(anchor).config, router_bias=True)
    params = abstract_params(config, make_mesh(mesh), pair=True, dtype=lambda path: "bfloat16")
    assert size_of(params) <= min(found) <= max(found) <= size_of(params) + OTHERS


@pytest.fixture(scope="module")
def report(anchor, contributions, prepared) -> dict[str, Any]:
    """Of an honest expert."""
    return verify(contributions["code"], anchor, public=prepared["public"])["admission"]


BOUNDS = {
    "Frobenius norm of up": (["weights", "up", "Frobenius", "most"], DEFAULT.norm, 1),
    "the Frobenius norm of up": (["weights", "up", "Frobenius", "least"], 1 / DEFAULT.norm, -1),
    "spectral norm of down": (["weights", "down", "spectral", "most"], DEFAULT.spectral, 1),
    "the spectral norm of down": (
        ["weights", "down", "spectral", "least"],
        1 / DEFAULT.spectral,
        -1,
    ),
    "gate has little in common": (["weights", "gate", "cosine", "least"], DEFAULT.cosine, -1),
    "a router row is": (["row_norm_of_the_anchors", "most"], DEFAULT.row_norm, 1),
    "of the mixture on public text": (["public_share"], DEFAULT.public_share, 1),
    "of public text get": (["public_bits_per_byte", "with_the_expert"], 1 + DEFAULT.public_loss, 1),
}


@pytest.mark.parametrize("finding", BOUNDS)
def test_each_bound_of_the_policy_is_one(report, finding):
    """A measure on the right side of its bound is no finding; on the other side, or no number, it
    is one."""
    assert _findings(report, DEFAULT) == []
    (*path, last), bound, outwards = BOUNDS[finding]
    bound = bound * report["public_bits_per_byte"]["anchor"] if last == "with_the_expert" else bound
    for value, is_found in (
        (bound - outwards * 1e-6, False),
        (bound + outwards * 1e-6, True),
        (math.nan, True),
    ):
        changed = copy.deepcopy(report)
        functools.reduce(lambda node, key: node[key], path, changed)[last] = value
        found = _findings(changed, DEFAULT)
        assert len(found) == is_found and all(
            finding.removeprefix("the ") in each for each in found
        )


def test_an_admission_counts_for_its_own_bounds_and_anchor_only(
    anchor, contributions, monkeypatch, tmp_path
):
    """It is remembered, so that files are read once: another policy is another question."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    large = open_contribution(forged(contributions["code"], tmp_path / "large", too_large))
    admit(large, open_artifact(anchor))
    monkeypatch.setattr("flexolmo_jax.exchange.admission.MARGIN", 1.0)
    with pytest.raises(UserError, match="is not admitted"):
        admit(large, open_artifact(anchor))
