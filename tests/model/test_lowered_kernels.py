"""What a sparse model's program holds for each TPU: the kernels that kernels/README.md names."""

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from flexolmo_jax.config import ModelConfig
from flexolmo_jax.kernels import Kernels
from flexolmo_jax.kernels.moe_ffn import sparse_experts
from flexolmo_jax.kernels.route import Routing
from flexolmo_jax.model import forward, init_params
from tests.tpus import KINDS, traced_for

README = Path(__file__).parents[2] / "kernels" / "README.md"
PLAN = {"route_forward", "route_backward", "dispatch_plan"}
MOVING = {"permute", "combine", "gather_sum"}
# SparseCores do it from jax 0.12 on
HAS_GATHER_SUM = jax.__version_info__ >= (0, 12)
CONFIG = ModelConfig(
    vocab_size=256, d_model=256, n_layers=2, n_heads=2, n_kv_heads=2, n_experts=4, n_active=2
)


def named_by_the_table(tpu: str) -> set[str]:
    """The kernels in the row of this TPU."""
    rows = [line for line in README.read_text().splitlines() if line.startswith(f"| {tpu} |")]
    return set(re.findall(r"`(\w+)`", rows[0]))


def lowered(kernels: Kernels, tpu: str) -> str:
    """The gradient of a model of two layers, lowered for this TPU."""

    def loss(params, tokens):
        output = forward(CONFIG, params, tokens, dtype="bfloat16", remat="full", kernels=kernels)
        return jnp.sum(output.logits)

    params = jax.eval_shape(functools.partial(init_params, CONFIG), jax.random.key(0))
    return on(tpu, jax.grad(loss), params, jax.ShapeDtypeStruct((8, 128), jnp.int32))


def on(tpu: str, function: Callable[..., Any], *arguments: Any) -> str:
    """The function, lowered for this TPU."""
    with traced_for(tpu):
        traced = jax.jit(function).trace(*arguments)
        return traced.lower(lowering_platforms=("tpu",)).as_text(debug_info=True)


def kernels_in(text: str) -> set[str]:
    """Those that route."""
    return set(re.findall(r'kernel_name = "(\w+)"', text)) & (PLAN | MOVING)


@pytest.mark.parametrize("tpu", KINDS)
def test_a_sparse_model_holds_the_kernels_that_the_table_names(tpu):
    named = named_by_the_table(tpu)
    assert PLAN <= named <= PLAN | MOVING
    text = lowered("auto", tpu)
    assert kernels_in(text) == (named if HAS_GATHER_SUM else PLAN)
    products = (
        {"ragged_dot"} if jax.__version_info__ >= (0, 12) else {"megablox_gmm", "megablox_tgmm"}
    )
    assert products == set(re.findall(r"\bragged_dot\b|megablox_t?gmm", text))


def test_sparse_experts_hold_no_ragged_dot_for_a_gpu():
    """Some of XLA's releases make a dense product of it there."""
    N, A, E, D, F = 16, 2, 4, 32, 64

    def total(probabilities, ids, *arrays):
        x, *matrices = arrays
        return jnp.sum(sparse_experts(x, Routing(probabilities, ids, jnp.zeros(N)), *matrices))

    routing = jnp.ones((N, A)), jnp.zeros((N, A), jnp.int32)
    wide = jnp.ones((E, D, F))
    traced = jax.jit(jax.grad(total)).trace(*routing, jnp.ones((N, D)), wide, wide, wide.mT)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "ragged_dot" not in text and "stablehlo.while" in text


@pytest.mark.parametrize("tpu", ["v5e", "v5p"])
def test_named_kernels_are_the_program_s(tpu):
    by_sparse_core = tpu == "v5p" and HAS_GATHER_SUM
    moving = {"gather_sum"} if by_sparse_core else {"permute", "combine"}
    assert kernels_in(lowered("pallas", tpu)) == PLAN | moving
    assert not kernels_in(lowered("xla", tpu))


@pytest.mark.parametrize(("kernels", "sorts"), [("xla", True), ("auto", False), ("pallas", False)])
def test_routing_by_pallas_sorts_nothing(kernels, sorts):
    assert ("top_k" in lowered(kernels, "v5p")) == sorts


@pytest.mark.parametrize("tpu", KINDS)
def test_experts_of_all_layers_are_read_where_they_lie(tpu):
    """TPU7x's ragged_dot would copy them."""
    N, A, L, E, D, F = 16, 2, 2, 4, 256, 512

    def layer(x, routing, gate, up, down, index):
        return sparse_experts(x, routing, gate, up, down, index)

    def of(*shape: int, dtype: Any = jnp.bfloat16) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    wide, index = of(L, E, D, F), of(dtype=jnp.int32)
    routing = Routing(of(N, A, dtype="float32"), of(N, A, dtype="int32"), of(N, dtype="float32"))
    text = on(tpu, layer, of(N, D), routing, wide, wide, of(L, E, F, D), index)
    in_place = tpu == "tpu7x" or jax.__version_info__ < (0, 12)
    products = set(re.findall(r"\bragged_dot\b|megablox_t?gmm", text))
    assert products == ({"megablox_gmm"} if in_place else {"ragged_dot"})
