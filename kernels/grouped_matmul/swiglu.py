"""What lies between the products, row by row: the weighted SwiGLU and its gradient, in float32."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def weighted(
    gated: Float[Array, "M F"], upped: Float[Array, "M F"], weights: Float[Array, " M"]
) -> Float[Array, "M F"]:
    """`w * silu(gated) * upped`."""
    return weights[:, None] * jax.nn.silu(gated) * upped


def gradient(
    gated: Float[Array, "M F"],
    upped: Float[Array, "M F"],
    weights: Float[Array, " M"],
    dhidden: Float[Array, "M F"],
) -> tuple[Float[Array, "M F"], Float[Array, " M"], Float[Array, "M F"], Float[Array, "M F"]]:
    """`weighted` again, and its gradients in weights, gated and upped, from that of its result."""
    s = jax.nn.sigmoid(gated)
    silu = gated * s
    unweighted = weights[:, None] * dhidden
    dweights = jnp.sum(dhidden * silu * upped, axis=1)
    return (
        weights[:, None] * silu * upped,
        dweights,
        unweighted * upped * (s + silu * (1 - s)),
        unweighted * silu,
    )
