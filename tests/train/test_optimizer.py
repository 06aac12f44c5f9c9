"""The schedule's values and what weight decay leaves alone."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flexolmo_jax.config import ModelConfig, OptimConfig
from flexolmo_jax.model import init_params
from flexolmo_jax.model.tree import flatten
from flexolmo_jax.train.optimizer import learning_rate, make_optimizer


def test_the_schedule_warms_up_linearly_and_follows_a_cosine_to_a_tenth():
    schedule: Any = learning_rate(OptimConfig(lr=1e-3, warmup=10, final_fraction=0.1), 110)
    np.testing.assert_allclose([schedule(n) for n in (0, 5, 10)], [0, 5e-4, 1e-3], rtol=1e-6)
    np.testing.assert_allclose(
        [schedule(n) for n in (35, 60, 110, 500)],
        [1e-4 + 9e-4 * x for x in ((1 + 0.5**0.5) / 2, 0.5, 0, 0)],
        rtol=1e-5,
    )


def test_the_papers_anchor_stops_at_a_fifth_of_its_cosine():
    """5T tokens laid out, 1T trained, in batches of 1024 x 4096 tokens (facts of FlexOlmo, section
    4)."""
    steps, laid_out = (round(tokens / (1024 * 4096)) for tokens in (1e12, 5e12))
    schedule: Any = learning_rate(OptimConfig(lr=9e-4, warmup=2000, schedule_steps=laid_out), steps)
    cosine = 0.5 * (1 + np.cos(np.pi * (steps - 2000) / (laid_out - 2000)))
    np.testing.assert_allclose(schedule(steps), 9e-4 * (0.1 + 0.9 * cosine), rtol=1e-4)
    assert 0.9 < schedule(steps) / 9e-4 < 0.92


def test_a_run_shorter_than_its_warm_up_has_a_schedule():
    for steps in (1, 2, 5):
        values = np.array(
            [learning_rate(OptimConfig(warmup=100), steps)(n) for n in range(steps + 1)]
        )
        assert np.isfinite(values).all() and (values >= 0).all() and values.max() <= 9e-4 * 1.0001


def test_weight_decay_takes_everything_but_the_embedding():
    """Norms, router rows and biases too, as upstream."""
    model = ModelConfig(
        vocab_size=32, d_model=8, n_layers=2, n_heads=2, n_kv_heads=2, d_ffn=12, n_experts=3
    )
    shapes = jax.eval_shape(functools.partial(init_params, model, pair=True), jax.random.key(0))
    params = jax.tree.map(lambda a: jnp.full(a.shape, 0.3), shapes)
    optimizer = make_optimizer(
        OptimConfig(lr=0.5, warmup=0, weight_decay=0.1, final_fraction=1.0), 10
    )
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    after = flatten(updates)  # type: ignore[arg-type]
    ends = {path.rpartition("/")[2] for path in after}
    assert {"embedding", "scale", "kernel", "gate", "row", "bias"} <= ends
    for path, update in after.items():
        decayed = 0 if path == "trunk/embedding" else -0.5 * 0.1 * 0.3
        np.testing.assert_allclose(update, decayed, rtol=1e-5, err_msg=path)


def test_routers_may_learn_at_a_rate_of_their_own():
    model = ModelConfig(
        vocab_size=32, d_model=8, n_layers=2, n_heads=2, n_kv_heads=2, d_ffn=12, n_experts=3
    )
    shapes = jax.eval_shape(functools.partial(init_params, model, pair=True), jax.random.key(0))
    params: Any = jax.tree.map(lambda a: jnp.full(a.shape, 0.3), shapes)
    gradient = jax.tree.map(lambda a: jnp.full(a.shape, 0.01), shapes)

    def updates(router_lr: float) -> dict[str, Any]:
        optim = OptimConfig(lr=0.5, warmup=0, weight_decay=0.1, router_lr=router_lr)
        optimizer = make_optimizer(optim, 10)
        return flatten(optimizer.update(gradient, optimizer.init(params), params)[0])  # type: ignore[arg-type]

    slow, fast = updates(0.0), updates(10.0)
    for path, update in slow.items():
        times = 20 if path.rpartition("/")[2] in ("row", "bias") else 1
        np.testing.assert_allclose(fast[path], times * update, rtol=1e-6, err_msg=path)


def test_clipping_bounds_the_gradient():
    params = {"a": jnp.zeros(4)}
    # a large eps makes updates follow gradients
    optimizer = make_optimizer(OptimConfig(lr=1.0, warmup=0, eps=1e3, clip=1.0), 10)
    small: Any
    large: Any
    (small, _), (large, _) = (
        optimizer.update({"a": jnp.full(4, g)}, optimizer.init(params), params) for g in (0.5, 5e4)
    )
    np.testing.assert_allclose(small["a"], large["a"], rtol=1e-5)


def test_updates_are_those_of_adamw_by_hand():
    optim = OptimConfig(
        lr=0.1, warmup=0, final_fraction=1.0, beta1=0.7, beta2=0.9, eps=1e-2, weight_decay=0.2
    )
    optimizer: Any = make_optimizer(optim, 10)
    params: Any = {"kernel": jnp.array([0.5, -0.3])}
    state, value = optimizer.init(params), np.array([0.5, -0.3])
    first = second = np.zeros(2)
    for step, gradient in enumerate(([0.1, 0.2], [-0.3, 0.1], [0.2, -0.5]), 1):
        updates, state = optimizer.update({"kernel": jnp.array(gradient)}, state, params)
        params = optax.apply_updates(params, updates)
        first = 0.7 * first + 0.3 * np.array(gradient)
        second = 0.9 * second + 0.1 * np.square(gradient)
        scaled = first / (1 - 0.7**step) / (np.sqrt(second / (1 - 0.9**step)) + 1e-2)
        value = value - 0.1 * (scaled + 0.2 * value)
        np.testing.assert_allclose(params["kernel"], value, rtol=1e-5)
