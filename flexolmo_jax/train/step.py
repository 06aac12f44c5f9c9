"""One optimisation step: gradients of the trained parameters only, accumulated over
microbatches."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from flexolmo_jax.config import ModelConfig, RunConfig
from flexolmo_jax.model import Params, forward
from flexolmo_jax.model.tree import combine
from flexolmo_jax.runtime.sharding import replicated
from flexolmo_jax.runtime.tpus import step_options

from .losses import Contrast, LossSums, loss_sums, predicts
from .optimizer import learning_rate

# "tokens", "segments" int32 [B, T]; "targets" bool [B, T]; contrast: "expert", "expert_weight" [B]
Batch = dict[str, jax.Array]


class TrainState(NamedTuple):
    """What changes from step to step and is checkpointed: the trained parameters and their
    optimiser state, nothing frozen."""

    params: Params
    optimizer: Any


def make_step(
    model: ModelConfig,
    run: RunConfig,
    optimizer: optax.GradientTransformation,
    mesh: Mesh | None = None,
) -> Callable[
    [TrainState, Params, Batch, jax.Array | int], tuple[TrainState, dict[str, jax.Array]]
]:
    """The jitted step: (state, frozen parameters, batch, step number) -> (state, metrics). The old
    state's buffers are reused."""
    schedule = learning_rate(run.optim, run.train.steps)

    def losses(trained: Params, frozen: Params, batch: Batch) -> tuple[jax.Array, LossSums]:
        # router tuning: every expert active, no dispatch
        active = model.n_experts if run.run == "router" else None
        allowed = (
            jnp.array([False, True])
            if run.pair is not None and not run.pair.beside_anchor
            else None
        )
        output = forward(
            model,
            combine(frozen, trained),
            batch["tokens"],
            batch["segments"],
            active=active,
            allowed=allowed,
            dtype=run.train.compute_dtype,
            remat=run.train.remat,
            mesh=mesh,
            router_noise=(
                jnp.moveaxis(batch["router_noise"], 1, 0) if "router_noise" in batch else None
            ),
        )
        contrast = Contrast(batch["expert"], batch["expert_weight"]) if "expert" in batch else None
        sums = loss_sums(output, batch["tokens"], batch["targets"], run.optim, contrast, mesh)
        return sums.total, sums

    def gradients(trained: Params, frozen: Params, batch: Batch) -> tuple[Params, LossSums]:
        gradient = jax.grad(losses, has_aux=True)
        if run.train.accumulate == 1:
            return gradient(trained, frozen, batch)
        n = run.train.accumulate
        # Every n-th record goes to the same microbatch: each keeps an even share of every device's
        # records.
        micro = jax.tree.map(lambda a: jnp.moveaxis(a.reshape(-1, n, *a.shape[1:]), 1, 0), batch)

        def add(sums, one):
            return jax.tree.map(jnp.add, sums, gradient(trained, frozen, one)), None

        first = jax.tree.map(lambda a: a[0], micro)
        zeros = jax.tree.map(
            lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(gradient, trained, frozen, first)
        )
        return jax.lax.scan(add, zeros, micro)[0]

    def step(
        state: TrainState, frozen: Params, batch: Batch, number: jax.Array | int
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        count = jnp.maximum(jnp.sum(predicts(batch["targets"])), 1).astype(jnp.float32)
        if run.pair is not None and run.pair.router_noise:
            key = jax.random.fold_in(jax.random.key(run.train.seed), number)
            batch = batch | {
                "router_noise": (
                    run.pair.router_noise
                    * _router_noise(key, batch["tokens"].shape, model.n_layers)
                )
            }
        grads, sums = gradients(state.params, frozen, batch)
        grads = jax.tree.map(lambda g: g / count, grads)
        updates, optimizer_state = optimizer.update(grads, state.optimizer, state.params)
        metrics = {
            "loss": sums.cross_entropy / count,
            "total_loss": sums.total / count,
            "gradient_norm": optax.tree.norm(grads),
            "learning_rate": jnp.asarray(schedule(number - 1)),
            "router_share": sums.router_share / count,
            "router_entropy": sums.router_entropy / count,
        }
        if mesh is not None:  # every process reads them
            metrics = jax.lax.with_sharding_constraint(metrics, replicated(mesh))
        # optax types its result as any kind of tree
        params: Any = optax.apply_updates(state.params, updates)
        return TrainState(params, optimizer_state), metrics

    platform = mesh.devices.flat[0].platform if mesh is not None else jax.default_backend()
    return jax.jit(step, donate_argnums=0, compiler_options=step_options(platform))


def _router_noise(key: jax.Array, shape: tuple[int, ...], L: int) -> jax.Array:
    """N(0, 1) for the logit of a pair's new expert, 0 for the anchor's, [B, L, T, 2]. Half of the
    variance is a record's, half a token's: other owners' experts, which a pair never meets, take
    weight for a whole document or at single tokens.
    """
    (B, T), (of_record, of_token) = shape, jax.random.split(key)
    noise = (
        jax.random.normal(of_record, (B, L, 1, 1)) + jax.random.normal(of_token, (B, L, T, 1))
    ) / 2**0.5
    return jnp.pad(noise, ((0, 0), (0, 0), (0, 0), (1, 0)))
