"""Screening on a mesh: the verdict of one device, and no device with the whole of a model."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from flexolmo_jax.artifact import open_artifact
from flexolmo_jax.config import MeshConfig
from flexolmo_jax.coordinator.merge import merge
from flexolmo_jax.owner import screen as screen_module
from flexolmo_jax.owner.screen import screen
from flexolmo_jax.plan.report import size_of
from flexolmo_jax.runtime.sharding import make_mesh
from flexolmo_jax.train.state import abstract_params
from tests.tiny import Held

OTHERS = 2**11  # bytes of constants


@pytest.mark.parametrize(
    "mesh",
    [
        pytest.param(MeshConfig(fsdp=8), marks=pytest.mark.slow),
        MeshConfig(data=3, fsdp=1, expert=2),
    ],
)
def test_a_mesh_changes_a_verdict_by_rounding_and_no_device_holds_all_of_a_model(
    mesh, anchor, contributions, prepared, tmp_path, held: Held
):
    of_care = merge(anchor, [contributions["care"]], tmp_path / "care").path

    def told(name: str, **how: Any) -> list[float]:
        out, documents = tmp_path / f"{name}.json", [prepared["care"]]
        found = screen(contributions["code"], anchor, of_care, documents, out, **how)
        return list(found["not_in_the_verdict"]["bits_per_byte"].values())

    expected = told("alone")
    found = held(screen_module, "evaluate")
    np.testing.assert_allclose(told("spread", mesh=mesh), expected, rtol=1e-5)
    devices, config = make_mesh(mesh), open_artifact(of_care).config
    sizes = [
        size_of(abstract_params(of, devices, pair=False, dtype=lambda path: "bfloat16"))
        for of in (config, dataclasses.replace(config, n_experts=3))
    ]
    assert len(found) == len(sizes) == 2
    for size, bytes_held in zip(sizes, found, strict=True):
        assert size <= bytes_held <= size + OTHERS
