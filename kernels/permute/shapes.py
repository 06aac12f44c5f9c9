"""Shapes of real runs, those of routing: what is routed is what is permuted."""

from ..route.shapes import SHAPES, Shape

__all__ = ["SHAPES", "Shape"]
