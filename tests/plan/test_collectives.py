"""What a program moves is counted right: each kind, over the axes it runs over, as often as the
loops around it run."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from flexolmo_jax.config import MeshConfig, resolve
from flexolmo_jax.kernels.route import Routing
from flexolmo_jax.model import dispatch
from flexolmo_jax.model.tree import flatten
from flexolmo_jax.plan.collectives import Collective, collectives
from flexolmo_jax.plan.report import compile_step, size_of
from flexolmo_jax.plan.steps import fsdp_minimum, training_step
from flexolmo_jax.runtime.sharding import make_mesh, over_experts

X = jax.ShapeDtypeStruct((8, 16), jnp.float32)
BYTES = 8 * 16 * 4
SPREAD = P("outer")


@functools.cache
def mesh() -> Mesh:
    return Mesh(np.asarray(jax.devices()).reshape(4, 2), ("outer", "inner"))


def counted(body, repeat: int = 1, one_pass: bool = False) -> list[Collective]:
    """The collectives of `body`, run by every device on its part, `repeat` times in a loop."""

    @functools.partial(
        jax.shard_map, mesh=mesh(), in_specs=SPREAD, out_specs=SPREAD, check_vma=False
    )
    def run(x):
        return jax.lax.fori_loop(0, repeat, lambda _, x: body(x), x) if repeat > 1 else body(x)

    arguments = jax.ShapeDtypeStruct(X.shape, X.dtype, sharding=NamedSharding(mesh(), SPREAD))
    return collectives(
        jax.jit(run).lower(arguments).compile().as_text() or "",
        dict(mesh().shape),
        one_pass=one_pass,
    )


def twice(x):
    return jnp.tile(x, (2, 1))


@pytest.mark.parametrize(
    ("kind", "body", "received"),
    [
        ("all-gather", lambda x: jax.lax.all_gather(x, "outer", tiled=True)[:2] * 2, BYTES * 3 // 4),
        ("all-reduce", lambda x: jax.lax.psum(x, "outer"), 2 * BYTES // 4 * 3 // 4),
        ("reduce-scatter", lambda x: twice(jax.lax.psum_scatter(twice(x), "outer", tiled=True)),
        BYTES // 2 * 3 // 4),
        ("collective-permute", lambda x: jax.lax.ppermute(x, "outer", [(0, 1), (1, 2), (2, 3), (3,
        0)]), BYTES // 4),
        ("all-to-all", lambda x: jax.lax.all_to_all(x, "outer", 1, 1, tiled=True),
        BYTES // 4 * 3 // 4),
    ],
)  # fmt: skip
@pytest.mark.parametrize("repeat", [1, 5])
def test_a_collective_is_counted_once_for_every_time_it_runs(kind, body, received, repeat):
    found = counted(body, repeat=repeat)  # an all-to-all has an operand for each device
    assert {(one.kind, one.axes, one.runs) for one in found} == {(kind, ("outer",), repeat)}
    assert (
        sum(one.bytes for one in found) == received
        and sum(one.total for one in found) == received * repeat
    )


def test_an_exchange_between_experts_is_counted_as_the_one_round_of_even_choices(monkeypatch):
    monkeypatch.setattr(dispatch, "FEWEST", 1)
    experts, tokens, active, D, F = make_mesh(MeshConfig(data=1, fsdp=1, expert=8)), 64, 2, 16, 4
    run = over_experts(experts, functools.partial(dispatch.run_chosen, "auto"))
    slots = jnp.zeros((tokens, active))
    routing = Routing(slots, slots.astype(int), jnp.zeros(tokens))
    matrices = jnp.zeros((8, D, F)), jnp.zeros((8, D, F)), jnp.zeros((8, F, D))
    lowered = jax.jit(run).lower(((jnp.zeros((tokens, D)), routing), None), *matrices)
    found = collectives(lowered.compile().as_text() or "", dict(experts.shape))
    size = dispatch.round_size(tokens // 8, active, 8, 1)
    assert size < tokens // 8  # so that the program has a loop of further rounds
    # a token and what is made of it, its expert and probability
    received = 7 * size * (2 * D + 2) * 4
    assert sum(one.total for one in found if one.kind == "all-to-all") == received


def test_loops_in_loops_multiply_and_axes_are_told_apart():
    def body(x):
        inner = jax.lax.fori_loop(0, 3, lambda _, x: jax.lax.psum(x, "inner"), x)
        return jax.lax.pmax(inner, ("outer", "inner"))

    found = {one.axes: one for one in counted(body, repeat=7)}
    assert found[("inner",)].runs == 21 and found[("outer", "inner")].runs == 7


def test_a_loop_of_unknown_length_is_refused():
    def body(x):
        return jax.lax.while_loop(
            lambda x: jnp.max(x) < 10, lambda x: x + jax.lax.psum(x, "outer"), x
        )

    with pytest.raises(ValueError, match="does not tell how often"):
        counted(body)
    (one,) = counted(body, one_pass=True)  # which is how a step of decoding is counted
    assert (one.kind, one.runs) == ("all-reduce", 1)


# As libtpu writes them (shortened): a ring of moves beside a product, and a gather over a whole
# torus as an all-reduce.
RING = """HloModule ring

