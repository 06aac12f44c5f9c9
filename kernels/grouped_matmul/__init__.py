"""The expert FFN over tokens sorted by expert: one grouped SwiGLU for every platform."""

from .api import Implementation, expert_ffn

__all__ = ["Implementation", "expert_ffn"]
