"""What the harness asks a model, without the harness: the requests' tokens, and the answers."""

import dataclasses
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flexolmo_jax import generate
from flexolmo_jax.convert.importing import import_hf
from flexolmo_jax.errors import UserError
from flexolmo_jax.evals import harness
from flexolmo_jax.evals.harness_options import NEW_TOKENS, Endings, Options
from flexolmo_jax.generate import Sampling
from flexolmo_jax.loaded import LoadedModel, load
from tests.chats import FORMS, byte_chat, byte_tokenizer, said, write_instruct
from tests.convert.conftest import MOE

CONFIG = dataclasses.replace(MOE, init_std=0.3)
CONTEXT = CONFIG.max_seq_len
LONG = "the old mill crosses two bridges. " * 30


@pytest.fixture(scope="module")
def loaded(tiny: Path, tiny_tokenizer) -> LoadedModel:
    """Whatever it says is not what it has said before."""
    source = write_instruct(tiny / "asked-hf", "llama 3", CONFIG, tiny / "tokenizer.json")
    return load(import_hf(source, tiny / "asked").path)


@pytest.fixture
def lm(loaded) -> Any:
    return harness._Adapter(loaded, (), None, batch_size=4)


def ask(kind: str, lm: Any, *requests: Any) -> list[Any]:
    return getattr(lm, kind)([types.SimpleNamespace(args=request) for request in requests])


def completed(loaded: LoadedModel, ids: list[int], new: int, **how: Any) -> str:
    """Cut where a turn ends."""
    (made,) = loaded.generate([ids], new, **how)
    chat = loaded.tokenizer.chat
    assert chat is not None and isinstance(made, list)
    ends = set(chat.end_ids(loaded.tokenizer))
    return loaded.tokenizer.decode(generate._before(made, ends))


def likelihood(loaded: LoadedModel, ids: list[int], count: int) -> float:
    logits = loaded.logits(np.array([ids]))[0].astype(np.float64)
    log_p = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    return sum(log_p[i - 1, ids[i]] for i in range(len(ids) - count, len(ids)))


# --- likelihoods ---


@pytest.mark.parametrize(
    ("context", "continuation", "given", "scored"),
    [
        ("the river", " feeds", "the river", " feeds"),
        ("the river ", "feeds", "the river", " feeds"),
        ("the river \n", " feeds", "the river", " \n feeds"),
        ("the river<|eot_id|>the", " mill", "the river<|eot_id|>the", " mill"),
        ("", " feeds", "<|begin_of_text|>", " feeds"),
        ("  ", "feeds", "<|begin_of_text|>", "  feeds"),
        ("", "<|begin_of_text|>feeds", "<|begin_of_text|>", "feeds"),
    ],
)
def test_spaces_before_a_continuation_are_scored_and_nothing_before_it_is_the_first_token(
    loaded, lm, context, continuation, given, scored
):
    encode = loaded.tokenizer.encode_with_special
    ids, before = encode(given + scored), encode(given)
    assert ids[: len(before)] == before
    ((found, _),) = ask("loglikelihood", lm, (context, continuation))
    assert found == pytest.approx(likelihood(loaded, ids, len(ids) - len(before)), rel=1e-5)


def test_a_continuation_inside_the_last_token_of_its_context_is_scored_too(loaded, lm):
    encode = loaded.tokenizer.encode
    whole = next(
        text
        for text in (" village", " remembers", "public", " river")
        if len(encode(text)) == 1 == len(encode(text[:-1]))
    )
    ((found, _),) = ask("loglikelihood", lm, (f"x{whole[:-1]}", whole[-1]))
    ids = encode(f"x{whole[:-1]}") + encode(whole[-1])
    assert found == pytest.approx(likelihood(loaded, ids, 1), rel=1e-5)


def test_nothing_to_score_is_certain(lm):
    assert ask("loglikelihood", lm, ("the river", ""), ("", "")) == [(0.0, True)] * 2
    assert ask("loglikelihood_rolling", lm, ("",)) == [0.0] and lm.loglikelihood([]) == []


