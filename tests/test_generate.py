"""Generation: the cache changes nothing, prompts do not see each other, sampling keeps to its
support."""

import dataclasses
import functools
import gc
import json
from collections import UserDict
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexolmo_jax.cli import main
from flexolmo_jax.config import MeshConfig, ModelConfig
from flexolmo_jax.coordinator.merge import opt_out
from flexolmo_jax.errors import UserError
from flexolmo_jax.evals.harness import _scorer
from flexolmo_jax.evals.predictors import _losses, _soups
from flexolmo_jax.generate import Decoder, Generator, Sampling
from flexolmo_jax.loaded import _forward, load
from flexolmo_jax.model import Params, forward, init_params
from flexolmo_jax.model.decoding import compiled, sample
from flexolmo_jax.model.sizes import KEPT, rounded_up
from flexolmo_jax.train.evaluate import make_scorer
from tests.tiny import SEQ_LEN

E, N = 4, 12
# init_std makes logits of order 1: greedy completions then wander, and no two logits are within
# rounding of each other.
SHAPE: dict[str, Any] = dict(
    vocab_size=96, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, d_ffn=48, max_seq_len=64
)
CONFIG = ModelConfig(**SHAPE, n_experts=E, n_active=2, init_std=0.3)
DENSE = dataclasses.replace(CONFIG, n_experts=1, n_active=1)
VOCAB = 90  # the tokenizer's; 6 ids are padding
RNG = np.random.default_rng(1)
PROMPTS = [RNG.integers(0, VOCAB, size).tolist() for size in (1, 5, 17, 30)]
HOT = Sampling(temperature=1.5, seed=7)
GREEDY = Sampling()


@functools.lru_cache
def params_of(config: ModelConfig = CONFIG, pair: bool = False) -> Params:
    """Random parameters whose head prefers the padding ids by far."""
    params = jax.jit(functools.partial(init_params, config, pair=pair))(jax.random.key(0))
    head = params["trunk"]["head"]["kernel"]
    params["trunk"]["head"]["kernel"] = head.at[:, VOCAB:].multiply(10)
    return params


def run(
    prompts=PROMPTS,
    *,
    config=CONFIG,
    params=None,
    max_new_tokens: int | list[int] = N,
    eos_id=-1,
    sampling=GREEDY,
    on_token=None,
    dtype=None,
    active=None,
    allowed=None,
    ends=(),
) -> list[list[int]]:
    generator = Generator(Decoder(config, params or params_of(config), VOCAB, eos_id), dtype=dtype)
    experts = active or config.n_active, np.asarray(allowed or [True] * config.n_experts)
    return generator.generate(prompts, max_new_tokens, experts, sampling, on_token, ends)


@pytest.fixture
def compilations() -> Iterator[list[str]]:
    """A program each."""
    found: list[str] = []

    def listen(event: str, duration_secs: float, **_: Any) -> None:
        if "backend_compile" in event:
            found.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield found
    jax.monitoring.unregister_event_duration_listener(listen)


@functools.cache
def greedy() -> list[list[int]]:
    return run()


whole_pass = jax.jit(forward, static_argnums=0, static_argnames="active")


def next_logits(config, params, tokens, **options) -> np.ndarray:
    """Logits [T, V] of a whole forward pass; what is right of the tokens cannot reach them."""
    padded = np.zeros((1, CONFIG.max_seq_len), np.int32)
    padded[0, : len(tokens)] = tokens
    return np.asarray(whole_pass(config, params, padded, **options).logits)[0, : len(tokens)]


def assert_greedy(prompt, completion, config, params, **options):
    """Each token is the argmax, without padding ids, of what a whole forward pass gives after all
    tokens before it."""
    logits = next_logits(config, params, prompt + completion, **options)[len(prompt) - 1 : -1]
    assert completion == logits[:, :VOCAB].argmax(axis=-1).tolist()


# --- greedy ---