%windowed_dot_general_body_ag.1 (p: (s32[], f32[8,4], f32[8,16])) -> (s32[], f32[8,4], f32[8,16]) {
  %p = (s32[], f32[8,4], f32[8,16]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[8,4]{1,0} get-tuple-element(%p), index=1
  %y = f32[8,16]{1,0} get-tuple-element(%p), index=2
  %move = f32[8,4]{1,0} collective-permute(%x), channel_id=1, source_target_pairs={{0,1},{1,2},{2,3},{3,0}}, metadata={op_name="product"}
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  ROOT %t = (s32[], f32[8,4], f32[8,16]) tuple(%next, %move, %y)
}

%condition (p: (s32[], f32[8,4], f32[8,16])) -> pred[] {
  %p = (s32[], f32[8,4], f32[8,16]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %end = s32[] constant(2)
  ROOT %less = pred[] compare(%i, %end), direction=LT
}

ENTRY %main (x: f32[8,4], y: f32[8,16]) -> (s32[], f32[8,4], f32[8,16]) {
  %x = f32[8,4]{1,0} parameter(0)
  %y = f32[8,16]{1,0} parameter(1)
  %zero = s32[] constant(0)
  %first = f32[8,4]{1,0} collective-permute(%x), channel_id=2, source_target_pairs={{0,1},{1,2},{2,3},{3,0}}, metadata={op_name="product"}
  %start = (s32[], f32[8,4], f32[8,16]) tuple(%zero, %first, %y)
  ROOT %loop = (s32[], f32[8,4], f32[8,16]) while(%start), condition=%condition, body=%windowed_dot_general_body_ag.1
}
"""
TORUS = """HloModule torus

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %c = f32[] add(%a, %b)
}

ENTRY %main (x: f32[2,4], at: s32[]) -> f32[8,4] {
  %x = f32[2,4]{1,0} parameter(0)
  %at = s32[] parameter(1)
  %zero = f32[] constant(0)
  %zeros = f32[8,4]{1,0} broadcast(%zero), dimensions={}
  %column = s32[] constant(0)
  %own = f32[8,4]{1,0} dynamic-update-slice(%zeros, %x, %at, %column)
  ROOT %all = f32[8,4]{1,0} all-reduce(%own), channel_id=1, replica_groups={{0,1,2,3}}, to_apply=%sum
}
"""


# A gather that is under way while something runs.
UNDER_WAY = """HloModule step

%products (a: f32[4,4], b: f32[4,4]) -> f32[4,4] {
  %a = f32[4,4]{1,0} parameter(0)
  %b = f32[4,4]{1,0} parameter(1)
  ROOT %c = f32[4,4]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main (x: f32[2,4], y: f32[4,4]) -> (f32[8,4], f32[4,4]) {
  %x = f32[2,4]{1,0} parameter(0)
  %y = f32[4,4]{1,0} parameter(1)
  %start = (f32[2,4], f32[8,4]) all-gather-start(%x), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}
  %between = f32[4,4]{1,0} fusion(%y, %y), kind=kOutput, calls=%products
  %all = f32[8,4]{1,0} all-gather-done(%start)
  %after = f32[4,4]{1,0} dot(%y, %y), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %t = (f32[8,4], f32[4,4]) tuple(%all, %after)
}
"""


ON_SPARSECORE = (
    UNDER_WAY.replace(
        "ENTRY",
        """%gather (x: f32[2,4]) -> f32[8,4] {
  %x = f32[2,4]{1,0} parameter(0)
  ROOT %g = f32[8,4]{1,0} all-gather(%x), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}
}

