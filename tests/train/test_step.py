"""What a step passes on to the model, keeps, and makes anew each time: seen from its results."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexolmo_jax.config import ModelConfig, RunConfig, resolve
from flexolmo_jax.model import Params, forward, init_params
from flexolmo_jax.model.tree import partition
from flexolmo_jax.owner.pair import is_trained
from flexolmo_jax.train import step as step_module
from flexolmo_jax.train.optimizer import learning_rate, make_optimizer
from flexolmo_jax.train.state import TrainState
from flexolmo_jax.train.step import Batch, Step, make_step, router_noise

B, T = 8, 16
MODEL = ModelConfig(vocab_size=64, d_model=16, n_layers=2, n_heads=2, n_kv_heads=2, d_ffn=24)
NOISE = 0.5
BATCH: Batch = {
    "tokens": jnp.asarray(np.random.default_rng(0).integers(64, size=(B, T)), jnp.int32),
    "segments": jnp.ones((B, T), jnp.int32),
    "targets": jnp.ones((B, T), bool),
}


def config(kind: str, **train: Any) -> RunConfig:
    tree = {
        "run": kind,
        "model": dataclasses.asdict(MODEL),
        "data": {"train": [{"path": "unused"}], "batch_size": B, "seq_len": T},
        "train": train,
    }
    pair = {"anchor": "unused", "name": "new", "router_noise": NOISE, "contrast": 0}
    return resolve(tree | ({"pair": pair} if kind == "pair" else {}))


@functools.cache
def initial(pair: bool) -> Params:
    return jax.jit(functools.partial(init_params, MODEL, pair=pair))(jax.random.key(0))


def prepared(run: RunConfig) -> tuple[Step, TrainState, Params]:
    """A step, its first state and what is frozen."""
    optimizer = make_optimizer(run.optim, 10)
    params = jax.tree.map(jnp.copy, initial(run.pair is not None))
    trained, frozen = partition(params, is_trained if run.pair else lambda _: True)
    return make_step(MODEL, run, optimizer), TrainState(trained, optimizer.init(trained)), frozen


def lowered(**train: Any) -> str:
    step, state, frozen = prepared(config("anchor", **train))
    return step.lower(state, frozen, BATCH, 1).as_text()  # type: ignore[attr-defined]


def test_a_pairs_noise_is_on_the_new_experts_logit_alone_and_another_at_every_step(monkeypatch):
    seen: list[np.ndarray] = []

    def heard(*args, router_noise, **options):
        jax.debug.callback(lambda noise: seen.append(np.asarray(noise)), router_noise)
        return forward(*args, router_noise=router_noise, **options)

    monkeypatch.setattr(step_module, "forward", heard)
    step, state, frozen = prepared(config("pair"))
    for number in (1, 1, 2):
        state, _ = step(state, frozen, BATCH, number)
        jax.block_until_ready(state)
        jax.effects_barrier()
    first, again, second = seen
    np.testing.assert_array_equal(first, again)  # a run that resumes draws the same
    for noise in (first, second):
        assert noise.shape == (MODEL.n_layers, B, T, 2)
        anchors, news = noise[..., 0], noise[..., 1]
        np.testing.assert_array_equal(anchors, 0)
        assert 0.5 * NOISE < news.std() < 1.5 * NOISE
        # each layer, record and token has its own
        assert np.unique(news).size == news.size
    assert abs(np.corrcoef(first[..., 1].ravel(), second[..., 1].ravel())[0, 1]) < 0.5
    # a record's part of it is half of the variance: tokens of a record go together
    of_record = first[..., 1].mean(axis=-1).std() / NOISE
    assert 0.4 < of_record < 1.1


def test_noise_has_variance_1_half_of_it_a_records():
    noise = np.asarray(router_noise(jax.random.key(0), (256, 64), MODEL.n_layers))[..., 1]
    of_record = noise.mean(axis=-1, keepdims=True)
    assert abs(noise.std() - 1) < 0.05
    assert abs((noise - of_record).var() - 0.5) < 0.02


def test_the_learning_rate_that_is_told_is_that_of_the_step():
    run = config("anchor", steps=10)
    step, state, frozen = prepared(run)
    schedule: Any = learning_rate(run.optim, 10)
    for number in (1, 2, 3):
        state, metrics = step(state, frozen, BATCH, number)
        assert metrics["learning_rate"] == pytest.approx(schedule(number - 1))
    assert schedule(1) != schedule(2) != schedule(3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_computes_in_the_dtype_of_its_config(dtype):
    text = lowered(compute_dtype=dtype)
    products = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    in_bfloat16 = ["xbf16>" in line for line in products]
    assert products and any(in_bfloat16) == (dtype == "bfloat16")


def test_a_step_computes_again_what_its_config_says():
    none, dots, full = (lowered(remat=remat) for remat in ("none", "dots", "full"))
    assert none != dots != full
    products = [text.count("stablehlo.dot_general") for text in (none, full)]
    assert products[0] < products[1]


def test_a_step_takes_the_memory_of_the_state_before():
    step, state, frozen = prepared(config("pair"))
    after, _ = step(state, frozen, BATCH, 1)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((after, frozen)))