@pytest.mark.parametrize("config", [CONFIG, DENSE])
def test_greedy_generation_is_the_argmax_of_whole_forward_passes(config):
    completions = run(config=config)
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        assert len(completion) == N
        assert_greedy(prompt, completion, config, params_of(config), active=config.n_active)
    assert len({tuple(ids) for ids in completions}) == len(PROMPTS)


def test_a_pair_generates_with_both_experts():
    params = params_of(DENSE, True)
    completions = run(config=DENSE, params=params, active=2, allowed=[True, True])
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        assert_greedy(prompt, completion, DENSE, params, active=2)
    assert completions != run(config=DENSE, params=params, active=2, allowed=[True, False])


def test_a_prompt_of_a_batch_is_completed_as_it_is_alone():
    for prompt, completion in zip(PROMPTS, greedy(), strict=True):
        assert run([prompt]) == [completion]


def test_padding_ids_are_never_chosen_though_the_model_prefers_them():
    logits = next_logits(CONFIG, params_of(), PROMPTS[3] + greedy()[3])
    assert (logits.argmax(axis=-1) >= VOCAB).any()
    assert np.max(greedy()) < VOCAB
    assert np.max(run(sampling=HOT)) < VOCAB


def test_the_lowest_id_wins_ties():
    params = params_of()
    flat = params | {
        "trunk": (
            params["trunk"] | {"head": {"kernel": jnp.zeros((CONFIG.d_model, CONFIG.vocab_size))}}
        )
    }
    assert run(params=flat) == [[0] * N] * len(PROMPTS)


def test_bfloat16_chooses_tokens_that_are_nearly_best_in_float32():
    for prompt, completion in zip(PROMPTS, run(dtype="bfloat16"), strict=True):
        logits = next_logits(CONFIG, params_of(), prompt + completion)[len(prompt) - 1 : -1, :VOCAB]
        chosen = np.take_along_axis(logits, np.array(completion)[:, None], axis=1)[:, 0]
        assert np.median(logits.max(axis=1) - chosen) < 0.1 * logits.std()


# --- sizes ---


def test_texts_of_many_lengths_and_batches_share_few_programs_and_mean_the_same(
    model, compilations
):
    loaded = load(model)
    ids = RNG.integers(0, VOCAB, (8, 64))
    whole = loaded.logits(ids)
    found = {T: loaded.logits(ids[:3, :T]) for T in range(1, 41)}
    assert len(compilations) <= 5
    for T, logits in found.items():
        np.testing.assert_allclose(logits, whole[:3, :T], rtol=1e-5, atol=1e-5)
    assert {B: loaded.logits(ids[:B, :9]).shape for B in range(1, 9)} == {
        B: (B, 9, loaded.config.vocab_size) for B in range(1, 9)
    }
    assert len(compilations) <= 11


def test_only_the_programs_used_last_are_kept(model):
    loaded, client = load(model), jax.devices()[0].client
    _forward.cache_clear()
    gc.collect()
    before = len(client.live_executables())
    for B in range(1, 4):
        loaded.logits(np.ones((B, 16), int))
    assert len(client.live_executables()) == before + 3
    _forward.cache_clear()  # as it drops them, one by one
    gc.collect()
    assert len(client.live_executables()) == before
    bounds = [_forward, _losses, _soups, _scorer, make_scorer, compiled]
    assert {one.cache_parameters()["maxsize"] for one in bounds} == {KEPT}


def test_sizes_are_few_and_not_much_larger():
    sizes = {rounded_up(n) for n in range(1, 1025)}
    assert len(sizes) == 20 and all(n <= rounded_up(n) < 1.5 * n for n in range(1, 1025))
    assert [rounded_up(n, 50) for n in (49, 50, 51, 64)] == [50, 50, 51, 64]


