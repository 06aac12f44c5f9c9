"""Tokens into expert order (`permute`) and back (`combine`), each the other's gradient."""

from .api import combine, permute, permute_probabilities

__all__ = ["combine", "permute", "permute_probabilities"]
