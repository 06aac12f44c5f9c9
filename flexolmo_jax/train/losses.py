"""The training loss: next-token cross entropy and its z-loss; for pairs the routers' z-loss and
contrast; for joint runs load balancing.

Which tokens count is decided by the data (`data.records.loss_targets`): all of a document but its
first token in a record, or of conversations what the assistant says.
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
    """Which expert the tokens of each record belong to, and how much that counts in the loss."""

    expert: Int[Array, " B"]
    weight: Float[Array, " B"]


class LossSums(NamedTuple):
    """Sums over tokens, so that microbatches add up to their batch. Divide them by the number of
    targets in the batch."""

    total: Float[Array, ""]  # what is minimised
    cross_entropy: Float[Array, ""]  # nats
    router_share: Float[Array, "E"]  # each expert's probability if chosen, averaged over layers
    router_entropy: Float[Array, ""]  # nats, averaged over layers


def token_losses(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "D V"],
    tokens: Int[Array, "B T"],
    mesh: Mesh | None = None,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """At each position -ln p of the token after it, and the logsumexp of its logits. Leave out the
    last position: it predicts nothing."""

    def of_shard(hidden: Array, targets: Array, head: Array) -> tuple[Array, Array]:
        losses, log_z = cross_entropy(
            hidden.reshape(-1, hidden.shape[-1]), head, targets.reshape(-1)
        )
        return losses.reshape(targets.shape), log_z.reshape(targets.shape)

    # The tokens are shifted, not the hidden states, so that no position moves to another device.
    # Each device goes through its own tokens: the head is gathered, and its gradient summed over
    # devices, once and not once a chunk.
    axes = (("batch", None, None), ("batch", None), (None, None))
    run = sharding.on_each_shard(
        mesh, of_shard, axes, (("batch", None), ("batch", None)), batch_only=True
    )
    return run(hidden, jnp.roll(tokens, -1, axis=1), head)


def predicts(targets: Bool[Array, "B T"]) -> Bool[Array, "B T"]:
    """Which positions predict a target: those before one."""
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
    E = router.probabilities.shape[-1]
    if optim.router_z_loss and E > 1:
        total += optim.router_z_loss * jnp.sum(jnp.mean(jnp.square(router.log_z), axis=0) * mask)
    share = jnp.einsum("lbte,bt->le", router.probabilities, mask.astype(jnp.float32))
    if optim.load_balance and E > 1:
        # Switch Transformer's (arXiv 2101.03961, section 2.2): times E it is 1 when balanced.
        imbalance = _imbalance(router.probabilities, share, mask)
        total += optim.load_balance * E * imbalance * jnp.sum(mask)
    if contrast is not None:
        total += _surprise(router.probabilities, contrast, mask)
    return LossSums(
        total,
        cross_entropy,
        jnp.mean(share, axis=0),
        jnp.sum(jnp.mean(router.entropy, axis=0) * mask),
    )


def _imbalance(
    probabilities: Float[Array, "L B T E"], share: Float[Array, "L E"], mask: Bool[Array, "B T"]
) -> Float[Array, ""]:
    """Sum over experts of (its share of the choices) * (its share of the probability): from 1 / E
    when balanced to 1 when one expert takes all."""
    is_chosen = (probabilities > 0).astype(jnp.float32)
    chosen = jnp.einsum("lbte,bt->le", is_chosen, mask.astype(jnp.float32))

    def shares(sums: Float[Array, "L E"]) -> Float[Array, "L E"]:
        return sums / jnp.maximum(jnp.sum(sums, axis=-1, keepdims=True), 1e-9)

    return jnp.mean(jnp.sum(shares(chosen) * shares(share), axis=-1))


def _surprise(
    probabilities: Float[Array, "L B T E"], contrast: Contrast, mask: Bool[Array, "B T"]
) -> Float[Array, ""]:
    """-ln p of the expert that a token belongs to, averaged over the routers: the owner's text
    belongs to the new expert, public text to the anchor's.

    The paper trains a pair on the owner's text alone. A router that never sees public text learns
    to choose the new expert always, and after the merge experts drown each other. Public text, this
    term and router noise together make a merge 12.2 % better (docs/reproducing.md).
    """
    expert = contrast.expert[None, :, None, None]
    # In a pair both experts are active, so that these are all of the probabilities.
    p = jnp.take_along_axis(probabilities, expert, axis=-1)[..., 0]
    surprise = -jnp.log(jnp.maximum(p, 1e-20))
    return jnp.sum(jnp.mean(surprise, axis=0) * contrast.weight[:, None] * mask)
