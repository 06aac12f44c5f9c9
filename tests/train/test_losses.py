"""The loss against plain NumPy, and what accumulation and balance leave of it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexolmo_jax.config import MeshConfig, ModelConfig, OptimConfig, resolve
from flexolmo_jax.data.records import loss_targets
from flexolmo_jax.kernels.cross_entropy import chunks
from flexolmo_jax.model import Output, RouterOutput, forward, init_params
from flexolmo_jax.model.tree import flatten
from flexolmo_jax.runtime.sharding import batch_sharding, make_mesh, parameter_sharding
from flexolmo_jax.train.losses import Contrast, loss_sums, predicts, token_losses
from flexolmo_jax.train.optimizer import make_optimizer
from flexolmo_jax.train.state import TrainState
from flexolmo_jax.train.step import make_step

L, B, T, E, V = 2, 8, 6, 4, 11
CONFIG = ModelConfig(
    vocab_size=128,
    d_model=16,
    n_layers=2,
    n_heads=2,
    n_kv_heads=2,
    d_ffn=24,
    n_experts=3,
    n_active=3,
    init_std=0.3,
)
PLAIN = OptimConfig(z_loss=0.0)
RNG = np.random.default_rng(0)
SEGMENTS = np.array([[1, 1, 1, 2, 2, 0], *[[1, 1, 1, 1, 1, 1]] * 6, [1, 2, 2, 2, 2, 0]], np.int32)
TOKENS = jnp.asarray(RNG.integers(0, V, (B, T)), jnp.int32)
TARGETS = jnp.asarray(loss_targets(SEGMENTS))


def output_of(logits: np.ndarray, probabilities: np.ndarray, log_z: np.ndarray) -> Output:
    """Hidden states that are their logits: the head is the identity."""
    return Output(
        jnp.asarray(logits),
        jnp.eye(V),
        RouterOutput(jnp.asarray(probabilities), jnp.asarray(log_z), 2 * jnp.asarray(log_z)),
        None,
    )


def random_output() -> Output:
    probabilities = RNG.dirichlet(np.ones(E), (L, B, T)).astype(np.float32)
    return output_of(
        RNG.normal(0, 2, (B, T, V)).astype(np.float32),
        probabilities,
        RNG.normal(size=(L, B, T)).astype(np.float32),
    )


def test_the_loss_is_that_of_plain_numpy_on_exactly_the_targets():
    output = random_output()
    logits = np.asarray(output.hidden, np.float64)
    log_z = np.log(np.exp(logits).sum(-1))
    places = [
        (b, t)
        for b in range(B)
        for t in range(1, T)
        if SEGMENTS[b, t] and SEGMENTS[b, t] == SEGMENTS[b, t - 1]
    ]
    nats = sum(log_z[b, t - 1] - logits[b, t - 1, TOKENS[b, t]] for b, t in places)
    sums = loss_sums(output, TOKENS, TARGETS, PLAIN)
    np.testing.assert_allclose([sums.cross_entropy, sums.total], nats, rtol=1e-5)

    squares = sum(log_z[b, t - 1] ** 2 for b, t in places)
    of_router = sum(np.square(output.router.log_z[:, b, t - 1]).mean() for b, t in places)
    sums = loss_sums(output, TOKENS, TARGETS, OptimConfig(z_loss=0.1, router_z_loss=0.01))
    np.testing.assert_allclose(sums.cross_entropy, nats, rtol=1e-5)
    np.testing.assert_allclose(sums.total, nats + 0.1 * squares + 0.01 * of_router, rtol=1e-5)
    share = np.mean(
        [np.asarray(output.router.probabilities)[:, b, t - 1].mean(0) for b, t in places], axis=0
    )
    np.testing.assert_allclose(sums.router_share / len(places), share, rtol=1e-5)
    entropy = sum(output.router.entropy[:, b, t - 1].mean() for b, t in places)
    np.testing.assert_allclose(sums.router_entropy, entropy, rtol=1e-5)


def test_contrast_is_the_surprise_at_the_expert_that_a_record_belongs_to():
    output = random_output()
    expert, weight = np.arange(B) % E, np.linspace(0.5, 2, B, dtype=np.float32)
    contrast = Contrast(jnp.asarray(expert, jnp.int32), jnp.asarray(weight))
    plain, contrasted = (
        loss_sums(output, TOKENS, TARGETS, PLAIN, given) for given in (None, contrast)
    )
    counted = np.asarray(predicts(TARGETS))
    surprise = sum(
        weight[b] * -np.log(output.router.probabilities[:, b, t, expert[b]]).mean()
        for b, t in zip(*counted.nonzero(), strict=True)
    )
    np.testing.assert_allclose(contrasted.total - plain.total, surprise, rtol=1e-4)
    np.testing.assert_array_equal(contrasted.cross_entropy, plain.cross_entropy)


@pytest.mark.parametrize("active", [1, 2, 4])
def test_load_balance_is_one_a_token_when_balanced_and_e_when_one_expert_takes_all(active):
    def per_token(probabilities: np.ndarray) -> float:
        output = output_of(
            np.zeros((B, T, V), np.float32),
            probabilities.astype(np.float32),
            np.zeros((L, B, T), np.float32),
        )
        plain, balanced = (
            loss_sums(output, TOKENS, jnp.ones((B, T), bool), OptimConfig(z_loss=0, load_balance=x))
            for x in (0, 1.0)
        )
        return float(balanced.total - plain.total) / (B * (T - 1))

    # T - 1 = 5 places a record and B = 8 records: every expert is chosen equally often, with top-k
    # probabilities that do not add up to 1.
    turn = (
        np.arange(B * T).reshape(B, T)[..., None] * 0
        + np.arange(B)[:, None, None]
        + np.arange(active)
    ) % E
    even = 0.2 * np.eye(E)[turn].sum(-2)
    np.testing.assert_allclose(per_token(np.broadcast_to(even, (L, B, T, E))), 1, rtol=1e-5)
    np.testing.assert_allclose(
        per_token(np.broadcast_to(0.7 * np.eye(E)[0], (L, B, T, E))), E, rtol=1e-5
    )


def test_load_balance_is_of_two_experts_too():
    probabilities = np.broadcast_to(np.array([0.7, 0.0], np.float32), (L, B, T, 2))
    output = output_of(np.zeros((B, T, V), np.float32), probabilities, np.zeros((L, B, T)))
    plain, balanced = (
        loss_sums(output, TOKENS, jnp.ones((B, T), bool), OptimConfig(z_loss=0, load_balance=x))
        for x in (0, 1.0)
    )
    np.testing.assert_allclose((balanced.total - plain.total) / (B * (T - 1)), 2, rtol=1e-5)


def test_load_balance_weighs_the_share_of_choices_with_that_of_probabilities():
    # Half of the tokens choose two experts and half only the first of them.
    first, second = np.eye(E)[:2]
    both = np.broadcast_to(0.6 * first + 0.2 * second, (L, B, T, E))
    one = np.broadcast_to(0.8 * first, (L, B, T, E))
    probabilities = np.where(np.arange(B)[:, None, None] % 2, both, one).astype(np.float32)
    log_z = np.zeros((L, B, T), np.float32)
    output = output_of(np.zeros((B, T, V), np.float32), probabilities, log_z)
    plain, balanced = (
        loss_sums(output, TOKENS, jnp.ones((B, T), bool), OptimConfig(z_loss=0, load_balance=x))
        for x in (0, 1.0)
    )
    # of the choices 2 and 1 in 3, of the probability 1.4 and 0.2 in 1.6
    expected = E * (2 / 3 * 1.4 / 1.6 + 1 / 3 * 0.2 / 1.6)
    of_a_token = (balanced.total - plain.total) / (B * (T - 1))
    np.testing.assert_allclose(of_a_token, expected, rtol=1e-5)


@pytest.mark.parametrize("axes", [{"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 4, "expert": 2}])
def test_losses_and_gradients_in_chunks_on_a_mesh_are_those_of_one_device(axes, monkeypatch):
    """Parameters and batch lie as in training: hidden states over data and fsdp, the head over fsdp
    and tensor."""
    vocabulary, width = 32, 12
    hidden, head = (
        jnp.asarray(RNG.normal(size=shape), jnp.float32)
        for shape in ((B, T, width), (width, vocabulary))
    )
    factors = jnp.asarray(RNG.normal(size=(2, B, T)), jnp.float32)

    def total(mesh, hidden, head, tokens):
        losses, log_z = token_losses(hidden, head, tokens, mesh)
        return jnp.sum(losses * factors[0] + log_z * factors[1])

    value_and_gradients = jax.value_and_grad(total, (1, 2))
    expected = jax.jit(functools.partial(value_and_gradients, None))(hidden, head, TOKENS)
    monkeypatch.setattr(chunks, "LARGEST", 4 * vocabulary)  # a device's 12 tokens take three chunks
    mesh = make_mesh(MeshConfig(**axes))
    of_batch = batch_sharding(mesh)
    of_head = parameter_sharding(mesh, ("embed", "vocab"), head.shape)
    spread = tuple(jax.device_put((hidden, head, TOKENS), (of_batch, of_head, of_batch)))
    got = jax.jit(functools.partial(value_and_gradients, mesh))(*spread)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), got, expected)


@functools.lru_cache
def initial():
    return jax.jit(functools.partial(init_params, CONFIG))(jax.random.key(0))


def one_step(accumulate: int):
    """Parameters and metrics after one step of plain records and some that are mostly padding."""
    # eps: updates follow gradients
    train, optim = (
        {"accumulate": accumulate},
        {
            "warmup": 0,
            "clip": 1e9,
            "eps": 1.0,
            "router_z_loss": 0.1,
        },
    )
    data = {"train": [{"path": "unused"}], "batch_size": B, "seq_len": T}
    run = resolve(
        {
            "run": "joint",
            "model": dataclasses.asdict(CONFIG),
            "data": data,
            "train": train,
            "optim": optim,
        }
    )
    optimizer = make_optimizer(run.optim, 10)
    params = jax.tree.map(jnp.copy, initial())
    batch = {
        "tokens": jnp.asarray(TOKENS),
        "segments": jnp.asarray(SEGMENTS),
        "targets": jnp.asarray(TARGETS),
    }
    state, metrics = make_step(CONFIG, run, optimizer)(
        TrainState(params, optimizer.init(params)), {}, batch, 1
    )
    return flatten(state.params), metrics


def test_accumulating_microbatches_gives_the_same_gradient_and_loss():
    (whole, metrics), (parts, accumulated) = one_step(1), one_step(4)
    before = flatten(initial())
    moved = 0.0
    for path in whole:
        moved = max(moved, float(jnp.abs(whole[path] - before[path]).max()))
        np.testing.assert_allclose(
            parts[path] - before[path],
            whole[path] - before[path],
            rtol=1e-3,
            atol=1e-7,
            err_msg=path,
        )
    assert moved > 1e-5
    for name in metrics:
        np.testing.assert_allclose(accumulated[name], metrics[name], rtol=1e-5, err_msg=name)


def test_the_gradient_is_that_of_the_mean_loss_of_the_targets():
    """Central differences along a random direction."""

    @jax.jit
    def mean_loss(params):
        output = forward(CONFIG, params, TOKENS, jnp.asarray(SEGMENTS))
        sums = loss_sums(output, TOKENS, TARGETS, OptimConfig(router_z_loss=0.1))
        return sums.total / TARGETS.sum()

    direction = jax.tree.map(
        lambda a: jnp.asarray(RNG.normal(size=a.shape), jnp.float32), initial()
    )
    ahead, behind = (
        mean_loss(jax.tree.map(lambda a, d, s=s: a + s * d, initial(), direction))
        for s in (1e-3, -1e-3)
    )
    slope = sum(
        jax.tree.leaves(
            jax.tree.map(
                lambda g, d: float(jnp.vdot(g, d)), jax.grad(mean_loss)(initial()), direction
            )
        )
    )
    np.testing.assert_allclose((ahead - behind) / 2e-3, slope, rtol=2e-2)
    _, metrics = one_step(1)
    np.testing.assert_allclose(
        metrics["gradient_norm"],
        jnp.sqrt(sum(jnp.vdot(g, g) for g in jax.tree.leaves(jax.grad(mean_loss)(initial())))),
        rtol=1e-4,
    )
