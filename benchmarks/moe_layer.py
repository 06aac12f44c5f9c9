"""One sparse MoE layer (router and experts) beside Hugging Face's FlexOlmo block on torch, on one
CPU thread each.

    python benchmarks/moe_layer.py --out moe_layer.json

T = 2048 tokens, d 512, f 1376, float32, E experts, k active: forward, and forward + backward in the
input and every weight, with the same weights and input; outputs and gradients are compared first.
How it is timed is said in timing.py. torch runs its honest best,
`experts_implementation="grouped_mm"`.
"""

import timing  # isort: skip  (before jax)

import argparse
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from transformers.models.flex_olmo.configuration_flex_olmo import FlexOlmoConfig
from transformers.models.flex_olmo.modeling_flex_olmo import FlexOlmoSparseMoeBlock

from flexolmo_jax.config import ModelConfig
from flexolmo_jax.model.moe import Choices, Experts, mixture

CASES = [(2, 2), (8, 2), (8, 5), (32, 2), (32, 5)]  # experts, active


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--d-model", type=int, default=512)
    parser.add_argument("--d-ffn", type=int, default=1376)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument(
        "--out", type=Path, help="a JSON file for the figures, with versions and machine"
    )
    options = parser.parse_args()

    results = []
    print(f"{'E':>3} {'k':>2}  {'pass':<16} {timing.HEADER}")
    for experts, active in CASES:
        for result in measure(experts, active, options):
            results.append(result)
            print(
                f"{experts:>3} {active:>2}  {result['pass']:<16} {timing.row(result)}", flush=True
            )
    if options.out:
        options.out.write_text(
            json.dumps({"machine": timing.machine(), "results": results}, indent=1) + "\n"
        )


def measure(experts: int, active: int, options: argparse.Namespace) -> list[dict]:
    """Both passes of both libraries, in turns."""
    shape = (experts, active, options.tokens, options.d_model, options.d_ffn)
    sides = {"here": timing.Worker(in_jax, *shape), "torch": timing.Worker(in_torch, *shape)}
    (ours, _), (theirs, _) = (worker.call("outputs") for worker in sides.values())
    for name, want in theirs.items():
        error = np.linalg.norm(ours[name] - want) / np.linalg.norm(want)
        if not error <= 1e-4:
            raise SystemExit(
                f"E={experts} k={active}: {name} differs by {error:.1e} of its norm; a comparison"
                " of speed would mean nothing"
            )
    figures = timing.in_turns(sides, ("forward", "forward+backward"), options.repetitions)
    for worker in sides.values():
        worker.close()
    case = {"experts": experts, "active": active}
    return [
        case | {"pass": name, "repetitions": options.repetitions} | result
        for name, result in figures.items()
    ]


def in_jax(experts: int, active: int, tokens: int, d_model: int, d_ffn: int):
    """This library's passes."""
    config = ModelConfig(d_model=d_model, d_ffn=d_ffn, n_experts=experts, n_active=active)
    graph = nnx.graphdef(
        nnx.eval_shape(lambda: Experts(config, experts, has_bias=False, rngs=nnx.Rngs(0)))
    )
    allowed = jnp.ones(experts, bool)
    x, dy, weights = jax.tree.map(jnp.asarray, random_inputs(experts, tokens, d_model, d_ffn))

    def layer(weights: dict, x: jax.Array) -> jax.Array:
        group = nnx.merge(
            graph, nnx.State({name: nnx.Param(value) for name, value in weights.items()})
        )
        return mixture(x, (group,), Choices(active, allowed))[0]

    forward = jax.jit(layer)

    @jax.jit
    def backward(weights, x, dy):
        y, pullback = jax.vjp(layer, weights, x)
        return y, pullback(dy)

    def outputs():
        y, (dweights, dx) = backward(weights, x, dy)
        return {"output": np.asarray(y), "gradient of x": np.asarray(dx)} | {
            f"gradient of {name}": np.asarray(dweights[name])
            for name in ("gate", "up", "down", "row")
        }

    def run(function, *arguments):
        jax.block_until_ready(function(*arguments))

    return {
        "outputs": outputs,
        "forward": lambda: run(forward, weights, x),
        "forward+backward": lambda: run(backward, weights, x, dy),
        "matmul": timing.jax_matmul(),
    }


def in_torch(experts: int, active: int, tokens: int, d_model: int, d_ffn: int):
    """The same of the block of transformers."""
    config = FlexOlmoConfig(
        hidden_size=d_model,
        intermediate_size=d_ffn,
        num_experts=experts,
        num_experts_per_tok=active,
        norm_topk_prob=False,
    )
    config._experts_implementation = "grouped_mm"
    block: Any = FlexOlmoSparseMoeBlock(config)  # its parts are modules and parameters
    inputs, dy, weights = random_inputs(experts, tokens, d_model, d_ffn)
    with torch.no_grad():
        block.gate.weight.copy_(torch.from_numpy(weights["row"]))
        fused = np.concatenate([weights["gate"], weights["up"]], axis=2).swapaxes(1, 2)
        block.experts.gate_up_proj.copy_(torch.from_numpy(fused.copy()))
        block.experts.down_proj.copy_(torch.from_numpy(weights["down"].swapaxes(1, 2).copy()))
    x, dy = torch.from_numpy(inputs).requires_grad_(), torch.from_numpy(dy)

    def forward() -> None:
        with torch.no_grad():
            block(x)

    def backward() -> torch.Tensor:
        block.zero_grad(set_to_none=True)
        x.grad = None
        y = block(x)
        y.backward(dy)
        return y

    def run_backward() -> None:
        backward()

    def outputs():
        y = backward()
        gate, up = block.experts.gate_up_proj.grad.transpose(1, 2).chunk(2, dim=2)
        found = {
            "output": y,
            "gradient of x": x.grad,
            "gradient of gate": gate,
            "gradient of up": up,
        }
        found |= {
            "gradient of down": block.experts.down_proj.grad.transpose(1, 2),
            "gradient of row": block.gate.weight.grad,
        }
        return {name: tensor.detach().numpy() for name, tensor in found.items()}

    return {
        "outputs": outputs,
        "forward": forward,
        "forward+backward": run_backward,
        "matmul": timing.torch_matmul(),
    }


def random_inputs(
    experts: int, tokens: int, d_model: int, d_ffn: int
) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Activations [1, T, D], the gradient of the output, and weights: matrices and router rows that
    keep the scale of what they multiply, with every expert in use."""
    rng = np.random.default_rng(0)
    D, F = d_model, d_ffn
    x, dy = (rng.standard_normal((1, tokens, D)).astype(np.float32) for _ in range(2))
    shapes = {
        "row": (experts, D),
        "gate": (experts, D, F),
        "up": (experts, D, F),
        "down": (experts, F, D),
    }
    fan_in = {"row": D, "gate": D, "up": D, "down": F}
    return (
        x,
        dy,
        {
            name: (rng.standard_normal(shape) / fan_in[name] ** 0.5).astype(np.float32)
            for name, shape in shapes.items()
        },
    )


if __name__ == "__main__":
    main()
