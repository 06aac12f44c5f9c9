"""The programs of generation: what is compiled, and how weights lie."""

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh

from flexolmo_jax import generate
from flexolmo_jax.config import MeshConfig, ModelConfig
from flexolmo_jax.generate import Decoder, Generator, Sampling
from flexolmo_jax.loaded import load
from flexolmo_jax.model import decoding as programs
from flexolmo_jax.model import forward, init_params, logical_axes
from flexolmo_jax.model.decoding import GREEDY, Decoding, Sizes, Weights
from flexolmo_jax.model.tree import flatten, unflatten
from flexolmo_jax.plan.steps import decoded, generation
from flexolmo_jax.runtime.sharding import make_mesh, parameter_sharding

CONFIG = ModelConfig(
    vocab_size=320,
    d_model=32,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    d_ffn=48,
    n_experts=4,
    n_active=2,
    max_seq_len=64,
    init_std=0.3,
)
SIZES = Sizes(2, 16, 16)
EXPERTS = 2, np.ones(4, bool)


def params_of(dtype: str = "float32") -> dict:
    params = init_params(CONFIG, jax.random.key(0))
    return jax.tree.map(lambda a: a.astype(dtype), params)


def generator_of(params: dict, dtype: str | None = None) -> Generator:
    return Generator(Decoder(CONFIG, params, CONFIG.vocab_size, eos_id=-1), dtype=dtype)


def asked_for(monkeypatch: pytest.MonkeyPatch, run) -> tuple[Decoding, Weights, Sizes]:
    """What `run` asks to compile last."""
    asked = []

    def compiled(*arguments):
        asked.append(arguments)
        return programs.compiled(*arguments)

    monkeypatch.setattr(generate, "compiled", compiled)
    run()
    return asked[-1]


def lowered(likeliest: int, stored: str = "bfloat16", part: str = "run") -> str:
    """The program in bfloat16 for weights of dtype `stored`, lowered for TPU."""
    decoding = Decoding(CONFIG, 2, 300, likeliest, "bfloat16")
    weights = Weights.of(params_of(stored))
    function, arguments = decoding.run(weights, SIZES)
    if part == "prefill":
        loop = function.lower(*arguments).compile()
        function, arguments = decoding.prefill(weights, SIZES, loop)
    return function.trace(*arguments).lower(lowering_platforms=("tpu",)).as_text()


def test_what_is_planned_is_what_generates(model, monkeypatch):
    """The same text, from the command's plan of a model and from generating with it."""
    loaded = load(model, mesh=MeshConfig(tensor=2, fsdp=1), dtype="bfloat16")
    prompts = ["the tenant shall", "a farmer feeds"]
    used, weights, sizes = asked_for(monkeypatch, lambda: loaded.generate(prompts, 16))
    what = decoded(model, ["mesh.tensor=2"])
    assert what.vocab_size == loaded.tokenizer.vocab_size
    context = sizes.prompt + sizes.new
    planned = generation(what, make_mesh(what.mesh), 2, context)
    programs = (used.run(weights, sizes), planned.step())
    ours, its = (one.function.lower(*one.arguments).as_text() for one in programs)
    assert ours == its


@pytest.mark.parametrize(
    ("sampling", "sorts"),
    [
        (Sampling(), False),
        (Sampling(temperature=0.8), False),
        (Sampling(temperature=0.8, top_k=5), True),
        (Sampling(temperature=0.8, top_p=0.9), True),
    ],
)
def test_tokens_are_put_in_order_only_where_the_likeliest_are_asked_for(sampling, sorts):
    text = lowered(sampling.likeliest(300))
    assert (
        bool(re.search(r"tensor<(2x)?300xf32>.*(sort|top_k)|(sort|top_k).*300xf32", text)) == sorts
    )


def test_top_k_puts_only_as_many_in_order():
    assert Sampling(temperature=1, top_k=5).likeliest(300) == 16
    assert Sampling(temperature=1, top_k=40, top_p=0.9).likeliest(300) == 64
    assert re.search(r"top_k.*k = 16", lowered(16))


def test_no_weight_is_cast_where_the_program_has_the_weights_dtype():
    matrices = r"convert %\S+ : \(tensor<(2x4x(32x48|48x32)|320x32|32x320)xb?f"
    assert not re.search(matrices, lowered(GREEDY))
    assert re.search(matrices, lowered(GREEDY, stored="float32"))


def test_weights_of_another_dtype_are_cast_once(monkeypatch):
    """On a CPU to float32, which is the dtype of its products."""
    generator = generator_of(params_of("bfloat16"))
    run = functools.partial(generator.generate, [[1], [2]], 3, EXPERTS)
    decoding, weights, _ = asked_for(monkeypatch, run)
    assert decoding.dtype == "float32" == weights.shapes[0].dtype
    generator = generator_of(params_of("bfloat16"), "bfloat16")
    run = functools.partial(generator.generate, [[1], [2]], 3, EXPERTS)
    decoding, weights, _ = asked_for(monkeypatch, run)
    assert decoding.dtype == "bfloat16" == weights.shapes[0].dtype


def test_a_prompt_s_attention_is_the_flash_kernel():
    assert "splash" in lowered(GREEDY, part="prefill")
    assert "splash" not in lowered(GREEDY)


