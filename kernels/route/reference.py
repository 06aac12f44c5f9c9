"""Routing and the dispatch plan in plain XLA: the definition that every other implementation is
tested against.

    p              = softmax(logits) over ALL experts
    (weights, ids) = top-k of p, not renormalised; the lowest index wins ties

The largest logits are taken instead of the largest probabilities: the same experts, but no rounding
of the softmax can tie two of them, so that every implementation chooses alike bit for bit.

The plan sorts slots by expert without a sort: the row of a slot is the number of slots that come
before it,

    row = (slots of smaller experts) + (same expert, earlier tiles) + (same expert, earlier in its
    tile)

three counts, of which the last is a product of a strictly lower triangular matrix of ones with the
tile's one-hot matrix.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

TILE = 64  # slots a tile; the triangular product costs TILE * E multiplications a slot


class Routing(NamedTuple):
    """The `A` experts chosen for each of `N` tokens, and the logsumexp of its router logits (for
    the z-loss)."""

    weights: Float[Array, "N A"]
    ids: Int[Array, "N A"]
    log_z: Float[Array, "N"]


class DispatchPlan(NamedTuple):
    """Where each of the `M = N * A` slots of all tokens goes when rows are grouped by expert, and
    back.

    `M` in `rows` is a slot without a row (its weight is 0); `M` in `slots` is a row without a slot,
    behind the last group.
    """

    sizes: Int[Array, "E"]
    rows: Int[Array, "N A"]
    slots: Int[Array, "M"]


def router_probabilities(
    logits: Float[Array, "N E"], allowed: Bool[Array, " E"] | None = None
) -> tuple[Float[Array, "N E"], Float[Array, " N"]]:
    """Softmax over all experts, excluded ones at 0, and its logsumexp."""
    logits = masked(logits, allowed)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    return jnp.exp(logits - log_z[:, None]), log_z


def dense_weights(routing: Routing, num_experts: int) -> Float[Array, "N E"]:
    """The chosen weights laid out by expert, 0 where an expert was not chosen."""
    return by_expert(routing.weights, routing.ids, num_experts)


def masked(logits: Float[Array, "N E"], allowed: Bool[Array, " E"] | None) -> Float[Array, "N E"]:
    """The logits in float32 with excluded experts at -inf."""
    # float32: probabilities that differ in the third digit decide which expert runs.
    logits = logits.astype(jnp.float32)
    return logits if allowed is None else jnp.where(allowed, logits, -jnp.inf)


def by_expert(
    slots: Float[Array, "N A"], ids: Int[Array, "N A"], num_experts: int
) -> Float[Array, "N E"]:
    """One value for each chosen expert, laid out by expert, 0 elsewhere."""
    chosen = ids[:, :, None] == jnp.arange(num_experts)
    return jnp.sum(jnp.where(chosen, slots[:, :, None], 0.0), axis=1)


def route_forward(logits: Float[Array, "N E"], active: int) -> Routing:
    """Top-`active` of the softmax of `logits`, which are float32 and masked."""
    log_z = jax.nn.logsumexp(logits, axis=-1)
    best, ids = jax.lax.top_k(logits, active)
    return Routing(jnp.exp(best - log_z[:, None]), ids, log_z)


def route_backward(
    logits: Float[Array, "N E"],
    ids: Int[Array, "N A"],
    log_z: Float[Array, " N"],
    dweights: Float[Array, "N A"],
    dlog_z: Float[Array, " N"],
) -> Float[Array, "N E"]:
    """`dlogits = p * (g - sum_i dw_i w_i + dlog_z)`, g being dw laid out by expert. The weights are
    p again: nothing of them is saved."""
    p = jnp.exp(logits - log_z[:, None])
    # `where`, never a product with 0: whatever arrives at a slot of an excluded expert must not
    # leak.
    g = jnp.where(p > 0, by_expert(dweights, ids, logits.shape[1]), 0)
    inner = jnp.sum(p * g, axis=1, keepdims=True)
    return jnp.where(p > 0, p * (g - inner + dlog_z[:, None]), 0)


def dispatch_plan(
    ids: Int[Array, "N A"], chosen: Bool[Array, "N A"], num_experts: int
) -> DispatchPlan:
    """Rows in expert order, in slot order inside an expert: what a stable sort by expert gives."""
    N, A = ids.shape
    M, E = N * A, num_experts
    expert = jnp.where(chosen, ids, E).reshape(M)  # a slot without a row counts for no expert
    tiles = jnp.pad(expert, (0, -M % TILE), constant_values=E).reshape(-1, TILE)
    one_hot = tiles[:, :, None] == jnp.arange(E)
    counts = jnp.sum(one_hot, axis=1, dtype=jnp.int32)
    earlier_tiles = jnp.cumsum(counts, axis=0) - counts
    sizes = jnp.sum(counts, axis=0)
    smaller_experts = jnp.cumsum(sizes) - sizes
    # Ones and zeros, summed in float32: exact in whatever precision a backend multiplies with.
    before = jnp.tril(jnp.ones((TILE, TILE)), -1)
    earlier_in_tile = jnp.einsum("ts,nse->nte", before, one_hot.astype(jnp.float32))
    row = earlier_in_tile.astype(jnp.int32) + (earlier_tiles + smaller_experts)[:, None]
    rows = jnp.sum(jnp.where(one_hot, row, 0), axis=-1).reshape(-1)[:M]
    rows = jnp.where(expert < E, rows, M)
    slots = jnp.full(M, M).at[rows].set(jnp.arange(M), mode="drop", unique_indices=True)
    return DispatchPlan(sizes, rows.reshape(N, A), slots)
