"""Tile sizes for megablox, and the work they cause.

A tile of tokens with two groups in it runs once for each, so a pass over `M` tokens costs up to
`M / tm + E - 1` tiles instead of `M / tm`. A dimension that is no multiple of its tile is padded to
one. Both are reasons for small tiles; bandwidth is the reason for large ones.
"""

from collections.abc import Sequence

import numpy as np

LANES, SUBLANES = 128, 8

Tiling = tuple[int, int, int]  # of the M, K and N dimension, in megablox's order


def gmm_tiling(M: int, K: int, N: int) -> Tiling:
    """For `[M, K] x [E, K, N]`. Double-buffered bfloat16 tiles and accumulator stay below 12 MiB.

    With K in one tile, an expert's matrix stays in VMEM while its tokens pass, so that few tokens a
    tile cost no bandwidth. Tokens are read again for every tile of N: a tile of 512 columns has 512
    operations for each of their bytes, and v6e needs 560 to multiply without waiting. A larger K is
    cut. The matrix is then read for every tile of tokens, so that more tokens a tile mean fewer
    reads.
    """
    if K <= 4096:
        return _tokens(M, 128), K, _wide_tile(N, 512)
    return _tokens(M, 256), _tile(K, 256), _wide_tile(N, 2048)


def tgmm_tiling(M: int, K: int, N: int) -> Tiling:
    """For `[K, M] x [M, N] -> [E, K, N]`."""
    return _tokens(M, 128), _tile(K, 1024), _tile(N, 1024 if K > N else 512)


def executed_tiles(sizes: Sequence[int], tm: int) -> int:
    """Tiles of tokens that a product with these groups runs: all that each group touches."""
    ends = np.cumsum(sizes)
    starts = ends - sizes
    return int(np.sum(np.where(np.asarray(sizes) > 0, -(-ends // tm) - starts // tm, 0)))


def executed_over_ideal(sizes: Sequence[int], D: int, F: int) -> float:
    """Multiplications that megablox runs in a forward and backward pass, over those needed."""
    M = int(np.sum(sizes))
    forward = [(D, F), (D, F), (F, D)]  # K, N of gate, up, down
    backward = [(D, F), (F, D), (F, D)]  # of the gradients in hidden, and in x through gate and up
    outer = [(D, F), (D, F), (F, D)]
    tilings = [(K, N, gmm_tiling(M, K, N)) for K, N in forward + backward]
    tilings += [(K, N, tgmm_tiling(M, K, N)) for K, N in outer]
    executed = sum(
        executed_tiles(sizes, tm) * tm * _padded(K, tk) * _padded(N, tn)
        for K, N, (tm, tk, tn) in tilings
    )
    return executed / (len(tilings) * M * D * F)


def _tile(size: int, largest: int) -> int:
    """The whole dimension if it fits, else the multiple of 128 that pads it least (the largest of
    several)."""
    if size <= largest:
        return size
    return min(range(largest, 0, -LANES), key=lambda tile: _padded(size, tile))


def _wide_tile(size: int, largest: int) -> int:
    """The whole dimension if it fits, else the widest multiple of 128 that pads it by at most
    1/32."""
    if size <= largest:
        return size
    tiles = range(largest, 0, -LANES)
    return next(
        tile for tile in tiles if tile == LANES or 32 * (_padded(size, tile) - size) <= size
    )


def _tokens(M: int, largest: int) -> int:
    # In TPU memory, a tile of bfloat16 has 16 sublanes.
    return min(largest, _padded(max(M, 1), 2 * SUBLANES))


def _padded(size: int, tile: int) -> int:
    return -(-size // tile) * tile
