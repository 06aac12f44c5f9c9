"""One optimisation step: gradients of the trained parameters only, accumulated over
microbatches."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from flexolmo_jax.config import ModelConfig, Remat, RunConfig
from flexolmo_jax.errors import UserError
from flexolmo_jax.model import Params, forward
from flexolmo_jax.model.tree import combine
from flexolmo_jax.runtime.environment import random_key
from flexolmo_jax.runtime.sharding import over_replicas, platform_of, replicated
from flexolmo_jax.runtime.tpus import step_options

from .losses import Contrast, LossSums, loss_sums, predicts
from .optimizer import learning_rate
from .spikes import without_spike
from .state import TrainState

# "tokens", "segments" int32 [B, T]; "targets" bool [B, T]; contrast: "expert", "expert_weight" [B]
Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]
# (trained, frozen parameters, batch) -> (gradients, sums): of the batch's sum, not of its mean
Gradient = Callable[[Params, Params, Batch], tuple[Params, LossSums]]


# Below, what is offloaded inside of a kernel's own jit is computed again all the same (0.10.2).
OFFLOADS_FROM = (0, 12)


# (state, frozen parameters, batch, step number) -> (state, metrics)
Step = Callable[[TrainState, Params, Batch, jax.Array | int], tuple[TrainState, Metrics]]


def check_remat(remat: Remat, platform: str | None) -> None:
    """Raises UserError where activations cannot go to the host's memory."""
    if remat != "offload":
        return
    if platform != "tpu":
        raise UserError(
            f"train.remat is 'offload', which is for TPUs; got {platform}; keep the same on the"
            " device with --set train.remat=outputs"
        )
    if jax.__version_info__ < OFFLOADS_FROM:
        raise UserError(
            f"train.remat is 'offload', which needs jax 0.12; got {jax.__version__}, which would"
            " run attention again; update jax, or --set train.remat=outputs"
        )


def make_step(
    model: ModelConfig,
    run: RunConfig,
    optimizer: optax.GradientTransformation,
    mesh: Mesh | None = None,
) -> Step:
    """The jitted step. The old state's buffers are reused."""
    schedule = learning_rate(run.optim, run.train.steps)
    gradient = jax.grad(functools.partial(_loss, model, run, mesh), has_aux=True)
    gradient = _accumulated(gradient, run.train.accumulate)
    if not run.optim.load_balance:  # which is a whole microbatch's, and no sum over its tokens
        gradient = over_replicas(mesh, gradient)

    def step(
        state: TrainState, frozen: Params, batch: Batch, number: jax.Array | int
    ) -> tuple[TrainState, Metrics]:
        count = jnp.maximum(jnp.sum(predicts(batch["targets"])), 1).astype(jnp.float32)
        if run.pair is not None and run.pair.router_noise:
            # Of the step's number, not of a state: a resumed run draws the same.
            key = jax.random.fold_in(random_key(run.train.seed), number)
            noise = router_noise(key, batch["tokens"].shape, model.n_layers)
            batch = batch | {"router_noise": run.pair.router_noise * noise}
        sums_of_gradients, sums = gradient(state.params, frozen, batch)
        gradients = jax.tree.map(lambda g: g / count, sums_of_gradients)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.params)
        metrics = {
            "loss": sums.cross_entropy / count,
            "total_loss": sums.total / count,
            "gradient_norm": optax.tree.norm(gradients),
            "learning_rate": jnp.asarray(schedule(number - 1)),
            "router_share": sums.router_share / count,
            "router_entropy": sums.router_entropy / count,
        }
        if mesh is not None:  # every process reads them
            metrics = jax.lax.with_sharding_constraint(metrics, replicated(mesh))
        # optax types its result as any kind of tree
        params: Any = optax.apply_updates(state.params, updates)
        after = TrainState(params, optimizer_state)
        if run.train.skip_spikes:
            return without_spike(run.train.skip_spikes, state, after, metrics)
        return after, metrics

    platform = platform_of(mesh) or jax.default_backend()
    return jax.jit(step, donate_argnums=0, compiler_options=step_options(platform))


def _loss(
    model: ModelConfig,
    run: RunConfig,
    mesh: Mesh | None,
    trained: Params,
    frozen: Params,
    batch: Batch,
) -> tuple[jax.Array, LossSums]:
    """What is minimised, and all sums. Gradients are taken of the first, by `trained`."""
    alone = run.pair is not None and not run.pair.beside_anchor
    noise = batch.get("router_noise")
    output = forward(
        model,
        combine(frozen, trained),
        batch["tokens"],
        batch["segments"],
        # router tuning: every expert active, no dispatch
        active=model.n_experts if run.run == "router" else None,
        allowed=jnp.array([False, True]) if alone else None,
        dtype=run.train.compute_dtype,
        remat=run.train.remat,
        mesh=mesh,
        kernels=run.kernels,
        router_noise=None if noise is None else jnp.moveaxis(noise, 1, 0),  # [L, B, T, 2]
    )
    contrast = Contrast(batch["expert"], batch["expert_weight"]) if "expert" in batch else None
    sums = loss_sums(output, batch["tokens"], batch["targets"], run.optim, contrast, mesh)
    return sums.total, sums


def _accumulated(gradient: Gradient, n: int) -> Gradient:
    """The same gradient and sums, from `n` microbatches one after the other."""
    if n == 1:
        return gradient

    def accumulated(trained: Params, frozen: Params, batch: Batch) -> tuple[Params, LossSums]:
        # Every n-th record goes to the same microbatch: each keeps an even share of every device's
        # records.
        micro = jax.tree.map(lambda a: jnp.moveaxis(a.reshape(-1, n, *a.shape[1:]), 1, 0), batch)

        def add(sums: Any, one: Batch) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, sums, gradient(trained, frozen, one)), None

        first = jax.tree.map(lambda a: a[0], micro)
        shapes = jax.eval_shape(gradient, trained, frozen, first)
        zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
        return jax.lax.scan(add, zeros, micro)[0]

    return accumulated


def router_noise(key: jax.Array, shape: tuple[int, ...], L: int) -> jax.Array:
    """N(0, 1) for the logit of a pair's new expert, 0 for the anchor's: [B, L, T, 2].

    After a merge, experts of other owners, which a pair never meets, take probability from its own:
    for a whole document, or at single tokens. So half of the variance is a record's, half a
    token's. An expert that trained under noise bears that (README: mathematics 8 % behind its pair
    instead of 12 %). The paper has none.
    """
    (B, T), (of_record, of_token) = shape, jax.random.split(key)
    by_record = jax.random.normal(of_record, (B, L, 1, 1))
    by_token = jax.random.normal(of_token, (B, L, T, 1))
    noise = (by_record + by_token) / 2**0.5
    return jnp.pad(noise, ((0, 0), (0, 0), (0, 0), (1, 0)))