ENTRY""",
    )
    .replace(
        """(f32[2,4], f32[8,4]) all-gather-start(%x), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}
""",
        """((f32[2,4]), f32[8,4], s32[1]) call-start(%x), async_execution_thread="sparsecore", to_apply=%gather
  %update = ((f32[2,4]), f32[8,4], s32[1]) call-update(%start)
""",
    )
    .replace("all-gather-done(%start)", "call-done(%update)")
)


@pytest.mark.parametrize(
    ("text", "overlapped"),
    [
        (UNDER_WAY, True),
        (UNDER_WAY.replace("dot(%a, %b)", "add(%a, %b)"), False),  # nothing to wait beside
        (
            UNDER_WAY.replace("all-gather-start", "all-gather").replace(
                "-done(%start)", "(%start)"
            ),
            False,
        ),
        (ON_SPARSECORE, True),
        (ON_SPARSECORE.replace("dot(%a, %b)", "add(%a, %b)"), False),
        (TORUS, False),
    ],
)
def test_a_collective_overlaps_where_a_product_runs_before_its_end(text, overlapped):
    assert next(one.overlapped for one in collectives(text, {"fsdp": 4})) == overlapped


@pytest.mark.parametrize(
    ("over", "axes", "size"),
    [
        ("{'b':(2)2}", ("low",), 2),
        ("{'b':(1)2}", ("high",), 2),
        ("{'b':(2)2,'b':(1)2}", ("high", "low"), 4),
        ("{'b'}", ("high", "low"), 4),
        ("{'a','b':(2)2}", ("first", "low"), 4),
    ],
)
def test_groups_may_be_along_a_part_of_an_axis(over, axes, size):
    text = UNDER_WAY.replace("{{0,1,2,3}}", f"mesh['a'=2,'b'=4,'c'=1] {over}")
    (one,) = collectives(text, {"first": 2, "high": 2, "low": 2})
    assert (one.axes, one.size) == (axes, size)


def test_a_ring_of_moves_is_the_gather_that_it_makes_up():
    moves = collectives(RING, {"fsdp": 4})
    assert {(one.kind, one.form) for one in moves} == {("all-gather", "ring")}
    assert sum(one.total for one in moves) == 3 * 8 * 4 * 4


def test_an_all_reduce_of_parts_is_a_gather():
    (one,) = collectives(TORUS, {"fsdp": 4})
    assert (one.kind, one.form, one.bytes) == ("all-gather", "all-reduce", 8 * 4 * 4 * 3 / 4)


def run(kind: str, *overrides: str, **sections):
    tree = {
        "run": kind,
        "model": {
            "vocab_size": 512,
            "d_model": 64,
            "n_layers": 3,
            "n_heads": 4,
            "n_kv_heads": 4,
            "d_ffn": 128,
            "max_seq_len": 64,
        },
        "data": {"train": [{"path": "data"}], "batch_size": 16, "seq_len": 64},
        "train": {"accumulate": 2, "remat": "full"},
        **sections,
    }
    return resolve(tree, overrides)


PAIR = run("pair", pair={"anchor": "anchor", "name": "mine", "router_noise": 0.0})


def test_a_pairs_step_reduces_gradients_of_the_expert_alone():
    """In bytes: what is reduced and scattered (here written as all-reduces of which each device
    takes its part) is the expert, once for every microbatch. What is reduced beside it are a few
    numbers a layer."""
    mesh = make_mesh(MeshConfig(fsdp=8))
    step = training_step(PAIR, PAIR.model, mesh)
    moved = collectives(compile_step(step, mesh).as_text(), dict(mesh.shape))
    reduced = sum(one.total for one in moved if one.kind in ("reduce-scatter", "all-reduce"))
    gradients = 7 * size_of(
        {
            path: a
            for path, a in flatten(step.kinds["parameters"]).items()
            if path.split("/")[1] in ("gate", "up", "down")
        }
    )
    everything = training_step(PAIR, PAIR.model, mesh, lambda _: True)
    of_all = collectives(compile_step(everything, mesh).as_text(), dict(mesh.shape))
    assert gradients <= reduced / 2 <= 2 * 1.2 * gradients
    assert (
        sum(one.total for one in of_all if one.kind in ("reduce-scatter", "all-reduce"))
        > 1.7 * reduced
    )


def test_what_fsdp_needs_at_least_is_two_gathers_and_one_scatter():
    mesh = make_mesh(MeshConfig(fsdp=8))
    step = training_step(PAIR, PAIR.model, mesh)
    D, F, V, L = 64, 128, 512, 3
    matrices = L * (4 * D * D + 2 * 3 * D * F) + D * V
    # bfloat16: both gathers, the embedding, the expert's gradients
    expected = 2 * 2 * matrices + 2 * V * D + 2 * L * 3 * D * F
    rows = 2 * 2 * L * 2 * D + 2 * L * D
    norms = 2 * 2 * (L * 4 + 1) * D
    assert expected * 7 // 8 <= fsdp_minimum(step, "bfloat16") <= (expected + rows + norms) * 7 // 8


# As libtpu 0.0.50 writes an exchange between two slices: to its runtime, which reduces.
BETWEEN_SLICES = """HloModule step

