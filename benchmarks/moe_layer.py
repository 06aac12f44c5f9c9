"""One sparse MoE layer (router and experts) beside Hugging Face's FlexOlmo block on torch, on one CPU thread each.

    python benchmarks/moe_layer.py --out moe_layer.json

T = 2048 tokens, d 512, f 1376, float32, E experts, k active: forward, and forward + backward in the input and every weight, with the
same weights and input; outputs and gradients are compared first. The two take turns in one process. Given are CPU seconds, the best
of several repetitions (another load on the machine only ever adds), and the same in units of the CPU seconds that the library's own
2048^3 matmul took in the same turns. torch runs its honest best, `experts_implementation="grouped_mm"`.
"""

import os

# Read when the backend starts: one thread for both, or CPU seconds count threads that wait.
os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false " + os.environ.get("XLA_FLAGS", "")
os.environ["JAX_PLATFORMS"] = "cpu"

import argparse
import datetime
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from flax import nnx
from transformers.models.flex_olmo.configuration_flex_olmo import FlexOlmoConfig
from transformers.models.flex_olmo.modeling_flex_olmo import FlexOlmoSparseMoeBlock

from flexolmo_jax.config import ModelConfig
from flexolmo_jax.model.moe import Experts, mixture

CASES = [(2, 2), (8, 2), (8, 5), (32, 2), (32, 5)]  # experts, active
SQUARE = 2048


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--d-model", type=int, default=512)
    parser.add_argument("--d-ffn", type=int, default=1376)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--out", type=Path, help="a JSON file for the figures, with versions and machine")
    options = parser.parse_args()
    torch.set_num_threads(1)

    results = []
    print(f"{'E':>3} {'k':>2}  {'pass':<16} {'here, s':>8} {'torch, s':>8} {'ratio':>6} {'here, matmuls':>14} {'torch, matmuls':>15}")
    for experts, active in CASES:
        for result in measure(experts, active, options):
            results.append(result)
            here, there = result["here"], result["torch"]
            print(
                f"{experts:>3} {active:>2}  {result['pass']:<16} {here['cpu_s']:>8.3f} {there['cpu_s']:>8.3f} "
                f"{here['cpu_s'] / there['cpu_s']:>6.2f} {here['matmuls']:>14.2f} {there['matmuls']:>15.2f}",
                flush=True,
            )
    if options.out:
        options.out.write_text(json.dumps({"machine": machine(), "results": results}, indent=1) + "\n")


def measure(experts: int, active: int, options: argparse.Namespace) -> list[dict]:
    """Both passes of both libraries, in turns."""
    here, here_square = in_jax(experts, active, options.d_model, options.d_ffn)
    there, there_square = in_torch(experts, active, options.d_model, options.d_ffn)
    rng = np.random.default_rng(0)
    shape = (1, options.tokens, options.d_model)
    x, dy = (rng.standard_normal(shape).astype(np.float32) for _ in range(2))
    weights = random_weights(rng, experts, options.d_model, options.d_ffn)
    ours, theirs = here(x, dy, weights), there(x, dy, weights)
    for name, want in theirs["outputs"]().items():
        got = ours["outputs"]()[name]
        error = np.linalg.norm(got - want) / np.linalg.norm(want)
        if not error <= 1e-4:
            raise SystemExit(f"E={experts} k={active}: {name} differs by {error:.1e} of its norm; a comparison of speed would mean nothing")

    results = []
    for name in ("forward", "forward+backward"):
        for function in (here_square, ours[name], there_square, theirs[name]):
            function()  # compiles
        seconds: dict[str, list[float]] = {}
        for _ in range(options.repetitions):
            for key, function in {
                "here_square": here_square,
                "here": ours[name],
                "torch_square": there_square,
                "torch": theirs[name],
            }.items():
                seconds.setdefault(key, []).append(cpu_seconds(function))
        best = {key: min(values) for key, values in seconds.items()}
        sides = {side: {"cpu_s": best[side], "matmuls": best[side] / best[f"{side}_square"]} for side in ("here", "torch")}
        results.append({"experts": experts, "active": active, "pass": name, "repetitions": options.repetitions} | sides)
    return results


