"""How long a step takes at least, by what the chips can do.

There are four times: of the matrix products at the peak of the chip; of reading and writing once
what stays in HBM from step to step; of the collectives over the links that their devices share; and
of the way to the host's memory and back. A step takes at least the longest of them, if all of it
overlaps, and about their sum where nothing does. Real steps are slower: no kernel reaches the peak,
and activations and gathered weights pass through HBM too.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from flexolmo_jax.runtime.tpus import Slice

from .collectives import Collective

ASSUMPTIONS = (
    "matrix products at the chip's bfloat16 peak; in HBM arguments and results once; links at their"
    " full rate, in both directions of a ring (one, where a dimension of the slice does not wrap);"
    " every expert chosen as often as the others; figures per chip of Google's TPU pages, November"
    " 2026"
)


def roofline(
    slice_: Slice,
    mesh: Mesh,
    flops: float,
    in_hbm: int,
    moved: Sequence[Collective],
    offloaded: int = 0,
) -> dict[str, Any]:
    """Seconds of a step: {"compute", "memory", "network", "host", "overlapped", "in_turn",
    "bound"}.

    `flops`: over all devices. Bytes per device: `in_hbm` that are read or written; `offloaded` that
    go to the host's memory and come back.
    """
    network = sum(one.total / bandwidth(slice_, mesh, one.axes) for one in moved)
    return seconds(slice_, mesh, flops, in_hbm, network, offloaded)


def seconds(
    slice_: Slice, mesh: Mesh, flops: float, in_hbm: int, network: float, offloaded: int
) -> dict[str, Any]:
    """`roofline` where the seconds of the collectives are known."""
    chip = slice_.chip
    times = {
        "compute": flops / mesh.size / (1e12 * chip.tflops / chip.devices),
        "memory": in_hbm / (1e9 * chip.hbm_gbs / chip.devices),
        "network": network,
        "host": 2 * offloaded / (1e9 * chip.host_gbs / chip.devices),
    }
    return times | {
        "overlapped": max(times.values()),
        "in_turn": sum(times.values()),
        "bound": max(times, key=lambda name: times[name]),
    }


def bandwidth(slice_: Slice, mesh: Mesh, axes: Sequence[str]) -> float:
    """Bytes a second that a device can receive in a collective over these mesh axes.

    The devices of its group differ in some dimensions of the torus, and use the links along those.
    Between slices they use the network of the data centre.
    """
    group = _group(mesh, axes)
    chip = slice_.chip
    if len({getattr(device, "slice_index", 0) for device in group}) > 1:
        return 1e9 / 8 * chip.dcn_gbits / chip.devices
    coordinates = np.array([device.coords[: chip.dimensions] for device in group])
    links = 0
    extents = (len(set(column)) for column in coordinates.T)
    for extent, size in zip(extents, slice_.shape, strict=True):
        if extent > 1:
            links += 2 if extent == size and size >= chip.wraps_at else 1
    # The devices of one chip share its links. A group that needs no link is one chip, whose devices
    # are joined at least as well as by all of the links.
    return 1e9 * chip.link_gbs * (links or 2 * chip.dimensions) / chip.devices


def _group(mesh: Mesh, axes: Sequence[str]) -> list[Any]:
    """The devices with which the first one runs a collective over these axes."""
    at = tuple(slice(None) if axis in axes else 0 for axis in mesh.axis_names)
    return list(np.asarray(mesh.devices[at]).reshape(-1))


def by_kind_and_axis(moved: Sequence[Collective]) -> list[dict[str, Any]]:
    """Bytes that a device receives in a step, summed by kind, form, axes and whether they overlap
    with products, the most first."""
    sums: dict[tuple[str, str, str, bool], list[float]] = {}
    for one in moved:
        key = one.kind, one.form, " x ".join(one.axes), one.overlapped
        total = sums.setdefault(key, [0, 0])
        total[0] += one.total
        total[1] += one.runs
    entries = [
        dict(zip(("kind", "form", "axes", "overlapped"), key, strict=True))
        | {"bytes": math.ceil(bytes_), "runs": runs}
        for key, (bytes_, runs) in sums.items()
    ]
    return sorted(entries, key=lambda entry: -entry["bytes"])
