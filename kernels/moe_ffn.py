"""A sparse mixture of SwiGLU experts: each token runs only the `A` experts chosen for it.

    y_n = sum over slots a of p[n, a] * FFN_{ids[n, a]}(x_n)

A slot is one of a token's `A` choices. No token is dropped, however many choose the same expert:

    plan -> permute -> grouped SwiGLU, times p before its second product -> combine

This costs `A` experts a token whatever `E` is, and sorts nothing. The backward pass needs the input
and two pre-activations of every slot. Where all or nearly all experts are active, running every
expert on every token (`expert_ffn.swiglu`) is less work.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from . import Kernels
from .grouped_matmul import expert_ffn
from .permute import combine, permute, permute_probabilities
from .route import Routing, dispatch_plan


def sparse_experts(  # noqa: PLR0913 - a layer of a model
    x: Float[Array, "N D"],
    routing: Routing,
    gate: Float[Array, "*L E D F"],
    up: Float[Array, "*L E D F"],
    down: Float[Array, "*L E F D"],
    layer: Int[Array, ""] | int | None = None,
    *,
    kernels: Kernels = "auto",
) -> Float[Array, "N D"]:
    """Runs the chosen experts. One that no token chose is never read: NaN in it reaches nothing.

    With `layer` the matrices are those of all layers, and no other layer is read either.
    A slot of probability 0 (an excluded expert in an excess slot) is not dispatched. `kernels` are
    those of plan and permutation, as in `choice`; the grouped products are the platform's.
    """
    plan = dispatch_plan(routing.ids, routing.probabilities > 0, gate.shape[-3], kernels=kernels)
    tokens = permute(x, plan, kernels=kernels)
    probabilities = permute_probabilities(routing.probabilities, plan, kernels=kernels)
    sizes, implementation = plan.sizes, None
    if layer is not None:  # experts of other layers are groups without a token
        L, E = gate.shape[:2]
        sizes = jax.lax.dynamic_update_slice(jnp.zeros(L * E, sizes.dtype), sizes, (layer * E,))
        gate, up, down = (m.reshape(L * E, *m.shape[-2:]) for m in (gate, up, down))
        implementation = _reading_in_place()
    outputs = expert_ffn(
        tokens, probabilities, sizes, gate, up, down, implementation=implementation
    )
    return combine(outputs, plan, kernels=kernels)


def _reading_in_place() -> Literal["megablox"] | None:
    """The grouped products that read the matrices of all layers as they lie.

    On TPU7x `ragged_dot` wants them in tiles of 16 rows, which no argument of a program has: it
    would copy every expert of every layer.
    """
    on_tpu7x = pltpu.is_tpu_device() and pltpu.get_tpu_info().generation >= 7
    return "megablox" if on_tpu7x else None
