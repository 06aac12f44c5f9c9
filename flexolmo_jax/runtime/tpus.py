"""TPU slices: what they are called, and what their chips can do.

Figures per chip are those of Google's pages as read in November 2026:
docs.cloud.google.com/tpu/docs/v5e, /v5p, /v6e and /tpu7x. They do not give the rate to the host's
memory: it is that of Google's "How to Scale Your Model" (jax-ml.github.io/scaling-book/tpus), 15
GB/s a chip, 32 on v6e. Neither names TPU7x: v6e's rate is taken for it.
"""

import difflib
import math
import os
import re
from dataclasses import dataclass

from flexolmo_jax.errors import UserError


@dataclass(frozen=True)
class Chip:
    """One generation of TPU. Figures are of one chip, but for `usable_gib`, a device's."""

    name: str
    tflops: float  # bfloat16, 10^12 a second
    hbm_gib: float
    usable_gib: float  # by a device's program: the compiler (libtpu 0.0.50) refuses more
    hbm_gbs: float  # 10^9 bytes a second
    ici_gbs: float  # between chips, both directions of all links together
    host_gbs: float  # to the host's memory, and from it: 10^9 bytes a second
    dcn_gbits: float  # between slices, 10^9 bits a second
    dimensions: int  # of the torus
    wraps_at: int  # a dimension of fewer chips is a line, not a ring
    devices: int  # JAX's
    chips_per_host: int  # in slices of several hosts
    accelerator: str  # gcloud and XPK name a slice by this and its number of chips or cores
    cores: int  # as that name counts them for one chip
    single_host: tuple[str, ...]  # slices of one host
    largest: int  # chips of one slice
    kinds: tuple[str, ...]  # what JAX calls its devices

    @property
    def link_gbs(self) -> float:
        """Of one link, in one direction."""
        return self.ici_gbs / (4 * self.dimensions)


CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            name="v5e",
            tflops=197,
            hbm_gib=16,
            usable_gib=15.75,
            hbm_gbs=819,
            ici_gbs=400,
            host_gbs=15,
            dcn_gbits=25,
            dimensions=2,
            wraps_at=16,
            devices=1,
            chips_per_host=4,
            accelerator="v5litepod",
            cores=1,
            single_host=("1x1", "2x2", "2x4"),
            largest=256,
            kinds=("TPU v5e", "TPU v5 lite"),
        ),
        Chip(
            name="v5p",
            tflops=459,
            hbm_gib=95,
            usable_gib=95.73,
            hbm_gbs=2765,
            ici_gbs=1200,
            host_gbs=15,
            dcn_gbits=50,
            dimensions=3,
            wraps_at=4,
            devices=1,
            chips_per_host=4,
            accelerator="v5p",
            cores=2,
            single_host=("2x2x1",),
            largest=6144,
            kinds=("TPU v5p", "TPU v5"),
        ),
        Chip(
            name="v6e",
            tflops=918,
            hbm_gib=32,
            usable_gib=31.24,
            hbm_gbs=1638,
            ici_gbs=800,
            host_gbs=32,
            dcn_gbits=100,
            dimensions=2,
            wraps_at=16,
            devices=1,
            chips_per_host=4,
            accelerator="v6e",
            cores=1,
            single_host=("1x1", "2x2", "2x4"),
            largest=256,
            kinds=("TPU v6e", "TPU v6 lite"),
        ),
        Chip(
            name="tpu7x",
            tflops=2307,
            hbm_gib=192,
            usable_gib=94.74,
            hbm_gbs=7380,
            ici_gbs=1200,
            host_gbs=32,
            dcn_gbits=100,
            dimensions=3,
            wraps_at=4,
            devices=2,
            chips_per_host=4,
            accelerator="tpu7x",
            cores=2,
            single_host=("2x2x1",),
            largest=9216,
            kinds=("TPU7x",),
        ),
    )
}
# What libtpu has to find before JAX is imported, to compile for TPUs on a machine without one. The
# second keeps it from waiting for a metadata server, the third from aborting on another process's
# lock file.
COMPILER_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
}
# How a training step is compiled for TPUs. Rings that overlap a gather with the product it feeds
# move n + 1 shards where n - 1 are needed. libtpu gathers weights again in the backward pass long
# before memory is full, unless it may use all of it. Gathers and scatters overlap with products
# where the SparseCore does them. docs/pods.md has what was compared.
_OFFLOAD = "xla_tpu_enable_sparse_core_collective_offload_"
STEP_OPTIONS = {
    "xla_tpu_enable_windowed_einsum_for_all_gather": "false",
    "xla_tpu_enable_windowed_einsum_for_reduce_scatter": "false",
    "xla_jf_rematerialization_percent_shared_memory_limit": "100",
    **{
        _OFFLOAD + kind: "true"
        for kind in (
            "all_gather",
            "2d_all_gather",
            "3d_all_gather",
            "reduce_scatter",
            "nd_reduce_scatter",
        )
    },
    "xla_tpu_enable_sparse_core_reduce_scatter_v2": "true",
    "xla_tpu_prefer_async_allgather_to_allreduce": "true",  # over a whole torus
}
# Names that products, other interfaces and earlier pages use.
ALIASES = {
    "v5litepod": "v5e",
    "v5lite": "v5e",
    "trillium": "v6e",
    "v7x": "tpu7x",
    "v7": "tpu7x",
    "tpu7": "tpu7x",
    "ironwood": "tpu7x",
}
SHAPES = {  # the common ones, by the torus's dimensions
    2: ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    3: (
        "2x2x1",
        "2x2x2",
        "2x2x4",
        "2x4x4",
        "4x4x4",
        "4x4x8",
        "4x8x8",
        "8x8x8",
        "8x8x16",
        "8x16x16",
        "16x16x16",
        "16x16x24",
    ),
}


