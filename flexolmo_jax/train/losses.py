"""The training loss: next-token cross entropy, its z-loss, the routers' z-loss and, for joint runs,
load balancing.

Which tokens count is decided by the data (`data.records.loss_targets`): all of a document but its
first token in a record.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from flexolmo_jax.config import OptimConfig
from flexolmo_jax.kernels.cross_entropy import cross_entropy
from flexolmo_jax.model import Output
from flexolmo_jax.runtime import sharding


class Contrast(NamedTuple):
    """Which expert the tokens of each record should be routed to, and how much that counts."""

    expert: Int[Array, " B"]
    weight: Float[Array, " B"]


class LossSums(NamedTuple):
    """Sums over tokens, so that microbatches add up to their batch: divide by the batch's number of
    targets."""

    total: Float[Array, ""]  # what is minimised
    cross_entropy: Float[Array, ""]  # nats
    router_share: Float[Array, "E"]  # weight each expert had, averaged over layers
    router_entropy: Float[Array, ""]  # nats, averaged over layers


def token_losses(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "D V"],
    tokens: Int[Array, "B T"],
    mesh: Mesh | None = None,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """At each position -ln p of the token after it, and the logsumexp of its logits. The last
    position predicts nothing: leave it out."""

    def of_shard(hidden: Array, targets: Array, head: Array) -> tuple[Array, Array]:
        losses, log_z = cross_entropy(
            hidden.reshape(-1, hidden.shape[-1]), head, targets.reshape(-1)
        )
        return losses.reshape(targets.shape), log_z.reshape(targets.shape)

    # The tokens are shifted, not the hidden states: every position keeps its place. Each device
    # goes through its own tokens, so that the head is gathered, and its gradient summed over
    # devices, once and not once a chunk.
    axes = (("batch", None, None), ("batch", None), (None, None))
    run = sharding.on_each_shard(
        mesh, of_shard, axes, (("batch", None), ("batch", None)), batch_only=True
    )
    return run(hidden, jnp.roll(tokens, -1, axis=1), head)


def predicts(targets: Bool[Array, "B T"]) -> Bool[Array, "B T"]:
    """From which tokens are targets to which positions predict one."""
    return jnp.pad(targets[:, 1:], ((0, 0), (0, 1)))


def loss_sums(
    output: Output,
    tokens: Int[Array, "B T"],
    targets: Bool[Array, "B T"],
    optim: OptimConfig,
    contrast: Contrast | None = None,
    mesh: Mesh | None = None,
) -> LossSums:
    """The sums over one batch (or microbatch)."""
    mask = predicts(targets)
    losses, log_z = token_losses(output.hidden, output.head, tokens, mesh)
    cross_entropy = jnp.sum(losses * mask)
    total = cross_entropy + optim.z_loss * jnp.sum(jnp.square(log_z) * mask)
    router = output.router
    E = router.weights.shape[-1]
    if optim.router_z_loss and E > 1:
        total += optim.router_z_loss * jnp.sum(jnp.mean(jnp.square(router.log_z), axis=0) * mask)
    share = jnp.einsum("lbte,bt->le", router.weights, mask.astype(jnp.float32))
    if optim.load_balance and E > 1:
        # Switch Transformer's: E * sum of (share of the choices that e got) * (share of the
        # weight), 1 when balanced.
        chosen = jnp.einsum(
            "lbte,bt->le", (router.weights > 0).astype(jnp.float32), mask.astype(jnp.float32)
        )
        choices, weight = (
            s / jnp.maximum(jnp.sum(s, axis=-1, keepdims=True), 1e-9) for s in (chosen, share)
        )
        total += (
            optim.load_balance * E * jnp.mean(jnp.sum(choices * weight, axis=-1)) * jnp.sum(mask)
        )
    if contrast is not None:
        chosen = jnp.take_along_axis(router.weights, contrast.expert[None, :, None, None], axis=-1)[
            ..., 0
        ]
        # the weights are all of the probabilities: in a pair every expert is active
        surprise = -jnp.log(jnp.maximum(chosen, 1e-20))
        total += jnp.sum(jnp.mean(surprise, axis=0) * contrast.weight[:, None] * mask)
    return LossSums(
        total,
        cross_entropy,
        jnp.mean(share, axis=0),
        jnp.sum(jnp.mean(router.entropy, axis=0) * mask),
    )
