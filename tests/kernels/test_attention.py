"""Attention: every implementation against the reference, values and gradients; what is compiled for
which platform; memory; shards."""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from flexolmo_jax.config import MeshConfig
from flexolmo_jax.kernels.attention import (
    api,
    attention,
    blocks,
    masked_attention,
    pallas_tpu,
    reference,
    tuned,
)
from flexolmo_jax.kernels.attention.shapes import OLMO2_7B, OLMO2_32B, TINY, Shape
from flexolmo_jax.kernels.attention.tuned import Blocks
from flexolmo_jax.runtime.sharding import make_mesh, on_each_shard
from tests.tpu import tune_attention


def problem(shape: Shape, dtype="float32", seed=0):
    """q, k, v and segments: two or three documents, then padding (segment 0)."""
    B, T, H, K, C = shape
    rng = np.random.default_rng(seed)
    q, k, v = (jnp.asarray(rng.standard_normal((B, T, heads, C)), dtype) for heads in (H, K, K))
    segments = np.sort(rng.integers(1, 4, (B, T)), axis=1)
    segments[:, T - T // 5 :] = 0
    return q, k, v, jnp.asarray(segments, jnp.int32)


def assert_close(got, want, tolerance):
    """Within `tolerance` of the scale of what is wanted."""
    got, want = (np.asarray(a, np.float64) for a in (got, want))
    assert np.max(np.abs(got - want)) <= tolerance * np.max(np.abs(want))


def gradients(function, q, k, v, segments):
    """The output, and the gradients of q, k and v for a fixed cotangent."""
    d_out = jnp.asarray(np.random.default_rng(9).standard_normal(q.shape), q.dtype)
    out, pullback = jax.vjp(lambda q, k, v: function(q, k, v, segments), q, k, v)
    return out, pullback(d_out)


class Suite:
    """What every implementation has to do, as far as it runs on a CPU."""

    # one block, and several; no length is a multiple of one
    shapes = (Shape(2, 24, 4, 2, 8), Shape(1, 333, 2, 2, 8))
    window = 1000

    @staticmethod
    def run(q, k, v, segments):
        raise NotImplementedError

    @staticmethod
    def like(q, k, v, segments):
        """The reference."""
        return reference.attention(q, k, v, segments)

    @pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-6), ("bfloat16", 2e-2)])
    @pytest.mark.parametrize("index", [0, 1])
    def test_values_and_gradients_are_the_reference_s(self, index, dtype, tolerance):
        args = problem(self.shapes[index], dtype)
        wide = (*(a.astype(jnp.float32) for a in args[:3]), args[3])
        out, grads = jax.jit(functools.partial(gradients, self.run))(*args)
        expected, expected_grads = jax.jit(functools.partial(gradients, self.like))(*wide)
        for got, want in zip((out, *grads), (expected, *expected_grads), strict=True):
            assert got.dtype == jnp.dtype(dtype)
            assert_close(got, want, tolerance)

    def test_no_token_attends_to_a_later_one_or_outside_its_document(self):
        """Other keys and values there change no bit."""
        q, k, v, segments = problem(Shape(1, 24, 2, 2, 8))
        run = jax.jit(self.run)
        expected = run(q, k, v, segments)
        for t in (0, 7, 23):
            back = t - jnp.arange(24)
            outside = (segments[0] != segments[0, t]) | (back < 0) | (back >= self.window)
            other = (jnp.where(outside[None, :, None, None], a + 3.0, a) for a in (k, v))
            np.testing.assert_array_equal(run(q, *other, segments)[:, t], expected[:, t])

    def test_it_is_differentiable_under_scan_and_checkpoint(self):
        q, k, v, segments = problem(Shape(1, 24, 2, 2, 8))

        def total(run, q):
            def layer(x, _):
                return x + run(x, k, v, segments), None

            return jnp.sum(jax.lax.scan(jax.checkpoint(layer), q, None, length=2)[0] ** 2)

        got, want = (
            jax.jit(jax.grad(functools.partial(total, run)))(q) for run in (self.run, self.like)
        )
        assert_close(got, want, 1e-5)


class TestBlocks(Suite):
    run = staticmethod(blocks.attention)


class TestSplashInterpreted(Suite):
    run = staticmethod(functools.partial(pallas_tpu.attention, interpret=True))


class WindowSuite(Suite):
    window = 6

    @staticmethod
    def like(q, k, v, segments):
        return reference.attention(q, k, v, segments, jnp.array(True), 6)


class TestBlocksWithWindow(WindowSuite):
    @staticmethod
    def run(q, k, v, segments):
        return blocks.attention(q, k, v, segments, jnp.array(True), 6)


class TestSplashWithWindowInterpreted(WindowSuite):
    @staticmethod
    def run(q, k, v, segments):
        return pallas_tpu.attention(q, k, v, segments, jnp.array(True), 6, interpret=True)


