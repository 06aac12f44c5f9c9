"""TPUs to trace and lower for, without one."""

import contextlib
from collections.abc import Iterator

import jax
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

KINDS = {"v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite", "tpu7x": "TPU7x"}


@contextlib.contextmanager
def traced_for(tpu: str) -> Iterator[None]:
    """Kernels that ask which TPU they are traced for are told this one."""
    device = AbstractDevice(device_kind=KINDS[tpu], num_cores=1, platform="tpu")
    mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        yield
