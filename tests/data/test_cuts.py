"""Long texts: cut only where the tokens of the pieces are those of the whole."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend

from flexolmo_jax.data import cuts as module
from flexolmo_jax.data import tokenizer as of_tokenizer
from flexolmo_jax.data.byte_level import BYTES
from flexolmo_jax.data.cuts import find_cuts, pieces
from flexolmo_jax.data.tokenizer import PRE_TOKENS, Tokenizer


def byte_level(*, prefix=False, regex=True):
    how = {"add_prefix_space": prefix, "trim_offsets": True, "use_regex": regex}
    return {"type": "ByteLevel", **how}


def split(expression, behavior="Isolated", invert=False):
    pattern = {"Regex": expression}
    return {"type": "Split", "pattern": pattern, "behavior": behavior, "invert": invert}


def sequence(*steps):
    return {"type": "Sequence", "pretokenizers": [*steps]}


def splitting(expression):
    return sequence(split(expression), byte_level(regex=False))


_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    rf"{_CONTRACTIONS}?|[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}]+"
    rf"[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}]*{_CONTRACTIONS}?"
)
DIGITS = {"type": "Digits", "individual_digits": True}
KNOWN = {
    "GPT-2": byte_level(),
    "a space before the text": byte_level(prefix=True),
    "SmolLM, StarCoder": sequence(DIGITS, byte_level()),
    "cl100k, OLMo 2, Llama 3": splitting(PRE_TOKENS),
    "Qwen": splitting(PRE_TOKENS.replace(r"\p{N}{1,3}", r"\p{N}")),
    "o200k": splitting(rf"{_CASED}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"),
    "DeepSeek": sequence(
        split(r"\p{N}{1,3}"),
        split("[一-龥぀-ゟ゠-ヿ]+"),
        split(
            r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
            rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}"
        ),
        byte_level(regex=False),
    ),
    "Falcon": sequence(
        {"type": "Punctuation", "behavior": "Contiguous"},
        byte_level(),
        {"type": "Digits", "individual_digits": False},
        split("[0-9][0-9][0-9]"),
    ),
    "spaces inside of words": splitting(r"[\p{L} ]+|\s+|."),
    "letters with what follows": splitting(r"\p{L}+[.,]?|\s+|."),
}
UNKNOWN = {
    "looks back": splitting(r"(?<=a)b|\s+|."),
    "looks far ahead": splitting(r"\p{N}{1,3}(?=(\d{3})*)|\s+|."),
    "looks for the end": splitting(r"\p{L}+|\s+$|\s+|."),
    "a set inside a set": splitting(r"[^(\s|[.,!?])]+|\s+|."),
    "a group that is repeated": splitting(r"(?:\p{L}\s)+|\s+|."),
    "joins pieces": sequence(split(r"\s+", "MergedWithNext"), byte_level(regex=False)),
    "no spaces on their own": splitting(r"\p{L}+ ?"),
}
SIGNS = [
    *("a", "Z", "é", "ſ", "'", "s", "'s", "'LL", "Ж", "文", "東", "。", "，", "、", "ก", "\u0e33"),
    *("ה", "ا", "ह", "ि", "1", "٣", "1234", "½", "Ⅷ", " ", "  ", "    ", "\n", "\r\n", "\n\n"),
    *("\t", "\u00a0", "\u3000", "\u180e", "\u200b", "\x85", "\x1c", "\u2028", ".", ",", "!!", "?"),
    *("=", "/", "/\n", "_", "-", "😀", "\u0301", "e\u0301", "\u0338", "가", "각", "ᆨ", "\u037e"),
    *("\U0001e900", "ǅ", "ʰ", ";", "|||", "<|endoftext|>", "\x00"),
]
TEXTS = (
    st.lists(st.sampled_from(SIGNS), max_size=60).map("".join)
    | st.text(st.characters(codec="utf-8"), max_size=60)
    | st.lists(st.tuples(st.sampled_from(SIGNS), st.integers(1, 30)), max_size=8).map(
        lambda runs: "".join(sign * count for sign, count in runs)
    )
)
NORMAL = {"as it is": None, "NFC": {"type": "NFC"}, "NFD": {"type": "NFD"}}


def fields_of(pre_tokenizer, normalizer=None, added=()):
    return {"pre_tokenizer": pre_tokenizer, "normalizer": normalizer, "added_tokens": list(added)}


def added_token(content, index, **how):
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    return {"id": index, "content": content, **plain, **how}


def file_of(fields):
    """A tokenizer.json that merges signs which a wrong cut would tear apart."""
    vocab = {sign: i for i, sign in enumerate(BYTES)}
    merges = []
    for first in ("a", "1", "Ġ", "Ċ", ",", "'", "Ã", "s"):
        for second in ("a", "1", "Ġ", "Ċ", ",", "'", "©", "s"):
            if first + second not in vocab:
                merges.append([first, second])
                vocab[first + second] = len(vocab)
    vocab["<|endoftext|>"] = len(vocab)
    end = added_token("<|endoftext|>", vocab["<|endoftext|>"], special=True)
    model = {"type": "BPE", "vocab": vocab, "merges": merges}
    added = [end, *fields["added_tokens"]]
    rest = dict.fromkeys(("truncation", "padding", "post_processor", "decoder"))
    return json.dumps({"version": "1.0", **rest, **fields, "added_tokens": added, "model": model})


@pytest.mark.parametrize("normalizer", NORMAL.values(), ids=NORMAL)
@pytest.mark.parametrize("pre_tokenizer", KNOWN.values(), ids=KNOWN)
def test_a_text_is_split_in_its_pieces_as_it_is_as_a_whole(pre_tokenizer, normalizer, monkeypatch):
    """The splits, from which tokens follow."""
    monkeypatch.setattr(module, "PIECE", 1)
    fields = fields_of(pre_tokenizer, normalizer)
    cuts, backend = find_cuts(fields), Backend.from_str(file_of(fields))
    if cuts is None:
        assert normalizer == NORMAL["NFD"] and "of words" in find(KNOWN, pre_tokenizer)
        return
    assert len([*pieces("one two", cuts)]) > 1 or len([*pieces("one\ttwo", cuts)]) > 1

    def splits(text):
        if backend.normalizer is not None:
            text = backend.normalizer.normalize_str(text)
        return [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(text)]

    @settings(max_examples=150)
    @given(TEXTS)
    def check(text):
        parts = [*pieces(text, cuts)]
        assert "".join(parts) == text
        assert splits(text) == [piece for part in parts if part for piece in splits(part)]

    check()


def find(table, wanted):
    return next(name for name, one in table.items() if one is wanted)


@pytest.mark.parametrize("name", ["GPT-2", "SmolLM, StarCoder", "cl100k, OLMo 2, Llama 3", "Qwen"])
def test_a_long_text_has_the_tokens_of_the_whole(name, monkeypatch):
    monkeypatch.setattr(module, "PIECE", 5)
    monkeypatch.setattr(of_tokenizer, "PIECE", 5)
    added = [added_token("   ", 900), added_token("|||", 901)]
    normalizer = NORMAL["NFC"] if name == "Qwen" else None
    tokenizer = Tokenizer(file_of(fields_of(KNOWN[name], normalizer, added)))

    @settings(max_examples=150)
    @given(TEXTS)
    def check(text):
        assert tokenizer.encode(text) == tokenizer.encode_batch([text])[0]

    check()
    assert len([*tokenizer.encode_pieces("one two three, four" * 9)]) > 9


@pytest.mark.parametrize("pre_tokenizer", UNKNOWN.values(), ids=UNKNOWN)
def test_a_split_of_another_kind_is_not_cut(pre_tokenizer):
    assert find_cuts(fields_of(pre_tokenizer)) is None


@pytest.mark.parametrize(
    "token",
    [
        added_token("a b", 900),
        added_token("x, y", 900, special=True),
        added_token("word", 900, single_word=True),
        added_token("|||", 900, rstrip=True),
    ],
)
def test_a_text_is_not_cut_where_an_added_token_may_lie_across(token):
    assert find_cuts(fields_of(KNOWN["GPT-2"])) is not None
    assert find_cuts(fields_of(KNOWN["GPT-2"], added=[token])) is None


def test_a_text_without_a_safe_place_is_one_piece(tokenizer):
    run = "x" * (2 * module.PIECE + 3)
    assert [*tokenizer.encode_pieces(run)] == tokenizer.encode_batch([run])
    assert len([*tokenizer.encode_pieces(run + " and " + run)]) == 2