@pytest.mark.parametrize(
    "mesh",
    [
        pytest.param(None, marks=pytest.mark.slow),
        pytest.param(MeshConfig(fsdp=2, tensor=2), marks=pytest.mark.slow),
        MeshConfig(fsdp=2, expert=2),
    ],
)
def test_prompts_read_in_parts_fill_the_cache_as_in_one_go(mesh, monkeypatch):
    """Each prompt in its own rows, with another length of padding each."""
    sizes = B, P, _ = Sizes(8, 16, 4)
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(300, size=(B, P)), jnp.int32)
    first_slot = jnp.asarray(rng.permutation(B) + 1, jnp.int32)

    def read(at_once: int) -> tuple[programs.State, int]:
        monkeypatch.setattr(programs, "READ_AT_ONCE", at_once)
        decoding, weights, _ = _asked(params_of(), None if mesh is None else make_mesh(mesh))
        function, arguments = decoding.run(weights, sizes)
        loop = function.lower(*arguments).compile()
        prefill = decoding.prefill(weights, sizes, loop).compile()
        params, state, request, _ = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), arguments)
        params = jax.tree.map(jax.device_put, params_of(), loop.input_formats[0][0])
        request = request._replace(first_slot=first_slot, allowed=jnp.ones(4, bool))
        given = jax.tree.map(jax.device_put, (tokens, state.token, request), _shardings(prefill))
        temporary = prefill.memory_analysis().temp_size_in_bytes
        return jax.device_get(prefill(params, *given)), temporary

    (whole, all_at_once), (in_parts, some_at_once) = read(B * P), read(2 * P)
    for expected, found in zip(whole.cache, in_parts.cache, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
        assert np.abs(found[:, :, :, 8:P]).min(axis=(2, 4)).all() and not found[:, :, :, P:].any()
    if mesh is None:
        assert some_at_once < 0.6 * all_at_once


def _shardings(prefill: Any) -> Any:
    return prefill.input_shardings[0][1:]


@pytest.mark.parametrize(
    ("batch", "prompt", "mesh", "parts"),
    [
        (16, 2048, None, 4),
        (16, 2048, MeshConfig(fsdp=2, tensor=2), 2),
        (16, 512, None, 1),
        (3, 8192, None, 3),
        (2, 100_000, None, 2),  # a prompt is never cut
    ],
)
def test_a_device_reads_only_so_many_tokens_at_once(batch, prompt, mesh, parts):
    decoding = Decoding(CONFIG, 2, 300, GREEDY, "float32", mesh and make_mesh(mesh))
    assert decoding._parts(batch, prompt) == parts


def test_weights_are_laid_out_as_the_program_wants_and_mean_the_same():
    """Whoever else holds the tree gets the new arrays with it, so that none is there twice."""
    params, turned = params_of(), params_of()
    wanted = jax.tree.map(lambda a: Format(Layout(tuple(range(a.ndim))[::-1]), a.sharding), turned)
    generate._lay_out(turned, wanted)
    for path, array in flatten(turned).items():
        assert array.format.layout.major_to_minor == tuple(range(array.ndim))[::-1], path
    tokens = jnp.arange(12).reshape(2, 6)
    np.testing.assert_allclose(
        forward(CONFIG, turned, tokens).logits, forward(CONFIG, params, tokens).logits, rtol=1e-4
    )
    prompts = [[5, 6, 7], [8]]
    expected = generator_of(params).generate(prompts, 9, EXPERTS)
    assert generator_of(turned).generate(prompts, 9, EXPERTS) == expected
    compiled = programs.compiled(*_asked(params))
    assert jax.tree.map(lambda a: a.format, turned) == compiled.formats


def _asked(params: dict, mesh: Mesh | None = None) -> tuple[Decoding, Weights, Sizes]:
    decoding = Decoding(CONFIG, 2, CONFIG.vocab_size, GREEDY, "float32", mesh)
    if mesh is not None:
        axes = flatten(logical_axes(CONFIG))
        params = unflatten(
            {
                path: jax.device_put(a, parameter_sharding(mesh, axes[path], a.shape))
                for path, a in flatten(params).items()
            }
        )
    return decoding, Weights.of(params), SIZES


def test_another_batch_leaves_the_weights_where_they_are():
    params = params_of()
    generator = generator_of(params)
    generator.generate([[5, 6, 7]], 9, EXPERTS)
    before = {path: a.unsafe_buffer_pointer() for path, a in flatten(params).items()}
    generator.generate([[5] * 30, [8], [9]], 20, EXPERTS)
    assert before == {path: a.unsafe_buffer_pointer() for path, a in flatten(params).items()}


def test_tokens_are_streamed_several_a_call_and_the_first_alone(program_calls):
    N = 2 + 2 * generate.STREAMED
    steps: list[Any] = []
    generator = generator_of(params_of())
    generator.generate([[1, 2]], N, EXPERTS, on_token=lambda step, ids: steps.append(step))
    assert steps == list(range(N))
    assert program_calls == [1, 1 + generate.STREAMED, 1 + 2 * generate.STREAMED, N]


def test_the_loop_writes_into_the_cache_that_it_is_given():
    decoding, weights, sizes = _asked(params_of())
    _, state, *_ = decoding.arguments(weights, sizes)
    reused = programs.compiled(decoding, weights, sizes).run.memory_analysis().alias_size_in_bytes
    assert reused >= sum(a.size * a.dtype.itemsize for a in state.cache)


def test_programs_do_not_depend_on_what_a_request_says():
    decoding, weights, sizes = _asked(params_of())
    assert programs.compiled(decoding, weights, sizes) is programs.compiled(
        dataclasses.replace(decoding), Weights.of(params_of()), Sizes(*sizes)
    )
