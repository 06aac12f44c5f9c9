"""The same small model as one of each family, as keys of its config."""

from collections.abc import Iterable
from typing import Any

import pytest

from flexolmo_jax.config import ModelConfig, build, to_dict

FAMILIES: dict[str, dict[str, Any]] = {
    "olmo2": {},
    "olmo3": {
        "window": 7,
        "full_every": 2,
        "rope_scaling": {"kind": "yarn", "factor": 4.0, "first_seq_len": 16},
        "window_rope_theta": 1e4,
    },
    "llama": {
        "norm": "pre",
        "qk_norm": "none",
        "renormalise": True,
        "rope_scaling": {"kind": "llama3", "factor": 4.0, "first_seq_len": 16},
    },
    "mistral": {"norm": "pre", "qk_norm": "none", "renormalise": True, "window": 7},
    "qwen2": {"norm": "pre", "qk_norm": "none", "attention_bias": True, "tied_head": True},
    "qwen3": {"norm": "pre", "qk_norm": "head", "d_head": 10, "renormalise": True},
}
OTHERS = tuple(name for name in FAMILIES if name != "olmo2")
DISTINCT = ("olmo2", "olmo3", "qwen3")  # between them they have most of what families differ in


def distinct_first(families: Iterable[str]) -> list[Any]:
    """Parameters of a test: families beside DISTINCT are for the slow tier."""
    slow = pytest.mark.slow
    return [
        pytest.param(name, id=name, marks=() if name in DISTINCT else slow) for name in families
    ]


def as_family(config: ModelConfig, family: str) -> ModelConfig:
    return build(ModelConfig, to_dict(config) | FAMILIES[family], "model")