ENTRY %main (p: bf16[256,128]) -> bf16[256,128] {
  %p = bf16[256,128]{1,0} parameter(0)
  %t = token[] after-all()
  %send.1 = (bf16[256,128]{1,0}, u32[], token[]) send(%p, %t), channel_id=4, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_host_transfer_rendezvous="all-reduce.40_0",_xla_megascale_reduce_operation="SUM",_xla_megascale_target="{1,2}x{0:7}",_xla_megascale_transfer_type="ALL_REDUCE",is_spmd_generated="true"}
  %send-done.1 = token[] send-done(%send.1), channel_id=4, is_host_transfer=true
  %recv.1 = (bf16[256,128]{1,0}, u32[], token[]) recv(%t), channel_id=5, is_host_transfer=true
  %recv-done.1 = (bf16[256,128]{1,0}, token[]) recv-done(%recv.1), channel_id=5, is_host_transfer=true
  ROOT %r = bf16[256,128]{1,0} get-tuple-element(%recv-done.1), index=0
}
"""


def test_what_is_sent_between_slices_runs_over_the_first_axis():
    (one,) = collectives(BETWEEN_SLICES, {"data": 2, "fsdp": 8})
    assert (one.kind, one.axes, one.size, one.runs, one.form) == ("all-reduce", ("data",), 2, 1, "")
    assert one.bytes == 256 * 128 * 2  # 2 (n - 1) / n of it
    (of_four,) = collectives(
        BETWEEN_SLICES.replace("{1,2}x", "{0:2,5}x").replace("ALL_REDUCE", "ALL_GATHER"),
        {"data": 4, "fsdp": 8},
    )
    assert (of_four.kind, of_four.size, of_four.bytes) == ("all-gather", 4, 3 * 256 * 128 * 2)
