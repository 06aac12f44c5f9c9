"""One SwiGLU expert, for models in which every expert runs on every token.

In pair training and router tuning all experts are active. A loop over them is then the least work:
there is nothing to choose and nothing to dispatch.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from . import names


def swiglu(
    x: Float[Array, "N D"],
    gate: Float[Array, "D F"],
    up: Float[Array, "D F"],
    down: Float[Array, "F D"],
) -> Float[Array, "N D"]:
    """One expert: `(silu(x gate) * (x up)) down`.

    What is between the products is in float32. The products themselves come in the dtype of `x`;
    jax 0.10 rounds them later than jax 0.12 on a CPU.
    """
    products = (checkpoint_name(x @ w, names.FFN) for w in (gate, up))
    gated, upped = (product.astype(jnp.float32) for product in products)
    hidden = (jax.nn.silu(gated) * upped).astype(x.dtype)
    return checkpoint_name(hidden @ down, names.OUTPUTS)
