"""Shapes of the loss that occur: shared by tests, compile checks and benchmarks."""

from typing import NamedTuple


class Shape(NamedTuple):
    tokens: int
    width: int
    vocabulary: int


TINY = Shape(2048, 256, 8192)  # configs/tiny, a training batch
OLMO2_1B = Shape(8192, 2048, 100352)
OLMO2_7B = Shape(4096, 4096, 100352)
