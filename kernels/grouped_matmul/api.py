"""The public function: the SwiGLU of each row with its group's expert, scaled by the row's weight.

    h = w * silu(x gate_e) * (x up_e)      out = h down_e

for the rows of group e; 0 for those behind the last group.

The weight goes in before the second product. The router's gradient is then `dw = <dout down_e^T,
silu(x gate_e) * (x up_e)>`, a sum over what the backward pass holds anyway, and no expert's output
is stored (the idea is SonicMoE's). Saved for the backward pass: the inputs and the pre-activations
`x gate_e` and `x up_e`; to compute these again would cost two of the nine products of a training
step.
"""

import functools
from typing import Literal, get_args

import jax
from jaxtyping import Array, Float, Int

from . import blocks_cpu, grouped, reference

Implementation = Literal["blocks", "ragged_dot", "megablox", "megablox_interpret", "reference"]

_MODULES = {
    "blocks": (blocks_cpu.forward, blocks_cpu.backward),
    "ragged_dot": grouped.with_products(grouped.RAGGED_DOT),
    "megablox": grouped.with_products(grouped.MEGABLOX),
    "megablox_interpret": grouped.with_products(grouped.MEGABLOX_INTERPRET),
    "reference": (reference.forward, reference.backward),
}


def expert_ffn(
    x: Float[Array, "M D"],
    weights: Float[Array, " M"],
    sizes: Int[Array, " E"],
    gate: Float[Array, "E D F"],
    up: Float[Array, "E D F"],
    down: Float[Array, "E F D"],
    *,
    implementation: Implementation | None = None,
) -> Float[Array, "M D"]:
    """Rows `sizes[0]` of expert 0, then `sizes[1]` of expert 1 and so on. Differentiable in all but
    `sizes`.

    An expert without rows is never read and has a gradient of exactly 0. Products accumulate in
    float32, weight gradients over all rows of a group too, whatever the dtype.

    `implementation` None chooses by the platform that the program is lowered for:
    - CPU: `blocks`, a loop over blocks of rows (`lax.ragged_dot` costs E times the work there);
    - TPU: `ragged_dot` from jax 0.12 on, `megablox` below, where ragged_dot's weight gradient is
      dense;
    - GPU: `ragged_dot` from jax 0.11 on, a loop over all experts (`reference`) below, which fits
      few experts. Not measured here.

    Raises ValueError for an unknown implementation; a known one is used or fails.
    """
    if implementation is not None and implementation not in get_args(Implementation):
        raise ValueError(
            f"implementation must be None or one of {', '.join(get_args(Implementation))}; got"
            f" {implementation!r}"
        )
    return _expert_ffn(x, weights, sizes, gate, up, down, implementation)


def _by_platform(part: int, implementation: Implementation | None, *args):
    """The forward (0) or backward (1) pass of the implementation, or of the platform's where none
    is named."""
    if implementation is not None:
        return _MODULES[implementation][part](*args)
    version = jax.__version_info__
    tpu = "ragged_dot" if version >= (0, 12) else "megablox"
    gpu = "ragged_dot" if version >= (0, 11) else "reference"
    return jax.lax.platform_dependent(
        *args, cpu=_MODULES["blocks"][part], tpu=_MODULES[tpu][part], default=_MODULES[gpu][part]
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _expert_ffn(x, weights, sizes, gate, up, down, implementation):
    # Without a gradient nothing is saved: XLA drops the pre-activations that nobody reads.
    return _by_platform(0, implementation, x, weights, sizes, gate, up, down)[0]


def _forward(x, weights, sizes, gate, up, down, implementation):
    out, gated, upped = _by_platform(0, implementation, x, weights, sizes, gate, up, down)
    return out, (x, weights, sizes, gate, up, down, gated, upped)


def _backward(implementation, saved, dout):
    dx, dweights, dgate, dup, ddown = _by_platform(1, implementation, *saved, dout)
    return dx, dweights, None, dgate, dup, ddown


_expert_ffn.defvjp(_forward, _backward)
