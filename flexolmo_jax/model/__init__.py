"""The model: `init_params` makes a tree of arrays, `forward` and `decode` run it. Knows nothing of
training or data."""

from .layers import CACHE, KVCache
from .moe import RouterOutput
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
