"""Few sizes of batches and texts, so that few programs are compiled, and few of them kept.

A program is compiled for one size, in seconds, and takes megabytes. A whole pass costs what its
size does, so it has more sizes than generation, where a prompt is read once.
"""

KEPT = 16  # programs of a function, those that were used last; the others are given back
SHORTEST = 16  # tokens


def power_of_two(size: int, most: int) -> int:
    """The size of a prompt or completion: a power of two, SHORTEST at least."""
    return min(max(SHORTEST, 1 << max(size - 1, 0).bit_length()), most)


def rounded_up(size: int, most: int | None = None) -> int:
    """The size of a batch or of whole texts: 1, 2, 3, 4, 6, 8, 12, 16, 24, ... and `most`."""
    quarter = max(1, (1 << (size - 1).bit_length()) // 4)
    rounded = -(-size // quarter) * quarter
    return rounded if most is None else max(size, min(rounded, most))