def in_jax(experts: int, active: int, d_model: int, d_ffn: int):
    """A function that gives this library's passes for an input, an output gradient and weights; and its matmul."""
    config = ModelConfig(d_model=d_model, d_ffn=d_ffn, n_experts=experts, n_active=active)
    graph = nnx.graphdef(nnx.eval_shape(lambda: Experts(config, experts, has_bias=False, rngs=nnx.Rngs(0))))
    allowed = jnp.ones(experts, bool)

    def layer(weights: dict, x: jax.Array) -> jax.Array:
        group = nnx.merge(graph, nnx.State({name: nnx.Param(value) for name, value in weights.items()}))
        return mixture(x, (group,), active, allowed)[0]

    forward = jax.jit(layer)

    @jax.jit
    def backward(weights, x, dy):
        y, pullback = jax.vjp(layer, weights, x)
        return y, pullback(dy)

    def passes(x, dy, weights):
        x, dy, weights = jax.tree.map(jnp.asarray, (x, dy, weights))

        def outputs():
            y, (dweights, dx) = backward(weights, x, dy)
            return {"output": np.asarray(y), "gradient of x": np.asarray(dx)} | {
                f"gradient of {name}": np.asarray(dweights[name]) for name in ("gate", "up", "down", "row")
            }

        return {
            "outputs": outputs,
            "forward": lambda: jax.block_until_ready(forward(weights, x)),
            "forward+backward": lambda: jax.block_until_ready(backward(weights, x, dy)),
        }

    square = jnp.ones((SQUARE, SQUARE))
    multiply = jax.jit(jnp.matmul)
    return passes, lambda: jax.block_until_ready(multiply(square, square))


def in_torch(experts: int, active: int, d_model: int, d_ffn: int):
    """As `in_jax`, for the block of transformers."""
    config = FlexOlmoConfig(
        hidden_size=d_model, intermediate_size=d_ffn, num_experts=experts, num_experts_per_tok=active, norm_topk_prob=False
    )
    config._experts_implementation = "grouped_mm"
    block = FlexOlmoSparseMoeBlock(config)

    def passes(x, dy, weights):
        with torch.no_grad():
            block.gate.weight.copy_(torch.from_numpy(weights["row"]))
            fused = np.concatenate([weights["gate"], weights["up"]], axis=2).swapaxes(1, 2)
            block.experts.gate_up_proj.copy_(torch.from_numpy(fused.copy()))
            block.experts.down_proj.copy_(torch.from_numpy(weights["down"].swapaxes(1, 2).copy()))
        x, dy = torch.from_numpy(x).requires_grad_(), torch.from_numpy(dy)

        def forward():
            with torch.no_grad():
                block(x)

        def backward():
            block.zero_grad(set_to_none=True)
            x.grad = None
            y = block(x)
            y.backward(dy)
            return y

        def outputs():
            y = backward()
            gate, up = block.experts.gate_up_proj.grad.transpose(1, 2).chunk(2, dim=2)  # pyright: ignore[reportOptionalMemberAccess]
            found = {"output": y, "gradient of x": x.grad, "gradient of gate": gate, "gradient of up": up}
            found |= {"gradient of down": block.experts.down_proj.grad.transpose(1, 2), "gradient of row": block.gate.weight.grad}  # pyright: ignore[reportOptionalMemberAccess]
            return {name: tensor.detach().numpy() for name, tensor in found.items()}  # pyright: ignore[reportOptionalMemberAccess]

        return {"outputs": outputs, "forward": forward, "forward+backward": backward}

    square = torch.ones(SQUARE, SQUARE)
    return passes, lambda: square @ square


def random_weights(rng: np.random.Generator, experts: int, d_model: int, d_ffn: int) -> dict[str, np.ndarray]:
    """Matrices and router rows that keep the scale of what they multiply; every expert is used."""
    D, F = d_model, d_ffn
    shapes = {"row": (experts, D), "gate": (experts, D, F), "up": (experts, D, F), "down": (experts, F, D)}
    fan_in = {"row": D, "gate": D, "up": D, "down": F}
    return {name: (rng.standard_normal(shape) / fan_in[name] ** 0.5).astype(np.float32) for name, shape in shapes.items()}


def cpu_seconds(function: Callable[[], object]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def machine() -> dict[str, str]:
    cpu = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "")
    versions = {"jax": jax.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    return (
        {"cpu": cpu, "cores": str(os.cpu_count()), "python": platform.python_version()}
        | versions
        | {"date": datetime.date.today().isoformat()}
    )


if __name__ == "__main__":
    main()
