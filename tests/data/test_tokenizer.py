"""Tokenizers: no byte is lost or counted twice, no text becomes a special token, and only
byte-level ones are accepted."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from flexolmo_jax.data.byte_level import BYTES, RARE
from flexolmo_jax.data.documents import digest_of, is_heldout
from flexolmo_jax.data.tokenizer import Tokenizer, train_tokenizer
from flexolmo_jax.errors import UserError

UNICODE = st.text(st.characters(codec="utf-8"))
WITH_SPECIALS = st.lists(
    st.sampled_from(["<|endoftext|>", "<|pad|>", "<|", " ", "a", "\n", "1"])
).map("".join)


@pytest.fixture
def fields(tokenizer, tmp_path):
    """The tokenizer's file as a dictionary, to be spoilt."""
    tokenizer.save(tmp_path)
    return json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))


def loaded(fields):
    return Tokenizer(json.dumps(fields), "spoilt.json")


@given(text=UNICODE | WITH_SPECIALS)
def test_byte_lengths_of_a_text_add_up_to_its_bytes_and_decoding_gives_it_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert int(tokenizer.byte_lengths[ids].sum()) == len(text.encode())
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_id not in ids
    assert tokenizer.pad_id not in ids


def test_special_tokens_stand_for_no_bytes_and_no_text(tokenizer):
    assert tokenizer.eos_id != tokenizer.pad_id
    assert tokenizer.byte_lengths.shape == (tokenizer.vocab_size,)
    assert tokenizer.byte_lengths.dtype == np.uint16
    assert np.flatnonzero(tokenizer.byte_lengths == 0).tolist() == sorted(
        [tokenizer.eos_id, tokenizer.pad_id]
    )
    assert (
        tokenizer.decode(np.array([tokenizer.eos_id, *tokenizer.encode("é"), tokenizer.pad_id]))
        == "é"
    )


def test_a_batch_encodes_like_its_texts(tokenizer, made_up_documents):
    texts = made_up_documents(20, seed=5)
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]


def test_digits_are_cut_after_at_most_three(tokenizer):
    pieces = [tokenizer.decode([i]) for i in tokenizer.encode("1234" * 10)]
    assert max(map(len, pieces)) <= 3


