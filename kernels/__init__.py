"""Routing and expert kernels: jax only, no model, no training. Installed as
`flexolmo_jax.kernels`."""
