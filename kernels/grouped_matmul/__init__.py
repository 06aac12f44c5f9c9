"""The expert FFN over groups of rows: one grouped SwiGLU for every platform, with a gradient of its
own."""

from .api import Implementation, expert_ffn

__all__ = ["Implementation", "expert_ffn"]
