"""A finished run can be trained on, with more steps, another rate or other data; it is noted."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest

from flexolmo_jax import cli
from flexolmo_jax.artifact import open_artifact
from flexolmo_jax.config import dump_yaml
from flexolmo_jax.description import DESCRIPTION
from flexolmo_jax.exchange.contribution import open_contribution
from flexolmo_jax.model.tree import flatten
from tests.tiny import pair_config, run_config

# so that a step's rate does not depend on how many there are
CONSTANT = ("optim.final_fraction=1", "optim.warmup=1", "train.save_every=2")


def train(run, out: Path, *options: str) -> int:
    file = out.parent / "run.yaml"
    file.write_text(dump_yaml(run))
    return cli.main(["train", str(file), "--out", str(out), *options])


def weights(out: Path) -> dict[str, np.ndarray]:
    artifact = open_artifact(out)
    return {path: np.asarray(a) for path, a in flatten(artifact.trained()).items()}


@pytest.fixture(params=["pair", pytest.param("anchor", marks=pytest.mark.slow)])
def config(request, anchor, prepared):
    def make(*settings: str, data: str = "code"):
        if request.param == "anchor":
            return run_config("anchor", prepared[data], *CONSTANT, *settings)
        return pair_config(anchor, prepared[data], "code", *CONSTANT, *settings)

    return make


def test_a_run_that_is_trained_on_equals_one_that_was_never_stopped(config, tmp_path, capfd):
    assert train(config("train.steps=8"), tmp_path / "whole") == 0
    assert train(config("train.steps=4"), tmp_path / "run") == 0
    capfd.readouterr()
    assert train(config("train.steps=8"), tmp_path / "run") == 2
    assert "--continue trains a run on" in capfd.readouterr().err
    assert train(config("train.steps=8"), tmp_path / "run", "--continue") == 0
    assert "trained on from step 4" in capfd.readouterr().err
    ours, whole = weights(tmp_path / "run"), weights(tmp_path / "whole")
    assert all(np.array_equal(ours[path], value) for path, value in whole.items())
    lineage = open_artifact(tmp_path / "run").description["lineage"]
    assert lineage == [{"step": 4, "changed": {"train.steps": ["4", "8"]}}]
    assert "lineage" not in open_artifact(tmp_path / "whole").description
    assert train(config("train.steps=8"), tmp_path / "run", "--continue") == 0  # as after a restart
    assert open_artifact(tmp_path / "run").description["lineage"] == lineage


def test_a_run_is_trained_on_with_another_rate_and_other_data(config, tmp_path, capfd):
    assert train(config("train.steps=2"), tmp_path / "run") == 0
    other = config("train.steps=4", "optim.lr=1e-3", data="law")
    shutil.copytree(tmp_path / "run", tmp_path / "same")
    assert train(other, tmp_path / "run", "--continue") == 0
    assert train(config("train.steps=4"), tmp_path / "same", "--continue") == 0
    (entry,) = open_artifact(tmp_path / "run").description["lineage"]
    assert entry["step"] == 2 and {"train.steps", "optim.lr"} < entry["changed"].keys()
    assert any(key.startswith("data.train") for key in entry["changed"])
    ours, same = weights(tmp_path / "run"), weights(tmp_path / "same")
    assert any(not np.array_equal(ours[path], value) for path, value in same.items())


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (("train.steps=4", "data.batch_size=4"), "be trained on with another data.batch_size"),
        (("train.steps=4", "train.seed=7"), "be trained on with another train.seed"),
        (("optim.lr=1e-3",), "has 2 steps, and train.steps is 2; to train it on"),
    ],
)  # fmt: skip
def test_what_would_be_another_run_is_refused_and_leaves_all_as_it_was(
    config, tmp_path, capfd, settings, told
):
    assert train(config("train.steps=2"), tmp_path / "run") == 0
    before = (tmp_path / "run" / DESCRIPTION).read_bytes()
    assert train(config("train.steps=2", *settings), tmp_path / "run", "--continue") == 2
    assert told in capfd.readouterr().err
    assert (tmp_path / "run" / DESCRIPTION).read_bytes() == before
    assert train(config("train.steps=2"), tmp_path / "run") == 0


def test_a_rate_of_its_own_for_the_router_is_there_from_the_start(
    anchor, prepared, tmp_path, capfd
):
    run = pair_config(anchor, prepared["code"], "code", *CONSTANT, "train.steps=2")
    assert train(run, tmp_path / "run") == 0
    optim = dataclasses.replace(run.optim, router_lr=1e-3)
    steps = dataclasses.replace(run.train, steps=4)
    another = dataclasses.replace(run, optim=optim, train=steps)
    assert train(another, tmp_path / "run", "--continue") == 2
    assert "to be there from the start, or not at all" in capfd.readouterr().err


def test_there_has_to_be_a_run_to_train_on(config, tmp_path, capfd):
    assert train(config("train.steps=2"), tmp_path / "run", "--continue") == 2
    assert "holds no run to train on" in capfd.readouterr().err and not (tmp_path / "run").exists()


def test_an_owners_expert_is_trained_on_and_handed_over_again(anchor, corpora, tmp_path, capfd):
    command = ["contribute", "--anchor", anchor, "--documents", corpora["code"], "--name", "code"]
    command += ["--work", tmp_path / "work", "--set", "data.batch_size=8"]
    first = [*command, "--set", "train.steps=2", "--out", tmp_path / "first"]
    more = [*command, "--set", "train.steps=4", "--out", tmp_path / "second"]
    assert cli.main([*map(str, first)]) == 0
    assert cli.main([*map(str, more)]) == 2 and "--continue" in capfd.readouterr().err
    assert cli.main([*map(str, more), "--continue"]) == 0
    steps = [open_contribution(tmp_path / out).manifest["training"]["steps"]
             for out in ("first", "second")]  # fmt: skip
    assert steps == [2, 4]
