"""Families of models on Hugging Face, as values of our config's keys.

There is no code for one family alone. Names are those of transformers 5.23.
"""

from typing import Any, Literal, NamedTuple

from flexolmo_jax.config import ModelConfig
from flexolmo_jax.errors import UserError


class Family(NamedTuple):
    """Of what `model_type` names."""

    architecture: str  # transformers' class
    keys: dict[str, Any]  # values of our keys
    theta: float | None = None  # rotary positions' where config.json has none
    # where a layer has its router and experts: in "mlp" or "block_sparse_moe"; None: it is dense
    experts: str | None = None
    # Whether layers have windows: none, all, or each as `layer_types` says; Qwen's have none unless
    # `use_sliding_window`.
    windows: Literal["none", "all", "by type", "if used"] = "none"
    has_topk_key: bool = False  # `norm_topk_prob` says whether weights are renormalised


OLMO = {"norm": "post", "qk_norm": "full"}
PRE_OLMO = OLMO | {"norm": "pre"}
LLAMA = {"norm": "pre", "qk_norm": "none", "renormalise": True}
QWEN3 = {"norm": "pre", "qk_norm": "head", "renormalise": True}
FAMILIES: dict[str, Family] = {
    "olmo2": Family("Olmo2ForCausalLM", OLMO),
    "olmo3": Family("Olmo3ForCausalLM", OLMO, 5e5, windows="by type"),
    "llama": Family("LlamaForCausalLM", LLAMA, 1e4),
    "mistral": Family("MistralForCausalLM", LLAMA, 1e4, windows="all"),
    "qwen2": Family("Qwen2ForCausalLM", LLAMA | {"attention_bias": True}, 1e4, windows="if used"),
    "qwen3": Family("Qwen3ForCausalLM", QWEN3, 1e4, windows="if used"),
    "flex_olmo": Family("FlexOlmoForCausalLM", OLMO, experts="mlp", has_topk_key=True),
    "mixtral": Family("MixtralForCausalLM", LLAMA, 1e6, "block_sparse_moe", "all"),
    "qwen3_moe": Family("Qwen3MoeForCausalLM", QWEN3, 1e4, "mlp", "if used", True),
    "olmoe": Family("OlmoeForCausalLM", PRE_OLMO, 1e4, "mlp", has_topk_key=True),
}
# the names of experts' matrices, which are ours elsewhere
MATRICES = {"block_sparse_moe": {"gate": "w1", "up": "w3", "down": "w2"}}


def family_of(config: ModelConfig) -> str:
    """The `model_type` that a model is written as. Raises UserError where none computes it."""
    for name, family in FAMILIES.items():
        is_kind = (family.experts is None) == (config.n_experts == 1)
        if is_kind and _computes(family, config):
            return name
    what = "dense model" if config.n_experts == 1 else "mixture"
    keys = ("norm", "qk_norm", "attention_bias", "renormalise", "window", "full_every")
    told = ", ".join(f"{key} {getattr(config, key)}" for key in keys)
    raise UserError(
        f"no format of Hugging Face's computes a {what} with {told}; expected what one of"
        f" {', '.join(FAMILIES)} computes; keep it as a model of ours"
    )


def _computes(family: Family, config: ModelConfig) -> bool:
    keys = {"attention_bias": False} | family.keys
    # The weights of all experts add up to 1 as they are.
    if config.n_active == config.n_experts or family.has_topk_key:
        keys.pop("renormalise", None)
    else:
        keys.setdefault("renormalise", False)
    if any(getattr(config, key) != value for key, value in keys.items()):
        return False
    if family.windows == "none":  # nothing is further away than the window is wide
        near = config.window >= config.max_seq_len and config.rope_scaling is None
        same = config.window_rope_theta in (0, config.rope_theta)
        return not config.window or (near and same)
    if family.windows == "by type":  # which scales no layer with a window
        return not config.window or bool(config.full_every) or config.rope_scaling is None
    return not config.full_every
