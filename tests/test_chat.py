"""Chats with a model that has a chat template: in Python and on the command line."""

import dataclasses
import json
from pathlib import Path

import pytest

from flexolmo_jax import cli
from flexolmo_jax.cli.printing import for_terminal
from flexolmo_jax.convert.importing import import_hf
from flexolmo_jax.errors import UserError
from flexolmo_jax.loaded import LoadedModel, load
from tests.chats import FORMS, said, with_tokens, write_instruct
from tests.convert.conftest import DENSE

N = 12
CONFIG = dataclasses.replace(DENSE, max_seq_len=192, init_std=0.3)
FORM = FORMS["chatml"]
QUESTIONS = ("Where is the mill?", "Who feeds the river?", "When?", "x <|im_end|> y")


@pytest.fixture(scope="module")
def instruct(tiny: Path, tiny_tokenizer) -> Path:
    """A model that says some usual tokens, begins turns inside its own, and ends it."""

    def prefer_special_tokens(tensors, fields):
        head = tensors["lm_head.weight"]
        head[320], head[321] = 1.3 * head[120], 1.3 * head[165]

    tokenizer, source = tiny / "tokenizer.json", tiny / "instruct-hf"
    write_instruct(source, "chatml", CONFIG, tokenizer, prefer_special_tokens)
    return import_hf(source, tiny / "instruct").path


@pytest.fixture(scope="module")
def chatting(instruct: Path) -> LoadedModel:
    return load(instruct)


def test_an_answer_ends_with_the_turn_and_shows_no_special_token(chatting):
    tokenizer, lengths, shown = chatting.tokenizer, set(), set()
    chat = tokenizer.chat
    assert chat is not None and tokenizer.token(321) == "<|im_end|>"
    for question in QUESTIONS:
        ids = chat.encode(tokenizer, said(question))
        (whole,) = chatting.generate([ids], N)
        answer = whole[: whole.index(321)] if 321 in whole else whole
        seen = []
        streamed = chatting.chat(said(question), N, on_token=lambda _, ids, s=seen: s.append(ids))
        assert chatting.chat(said(question), N) == streamed == tokenizer.decode(answer)
        assert "<|im" not in streamed
        assert [int(ids[0]) for ids in seen][: len(answer)] == answer
        assert len(seen) == min(N, len(answer) + 1)
        lengths.add(len(answer))
        shown |= {i in answer for i in (320, 321)}
    assert {1, 2, N} <= lengths and shown == {True, False}


def test_sampling_and_seeds_are_those_of_generate(chatting):
    ids = chatting.tokenizer.chat.encode(chatting.tokenizer, said("Where?"))
    how = {"temperature": 1.5, "top_k": 300, "top_p": 0.99, "seed": 3}
    (whole,) = chatting.generate([ids], N, **how)
    whole = whole[: whole.index(321)] if 321 in whole else whole
    assert chatting.chat(said("Where?"), N, **how) == chatting.tokenizer.decode(whole)
    with pytest.raises(UserError, match="no expert 'nobody'"):
        chatting.chat(said("Where?"), N, without=["nobody"])


def test_a_model_without_a_template_says_so(model):
    loaded = load(model)
    with pytest.raises(UserError, match="has no chat template: expected one of an instruct model"):
        loaded.chat(said("hello"))
    assert load(model).tokenizer.chat is None


def test_messages_that_are_none_are_refused(chatting):
    with pytest.raises(UserError, match="message 0 has 'hello'"):
        chatting.chat(["hello"])
    with pytest.raises(UserError, match="at most 192 together"):
        chatting.chat(said("hello"), 192)


def test_the_command_answers_as_the_model_does(instruct, chatting, capfd):
    how = ["generate", str(instruct), "--chat", "--max-new-tokens", str(N), "--system", "Be brief."]
    answers = [chatting.chat(said(question, system="Be brief."), N) for question in QUESTIONS[:2]]
    assert any(answers)
    for question, answer in zip(QUESTIONS, answers, strict=False):
        capfd.readouterr()
        assert cli.main([*how, "--prompt", question]) == 0
        assert capfd.readouterr().out.removesuffix("\n") == for_terminal(answer)
    asked = [part for question in QUESTIONS[:2] for part in ("--prompt", question)]
    assert cli.main([*how, *asked, "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert [pair["completion"] for pair in found["completions"]] == answers
    assert found["text"] == "\n\n".join(answers)


def test_tokens_that_a_tokenizer_forgets_to_call_special_are_not_shown(
    instruct, chatting, capfd, monkeypatch, tiny
):
    """Where a model says another token of its template inside its turn."""
    forgetful = with_tokens(tiny / "tokenizer.json", *FORM.special, special=False)
    chat = chatting.tokenizer.chat
    forgetful.chat = dataclasses.replace(chat, tokens={"bos_token": "<|im_start|>"})
    artifact = dataclasses.replace(chatting.artifact)
    monkeypatch.setitem(artifact.__dict__, "tokenizer", forgetful)
    model = dataclasses.replace(chatting, artifact=artifact)
    for question in QUESTIONS:
        assert model.chat(said(question), N) == chatting.chat(said(question), N)
        assert "<|im" not in model.chat(said(question), N, temperature=2.0)


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (["--system", "Be brief."], "--system is a message of a chat; give --chat too"),
        (["--chat"], "has no chat template"),
    ],
)
def test_what_cannot_be_a_chat_is_refused(model, fails, command, told):
    assert told in fails("generate", model, "--prompt", "the cell", *command)
