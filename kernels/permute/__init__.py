"""Tokens to the rows of their experts (`permute`) and back (`combine`), each the other's
gradient."""

from .api import combine, permute, row_weights

__all__ = ["combine", "permute", "row_weights"]
