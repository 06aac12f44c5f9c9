"""Moving tokens to the rows of their experts and back, in plain XLA: gathers only.

    permute:      out[r] = x[slots[r] // A]                 0 in a row without a slot
    combine:      y[n]   = sum_a rows[plan.rows[n, a]]      a slot without a row adds nothing

`slots` and `rows` are each other's inverse, so each function is the other's transpose: neither
gradient needs a scatter.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from ..route import DispatchPlan


def permute(x: Float[Array, "N D"], plan: DispatchPlan) -> Float[Array, "M D"]:
    """Each token's row, once for every slot of it that has a row."""
    # A row without a slot holds M, and M // A = N: a token of zeros. On TPU, filling after the
    # gather would pass over all M rows again.
    x = jnp.pad(x, ((0, 1), (0, 0)))
    return x.at[plan.slots // plan.rows.shape[1]].get(mode="promise_in_bounds")


def combine(rows: Float[Array, "M D"], plan: DispatchPlan) -> Float[Array, "N D"]:
    """Sums a token's rows, slot by slot."""
    # summed in float32, rounded once
    y = jnp.zeros((plan.rows.shape[0], rows.shape[1]), jnp.float32)
    for a in range(plan.rows.shape[1]):
        y += jnp.take(rows, plan.rows[:, a], axis=0, mode="fill", fill_value=0).astype(jnp.float32)
    return y.astype(rows.dtype)


def weights_by_row(weights: Float[Array, "N A"], plan: DispatchPlan) -> Float[Array, " M"]:
    """The weight of each row's slot, 0 in a row without one."""
    return jnp.take(weights.reshape(-1), plan.slots, mode="fill", fill_value=0)


def weights_by_slot(weights: Float[Array, " M"], plan: DispatchPlan) -> Float[Array, "N A"]:
    """The inverse of `weights_by_row`: the weight of each slot's row, 0 in a slot without one."""
    return jnp.take(weights, plan.rows, mode="fill", fill_value=0)
