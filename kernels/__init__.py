"""Kernels for routing, experts, attention and the loss: jax only, no model and no training.

Installed as `flexolmo_jax.kernels`.
"""
