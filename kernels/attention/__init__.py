"""Softmax attention: causal within packed documents, or wherever a mask says."""

from .api import Implementation, attention, masked_attention

__all__ = ["Implementation", "attention", "masked_attention"]
