"""The programs that are compiled and timed for TPUs: every Pallas kernel and the sparse MoE layer,
at 7B shapes. `routing` is the layer without its experts' products."""

import re
from collections.abc import Callable
from typing import Any, get_args

import jax
import jax.numpy as jnp

from flexolmo_jax.kernels import Kernels
from flexolmo_jax.kernels.attention import attention
from flexolmo_jax.kernels.attention.shapes import OLMO2_7B, OLMO2_32B
from flexolmo_jax.kernels.grouped_matmul import expert_ffn
from flexolmo_jax.kernels.moe_ffn import sparse_experts
from flexolmo_jax.kernels.permute import combine, permute, permute_probabilities
from flexolmo_jax.kernels.route import DispatchPlan, dispatch_plan, route_topk

N, D, F = 8192, 4096, 11008  # tokens, model, FFN
CASES = (
    "route", "dispatch_plan",
    *(f"{name}-E{E}-k8" for name in ("route", "dispatch_plan") for E in (128, 256)),
    "permute", "combine", "attention", "attention-gqa",
    "expert_ffn-E7-k5", "expert_ffn-E8-k4", "moe_layer-E7-k5-auto",
    *(f"{name}-E8-k4-{own}" for name in ("routing", "moe_layer") for own in get_args(Kernels)),
)  # fmt: skip


def experts_and_active(case: str) -> tuple[int, int]:
    """Those in the name, as E7-k5, or 8 and 4."""
    numbers = re.search(r"-E(\d+)-k(\d+)", case)
    return (int(numbers[1]), int(numbers[2])) if numbers else (8, 4)


def program(
    case: str, N: int = N, D: int = D, F: int = F
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The function, forward and backward where there is a gradient, and the shapes and dtypes of
    its arguments."""

    def of(*shape: int, dtype: Any = jnp.bfloat16) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    def with_gradients(function: Callable[..., Any], count: int) -> Callable[..., Any]:
        """The function's value and its gradients in the first `count` arguments."""

        def total(*arguments):
            return sum(
                jnp.sum(jnp.square(leaf.astype(jnp.float32)))
                for leaf in jax.tree.leaves(function(*arguments))
                if leaf.ndim
            )

        return jax.value_and_grad(total, argnums=tuple(range(count)))

    name, *numbers = case.split("-")
    E, k = experts_and_active(case)
    M = N * k
    plan = DispatchPlan(of(E, dtype=jnp.int32), of(N, k, dtype=jnp.int32), of(M, dtype=jnp.int32))
    experts = of(E, D, F), of(E, D, F), of(E, F, D)
    match name:
        case "route":

            def route(logits, allowed):
                routing = route_topk(logits, k, allowed, kernels="pallas")
                return routing.probabilities, routing.log_z

            return with_gradients(route, 1), (of(N, E, dtype=jnp.float32), of(E, dtype=jnp.bool))
        case "dispatch_plan":
            arguments = of(N, k, dtype=jnp.int32), of(N, k, dtype=jnp.bool)
            return (
                lambda ids, chosen: dispatch_plan(ids, chosen, E, kernels="pallas"),
                arguments,
            )
        case "permute":
            return lambda x, plan: permute(x, plan, kernels="pallas"), (of(N, D), plan)
        case "combine":
            arguments = of(M, D), plan
            return lambda out, plan: combine(out, plan, kernels="pallas"), arguments
        case "attention":
            B, T, H, K, C = OLMO2_32B if numbers else OLMO2_7B
            arguments = of(B, T, H, C), of(B, T, K, C), of(B, T, K, C), of(B, T, dtype=jnp.int32)
            return (
                with_gradients(
                    lambda q, k, v, segments: attention(
                        q, k, v, segments=segments, implementation="splash"
                    ),
                    3,
                ),
                arguments,
            )
        case "expert_ffn":
            arguments = of(M, D), of(M, dtype=jnp.float32), *experts, of(E, dtype=jnp.int32)
            return (
                with_gradients(
                    lambda x, w, gate, up, down, sizes: expert_ffn(x, w, sizes, gate, up, down), 5
                ),
                arguments,
            )
        case "routing" | "moe_layer":
            kernels: Any = numbers[-1]

            def routed(x, rows):
                logits = jnp.matmul(x.astype(jnp.float32), rows.T, precision="highest")
                return route_topk(logits, k, jnp.ones(E, bool), kernels=kernels)

            def layer(x, rows, *experts):
                routing = routed(x, rows)
                if experts:
                    return sparse_experts(x, routing, *experts, kernels=kernels)
                plan = dispatch_plan(routing.ids, routing.probabilities > 0, E, kernels=kernels)
                p = permute_probabilities(routing.probabilities, plan, kernels=kernels)
                # barriers, as around products
                tokens, p = jax.lax.optimization_barrier((permute(x, plan, kernels=kernels), p))
                out = jax.lax.optimization_barrier(tokens * p[:, None].astype(tokens.dtype))
                return combine(out, plan, kernels=kernels)

            def forward_and_backward(dy, *arguments):
                y, pullback = jax.vjp(layer, *arguments)
                return y, pullback(dy)

            arguments = of(N, D), of(N, D), of(E, D, dtype=jnp.float32)
            return forward_and_backward, arguments + (experts if name == "moe_layer" else ())
    raise ValueError(case)
