"""The time of a step by what its chips can do, against sums done by hand."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from flexolmo_jax.plan.collectives import Collective
from flexolmo_jax.plan.roofline import bandwidth, by_kind_and_axis, roofline
from flexolmo_jax.runtime.tpus import slice_of


def mesh(topology: str, shape: tuple[int, ...], slices: int = 1) -> Any:
    """Devices of a slice that know their coordinates, in the order of the torus."""
    where = slice_of(topology)
    places = [(*at, 0)[:3] for at in np.ndindex(where.shape)]
    devices = [
        SimpleNamespace(coords=place, slice_index=number)
        for number in range(slices)
        for place in places
        for _ in range(where.chip.devices)
    ]
    return SimpleNamespace(
        devices=np.array(devices, object).reshape(shape),
        axis_names=("data", "fsdp"),
        size=len(devices),
        shape=dict(zip(("data", "fsdp"), shape, strict=True)),
    )


def gather(axes: tuple[str, ...], received: float, runs: int = 1) -> Collective:
    return Collective("all-gather", axes, 4, received, runs, "", False, "", "")


@pytest.mark.parametrize(
    ("topology", "shape", "axes", "gbs"),
    [
        ("v5p:4x4x4", (1, 64), ("fsdp",), 600),  # rings in three dimensions, two links of 100 each
        ("v5p:2x2x1", (1, 4), ("fsdp",), 200),  # two lines
        ("v5p:4x4x4", (16, 4), ("fsdp",), 200),  # one ring
        ("v5e:4x8", (1, 32), ("fsdp",), 100),  # no ring below 16
        ("v5e:16x16", (1, 256), ("fsdp",), 200),
        ("tpu7x:4x4x4", (1, 128), ("fsdp",), 300),  # two devices share a chip's links
    ],
)
def test_a_collective_has_the_links_of_the_dimensions_it_spans(topology, shape, axes, gbs):
    assert bandwidth(slice_of(topology), mesh(topology, shape), axes) == gbs * 1e9


def test_slices_are_joined_by_the_data_centres_network():
    assert (
        bandwidth(slice_of("v5p:2x2x1"), mesh("v5p:2x2x1", (2, 4), slices=2), ("data",)) == 50e9 / 8
    )


def test_a_step_takes_the_longest_of_three_times_and_at_most_their_sum():
    where = slice_of("v5p:4x4x4")
    times = roofline(
        where,
        mesh("v5p:4x4x4", (1, 64)),
        459e12 * 64 * 2,
        2765 * 10**9 // 2,
        [gather(("fsdp",), 600e9, 3)],
    )
    assert (
        times["compute"] == pytest.approx(2)
        and times["memory"] == pytest.approx(0.5)
        and times["network"] == pytest.approx(3)
    )
    assert (
        times["bound"] == "network"
        and times["overlapped"] == pytest.approx(3)
        and times["in_turn"] == pytest.approx(5.5)
    )


def test_what_is_offloaded_goes_to_the_hosts_memory_and_comes_back():
    where = slice_of("v6e:2x2")
    times = roofline(where, mesh("v6e:2x2", (1, 4)), 918e12 * 4, 0, [], 32 * 10**9)
    assert times["host"] == pytest.approx(2) and times["bound"] == "host"
    assert times["overlapped"] == pytest.approx(2) and times["in_turn"] == pytest.approx(3)


def test_the_devices_of_a_chip_share_what_it_can_do():
    where, devices = slice_of("tpu7x:2x2x1"), mesh("tpu7x:2x2x1", (1, 8))
    chip, slices = where.chip, mesh("tpu7x:2x2x1", (2, 8), slices=2)
    assert chip.devices == 2
    of_a_chip = int(1e9 * chip.hbm_gbs), [], int(1e9 * chip.host_gbs)
    times = roofline(where, devices, 8e12 * chip.tflops, *of_a_chip)
    assert times["compute"] == pytest.approx(2) and times["memory"] == pytest.approx(2)
    assert times["host"] == pytest.approx(4)
    assert bandwidth(where, slices, ("data",)) == 1e9 / 8 * chip.dcn_gbits / 2


def test_bytes_are_summed_by_kind_and_axes_the_most_first():
    entries = by_kind_and_axis(
        [gather(("data",), 1), gather(("fsdp",), 5, 2), gather(("data",), 2)]
    )
    assert [(one["axes"], one["bytes"], one["runs"]) for one in entries] == [
        ("fsdp", 10, 2),
        ("data", 3, 2),
    ]
