"""Real-world shapes, shared by tests, compile checks and benchmarks."""

from typing import NamedTuple


class Shape(NamedTuple):
    """`M` rows (tokens times active experts), `E` experts, `D` model, `F` ffn."""

    M: int
    E: int
    D: int
    F: int


FLEXOLMO_7X7B = Shape(8192 * 4, 7, 4096, 11008)
SHAPES_7B = tuple(
    Shape(8192 * active, experts, 4096, 11008) for experts in (7, 8) for active in (4, 5)
)
SMALL = tuple(
    Shape(2048 * active, experts, 512, 1376)
    for experts, active in ((2, 2), (8, 2), (8, 5), (32, 2), (32, 5))
)
