"""The public functions: tokens into expert order and back.

    permute:                out[i] = x[token of the slot at place i]        0 in an unused place
    combine:                y[n]   = sum over slots a of outputs[place of (n, a)]
    permute_probabilities:  out[i] = p[slot at place i]                     0 in an unused place

`permute` and `combine` are each other's transpose and gradient, so nothing but the plan is saved.
No token is repeated in memory, nothing is scattered, and nothing is sorted again: the plan holds
both directions.
"""

import functools

import jax
from jaxtyping import Array, Float

from ..route import DispatchPlan, Implementation
from ..route.api import resolved
from . import pallas_tpu, reference


def permute(
    x: Float[Array, "N D"], plan: DispatchPlan, *, implementation: Implementation | None = None
) -> Float[Array, "M D"]:
    """Each token once for every slot of it that has a place, in expert order; 0 behind the last.

    Its gradient sums in float32. None is XLA on every platform: on TPU, Pallas moves more bytes
    (counted in the README). A named implementation is used or raises.
    """
    return _permute(x, plan, resolved(implementation))


def combine(
    outputs: Float[Array, "M D"],
    plan: DispatchPlan,
    *,
    implementation: Implementation | None = None,
) -> Float[Array, "N D"]:
    """The sum of the outputs of each token's slots, in float32, rounded once.

    An unused place is never read. `implementation` as in `permute`.
    """
    return _combine(outputs, plan, resolved(implementation))


@jax.custom_vjp
def permute_probabilities(
    probabilities: Float[Array, "N A"], plan: DispatchPlan
) -> Float[Array, " M"]:
    """The probability of the slot at each place, 0 in unused ones.

    XLA only: M numbers are nothing beside M tokens.
    """
    return reference.to_places(probabilities, plan)


permute_probabilities.defvjp(
    lambda probabilities, plan: (permute_probabilities(probabilities, plan), plan),
    lambda plan, dout: (reference.to_slots(dout, plan), None),
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
    outputs: Float[Array, "M D"], plan: DispatchPlan, implementation: Implementation
) -> Float[Array, "N D"]:
    if implementation == "xla":
        return reference.combine(outputs, plan)
    return pallas_tpu.combine(outputs, plan, interpret=implementation == "pallas_interpret")


# Each gradient is the other public function, by the same implementation.
_permute.defvjp(
    lambda x, plan, implementation: (_permute(x, plan, implementation), plan),
    lambda implementation, plan, dout: (_combine(dout, plan, implementation), None),
)
_combine.defvjp(
    lambda outputs, plan, implementation: (_combine(outputs, plan, implementation), plan),
    lambda implementation, plan, dout: (_permute(dout, plan, implementation), None),
)
