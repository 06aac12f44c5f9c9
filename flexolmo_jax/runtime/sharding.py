"""Mesh axes, and the one table from a parameter's logical axes to them. The only file that names a
mesh axis.

data: replicas (across slices); fsdp: parameters and batch; tensor: heads, ffn, vocabulary; expert:
experts and batch.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from flexolmo_jax.config import MeshConfig
from flexolmo_jax.errors import UserError

from .devices import all_devices

AXES = ("data", "fsdp", "tensor", "expert")
BATCH = PartitionSpec(("data", "fsdp", "expert"))

Axes = tuple[str | None, ...]  # logical names of an array's axes

LOGICAL_TO_MESH: dict[str | None, Any] = {
    "batch": BATCH[0],
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
    """A mesh of the config's shape over all devices (`jax.Device`s), or over the first of them if
    the config asks for fewer.

    Raises UserError for a mesh that does not fit the devices: see `MeshConfig.sizes`.
    """
    devices = list(all_devices() if devices is None else devices)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    sizes = list(config.sizes(len(devices), slices).values())
    needed = math.prod(sizes)
    if needed < len(devices) and len({device.process_index for device in devices}) > 1:
        raise UserError(
            f"mesh {config} has {needed} devices; expected all {len(devices)} of several processes;"
            " set one axis to -1"
        )
    # Auto: the compiler places the collectives; parameters and batch carry their shardings.
    return Mesh(
        _arranged(devices[:needed], sizes, slices), AXES, axis_types=(AxisType.Auto,) * len(AXES)
    )


def _arranged(devices: Sequence[Any], sizes: list[int], slices: int) -> np.ndarray:
    """Devices [data, fsdp, tensor, expert]: neighbours in a TPU's torus side by side, and slices
    apart on the data axis."""
    if devices[0].platform != "tpu":
        return np.asarray(devices).reshape(sizes)
    if slices > 1:
        within = (sizes[0] // slices, *sizes[1:])
        return mesh_utils.create_hybrid_device_mesh(
            within, (slices, 1, 1, 1), devices, allow_split_physical_axes=True
        )
    return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)


def platform_of(mesh: Mesh | None) -> str | None:
    """Of the mesh's devices: "cpu", "gpu" or "tpu". None without a mesh."""
    return None if mesh is None else mesh.devices.flat[0].platform


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Leading axis over data, fsdp and expert."""
    return NamedSharding(mesh, BATCH)


def devices_of_batch(mesh: Mesh) -> int:
    """Over how many devices the records of a batch are spread."""
    return math.prod(mesh.shape[axis] for axis in BATCH[0])


def check_batch(mesh: Mesh | None, size: int) -> None:
    """Raises UserError if a batch of this size cannot be divided evenly over the mesh."""
    if mesh is not None and size % (devices := devices_of_batch(mesh)):
        raise UserError(
            f"{size} sequences do not divide over {devices} devices (the mesh's data x fsdp x"
            f" expert); give a multiple of {devices}, or a mesh with the tensor axis only"
        )


def batch_over(mesh: Mesh | None, size: int) -> int:
    """The least number of records, from `size` on, that divides evenly over the mesh."""
    devices = 1 if mesh is None else devices_of_batch(mesh)
    return -(-size // devices) * devices


def local_records(mesh: Mesh, batch_size: int) -> list[int]:
    """The places in a batch of the records that the devices of this process hold, in order."""
    indices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    places = range(batch_size)
    # An index is a slice for each dimension, of which there is one.
    return sorted({place for (of_batch,) in indices for place in places[of_batch]})  # type: ignore


def put_batch(mesh: Mesh, places: Sequence[int], batch_size: int, array: np.ndarray) -> jax.Array:
    """A batch over the mesh. `array` holds what this process has of it: the records, or prompts, at
    these places, in order."""
    start_of = {place: i for i, place in enumerate(places)}

    def shard(index: Any) -> Any:
        wanted = range(batch_size)[index[0]]
        start = start_of[wanted[0]]
        return array[start : start + len(wanted)]

    shape = (batch_size, *array.shape[1:])
    return jax.make_array_from_callback(shape, batch_sharding(mesh), shard)


def put_whole_batch(mesh: Mesh | None, array: np.ndarray) -> jax.Array:
    """A batch of which this process has every record: over the mesh, or on one device."""
    if mesh is None:
        return jnp.asarray(array)
    return put_batch(mesh, range(len(array)), len(array), array)


def constrain(mesh: Mesh | None, tree: Any, axes: Axes) -> Any:
    """The arrays of a tree with the sharding of their logical axes ("batch" is one of them), inside
    a jitted function."""
    if mesh is None:
        return tree
    return jax.tree.map(
        lambda a: jax.lax.with_sharding_constraint(a, parameter_sharding(mesh, axes, a.shape)), tree
    )


def parameter_sharding(
    mesh: Mesh | AbstractMesh, axes: tuple[str | None, ...], shape: tuple[int, ...]
) -> NamedSharding:
    """The sharding of one parameter, or of another array with logical axes.

    Axes are spread as LOGICAL_TO_MESH says. One whose size the mesh does not divide stays whole;
    of experts whose number it does not divide, "embed" is spread over fsdp and expert together.
    Where such experts run, `over_experts` fills their number up with empty ones.
    """
    names: list[Any] = [LOGICAL_TO_MESH[axis] for axis in axes]
    if "expert" in axes and "embed" in axes and shape[axes.index("expert")] % mesh.shape["expert"]:
        names[axes.index("embed")] = ("fsdp", "expert")
    for i, (entry, size) in enumerate(zip(names, shape, strict=True)):
        if size % math.prod(mesh.shape[name] for name in _as_tuple(entry)):
            names[i] = None
    return NamedSharding(mesh, PartitionSpec(*names))


def devices_gathered(placement: NamedSharding) -> int:
    """Over how many devices a parameter is spread that all need the whole of it: those along
    `fsdp`."""
    return math.prod(
        placement.mesh.shape[axis]
        for entry in placement.spec
        if "fsdp" in _as_tuple(entry)
        for axis in _as_tuple(entry)
    )


def on_each_shard(
    mesh: Mesh | None,
    function: Callable[..., Any],
    axes: Sequence[Axes],
    out: Any,
    *,
    batch_only: bool = False,
) -> Callable[..., Any]:
    """`function`, run by every device on its own shard of the arguments, whose logical axes are
    given ("batch" is one of them).

    For what the compiler cannot partition, such as a Pallas kernel, or partitions badly, such as a
    sum over chunks. A logical axis stays whole where its mesh axes do not divide its size in every
    argument. `batch_only` leaves the mesh's other axes to the compiler, inside too. Without a mesh,
    or on one device, this is `function` itself.
    """
    if mesh is None or mesh.size == 1:
        return function
    here = _mesh_inside(mesh)
    batch = _batch_axes(here)
    to_mesh: dict[str | None, Any] = {"batch": batch}
    if not batch_only:
        to_mesh = LOGICAL_TO_MESH | to_mesh

    def sharded(*args: jax.Array) -> Any:
        whole = set()
        for arg, names in zip(args, axes, strict=True):
            for size, name in zip(arg.shape, names, strict=True):
                devices = math.prod(mesh.shape[axis] for axis in _as_tuple(to_mesh.get(name)))
                if size % devices:
                    whole.add(to_mesh[name])

        def spec(names: Axes) -> PartitionSpec:
            return PartitionSpec(
                *(None if to_mesh.get(name) in whole else to_mesh.get(name) for name in names)
            )

        specs = tuple(spec(names) for names in axes)
        # Varying axes are not checked: the kernels of JAX's library do not declare them.
        manual = {"axis_names": set(batch)} if batch_only else {}
        out_specs = jax.tree.map(spec, out, is_leaf=_is_axes)
        return jax.shard_map(
            function, mesh=here, in_specs=specs, out_specs=out_specs, check_vma=False, **manual
        )(*args)

    return sharded


def over_replicas(mesh: Mesh | None, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function(*whole, batch)`, run by each replica along `data` on its own records of the batch;
    what it returns is summed over the replicas at its end, and nothing is before.

    Only on meshes of data and fsdp: beside `tensor` or `expert` the compiler aborts at a lookup in
    the embedding (jax 0.10 and 0.12). There, without a mesh and with one replica this is `function`
    itself.
    """
    if mesh is None or mesh.shape["data"] == 1 or mesh.shape["tensor"] * mesh.shape["expert"] > 1:
        return function

    def summed(*args: Any) -> Any:
        return jax.lax.psum(function(*args), "data")

    def over(*args: Any) -> Any:
        in_specs = (*(PartitionSpec(),) * (len(args) - 1), PartitionSpec("data"))
        how: dict[str, Any] = {"axis_names": {"data"}, "check_vma": False}
        return jax.shard_map(
            summed, mesh=mesh, in_specs=in_specs, out_specs=PartitionSpec(), **how
        )(*args)

    return over


