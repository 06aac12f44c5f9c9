"""TPU slices: what they are called, and what their chips can do.

Figures per chip are those of Google's pages as read in November 2026:
docs.cloud.google.com/tpu/docs/v5e, /v5p, /v6e and /tpu7x.
"""

import difflib
import math
import os
import re
from dataclasses import dataclass

from flexolmo_jax.errors import UserError


@dataclass(frozen=True)
class Chip:
    """One generation of TPU; every figure but one is of one chip."""

    name: str
    tflops: float  # bfloat16, 10^12 a second
    hbm_gib: float
    # of it, by a device's program: what the compiler (libtpu 0.0.50) refuses to exceed
    usable_gib: float
    hbm_gbs: float  # 10^9 bytes a second
    ici_gbs: float  # between chips, both directions of all links together
    dcn_gbits: float  # between slices, 10^9 bits a second
    dimensions: int  # of the torus
    wraps_at: int  # a dimension of fewer chips is a line, not a ring
    devices: int  # JAX's
    chips_per_host: int  # of a slice of several hosts
    accelerator: str  # how gcloud and XPK name a slice: this, and its number of chips or cores
    cores: int  # that this name counts for a chip
    single_host: tuple[str, ...]  # slices of one host
    largest: int  # chips
    kinds: tuple[str, ...]  # what JAX calls its devices

    @property
    def link_gbs(self) -> float:
        """Of one link, in one direction."""
        return self.ici_gbs / (4 * self.dimensions)


CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            "v5e",
            197,
            16,
            15.75,
            819,
            400,
            25,
            2,
            16,
            1,
            4,
            "v5litepod",
            1,
            ("1x1", "2x2", "2x4"),
            256,
            ("TPU v5e", "TPU v5 lite"),
        ),
        Chip(
            "v5p",
            459,
            95,
            95.73,
            2765,
            1200,
            50,
            3,
            4,
            1,
            4,
            "v5p",
            2,
            ("2x2x1",),
            6144,
            ("TPU v5p", "TPU v5"),
        ),
        Chip(
            "v6e",
            918,
            32,
            31.24,
            1638,
            800,
            100,
            2,
            16,
            1,
            4,
            "v6e",
            1,
            ("1x1", "2x2", "2x4"),
            256,
            ("TPU v6e", "TPU v6 lite"),
        ),
        Chip(
            "tpu7x",
            2307,
            192,
            94.74,
            7380,
            1200,
            100,
            3,
            4,
            2,
            4,
            "tpu7x",
            2,
            ("2x2x1",),
            9216,
            ("TPU7x",),
        ),
    )
}
# What libtpu has to find before JAX is imported, to compile for TPUs where there is none. Without
# the second it waits for a metadata server that is not there; without the third two processes abort
# on a lock file.
COMPILER_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
}
# How a training step is compiled for TPUs. Rings that overlap a gather with the product it feeds
# move n + 1 shards where n - 1 are needed; and libtpu gathers weights anew in the backward pass
# long before memory is full, unless it may use all of it.
STEP_OPTIONS = {
    "xla_tpu_enable_windowed_einsum_for_all_gather": "false",
    "xla_tpu_enable_windowed_einsum_for_reduce_scatter": "false",
    "xla_jf_rematerialization_percent_shared_memory_limit": "100",
}
# The names of marketing, of other interfaces and of earlier pages.
ALIASES = {
    "v5litepod": "v5e",
    "v5lite": "v5e",
    "trillium": "v6e",
    "v7x": "tpu7x",
    "v7": "tpu7x",
    "tpu7": "tpu7x",
    "ironwood": "tpu7x",
}
SHAPES = {
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
        return (
            1 if self.grid in self.chip.single_host else -(-self.chips // self.chip.chips_per_host)
        )

    @property
    def accelerator(self) -> str:
        """The accelerator type of gcloud and XPK: v5p-128."""
        return f"{self.chip.accelerator}-{self.chips * self.chip.cores}"


def slice_of(name: str) -> Slice:
    """The slice that "v5p:4x4x4" names. Raises UserError for one that does not exist, with the
    nearest that does."""
    kind, colon, grid = name.strip().lower().partition(":")
    if kind not in CHIPS:
        by_other_name = ALIASES.get(re.split(r"[-_ ]", kind)[0])
        near = by_other_name or next(
            iter(difflib.get_close_matches(kind, CHIPS, n=1, cutoff=0.3)), None
        )
        hint = f"did you mean {near}?" if near else f"expected one of {', '.join(CHIPS)}"
        example = SHAPES[CHIPS[near or "v5p"].dimensions][4]
        raise UserError(
            f"unknown TPU type {kind!r} in {name!r}; {hint} A topology is written like"
            f" {near or 'v5p'}:{example}"
        )
    chip = CHIPS[kind]
    shapes = [
        shape for shape in SHAPES[chip.dimensions] if math.prod(_numbers(shape)) <= chip.largest
    ]
    if not colon or not re.fullmatch(r"[1-9][0-9]*(x[1-9][0-9]*)*", grid):
        raise UserError(f"{name!r} is no topology; expected {kind}: and one of {', '.join(shapes)}")
    shape = _numbers(grid)
    # 3-D slices are also built of any number of cubes of 4x4x4.
    of_cubes = (
        chip.dimensions == len(shape) == 3
        and all(n % 4 == 0 for n in shape)
        and list(shape) == sorted(shape)
    )
    if math.prod(shape) > chip.largest or not (grid in shapes or of_cubes):
        order = "x".join(map(str, sorted(shape)))
        near = (
            order
            if order in shapes
            else min(
                shapes,
                key=lambda other: abs(math.log(math.prod(_numbers(other)) / math.prod(shape))),
            )
        )
        raise UserError(
            f"there is no slice {name}; the nearest is {kind}:{near}; there are {', '.join(shapes)}"
        )
    return Slice(chip, shape)


def step_options(platform: str) -> dict[str, str]:
    """Options of the compiler for a training step on devices of this platform; what
    LIBTPU_INIT_ARGS names is left as it says."""
    said = os.environ.get("LIBTPU_INIT_ARGS", "")
    return {
        name: value
        for name, value in STEP_OPTIONS.items()
        if platform == "tpu" and name not in said
    }


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