def test_a_context_that_is_too_long_loses_its_start_and_a_note_says_so(loaded, lm, capsys):
    ids = loaded.tokenizer.encode(LONG + " the river")
    ((found, _),) = ask("loglikelihood", lm, (LONG, " the river"))
    count = len(ids) - len(loaded.tokenizer.encode(LONG.rstrip()))
    assert found == pytest.approx(likelihood(loaded, ids[-(CONTEXT + 1) :], count), rel=1e-5)
    assert "the start of the context is left out in 1 requests" in capsys.readouterr().err


def test_a_continuation_that_is_too_long_is_scored_whole_in_windows(loaded, lm):
    (rolling,) = ask("loglikelihood_rolling", lm, (LONG,))
    ((found, _),) = ask("loglikelihood", lm, ("<|begin_of_text|>", LONG))
    assert found == rolling
    ids, expected = [loaded.tokenizer.encode_with_special("<|begin_of_text|>")[0]], 0.0
    ids += loaded.tokenizer.encode(LONG)
    assert len(ids) > 3 * CONTEXT
    for start in range(0, len(ids) - 1, CONTEXT):
        end = min(start + CONTEXT, len(ids) - 1)
        expected += likelihood(loaded, ids[max(0, end - CONTEXT) : end + 1], end - start)
    assert found == pytest.approx(expected, rel=1e-5)


