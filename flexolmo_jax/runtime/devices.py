"""The devices that JAX runs on, with a word where it does not use the machine's accelerator."""

import functools
import glob
from typing import Any

import jax

from flexolmo_jax.errors import from_a_clone

from .environment import check_config
from .progress import note

# What a driver leaves in /dev, and the extra that brings JAX's support.
ACCELERATORS = {
    "tpu": ("TPU", ("/dev/accel[0-9]*", "/dev/vfio/[0-9]*")),
    "cuda": ("NVIDIA GPU", ("/dev/nvidia[0-9]*", "/dev/dxg")),
}


def all_devices() -> list[Any]:
    """All devices (`jax.Device`) of JAX's default backend.

    JAX runs on the CPU where it cannot use an accelerator, and only logs it. One note says so,
    unless the CPU was asked for (JAX_PLATFORMS=cpu). Raises UserError as `environment.check_config`
    does.
    """
    check_config(jax.config)
    found = jax.devices()
    chosen = jax.config.jax_platforms  # pyright: ignore[reportAttributeAccessIssue]
    if found[0].platform == "cpu" and not chosen:
        _note_fallback()
    return found


@functools.cache
def _note_fallback() -> None:
    for extra, (name, files) in ACCELERATORS.items():
        if any(map(glob.glob, files)):
            note(
                f"this machine seems to have a {name}, but JAX runs on the CPU:"
                f" {from_a_clone(extra)}, and see with --debug what JAX says; or set"
                " JAX_PLATFORMS=cpu"
            )
