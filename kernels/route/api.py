"""The public functions: which experts a token uses, with what probability, and where it goes.

    logits_e = row_e . h + min(bias_e, 0)     (float32; excluded experts at -inf BEFORE the softmax)
    p        = softmax(logits) over ALL experts
    (probabilities, ids) = top-k of p, not renormalised; the lowest index wins ties

Source: FlexOlmo, arXiv 2507.07024, section 3; the order (softmax, then top-k) is upstream's. An
expert is excluded before the softmax, so that the others' probabilities are, up to rounding, those
of a model without it.
"""

import functools

import jax
from jaxtyping import Array, Bool, Float, Int

from .. import Kernels, choice
from . import pallas_tpu, reference
from .reference import DispatchPlan, Routing


def route_topk(
    logits: Float[Array, "N E"],
    active: int,
    allowed: Bool[Array, " E"] | None = None,
    *,
    kernels: Kernels = "auto",
) -> Routing:
    """Chooses `active` experts for each token.

    Differentiable in the logits through the probabilities and `log_z`; logits, ids and `log_z` are
    all that is saved for it. Where fewer than `active` experts are allowed, the excess slots have
    probability 0 and their ids mean nothing. `kernels` are those of `choice`. The compiler does not
    partition Pallas: on more than one device, call this inside `jax.shard_map`, over tokens.
    """
    E = logits.shape[1]
    if not 1 <= active <= E:
        raise ValueError(f"active must be between 1 and the number of experts, {E}; got {active}")
    return _route(reference.masked(logits, allowed), active, kernels)


def dispatch_plan(
    ids: Int[Array, "N A"],
    chosen: Bool[Array, "N A"],
    num_experts: int,
    *,
    kernels: Kernels = "auto",
) -> DispatchPlan:
    """Places for all chosen slots in expert order, as a stable sort by expert would give them.

    They are counted, not sorted. `chosen` (probability > 0) says which slots get a place. `kernels`
    as in `route_topk`. The way back, `slots`, is plain XLA: where nothing reads it, the compiler
    drops it.
    """
    sizes, places = choice.run(
        kernels,
        functools.partial(reference.counted, num_experts=num_experts),
        functools.partial(pallas_tpu.counted, num_experts=num_experts),
        ids,
        chosen,
    )
    return DispatchPlan(sizes, places, reference.inverse(places))


def _run(logits: Float[Array, "N E"], active: int, kernels: Kernels) -> Routing:
    return choice.run(
        kernels,
        functools.partial(reference.route_forward, active=active),
        functools.partial(pallas_tpu.route_forward, active=active),
        logits,
    )


def _forward(logits, active, kernels):
    routing = _run(logits, active, kernels)
    return routing, (logits, routing.ids, routing.log_z)


def _backward(active, kernels, saved, cotangents: Routing):
    backwards = reference.route_backward, pallas_tpu.route_backward
    return (choice.run(kernels, *backwards, *saved, cotangents.probabilities, cotangents.log_z),)


_route = jax.custom_vjp(_run, nondiff_argnums=(1, 2))
_route.defvjp(_forward, _backward)
