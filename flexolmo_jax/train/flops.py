"""Floating-point operations of a step, counted from shapes: a product of [m, k] and [k, n] has
2 m k n.

Only matrix products count: of the layers, of attention (causal: half of the square) and of the
logits. Norms, softmax and rotations add a few percent.
"""

from typing import NamedTuple

from flexolmo_jax.config import ModelConfig, RunConfig
from flexolmo_jax.kernels.names import ATTENTION, FFN, OUTPUTS, PROJECTIONS
from flexolmo_jax.model.rematerialisation import KEPT


class Flops(NamedTuple):
    """Of one step over all devices."""

    # the forward pass, gradients of activations and gradients of trained weights
    model: float
    hardware: float  # these, and what `train.remat` computes again


def forward_flops(model: ModelConfig, experts: int, context: float) -> tuple[float, float, float]:
    """(attention, experts, head) of one token, which attends to `context` tokens on average and
    runs through this many experts."""
    L, D, C, H, K = model.n_layers, model.d_model, model.head_size, model.n_heads, model.n_kv_heads
    projections = 2 * D * C * (2 * H + 2 * K)  # q and o, k and v
    return (
        L * projections + scores_flops(model, context),
        L * experts * 2 * 3 * D * model.d_ffn,
        2 * D * model.vocab_size,
    )


def scores_flops(model: ModelConfig, context: float) -> float:
    """q k and p v of one token in all layers. One with a window attends to that at most."""
    seen = (
        min(context, model.window) if model.has_window(layer) else context
        for layer in range(model.n_layers)
    )
    return 2 * 2 * sum(seen) * model.head_size * model.n_heads


def running_experts(run: RunConfig, model: ModelConfig) -> int:
    """How many experts a token runs through in a training step."""
    return {"pair": 2, "router": model.n_experts}.get(run.run, model.n_active)


def step_flops(run: RunConfig, model: ModelConfig) -> Flops:
    """Of a training step. Every kind of run takes gradients of activations; the kind decides of
    which weights."""
    T = run.data.seq_len
    attention, experts, head = forward_flops(model, running_experts(run, model), T / 2)
    trained = {"pair": experts / 2, "router": 0.0}
    # The attention's scores have no weights: their gradients are those of q, k and v.
    scores = scores_flops(model, T / 2)
    of_weights = trained.get(run.run, attention - scores + experts + head)
    # A gradient of q k or p v is taken with respect to both sides.
    needed = 2 * (attention + experts + head) + scores + of_weights
    by_name = {
        ATTENTION: scores,
        PROJECTIONS: attention - scores,
        FFN: experts * 2 / 3,
        OUTPUTS: experts / 3,
    }
    kept = KEPT[run.train.remat]
    recomputed = sum(work for name, work in by_name.items() if name not in kept)
    # The logits and q k are always computed again: neither cross entropy nor attention keeps them.
    again = recomputed + head + scores / 2
    tokens = run.data.batch_size * T
    return Flops(tokens * needed, tokens * (needed + again))
