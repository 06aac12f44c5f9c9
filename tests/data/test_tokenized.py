"""Conversations as tokens: which of them are the assistant's, and what is refused."""

import dataclasses
import datetime
import json
from typing import Any

import pytest

from flexolmo_jax.data import rendering
from flexolmo_jax.data.byte_level import BYTES
from flexolmo_jax.data.chat import Chat
from flexolmo_jax.data.documents import Document
from flexolmo_jax.data.tokenized import Tokenized, tokenized
from flexolmo_jax.data.tokenizer import PRE_TOKENS, Tokenizer
from flexolmo_jax.errors import UserError
from tests.chats import FORMS, MARKED, UNMARKED, byte_chat, byte_tokenizer, chat_of, said

PLAIN = """{% for m in messages %}{{ m.role | upper }}: {{ m.content }}
{% endfor %}{% if add_generation_prompt %}ASSISTANT: {% endif %}"""


def documents(*conversations: list[dict[str, str]]) -> list[Document]:
    return [Document("", f"a.jsonl, line {i}", tuple(c)) for i, c in enumerate(conversations, 1)]


def of(tokenizer: Tokenizer, *contents: str, **how: Any) -> Tokenized:
    (found,) = tokenized(documents(said(*contents, **how)), tokenizer)
    return found


def encoded(tokenizer: Tokenizer, messages: list[dict[str, str]], prompt: bool) -> list[int]:
    assert tokenizer.chat is not None
    return tokenizer.chat.encode(tokenizer, messages, prompt)


def names(tokenizer: Tokenizer, ids) -> str:
    """The text of tokens, special ones by their names."""
    added = {i: token.content for i, token in tokenizer.added_tokens.items()}
    content = b"".join(
        added[i].encode() if i in added else bytes([BYTES[tokenizer.token(i)]])
        for i in map(int, ids)
    )
    return content.decode()


def answers(tokenizer: Tokenizer, found: Tokenized) -> str:
    assert found.context is not None
    return names(tokenizer, found.tokens[~found.context])


CONVERSATIONS = (
    ("a", "b"),
    ("Where?", "\n The river. \n\n", "And <|im_end|> [INST] you?", "two <|im_end|></s> b", "x"),
    ("東京", "naïve 🙂", "", "", "q", "last"),
)


@pytest.mark.parametrize("contents", CONVERSATIONS)
@pytest.mark.parametrize(("form", "end"), [("chatml", "<|im_end|>"), ("llama 3", "<|eot_id|>")])
def test_the_answers_and_the_ends_of_their_turns_are_the_assistants(form, end, contents):
    tokenizer = byte_chat(form)
    found = of(tokenizer, *contents, system="Be brief.")
    ids = encoded(tokenizer, said(*contents, system="Be brief."), False)
    assert found.tokens.tolist() == [*ids, tokenizer.eos_id]
    said_ = [text.strip() if form == "llama 3" else text for text in contents[1::2]]
    assert answers(tokenizer, found) == "".join(text + end for text in said_)
    assert found.lost_bytes == found.lost_in_context == 0


@pytest.mark.parametrize("contents", CONVERSATIONS)
def test_a_template_that_marks_turns_and_one_that_does_not_give_the_same(contents):
    marked, unmarked = (byte_chat("chatml", template) for template in (MARKED, UNMARKED))
    one, other = (of(tokenizer, *contents) for tokenizer in (marked, unmarked))
    assert one.tokens.tolist() == other.tokens.tolist()
    assert one.context is not None and other.context is not None
    assert one.context.tolist() == other.context.tolist()
    assert encoded(marked, said(*contents), False) == one.tokens.tolist()[:-1]


