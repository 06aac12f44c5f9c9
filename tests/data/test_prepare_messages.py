"""Prepared conversations: which tokens are the assistant's is kept beside the records, and what has
no conversations is as it was."""

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from flexolmo_jax.data import shards
from flexolmo_jax.data.documents import documents_in
from flexolmo_jax.data.mixture import mixture
from flexolmo_jax.data.prepare import open_data, prepare, prepare_cached
from flexolmo_jax.data.records import (
    SPLITS,
    Index,
    left_out,
    loss_targets,
    open_records,
    scored_targets,
)
from flexolmo_jax.data.tokenized import tokenized
from flexolmo_jax.errors import UserError
from tests.chats import byte_chat, byte_tokenizer, said

T = 48
# `index.json` of a corpus of text, as versions without conversations wrote it; it has the digests
# of all other files
OF_TEXT = "520c4603ee1d39c83fb4c574572ffed4a20ae5a84ad13d6f650e658b0b6ed5d8"
# and with a tokenizer that has a chat template
BESIDE_A_TEMPLATE = "253fafcc9bdcbfdc27ad73ee83c3ffd7ef11ceae685ac242583e7c5fbf925a32"
ARRAYS = [f"{s}.{kind}.npy" for s in ("heldout", "train") for kind in ("segments", "tokens")]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Conversations of one and two answers, and texts between them, some longer than a record."""
    path = tmp_path_factory.mktemp("corpus") / "mixed.jsonl"
    rows = []
    for i in range(60):
        chat = said(f"question {i} " * (i % 4 + 1), f"answer {i}", f"and {i}?", "yes " * (i % 9))
        rows.append({"messages": chat[: 2 + 2 * (i % 2)]})
        rows.append({"text": f"text {i} " * (i % 11 + 1)})
    path.write_text("".join(json.dumps(row) + "\n" for row in [{"text": "first"}, *rows]))
    return path


@pytest.fixture(scope="module")
def chatting():
    return byte_chat("chatml")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, corpus, chatting) -> Path:
    out = tmp_path_factory.mktemp("prepared") / "mixed"
    prepare([corpus], chatting, T, out, heldout=0.2, workers=1)
    return out


def files_of(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def pieces_of(path: Path):
    """(tokens, context) of all pieces of documents."""
    for split in ("train", "heldout"):
        records = open_records(path, split)
        for record in map(records.__getitem__, range(len(records))):
            for segment in range(1, record["segments"].max() + 1):
                inside = record["segments"] == segment
                yield tuple(record["tokens"][inside]), tuple(record["context"][inside])


def test_records_hold_what_documents_became(prepared, corpus, chatting):
    expected = []
    for one in tokenized(list(documents_in(corpus)), chatting):
        context = np.zeros(len(one.tokens), bool) if one.context is None else one.context
        for start in range(0, len(one.tokens), T):
            piece = slice(start, start + T)
            expected.append((tuple(one.tokens[piece]), tuple(context[piece])))
    assert sorted(pieces_of(prepared)) == sorted(expected)


def test_the_directory_has_one_more_array_a_split_and_the_template(prepared, chatting):
    index = Index.read(prepared)
    more = {"heldout.context.npy", "train.context.npy", "chat.json"}
    assert index.files.keys() == {*ARRAYS, "tokenizer.json"} | more
    assert sum(split.conversations for split in index.splits.values()) == 60
    for split, stats in index.splits.items():
        context = np.load(prepared / f"{split}.context.npy")
        assert context.dtype == np.uint8 and context.shape == (stats.records, T)
        records = open_records(prepared, split)
        records.check_digests()
        assert records.conversations == stats.conversations > 0
        assert not context[np.load(prepared / f"{split}.segments.npy") == 0].any()
    assert json.loads((prepared / "index.json").read_text())["splits"]["train"]["conversations"]


def test_the_number_of_workers_changes_no_byte(tmp_path, prepared, corpus, chatting, monkeypatch):
    monkeypatch.setattr(shards, "_CHUNK_CHARACTERS", 900)  # many chunks
    prepare([corpus], chatting, T, tmp_path / "mixed", heldout=0.2, workers=2)
    assert files_of(tmp_path / "mixed") == files_of(prepared)


@pytest.mark.parametrize(
    ("tokenizer", "expected"),
    [(byte_tokenizer, OF_TEXT), (lambda: byte_chat("chatml"), BESIDE_A_TEMPLATE)],
)
def test_without_conversations_every_byte_is_as_it_was(tmp_path, tokenizer, expected):
    texts = [f"{i} naïve 東京 " * (i % 7 + 1) for i in range(50)]
    lines = (json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "a.jsonl").write_text("".join(lines))
    prepare([tmp_path / "a.jsonl"], tokenizer(), 32, tmp_path / "out", heldout=0.2, workers=2)
    assert files_of(tmp_path / "out").keys() == {*ARRAYS, "tokenizer.json", "index.json"}
    index = (tmp_path / "out" / "index.json").read_bytes()
    assert hashlib.sha256(index).hexdigest() == expected
    open_records(tmp_path / "out", "train").check_digests()
    assert set(open_records(tmp_path / "out", "train")[0]) == {"tokens", "segments"}


def test_a_split_without_conversations_has_no_array_for_them(tmp_path, chatting):
    """They come late: the records before them are no context."""
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"text": f"{i} " * 20}) + "\n" for i in range(200))
        + json.dumps({"messages": said("a", "b")})
    )
    index = prepare([tmp_path / "a.jsonl"], chatting, 16, tmp_path / "out", heldout=0.3)
    conversations = {split: stats.conversations for split, stats in index.splits.items()}
    split = max(SPLITS, key=conversations.__getitem__)
    assert sum(conversations.values()) == conversations[split] == 1
    files = files_of(tmp_path / "out")
    assert [name for name in files if "context" in name] == [f"{split}.context.npy"]
    context = np.load(tmp_path / "out" / f"{split}.context.npy")
    assert len(context) == index.splits[split].records > 128
    inside = context.any(axis=1)
    assert 0 < inside.sum() < 10 and not inside[:64].any()


SEGMENTS = np.array([[1, 1, 1, 1, 2, 2, 2, 0]])
TOKENS = np.array([[5, 6, 7, 0, 8, 9, 0, 0]])
CONTEXT = np.array([[1, 1, 0, 0, 0, 0, 0, 0]], bool)


def test_context_is_neither_learnt_nor_scored():
    record = {"tokens": TOKENS, "segments": SEGMENTS, "context": CONTEXT}
    context = left_out(record, "assistant")
    assert loss_targets(SEGMENTS, context).astype(int).tolist() == [[0, 0, 1, 1, 0, 1, 1, 0]]
    scored = scored_targets(TOKENS, SEGMENTS, 0, context)
    assert scored.astype(int).tolist() == [[0, 0, 1, 0, 0, 1, 0, 0]]
    assert left_out(record, "all") is None
    assert left_out({"tokens": TOKENS, "segments": SEGMENTS}, "assistant") is None


def test_batches_of_a_mixture_tell_context_where_a_record_has_it(tmp_path, prepared, chatting):
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"text": f"{i} " * 30}) + "\n" for i in range(30))
    )
    prepare([tmp_path / "a.jsonl"], chatting, T, tmp_path / "text", heldout=0)
    chats, text = open_records(prepared, "train"), open_records(tmp_path / "text", "train")
    begins_with_text = set()
    for step in range(8):
        batch = mixture([(chats, 1.0), (text, 1.0)], 3, seed=0).at(step)
        assert batch["context"].dtype == bool and batch["context"].shape == (3, T)
        of_text = batch["source"] == 1
        assert 0 < of_text.sum() < 3
        assert not batch["context"][of_text].any()
        if batch["context"].any():
            begins_with_text.add(bool(of_text[0]))
    assert begins_with_text == {True, False}
    assert "context" not in mixture([(text, 1.0)], 8, seed=0).at(0)


def test_records_of_another_template_are_refused(prepared, chatting, tmp_path):
    assert prepare_cached(prepared, chatting, T) == prepared
    other, none = byte_chat("chatml", "{{ messages }}"), byte_chat("chatml")
    none.chat = None
    for tokenizer in (other, none):
        with pytest.raises(UserError, match="prepared with another chat template"):
            open_data(prepared, tokenizer, T, "train")


def test_another_template_is_another_entry_of_the_cache(tmp_path, corpus, chatting):
    first = prepare_cached(corpus, chatting, T, tmp_path)
    assert prepare_cached(corpus, chatting, T, tmp_path) == first
    other = byte_chat("chatml")
    template = "{{ bos_token }}" + chatting.chat.template
    other.chat = dataclasses.replace(chatting.chat, template=template)
    assert prepare_cached(corpus, other, T, tmp_path) != first


def test_a_conversation_that_cannot_be_prepared_is_named_and_nothing_is_left(tmp_path, corpus):
    for tokenizer, told in (
        (byte_tokenizer(), r"mixed\.jsonl, line 2: it has messages, and the tokenizer has no chat"),
        (byte_chat("chatml", "{{ messages[3].content }}"), r"mixed\.jsonl, line 2: the chat"),
    ):
        with pytest.raises(UserError, match=told):
            prepare([corpus], tokenizer, T, tmp_path / "out", workers=2)
    assert not list(tmp_path.iterdir())


def test_an_array_that_is_missing_or_cut_short_is_refused(prepared, tmp_path):
    copy = shutil.copytree(prepared, tmp_path / "copy")
    file = copy / "train.context.npy"
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    with pytest.raises(UserError, match=r"train\.context\.npy holds .* incomplete"):
        open_records(copy, "train")
    file.write_bytes(content[:-1] + b"\7")
    with pytest.raises(UserError, match=r"train\.context\.npy is not the file that was prepared"):
        open_records(copy, "train").check_digests()
    file.unlink()
    with pytest.raises(UserError, match=r"cannot read .*train\.context\.npy"):
        open_records(copy, "train")
