"""Shapes of attention that occur: shared by tests, compile checks and benchmarks."""

from typing import NamedTuple


class Shape(NamedTuple):
    batch: int
    length: int
    heads: int
    kv_heads: int
    head_size: int


TINY = Shape(8, 256, 8, 8, 32)  # configs/tiny, a training batch
OLMO2_1B = Shape(2, 4096, 16, 16, 128)
OLMO2_7B = Shape(1, 4096, 32, 32, 128)
OLMO2_32B = Shape(1, 4096, 40, 8, 128)  # grouped queries