def test_windows_of_many_documents_share_batches_and_mean_the_same(lm, monkeypatch):
    ran, inner = [], harness.batches

    def counted(*arguments):
        for batch in inner(*arguments):
            ran.append(len(batch[0]))
            yield batch

    monkeypatch.setattr(harness, "batches", counted)
    texts = [(LONG[: 40 * i],) for i in range(1, 9)]
    together = ask("loglikelihood_rolling", lm, *texts)
    windows = sum(ran)
    assert len(ran) == -(-windows // 4) < windows
    apart = [ask("loglikelihood_rolling", lm, text)[0] for text in texts]
    assert together == pytest.approx(apart, rel=1e-6)


def test_the_likeliest_continuation_is_greedy_and_another_is_not(loaded, lm):
    """Of several continuations of one context."""
    encode, decode = loaded.tokenizer.encode, loaded.tokenizer.decode
    for context in LONG.split():
        ids, texts = encode(context), []
        for _ in range(3):
            ids.append(int(loaded.logits(np.array([ids]))[0, -1].argmax()))
            texts.append(decode(ids)[len(context) :])
        if encode(context + texts[-1]) == ids:
            break
    else:
        pytest.fail("no greedy continuation becomes its own tokens")
    asked = [(context, text) for text in (texts[0], texts[2], texts[1] + "x", "x")]
    found = ask("loglikelihood", lm, *asked)
    assert [is_greedy for _, is_greedy in found] == [True, True, False, False]


def test_an_answer_is_kept_as_soon_as_it_is_there(lm):
    kept = {}
    lm.cache_hook = types.SimpleNamespace(
        add_partial=lambda kind, args, answer: kept.update({(kind, args[0]): answer})
    )
    both = ask("loglikelihood", lm, ("the river", " feeds"), ("a", " mill"))
    (rolling,) = ask("loglikelihood_rolling", lm, (LONG,))
    (text,) = ask("generate_until", lm, ("the river", {"max_gen_toks": 3}))
    assert kept == {
        ("loglikelihood", "the river"): both[0],
        ("loglikelihood", "a"): both[1],
        ("loglikelihood_rolling", LONG): rolling,
        ("generate_until", "the river"): text,
    }


# --- completions ---


@pytest.mark.parametrize("options", [{"max_gen_toks": CONTEXT}, {"max_gen_toks": 1000}, {}])
def test_a_prompt_is_kept_and_the_generation_cut_where_there_is_no_room_for_it(
    loaded, lm, options, capsys
):
    prompts = ["the river", "the old mill crosses two bridges."]
    expected = []
    for prompt in prompts:
        ids = loaded.tokenizer.encode(prompt)
        expected.append(completed(loaded, ids, CONTEXT - len(ids)))
    assert NEW_TOKENS > CONTEXT
    assert ask("generate_until", lm, *((prompt, options) for prompt in prompts)) == expected
    assert "generation ends early in 2 requests" in capsys.readouterr().err
    ids = loaded.tokenizer.encode(LONG)
    assert ask("generate_until", lm, (LONG, options)) == [completed(loaded, ids[1 - CONTEXT :], 1)]


def test_a_prompt_that_leaves_no_room_loses_its_start_as_in_the_hf_backend(loaded, lm, capsys):
    ids = loaded.tokenizer.encode(LONG)
    expected = completed(loaded, ids[-(CONTEXT - 20) :], 20)
    assert ask("generate_until", lm, (LONG, {"max_gen_toks": 20})) == [expected]
    assert "left out for 20 new tokens in 1 requests" in capsys.readouterr().err


def test_an_empty_prompt_is_completed_after_the_first_token(loaded, lm):
    first = loaded.tokenizer.encode_with_special("<|begin_of_text|>")
    assert ask("generate_until", lm, ("", {"max_gen_toks": 9})) == [completed(loaded, first, 9)]


def test_requests_are_completed_in_batches_of_what_is_asked_for_alike(loaded, lm, monkeypatch):
    ran, inner = [], loaded.generator.generate

    def counted(prompts, *arguments):
        ran.append(len(prompts))
        return inner(prompts, *arguments)

    monkeypatch.setattr(loaded.generator, "generate", counted)
    words = LONG.split()
    prompts = [" ".join(words[: 1 + i % 5]) for i in range(9)]
    asked = [(prompt, {"max_gen_toks": 5 + (i == 7)}) for i, prompt in enumerate(prompts)]
    found = ask("generate_until", lm, *asked)
    assert ran == [4, 4, 1]
    monkeypatch.undo()
    encode = loaded.tokenizer.encode
    assert found == [
        completed(loaded, encode(prompt), options["max_gen_toks"]) for prompt, options in asked
    ]


def test_sampling_is_asked_for_and_repeats_differ(lm):
    prompt, greedy = "the river", {"max_gen_toks": 12}
    hot = greedy | {"do_sample": True, "temperature": 3.0}
    (expected,) = ask("generate_until", lm, (prompt, greedy))
    for same in (
        hot | {"do_sample": False},
        hot | {"temperature": 0},
        hot | {"top_k": 1},
        hot | {"top_p": 1e-9},
        {"max_new_tokens": 12, "num_beams": 1, "temperature": None},
    ):
        assert ask("generate_until", lm, (prompt, same)) == [expected]
    sampled = ask("generate_until", lm, *[(prompt, hot)] * 6)
    assert len(set(sampled)) == 6 and expected not in sampled
    assert ask("generate_until", lm, *[(prompt, hot)] * 6) == sampled


def test_generation_ends_where_a_text_does_that_ends_it(lm, program_calls):
    (whole,) = ask("generate_until", lm, ("a farmer", {"max_gen_toks": 48}))
    assert program_calls[-1] == 48 and len(whole) > 40
    program_calls.clear()
    stop = whole[6:12]  # of several tokens
    until = {"max_gen_toks": 48, "until": ["\0", stop]}
    assert ask("generate_until", lm, ("a farmer", until)) == [whole.split(stop)[0]]
    assert program_calls[-1] < 48


def test_a_text_ends_a_completion_across_tokens_and_inside_of_characters():
    tokenizer = byte_tokenizer("<|x|>")
    said = ["so ☃\n\nno", "\n☃ und ü", "<|x|>ab", "abcd"]
    ids = [tokenizer.encode_with_special(text) for text in said]
    longest = max(map(len, ids))
    ids = np.array([one + [0] * (longest - len(one)) for one in ids]).T
    special = tokenizer.encode_with_special("<|x|>")
    endings = Endings(tokenizer, [99, 99, 99, 3], ["☃ u", "\n\n"], special)
    opened = []
    for step in range(longest):
        all_ended = endings(step, ids[step])
        opened.append(sorted(endings._open))
        if all_ended:
            break
    assert opened[0] == [0, 1, 3] and opened[2] == [0, 1] and opened[-1] == []
    assert opened.index([0]) == len("\n☃ u".encode()) - 1
    assert len(opened) == len("so ☃\n\n".encode())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_beams": 4}, "gen_kwargs have num_beams=4; expected max_gen_toks"),
        ({"temprature": 0.5}, "gen_kwargs have temprature=0.5"),
        ({"until": 5}, "until=5; expected a text or a list"),
        ({"max_gen_toks": 0}, "ask for 0 tokens"),
        ({"max_gen_toks": "many"}, "expected numbers"),
        ({"temperature": -1}, "temperature: got -1"),
    ],
)
def test_what_is_not_known_of_a_request_is_named(given, message):
    with pytest.raises(UserError, match=message):
        Options.of(given)


