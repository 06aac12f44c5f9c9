"""A run that may be taken away at any time: it goes on with another number of microbatches as the
same run, and saves by the clock."""

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from flexolmo_jax.artifact import open_artifact
from flexolmo_jax.config import RunConfig, load_config
from flexolmo_jax.errors import UserError
from flexolmo_jax.model.tree import flatten
from flexolmo_jax.owner.pair import train_pair
from flexolmo_jax.train import loop
from flexolmo_jax.train.feed import Feed
from flexolmo_jax.train.metrics import read_metrics
from flexolmo_jax.train.pretrain import pretrain
from tests.tiny import Train, pair_config, run_config, train_until

STEPS = 9
# relative; measured: 2.6e-7 of losses and gradient norms, 7.3e-8 of parameters. Noise that were a
# microbatch's own would be 6e-4 of the loss
ROUNDING = 2e-6


def read(run: Path, key: str) -> list[Any]:
    return [entry[key] for entry in read_metrics(run) if key in entry]


@pytest.fixture(params=[pytest.param("anchor", marks=pytest.mark.slow), "pair"])
def kind(request, prepared, anchor) -> tuple[Train, Callable[..., RunConfig]]:
    """A pair has noise on its router's logits, and records that count differently."""

    def make(accumulate: int, *overrides: str) -> RunConfig:
        every = (f"train.steps={STEPS}", f"train.accumulate={accumulate}", *overrides)
        if request.param == "anchor":
            return run_config("anchor", prepared["public"], *every)
        return pair_config(anchor, prepared["code"], "code", *every)

    return (pretrain if request.param == "anchor" else train_pair), make


def test_a_run_that_resumes_with_other_microbatches_learns_the_same(kind, tmp_path):
    train, config = kind
    train(config(1), tmp_path / "whole")
    for last, accumulate in ((3, 1), (6, 2), (STEPS, 4)):
        train_until(last, train, config(accumulate), tmp_path / "run")
        assert load_config(tmp_path / "run" / "config.yaml").train.accumulate == accumulate
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert len(read(run, "loss")) == STEPS
    for name in ("loss", "total_loss", "gradient_norm"):
        np.testing.assert_allclose(read(run, name), read(whole, name), rtol=ROUNDING, err_msg=name)
    trained, expected = (flatten(open_artifact(path).params()) for path in (run, whole))
    for path, value in expected.items():
        off = np.linalg.norm(trained[path] - value) / np.linalg.norm(value)
        assert off <= ROUNDING, path
    # each step was computed with what the checkpoint after it says
    assert [entry["accumulate"] for entry in read(run, "ran_on")] == [1, 2, 4]


def test_an_earlier_versions_run_resumes_with_other_microbatches(anchor_run, prepared, tmp_path):
    """Its config says how many it had, or nothing: 1."""
    run = Path(shutil.copytree(anchor_run, tmp_path / "run"))
    text = (run / "config.yaml").read_text()
    assert "  accumulate: 1\n" in text
    (run / "config.yaml").write_text(text.replace("  accumulate: 1\n", ""))
    pretrain(run_config("anchor", prepared["public"], "train.accumulate=2"), run)
    assert load_config(run / "config.yaml").train.accumulate == 2


@pytest.mark.slow
def test_a_run_that_balances_experts_over_a_microbatch_keeps_its_microbatches(prepared, tmp_path):
    """Balance is not a sum over tokens: another number of microbatches is another loss."""

    experts = ("model.n_experts=3", "model.n_active=2", "train.steps=2")
    balanced = (*experts, "optim.load_balance=0.01")
    pretrain(run_config("joint", prepared["public"], *balanced), tmp_path / "run")
    for changed, key in (
        (("train.accumulate=2",), r"train\.accumulate"),
        # which is then what is wrong, whatever the number of microbatches
        (("train.accumulate=2", "optim.load_balance=0"), r"optim\.load_balance"),
    ):
        with pytest.raises(UserError, match=rf"another {key} \([^)]*\);"):
            more = (*balanced, *changed)
            pretrain(run_config("joint", prepared["public"], *more), tmp_path / "run")


@pytest.mark.slow
def test_a_run_that_does_not_balance_experts_may_change_its_microbatches(prepared, tmp_path):
    experts = ("model.n_experts=3", "model.n_active=2", "train.steps=2")
    for accumulate in (1, 2):
        more = (*experts, f"train.accumulate={accumulate}")
        pretrain(run_config("joint", prepared["public"], *more), tmp_path / "run")


def test_a_run_saves_when_minutes_have_passed_since_the_last_save_or_the_start(
    prepared, tmp_path, monkeypatch
):
    """By a clock that goes on by a minute a step."""
    minutes = 0

    def take_a_minute(self, read=Feed.next):
        nonlocal minutes
        minutes += 1
        return read(self)

    monkeypatch.setattr(Feed, "next", take_a_minute)
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: 60.0 * minutes))
    every = ("train.steps=20", "train.save_minutes=4", "train.save_every=11")
    config = run_config("anchor", prepared["public"], *every)
    train_until(17, pretrain, config, tmp_path / "run")
    pretrain(config, tmp_path / "run")
    entries = [entry for entry in read_metrics(tmp_path / "run") if "seconds" in entry]
    # at 11 by steps, at 17 by a signal, after which both the clock and the run start again
    assert [entry["step"] for entry in entries] == [4, 8, 11, 15, 17, 20]
