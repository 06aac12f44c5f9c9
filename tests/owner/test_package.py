"""A contribution is the same on every mesh, its scores too; no device holds all of the pair."""

import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from flexolmo_jax.artifact import open_artifact
from flexolmo_jax.config import MeshConfig
from flexolmo_jax.errors import UserError
from flexolmo_jax.exchange.contribution import MANIFEST, TENSORS
from flexolmo_jax.integrity import name_of_tensor
from flexolmo_jax.owner import package as package_module
from flexolmo_jax.owner.package import package
from flexolmo_jax.plan.report import size_of
from flexolmo_jax.runtime.sharding import make_mesh
from flexolmo_jax.train.state import abstract_params
from tests.tiny import Held

OTHERS = 2**11  # bytes of constants; the pair has 2**17, of which each of 8 devices holds 2**14


@pytest.mark.parametrize(
    "mesh", [MeshConfig(fsdp=8), MeshConfig(data=2, fsdp=2, tensor=2), MeshConfig(fsdp=3, expert=2)]
)
def test_a_mesh_changes_no_byte_of_an_expert_and_its_scores_by_rounding(
    mesh, pair_runs, contributions, tmp_path, held: Held
):
    found = held(package_module, "score_model")
    out = package(pair_runs["code"], tmp_path / "code", mesh=mesh).path
    assert (out / TENSORS).read_bytes() == (contributions["code"] / TENSORS).read_bytes()
    scores, expected = (
        json.loads((path / MANIFEST).read_text())["training"]["bits_per_byte"]
        for path in (out, contributions["code"])
    )
    for who, bits in expected.items():
        assert scores[who] == pytest.approx(bits, rel=1e-5)
    config, devices = open_artifact(pair_runs["code"]).config, make_mesh(mesh)
    params = abstract_params(config, devices, pair=True, dtype=lambda path: "bfloat16")
    assert size_of(params) <= min(found) <= max(found) <= size_of(params) + OTHERS


def test_a_contribution_has_the_tensors_that_the_run_trained_cast_to_the_anchors_dtype(
    pair_runs, contributions
):
    trained, tensors = open_artifact(pair_runs["code"]).trained()["expert"], {}
    for leaf, array in trained.items():
        for layer, values in enumerate(np.asarray(array)[:, 0]):
            tensors[name_of_tensor(leaf, layer)] = values.astype("bfloat16")
    released = load_file(contributions["code"] / TENSORS)
    assert released.keys() == tensors.keys()
    for name, values in released.items():
        np.testing.assert_array_equal(values, tensors[name], err_msg=name)


def test_a_pair_lies_on_the_mesh_of_its_run_or_on_all_devices_if_that_has_more(
    pair_runs, tmp_path, monkeypatch
):
    sizes = []

    def score_model(*args, score_model=package_module.score_model, mesh, **options):
        sizes.append(mesh.size)
        return score_model(*args, mesh=mesh, **options)

    monkeypatch.setattr(package_module, "score_model", score_model)
    for devices, expected in ((1, 1), (4, 4), (64, len(jax.devices()))):
        run = shutil.copytree(pair_runs["law"], tmp_path / f"run{devices}")
        text = (run / "config.yaml").read_text()
        assert "fsdp: 1\n" in text
        (run / "config.yaml").write_text(text.replace("fsdp: 1\n", f"fsdp: {devices}\n"))
        package(run, tmp_path / f"law{devices}")
        assert set(sizes) == {expected}
        sizes.clear()
    with pytest.raises(UserError, match="needs 64 devices; got 8"):
        package(pair_runs["law"], tmp_path / "none", mesh=MeshConfig(fsdp=64))
    assert not (tmp_path / "none").exists()