def test_batches_of_other_sizes_are_filled_up_with_what_has_ended(compilations):
    """Nobody waits for it, and it is not shown."""
    five, seen = [*PROMPTS, PROMPTS[0]], []
    expected = [*greedy(), greedy()[0]]
    assert run(five, on_token=lambda step, ids: seen.append(len(ids))) == expected
    assert seen == [5] * N
    made = len(compilations)
    assert run([*five, PROMPTS[1]]) == [*expected, expected[1]] and len(compilations) == made
    ends = sorted({ids[2] for ids in expected})
    seen.clear()
    run(five, ends=ends, on_token=lambda step, ids: seen.append(step))
    assert len(seen) <= 3


def test_each_prompt_may_have_a_limit_of_its_own():
    limits = [3, 12, 1, 7]
    assert run(max_new_tokens=limits) == [
        ids[:limit] for ids, limit in zip(greedy(), limits, strict=True)
    ]
    with pytest.raises(UserError, match="prompt 3: got 30 tokens and 35 new ones"):
        run(max_new_tokens=[64 - 1, 64 - 5, 64 - 17, 64 - 29])


def test_generation_ends_where_the_one_who_watches_says_so():
    steps = []

    def watch(step: int, ids: np.ndarray) -> bool:
        steps.append(step)
        return step == 4

    assert run(on_token=watch) == [ids[:9] for ids in greedy()] and steps == list(range(9))
    assert run(on_token=lambda step, ids: 5) == greedy()  # whatever a callback gives back


# --- ends ---


def test_a_completion_is_cut_before_its_eos_and_the_other_prompts_go_on():
    whole = greedy()
    eos = whole[1][4]
    expected = [ids[: ids.index(eos)] if eos in ids else ids for ids in whole]
    assert len(expected[1]) <= 4 and max(map(len, expected)) == N
    assert run(eos_id=eos) == expected


def test_generation_stops_when_every_prompt_has_ended():
    eos, steps = greedy()[1][4], []
    run([PROMPTS[1]], eos_id=eos, on_token=lambda step, tokens: steps.append(tokens.tolist()))
    assert len(steps) == greedy()[1].index(eos) + 1 and steps[-1] == [eos]


@pytest.mark.parametrize("sampling", [Sampling(), HOT])
def test_streaming_gives_the_tokens_of_generating_in_one_go(sampling):
    eos, steps, streamed = greedy()[1][4], [], []

    def on_token(step, tokens):
        steps.append(step)
        streamed.append(tokens)

    completions = run(sampling=sampling, eos_id=eos, on_token=on_token)
    assert completions == run(sampling=sampling, eos_id=eos)
    assert steps == list(range(N))
    for b, completion in enumerate(completions):
        column = [int(tokens[b]) for tokens in streamed]
        assert column == completion + [eos] * (N - len(completion))


def test_other_tokens_end_a_completion_as_eos_does():
    whole = greedy()
    ends, steps = [whole[1][4], whole[0][6], *[VOCAB - 1] * 5], []
    expected = [next((ids[:i] for i in range(N) if ids[i] in ends), ids) for ids in whole]
    assert {len(ids) for ids in expected[:2]} != {N} and max(map(len, expected)) == N
    assert run(ends=ends) == expected
    assert run(ends=ends[1:], eos_id=ends[0]) == expected
    run([PROMPTS[1]], ends=ends, on_token=lambda step, tokens: steps.append(tokens.tolist()))
    assert len(steps) == len(expected[1]) + 1, "it stops when every prompt has ended"
    with pytest.raises(UserError, match="ends: got 9 tokens, expected at most 8"):
        run(ends=range(9))


def test_fewer_new_tokens_are_a_prefix():
    assert run(max_new_tokens=1) == [ids[:1] for ids in greedy()]


# --- experts ---


@pytest.mark.parametrize("active", [2, E])
def test_a_masked_expert_full_of_nan_changes_no_token(active):
    allowed = [True, True, False, True]
    params = params_of()
    poisoned = params | {
        "experts": jax.tree.map(lambda leaf: leaf.at[:, 2].set(jnp.nan), params["experts"])
    }
    expected = run(active=active, allowed=allowed)
    assert run(active=active, allowed=allowed, params=poisoned) == expected
    assert expected != run(active=active)


