"""The public functions: tokens into expert order and back.

    permute:                out[i] = x[token of the slot at place i]        0 in an unused place
    combine:                y[n]   = sum over slots a of outputs[place of (n, a)]
    permute_probabilities:  out[i] = p[slot at place i]                     0 in an unused place

`permute` and `combine` are each other's transpose and gradient, so nothing but the plan is saved.
No token is repeated in memory, none is scattered, and nothing is sorted again: the plan holds both
directions.
"""

import functools

import jax
from jaxtyping import Array, Float

from .. import Kernels, choice
from ..route import DispatchPlan
from . import pallas_tpu, reference, sparse_core


def permute(
    x: Float[Array, "N D"], plan: DispatchPlan, *, kernels: Kernels = "auto"
) -> Float[Array, "M D"]:
    """Each token once for every slot of it that has a place, in expert order; 0 behind the last.

    Its gradient sums in float32. `kernels` are those of `choice`, but on a TPU without SparseCores
    "auto" is XLA: Pallas moves more bytes there (counted in the README).
    """
    return _permute(x, plan, kernels)


def combine(
    outputs: Float[Array, "M D"], plan: DispatchPlan, *, kernels: Kernels = "auto"
) -> Float[Array, "N D"]:
    """The sum of the outputs of each token's slots, in float32, rounded once.

    An unused place is never read. `kernels` as in `permute`.
    """
    return _combine(outputs, plan, kernels)


def permute_probabilities(
    probabilities: Float[Array, "N A"], plan: DispatchPlan, *, kernels: Kernels = "auto"
) -> Float[Array, " M"]:
    """The probability of the slot at each place, 0 in unused ones. `kernels` as in `permute`.

    XLA all the same, as M numbers are nothing beside M tokens. With "pallas", whose kernels may not
    read `slots`, a scatter by `places`.
    """
    return _permute_probabilities(probabilities, plan, kernels)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _permute_probabilities(
    probabilities: Float[Array, "N A"], plan: DispatchPlan, kernels: Kernels
) -> Float[Array, " M"]:
    to_places = reference.scattered if kernels == "pallas" else reference.gathered
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
    own = sparse_core.for_sums(x, active=1, sums=plan.slots.size)
    by_sparse_core = own and functools.partial(sparse_core.permute, own=own)
    return _run(kernels, reference.permute, by_sparse_core, pallas_tpu.permute, x, plan)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _combine(
    outputs: Float[Array, "M D"], plan: DispatchPlan, kernels: Kernels
) -> Float[Array, "N D"]:
    tokens, active = plan.places.shape
    own = sparse_core.for_sums(outputs, active, sums=tokens)
    by_sparse_core = own and functools.partial(sparse_core.combine, own=own)
    return _run(kernels, reference.combine, by_sparse_core, pallas_tpu.combine, outputs, plan)


def _run(kernels, xla, by_sparse_core, by_tensor_core, *args):
    """By the SparseCores where these can; "auto" knows no other Pallas."""

    def pallas(*args, interpret: bool):
        if by_sparse_core and not interpret:
            return by_sparse_core(*args)
        return by_tensor_core(*args, interpret=interpret)

    auto = "auto" if by_sparse_core else "xla"
    return choice.run(auto if kernels == "auto" else kernels, xla, pallas, *args)


# Each gradient is the other public function, by the same kernels.
_permute.defvjp(
    lambda x, plan, kernels: (_permute(x, plan, kernels), plan),
    lambda kernels, plan, dout: (_combine(dout, plan, kernels), None),
)
_combine.defvjp(
    lambda outputs, plan, kernels: (_combine(outputs, plan, kernels), plan),
    lambda kernels, plan, dout: (_permute(dout, plan, kernels), None),
)
