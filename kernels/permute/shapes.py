"""Shapes of real runs: those of routing, because what is routed is what is permuted."""

from ..route.shapes import SHAPES, Shape

__all__ = ["SHAPES", "Shape"]