def test_other_experts_prompts_seeds_and_limits_compile_nothing():
    run(sampling=dataclasses.replace(HOT, top_k=3))
    before = compiled.cache_info().misses
    run(
        [prompt[::-1][:20] for prompt in PROMPTS],
        sampling=Sampling(0.3, top_k=5, top_p=0.5, seed=1),
        allowed=[True, False, True, False],
        max_new_tokens=N + 1,
        eos_id=3,
        ends=[4, 5],
    )
    assert compiled.cache_info().misses == before


# --- sampling ---


def draw(logits, sampling: Sampling, n: int) -> np.ndarray:
    keys = jax.random.split(jax.random.key(sampling.seed), n)
    likeliest = sampling.likeliest(len(logits)) if sampling.temperature > 1e-3 else 0
    one = functools.partial(sample, likeliest=likeliest)
    top_k = jnp.int32(sampling.top_k or len(logits))
    values = jnp.float32(sampling.temperature), top_k, jnp.float32(sampling.top_p)
    drawn = jax.jit(jax.vmap(one, (0, None, None, None, None)))
    return np.asarray(drawn(keys, logits, *values))


LOGITS = np.log(np.array([0.05, 0.4, 0.1, 0.25, 0.2], np.float32))


@pytest.mark.parametrize(
    ("sampling", "support"),
    [
        (Sampling(1), {0, 1, 2, 3, 4}),
        (Sampling(1, top_k=2), {1, 3}),
        (Sampling(1, top_k=1), {1}),
        (Sampling(1, top_p=0.6), {1, 3}),
        (Sampling(1, top_p=0.7), {1, 3, 4}),
        (Sampling(1, top_p=1e-6), {1}),
        (Sampling(1, top_k=2, top_p=0.62), {1, 3}),  # of the two, 1 has 0.4 / 0.65 = 0.615
        (Sampling(1, top_k=2, top_p=0.6), {1}),
        (Sampling(0.5, top_p=0.55), {1}),  # at temperature 1/2, 1 has 0.16 / 0.275 = 0.58
        (Sampling(1e-4), {1}),
    ],
)
def test_sampling_draws_all_tokens_of_its_support_and_no_other(sampling, support):
    assert set(draw(LOGITS, sampling, 500).tolist()) == support


def test_sampled_frequencies_are_the_softmax_at_the_temperature():
    n = 20_000
    shares = np.bincount(draw(LOGITS, Sampling(2.0), n), minlength=5) / n
    expected = np.exp(LOGITS / 2) / np.exp(LOGITS / 2).sum()
    assert np.all(np.abs(shares - expected) < 5 * np.sqrt(expected / n))


def test_among_equals_the_lowest_ids_are_kept():
    assert set(draw(np.zeros(5, np.float32), Sampling(1, top_k=2), 200).tolist()) == {0, 1}


def test_a_seed_draws_the_same_token_whether_tokens_are_put_in_order_or_not():
    logits = RNG.normal(size=50).astype(np.float32)
    ordered, loose = (draw(logits, Sampling(1, top_k=k), 200) for k in (50, 0))
    assert ordered.tolist() == loose.tolist() and len(set(loose.tolist())) > 10


def test_generated_tokens_keep_to_the_top_k_after_every_token():
    completions = run(sampling=dataclasses.replace(HOT, top_k=3))
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        logits = next_logits(CONFIG, params_of(), prompt + completion)[len(prompt) - 1 : -1, :VOCAB]
        ranks = (logits > np.take_along_axis(logits, np.array(completion)[:, None], axis=1)).sum(
            axis=1
        )
        assert ranks.max() < 3
    assert completions != greedy()


