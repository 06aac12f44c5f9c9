"""Chat templates against transformers: the same template and tokenizer give the same token ids."""

import json

import pytest

from flexolmo_jax.data.chat import make_chat
from flexolmo_jax.data.documents import Document
from flexolmo_jax.data.tokenized import tokenized
from flexolmo_jax.data.tokenizer import Tokenizer
from tests.chats import FORMS, MARKED, UNMARKED, Form, said, with_tokens

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.parity

CONVERSATIONS = {
    "one message": said("Where is the mill?"),
    "spaces and lines": said(" \n two lines\n  and spaces \n\n", "\tYes.  ", "  \n"),
    "a system message": said(
        "Who?", "<think>\nhm\n</think>\n\nThe farmer.", "x", system="Be brief."
    ),
    "signs of special tokens": said(
        "a < b [i] |> <|", "> [ <", "<|end_of", "im_end|>", "ends in <"
    ),
    "other scripts": said("Grüße, 水车 🛠️\u200d!", "«да»", "e\u0301 \ufffd"),
    "nothing": said(""),
}
TOOLS = """{%- macro shown(x) %}{{ x | tojson }}{% endmacro %}
{% for m in messages %}{% if loop.index > 3 %}{% break %}{% endif %}
{{ shown({'b': m.content, 'a': [loop.index, tools is none]}) }}<|eot|>{{ m.role | title }}
{% endfor %}{{ '{%s}' % bos_token }}{{ dict(a=1).items() | list }}{{ strftime_now('%Y') | length }}
"""
ALL = FORMS | {"macros": Form(TOOLS, {"bos_token": "<s>"}, ("<|eot|>",), ("<s>", "<|eot|>"))}


@pytest.mark.parametrize("generation_prompt", [True, False])
@pytest.mark.parametrize("stripping", [{}, {"lstrip": True}, {"rstrip": True}], ids=str)
@pytest.mark.parametrize("form", ALL)
def test_ids_equal_those_of_transformers(
    tiny, tiny_tokenizer, tmp_path, form, stripping, generation_prompt
):
    template, tokens, ends, special = ALL[form]
    ours = with_tokens(tiny / "tokenizer.json", *special, **stripping)
    chat = make_chat(template, tokens, ends, ours, "a model")
    ours.save(tmp_path)
    file = str(tmp_path / "tokenizer.json")
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=file, chat_template=template, **tokens
    )
    compared = 0
    for name, messages in CONVERSATIONS.items():
        if form == "mistral" and messages[0]["role"] == "system":
            continue  # refused by the template, and by both of us
        how = {"add_generation_prompt": generation_prompt}
        expected = theirs.apply_chat_template(messages, tokenize=True, return_dict=False, **how)
        assert chat.encode(ours, messages, generation_prompt) == expected, name
        assert chat.render(messages, generation_prompt) == theirs.apply_chat_template(
            messages, tokenize=False, **how
        )
        compared += 1
    assert compared >= 5


@pytest.mark.parametrize("template", [MARKED, UNMARKED], ids=["marked", "unmarked"])
@pytest.mark.parametrize("stripping", [{}, {"lstrip": True}, {"rstrip": True}], ids=str)
def test_the_assistants_tokens_equal_those_of_transformers(
    tiny, tiny_tokenizer, tmp_path, stripping, template
):
    """By a template's own marks; and of the same template without them, by beginnings."""
    _, tokens, ends, special = FORMS["chatml"]
    ours = with_tokens(tiny / "tokenizer.json", *special, **stripping)
    ours.chat = make_chat(template, tokens, ends, ours, "a model")
    ours.save(tmp_path / "tokenizer.json")
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"), chat_template=MARKED, **tokens
    )
    answered = [messages for messages in CONVERSATIONS.values() if len(messages) > 1]
    found = tokenized([Document("", "a.jsonl", tuple(one)) for one in answered], ours)
    for messages, one in zip(answered, found, strict=True):
        how = {"return_dict": True, "return_assistant_tokens_mask": True}
        expected = theirs.apply_chat_template(messages, tokenize=True, **how)
        assert one.tokens.tolist() == [*expected["input_ids"], ours.eos_id]
        assert one.context is not None
        assert (~one.context).astype(int).tolist() == [*expected["assistant_masks"], 0]
    assert len(answered) == 4


@pytest.mark.parametrize("has_template", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_texts_with_special_tokens_become_what_transformers_makes_of_them(
    tiny, tiny_tokenizer, tmp_path, form, has_template
):
    """Also where tokenizer.json has a template of its own, which begins every text."""
    _, tokens, _, special = FORMS[form]
    with_tokens(tiny / "tokenizer.json", *special).save(tmp_path / "tokenizer.json")
    file = tmp_path / "tokenizer.json"
    if has_template:
        content, first = json.loads(file.read_text()), special[0]
        ids = [token["id"] for token in content["added_tokens"] if token["content"] == first]
        begins = {"SpecialToken": {"id": first, "type_id": 0}}
        texts = [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"]
        content["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [begins, texts[0]],
            "pair": [begins, *texts],
            "special_tokens": {first: {"id": first, "ids": ids, "tokens": [first]}},
        }
        file.write_text(json.dumps(content))
    ours = Tokenizer.load(file)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(file), **tokens)
    for text in ("", "the river", f"a{special[-1]} b<|endoftext|>", f"{special[0]}x", "\n ☃"):
        for add in (True, False):
            expected = theirs.encode(text, add_special_tokens=add)
            assert ours.encode_with_special(text, add) == expected
    assert (ours.encode_with_special("x") != ours.encode("x")) == has_template


@pytest.mark.parametrize("form", FORMS)
def test_a_message_left_open_is_what_transformers_leaves_open(tiny, tiny_tokenizer, form):
    template, tokens, ends, special = FORMS[form]
    ours = with_tokens(tiny / "tokenizer.json", *special)
    chat = make_chat(template, tokens, ends, ours, "a model")
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=ours._as_published, chat_template=template, **tokens
    )
    for content in ("It is", "It is ", " It\n\n", ""):
        messages = said("Where is it?", content)
        expected = theirs.apply_chat_template(messages, tokenize=False, continue_final_message=True)
        assert chat.render_open(messages) == expected