def test_a_document_does_not_end_twice():
    """Where the template ends with EOS itself."""
    form = FORMS["mistral"]
    tokenizer = byte_tokenizer("[INST]", "[/INST]")
    tokenizer.chat = Chat(form.template, {"bos_token": "", "eos_token": "<|endoftext|>"}, ())
    tokenizer.chat = dataclasses.replace(tokenizer.chat, ends=("<|endoftext|>",))
    found = of(tokenizer, "a", "b")
    assert names(tokenizer, found.tokens) == "[INST] a[/INST] b<|endoftext|>"
    assert answers(tokenizer, found) == " b<|endoftext|>"
    # of a text the same EOS
    (text,) = tokenized([Document("a", "a.txt")], tokenizer)
    assert names(tokenizer, text.tokens) == "a<|endoftext|>" and text.context is None


def test_a_template_may_end_no_turn():
    tokenizer = byte_chat("chatml", PLAIN)
    found = of(tokenizer, "a", "b", "c", "d")
    whole = "USER: a\nASSISTANT: b\nUSER: c\nASSISTANT: d\n<|endoftext|>"
    assert names(tokenizer, found.tokens) == whole
    assert answers(tokenizer, found) == "b\nd\n"


def test_a_token_across_the_beginning_of_an_answer_is_the_assistants(tmp_path):
    """Line ends are one token, with dolma2's rule of cutting."""
    tokenizer = byte_tokenizer("<|im_start|>", "<|im_end|>")
    tokenizer.save(tmp_path / "t.json")
    fields = json.loads((tmp_path / "t.json").read_text())
    fields["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": PRE_TOKENS}, "behavior": "Isolated"}
            | {"invert": False},
            fields["pre_tokenizer"] | {"use_regex": False},
        ],
    }
    fields["model"]["vocab"]["ĊĊ"] = 256
    for token in fields["added_tokens"]:
        token["id"] += 1
    fields["model"]["merges"] = [["Ċ", "Ċ"]]
    tokenizer = Tokenizer(json.dumps(fields))
    tokenizer.chat = Chat(UNMARKED, {}, ("<|im_end|>",))
    found = of(tokenizer, "a", "\nb", "c\n", "d")
    assert found.context is not None
    own = [tokenizer.token(int(i)) for i in found.tokens[~found.context]]
    assert own == ["ĊĊ", "b", "<|im_end|>", "d", "<|im_end|>"]


def test_bytes_that_are_lost_are_counted_where_they_are(lossy_tokenizer, tmp_path):
    lossy_tokenizer.save(tmp_path / "t.json")
    tokenizer, tokenizer.chat = chat_of(tmp_path / "t.json", "chatml")
    found = of(tokenizer, "one\x04 two\x1d", "three\x04")
    assert (found.lost_bytes, found.lost_in_context) == (3, 2)


def test_bytes_that_are_changed_are_counted_where_they_are(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "t.json")
    fields = json.loads((tmp_path / "t.json").read_text("utf-8"))
    fields["normalizer"] = {"type": "NFC"}
    (tmp_path / "t.json").write_text(json.dumps(fields), "utf-8")
    normalising, normalising.chat = chat_of(tmp_path / "t.json", "chatml")
    found = of(normalising, "e\u0301", "a\u0308 e\u0301")
    assert (found.changed_bytes, found.changed_in_context) == (3, 1)
    assert found.lost_bytes == 0


def test_many_conversations_are_rendered_by_one_process(monkeypatch):
    tokenizer, calls, run = byte_chat("chatml"), [], rendering.subprocess.run
    monkeypatch.setattr(
        rendering.subprocess, "run", lambda *a, **k: calls.append(1) or run(*a, **k)
    )
    chats = [said(f"question {i}", f"answer {i}") for i in range(40)]
    text = Document("between", "b.txt")
    found = tokenized([*documents(*chats), text, *documents(*chats[:1])], tokenizer)
    assert len(calls) == 1
    told = [answers(tokenizer, one) for one in (*found[:40], found[41])]
    assert told == [f"answer {i}<|im_end|>" for i in (*range(40), 0)]
    assert names(tokenizer, found[40].tokens) == "between<|endoftext|>"