def test_a_seed_repeats_and_another_differs():
    assert run(sampling=HOT) == run(sampling=HOT)
    assert run(sampling=HOT) != run(sampling=dataclasses.replace(HOT, seed=8))


def test_a_sampled_completion_does_not_depend_on_the_other_prompts():
    others = [PROMPTS[0], *PROMPTS[:0:-1]]
    assert run(sampling=HOT)[0] == run(others, sampling=HOT)[0]


def test_equal_prompts_of_a_batch_are_sampled_independently():
    completions = run([PROMPTS[1]] * len(PROMPTS), sampling=HOT)
    assert len({tuple(ids) for ids in completions}) == len(completions)


# --- mistakes ---


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "prompts: got none"),
        ([[1], []], {}, "prompt 1: got no tokens"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens: got 0"),
        ([[1]], {"max_new_tokens": 2.5}, "max_new_tokens: got 2.5, expected a whole number"),
        ([[1] * 53], {}, "prompt 0: got 53 tokens and 12 new ones, expected at most 64"),
        ([[VOCAB]], {}, "prompt 0: got ids outside the vocabulary, expected 0 to 89"),
        ([[-1]], {}, "prompt 0: got ids outside the vocabulary"),
        ([[1], [1.5]], {}, r"prompt 1: got 1\.5 among the ids, expected integers"),
        ([[True]], {}, "prompt 0: got True among the ids"),
        ([np.array([2**40])], {}, f"prompt 0: .* place 0 has token {2**40}"),
        ([5], {}, r"prompt 0: got ids of shape \(\), expected \[time\]"),
        ([[1]], {"sampling": Sampling(temperature=-1)}, "temperature: got -1"),
        ([[1]], {"sampling": Sampling(temperature=float("nan"))}, "temperature: got nan"),
        ([[1]], {"sampling": Sampling(top_k=-1)}, "top_k: got -1"),
        ([[1]], {"sampling": Sampling(top_p=0)}, "top_p: got 0"),
        ([[1]], {"sampling": Sampling(top_p=1.1)}, r"top_p: got 1\.1"),
        ([[1]], {"sampling": Sampling(seed=-1)}, "seed: got -1"),
        ([[1]], {"sampling": Sampling(temperature="hot")}, "temperature: got hot"),  # type: ignore
        ([[1]], {"sampling": Sampling(top_k=1.5)}, r"top_k: got 1\.5"),  # type: ignore
    ],
)
def test_mistakes_are_refused_in_one_line(prompts, options, message):
    with pytest.raises(UserError, match=f"^{message}") as raised:
        run(prompts, **options)
    assert "\n" not in str(raised.value)


def test_a_prompt_and_its_completion_may_fill_the_context():
    prompt = [i % VOCAB for i in range(CONFIG.max_seq_len - N)]
    (completion,) = run([prompt])
    assert_greedy(prompt, completion, CONFIG, params_of())