def _mesh_inside(mesh: Mesh) -> Mesh | AbstractMesh:
    """The mesh as it is to be named here: inside `over_replicas` without the replicas' axis."""
    here = jax.sharding.get_abstract_mesh()
    return here if here.manual_axes else mesh


def _batch_axes(mesh: Mesh | AbstractMesh) -> tuple[str, ...]:
    """The axes that a batch is spread over, of those that are the compiler's."""
    return tuple(axis for axis in BATCH[0] if axis not in mesh.manual_axes)


@dataclass(frozen=True)
class ExpertAxis:
    """The devices that a layer's experts are spread over, as one of them sees it inside of
    `over_experts`. Alone where there is one."""

    size: int = 1

    def first(self, count: int) -> jax.Array | int:
        """The number of this device's first expert, where each has `count`."""
        return 0 if self.size == 1 else jax.lax.axis_index("expert") * count

    def gather(self, tree: Any) -> Any:
        """The arrays [n, ...] of all devices, as [size * n, ...]."""
        if self.size == 1:
            return tree
        return jax.tree.map(lambda a: jax.lax.all_gather(a, "expert", tiled=True), tree)

    def scatter(self, a: jax.Array) -> jax.Array:
        """The sum over devices of [size * n, ...]: each gets its own n."""
        return a if self.size == 1 else jax.lax.psum_scatter(a, "expert", tiled=True)

    def exchange(self, a: jax.Array) -> jax.Array:
        """[size * n, ...]: part i goes to device i, and what comes from device i is part i."""
        return jax.lax.all_to_all(a, "expert", 0, 0, tiled=True)

    def largest(self, number: jax.Array) -> jax.Array:
        """Of the numbers of all devices of the mesh."""
        return jax.lax.pmax(number, BATCH[0])


