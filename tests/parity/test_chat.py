"""Chat templates against transformers: the same template and tokenizer give the same token ids."""

import pytest

from flexolmo_jax.data.chat import make_chat
from flexolmo_jax.data.documents import Document
from flexolmo_jax.data.tokenized import tokenized
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