@dataclass(frozen=True)
class Slice:
    """A slice of a TPU pod."""

    chip: Chip
    shape: tuple[int, ...]  # chips along each dimension of the torus

    @property
    def name(self) -> str:
        """As the compiler names it: v5p:4x4x4."""
        return f"{self.chip.name}:{self.grid}"

    @property
    def grid(self) -> str:
        return "x".join(map(str, self.shape))

    @property
    def chips(self) -> int:
        return math.prod(self.shape)

    @property
    def devices(self) -> int:
        """As JAX counts them."""
        return self.chips * self.chip.devices

    @property
    def hosts(self) -> int:
        if self.grid in self.chip.single_host:
            return 1
        return math.ceil(self.chips / self.chip.chips_per_host)

    @property
    def accelerator(self) -> str:
        """The accelerator type of gcloud and XPK: v5p-128."""
        return f"{self.chip.accelerator}-{self.chips * self.chip.cores}"


def slice_of(name: str) -> Slice:
    """The slice that "v5p:4x4x4" names. Raises UserError for one that does not exist, with the
    nearest that does."""
    kind, colon, grid = name.strip().lower().partition(":")
    if kind not in CHIPS:
        raise _unknown_type(kind, name)
    chip, shapes = CHIPS[kind], [slice_.grid for slice_ in slices_of(kind)]
    if not colon or not re.fullmatch(r"[1-9][0-9]*(x[1-9][0-9]*)*", grid):
        raise UserError(f"{name!r} is no topology; expected {kind}: and one of {', '.join(shapes)}")
    shape = _numbers(grid)
    is_common = grid in shapes
    if math.prod(shape) > chip.largest or not (is_common or _is_of_cubes(chip, shape)):
        near = _nearest(shape, shapes)
        raise UserError(
            f"there is no slice {name}; the nearest is {kind}:{near}; there are {', '.join(shapes)}"
        )
    return Slice(chip, shape)


def _unknown_type(kind: str, name: str) -> UserError:
    word, *number = re.split(r"[-_ ]", kind)
    if slice_ := _by_accelerator(ALIASES.get(word, word), number):
        unit = "cores" if slice_.chip.cores > 1 else "chips"
        return UserError(
            f"{name!r} names a slice by its number of {unit}; expected its topology, {slice_.name}"
        )
    known = f"expected one of {', '.join(CHIPS)}"
    if re.fullmatch("v[234]", word):
        return UserError(f"{name!r} is of TPU {word}, which is not supported; {known}")
    similar = difflib.get_close_matches(kind, CHIPS, n=1, cutoff=0.3)
    near = ALIASES.get(word) or next(iter(similar), None)
    hint = f"did you mean {near}?" if near else f"{known}."
    example = SHAPES[CHIPS[near or "v5p"].dimensions][4]
    return UserError(
        f"unknown TPU type {kind!r} in {name!r}; {hint} A topology is written like"
        f" {near or 'v5p'}:{example}"
    )


def _by_accelerator(kind: str, number: list[str]) -> Slice | None:
    """The slice that gcloud names by its number of chips or, as v5p-128, of cores."""
    if kind not in CHIPS or len(number) != 1:
        return None
    wanted = f"{CHIPS[kind].accelerator}-{number[0]}"
    return next((one for one in slices_of(kind) if one.accelerator == wanted), None)


def _is_of_cubes(chip: Chip, shape: tuple[int, ...]) -> bool:
    """Whether it is built of whole cubes of 4x4x4, which 3-D slices may be in any number."""
    is_cuboid = chip.dimensions == len(shape) == 3 and list(shape) == sorted(shape)
    return is_cuboid and all(n % 4 == 0 for n in shape)


def _nearest(shape: tuple[int, ...], shapes: list[str]) -> str:
    """The same in the common order, or the one whose number of chips is nearest."""
    in_order = "x".join(map(str, sorted(shape)))
    if in_order in shapes:
        return in_order
    size = math.prod(shape)
    return min(shapes, key=lambda other: abs(math.log(math.prod(_numbers(other)) / size)))


def step_options(platform: str) -> dict[str, str]:
    """Options of the compiler for a training step on devices of this platform, but for those that
    LIBTPU_INIT_ARGS sets."""
    if platform != "tpu":
        return {}
    given = os.environ.get("LIBTPU_INIT_ARGS", "")
    return {name: value for name, value in STEP_OPTIONS.items() if name not in given}


def slices_of(kind: str) -> list[Slice]:
    """The common slices of one type, smallest first."""
    chip = CHIPS[kind]
    return [
        Slice(chip, _numbers(grid))
        for grid in SHAPES[chip.dimensions]
        if math.prod(_numbers(grid)) <= chip.largest
    ]


def _numbers(grid: str) -> tuple[int, ...]:
    return tuple(map(int, grid.split("x")))
