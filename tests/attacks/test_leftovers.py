"""What earlier commands left behind. The promise: nothing is taken up but what belongs to the
command that is given."""

import shutil
from pathlib import Path

import pytest

from flexolmo_jax.coordinator import router
from flexolmo_jax.coordinator.merge import apply_tuning, merge, opt_out, replace, undo_tuning
from flexolmo_jax.coordinator.router import train_router, tune
from flexolmo_jax.errors import UserError
from flexolmo_jax.exchange.contribution import MANIFEST, open_contribution, sealed
from tests.tiny import run_config


def test_who_has_left_does_not_come_back_out_of_an_earlier_tuning(
    anchor, model, contributions, corpora, prepared, tmp_path, monkeypatch
):
    """Promise: what is verified is what runs, and who leaves is gone. A tuning that was stopped
    leaves the model it began with in its work folder; the next one there, of the model without a
    leaver or with a newer expert, once took that, and gave it the new model's name."""
    store = {"store_path": tmp_path / "store"}
    run = run_config("router", prepared["public"], "train.steps=1", router={"model": str(model)})
    train_router(run, tmp_path / "run")
    tuned = apply_tuning(tmp_path / "run", tmp_path / "tuned", **store).path
    newer = Path(shutil.copytree(contributions["law"], tmp_path / "newer"))
    (newer / MANIFEST).write_bytes(sealed(open_contribution(newer).manifest | {"sequence": 2}))
    others = [
        opt_out(tuned, ["care"], tmp_path / "without-care", **store).path,
        replace(tuned, newer, tmp_path / "newer-law", **store).path,
    ]
    merge(
        anchor, list(contributions.values()), tmp_path / "whole", **store
    )  # what was contributed is in the store
    undo_tuning(tuned, tmp_path / "work" / "contributed", **store)
    monkeypatch.setattr(router, "train_router", lambda run, out: pytest.fail("it was trained"))
    for other in others:
        with pytest.raises(UserError, match="was made from another model than"):
            tune(
                other,
                {"code": corpora["code"]},
                [corpora["public"]],
                tmp_path / "out",
                work=tmp_path / "work",
                **store,
            )
    assert not (tmp_path / "out").exists()
