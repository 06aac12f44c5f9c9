"""AdamW with linear warm-up, a cosine and clipping by global norm: upstream's optimiser and
schedule."""

from typing import Any

import jax
import optax

from flexolmo_jax.config import OptimConfig
from flexolmo_jax.model import Params
from flexolmo_jax.model.tree import flatten, unflatten


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


def make_optimizer(optim: OptimConfig, steps: int) -> optax.GradientTransformation:
    """Initialise it with the trained parameters alone: the frozen ones need no state."""
    return optax.chain(
        optax.clip_by_global_norm(optim.clip),
        optax.adamw(
            learning_rate(optim, steps),
            b1=optim.beta1,
            b2=optim.beta2,
            eps=optim.eps,
            weight_decay=optim.weight_decay,
            mask=_decayed,
        ),
    )


def abstract_state(
    optimizer: optax.GradientTransformation, trained: Params, replicated: jax.sharding.Sharding
) -> Any:
    """The optimiser's state as ShapeDtypeStructs: moments have the sharding of their parameters
    (arrays, or ShapeDtypeStructs)."""
    state = jax.eval_shape(optimizer.init, trained)
    shardings = optax.tree_utils.tree_map_params(
        optimizer,
        lambda _, parameter: parameter.sharding,
        state,
        trained,
        transform_non_params=lambda _: replicated,
    )
    return jax.tree.map(
        lambda a, sharding: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding),
        state,
        shardings,
    )


def _decayed(params: dict) -> dict:
    """Upstream decays everything but the embedding."""
    return unflatten({path: not path.endswith("embedding") for path in flatten(params)})
