"""Cross entropy with all logits `[N, V]` at once: the definition, and the form for few logits."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def cross_entropy(
    x: Float[Array, "N D"], head: Float[Array, "D V"], targets: Int[Array, "N"]
) -> tuple[Float[Array, "N"], Float[Array, "N"]]:
    """(losses, logsumexps)."""
    logits = jnp.einsum("nd,dv->nv", x, head, preferred_element_type=jnp.float32)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    # A comparison fuses into the passes over the logits. A gather would not, and its gradient is a
    # scatter.
    hit = targets[:, None] == jnp.arange(logits.shape[-1])
    return log_z - jnp.sum(jnp.where(hit, logits, 0), axis=-1), log_z
