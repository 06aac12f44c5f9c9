"""AdamW with linear warm-up, a cosine and clipping by global norm: upstream's optimiser and
schedule."""

import optax

from flexolmo_jax.config import OptimConfig
from flexolmo_jax.model.tree import flatten, unflatten

from .spikes import guarded


def learning_rate(optim: OptimConfig, steps: int) -> optax.Schedule:
    """Warm-up from 0, then a cosine to `final_fraction` at `schedule_steps` (a run may stop before
    its end)."""
    end = optim.schedule_steps or steps
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=optim.lr,
        warmup_steps=min(optim.warmup, end - 1),
        decay_steps=max(end, 2),
        end_value=optim.lr * optim.final_fraction,
    )


def make_optimizer(
    optim: OptimConfig, steps: int, skip_spikes: float = 0.0
) -> optax.GradientTransformation:
    """Initialise it with the trained parameters alone: the frozen ones need no state.

    `skip_spikes`: as in the config of `train`; above 0 its state holds what spikes are told by.
    """
    adamw = optax.adamw(
        learning_rate(optim, steps),
        b1=optim.beta1,
        b2=optim.beta2,
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        mask=_decayed,
    )
    if optim.router_lr:
        scaled = optax.masked(optax.scale(optim.router_lr / optim.lr), _is_router)
        adamw = optax.chain(adamw, scaled)
    clipped = optax.chain(optax.clip_by_global_norm(optim.clip), adamw)
    return guarded(clipped) if skip_spikes else clipped


def _decayed(params: dict) -> dict:
    """Upstream decays everything but the embedding."""
    return unflatten({path: not path.endswith("embedding") for path in flatten(params)})


def _is_router(params: dict) -> dict:
    return unflatten({path: path.endswith(("/row", "/bias")) for path in flatten(params)})