def test_the_names_of_lengths_and_a_single_text_are_understood():
    asked = Options.of({"max_tokens": "7", "until": "x", "do_sample": True, "top_k": 5})
    assert asked == Options(7, ("x",), Sampling(1.0, top_k=5))
    assert Options.of({"until": ["", "y"], "temperature": 0.5, "num_return_sequences": 1}) == (
        Options(NEW_TOKENS, ("y",), Sampling(0.5))
    )


# --- chats ---


def of_tokenizer(loaded: LoadedModel, tokenizer: Any) -> Any:
    """The adapter of a model with another tokenizer."""
    artifact = dataclasses.replace(loaded.artifact)
    vars(artifact)["tokenizer"] = tokenizer
    return harness._Adapter(dataclasses.replace(loaded, artifact=artifact), (), None, 4)


def test_messages_become_the_template_s_text_and_its_special_tokens(loaded, lm):
    tokenizer, messages = loaded.tokenizer, said("Where?", "There.", "Who?", system="Be brief.")
    text = lm.apply_chat_template(messages)
    assert (
        text == tokenizer.chat.render(messages)
        and lm.chat_template(True) == FORMS["llama 3"].template
    )
    assert lm._encode(text) == tokenizer.chat.encode(tokenizer, messages)
    assert lm.chat_template(False) is None
    assert lm.tokenizer_name != of_tokenizer(loaded, byte_tokenizer()).tokenizer_name


def test_the_last_message_may_be_left_open(loaded, lm):
    text = lm.apply_chat_template(said("Where?", "It is "), add_generation_prompt=False)
    assert text.endswith("<|end_header_id|>\n\nIt is")  # the template trims it
    chatml = of_tokenizer(loaded, byte_chat("chatml"))
    text = chatml.apply_chat_template(said("Where?", "It is "), add_generation_prompt=False)
    assert text.endswith("<|im_start|>assistant\nIt is ")
    gone = of_tokenizer(loaded, byte_chat("chatml", "{{ messages[0].content }}"))
    with pytest.raises(UserError, match="leaves out the end of the last message"):
        gone.apply_chat_template(said("Where?", "It is"), add_generation_prompt=False)


def test_a_template_that_takes_no_system_message_gets_none(loaded, capsys):
    mistral = of_tokenizer(loaded, byte_chat("mistral"))
    text = mistral.apply_chat_template(said("Who?", system="Be brief."))
    assert text == mistral.apply_chat_template(said("Who?")) and "Who?" in text
    assert "messages of the system are left out" in capsys.readouterr().err
    with pytest.raises(UserError, match="roles must alternate"):
        mistral.apply_chat_template(said("Who?")[:1] * 2)


def test_a_model_without_a_template_says_so_to_the_harness(loaded):
    lm = of_tokenizer(loaded, byte_tokenizer())
    with pytest.raises(UserError, match="has no chat template"):
        lm.apply_chat_template(said("Who?"))
    with pytest.raises(UserError, match="has no chat template"):
        lm.chat_template(True)