def test_saving_and_loading_changes_nothing_and_layout_does_not_matter(tokenizer, tmp_path, fields):
    again = Tokenizer.load(tmp_path)
    assert again.digest == tokenizer.digest == Tokenizer.load(tmp_path / "tokenizer.json").digest
    joined = [" ".join(merge) for merge in fields["model"]["merges"]]
    fields["model"]["merges"] = joined
    fields["truncation"] = {
        "direction": "Right",
        "max_length": 8,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    other_layout = Tokenizer(json.dumps(dict(reversed(fields.items())), indent=3))
    assert other_layout.digest == tokenizer.digest
    assert other_layout.encode("naïve " * 20) == tokenizer.encode("naïve " * 20)
    assert os.listdir(tmp_path) == ["tokenizer.json"]


def test_another_merge_gives_another_digest(tokenizer, fields):
    fields["model"]["merges"].pop()
    assert loaded(fields).digest != tokenizer.digest


def test_an_added_plain_token_counts_its_own_bytes(tokenizer, fields):
    plain = {
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": False,
    }
    fields["added_tokens"].append({"id": tokenizer.vocab_size + 5, "content": "|||É|||", **plain})
    extended = loaded(fields)
    ids = extended.encode("a |||É||| b")
    assert extended.byte_lengths[ids].sum() == len("a |||É||| b".encode())
    assert max(ids) == tokenizer.vocab_size == extended.vocab_size - 1


def test_text_cannot_end_a_document_even_where_the_file_forgets_that_eos_is_special(fields):
    for token in fields["added_tokens"]:
        token["special"] = False
    careless = loaded(fields)
    assert careless.eos_id not in careless.encode("<|endoftext|>")
    assert careless.byte_lengths[careless.eos_id] == 0


def test_padding_falls_back_to_eos_and_other_names_are_known(fields):
    fields["added_tokens"] = [
        token | {"content": "</s>"} for token in fields["added_tokens"] if token["id"] == 0
    ]
    del fields["model"]["vocab"]["<|pad|>"]
    fields["model"]["vocab"]["</s>"] = fields["model"]["vocab"].pop("<|endoftext|>")
    other = loaded(fields)
    assert other.eos_id == other.pad_id == 0


def test_the_table_of_bytes_is_that_of_the_library():
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    assert BYTES.keys() == set(pre_tokenizers.ByteLevel.alphabet())
    every = "".join(map(chr, range(0x80))) + "é€𝄞"
    [(signs, _)] = split.pre_tokenize_str(every)
    assert bytes(BYTES[sign] for sign in signs) == every.encode()


def test_bytes_that_a_vocabulary_lacks_are_named_and_counted(fields):
    lacking = {0x04, 0x1D, 0xF1}
    for sign, byte in BYTES.items():
        if byte in lacking:
            del fields["model"]["vocab"][sign]
    # by the file, such a byte would become a token that ends a document
    fields["model"]["unk_token"] = "<|endoftext|>"
    tokenizer = loaded(fields)
    assert tokenizer.lost_bytes == bytes(sorted(lacking)) and lacking <= RARE
    text = "a\x04\x1dbc \U00040000 é\U0001f600"
    assert tokenizer.lost_in(text) == 3
    ids = tokenizer.encode(text)
    assert tokenizer.eos_id not in ids
    assert int(tokenizer.byte_lengths[ids].sum()) == len(text.encode()) - 3
    assert tokenizer.lost_in("usual text, é\U0001f600") == 0
    assert loaded(fields).lost_in("") == 0


def test_a_whole_vocabulary_loses_nothing(tokenizer):
    assert tokenizer.lost_bytes == b"" and tokenizer.lost_in("\x04\U00040000") == 0


def test_the_end_of_a_document_has_other_names_too(fields):
    for token in fields["added_tokens"]:
        if token["id"] == 0:
            token["content"] = "<|end_of_text|>"
    fields["model"]["vocab"]["<|end_of_text|>"] = fields["model"]["vocab"].pop("<|endoftext|>")
    assert loaded(fields).eos_id == 0


def test_sentencepiece_is_refused_by_its_name(fields):
    fields["model"]["byte_fallback"] = True
    fields["pre_tokenizer"] = None
    with pytest.raises(UserError, match="is SentencePiece's BPE with pre-tokenizer None"):
        loaded(fields)


def test_what_is_no_byte_level_bpe_is_refused(tokenizer, fields, tmp_path):
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers

    words = Backend(models.WordLevel({"a": 0}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    for content in (words.to_str(), Backend(models.BPE()).to_str()):
        with pytest.raises(UserError, match="expected a byte-level BPE"):
            Tokenizer(content, "words.json")
    without_bytes = json.loads(json.dumps(fields))
    without_bytes["model"]["vocab"].pop("Ġ")
    with pytest.raises(UserError, match="lacks tokens for 1 bytes of usual text"):
        loaded(without_bytes)
    foreign = json.loads(json.dumps(fields))
    foreign["model"]["vocab"]["▁the"] = 999
    with pytest.raises(UserError, match="does not spell bytes"):
        loaded(foreign)
    fields["added_tokens"] = []
    with pytest.raises(UserError, match=r"no end-of-document token|does not spell"):
        loaded(fields)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"model": 3, "added_tokens": []}'])
def test_what_is_no_tokenizer_at_all_is_refused(tmp_path, content):
    (tmp_path / "t.json").write_text(content)
    with pytest.raises(UserError, match=r"t\.json is not a tokenizer\.json"):
        Tokenizer.load(tmp_path / "t.json")


@pytest.mark.parametrize(
    ("part", "step", "told"),
    [
        ("normalizer", {"type": "Lowercase"}, "'Lowercase', which makes another text"),
        ("normalizer", {"type": "NFKC"}, "'NFKC', which makes another text"),
        ("normalizer", {"type": "StripAccents"}, "'StripAccents'"),
        ("normalizer", {"type": "Strip", "strip_left": True, "strip_right": True}, "'Strip'"),
        ("normalizer", {"type": "Prepend", "prepend": "x"}, "'Prepend'"),
        (
            "normalizer",
            {"type": "Replace", "pattern": {"String": "a"}, "content": "b"},
            "'Replace'",
        ),
        ("pre_tokenizer", {"type": "WhitespaceSplit"}, "'WhitespaceSplit', which makes another"),
        (
            "pre_tokenizer",
            {"type": "Punctuation", "behavior": "Removed"},
            "'Punctuation', which leaves",
        ),
        (
            "pre_tokenizer",
            {"type": "Split", "pattern": {"String": " "}, "behavior": "Removed", "invert": False},
            "'Split', which leaves out a part",
        ),
        (
            "pre_tokenizer",
            {
                **{"type": "Split", "pattern": {"Regex": r"\S+"}},
                **{"behavior": "Removed", "invert": True},
            },
            "'Split', which leaves out a part",
        ),
        ("pre_tokenizer", {"type": "UnicodeScripts"}, "'UnicodeScripts', which makes another"),
    ],
)
def test_a_step_that_makes_another_text_is_refused_by_its_name(fields, part, step, told):
    steps = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers"}
    before = fields[part][steps[part]] if fields[part] else []
    fields[part] = {"type": "Sequence", steps[part]: [step, *before]}
    with pytest.raises(UserError, match=f"spoilt.json has the {part} {told}"):
        loaded(fields)


def test_bytes_are_mapped_once(fields):
    steps = fields["pre_tokenizer"]["pretokenizers"]
    steps.append(dict(steps[-1]))
    with pytest.raises(UserError, match=r"\['Split', 'ByteLevel', 'ByteLevel'\]: expected a byte"):
        loaded(fields)


def test_a_split_that_keeps_all_that_it_matches_is_taken_where_that_is_everything(
    tokenizer, fields
):
    text = "  as dbrx's and\n\n phi-4's cut it: é\u3000 12345\t"
    fields["pre_tokenizer"]["pretokenizers"][0] |= {"behavior": "Removed", "invert": True}
    assert loaded(fields).encode(text) == tokenizer.encode(text)


def test_random_merges_are_refused(fields):
    fields["model"]["dropout"] = 0.1
    with pytest.raises(UserError, match=r"its dropout is 0\.1"):
        loaded(fields)


def test_the_bytes_of_a_text_are_counted_where_its_tokens_spell_others(tokenizer, fields):
    text = "  a\u0308 |||É|||  e\u0301 \u0958 "
    strips = {"content": "|||É|||", "special": False, "single_word": False, "normalized": True}
    spoilt = [
        ("normalizer", {"type": "NFC"}),
        ("normalizer", {"type": "NFD"}),
        ("pre_tokenizer", {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}),
        (
            "added_tokens",
            [*fields["added_tokens"], {"id": 900, **strips, "lstrip": True, "rstrip": True}],
        ),
    ]
    for part, value in spoilt:
        other = loaded(fields | {part: value})
        for one in (text, text.strip()):
            ids = np.array(other.encode(one))
            spelled = int(other.byte_lengths[ids].sum())
            assert other.changed_in(one, ids) == len(one.encode()) - spelled
    nothing = np.array([], int)
    changes = [loaded(fields | {p: v}).changed_in("x", nothing) for p, v in spoilt]
    assert changes == [1] * 4 and tokenizer.changed_in("x", nothing) == 0


def test_settings_of_a_pipeline_cut_and_fill_no_text(tokenizer, fields):
    fields["truncation"] = dict(direction="Right", max_length=3, strategy="LongestFirst", stride=0)
    fields["padding"] = dict(
        strategy={"Fixed": 64}, direction="Left", pad_id=0, pad_type_id=0, pad_token="<|pad|>"
    ) | {"pad_to_multiple_of": None}
    first = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
    fields["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [first, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [],
        "special_tokens": {
            "<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}
        },
    }
    text = "naïve weights, merges an expert " * 9
    assert loaded(fields).encode(text) == tokenizer.encode(text)


def test_a_missing_or_binary_tokenizer_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"nowhere.*expected a tokenizer\.json"):
        Tokenizer.load(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"expected a tokenizer\.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "t.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8"):
        Tokenizer.load(tmp_path / "t.json")


def test_training_again_in_another_process_gives_the_same_tokenizer(
    tmp_path, made_up_documents, write_jsonl
):
    corpus = write_jsonl(tmp_path / "corpus.jsonl", made_up_documents(200, seed=3))
    here = train_tokenizer([corpus], 350, tmp_path / "here")
    program = (
        "import pathlib, sys; from flexolmo_jax.data.tokenizer import train_tokenizer;"
        "train_tokenizer([pathlib.Path(sys.argv[1])], 350, pathlib.Path(sys.argv[2]))"
    )
    environment = os.environ | {"PYTHONHASHSEED": "77", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run(
        [sys.executable, "-c", program, corpus, tmp_path / "there"], check=True, env=environment
    )
    assert here.vocab_size == 350
    assert (tmp_path / "here" / "tokenizer.json").read_bytes() == (
        tmp_path / "there" / "tokenizer.json"
    ).read_bytes()


def test_training_reads_no_more_than_the_sample_from_each_file(tmp_path, write_jsonl):
    a = write_jsonl(tmp_path / "a.jsonl", ["xyz " * 100, "never" * 100])
    b = write_jsonl(tmp_path / "b.jsonl", ["uvw " * 100, "never" * 100])
    learnt = train_tokenizer([a, b], 300, tmp_path / "t", sample_bytes=400)
    assert len(learnt.encode("xyz")) == len(learnt.encode("uvw")) == 1
    assert len(learnt.encode("never")) == 5


def test_too_little_text_gives_a_smaller_vocabulary_and_says_so(tmp_path, capfd, write_jsonl):
    corpus = write_jsonl(tmp_path / "a.jsonl", ["abab"])
    assert train_tokenizer([corpus], 5000, tmp_path / "t").vocab_size < 300
    assert "not 5000" in capfd.readouterr().err


def test_training_refuses_a_tiny_vocabulary_no_text_and_an_output_that_exists(
    tmp_path, write_jsonl
):
    corpus = write_jsonl(tmp_path / "a.jsonl", ["some text"])
    with pytest.raises(UserError, match="expected 258 or more"):
        train_tokenizer([corpus], 257, tmp_path / "t")
    with pytest.raises(UserError, match="no text in"):
        train_tokenizer([write_jsonl(tmp_path / "empty.jsonl", [""])], 300, tmp_path / "t")
    with pytest.raises(UserError, match="exists"):
        train_tokenizer([corpus], 300, tmp_path)
    with pytest.raises(UserError, match="exists"):
        train_tokenizer([corpus], 300, corpus)
    assert not (tmp_path / "t").exists()


def test_what_is_held_out_for_evaluation_is_not_learnt_from(
    tmp_path, made_up_documents, write_jsonl
):
    held_out = next(
        text for i in range(1000) if is_heldout(digest_of(text := f"{i} " + "qxyzzyq " * 200))
    )
    corpus = write_jsonl(tmp_path / "corpus.jsonl", [*made_up_documents(50, seed=3), held_out])
    assert len(train_tokenizer([corpus], 400, tmp_path / "t").encode(" qxyzzyq")) == 8
    assert len(train_tokenizer([corpus], 400, tmp_path / "all", heldout=0).encode(" qxyzzyq")) == 1