def over_experts(mesh: Mesh | None, function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """`function(axis, (tokens, layer), gate, up, down)` on each device, with its own tokens and its
    own experts.

    `axis` is an ExpertAxis. `tokens` is a tree of arrays [N, ...] spread over the batch's axes,
    `layer` the same integer, or None, on all devices; `gate` and `up` are [..., E, D, F], `down` is
    [..., E, F, D]. The result is [N, D], summed over the devices of the tensor axis, each of which
    has a part of every expert's F.
    """
    if mesh is None or mesh.size == 1:
        return functools.partial(function, ExpertAxis())
    here = _mesh_inside(mesh)
    axis = ExpertAxis(mesh.shape["expert"])
    batch = PartitionSpec(_batch_axes(here))
    wide = ("expert", None, "tensor")  # [E, D, F]
    tall = ("expert", "tensor", None)  # [E, F, D]

    def on_device(inputs: Any, *matrices: jax.Array) -> jax.Array:
        return jax.lax.psum(function(axis, inputs, *matrices), "tensor")

    def spread(inputs: Any, *matrices: jax.Array) -> jax.Array:
        specs = [
            PartitionSpec(*(None,) * (m.ndim - 3), *axes)
            for m, axes in zip(matrices, (wide, wide, tall), strict=True)
        ]
        filled = [_filled_up(mesh, m, spec) for m, spec in zip(matrices, specs, strict=True)]
        # Varying axes are not checked: loops over a traced number of blocks would have to declare
        # those of what they carry.
        in_specs = ((batch, PartitionSpec()), *specs)
        return jax.shard_map(
            on_device, mesh=here, in_specs=in_specs, out_specs=batch, check_vma=False
        )(inputs, *filled)

    return spread


def _filled_up(mesh: Mesh, matrices: jax.Array, spec: PartitionSpec) -> jax.Array:
    """With empty experts behind the last, which no token can choose, and empty units in each, up to
    numbers that the mesh divides."""
    missing = [
        -size % mesh.shape[axis] if axis else 0
        for size, axis in zip(matrices.shape, spec, strict=True)
    ]
    return jnp.pad(matrices, [(0, n) for n in missing])


def _as_tuple(axes: Any) -> tuple[str, ...]:
    """The mesh axes of an entry of a PartitionSpec."""
    return () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)


def _is_axes(tree: Any) -> bool:
    return isinstance(tree, tuple) and all(name is None or isinstance(name, str) for name in tree)