def test_a_conversation_that_takes_too_much_is_named_and_the_others_are_not_blamed(monkeypatch):
    monkeypatch.setattr(rendering, "SECONDS", 1)
    slow = "{% if 'slow' in messages[0].content %}{% for a in range(9999) %}"
    slow += "{% for b in range(99999) %}{% endfor %}{% endfor %}{% endif %}"
    tokenizer = byte_chat("chatml", slow + UNMARKED)
    chats = [said("slow" if i == 5 else "quick", "b") for i in range(8)]
    with pytest.raises(UserError, match=r"a\.jsonl, line 6: the chat template fails .* 1 seconds"):
        tokenized(documents(*chats), tokenizer)


def test_what_the_template_refuses_is_named():
    tokenizer = byte_chat("mistral")
    chats = [said("a", "b"), [*said("a", "b"), *said("c", "d")], [*said("a"), *said("a", "b")]]
    with pytest.raises(UserError, match=r"a\.jsonl, line 3: the chat template fails .*alternate"):
        tokenized(documents(*chats), tokenizer)


THINKING = UNMARKED.replace(
    "'<|im_start|>' + message.role + '\\n'",
    "'<|im_start|>' + message.role + '\\n' + ('<think>' if loop.last else '')",
)
CUTTING = MARKED.replace("{% for message", "{% set all %}{% for message", 1)
CUTTING += "{% endset %}{{ all[:-3] }}"
NOTHING = MARKED.replace("{% generation %}", "{% if false %}{% generation %}").replace(
    "{% endgeneration %}", "{% endgeneration %}{% endif %}"
)
NO_ANSWERS = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "contents", "complaint"),
    [
        (THINKING, ("a", "b", "c", "d"), "cannot be told: the chat template writes a message of"),
        (THINKING, ("a", "b"), "or begins it otherwise than where the model is to answer"),
        (CUTTING, ("a", "b"), "the chat template cuts what it marks with {% generation %}"),
        (NOTHING, ("a", "b"), "the chat template writes nothing of what the assistant says"),
        (NO_ANSWERS, ("a", "b"), "the chat template writes nothing of what the assistant says"),
    ],
)
def test_a_template_that_does_not_tell_whose_tokens_they_are_is_refused(
    template, contents, complaint
):
    with pytest.raises(UserError) as refused:
        of(byte_chat("chatml", template), *contents)
    told = str(refused.value)
    assert told.startswith("a.jsonl, line 1: ") and complaint in told
    assert told.endswith('or give the document as "text"') and len(told) < 400


def test_an_answer_before_any_question_is_refused_where_the_template_has_no_place_for_it():
    first = [{"role": "assistant", "content": "Hello!"}, *said("a", "b")]
    (found,) = tokenized(documents(first), tokenizer := byte_chat("chatml", UNMARKED))
    assert answers(tokenizer, found) == "Hello!<|im_end|>b<|im_end|>"
    with pytest.raises(UserError, match="cannot be told"):  # it looks at the first message
        tokenized(documents(first), byte_chat("chatml"))


def test_a_tokenizer_without_a_template_is_told_of():
    with pytest.raises(UserError) as refused:
        tokenized(documents(said("a", "b")), byte_tokenizer())
    assert "a.jsonl, line 1: it has messages, and the tokenizer has no chat" in str(refused.value)


def test_messages_with_every_character_for_private_use_are_named():
    every = "".join(map(chr, range(0xE000, 0xF8FF)))
    with pytest.raises(UserError, match=r"a\.jsonl, line 2: messages have every character for"):
        tokenized(documents(said("a", "b"), said(every, "b")), byte_chat("chatml"))


def test_a_template_is_told_the_same_date_on_every_day():
    dated = "{{ strftime_now('%d %b %Y') }} " + UNMARKED
    tokenizer = byte_chat("chatml", dated)
    assert names(tokenizer, of(tokenizer, "a", "b").tokens).startswith("26 Jul 2024 <|im_start|>")
    today = f"{datetime.datetime.now():%b %Y} "
    assert today in tokenizer.decode(encoded(tokenizer, said("a"), True))
