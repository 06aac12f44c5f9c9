"""The public function: the SwiGLU of each token with its group's expert, times its probability.

    h = p * silu(x gate_e) * (x up_e)      out = h down_e

for the tokens of group e. A token chosen for two experts is in two groups. What is behind the last
group means nothing, neither what is given nor what comes back: to set it to 0 would be to pass over
all tokens again.

The probability goes in before the second product. The router's gradient is then `dp = <dout
down_e^T, silu(x gate_e) * (x up_e)>`, a sum over what the backward pass holds anyway, and no
expert's output is stored (the idea is SonicMoE's). Saved for the backward pass are the inputs and
the pre-activations `x gate_e` and `x up_e`: to compute those again would be two more products
beside the nine of forward and backward.
"""

import functools
from typing import Literal, get_args

import jax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from .. import names
from . import blocks, grouped, reference

Implementation = Literal["blocks", "ragged_dot", "megablox", "megablox_interpret", "reference"]

FORWARD, BACKWARD = 0, 1
_PASSES = {
    "blocks": (blocks.forward, blocks.backward),
    "ragged_dot": grouped.with_products(grouped.RAGGED_DOT),
    "megablox": grouped.with_products(grouped.MEGABLOX),
    "megablox_interpret": grouped.with_products(grouped.MEGABLOX_INTERPRET),
    "reference": (reference.forward, reference.backward),
}


def expert_ffn(
    x: Float[Array, "M D"],
    probabilities: Float[Array, " M"],
    sizes: Int[Array, " E"],
    gate: Float[Array, "E D F"],
    up: Float[Array, "E D F"],
    down: Float[Array, "E F D"],
    *,
    implementation: Implementation | None = None,
) -> Float[Array, "M D"]:
    """`x` holds `sizes[0]` tokens of expert 0, then `sizes[1]` of expert 1 and so on.

    Differentiable in all but `sizes`. An expert without tokens is never read and has a gradient of
    exactly 0. Whatever the dtype, products accumulate in float32, and so do the gradients of the
    matrices over all tokens of a group.

    `implementation` None chooses by the platform that the program is lowered for:
    - CPU and GPU: `blocks`, a loop over blocks of tokens. `lax.ragged_dot` multiplies every token
      with every expert on a CPU, E times the work, and in several releases on a GPU too;
    - TPU: `ragged_dot` from jax 0.12 on; below, `megablox`, because ragged_dot's gradient of the
      matrices is dense there (3.3 times the work of forward and backward at E = 8).

    Raises ValueError for an unknown implementation; a known one is used or fails.
    """
    if implementation is not None and implementation not in get_args(Implementation):
        raise ValueError(
            f"implementation must be None or one of {', '.join(get_args(Implementation))}; got"
            f" {implementation!r}"
        )
    return _expert_ffn(x, probabilities, sizes, gate, up, down, implementation)


def _by_platform(direction: int, implementation: Implementation | None, *args):
    """The forward or backward pass of the implementation, or of the platform's own."""
    if implementation is not None:
        return _PASSES[implementation][direction](*args)
    on_tpu = "ragged_dot" if jax.__version_info__ >= (0, 12) else "megablox"
    tpu, other = (_PASSES[name][direction] for name in (on_tpu, "blocks"))
    return jax.lax.platform_dependent(*args, tpu=tpu, default=other)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _expert_ffn(x, probabilities, sizes, gate, up, down, implementation):
    # Where no gradient is taken, XLA drops the pre-activations: nothing reads them.
    return _by_platform(FORWARD, implementation, x, probabilities, sizes, gate, up, down)[0]


def _forward(x, probabilities, sizes, gate, up, down, implementation):
    out, gated, upped = _by_platform(
        FORWARD, implementation, x, probabilities, sizes, gate, up, down
    )
    gated, upped = (checkpoint_name(product, names.FFN) for product in (gated, upped))
    return out, (x, probabilities, sizes, gate, up, down, gated, upped)


def _backward(implementation, saved, dout):
    dx, dprobabilities, dgate, dup, ddown = _by_platform(BACKWARD, implementation, *saved, dout)
    return dx, dprobabilities, None, dgate, dup, ddown


_expert_ffn.defvjp(_forward, _backward)
