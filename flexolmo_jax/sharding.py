"""Mesh axes, and the one table from a parameter's logical axes to them. The only file that names a mesh axis.

data: replicas (across slices); fsdp: parameters and batch; tensor: heads, ffn, vocabulary; expert: experts.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from flexolmo_jax.config import MeshConfig
from flexolmo_jax.errors import UserError

AXES = ("data", "fsdp", "tensor", "expert")
BATCH = PartitionSpec(("data", "fsdp"))

LOGICAL_TO_MESH: dict[str | None, str | None] = {
    "embed": "fsdp",
    "ffn": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "vocab": "tensor",
    "expert": "expert",
    "layers": None,  # scanned over
    None: None,
}


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of the config's shape over all devices (`jax.Device`s), or over the first of them if the config asks for fewer.

    Raises UserError for a mesh that is larger than the devices, or one with -1 that does not divide them.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = [getattr(config, axis) for axis in AXES]
    named = math.prod(n for n in sizes if n != -1)
    if -1 in sizes:
        if len(devices) % named:
            raise UserError(f"mesh {_show(sizes)} does not divide {len(devices)} devices; make the product of its axes a divisor")
        sizes[sizes.index(-1)] = len(devices) // named
    needed = math.prod(sizes)
    if needed > len(devices):
        raise UserError(f"mesh {_show(sizes)} needs {needed} devices; got {len(devices)}; make the axes smaller")
    # Auto: the compiler places the collectives; parameters and batch carry their shardings.
    return Mesh(np.asarray(devices[:needed]).reshape(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def check_batch(mesh: Mesh, microbatch: int) -> None:
    """Raises UserError where a microbatch does not divide over the mesh's batch axes."""
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    if microbatch % ways:
        raise UserError(f"a microbatch of {microbatch} records does not divide over {ways} (mesh.data x mesh.fsdp); change data.batch_size")


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Leading axis over data and fsdp."""
    return NamedSharding(mesh, BATCH)


def parameter_sharding(mesh: Mesh, axes: tuple[str | None, ...], shape: tuple[int, ...]) -> NamedSharding:
    """The sharding of one parameter; an axis that its mesh axis does not divide stays whole."""
    names = [LOGICAL_TO_MESH[axis] for axis in axes]
    return NamedSharding(
        mesh, PartitionSpec(*(n if n and size % mesh.shape[n] == 0 else None for n, size in zip(names, shape, strict=True)))
    )


def _show(sizes: list[int]) -> str:
    return " x ".join(f"{axis} {n}" for axis, n in zip(AXES, sizes, strict=True))
