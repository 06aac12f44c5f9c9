"""The model: `init_params` makes a tree of arrays, `forward` and `decode` run it. Knows nothing of
training or data."""

from .layers import CACHE, CachedContext, KVCache
from .moe import Choices, RouterOutput
from .transformer import (
    Output,
    Params,
    decode,
    empty_cache,
    forward,
    forward_layer,
    init_params,
    logical_axes,
    num_experts,
    parameter_shapes,
)

__all__ = [
    "CACHE",
    "CachedContext",
    "Choices",
    "KVCache",
    "Output",
    "Params",
    "RouterOutput",
    "decode",
    "empty_cache",
    "forward",
    "forward_layer",
    "init_params",
    "logical_axes",
    "num_experts",
    "parameter_shapes",
]
