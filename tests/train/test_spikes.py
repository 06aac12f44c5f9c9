"""`train.skip_spikes`: a step far above those before it changes nothing, and is counted."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from flexolmo_jax.config import RunConfig
from flexolmo_jax.coordinator.router import train_router
from flexolmo_jax.errors import RunError
from flexolmo_jax.owner.pair import train_pair
from flexolmo_jax.train import loop, spikes
from flexolmo_jax.train.feed import Feed
from flexolmo_jax.train.metrics import read_metrics
from flexolmo_jax.train.optimizer import make_optimizer
from flexolmo_jax.train.pretrain import pretrain
from flexolmo_jax.train.spikes import FEWEST, WINDOW, guarded, without_spike
from flexolmo_jax.train.state import TrainState
from tests.tiny import pair_config, run_config, train_until

ON = ("train.skip_spikes=4", "train.steps=12", "train.save_every=1", "train.keep=20")
AT = 10  # the step that spikes
KINDS = {"anchor": pretrain, "joint": pretrain, "pair": train_pair, "router": train_router}


def saved(run: Path, step: int) -> dict[str, np.ndarray]:
    directory = (run / "checkpoints" / str(step) / "default").absolute()
    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.metadata(directory).item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        tree = checkpointer.restore(directory, restore_args=as_numpy)
    found = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in found}


def changed(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> set[str]:
    assert a.keys() == b.keys()
    return {name for name in a if a[name].tobytes() != b[name].tobytes()}


def entries(run: Path) -> list[dict[str, Any]]:
    return [entry for entry in read_metrics(run) if "loss" in entry]


@pytest.fixture
def short_window(monkeypatch):
    """Of eight steps."""
    monkeypatch.setattr(spikes, "WINDOW", 8)
    monkeypatch.setattr(spikes, "FEWEST", 8)


@pytest.fixture
def made(prepared, anchor, model):
    def make(kind: str, *overrides: str) -> RunConfig:
        given = (*ON, *overrides)
        if kind == "pair":
            return pair_config(anchor, prepared["code"], "code", *given)
        sections = {"router": {"model": str(model)}} if kind == "router" else {}
        experts = ("model.n_experts=2", "model.n_active=1") if kind == "joint" else ()
        return run_config(kind, prepared["public"], *given, *experts, **sections)

    return make


@pytest.fixture
def garbage(monkeypatch):
    """From now on the batches of these steps are random tokens; of a pair, with a weight of NaN if
    so asked."""

    def of(*steps: int, nan: bool = False) -> None:
        init, following = Feed.__init__, Feed.next

        def started(self, job, mesh, start):
            init(self, job, mesh, start)
            self.number = start

        def next_(self):
            batch, self.number = following(self), self.number + 1
            if self.number not in steps:
                return batch
            if nan:
                return batch | {"expert_weight": batch["expert_weight"] * np.nan}
            key = jax.random.key(self.number)
            tokens = jax.random.randint(key, batch["tokens"].shape, 0, 300)
            return batch | {"tokens": jax.device_put(tokens, batch["tokens"].sharding)}

        monkeypatch.setattr(Feed, "__init__", started)
        monkeypatch.setattr(Feed, "next", next_)

    return of


class Steps:
    """A weight of -0.0 and an optimiser, for steps of made-up losses and norms."""

    def __init__(self):
        optimizer = guarded(optax.adamw(lambda count: 0.1 / (1 + count)))
        params: Any = {"weight": jnp.array([-0.0, 1.0])}
        self.state = TrainState(params, optimizer.init(params))

        def step(state, loss, norm):
            gradients = {"weight": jnp.full(2, loss)}
            updates, after = optimizer.update(gradients, state.optimizer, state.params)
            params: Any = optax.apply_updates(state.params, updates)
            metrics = {"loss": loss, "gradient_norm": norm}
            return without_spike(6.0, state, TrainState(params, after), metrics)

        self._step = jax.jit(step)

    def take(self, loss: float, norm: float = 1.0) -> bool:
        self.state, metrics = self._step(self.state, jnp.float32(loss), jnp.float32(norm))
        return bool(metrics["spike"])

    def fill(self, count: int) -> None:
        for i in range(count):
            assert not self.take(2 + 0.1 * (i % 2), 1 + 0.1 * (i % 3))


@pytest.mark.parametrize(
    ("loss", "norm", "is_spike"),
    [
        (2.3, 1.1, False),  # 5 deviations
        (2.4, 1.1, True),  # 7
        (2.05, 1.5, False),
        (2.05, 1.7, True),
        (0.0, 0.0, False),  # far below is no spike
        (np.nan, 1.1, True),
        (2.05, np.inf, True),
    ],
)
def test_a_step_that_is_more_deviations_above_the_window_than_allowed_is_a_spike(
    loss, norm, is_spike
):
    steps = Steps()
    steps.fill(WINDOW + 5)
    before = steps.state
    assert steps.take(loss, norm) == is_spike
    same = jax.tree.map(
        lambda a, b: np.asarray(a).tobytes() == np.asarray(b).tobytes(), before, steps.state
    )
    assert all(jax.tree.leaves(same.params)) == is_spike
    adam, _, schedule = same.optimizer.optimizer
    assert all(jax.tree.leaves(adam)) == is_spike
    assert not schedule.count  # the rate is that of the step's number
    window = steps.state.optimizer.window
    finite = np.isfinite(loss) and np.isfinite(norm)
    assert int(window.skipped) == is_spike and int(window.seen) == WINDOW + 5 + finite
    assert np.isfinite(window.losses).all() and np.isfinite(window.norms).all()


def test_no_step_is_a_spike_before_half_of_a_window():
    steps = Steps()
    steps.fill(FEWEST - 1)
    assert not steps.take(50.0)
    again = Steps()
    again.fill(FEWEST)
    assert again.take(50.0)


def test_a_higher_level_that_stays_is_no_spike_for_long():
    steps = Steps()
    steps.fill(WINDOW)
    skipped = [steps.take(9.0) for _ in range(10)]
    assert skipped == [True] * sum(skipped) + [False] * (10 - sum(skipped))
    assert 0 < sum(skipped) < 6


@pytest.mark.parametrize(
    ("kind", "accumulate"),
    [
        ("pair", 1),
        pytest.param("anchor", 2, marks=pytest.mark.slow),
        pytest.param("joint", 1, marks=pytest.mark.slow),
        pytest.param("router", 1, marks=pytest.mark.slow),
    ],
)
def test_a_skipped_step_changes_nothing_but_the_rate_and_the_window(
    kind, accumulate, made, short_window, tmp_path, monkeypatch
):
    monkeypatch.setattr(spikes, "_is_far", lambda value, values, seen, sigmas: seen == AT - 1)
    KINDS[kind](made(kind, f"train.accumulate={accumulate}"), tmp_path / "run")
    before, after, later = (saved(tmp_path / "run", step) for step in (AT - 1, AT, AT + 1))
    expected = {"losses", "norms", "seen", "skipped"}
    moved = {name.rsplit("'", 2)[1] for name in changed(before, after)}
    assert moved == expected | {"count"}
    assert sum("count" in name for name in changed(before, after)) == 1
    assert any("params" in name for name in changed(after, later))
    told = entries(tmp_path / "run")
    assert [entry["skipped"] for entry in told] == [0] * (AT - 1) + [1] * 3
    assert [entry["step"] for entry in told if entry["spike"]] == [AT]


def test_a_run_that_skips_a_batch_of_garbage_resumes_bit_for_bit(
    made, short_window, garbage, tmp_path, capsys
):
    garbage(AT)
    config = made("anchor", "optim.lr=1e-2", "train.skip_spikes=1.5")
    pretrain(config, tmp_path / "whole")
    told = entries(tmp_path / "whole")
    assert [entry["step"] for entry in told if entry["spike"]] == [AT]
    assert f"step {AT} is not applied" in capsys.readouterr().err
    for last in (AT - 1, AT):
        train_until(last, pretrain, config, tmp_path / "run")
    pretrain(config, tmp_path / "run")
    assert not changed(saved(tmp_path / "whole", 12), saved(tmp_path / "run", 12))
    assert [e["skipped"] for e in entries(tmp_path / "run")] == [e["skipped"] for e in told]


def test_one_loss_that_is_not_finite_is_skipped_and_two_in_a_row_stop_the_run(
    made, short_window, garbage, tmp_path
):
    garbage(AT - 1, AT + 1, AT + 2, nan=True)
    with pytest.raises(RunError, match=f"at step {AT + 2} "):
        train_pair(made("pair"), tmp_path / "run")
    told = {entry["step"]: entry for entry in entries(tmp_path / "run")}
    for step in (AT - 1, AT + 1):
        assert told[step]["spike"] and told[step]["gradient_norm"] is None
    assert not told[AT]["spike"] and np.isfinite(told[AT]["gradient_norm"])
    assert AT + 2 not in told


def test_without_the_key_no_checkpoint_and_no_metric_knows_of_spikes(prepared, tmp_path):
    pretrain(run_config("anchor", prepared["public"], "train.steps=2"), tmp_path / "run")
    assert not [name for name in saved(tmp_path / "run", 2) if "window" in name]
    assert all(entry.keys().isdisjoint({"spike", "skipped"}) for entry in entries(tmp_path / "run"))
    off, on = (
        make_optimizer(run_config("anchor", prepared["public"]).optim, 2, sigmas).init(
            {"weight": jnp.ones(2)}
        )
        for sigmas in (0, 6)
    )
    assert jax.tree.structure(off) == jax.tree.structure(on.optimizer)  # type: ignore[attr-defined]


def test_every_device_of_a_mesh_has_the_whole_window(made, tmp_path, monkeypatch):
    seen = []
    finish = loop.Trainer.finish
    monkeypatch.setattr(
        loop.Trainer, "finish", lambda self: (seen.append(self._state), finish(self))[1]
    )
    pretrain(made("anchor", "mesh.fsdp=8", "train.steps=2"), tmp_path / "run")
    window = seen[0].optimizer.window
    assert all(a.is_fully_replicated and len(a.devices()) == 8 for a in window)
    assert int(window.seen) == 2
