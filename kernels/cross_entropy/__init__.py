"""Next-token cross entropy from hidden states, without the logits of a whole batch."""

from .api import Implementation, cross_entropy

__all__ = ["Implementation", "cross_entropy"]
