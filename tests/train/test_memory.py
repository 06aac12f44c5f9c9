"""What a run holds on each device from its start to its end: its state once and what is frozen, no
more when it resumes than when it starts."""

import gc
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import pytest

from flexolmo_jax.artifact import open_artifact
from flexolmo_jax.config import RunConfig
from flexolmo_jax.coordinator.router import train_router
from flexolmo_jax.owner.pair import train_pair
from flexolmo_jax.plan.report import size_of
from flexolmo_jax.plan.steps import training_step
from flexolmo_jax.runtime.sharding import make_mesh
from flexolmo_jax.storage.checkpoint import StepCheckpoints
from flexolmo_jax.train import heldout
from flexolmo_jax.train.accounting import Accounting
from flexolmo_jax.train.pretrain import pretrain
from tests.tiny import pair_config, run_config

TRAIN = {"anchor": pretrain, "pair": train_pair, "router": train_router}
PHASES = ("init", "restore", "compile", "data", "step", "eval")
OTHERS = 2**12  # bytes of counters, metrics and what a held-out batch needs


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], dict[str, int]]:
    """A function that calls another, and returns the most bytes of live arrays on a device at the
    end of each phase, and while it evaluates.

    From its first save on nothing is counted: Orbax makes more arrays of the same memory, and keeps
    them for a while.
    """
    most: dict[str, int] = {}
    has_saved = False

    def note(phase: str) -> None:
        if not has_saved:
            most[phase] = max(most.get(phase, 0), size_of(jax.live_arrays()))

    @contextmanager
    def spent(self: Accounting, phase: str, spent=Accounting.spent) -> Iterator[None]:
        with spent(self, phase):
            yield
            note(phase)

    def score_records(*args, score_records=heldout.score_records, **options):
        note("eval")
        return score_records(*args, **options)

    def save(*args, save=StepCheckpoints.save, **options) -> None:
        nonlocal has_saved
        has_saved = True
        save(*args, **options)

    monkeypatch.setattr(Accounting, "spent", spent)
    monkeypatch.setattr(heldout, "score_records", score_records)
    monkeypatch.setattr(StepCheckpoints, "save", save)

    def held(run: Callable[[], object]) -> dict[str, int]:
        nonlocal has_saved
        gc.collect()
        before, has_saved = size_of(jax.live_arrays()), False
        most.clear()
        run()
        return {phase: most[phase] - before for phase in PHASES}

    return held


def config_of(kind: str, anchor: Path, model: Path, data: Path, devices: int) -> RunConfig:
    every = ("train.steps=2", "train.save_every=1", "train.eval_every=1")
    overrides = (*every, f"mesh.fsdp={devices}")
    if kind == "pair":
        return pair_config(anchor, data, "code", *overrides)
    if kind == "router":
        return run_config("router", data, *overrides, router={"model": str(model)})
    return run_config(kind, data, *overrides)


@pytest.mark.parametrize(
    ("kind", "devices"),
    [
        *((kind, 1) for kind in TRAIN),
        ("pair", 8),
        *(pytest.param(kind, 8, marks=pytest.mark.slow) for kind in TRAIN if kind != "pair"),
    ],
)
def test_a_run_that_resumes_holds_no_more_than_one_that_starts(
    kind, devices, anchor, model, prepared, tmp_path, held
):
    config = config_of(kind, anchor, model, prepared["code"], devices)

    def run() -> None:
        TRAIN[kind](config, tmp_path / "run")

    fresh = held(run)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "2")
    resumed = held(run)

    made = open_artifact(tmp_path / "run").config
    step = training_step(config, made, make_mesh(config.mesh))
    state, frozen, batch, _ = step.arguments
    planned = size_of((state, frozen))
    assert fresh["init"] >= planned and resumed["restore"] >= planned
    start = max(fresh["init"], fresh["restore"])
    assert max(resumed["init"], resumed["restore"]) <= start
    for phase in ("compile", "data", "step", "eval"):
        assert resumed[phase] <= fresh[phase], phase
    for phase in PHASES:
        assert max(fresh[phase], resumed[phase]) <= planned + size_of(batch) + OTHERS, phase
