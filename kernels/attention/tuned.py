"""Blocks of splash attention that were measured to be the fastest: what `make tune-tpu` writes."""

from typing import NamedTuple


class Blocks(NamedTuple):
    """Sizes divide the length."""

    q: int  # queries of a block
    kv: int  # keys and values of a block
    fused: bool  # one kernel for the whole backward pass instead of two


# By the kind of TPU, as JAX calls it, the length of records and the size of a head. Where nothing
# was measured, `pallas_tpu` takes the largest blocks up to 512, not fused.
BLOCKS: dict[tuple[str, int, int], Blocks] = {}
