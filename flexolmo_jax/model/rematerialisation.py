"""What a layer's forward pass keeps for the backward pass, which computes the rest again
(`train.remat`).

Every policy but "none" keeps a layer's input, and arrays by name. In this order each keeps what the
one before it keeps, and more:

    full          nothing else
    attention     attention's output and logsumexp: attention is not run again
    outputs       what experts give: neither are their last products
    ffn           the experts' first two products: nothing of an expert is multiplied again
    dots          attention's projections: no product is
    none          everything

"offload" keeps what "outputs" keeps, but in the host's memory.
"""

from collections.abc import Callable
from typing import Any

import jax

from flexolmo_jax.config import Remat
from flexolmo_jax.kernels.names import ATTENTION, FFN, OUTPUTS, PROJECTIONS

CUDNN_ATTENTION = "dot_product_attention_fwd_wrapper"  # an operation of JAX
NAMES = (ATTENTION, OUTPUTS, FFN, PROJECTIONS)
KEPT: dict[Remat, tuple[str, ...]] = {
    "full": (),
    "attention": (ATTENTION,),
    "outputs": (ATTENTION, OUTPUTS),
    "offload": (ATTENTION, OUTPUTS),
    "ffn": (ATTENTION, OUTPUTS, FFN),
    "dots": NAMES,
    "none": NAMES,
}


def rematerialised(step: Callable[..., Any], remat: Remat) -> Callable[..., Any]:
    """The same function, whose backward pass keeps what the policy says."""
    if remat == "none":
        return step
    return jax.checkpoint(step, policy=_policy(remat), prevent_cse=False)


def _policy(remat: Remat) -> Callable[..., Any]:
    policies, names = jax.checkpoint_policies, KEPT[remat]
    if remat == "offload":
        return policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=names,
            offload_src="device",
            offload_dst="pinned_host",
        )
    named = policies.save_only_these_names(*names)
    return policies.save_from_both_policies(named, _of_cudnn) if ATTENTION in names else named


def _of_cudnn(primitive: Any, *_: Any, **__: Any) -> bool:
    """Whether this is cuDNN's attention, whose output and logsumexp have no names."""
    return primitive.name == CUDNN_ATTENTION