@pytest.mark.parametrize(
    "mesh",
    [
        pytest.param("tensor=4", marks=pytest.mark.slow),
        pytest.param("tensor=2,expert=2", marks=pytest.mark.slow),
        "fsdp=2,tensor=2,expert=2",
    ],
)
def test_a_model_spread_over_devices_writes_and_scores_the_same(model, prepared, capsys, mesh):
    """The vocabulary's, heads', FFN's and experts' shares of each device, and the cache's."""
    whole = load(model)
    spread = load(
        model,
        mesh=MeshConfig(
            **{"data": 1, "fsdp": 1, "tensor": 1, "expert": 1}
            | {k: int(n) for k, n in (p.split("=") for p in mesh.split(","))}
        ),
    )
    assert any(not a.is_fully_replicated for a in jax.tree.leaves(spread.params))
    prompts = ["the tenant shall", "def parse() returns", "the patient", "a farmer feeds"]
    ids = np.random.default_rng(0).integers(3, 300, (4, 16))
    expected = whole.logits(ids, without=["law"])
    np.testing.assert_allclose(
        spread.logits(ids, without=["law"]), expected, atol=1e-5 * np.abs(expected).max()
    )
    assert spread.generate(prompts, 12) == whole.generate(prompts, 12)
    scores = []
    for flags in ([], ["--mesh", mesh]):
        assert (
            main(
                [
                    "eval",
                    str(model),
                    "--data",
                    str(prepared["law"]),
                    "--json",
                    "--batch-size",
                    "8",
                    *flags,
                ]
            )
            == 0
        )
        scores.append(json.loads(capsys.readouterr().out)["bits_per_byte"]["law"])
    assert scores[1] == pytest.approx(scores[0], rel=1e-5)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--mesh", "tensor=16"], "needs 16 devices; got 8"),
        (["--mesh", "tensors=2"], "tensor"),
        (["--mesh", "tensor=0"], "expected positive numbers"),
        (["--mesh", "tensor"], "--mesh got 'tensor'; expected AXIS=N,..., each axis once"),
        (["--mesh", ""], "--mesh got ''; expected AXIS=N,..., each axis once"),
        (["--mesh", "tensor=2,tensor=4"], "expected AXIS=N,..., each axis once"),
        (
            ["--mesh", "fsdp=2", "--prompt", "b", "--prompt", "c"],
            "3 sequences do not divide over 2 devices",
        ),
    ],
)
def test_a_mesh_that_cannot_be_is_told_in_one_line(model, capsys, flags, told):
    assert main(["generate", str(model), "--prompt", "a", *flags]) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("ids", [[[384]], [[0, -1]], [[]], np.zeros((0, 4), int), [1, 2]])
def test_ids_that_are_no_tokens_have_no_logits(model, ids):
    with pytest.raises(UserError, match=r"expected \[batch, time\]|expected 0 to 383"):
        load(model).logits(ids)


@pytest.mark.parametrize(
    "ids",
    [
        np.array([[2**32 + 5]], np.uint64),
        np.array([[5.0, 6.0]]),
        [[5, True]],
        [[5, "6"]],
        [[5, 6], [7]],
        np.full((1, 1, 2), 5),
        jnp.array([[5, 384]]),
    ],
)
def test_ids_that_would_be_cast_have_no_logits(model, ids):
    with pytest.raises(UserError, match=r"^ids: got "):
        load(model).logits(ids)


def test_ids_longer_than_the_records_of_training_are_told(model, capfd):
    loaded = load(model)
    loaded.logits(np.full((1, SEQ_LEN), 5))
    assert "longer than" not in capfd.readouterr().err
    loaded.logits(np.full((1, SEQ_LEN + 1), 5))
    assert f"ids are longer than the {SEQ_LEN} tokens" in capfd.readouterr().err


@pytest.mark.parametrize(
    "prompts", ["the", b"the", None, 5, {"input_ids": [[1]]}, UserDict(input_ids=[[1]])]
)
def test_what_is_no_list_is_no_list_of_prompts(model, prompts):
    """Of what a tokenizer of transformers gives, the keys were taken for texts."""
    with pytest.raises(UserError, match=r"prompts are .*; expected a list"):
        load(model).generate(prompts)


def test_prompts_may_come_one_by_one(model):
    loaded, texts = load(model), ["the", "a mill"]
    assert loaded.generate(iter(texts), 2) == loaded.generate(texts, 2)


def test_one_name_is_no_list_of_experts_and_half_an_expert_is_none(model, tmp_path):
    with pytest.raises(UserError, match="experts are 'law'; expected a list of names"):
        load(model).generate(["the"], 2, without="law")
    with pytest.raises(UserError, match="experts are 'law'; expected a list of names"):
        opt_out(model, "law", tmp_path / "without")
    with pytest.raises(UserError, match=r"--active is 1\.5"):
        load(model).generate(["the"], 2, active=1.5)  # type: ignore[arg-type]
