"""What each `train.remat` keeps and computes again: gradients are the same, the work is what
`train.flops` counts, and attention does not run twice where its output is kept."""

import dataclasses
import functools
import re
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn.fused_attention_stablehlo import _dot_product_attention_fwd_p_wrapper
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh

from flexolmo_jax.config import MeshConfig, ModelConfig, OptimConfig, Remat, RunConfig, resolve
from flexolmo_jax.errors import UserError
from flexolmo_jax.model import Params, forward, init_params
from flexolmo_jax.model.rematerialisation import CUDNN_ATTENTION
from flexolmo_jax.model.tree import combine, flatten, partition
from flexolmo_jax.plan.hlo import numbers, parse
from flexolmo_jax.plan.steps import IS_TRAINED
from flexolmo_jax.runtime.sharding import make_mesh
from flexolmo_jax.train.activations import kept_bytes
from flexolmo_jax.train.flops import step_flops
from flexolmo_jax.train.losses import Contrast, loss_sums
from flexolmo_jax.train.step import OFFLOADS_FROM, check_remat

REMATS: tuple[Remat, ...] = get_args(Remat)
B, T, V = 8, 32, 96
MODEL = ModelConfig(
    vocab_size=V, d_model=64, n_layers=3, n_heads=4, n_kv_heads=2, d_ffn=80, init_std=0.2
)
KINDS = {
    "anchor": MODEL,
    "pair": MODEL,
    "router": dataclasses.replace(MODEL, n_experts=3, n_active=2),
    "joint": dataclasses.replace(MODEL, n_experts=3, n_active=2),
}
RNG = np.random.default_rng(0)
BATCH = [
    jnp.asarray(RNG.integers(V, size=(B, T))),
    jnp.asarray(np.sort(RNG.integers(1, 4, size=(B, T)), axis=1)),
    jnp.ones((B, T), bool),
]
MESHES = {
    "one": MeshConfig(fsdp=1),
    "fsdp 8": MeshConfig(fsdp=8),
    "fsdp 4 x tensor 2": MeshConfig(fsdp=4, tensor=2),
    "fsdp 4 x expert 2": MeshConfig(fsdp=4, expert=2),
}


def config(kind: str, remat: str, *overrides: str) -> RunConfig:
    tree = {
        "run": kind,
        "model": dataclasses.asdict(KINDS[kind]),
        "data": {"train": [{"path": "unused"}], "batch_size": B, "seq_len": T},
        "train": {"remat": remat},
    }
    pair = {"anchor": "unused", "name": "new", "router_noise": 0, "contrast": 0}
    of_kind = {"pair": {"pair": pair}, "router": {"router": {"model": "unused"}}}
    return resolve(tree | of_kind.get(kind, {}), overrides)


def loss_of(
    kind: str,
    remat: Remat,
    model: ModelConfig,
    dtype: str = "float32",
    mesh: Mesh | None = None,
    *,
    all_terms: bool = False,
):
    """The loss of such a run as a function of parameters and a batch, and the parameters' shapes.
    `all_terms`: with contrast for a pair, balance for a mixture."""
    balance = 0.1 if all_terms and kind != "pair" else 0.0
    optim = OptimConfig(router_z_loss=0.1 if all_terms else 0.0, load_balance=balance)
    contrast = Contrast(jnp.arange(B) % 2, jnp.ones(B)) if all_terms and kind == "pair" else None

    def loss(params, tokens, segments, targets):
        active = model.n_experts if kind == "router" else None
        how: dict[str, Any] = {"active": active, "dtype": dtype, "remat": remat, "mesh": mesh}
        output = forward(model, params, tokens, segments, **how)
        return loss_sums(output, tokens, targets, optim, contrast, mesh).total / B / T

    shapes = functools.partial(init_params, model, pair=kind == "pair")
    return loss, jax.eval_shape(shapes, jax.random.key(0))


@functools.cache
def compiled(kind: str, remat: Remat, mesh: str, dtype: str, all_terms: bool) -> Any:
    """The gradient of what is trained, and its arguments."""
    devices = make_mesh(MESHES[mesh])
    loss, _ = loss_of(kind, remat, KINDS[kind], dtype, devices, all_terms=all_terms)
    trained, frozen = partition(parameters(kind), IS_TRAINED.get(kind, lambda _: True))

    def of_trained(trained, frozen, *batch):
        return loss(combine(frozen, trained), *batch)

    arguments = trained, frozen, *BATCH
    return jax.jit(jax.grad(of_trained)).lower(*arguments).compile(), arguments


