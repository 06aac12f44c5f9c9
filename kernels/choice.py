"""Which kernels run: those that are named, or those of the platform.

    xla       plain XLA, on every platform
    pallas    Pallas; on another platform than TPU its interpreter, which is slow
    auto      Pallas on TPU, XLA elsewhere

The platform is the one that a program is lowered for, not the one that it is traced on.
"""

import functools
from collections.abc import Callable
from typing import Any, get_args

import jax

from . import Kernels


def run(kernels: Kernels, xla: Callable[..., Any], pallas: Callable[..., Any], *args: Any) -> Any:
    """`xla(*args)` or `pallas(*args, interpret=...)`. Raises ValueError for an unknown name."""
    if kernels not in get_args(Kernels):
        raise ValueError(f"kernels is {kernels!r}; expected one of {', '.join(get_args(Kernels))}")
    if kernels == "xla":
        return xla(*args)
    elsewhere = xla if kernels == "auto" else functools.partial(pallas, interpret=True)
    compiled = functools.partial(pallas, interpret=False)
    return jax.lax.platform_dependent(*args, tpu=compiled, default=elsewhere)
