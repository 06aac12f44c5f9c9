"""Cross entropy from hidden states: every implementation against plain NumPy and the reference, and
what it keeps in memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexolmo_jax.kernels.cross_entropy import Implementation, chunks, cross_entropy, reference

N, D, V = 37, 16, 60


def problem(dtype="float32", scale=1.0):
    rng = np.random.default_rng(0)
    x, head = (jnp.asarray(scale * rng.standard_normal(shape), dtype) for shape in ((N, D), (D, V)))
    return x, head, jnp.asarray(rng.integers(0, V, N), jnp.int32)


COTANGENTS = tuple(
    jnp.asarray(np.random.default_rng(1).standard_normal(N), jnp.float32) for _ in range(2)
)


def assert_close(got, want, tolerance):
    """Within `tolerance` of the scale of what is wanted."""
    got, want = (np.asarray(a, np.float64) for a in (got, want))
    assert np.max(np.abs(got - want)) <= tolerance * np.max(np.abs(want))


class Suite:
    """What every implementation has to do."""

    implementation: Implementation

    @pytest.fixture(autouse=True)
    def _several_chunks(self, monkeypatch):
        """37 tokens in chunks of 10, the last of which are padded."""
        monkeypatch.setattr(chunks, "LARGEST", 10 * V + 3)

    def run(self, *args):
        return cross_entropy(*args, implementation=self.implementation)

    def gradients(self, *args):
        """Of x and head, for independent cotangents of losses and logsumexps."""
        values, pullback = jax.vjp(lambda x, head: self.run(x, head, args[2]), *args[:2])
        return values, pullback(COTANGENTS)

    def test_losses_are_those_of_plain_numpy(self):
        x, head, targets = (np.asarray(a) for a in problem())
        logits = x.astype(np.float64) @ head
        log_z = np.log(np.exp(logits).sum(-1))
        losses, got = self.run(x, head, targets)
        assert losses.dtype == got.dtype == jnp.float32
        assert_close(got, log_z, 1e-6)
        assert_close(losses, log_z - logits[np.arange(N), targets], 1e-6)

    def test_gradients_of_both_outputs_are_those_of_plain_numpy(self):
        x, head, targets = (np.asarray(a, np.float64) for a in problem())
        logits = x @ head
        p = np.exp(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))
        d_loss, d_log_z = (np.asarray(a, np.float64)[:, None] for a in COTANGENTS)
        d_logits = p * (d_loss + d_log_z) - np.eye(V)[targets.astype(int)] * d_loss
        _, (d_x, d_head) = jax.jit(self.gradients)(*problem())
        assert_close(d_x, d_logits @ head.T, 1e-5)
        assert_close(d_head, x.T @ d_logits, 1e-5)

    def test_bfloat16_gives_float32_losses_and_gradients_in_bfloat16(self):
        values, gradients = jax.jit(self.gradients)(*problem("bfloat16"))
        x, head, targets = problem("bfloat16")
        wide, expected = self.gradients(x.astype(jnp.float32), head.astype(jnp.float32), targets)
        for got, want in zip(values, wide, strict=True):
            assert got.dtype == jnp.float32
            assert_close(got, want, 1e-5)
        for got, want in zip(gradients, expected, strict=True):
            assert got.dtype == jnp.bfloat16
            assert_close(got, want, 2e-2)

    def test_logits_of_a_thousand_overflow_nothing(self):
        values, gradients = self.gradients(*problem(scale=30.0))
        assert all(np.isfinite(a).all() for a in (*values, *gradients))
        assert np.max(values[1]) > 1000


@pytest.mark.tpu
class TestReference(Suite):
    implementation = "reference"


@pytest.mark.tpu
class TestChunks(Suite):
    implementation = "chunks"

    @pytest.mark.parametrize("tokens", [1, 9, 10, 11, N])
    def test_any_number_of_tokens_equals_the_reference(self, tokens):
        x, head, targets = problem()
        got, want = (
            run(x[:tokens], head, targets[:tokens])
            for run in (chunks.cross_entropy, reference.cross_entropy)
        )
        for a, b in zip(got, want, strict=True):
            assert a.shape == (tokens,)
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)

    def test_a_vocabulary_larger_than_a_chunk_takes_one_token_at_a_time(self, monkeypatch):
        monkeypatch.setattr(chunks, "LARGEST", V // 2)
        np.testing.assert_allclose(
            self.run(*problem())[0], reference.cross_entropy(*problem())[0], rtol=1e-5, atol=1e-5
        )


@pytest.mark.tpu
class TestOneChunk(Suite):
    """Whose logits are kept for the gradient."""

    implementation = "chunks"

    @pytest.fixture(autouse=True)
    def _several_chunks(self):
        pass


def test_an_unknown_implementation_is_refused():
    with pytest.raises(KeyError, match="quick"):
        cross_entropy(*problem(), implementation="quick")  # type: ignore[arg-type]


@functools.cache
def temporary_share(what: str, dtype: str) -> float:
    """Temporary memory of a compiled program as a share of the float32 logits of the whole
    batch."""
    tokens, width, vocabulary = 4096, 64, 100352

    def total(x, head, targets):
        losses, log_z = cross_entropy(x, head, targets)
        return jnp.sum(losses + 1e-5 * log_z**2)

    shapes = (
        jax.ShapeDtypeStruct(shape, dtype) for shape in ((tokens, width), (width, vocabulary))
    )
    targets = jax.ShapeDtypeStruct((tokens,), jnp.int32)
    function = {"forward": total, "backward": jax.grad(total, (0, 1))}[what]
    memory = jax.jit(function).lower(*shapes, targets).compile().memory_analysis()
    assert memory is not None
    return memory.temp_size_in_bytes / (tokens * vocabulary * 4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("what", ["forward", "backward"])
def test_a_large_vocabulary_never_has_the_logits_of_the_whole_batch(what, dtype):
    """An eighth of them is a chunk; in 16 bits the CPU converts it once more."""
    assert temporary_share(what, dtype) < 0.26


def test_small_problems_keep_their_logits_for_the_gradient():
    """One chunk and no recomputation: three products of N D V, forward and backward together."""

    def products(large):
        text = (
            jax.jit(jax.grad(lambda x, head, t: jnp.sum(cross_entropy(x, head, t)[0]), (0, 1)))
            .lower(*large)
            .as_text()
        )
        return text.count("dot_general")

    shapes = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((256, 8), (8, 512)))
    assert products((*shapes, jax.ShapeDtypeStruct((256,), jnp.int32))) == 3
