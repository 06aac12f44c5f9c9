"""The tokenizer.json of a GGUF file: from its tokens, its merges, and the name of the rule that
cuts text before BPE (`tokenizer.ggml.pre`). The rules are llama.cpp's (`llama-vocab.cpp`).
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from flexolmo_jax.data.chat import Chat, make_chat
from flexolmo_jax.data.conventions import Conventions
from flexolmo_jax.data.tokenizer import PRE_TOKENS, Tokenizer
from flexolmo_jax.errors import UserError

PREFIX, TEMPLATE = "tokenizer.ggml.", "tokenizer.chat_template"
# special tokens by the names that a template uses; the last two end a turn
NAMED = {
    "bos_token_id": "bos_token",
    "eos_token_id": "eos_token",
    "unknown_token_id": "unk_token",
    "padding_token_id": "pad_token",
    "eot_token_id": "eot_token",
    "eom_token_id": "eom_token",
}
# types of tokens, besides 1 for usual ones
UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 2, 3, 4, 5
BYTE_LEVEL = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": False,
    "use_regex": True,
}


class Rule(NamedTuple):
    split: str | None = None  # an expression; None: GPT-2's
    single_digits: bool = False  # each digit alone, before the split
    nfc: bool = False
    ignore_merges: bool = False  # a whole word of the vocabulary needs none


LLAMA_3 = Rule(PRE_TOKENS, ignore_merges=True)
CL100K = Rule(PRE_TOKENS)
RULES = {
    "gpt-2": Rule(),
    "olmo": Rule(),
    "smollm": Rule(single_digits=True),
    "starcoder": Rule(single_digits=True),
    "llama-bpe": LLAMA_3,
    "llama3": LLAMA_3,
    "llama-v3": LLAMA_3,
    "dbrx": CL100K,  # OLMo 2 and 3
    "smaug-bpe": CL100K,
    "qwen2": Rule(PRE_TOKENS.replace(r"\p{N}{1,3}", r"\p{N}"), nfc=True),
}


def tokenizer_of(fields: Mapping[str, Any], where: Path) -> Tokenizer:
    """By what a file says of itself.

    Raises UserError for what is no byte-level BPE, and for a rule that is not known.
    """
    kind, rule = (fields.get(PREFIX + name) for name in ("model", "pre"))
    if kind != "gpt2":
        raise UserError(
            f"{where}: {PREFIX}model is {kind!r:.80}; expected 'gpt2', a byte-level BPE"
            " ('llama' is SentencePiece's); such a model cannot be imported"
        )
    if rule not in RULES:
        raise UserError(
            f"{where}: {PREFIX}pre is {rule!r:.80}; expected one of {', '.join(RULES)}; import"
            " the model from its Hugging Face checkpoint"
        )
    tokens, types = _list(fields, where, "tokens", str), _list(fields, where, "token_type", int)
    if len(types) != len(tokens) or len(set(tokens)) != len(tokens):
        raise UserError(
            f"{where} has {len(tokens)} tokens, {len(set(tokens))} different ones, and"
            f" {len(types)} types of tokens; expected as many of each; download it again"
        )
    backend = _backend(RULES[rule], tokens, types, _list(fields, where, "merges", str))
    tokenizer = Tokenizer(json.dumps(backend, ensure_ascii=False), str(where))
    tokenizer.chat = _chat(fields, where, tokens, tokenizer)
    bos = fields.get(PREFIX + "bos_token_id")
    if fields.get(PREFIX + "add_bos_token") is True and type(bos) is int and 0 <= bos < len(tokens):
        tokenizer.conventions = Conventions(start=(tokens[bos],))
    return tokenizer


def _chat(
    fields: Mapping[str, Any], where: Path, names: list[str], tokenizer: Tokenizer
) -> Chat | None:
    template = fields.get(TEMPLATE)
    if template is None:
        return None
    if not isinstance(template, str):
        raise UserError(
            f"{where}: {TEMPLATE} is {template!r:.80}; expected text; download it again"
        )
    ids = {ours: fields[PREFIX + name] for name, ours in NAMED.items() if PREFIX + name in fields}
    if unknown := [i for i in ids.values() if type(i) is not int or i >= len(names)]:
        raise UserError(
            f"{where} names the special token {unknown[0]!r:.40}; expected one of its {len(names)}"
            " tokens; download it again"
        )
    tokens = {name: names[i] for name, i in ids.items()}
    ends = [tokens.pop(name) for name in ("eot_token", "eom_token") if name in tokens]
    ends += [tokens["eos_token"]] if "eos_token" in tokens else []
    return make_chat(template, tokens, ends, tokenizer, str(where))


def _list(fields: Mapping[str, Any], where: Path, name: str, kind: type) -> list[Any]:
    value = fields.get(PREFIX + name)
    if not isinstance(value, list) or not all(type(one) is kind for one in value):
        raise UserError(
            f"{where}: {PREFIX}{name} is {value!r:.80}; expected a list of {kind.__name__};"
            " download it again"
        )
    return value


def _backend(rule: Rule, tokens: list[str], types: list[int], merges: list[str]) -> dict[str, Any]:
    """The fields of a tokenizer.json. An unused token fills a gap between ids; it is left out."""
    vocabulary = {name: i for i, name in enumerate(tokens) if types[i] != UNUSED}
    special = (UNKNOWN, CONTROL)
    added = [
        {
            "id": i,
            "content": tokens[i],
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind in special,
        }
        for i, kind in enumerate(types)
        if kind in (*special, USER_DEFINED)
    ]
    return {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": {"type": "NFC"} if rule.nfc else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": _steps(rule)},
        "post_processor": None,
        "decoder": BYTE_LEVEL,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": rule.ignore_merges,
            "vocab": vocabulary,
            "merges": [merge.split(" ") for merge in merges],
        },
    }


def _steps(rule: Rule) -> list[dict[str, Any]]:
    steps: list[dict[str, Any]] = []
    if rule.single_digits:
        steps.append({"type": "Digits", "individual_digits": True})
    if rule.split:
        pattern = {"Regex": rule.split}
        steps.append({"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False})
    return [*steps, BYTE_LEVEL | {"use_regex": rule.split is None}]
