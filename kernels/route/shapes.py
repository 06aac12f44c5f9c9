"""Shapes of real runs, shared by tests, compile checks and benchmarks."""

from typing import NamedTuple


class Shape(NamedTuple):
    """Tokens of one device's batch, experts, active experts and model width."""

    tokens: int
    experts: int
    active: int
    d_model: int


SHAPES = {
    # the paper's: the anchor and seven owners, two records of 4096
    "7b": Shape(tokens=8192, experts=8, active=4, d_model=4096),
    "7b-top2": Shape(tokens=8192, experts=8, active=2, d_model=4096),
    "1b": Shape(tokens=8192, experts=5, active=4, d_model=2048),
    "64-experts": Shape(tokens=4096, experts=64, active=8, d_model=2048),
}