@functools.cache
def parameters(kind: str) -> Params:
    make = functools.partial(init_params, KINDS[kind], pair=kind == "pair")
    return jax.jit(make)(jax.random.key(0))


def gradients(*which: Any) -> dict[str, np.ndarray]:
    program, arguments = compiled(*which)
    return {path: np.asarray(a) for path, a in flatten(program(*arguments)).items()}


def products(*which: Any) -> int:
    """Floating-point operations of all matrix products of a compiled gradient."""
    total = 0
    program = parse(compiled(*which)[0].as_text())
    for one, computation, runs in program.walk(lambda one: one.opcode == "dot"):
        if one.opcode == "dot":
            result, left = (
                numbers(re.findall(r"\[([\d,]*)\]", type_)[0])
                for type_ in (one.type, computation.instructions[one.operands[0]].type)
            )
            summed = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", one.attributes)
            assert summed is not None
            inner = np.prod([left[i] for i in numbers(summed[1])])
            total += 2 * runs * int(np.prod(result) * inner)
    return total


SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("anchor", "router")]
ON_ONE = ("one", "float32", True)  # device, with all terms of the loss


@pytest.mark.parametrize(
    "remat",
    [
        pytest.param(remat, marks=[] if remat in ("full", "outputs", "dots") else pytest.mark.slow)
        for remat in REMATS
        if remat != "none"
    ],
)
@pytest.mark.parametrize(
    ("kind", "mesh", "dtype", "all_terms"),
    [
        ("pair", *ON_ONE),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                *((kind, *ON_ONE) for kind in ("anchor", "router", "joint")),
                *((kind, "one", "float32", False) for kind in ("pair", "joint")),
                *((kind, "one", "bfloat16", True) for kind in ("pair", "joint")),
                *((kind, "fsdp 8", "float32", True) for kind in ("pair", "joint")),
                ("pair", "fsdp 8", "bfloat16", True),
                ("pair", "fsdp 4 x tensor 2", "float32", True),
                ("joint", "fsdp 4 x expert 2", "float32", True),
            )
        ),
    ],
)
def test_gradients_do_not_depend_on_what_is_kept(kind, mesh, dtype, all_terms, remat):
    """Not bitwise: what is computed again is fused with other neighbours."""
    tolerance = {"float32": 1e-5, "bfloat16": 2e-2}[dtype]
    found = gradients(kind, remat, mesh, dtype, all_terms)
    expected = gradients(kind, "none", mesh, dtype, all_terms)
    assert found.keys() == expected.keys()
    for path, gradient in expected.items():
        difference = np.linalg.norm(found[path] - gradient)
        assert difference <= tolerance * np.linalg.norm(gradient), (path, difference)


@pytest.mark.parametrize("remat", ["full", "attention", "outputs", "ffn", "dots"])
@pytest.mark.parametrize("kind", ["pair", *SLOW])
def test_flops_count_what_is_computed_again(kind, remat):
    extra = products(kind, remat, *ON_ONE) - products(kind, "none", *ON_ONE)
    run, least = (config(kind, which) for which in (remat, "none"))
    counted = step_flops(run, run.model).hardware - step_flops(least, run.model).hardware
    # A router's few rows are not counted. Of a short sequence the whole square is multiplied, but
    # of the two products of attention only p v: the backward pass has q k anyway.
    experts = 2 if kind == "pair" else run.model.n_experts
    counted += B * T * MODEL.n_layers * 2 * MODEL.d_model * experts
    assert extra == pytest.approx(counted, rel=1e-9)


def test_logits_and_scores_are_computed_again_whatever_is_kept():
    run = config("anchor", "none")
    model, flops = run.model, step_flops(run, run.model)
    logits = 2 * model.d_model * model.vocab_size
    scores = model.n_layers * 2 * T / 2 * model.head_size * model.n_heads  # q k, half of the square
    assert flops.hardware - flops.model == pytest.approx(B * T * (logits + scores), rel=1e-9)


# --- what is kept, and what runs on a TPU ---


