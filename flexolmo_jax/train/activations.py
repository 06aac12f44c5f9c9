"""Bytes of activations that a step keeps for its backward pass, counted from shapes: a layer's
input, and what `train.remat` keeps by name."""

import math
from typing import NamedTuple

from flexolmo_jax.config import ModelConfig, RunConfig
from flexolmo_jax.kernels.names import ATTENTION, FFN, OUTPUTS, PROJECTIONS
from flexolmo_jax.model.rematerialisation import KEPT

from .flops import running_experts

WIDTHS = {"float32": 4, "bfloat16": 2}


class Kept(NamedTuple):
    """Bytes of one microbatch, over all devices."""

    on_device: int  # "none" keeps more: what lies between products too
    on_host: int


def kept_bytes(run: RunConfig, model: ModelConfig) -> Kept:
    """Of a microbatch of the run."""
    H, K, C, D, F = model.n_heads, model.n_kv_heads, model.head_size, model.d_model, model.d_ffn
    width, experts = WIDTHS[run.train.compute_dtype], running_experts(run, model)
    # Where tokens choose among experts, only the sum of what these give is kept.
    is_sparse = not run.pair and experts < model.n_experts
    by_name = {
        ATTENTION: width * H * C + 4 * H,  # the logsumexp is float32
        PROJECTIONS: width * (H * C + 2 * K * C + D),
        FFN: width * experts * 2 * F,
        OUTPUTS: width * D * (1 if is_sparse else experts),
    }
    named = sum(by_name[name] for name in KEPT[run.train.remat])
    tokens = math.ceil(run.data.batch_size / run.train.accumulate) * run.data.seq_len
    of_layers = tokens * model.n_layers
    inputs = of_layers * width * D
    if run.train.remat == "offload":
        return Kept(inputs, of_layers * named)
    return Kept(inputs + of_layers * named, 0)
