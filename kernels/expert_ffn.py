"""One SwiGLU expert, for where every expert runs on every token (pair training, router tuning):
least work, no dispatch."""

import jax
from jaxtyping import Array, Float


def swiglu(
    x: Float[Array, "N D"],
    gate: Float[Array, "D F"],
    up: Float[Array, "D F"],
    down: Float[Array, "F D"],
) -> Float[Array, "N D"]:
    """One expert: `(silu(x gate) * (x up)) down`."""
    return (jax.nn.silu(x @ gate) * (x @ up)) @ down
