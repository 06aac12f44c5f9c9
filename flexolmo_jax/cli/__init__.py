"""The command `flexolmo <verb>`: a module for each group of verbs, and what they share."""

from .command import main

__all__ = ["main"]
