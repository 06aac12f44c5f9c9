"""The rules that cut text before BPE, against the same rules put together by hand."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from flexolmo_jax.convert.gguf_tokenizer import RULES, tokenizer_of
from flexolmo_jax.data.tokenizer import PRE_TOKENS

TEXTS = [
    "It's 2026, and WE'LL see 1234567 things;  two\n\n  spaces\tand tabs \r\n",
    "naïve café e\u0301 東京 10月 Ελλάδα देवनागरी עברית العربية ٣٤٥ ⅷ ½ 🙂👩‍👩‍👧",
    "def f(x):\n    return x[0]+=1  # 3.14159e-10\n\n\n",
    "don't they're I'd 'tis O'Neil '1990s x'll 123abc456",
    "   leading, trailing   ",
]
BYTE_LEVEL = {"add_prefix_space": False}
BY_HAND = {
    "gpt-2": [pre_tokenizers.ByteLevel(use_regex=True, **BYTE_LEVEL)],
    "smollm": [
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(use_regex=True, **BYTE_LEVEL),
    ],
    "llama-bpe": [
        pre_tokenizers.Split(Regex(PRE_TOKENS), "isolated"),
        pre_tokenizers.ByteLevel(use_regex=False, **BYTE_LEVEL),
    ],
    "qwen2": [
        pre_tokenizers.Split(Regex(PRE_TOKENS.replace("{1,3}", "")), "isolated"),
        pre_tokenizers.ByteLevel(use_regex=False, **BYTE_LEVEL),
    ],
}


def recorded(backend: Backend, rule: str) -> dict[str, Any]:
    """What a GGUF file records of a tokenizer."""
    model = json.loads(backend.to_str())["model"]
    names = sorted(model["vocab"], key=model["vocab"].get)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": rule,
        "tokenizer.ggml.tokens": [*names, "[gap]", "<tool>"],
        "tokenizer.ggml.token_type": [3, *[1] * (len(names) - 1), 5, 4],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in model["merges"]],
    }


@pytest.mark.parametrize("rule", BY_HAND)
def test_ids_are_those_of_the_same_tokenizer_put_together_by_hand(rule):
    backend = Backend(BPE())
    if rule == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(BY_HAND[rule])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = BpeTrainer(
        vocab_size=700,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS * 3, trainer)
    tokenizer = tokenizer_of(recorded(backend, rule), Path("recorded.gguf"))
    size = backend.get_vocab_size()
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (size + 2, 0)
    for text in TEXTS:
        assert tokenizer.encode(text) == backend.encode(text).ids, text
    # text can be a token that users defined, and no gap between ids
    assert tokenizer.encode("<tool>") == [size + 1]
    assert size not in tokenizer.encode("[gap]")


def test_rules_differ_in_digits_and_normal_forms():
    digits = {
        name: rule.single_digits or r"\p{N}|" in (rule.split or "") for name, rule in RULES.items()
    }
    assert [name for name, alone in digits.items() if alone] == ["smollm", "starcoder", "qwen2"]
    assert [name for name, rule in RULES.items() if rule.nfc] == ["qwen2"]
    whole = [name for name, rule in RULES.items() if rule.ignore_merges]
    assert whole == ["llama-bpe", "llama3", "llama-v3"]