def kept(kind: str, remat: Remat, dtype: str) -> int:
    """Bytes that lie between the forward and the backward pass."""
    mesh = make_mesh(MESHES["one"])
    loss, params = loss_of(kind, remat, KINDS[kind], dtype, mesh)
    pullback = jax.eval_shape(lambda *args: jax.vjp(loss, *args)[1], params, *BATCH)
    return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(pullback))


@pytest.mark.parametrize(
    ("kind", "dtype"), [("anchor", "float32"), *((kind, "bfloat16") for kind in KINDS)]
)
def test_bytes_count_what_is_kept(kind, dtype):
    def counted(remat: Remat) -> int:
        run = config(kind, remat, f"train.compute_dtype={dtype}")
        return kept_bytes(run, run.model).on_device

    for remat in REMATS:
        if remat == "offload":
            continue
        more = kept(kind, remat, dtype) - kept(kind, "full", dtype)
        expected = counted(remat) - counted("full")
        # The dispatch of a sparse mixture keeps a few integers, or not.
        is_counted = more > expected if remat == "none" else abs(more - expected) <= 64
        assert is_counted, (remat, more, expected)
    inputs = B * T * MODEL.n_layers * MODEL.d_model
    assert counted("full") == inputs * (4 if dtype == "float32" else 2)


def lowered_for_tpu(kind: str, remat: Remat) -> str:
    """The gradient of two layers for a TPU v5p. They are a loop: what it runs is there once."""
    model = dataclasses.replace(
        KINDS[kind], d_model=256, n_layers=2, n_heads=2, n_kv_heads=2, d_ffn=256
    )
    loss, params = loss_of(kind, remat, model, "bfloat16")
    device = AbstractDevice(device_kind="TPU v5", num_cores=1, platform="tpu")
    mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device)
    batch = [jax.ShapeDtypeStruct((2, 128), a.dtype) for a in BATCH]
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(jax.grad(loss)).trace(params, *batch)
        return traced.lower(lowering_platforms=("tpu",)).as_text()


@pytest.mark.parametrize(
    ("kind", "remat"), [*(("anchor", remat) for remat in REMATS), ("joint", "attention")]
)
def test_attention_runs_once_on_a_tpu_where_its_output_is_kept(kind, remat):
    if remat == "offload" and jax.__version_info__ < OFFLOADS_FROM:
        pytest.skip("refused below jax 0.12")
    found = re.findall(r'kernel_name = "(\w+)"', lowered_for_tpu(kind, remat))
    runs = {
        name: sum(kernel.startswith(f"splash_mha_{name}_") for kernel in found)
        for name in ("fwd", "dq", "dkv")
    }
    assert runs == {"fwd": 2 if remat == "full" else 1, "dq": 1, "dkv": 1}


@pytest.mark.skipif(jax.__version_info__ < (0, 12), reason="megablox's kernels are one function")
@pytest.mark.parametrize(
    ("remat", "again"), [("full", 3), ("attention", 3), ("outputs", 2), ("ffn", 0), ("dots", 0)]
)
def test_a_sparse_mixtures_products_are_not_computed_again_on_a_tpu_where_they_are_kept(
    remat, again
):
    """Three products forward, six backward."""
    assert lowered_for_tpu("joint", remat).count('"chlo.ragged_dot"(') == 9 + again


# --- what is refused ---


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_offloading_is_refused_but_on_tpus(platform):
    with pytest.raises(UserError, match=f"'offload', which is for TPUs; got {platform}"):
        check_remat("offload", platform)


def test_cudnns_attention_is_what_the_policies_take_it_to_be():
    """Its output and logsumexp are kept by the name of the operation, which is JAX's own."""
    assert _dot_product_attention_fwd_p_wrapper.name == CUDNN_ATTENTION


@pytest.mark.skipif(jax.__version_info__ >= OFFLOADS_FROM, reason="this jax offloads")
def test_offloading_is_refused_where_jax_would_run_attention_again():
    with pytest.raises(UserError, match=r"needs jax 0\.12"):
        check_remat("offload", "tpu")


@pytest.mark.parametrize("remat", [remat for remat in REMATS if remat != "offload"])
def test_other_policies_run_everywhere(remat):
    for platform in ("cpu", "gpu", "tpu"):
        check_remat(remat, platform)
