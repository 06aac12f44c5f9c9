"""Times every Pallas kernel and the sparse MoE layer on the TPU of this machine (`make test-tpu`),
one line a program.

python tests/tpu/time_kernels.py [--only WORD ...] [--out FILE]
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from programs import CASES, experts_and_active, program

from flexolmo_jax.kernels.route import dispatch_plan


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", nargs="+", default=[""], help="programs whose name holds one of these words"
    )
    parser.add_argument("--repetitions", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--d-model", type=int, default=4096)
    parser.add_argument("--d-ffn", type=int, default=11008)
    parser.add_argument("--out", type=Path, help="JSON of every figure")
    options = parser.parse_args()
    device = jax.devices()[0].device_kind
    print(
        f"{device}, jax {jax.__version__}, {options.tokens} tokens, d {options.d_model}, f"
        f" {options.d_ffn}"
    )
    results, failed = {}, 0
    for case in (name for name in CASES if any(word in name for word in options.only)):
        try:
            results[case] = milliseconds(case, options)
            print(f"{case:<20} {results[case]:>9.3f} ms", flush=True)
        except Exception as error:  # the next program may still run
            failed += 1
            print(f"{case:<20} {type(error).__name__}: {str(error).splitlines()[0]}", flush=True)
    if options.out:
        options.out.write_text(
            json.dumps(
                {"device": device, "jax": jax.__version__, "milliseconds": results}, indent=1
            )
            + "\n"
        )
    return 1 if failed or not results else 0


def milliseconds(case: str, options: argparse.Namespace) -> float:
    """The median of some runs, on random numbers and balanced experts."""
    function, shapes = program(case, options.tokens, options.d_model, options.d_ffn)
    arguments = filled(case, shapes)
    run = jax.jit(function)
    jax.block_until_ready(run(*arguments))
    times = []
    for _ in range(options.repetitions):
        start = time.perf_counter()
        jax.block_until_ready(run(*arguments))
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def filled(case: str, shapes: tuple[Any, ...]) -> tuple[Any, ...]:
    """Normal numbers, True, four documents a sequence, and slots and groups that use every expert
    alike."""

    def numbers(shape: jax.ShapeDtypeStruct) -> jax.Array:
        if shape.dtype == jnp.bool:
            return jnp.ones(shape.shape, bool)
        return (0.02 * jax.random.normal(jax.random.key(0), shape.shape)).astype(shape.dtype)

    match case.split("-")[0], shapes:
        case "dispatch_plan", (ids, chosen):
            N, k = ids.shape
            return balanced_ids(N, k, experts_and_active(case)[0]), numbers(chosen)
        case "permute" | "combine", (x, plan):
            (E,), (N, k) = plan.sizes.shape, plan.places.shape
            return numbers(x), dispatch_plan(balanced_ids(N, k, E), jnp.ones((N, k), bool), E)
        case "attention", (*inputs, segments):
            T = segments.shape[1]
            return *map(numbers, inputs), jnp.broadcast_to(
                1 + 4 * jnp.arange(T) // T, segments.shape
            )
        case "expert_ffn", (x, *others, sizes):
            return *map(numbers, (x, *others)), jnp.full(
                sizes.shape, x.shape[0] // sizes.shape[0], jnp.int32
            )
    return tuple(map(numbers, shapes))


def balanced_ids(N: int, k: int, E: int) -> jax.Array:
    return (jnp.arange(N)[:, None] + jnp.arange(k)) % E


if __name__ == "__main__":
    sys.exit(main())