@pytest.mark.parametrize("run", [reference.attention, blocks.attention])
def test_a_layer_without_the_window_sees_its_whole_document(run):
    args = problem(Shape(2, 24, 4, 2, 8))
    np.testing.assert_allclose(run(*args, jnp.array(False), 6), run(*args), rtol=1e-6)
    assert np.abs(run(*args, jnp.array(True), 6) - run(*args)).max() > 0.01


@pytest.mark.tpu
class TestChosenByPlatform(Suite):
    shapes = (Shape(2, 24, 4, 2, 8), Shape(1, 7, 2, 1, 8))

    @staticmethod
    def run(q, k, v, segments):
        return attention(q, k, v, segments=segments)


# --- which program for which platform ---


def lowered(platform, shape, dtype="bfloat16", **options) -> str:
    B, T, H, K, C = shape
    arrays = [jax.ShapeDtypeStruct((B, T, heads, C), dtype) for heads in (H, K, K)]
    segments = jax.ShapeDtypeStruct((B, T), jnp.int32)

    def total(q, k, v, segments):
        return jnp.sum(attention(q, k, v, segments=segments, **options).astype(jnp.float32))

    program = jax.jit(jax.grad(total, (0, 1, 2))).trace(*arrays, segments)
    return program.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("shape", [TINY, OLMO2_7B, OLMO2_32B])
def test_lowered_for_tpu_it_is_three_mosaic_kernels_and_no_scores_outside_of_them(shape):
    """Forward, dq and dkv. Lowering runs Mosaic's own checks of shapes and layouts."""
    text = lowered("tpu", shape)
    assert text.count("tpu_custom_call") == 3
    assert f"{shape.length}x{shape.length}x" not in text


@pytest.mark.parametrize("measured", [Blocks(128, 256, False), Blocks(256, 128, True)])
def test_measured_blocks_are_used_and_change_no_value(measured, monkeypatch):
    """Two kernels where the backward pass is one."""
    shape, tpu = Shape(1, 512, 2, 1, 128), jax.devices()[0].device_kind
    monkeypatch.setitem(tuned.BLOCKS, (tpu, shape.length, shape.head_size), measured)
    jax.clear_caches()  # of what was traced with other blocks
    assert lowered("tpu", shape).count("tpu_custom_call") == (2 if measured.fused else 3)
    assert lowered("tpu", shape._replace(length=256)).count("tpu_custom_call") == 3
    arrays = problem(shape)
    run = functools.partial(pallas_tpu.attention, interpret=True)
    for got, want in zip(
        jax.tree.leaves(gradients(run, *arrays)),
        jax.tree.leaves(gradients(reference.attention, *arrays)),
        strict=True,
    ):
        assert_close(got, want, 1e-5)


def test_tuning_keeps_the_fastest_that_ran_and_writes_what_is_read(tmp_path):
    def milliseconds(shape, blocks):
        if blocks == Blocks(2048, 2048, True):
            raise ValueError("too large")
        return 2 + abs(blocks.q - 1024) + abs(blocks.kv - 512) - blocks.fused

    table = {("TPU v4", 4096, 128): Blocks(512, 512, False)}
    table |= tune_attention.tuned_for("TPU v5", [OLMO2_7B], milliseconds)
    assert table["TPU v5", 4096, 128] == Blocks(1024, 512, True)
    file = tmp_path / "tuned.py"
    file.write_text(Path(tuned.__file__).read_text())
    for _ in range(2):  # it replaces what it wrote itself
        tune_attention.write(table, file)
        module: dict[str, Any] = {}
        exec(file.read_text(), module)
        assert {key: tuple(blocks) for key, blocks in module["BLOCKS"].items()} == table


@pytest.mark.parametrize("platform", ["cpu", "cuda", "rocm"])
def test_lowered_for_others_it_has_no_mosaic_kernel(platform):
    assert "tpu_custom_call" not in lowered(platform, Shape(1, 64, 2, 2, 8))


def test_an_implementation_asked_for_by_name_is_used_or_fails():
    assert "tpu_custom_call" in lowered("tpu", TINY, implementation="splash")
    assert "tpu_custom_call" not in lowered("tpu", TINY, implementation="blocks")
    with pytest.raises(Exception, match=r"(?i)interpret|lowering"):
        lowered("cpu", TINY, implementation="splash")
    with pytest.raises((RuntimeError, NotImplementedError)):
        lowered("cuda", TINY, implementation="cudnn")  # there is no cuDNN where tests run
    with pytest.raises(KeyError, match="quick"):
        q, k, v, segments = problem(TINY)
        attention(q, k, v, segments=segments, implementation="quick")  # type: ignore[arg-type]


def test_where_the_platform_is_known_only_its_implementations_arrays_are_kept():
    """q, k, v, the segments, the output and a logsumexp for each head."""
    B, T, H, K, C = shape = Shape(2, 128, 4, 2, 128)
    arrays = problem(shape)

    def kept(platform: str | None) -> int:
        def attend(q, k, v):
            return attention(q, k, v, segments=arrays[3], platform=platform)

        pullback = jax.eval_shape(lambda *args: jax.vjp(attend, *args)[1], *arrays[:3])
        return sum(a.size for a in jax.tree.leaves(pullback))

    least = B * T * (2 * H * C + 2 * K * C + 1 + H)
    assert kept("cpu") == kept("gpu") == least  # without cuDNN both are blocks
    assert kept(None) > least + B * T * H * C


