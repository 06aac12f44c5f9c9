"""Hostile directories of runs. The promise: what is checked is what runs, and anything else is told
in one line."""

import json
import shutil

import pytest
import yaml

from flexolmo_jax import cli
from flexolmo_jax.artifact import open_artifact
from flexolmo_jax.description import DESCRIPTION, read_sealed, sealed_json
from flexolmo_jax.errors import UserError
from flexolmo_jax.exchange.anchor import publish
from flexolmo_jax.owner.package import package


@pytest.fixture
def refused(capsys):
    """Runs a command that has to be refused; returns the line that says why."""

    def run(*words):
        assert cli.main([str(word) for word in words]) == 2
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert line.startswith("flexolmo: ")
        return line

    return run


def changed(run, target, change):
    shutil.copytree(run, target)
    description = read_sealed(target / DESCRIPTION)
    change(description)
    (target / DESCRIPTION).write_text(sealed_json(description))
    return target


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.pop("base"),
        lambda d: d["tensors"].pop("expert/row"),
        lambda d: d["tensors"].update({"expert/gate/x": {"dtype": "float32", "shape": [2]}}),
        lambda d: d["tensors"].update({"trunk/embedding": {"dtype": "float32", "shape": [4, 32]}}),
        lambda d: d["model"].update(n_heads=2),
        lambda d: d["model"].update(rope_theta=10.0),
        lambda d: d["model"].update(n_experts=4),
    ],
)
def test_a_run_trained_what_its_description_says(pair_runs, tmp_path, change):
    """Told in one line: a run whose description does not fit what such a run trains, or its
    anchor."""
    run = changed(pair_runs["law"], tmp_path / "run", change)
    with pytest.raises(UserError):
        package(run, tmp_path / "out")


def test_no_anchor_is_published_of_a_part_of_a_model(anchor_run, corpora, tmp_path):
    """A claim is not believed without cause: it was published, and fitted no model."""
    run = changed(anchor_run, tmp_path / "run", lambda d: d["tensors"].pop("trunk/embedding"))
    with pytest.raises(UserError, match="'trunk/embedding' has the shape None"):
        publish(run, [corpora["public"]], tmp_path / "out")


def test_a_run_that_stands_on_itself_ends_at_once(pair_runs, tmp_path):
    """No hang: its base was opened until Python's stack was full."""
    target = tmp_path / "run"
    run = changed(pair_runs["law"], target, lambda d: d.update(base=str(target)))
    with pytest.raises(UserError, match="expected its anchor"):
        open_artifact(run).params()


def test_a_checkpoint_of_another_run_is_refused(pair_runs, anchor_run, tmp_path):
    """What runs is what was trained: Orbax leaves out what a checkpoint lacks."""
    run = tmp_path / "run"
    shutil.copytree(pair_runs["law"], run)
    shutil.rmtree(run / "checkpoints")
    shutil.copytree(anchor_run / "checkpoints", run / "checkpoints")
    with pytest.raises(UserError, match="lacks parameters"):
        package(run, tmp_path / "out")


@pytest.mark.parametrize("of", ["another kind", "another name"])
def test_a_config_of_another_run_is_refused(refused, pair_runs, anchor_run, tmp_path, of):
    """A claim is not believed without cause: name, owner and licence of another's config."""
    run = tmp_path / "run"
    shutil.copytree(pair_runs["law"], run)
    if of == "another kind":
        shutil.copy(anchor_run / "config.yaml", run)
        assert "holds a run of run: pair" in refused("train", run / "config.yaml", "--out", run)
    else:
        config = yaml.safe_load((run / "config.yaml").read_text())
        config["pair"]["name"] = "care"
        (run / "config.yaml").write_text(json.dumps(config))
    assert "the run trained 'law'" in refused("package", run, "--out", tmp_path / "out")
