"""A sparse mixture of SwiGLU experts, `y_n = sum_a weights[n, a] * FFN_{ids[n, a]}(x_n)`, without
dropping a token.

    plan -> permute -> grouped SwiGLU, each row times its weight before the second product ->
    combine

It costs `A` experts a token whatever `E` is, saves one row of inputs and two of pre-activations for
each (token, slot) and sorts nothing. Where all or nearly all experts are active, running every
expert on every token (`expert_ffn.swiglu`) is less work.
"""

from jaxtyping import Array, Float

from .grouped_matmul import expert_ffn
from .permute import combine, permute, row_weights
from .route import Routing, dispatch_plan


def sparse_experts(
    x: Float[Array, "N D"],
    routing: Routing,
    gate: Float[Array, "E D F"],
    up: Float[Array, "E D F"],
    down: Float[Array, "E F D"],
) -> Float[Array, "N D"]:
    """Runs only the chosen experts. An expert that is chosen nowhere is never read, so nothing in
    its weights can matter.

    A slot of weight 0 (an excluded expert in an excess slot) gets no row.
    """
    plan = dispatch_plan(routing.ids, routing.weights > 0, gate.shape[0])
    rows = expert_ffn(
        permute(x, plan), row_weights(routing.weights, plan), plan.sizes, gate, up, down
    )
    return combine(rows, plan)
