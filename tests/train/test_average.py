"""`train.average`: what a run answers with is the mean of its last checkpoints."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from flexolmo_jax.artifact import open_artifact, placement_on
from flexolmo_jax.config import MeshConfig
from flexolmo_jax.errors import UserError
from flexolmo_jax.evals.bits_per_byte import evaluate
from flexolmo_jax.exchange.contribution import TENSORS
from flexolmo_jax.integrity import name_of_tensor
from flexolmo_jax.loaded import load
from flexolmo_jax.model.tree import flatten
from flexolmo_jax.owner.package import package
from flexolmo_jax.owner.pair import train_pair
from flexolmo_jax.runtime.sharding import make_mesh
from flexolmo_jax.train.pretrain import pretrain
from tests.tiny import pair_config, run_config

STEPS = (2, 4, 6)  # of the checkpoints that are averaged
GIVEN = ("train.steps=6", "train.save_every=2", "train.save_minutes=0", "train.keep=3")
ON = (*GIVEN, "train.average=3")


@pytest.fixture(scope="module")
def averaged(prepared, anchor, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("average") / "run"
    train_pair(pair_config(anchor, prepared["code"], "code", *ON), run)
    return run


def by_hand(run: Path) -> dict[str, np.ndarray]:
    """The sum in the order of steps, times a third."""
    opened = open_artifact(run)
    one, *others = (flatten(opened.trained(str(step))) for step in STEPS)
    total = {path: np.array(a) for path, a in one.items()}
    for other in others:
        total = {path: a + np.asarray(other[path]) for path, a in total.items()}
    return {path: a * np.float32(1 / 3) for path, a in total.items()}


def test_the_last_checkpoint_is_the_mean_bit_for_bit_wherever_it_is_read(averaged):
    run, expected = open_artifact(averaged), by_hand(averaged)
    assert run.steps() == STEPS and run.step() == 6 and run.description["average"] == 3
    last = flatten(run.trained("6"))
    assert any((expected[path] != np.asarray(a)).any() for path, a in last.items())
    arrays = {path: a[:] for path, a in run.arrays().items() if path in expected}
    placed = placement_on(make_mesh(MeshConfig()), run.config, pair=True)
    for found in (flatten(run.trained()), flatten(run.trained(placement=placed)), arrays):
        assert found.keys() == expected.keys()
        for path, a in expected.items():
            assert np.asarray(found[path]).tobytes() == a.tobytes(), path


def test_what_is_trained_is_averaged_and_the_anchor_stays_as_it_is(averaged, anchor):
    whole, base = (flatten(open_artifact(path).params()) for path in (averaged, anchor))
    shared = base.keys() - by_hand(averaged).keys()
    assert shared and all(
        np.asarray(whole[path]).tobytes() == np.asarray(base[path]).tobytes() for path in shared
    )


def test_a_contribution_holds_the_mean_and_its_own_scores(averaged, anchor, tmp_path):
    made = package(averaged, tmp_path / "contribution")
    last = package(averaged, tmp_path / "last", which="6")
    assert made.manifest["training"]["steps"] == last.manifest["training"]["steps"] == 6
    assert made.manifest["tensors"] != last.manifest["tensors"]
    found, mean = load_file(made.path / TENSORS), by_hand(averaged)
    for layer in range(open_artifact(anchor).config.n_layers):
        expected = mean["expert/gate"][layer, 0].astype("bfloat16")
        np.testing.assert_array_equal(found[name_of_tensor("gate", layer)], expected)


def test_the_result_of_a_run_is_the_means_and_eval_says_the_same(prepared, tmp_path):
    run = run_config("anchor", prepared["public"], *ON)
    result = pretrain(run, tmp_path / "run")
    found = evaluate(load(tmp_path / "run"), [prepared["public"]], limit=run.train.eval_records)
    told = found["bits_per_byte"]["public"]
    np.testing.assert_allclose(result["bits_per_byte"]["public"], told, rtol=1e-6)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["bits_per_byte"] == result["bits_per_byte"]
    assert pretrain(run, tmp_path / "run") == result  # asked again, after its end


def test_a_run_that_ended_is_averaged_when_it_is_asked_again(prepared, tmp_path):
    pretrain(run_config("anchor", prepared["public"], *GIVEN), tmp_path / "run")
    assert "average" not in open_artifact(tmp_path / "run").description
    last = open_artifact(tmp_path / "run").trained()
    pretrain(run_config("anchor", prepared["public"], *ON), tmp_path / "run")
    run = open_artifact(tmp_path / "run")
    assert run.steps() == STEPS and run.steps("best") in ((2,), (4,), (6,))
    same = jax.tree.map(lambda a, b: bool((np.asarray(a) == b).all()), last, run.trained("6"))
    assert all(jax.tree.leaves(same))


@pytest.mark.parametrize("average", [1, 4, -2])
def test_an_average_of_more_checkpoints_than_are_kept_is_refused(prepared, average):
    with pytest.raises(UserError, match=r"train.average is .*; expected 0, or 2 to train.keep \(3"):
        run_config("anchor", prepared["public"], "train.keep=3", f"train.average={average}")
