"""A pair's training step beside the same step with everything trainable, on one CPU thread.

    python benchmarks/pair_step.py --out pair_step.json

d 2048, 4 layers, float32, 2 x 256 tokens: the anchor frozen and one new expert trained, against all
parameters trained. Each runs in a process of its own, so that peak memory is its own, in turns;
times are in CPU seconds and in 2048^3 matmuls of the same process. Beside them stands what is
predicted: matrix products counted from the shapes, and bytes of parameters, gradients and optimiser
state.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from flexolmo_jax.config import ModelConfig, resolve

MODEL = ModelConfig(
    vocab_size=8192, d_model=2048, n_layers=4, n_heads=16, n_kv_heads=16, d_ffn=5504
)
BATCH, LENGTH = 2, 256
MODES = ("pair", "everything")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--turns", type=int, default=2, help="processes of each kind")
    parser.add_argument("--repetitions", type=int, default=3, help="timed steps of a process")
    parser.add_argument(
        "--out", type=Path, help="a JSON file for the figures, with versions and machine"
    )
    # a process for one of them
    parser.add_argument("--mode", choices=MODES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.mode:
        print(json.dumps(measure(options.mode, options.repetitions)))
        return

    runs: dict[str, list[dict[str, float]]] = {mode: [] for mode in MODES}
    for _ in range(options.turns):
        for mode in MODES:
            runs[mode].append(in_process(mode, options.repetitions))
    best = {
        mode: {key: min(run[key] for run in runs[mode]) for key in runs[mode][0]} for mode in MODES
    }
    counted = {mode: count(mode)._asdict() for mode in MODES}
    print(
        f"{'':<12} {'CPU s':>8} {'matmuls':>8} {'peak GB':>8} {'counted TFLOP':>14}"
        f" {'counted GB':>11}"
    )
    for mode in MODES:
        row, ideal = best[mode], counted[mode]
        print(
            f"{mode:<12} {row['cpu_s']:>8.2f} {row['matmuls']:>8.1f}"
            f" {row['peak_bytes'] / 1e9:>8.2f} {ideal['flops'] / 1e12:>14.3f}"
            f" {ideal['state_bytes'] / 1e9:>11.2f}"
        )
    measured = [
        best["pair"][key] / best["everything"][key] for key in ("cpu_s", "matmuls", "peak_bytes")
    ]
    predicted = [
        counted["pair"][key] / counted["everything"][key] for key in ("flops", "state_bytes")
    ]
    print(
        f"{'ratio':<12} {measured[0]:>8.2f} {measured[1]:>8.2f} {measured[2]:>8.2f}"
        f" {predicted[0]:>14.2f} {predicted[1]:>11.2f}"
    )
    if options.out:
        import timing  # brings torch, whose memory is not a step's

        options.out.write_text(
            json.dumps(
                {"machine": timing.machine(), "measured": best, "counted": counted}, indent=1
            )
            + "\n"
        )


class Counted(NamedTuple):
    flops: float  # of the products of one step
    state_bytes: float  # float32 parameters, and gradients and two moments of what is trained


def count(
    mode: str, model: ModelConfig = MODEL, batch: int = BATCH, length: int = LENGTH
) -> Counted:
    """Multiplications of a product count as two operations. The layers are one scanned program: the
    gradient in what enters a layer is computed for the first one too, where a pair needs it only in
    the expert's hidden units."""
    D, F, L, V = model.d_model, model.d_ffn, model.n_layers, model.vocab_size
    attention, expert, head = 4 * D * D, 3 * D * F, D * V
    scores = D * length  # two products with, on average, half of the keys
    forward = L * (attention + scores + 2 * expert) + head
    gradient_of_inputs = forward + L * scores  # of both factors of the scores' products
    weights = {"pair": L * expert, "everything": L * (attention + 2 * expert) + head}[mode]
    parameters = L * (attention + 2 * expert) + 2 * head
    trained = {"pair": L * expert, "everything": parameters}[mode]
    return Counted(
        2 * batch * length * (forward + gradient_of_inputs + weights), 4 * parameters + 12 * trained
    )


def in_process(mode: str, repetitions: int) -> dict[str, float]:
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, __file__, "--mode", mode, "--repetitions", str(repetitions)]
    return json.loads(
        subprocess.run(
            command, env=environment, check=True, stdout=subprocess.PIPE, text=True
        ).stdout
    )


def measure(mode: str, repetitions: int) -> dict[str, float]:
    """The best CPU seconds of a step and of a matmul, and the peak of resident memory while steps
    run, on one core."""
    os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
    import jax
    import jax.numpy as jnp
    import numpy as np

    from flexolmo_jax.model import init_params
    from flexolmo_jax.model.tree import partition
    from flexolmo_jax.train.optimizer import make_optimizer
    from flexolmo_jax.train.state import TrainState
    from flexolmo_jax.train.step import make_step

    run = resolve(
        {
            "run": "pair",
            "pair": {"anchor": "-", "name": "new"},
            "data": {"train": [{"path": "-"}], "batch_size": BATCH, "seq_len": LENGTH},
        }
    )
    optimizer = make_optimizer(run.optim, run.train.steps)
    params = jax.jit(lambda key: init_params(MODEL, key, pair=True))(jax.random.key(0))
    trained, frozen = partition(
        params, lambda path: mode == "everything" or path.startswith("expert/")
    )
    state = TrainState(trained, jax.jit(optimizer.init)(trained))
    del params, trained
    rng = np.random.default_rng(0)
    batch = {
        "tokens": jnp.asarray(rng.integers(1, MODEL.vocab_size, (BATCH, LENGTH)), jnp.int32),
        "segments": jnp.ones((BATCH, LENGTH), jnp.int32),
        "targets": jnp.ones((BATCH, LENGTH), bool),
        "expert": jnp.ones(BATCH, jnp.int32),
        "expert_weight": jnp.ones(BATCH),
    }
    step = make_step(MODEL, run, optimizer)
    square = jnp.ones((2048, 2048))
    multiply = jax.jit(jnp.matmul)

    def matmul() -> None:
        jax.block_until_ready(multiply(square, square))

    def one_step() -> None:
        nonlocal state
        state, metrics = step(state, frozen, batch, 1)
        jax.block_until_ready((state, metrics))

    for function in (matmul, one_step):
        function()  # compiles
    Path("/proc/self/clear_refs").write_text("5")  # peak memory from here on
    seconds: dict[str, list[float]] = {"step": [], "matmul": []}
    for _ in range(repetitions):
        for name, function in (("step", one_step), ("matmul", matmul)):
            start = time.process_time()
            function()
            seconds[name].append(time.process_time() - start)
    peak = next(
        int(line.split()[1]) * 1024
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmHWM")
    )
    step_s, matmul_s = min(seconds["step"]), min(seconds["matmul"])
    return {"cpu_s": step_s, "matmuls": step_s / matmul_s, "peak_bytes": peak}


if __name__ == "__main__":
    main()