# --- cudnn ---


def test_cudnn_is_asked_for_the_same_attention(monkeypatch):
    """On JAX's XLA implementation in cuDNN's place, which the machines of these tests do not
    have."""
    plain = jax.nn.dot_product_attention
    monkeypatch.setattr(
        jax.nn,
        "dot_product_attention",
        lambda *args, **options: plain(*args, **options | {"implementation": "xla"}),
    )
    q, k, v, segments = problem(Shape(2, 24, 4, 2, 8))
    assert_close(
        api.attention(q, k, v, segments=segments, implementation="cudnn"),
        reference.attention(q, k, v, segments),
        1e-6,
    )


# --- under a mask ---


def test_masked_attention_in_blocks_equals_all_at_once_and_stays_finite_where_nothing_may_be_seen(
    monkeypatch,
):
    monkeypatch.setattr(blocks, "MASKED_BLOCK", 7)
    q, k, v, _ = problem(Shape(2, 24, 4, 2, 8))
    k, v = (a.swapaxes(1, 2) for a in (k, v))
    mask = jnp.asarray(np.random.default_rng(0).random((2, 17, 24)) < 0.4).at[:, 3].set(False)
    out = masked_attention(q[:, :17], k, v, mask)
    assert_close(out, reference.masked_attention(q[:, :17], k, v, mask), 1e-6)
    np.testing.assert_allclose(out[:, 3, 0], v.mean(axis=2)[:, 0], atol=1e-6)


# --- memory ---


def test_a_long_sequence_never_has_all_of_its_scores():
    """What it has grows with T, not with T^2: one block of queries at a time in each stripe."""
    B, T, H, C = 2, 4096, 4, 16
    scores = B * H * T * T * 4

    def total(q, k, v, segments):
        return jnp.sum(attention(q, k, v, segments=segments))

    arrays = [jax.ShapeDtypeStruct((B, T, H, C), jnp.float32)] * 3
    segments = jax.ShapeDtypeStruct((B, T), jnp.int32)
    for function in (total, jax.grad(total, (0, 1, 2))):
        memory = jax.jit(function).lower(*arrays, segments).compile().memory_analysis()
        assert memory is not None
        assert memory.temp_size_in_bytes < scores / 8


# --- on shards ---


# of q, k, v and segments
KEYS = ("batch", None, "kv_heads", None)
AXES = (("batch", None, "heads", None), KEYS, KEYS, ("batch", None))


@pytest.mark.parametrize(
    ("mesh", "shape"),
    [
        (MeshConfig(data=2, fsdp=2, tensor=2), Shape(4, 24, 4, 2, 8)),
        (MeshConfig(fsdp=4, expert=2), Shape(4, 24, 4, 2, 8)),
        # two key heads do not divide over four: heads stay whole
        (MeshConfig(data=2, tensor=4), Shape(4, 24, 4, 2, 8)),
    ],
)
@pytest.mark.parametrize("run", [TestSplashInterpreted.run, TestChosenByPlatform.run])
def test_values_and_gradients_on_shards_are_those_of_the_whole(mesh, shape, run):
    """The same `shard_map` as on a pod, the kernel interpreted."""
    args = problem(shape)
    sharded = on_each_shard(make_mesh(mesh), run, AXES, AXES[0])
    got, got_grads = jax.jit(functools.partial(gradients, sharded))(*args)
    want, want_grads = jax.jit(functools.partial(gradients, reference.attention))(*args)
    for a, b in zip((got, *got_grads), (want, *want_grads), strict=True):
        assert_close(a, b, 2e-6)


def test_each_shard_is_given_its_own_records_and_heads_and_no_more():
    seen = []

    def run(q, k, v, segments):
        seen.append((q.shape, k.shape, segments.shape))
        return q

    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    jax.eval_shape(on_each_shard(mesh, run, AXES, AXES[0]), *problem(Shape(4, 24, 4, 2, 8)))
    assert seen == [((1, 24, 2, 8), (1, 24, 1, 8), (1, 24))]


def test_on_many_tpus_every_device_runs_the_kernel_on_its_shard():
    """Lowered for eight TPUs from a CPU host. Without `shard_map` JAX refuses to partition a Mosaic
    kernel."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    assert isinstance(mesh, Mesh) and mesh.axis_types == (AxisType.Auto,) * 4
    sharded = on_each_shard(mesh, TestChosenByPlatform.run, AXES, AXES[0])
    args = problem(Shape(4, 256, 4, 2, 128), "bfloat16")
    program = jax.jit(functools.partial(gradients, sharded)).trace(*args)
    text = program.lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") == 3
    assert "1x2x256x128xbf16" in text  # one record, two of the heads
