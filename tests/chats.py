"""Chat templates in the forms that instruct models use, and tokenizers with their tokens."""

import itertools
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flexolmo_jax.config import ModelConfig
from flexolmo_jax.data.byte_level import BYTES
from flexolmo_jax.data.chat import Chat, make_chat
from flexolmo_jax.data.tokenizer import EOS, PAD, Tokenizer
from tests.convert.conftest import write_checkpoint


class Form(NamedTuple):
    """What a published tokenizer says of its chats."""

    template: str
    tokens: dict[str, str]
    ends: tuple[str, ...]
    special: tuple[str, ...]  # tokens that the tokenizer needs


CHATML = """{%- if messages[0]['role'] != 'system' %}
{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'assistant' and '</think>' in message.content %}
        {%- set said = message.content.split('</think>')[-1].lstrip('\\n') %}
    {%- else %}
        {%- set said = message.content %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + said + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
LLAMA3 = """{{- bos_token }}
{%- set ns = namespace(first=true) %}
{% for message in messages %}
    {%- set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'
        + message['content'] | trim + '<|eot_id|>' %}
    {%- if not ns.first and message.role == 'system' %}{% continue %}{% endif %}
    {%- set ns.first = false %}
    {{- content }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}"""
MISTRAL = """{{ bos_token }}{% for message in messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{% endif %}
{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + '[/INST]' }}
{%- else %}{% generation %}{{ ' ' + message['content'] + eos_token }}{% endgeneration %}
{% endif %}
{% endfor %}
"""
# ChatML that says itself what the assistant's is, and the same without
MARKED = """{% for message in messages %}
{{ '<|im_start|>' + message.role + '\\n' }}
{%- if message.role == 'assistant' %}
{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}
{%- else %}{{ message.content + '<|im_end|>\\n' }}
{%- endif %}
{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
UNMARKED = re.sub(r"\{% (end)?generation %\}", "", MARKED)
FORMS = {
    "chatml": Form(
        CHATML,
        {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
        ("<|im_end|>", "<|endoftext|>"),
        ("<|im_start|>", "<|im_end|>"),
    ),
    "llama 3": Form(
        LLAMA3,
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
        ("<|eot_id|>",),
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
    "mistral": Form(
        MISTRAL,
        {"bos_token": "<s>", "eos_token": "</s>"},
        ("</s>",),
        ("<s>", "</s>", "[INST]", "[/INST]"),
    ),
}


def with_tokens(file: Path, *names: str, **fields: bool) -> Tokenizer:
    """The tokenizer of a file with more special tokens."""
    content = json.loads(file.read_text())
    for name in names:
        token = {"id": len(content["model"]["vocab"]) + len(content["added_tokens"])}
        token |= {"content": name, "special": True, "normalized": False}
        token |= {"single_word": False, "lstrip": False, "rstrip": False}
        content["added_tokens"].append(token | fields)
    return Tokenizer(json.dumps(content))


def chat_of(file: Path, name: str, **fields: bool) -> tuple[Tokenizer, Chat]:
    """A tokenizer with the special tokens of a form, and its chat."""
    form = FORMS[name]
    tokenizer = with_tokens(file, *form.special, **fields)
    return tokenizer, make_chat(form.template, form.tokens, form.ends, tokenizer, "a model")


def byte_tokenizer(*special: str) -> Tokenizer:
    """A token for each byte, and special ones: the same in every version of everything."""
    plain = {"normalized": False, "single_word": False, "lstrip": False, "rstrip": False}
    added = [
        {"id": len(BYTES) + i, "content": name, "special": True} | plain
        for i, name in enumerate((EOS, PAD, *special))
    ]
    steps = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    steps["use_regex"] = True
    vocab = {sign: i for i, sign in enumerate(sorted(BYTES))}
    unset = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")
    model = {"type": "BPE", "vocab": vocab, "merges": []} | dict.fromkeys(unset)
    model |= dict.fromkeys(("fuse_unk", "byte_fallback", "ignore_merges"), False)
    fields = {"version": "1.0", "added_tokens": added, "model": model}
    fields |= {"pre_tokenizer": steps, "decoder": steps}
    unset = ("truncation", "padding", "normalizer", "post_processor")
    return Tokenizer(json.dumps(fields | dict.fromkeys(unset)))


def byte_chat(name: str, template: str = "") -> Tokenizer:
    """A token for each byte and the special ones of a form, with its chat, or another template."""
    form = FORMS[name]
    tokenizer = byte_tokenizer(*form.special)
    made = make_chat(template or form.template, form.tokens, form.ends, tokenizer, "a model")
    tokenizer.chat = made
    return tokenizer


def write_instruct(
    source: Path, name: str, config: ModelConfig, tokenizer: Path, change: Any = None
) -> Path:
    """A Hugging Face checkpoint of random weights with the tokens and the template of a form."""
    form = FORMS[name]
    write_checkpoint(source, config, np.float32, with_tokens(tokenizer, *form.special), change)
    (source / "tokenizer_config.json").write_text(json.dumps(form.tokens))
    (source / "chat_template.jinja").write_text(form.template)
    return source


def said(*contents: str, system: str = "") -> list[dict[str, str]]:
    """Messages of user and assistant in turn, behind one of the system."""
    turns = zip(itertools.cycle(("user", "assistant")), contents, strict=False)
    everything = [("system", system), *turns] if system else turns
    return [{"role": role, "content": content} for role, content in everything]
