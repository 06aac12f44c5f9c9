"""Top-k routing: which experts a token uses and with what weight.

    logits = rows . h + min(bias, 0)          (float32; excluded experts at -inf BEFORE the softmax)
    p      = softmax(logits) over ALL experts
    (weights, ids) = top-k of p, not renormalised; the lowest index wins ties

Source: FlexOlmo, arXiv 2507.07024, section 3; the order (softmax, then top-k) is upstream's.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class Routing(NamedTuple):
    """The `A` experts chosen for each of `N` tokens, and the logsumexp of its router logits (for the z-loss)."""

    weights: Float[Array, "N A"]
    ids: Int[Array, "N A"]
    log_z: Float[Array, "N"]


def router_probabilities(
    logits: Float[Array, "N E"], allowed: Bool[Array, " E"] | None = None
) -> tuple[Float[Array, "N E"], Float[Array, " N"]]:
    """Softmax over all experts, excluded ones at 0, and its logsumexp."""
    # float32: probabilities that differ in the third digit decide which expert runs.
    logits = logits.astype(jnp.float32)
    if allowed is not None:
        logits = jnp.where(allowed, logits, -jnp.inf)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    return jnp.exp(logits - log_z[:, None]), log_z


def route_topk(logits: Float[Array, "N E"], active: int, allowed: Bool[Array, " E"] | None = None) -> Routing:
    """Chooses `active` experts for each token.

    Where fewer than `active` experts are allowed, the excess slots have weight 0; their ids mean nothing.
    """
    probabilities, log_z = router_probabilities(logits, allowed)
    return Routing(*jax.lax.top_k(probabilities, active), log_z)


def dense_weights(routing: Routing, num_experts: int) -> Float[Array, "N E"]:
    """The chosen weights laid out by expert, 0 where an expert was not chosen."""
    chosen = routing.ids[:, :, None] == jnp.arange(num_experts)
    return jnp.sum(jnp.where(chosen, routing.weights[:, :, None], 0.0), axis=1)
