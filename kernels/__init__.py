"""Kernels for routing, experts, attention and the loss: jax only, no model and no training.

Installed as `flexolmo_jax.kernels`.
"""

from typing import Literal

# Which kernels route tokens to their experts and back, see `choice`.
Kernels = Literal["auto", "xla", "pallas"]
