"""Which kernels route tokens is a choice of execution: it changes no result, and nothing that is
written remembers it."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import flexolmo_jax
from flexolmo_jax.artifact import open_artifact
from flexolmo_jax.cli import main
from flexolmo_jax.config import load_config, resolve, to_dict
from flexolmo_jax.coordinator.merge import merge
from flexolmo_jax.errors import UserError
from flexolmo_jax.kernels import choice
from flexolmo_jax.model.tree import flatten
from flexolmo_jax.owner.package import package
from flexolmo_jax.owner.pair import train_pair
from flexolmo_jax.train.metrics import read_metrics
from flexolmo_jax.train.pretrain import pretrain
from tests.tiny import pair_config, run_config

SPARSE = ("model.n_experts=3", "model.n_active=2", "train.steps=4", "train.save_every=2")


def assert_close(got, expected) -> None:
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The kernels that programs traced from now on ask for."""
    names: set[str] = set()

    def run(kernels, *rest, run=choice.run):
        names.add(kernels)
        return run(kernels, *rest)

    monkeypatch.setattr(choice, "run", run)
    return names


def losses(run: Path) -> list[float]:
    return [entry["loss"] for entry in read_metrics(run) if "loss" in entry]


@pytest.fixture(scope="module")
def by_xla(prepared, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("xla") / "run"
    pretrain(run_config("joint", prepared["public"], *SPARSE, "kernels=xla"), run)
    return run


@pytest.mark.slow
def test_a_run_trains_by_pallas_as_by_xla(by_xla, prepared, tmp_path, asked):
    run = tmp_path / "run"
    pretrain(run_config("joint", prepared["public"], *SPARSE, "kernels=pallas"), run)
    assert asked == {"pallas"}
    assert_close(losses(run), losses(by_xla))
    summaries = [json.loads((path / "summary.json").read_text()) for path in (run, by_xla)]
    scores, expected = (list(summary["bits_per_byte"].values()) for summary in summaries)
    assert_close(scores, expected)
    trained, wanted = (flatten(open_artifact(path).params()) for path in (run, by_xla))
    for path, value in wanted.items():
        assert np.linalg.norm(trained[path] - value) <= 1e-4 * np.linalg.norm(value), path


@pytest.mark.parametrize("kept", [pytest.param("xla", marks=pytest.mark.slow), "auto", None])
def test_a_run_resumes_with_other_kernels_as_the_same_run(by_xla, tmp_path, asked, kept):
    """Also a run of a version that had no such choice: None."""
    run = Path(shutil.copytree(by_xla, tmp_path / "run"))
    shutil.rmtree(run / "checkpoints" / "4")
    text = (run / "config.yaml").read_text()
    assert "kernels: xla\n" in text
    line = f"kernels: {kept}\n" if kept else ""
    (run / "config.yaml").write_text(text.replace("kernels: xla\n", line))
    config = dataclasses.replace(load_config(run / "config.yaml"), kernels="pallas")
    pretrain(config, run)
    assert asked == {"pallas"}
    assert_close(losses(run), losses(by_xla))
    assert load_config(run / "config.yaml").kernels == "pallas"


def test_a_model_evaluates_and_generates_by_pallas_as_by_xla(model, prepared, capsys, asked):
    def results(kernels: str) -> tuple[list[float], list[str]]:
        names = ["--kernels", kernels, "--json"]
        assert main(["eval", str(model), "--data", str(prepared["code"]), *names]) == 0
        scores = json.loads(capsys.readouterr().out)
        prompts = ["--prompt", "the river", "--prompt", "def parse()"]
        more = ["--max-new-tokens", "12", *names]
        assert main(["generate", str(model), *prompts, *more]) == 0
        made = json.loads(capsys.readouterr().out)["completions"]
        routing = scores["routing"][prepared["code"].name].values()
        return [*scores["bits_per_byte"].values(), *routing], made

    (scores, completions), (expected, wanted) = results("pallas"), results("xla")
    assert asked == {"pallas", "xla"}
    assert_close(scores, expected)
    assert completions == wanted


def test_a_loaded_model_has_the_kernels_that_it_was_given(model, asked):
    ids = np.arange(24).reshape(2, 12)
    loaded = flexolmo_jax.load(model, kernels="pallas")
    by_pallas = loaded.logits(ids, active=3)
    assert asked == {"pallas"}
    expected = flexolmo_jax.load(model, kernels="xla").logits(ids, active=3)
    np.testing.assert_allclose(by_pallas, expected, rtol=1e-4, atol=1e-5)


def test_a_contribution_made_with_other_kernels_is_like_any(
    anchor, contributions, prepared, tmp_path
):
    config = pair_config(anchor, prepared["law"], "law", "train.steps=2", "kernels=pallas")
    train_pair(config, tmp_path / "run")
    made = package(tmp_path / "run", tmp_path / "law").path
    together = merge(anchor, [contributions["code"], made], tmp_path / "model")
    assert together.experts == ("anchor", "code", "law")
    written = [anchor, tmp_path / "run", made, tmp_path / "model"]
    files = [file for path in written for file in path.glob("*.json")]
    assert len(files) >= len(written)
    assert not any("kernels" in file.read_text() for file in files)


@pytest.mark.parametrize(
    "command",
    [
        ["eval", "MODEL", "--data", "DATA", "--kernels", "cuda"],
        ["generate", "MODEL", "--prompt", "a", "--kernels", "cuda"],
        ["plan", "MODEL", "--topology", "v5p:2x2x1", "--decode", "1x64", "--kernels", "cuda"],
        ["train", "CONFIG", "--set", "kernels=cuda", "--out", "OUT"],
    ],
    ids=lambda command: command[0],
)
def test_kernels_that_there_are_not_are_refused_in_one_line(command, model, tmp_path, capsys):
    config = tmp_path / "run.yaml"
    config.write_text("run: anchor\ndata: {train: [{path: nowhere}]}\n")
    paths = {"MODEL": model, "DATA": tmp_path, "CONFIG": config, "OUT": tmp_path / "out"}
    assert main([str(paths.get(word, word)) for word in command]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "'cuda'; expected one of auto, xla, pallas" in line
    assert not (tmp_path / "out").exists()


def test_kernels_that_there_are_not_are_refused_by_load_and_by_a_config(model):
    with pytest.raises(UserError, match="kernels is 'cuda'; expected one of auto, xla, pallas"):
        flexolmo_jax.load(model, kernels="cuda")  # pyright: ignore[reportArgumentType]
    assert to_dict(resolve({"data": {"train": [{"path": "x"}]}}))["kernels"] == "auto"


def test_a_plan_of_a_training_step_takes_its_kernels_from_the_config(tmp_path, capsys):
    where = ["--topology", "v5p:2x2x1", "--kernels", "pallas"]
    assert main(["plan", str(tmp_path / "run.yaml"), *where]) == 2
    assert "--set kernels=pallas" in capsys.readouterr().err
