"""What happens between the products: SwiGLU times a probability, and its gradient, in float32."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def scaled(
    gated: Float[Array, "M F"], upped: Float[Array, "M F"], probabilities: Float[Array, " M"]
) -> Float[Array, "M F"]:
    """`p * silu(gated) * upped`."""
    return probabilities[:, None] * jax.nn.silu(gated) * upped


def gradient(
    gated: Float[Array, "M F"],
    upped: Float[Array, "M F"],
    probabilities: Float[Array, " M"],
    dhidden: Float[Array, "M F"],
) -> tuple[Float[Array, "M F"], Float[Array, " M"], Float[Array, "M F"], Float[Array, "M F"]]:
    """`scaled` again, and its gradients in probabilities, gated and upped."""
    s = jax.nn.sigmoid(gated)
    silu = gated * s
    dunscaled = probabilities[:, None] * dhidden
    dprobabilities = jnp.sum(dhidden * silu * upped, axis=1)
    hidden = probabilities[:, None] * silu * upped
    dgated = dunscaled * upped * (s + silu * (1 - s))
    return hidden, dprobabilities, dgated, dunscaled * silu
