"""The public functions: which experts a token uses, with what probability, and where it goes.

    logits_e = row_e . h + min(bias_e, 0)     (float32; excluded experts at -inf BEFORE the softmax)
    p        = softmax(logits) over ALL experts
    (probabilities, ids) = top-k of p, not renormalised; the lowest index wins ties

Source: FlexOlmo, arXiv 2507.07024, section 3; the order (softmax, then top-k) is upstream's. An
expert is excluded before the softmax, so that the others' probabilities are, up to rounding, those
of a model without it.
"""

import functools
from typing import Literal

import jax
from jaxtyping import Array, Bool, Float, Int

from . import pallas_tpu, reference
from .reference import DispatchPlan, Routing

Implementation = Literal["xla", "pallas", "pallas_interpret"]


def route_topk(
    logits: Float[Array, "N E"],
    active: int,
    allowed: Bool[Array, " E"] | None = None,
    *,
    implementation: Implementation | None = None,
) -> Routing:
    """Chooses `active` experts for each token.

    Differentiable in the logits through the probabilities and `log_z`; logits, ids and `log_z` are
    all that is saved for it. Where fewer than `active` experts are allowed, the excess slots have
    probability 0 and their ids mean nothing. None is XLA on every platform: on TPU, Pallas saves a
    few MB, microseconds beside the experts' milliseconds (counted in the README). A named
    implementation is used or raises.
    """
    E = logits.shape[1]
    if not 1 <= active <= E:
        raise ValueError(f"active must be between 1 and the number of experts, {E}; got {active}")
    return _route(reference.masked(logits, allowed), active, resolved(implementation))


def dispatch_plan(
    ids: Int[Array, "N A"],
    chosen: Bool[Array, "N A"],
    num_experts: int,
    *,
    implementation: Implementation | None = None,
) -> DispatchPlan:
    """Places for all chosen slots in expert order, as a stable sort by expert would give them.

    They are counted, not sorted. `chosen` (probability > 0) says which slots get a place.
    `implementation` as in `route_topk`.
    """
    implementation = resolved(implementation)
    if implementation == "xla":
        return reference.dispatch_plan(ids, chosen, num_experts)
    return pallas_tpu.dispatch_plan(
        ids, chosen, num_experts, interpret=implementation == "pallas_interpret"
    )


def resolved(implementation: str | None) -> Implementation:
    """The implementation to use. Raises ValueError for an unknown name."""
    match implementation:
        case None:
            return "xla"
        case "xla" | "pallas" | "pallas_interpret":
            return implementation
    raise ValueError(
        "implementation must be None, 'xla', 'pallas' or 'pallas_interpret'; got"
        f" {implementation!r}"
    )


def _run(logits: Float[Array, "N E"], active: int, implementation: Implementation) -> Routing:
    if implementation == "xla":
        return reference.route_forward(logits, active)
    return pallas_tpu.route_forward(logits, active, interpret=implementation == "pallas_interpret")


def _forward(logits, active, implementation):
    routing = _run(logits, active, implementation)
    return routing, (logits, routing.ids, routing.log_z)


def _backward(active, implementation, saved, cotangents: Routing):
    logits, ids, log_z = saved
    if implementation == "xla":
        backward = reference.route_backward
    else:
        backward = functools.partial(
            pallas_tpu.route_backward, interpret=implementation == "pallas_interpret"
        )
    return (backward(logits, ids, log_z, cotangents.probabilities, cotangents.log_z),)


_route = jax.custom_vjp(_run, nondiff_argnums=(1, 2))
_route.defvjp(_forward, _backward)
