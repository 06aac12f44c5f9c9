"""Generated text comes out whole, character by character."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from flexolmo_jax.data.tokenizer import Tokenizer, train_tokenizer
from flexolmo_jax.generate import TextStream


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    """Bytes and a few merges: most characters outside ASCII are several tokens."""
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "text.txt").write_text("the cat sat on the mat. the rat ate the hat. " * 5)
    return train_tokenizer([folder / "text.txt"], 270, folder / "tokenizer.json")


@settings(max_examples=100)
@given(st.text())
@example("the 猫 sat on 🧶, naïve \ufffd\ufffd")
def test_streamed_text_is_the_text_and_no_piece_splits_a_character(tokenizer, text):
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in tokenizer.encode(text)]
    pieces.append(stream.finish())
    assert "".join(pieces) == text
    assert sum(piece.count("\ufffd") for piece in pieces) == text.count("\ufffd")


@settings(max_examples=100)
@given(st.lists(st.integers(0, 269)))
def test_streamed_text_of_any_ids_is_what_the_tokenizer_decodes(tokenizer, ids):
    stream = TextStream(tokenizer)
    ids = [i for i in ids if i < tokenizer.vocab_size]
    assert "".join(stream.push(i) for i in ids) + stream.finish() == tokenizer.decode(ids)


def test_whole_characters_are_not_held_back(tokenizer):
    stream, given_so_far = TextStream(tokenizer), ""
    for char in "aé猫🧶b":
        for token in tokenizer.encode(char):
            assert not given_so_far.endswith(char)
            given_so_far += stream.push(token)
        assert given_so_far.endswith(char)
    assert stream.finish() == ""


def test_hidden_tokens_give_no_text_also_inside_a_character(tokenizer):
    first, *rest = tokenizer.encode("é")
    (hidden,) = tokenizer.encode("m")
    stream = TextStream(tokenizer, {hidden})
    pieces = [stream.push(i) for i in (hidden, first, hidden, *rest, hidden)]
    assert rest and "".join(pieces) + stream.finish() == "é"
