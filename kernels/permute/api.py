"""The public functions: tokens into expert order and back.

    permute:                out[i] = x[token of the slot at place i]        0 in an unused place
    combine:                y[n]   = sum over slots a of outputs[place of (n, a)]
    permute_probabilities:  out[i] = p[slot at place i]                     0 in an unused place

`permute` and `combine` are each other's transpose and gradient, so nothing but the plan is saved.
No token is repeated in memory, none is scattered, and nothing is sorted again: the plan holds both
directions. Pallas reads one of them, `places`.
"""

import functools

import jax
from jaxtyping import Array, Float

from .. import Kernels, choice
from ..route import DispatchPlan
from . import pallas_tpu, reference


def permute(
    x: Float[Array, "N D"], plan: DispatchPlan, *, kernels: Kernels = "auto"
) -> Float[Array, "M D"]:
    """Each token once for every slot of it that has a place, in expert order; 0 behind the last.

    Its gradient sums in float32. `kernels` are those of `choice`, but "auto" is XLA on TPU too:
    Pallas moves more bytes there (counted in the README).
    """
    return _permute(x, plan, _moving(kernels))


def combine(
    outputs: Float[Array, "M D"], plan: DispatchPlan, *, kernels: Kernels = "auto"
) -> Float[Array, "N D"]:
    """The sum of the outputs of each token's slots, in float32, rounded once.

    An unused place is never read. `kernels` as in `permute`.
    """
    return _combine(outputs, plan, _moving(kernels))


def permute_probabilities(
    probabilities: Float[Array, "N A"], plan: DispatchPlan, *, kernels: Kernels = "auto"
) -> Float[Array, " M"]:
    """The probability of the slot at each place, 0 in unused ones. `kernels` as in `permute`.

    XLA all the same, as M numbers are nothing beside M tokens: but beside Pallas, which reads no
    `slots`, a scatter by `places`.
    """
    return _permute_probabilities(probabilities, plan, _moving(kernels))


def _moving(kernels: Kernels) -> Kernels:
    return "xla" if kernels == "auto" else kernels


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _permute_probabilities(
    probabilities: Float[Array, "N A"], plan: DispatchPlan, kernels: Kernels
) -> Float[Array, " M"]:
    to_places = reference.gathered if kernels == "xla" else reference.scattered
    return to_places(probabilities, plan)


_permute_probabilities.defvjp(
    lambda probabilities, plan, kernels: (
        _permute_probabilities(probabilities, plan, kernels),
        plan,
    ),
    lambda kernels, plan, dout: (reference.to_slots(dout, plan), None),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _permute(x: Float[Array, "N D"], plan: DispatchPlan, kernels: Kernels) -> Float[Array, "M D"]:
    return choice.run(kernels, reference.permute, pallas_tpu.permute, x, plan)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _combine(
    outputs: Float[Array, "M D"], plan: DispatchPlan, kernels: Kernels
) -> Float[Array, "N D"]:
    return choice.run(kernels, reference.combine, pallas_tpu.combine, outputs, plan)


# Each gradient is the other public function, by the same kernels.
_permute.defvjp(
    lambda x, plan, kernels: (_permute(x, plan, kernels), plan),
    lambda kernels, plan, dout: (_combine(dout, plan, kernels), None),
)
_combine.defvjp(
    lambda outputs, plan, kernels: (_combine(outputs, plan, kernels), plan),
    lambda kernels, plan, dout: (_permute(dout, plan, kernels), None),
)
