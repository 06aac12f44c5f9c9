"""Cross entropy written down: all logits at once, `[N, V]` in float32."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def cross_entropy(
    x: Float[Array, "N D"], head: Float[Array, "D V"], targets: Int[Array, "N"]
) -> tuple[Float[Array, "N"], Float[Array, "N"]]:
    """(losses, logsumexps)."""
    logits = jnp.einsum("nd,dv->nv", x, head, preferred_element_type=jnp.float32)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    # A comparison fuses into the pass over the logits, forward and backward, where a gather's
    # gradient is a scatter.
    hit = targets[:, None] == jnp.arange(logits.shape[-1])
    return log_z - jnp.sum(jnp.where(hit, logits, 0), axis=-1), log_z
