"""Steps whose loss or gradient norm is far above that of the steps before are not applied.

As OLMo-core's SkipStepOptimizer: far is more standard deviations above the mean of the last WINDOW
steps than `train.skip_spikes` says. The window lies in the optimiser's state, so that a run that
resumes decides the same, and the decision is part of the compiled step: nothing waits for it.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from .state import TrainState

WINDOW = 128  # steps
FEWEST = 64  # steps in the window before any is skipped
FLAT = 1e-6  # of the mean, at least: the deviation of steps that are all alike


class Window(NamedTuple):
    """The last steps, skipped ones too: a level that stays is no spike for long. What is not finite
    is left out."""

    losses: Float[Array, " W"]
    norms: Float[Array, " W"]
    seen: Int[Array, ""]  # steps that were ever in it
    skipped: Int[Array, ""]  # steps of the run that were not applied


class Guarded(NamedTuple):
    """The state of an optimiser whose spikes are skipped."""

    optimizer: Any
    window: Window


def guarded(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """The same optimiser with a window in its state, which `without_spike` reads and moves on."""

    def init(params: Any) -> Guarded:
        values, zero = jnp.zeros(WINDOW, jnp.float32), jnp.zeros((), jnp.int32)
        return Guarded(optimizer.init(params), Window(values, values, zero, zero))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Guarded]:
        updates, inner = optimizer.update(updates, state.optimizer, params)
        return updates, state._replace(optimizer=inner)

    return optax.GradientTransformation(init, update)


def without_spike(
    sigmas: float, before: TrainState, after: TrainState, metrics: dict[str, Array]
) -> tuple[TrainState, dict[str, Array]]:
    """`after`; or, where the step is a spike, `before` with the schedule's count of `after`.

    Returns the metrics with "spike" (of this step) and "skipped" (steps of the run until now).
    """
    window, loss, norm = before.optimizer.window, metrics["loss"], metrics["gradient_norm"]
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    is_far = _is_far(loss, window.losses, window.seen, sigmas)
    is_far |= _is_far(norm, window.norms, window.seen, sigmas)
    spike = (window.seen >= FEWEST) & (is_far | ~finite)

    def chosen(old: Any, new: Any) -> Any:
        if _is_schedule(new):  # the rate is that of the step's number
            return new
        return jnp.where(spike, old, new)

    kept = jax.tree.map(chosen, before, after, is_leaf=_is_schedule)
    place = jnp.where(finite, window.seen % WINDOW, WINDOW)  # WINDOW: nowhere
    moved = Window(
        window.losses.at[place].set(loss, mode="drop"),
        window.norms.at[place].set(norm, mode="drop"),
        window.seen + finite,
        window.skipped + spike,
    )
    state = kept._replace(optimizer=kept.optimizer._replace(window=moved))
    return state, metrics | {"spike": spike, "skipped": moved.skipped}


def _is_far(
    value: Float[Array, ""], values: Float[Array, " W"], seen: Int[Array, ""], sigmas: float
) -> Bool[Array, ""]:
    is_there = jnp.arange(WINDOW) < seen
    mean = jnp.mean(values, where=is_there)
    deviation = jnp.std(values, where=is_there, ddof=1)
    return value > mean + sigmas * jnp.maximum(deviation, FLAT * jnp.abs(mean))


def _is_schedule(state: Any) -> bool:
    return isinstance(state, optax.ScaleByScheduleState)
