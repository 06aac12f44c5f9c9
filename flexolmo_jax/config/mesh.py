"""The devices of a run along each axis."""

import dataclasses
import math
from dataclasses import dataclass

from flexolmo_jax.errors import UserError

from .section import Section, expect


@dataclass(frozen=True)
class MeshConfig(Section):
    """Devices along each axis; -1 (one axis at most) takes what is left."""

    at = "mesh"

    data: int = 1
    fsdp: int = -1
    tensor: int = 1
    expert: int = 1

    def check(self) -> None:
        sizes = dataclasses.astuple(self)
        are_sizes = all(n == -1 or n > 0 for n in sizes)
        expect(are_sizes, "mesh", sizes, "positive numbers, or -1 for what is left")
        expect(sizes.count(-1) <= 1, "mesh", sizes, "-1 on one axis at most")

    def sizes(self, devices: int, slices: int = 1) -> dict[str, int]:
        """Devices along each axis when there are this many in all; -1 resolved.

        Raises UserError for a mesh that is larger, one with -1 that does not divide them, and one
        whose data axis does not span the slices.
        """
        sizes = dataclasses.asdict(self)
        named = math.prod(n for n in sizes.values() if n != -1)
        shown = " x ".join(f"{axis} {n}" for axis, n in sizes.items())
        if -1 in sizes.values():
            if devices % named:
                raise UserError(
                    f"mesh {shown} does not divide {devices} devices; make the product of its axes"
                    " a divisor"
                )
            sizes = {axis: devices // named if n == -1 else n for axis, n in sizes.items()}
        elif named > devices:
            raise UserError(
                f"mesh {shown} needs {named} devices; got {devices}; make the axes smaller"
            )
        if sizes["data"] % slices:
            raise UserError(
                f"mesh.data is {sizes['data']}; expected a multiple of {slices}, the number of"
                " slices, over which it runs"
            )
        return sizes
