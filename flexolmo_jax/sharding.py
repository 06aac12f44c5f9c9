"""Mesh axes, and the one table from a parameter's logical axes to them. The only file that names a mesh axis.

data: replicas (across slices); fsdp: parameters and batch; tensor: heads, ffn, vocabulary; expert: experts and batch.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from flexolmo_jax.config import MeshConfig
from flexolmo_jax.errors import UserError

AXES = ("data", "fsdp", "tensor", "expert")
BATCH = PartitionSpec(("data", "fsdp", "expert"))

Axes = tuple[str | None, ...]  # logical names of an array's axes

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
    ways = math.prod(mesh.shape[axis] for axis in BATCH[0])
    if microbatch % ways:
        raise UserError(
            f"a microbatch of {microbatch} records does not divide over {ways} (mesh.data x fsdp x expert); change data.batch_size"
        )


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Leading axis over data, fsdp and expert."""
    return NamedSharding(mesh, BATCH)


def parameter_sharding(mesh: Mesh | AbstractMesh, axes: tuple[str | None, ...], shape: tuple[int, ...]) -> NamedSharding:
    """The sharding of one parameter; an axis that its mesh axis does not divide stays whole.

    Experts whose number the expert axis does not divide are spread over it along "embed" instead.
    """
    names: list[Any] = [LOGICAL_TO_MESH[axis] for axis in axes]
    if "expert" in axes and "embed" in axes and shape[axes.index("expert")] % mesh.shape["expert"]:
        names[axes.index("embed")] = ("fsdp", "expert")
    ways = [math.prod(mesh.shape[name] for name in _as_tuple(entry)) for entry in names]
    return NamedSharding(mesh, PartitionSpec(*(n if size % w == 0 else None for n, w, size in zip(names, ways, shape, strict=True))))


def on_each_shard(
    mesh: Mesh | None, function: Callable[..., Any], axes: Sequence[Axes], out: Any, *, batch_only: bool = False
) -> Callable[..., Any]:
    """`function`, run by every device on its own shard of the arguments, whose logical axes are given ("batch" among them).

    For what the compiler cannot partition, such as a Pallas kernel, or partitions badly, such as a sum over chunks. A name
    whose mesh axes do not divide everything that bears it stays whole. `batch_only` leaves the mesh's other axes to the
    compiler, inside too. Without a mesh, or on one device, this is `function` itself.
    """
    if mesh is None or mesh.size == 1:
        return function
    to_mesh: dict[str | None, Any] = {"batch": BATCH[0]} if batch_only else LOGICAL_TO_MESH | {"batch": BATCH[0]}

    def sharded(*args: jax.Array) -> Any:
        whole = set()
        for arg, names in zip(args, axes, strict=True):
            for size, name in zip(arg.shape, names, strict=True):
                ways = math.prod(mesh.shape[axis] for axis in _as_tuple(to_mesh.get(name)))
                if size % ways:
                    whole.add(to_mesh[name])

        def spec(names: Axes) -> PartitionSpec:
            return PartitionSpec(*(None if to_mesh.get(name) in whole else to_mesh.get(name) for name in names))

        specs = tuple(spec(names) for names in axes)
        # Varying axes are not checked: the kernels of JAX's library do not declare them.
        manual = {"axis_names": set(_as_tuple(BATCH[0]))} if batch_only else {}
        out_specs = jax.tree.map(spec, out, is_leaf=_is_axes)
        return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=out_specs, check_vma=False, **manual)(*args)

    return sharded


def over_experts(mesh: Mesh | None, function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """`function((tokens, layer), gate, up, down, first)` summed over experts: each device runs its own, of which `first` is the first.

    `tokens` is a tree of arrays [N, ...] spread over the batch's axes, `layer` the same integer, or None, on all devices; `gate` and `up`
    are [..., E, D, F], `down` is [..., E, F, D]; the result is [N, D]. The devices that share out the experts gather each other's tokens
    and scatter the sums of their results back: 2 N D numbers for the N tokens of such a group, wherever they are routed. Nothing is
    dropped. Experts that do not divide are filled up behind the last with empty ones, which no token can choose; so are an expert's units.
    Without a mesh, or on one device, `function` runs as it is.
    """
    if mesh is None or mesh.size == 1:
        return lambda *args: function(*args, 0)

    def on_device(inputs: Any, gate: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
        tokens, layer = inputs
        tokens = jax.tree.map(lambda a: jax.lax.all_gather(a, "expert", tiled=True), tokens)
        out = function((tokens, layer), gate, up, down, jax.lax.axis_index("expert") * gate.shape[-3])
        return jax.lax.psum_scatter(jax.lax.psum(out, "tensor"), "expert", tiled=True)

    def spread(inputs: Any, *weights: jax.Array) -> jax.Array:
        matrices = (("expert", None, "tensor"), ("expert", None, "tensor"), ("expert", "tensor", None))
        specs = [PartitionSpec(*(None,) * (w.ndim - 3), *axes) for w, axes in zip(weights, matrices, strict=True)]
        filled = (
            jnp.pad(w, [(0, -size % mesh.shape[axis] if axis else 0) for size, axis in zip(w.shape, spec, strict=True)])
            for w, spec in zip(weights, specs, strict=True)
        )
        # Varying axes are not checked: loops over a traced number of blocks would have to declare those of what they carry.
        in_specs = ((BATCH, PartitionSpec()), *specs)
        return jax.shard_map(on_device, mesh=mesh, in_specs=in_specs, out_specs=BATCH, check_vma=False)(inputs, *filled)

    return spread


def _as_tuple(axes: Any) -> tuple[str, ...]:
    """The mesh axes of an entry of a PartitionSpec."""
    return () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)


def _is_axes(tree: Any) -> bool:
    return isinstance(tree, tuple) and all(name is None or isinstance(name, str) for name in tree)


def _show(sizes: list[int]) -> str:
    return " x ".join(f"{axis} {n}" for axis, n in zip(AXES, sizes, strict=True))
