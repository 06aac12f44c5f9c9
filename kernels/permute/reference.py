"""Tokens into expert order and back, in plain XLA: tokens are gathered only.

    permute:      out[i] = x[slots[i] // A]                 0 in an unused place
    combine:      y[n]   = sum_a outputs[places[n, a]]      nothing for a slot without a place

The plan's `slots` and `places` are each other's inverse, so each function is the other's transpose
and neither gradient needs a scatter.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from ..route import DispatchPlan
from ..route.reference import to_places


def permute(x: Float[Array, "N D"], plan: DispatchPlan) -> Float[Array, "M D"]:
    """The token of the slot at each place."""
    # An unused place has slot M, and M // A = N: a token of zeros. On TPU, filling after the gather
    # would pass over all M tokens again.
    x = jnp.pad(x, ((0, 1), (0, 0)))
    return x.at[plan.slots // plan.places.shape[1]].get(mode="promise_in_bounds")


def combine(outputs: Float[Array, "M D"], plan: DispatchPlan) -> Float[Array, "N D"]:
    """Sums the outputs of a token's slots, one slot after the other."""
    # In float32, rounded once.
    y = jnp.zeros((plan.places.shape[0], outputs.shape[1]), jnp.float32)
    for a in range(plan.places.shape[1]):
        output = jnp.take(outputs, plan.places[:, a], axis=0, mode="fill", fill_value=0)
        y += output.astype(jnp.float32)
    return y.astype(outputs.dtype)


def gathered(values: Float[Array, "N A"], plan: DispatchPlan) -> Float[Array, " M"]:
    """One number for each slot, in expert order; 0 in an unused place."""
    return jnp.take(values.reshape(-1), plan.slots, mode="fill", fill_value=0)


def scattered(values: Float[Array, "N A"], plan: DispatchPlan) -> Float[Array, " M"]:
    """`gathered` without the plan's `slots`."""
    return to_places(values, plan.places)


def to_slots(values: Float[Array, " M"], plan: DispatchPlan) -> Float[Array, "N A"]:
    """The inverse of `gathered`; 0 for a slot without a place."""
    return jnp.take(values, plan.places, mode="fill", fill_value=0)
