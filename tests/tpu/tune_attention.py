"""Times blocks of splash attention, forward and backward, on the TPU of this machine, and writes
the fastest into flexolmo_jax/kernels/attention/tuned.py (`make tune-tpu`).

    python tests/tpu/tune_attention.py [--lengths N ...] [--repetitions N]

It takes the heads of OLMo 2 7B: how many there are changes the time and not which blocks are best.
"""

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import jax
import jax.numpy as jnp

from flexolmo_jax.kernels.attention import attention, tuned
from flexolmo_jax.kernels.attention.shapes import OLMO2_7B, Shape
from flexolmo_jax.kernels.attention.tuned import Blocks

SIZES = (256, 512, 1024, 2048)
CANDIDATES = [Blocks(*each) for each in itertools.product(SIZES, SIZES, (False, True))]
Key = tuple[str, int, int]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096], help="of records")
    parser.add_argument("--repetitions", type=int, default=10)
    options = parser.parse_args()
    device = jax.devices()[0]
    if device.platform != "tpu":
        sys.exit(f"the device is a {device.platform}; expected a TPU, whose attention is timed")

    def timed(shape: Shape, blocks: Blocks) -> float:
        jax.clear_caches()  # or JAX takes the kernel that it traced with other blocks
        tuned.BLOCKS[device.device_kind, shape.length, shape.head_size] = blocks
        return milliseconds(shape, options.repetitions)

    before = dict(tuned.BLOCKS)
    shapes = [OLMO2_7B._replace(length=length) for length in options.lengths]
    write(before | tuned_for(device.device_kind, shapes, timed), Path(tuned.__file__))
    return 0


def tuned_for(
    kind: str, shapes: Iterable[Shape], milliseconds: Callable[[Shape, Blocks], float]
) -> dict[Key, Blocks]:
    """The fastest blocks for the length and the size of head of each shape. Prints every time."""
    table = {}
    for shape in shapes:
        times = {}
        for blocks in CANDIDATES:
            try:
                times[blocks] = milliseconds(shape, blocks)
                print(f"{shape} {blocks} {times[blocks]:.3f} ms", flush=True)
            except Exception as error:  # such as blocks that do not fit; the next ones may
                print(f"{shape} {blocks} {type(error).__name__}: {error}".splitlines()[0])
        table[kind, shape.length, shape.head_size] = min(times, key=lambda blocks: times[blocks])
    return table


def milliseconds(shape: Shape, repetitions: int) -> float:
    """The median of some runs over records of four documents."""
    B, T, H, K, C = shape
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (
        jax.random.normal(key, (B, T, heads, C), jnp.bfloat16)
        for key, heads in zip(keys, (H, K, K), strict=True)
    )
    segments = jnp.broadcast_to(1 + 4 * jnp.arange(T) // T, (B, T))

    def total(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        out = attention(q, k, v, segments=segments, implementation="splash")
        return jnp.sum(jnp.square(out.astype(jnp.float32)))

    run = jax.jit(jax.grad(total, argnums=(0, 1, 2)))
    jax.block_until_ready(run(q, k, v))
    times = []
    for _ in range(repetitions):
        start = time.perf_counter()
        jax.block_until_ready(run(q, k, v))
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def write(table: dict[Key, Blocks], file: Path) -> None:
    """Replaces the table in the module."""
    head, name, _ = file.read_text().partition("BLOCKS: dict[tuple[str, int, int], Blocks] = {")
    lines = [f'    ("{kind}", {T}, {C}): {blocks},' for (kind, T, C), blocks in table.items()]
    file.write_text(head + name + "\n".join(["", *lines]) + "\n}\n")


if __name__ == "__main__":
    sys.exit(main())
