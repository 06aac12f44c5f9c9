"""Tile sizes for megablox, and the work they cause.

A tile of rows that straddles two groups runs once for each, so a pass over `M` rows costs up to `M
/ tm + E - 1` tiles instead of `M / tm`; and a dimension that is no multiple of its tile is
multiplied as if it were. Both argue for small tiles, bandwidth for large.
"""

from collections.abc import Sequence

import numpy as np

LANES, SUBLANES = 128, 8

Tiling = tuple[int, int, int]  # of the M, K and N dimension, in megablox's order


def gmm_tiling(M: int, K: int, N: int) -> Tiling:
    """For `[M, K] x [E, K, N]`. In bfloat16 double-buffered tiles and the accumulator stay below 12
    MiB.

    With K in one tile, a group's weights stay in VMEM while its rows pass, so few rows a tile cost
    no bandwidth. A larger K is cut: then the weights are read once for every tile of rows, and more
    rows a tile save that.
    """
    if K <= 4096:
        return _rows(M, 128), K, _tile(N, 256)
    return _rows(M, 256), _tile(K, 256), _tile(N, 1024)


def tgmm_tiling(M: int, K: int, N: int) -> Tiling:
    """For `[K, M] x [M, N] -> [E, K, N]`."""
    return _rows(M, 128), _tile(K, 1024), _tile(N, 1024 if K > N else 512)


def executed_tiles(sizes: Sequence[int], tm: int) -> int:
    """Tiles of rows that a product with these groups runs: all that each group touches."""
    ends = np.cumsum(sizes)
    starts = ends - sizes
    return int(np.sum(np.where(np.asarray(sizes) > 0, -(-ends // tm) - starts // tm, 0)))


def executed_over_ideal(sizes: Sequence[int], D: int, F: int) -> float:
    """Multiplications of megablox in one forward and backward pass of the expert FFN over those
    that the rows need."""
    M = int(np.sum(sizes))
    forward = [(D, F), (D, F), (F, D)]  # K, N of gate, up, down
    backward = [(D, F), (F, D), (F, D)]  # of the gradients in hidden, and in x through gate and up
    outer = [(D, F), (D, F), (F, D)]
    tilings = [(K, N, gmm_tiling(M, K, N)) for K, N in forward + backward] + [
        (K, N, tgmm_tiling(M, K, N)) for K, N in outer
    ]
    executed = sum(
        executed_tiles(sizes, tm) * tm * _padded(K, tk) * _padded(N, tn)
        for K, N, (tm, tk, tn) in tilings
    )
    return executed / (len(tilings) * M * D * F)


def _tile(size: int, largest: int) -> int:
    """The whole dimension if it fits, else the multiple of 128 up to `largest` that pads it least,
    the largest of those."""
    if size <= largest:
        return size
    return min(range(largest, 0, -LANES), key=lambda tile: _padded(size, tile))


def _rows(M: int, largest: int) -> int:
    return min(largest, _padded(max(M, 1), 2 * SUBLANES))  # 16 rows are a tile of bfloat16


def _padded(size: int, tile: int) -> int:
    return -(-size // tile) * tile
