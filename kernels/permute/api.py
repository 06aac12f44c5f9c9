"""The public functions: tokens to the rows of their experts and back.

    permute:      out[r]  = x[token of row r]                  0 in a row without a slot
    combine:      y[n]    = sum over slots a of rows[row of (n, a)]
    row_weights:  out[r]  = weights[slot of row r]             0 in a row without a slot

`permute` and `combine` are each other's transpose and gradient; nothing but the plan is saved. No
token is repeated in memory, nothing is scattered, and nothing sorts again: the plan holds both
directions.
"""

import functools

import jax
from jaxtyping import Array, Float

from ..route import DispatchPlan, Implementation
from ..route.api import check
from . import pallas_tpu, reference


def permute(
    x: Float[Array, "N D"], plan: DispatchPlan, *, implementation: Implementation | None = None
) -> Float[Array, "M D"]:
    """Each token once for every slot of it that has a row, in expert order; 0 in unused rows. Its
    gradient sums in float32.

    None is XLA on every platform (see the README's count of bytes); a named implementation is used
    or raises.
    """
    return _permute(x, plan, check(implementation))


def combine(
    rows: Float[Array, "M D"], plan: DispatchPlan, *, implementation: Implementation | None = None
) -> Float[Array, "N D"]:
    """The sum of each token's rows, in float32, rounded once. A row without a slot is never read.
    `implementation` as in `permute`."""
    return _combine(rows, plan, check(implementation))


@jax.custom_vjp
def row_weights(weights: Float[Array, "N A"], plan: DispatchPlan) -> Float[Array, " M"]:
    """The weight of each row's slot, 0 in unused rows. XLA only: M numbers are nothing beside M
    rows."""
    return reference.weights_by_row(weights, plan)


row_weights.defvjp(
    lambda weights, plan: (row_weights(weights, plan), plan),
    lambda plan, dweights: (reference.weights_by_slot(dweights, plan), None),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _permute(
    x: Float[Array, "N D"], plan: DispatchPlan, implementation: Implementation
) -> Float[Array, "M D"]:
    if implementation == "xla":
        return reference.permute(x, plan)
    return pallas_tpu.permute(x, plan, interpret=implementation == "pallas_interpret")


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _combine(
    rows: Float[Array, "M D"], plan: DispatchPlan, implementation: Implementation
) -> Float[Array, "N D"]:
    if implementation == "xla":
        return reference.combine(rows, plan)
    return pallas_tpu.combine(rows, plan, interpret=implementation == "pallas_interpret")


# Each gradient is the other public function, by the same implementation.
_permute.defvjp(
    lambda x, plan, implementation: (_permute(x, plan, implementation), plan),
    lambda implementation, plan, dout: (_combine(dout, plan, implementation), None),
)
_combine.defvjp(
    lambda rows, plan, implementation: (_combine(rows, plan, implementation), plan),
    lambda implementation, plan, dout: (_permute(dout, plan, implementation), None),
)
