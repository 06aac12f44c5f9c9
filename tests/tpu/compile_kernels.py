"""Compiles every Pallas kernel and the sparse MoE layer for real TPU slices, on a machine without
one (`make test-tpu-compile`).

    python tests/tpu/compile_kernels.py [--only WORD ...] [--topology NAME ...] [--out FILE]

The compiler is libtpu's own: it refuses what does not fit into VMEM or HBM, bad tilings and
operations that a core lacks. Each case is a process of its own under a time limit, because a bad
tiling can compile for minutes. Nothing is run.
"""

import argparse
import base64
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from programs import CASES
from traffic import hbm_bytes

from flexolmo_jax.runtime.tpus import COMPILER_ENVIRONMENT

TOPOLOGIES = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")
LIMIT_S = 600
# temporaries of the experts' forward and backward pass, in arrays [N k, F] of bfloat16: they grow
# with slots, not with E
LIMIT_ARRAYS = 9


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", nargs="+", default=[""], help="cases whose name holds one of these words"
    )
    parser.add_argument("--topology", nargs="+", default=TOPOLOGIES)
    parser.add_argument("--out", type=Path, help="JSON of every figure")
    parser.add_argument("--case", help=argparse.SUPPRESS)  # in a process of its own
    options = parser.parse_args()
    if options.case:
        print(json.dumps(compile_case(options.case, options.topology[0])))
        return 0
    results = []
    for topology in options.topology:
        for case in (name for name in CASES if any(word in name for word in options.only)):
            result = {"topology": topology, "case": case} | in_a_process(case, topology)
            results.append(result)
            print("  ".join(f"{key} {value}" for key, value in result.items()), flush=True)
    if options.out:
        options.out.write_text(json.dumps(results, indent=1) + "\n")
    failed = sum("error" in result for result in results)
    print(f"{len(results) - failed} of {len(results)} compiled")
    return 1 if failed or not results else 0


def in_a_process(case: str, topology: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--case", case, "--topology", topology]
    try:
        done = subprocess.run(
            command,
            env=os.environ | COMPILER_ENVIRONMENT,
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"not compiled after {LIMIT_S} s"}
    if done.returncode:
        return {
            "error": next(
                (line for line in reversed(done.stderr.splitlines()) if "Error" in line),
                done.stderr[-300:],
            )
        }
    return json.loads(done.stdout.splitlines()[-1])


def compile_case(case: str, topology: str) -> dict[str, Any]:
    """Seconds, GiB of arguments and temporaries, MB moved in and out of HBM, and how many Mosaic
    kernels and sorts the program holds."""
    import jax
    from jax.experimental import topologies
    from programs import F, N, experts_and_active, program

    device = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
    function, arguments = program(case)
    sharding = jax.sharding.SingleDeviceSharding(device)
    arguments = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), arguments
    )
    # Kernels ask which TPU they are traced for.
    mesh = jax.sharding.Mesh([device], "x").abstract_mesh
    start = time.perf_counter()
    with jax.sharding.use_abstract_mesh(mesh):
        compiled = jax.jit(function).lower(*arguments).compile()
    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None and text is not None
    if case.startswith(("expert_ffn", "moe_layer")):
        arrays = memory.temp_size_in_bytes / (2 * N * experts_and_active(case)[1] * F)
        assert arrays <= LIMIT_ARRAYS, (
            f"AssertionError: temporaries fill {arrays:.1f} arrays [N k, F]; expected at most"
            f" {LIMIT_ARRAYS}"
        )
    if case.startswith("expert_ffn") and jax.__version_info__ >= (0, 12):  # ragged_dot's, not ours
        narrow = [kind for kind in accumulators(text) if kind != "f32"]
        assert not narrow, f"AssertionError: products accumulate in {narrow}; expected float32"
    return {
        "seconds": round(time.perf_counter() - start, 1),
        "arguments_gib": round(memory.argument_size_in_bytes / 2**30, 3),
        "temporaries_gib": round(memory.temp_size_in_bytes / 2**30, 3),
        "hbm_mb": round(hbm_bytes(text) / 1e6),
        "sorts": len(re.findall(r" sort\(", text)),
        "kernels": text.count('custom_call_target="tpu_custom_call"'),
    }


def accumulators(hlo: str) -> list[str]:
    """What the Mosaic kernels of a compiled program multiply into."""
    from jax._src.interpreters.mlir import make_ir_context  # no public name knows all dialects
    from jaxlib.mlir import ir
    from jaxlib.mosaic.python import tpu

    found = []
    for body in re.findall(r'"body":"([^"]+)"', hlo):
        with make_ir_context() as context:
            tpu.register_dialect(context)
            kernel = str(ir.Module.parse(base64.b64decode(body)))
        found += re.findall(r"tpu\.matmul .*-> vector<(?:\d+x)*(\w+)>", kernel)
    assert found, "AssertionError: no kernel multiplies"
    return found


if __name__ == "__main__":
    sys.exit(main())
