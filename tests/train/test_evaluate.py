"""Bits per byte: what anyone can recompute from `load(...).logits` and the prepared records."""

import math

import numpy as np
import pytest

import flexolmo_jax
from flexolmo_jax.data.documents import digest_of, is_heldout
from flexolmo_jax.data.prepare import prepare
from flexolmo_jax.data.records import Records, open_records
from flexolmo_jax.data.sample import sample_of
from flexolmo_jax.errors import UserError
from flexolmo_jax.evals.bits_per_byte import evaluate
from flexolmo_jax.runtime.progress import note_once
from tests.tiny import SEQ_LEN, documents, write_jsonl


@pytest.fixture(autouse=True)
def unsaid():
    """What other tests were told once is told here again."""
    note_once.cache_clear()


def pieces_of(path) -> list[np.ndarray]:
    """The token ids of every document, or piece of one, in the held-out records."""
    records = open_records(path, "heldout")
    return [
        record["tokens"][record["segments"] == s]
        for record in (records[i] for i in range(len(records)))
        for s in range(1, record["segments"].max() + 1)
    ]


def test_bits_per_byte_can_be_recomputed_from_logits_of_each_document_alone(model, prepared):
    loaded = flexolmo_jax.load(model)
    eos, tokenizer = loaded.tokenizer.eos_id, loaded.tokenizer
    pieces = pieces_of(prepared["law"])
    ids = np.zeros((len(pieces), SEQ_LEN), np.int32)
    for i, piece in enumerate(pieces):
        ids[i, : len(piece)] = piece
    logits = loaded.logits(ids).astype(np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    bits, size = 0.0, 0
    for i, piece in enumerate(pieces):
        for t in range(1, len(piece)):
            if piece[t] != eos:
                bits -= log_p[i, t - 1, piece[t]] / math.log(2)
                # the text is ASCII: no character is cut in two
                size += len(tokenizer.decode([piece[t]]).encode())
    result = evaluate(loaded, [prepared["law"]])
    assert result["bytes"]["law"] == size
    np.testing.assert_allclose(result["bits_per_byte"]["law"], bits / size, rtol=1e-5)
    np.testing.assert_allclose(sum(result["routing"]["law"].values()), 1, rtol=1e-5)


def test_the_bytes_of_a_document_are_those_of_its_text(tiny_tokenizer, corpora, prepared):
    stats = open_records(prepared["care"], "heldout").stats
    pieces = pieces_of(prepared["care"])
    text = sum(
        len(tiny_tokenizer.decode(piece).encode()) - len(tiny_tokenizer.decode(piece[:1]).encode())
        for piece in pieces
    )
    assert stats.scored_bytes == text > 500


def test_a_byte_that_is_lost_costs_a_guess(model, prepared, monkeypatch):
    loaded = flexolmo_jax.load(model)
    n = len(open_records(prepared["code"], "heldout"))
    before, half = (evaluate(loaded, [prepared["code"]], limit=limit) for limit in (n, n // 2))
    monkeypatch.setattr(Records, "lost_bytes", 2 * n)
    for limit, was in ((n, before), (n // 2, half)):
        now = evaluate(loaded, [prepared["code"]], limit=limit)
        size, lost = was["bytes"]["code"], 2 * limit
        assert now["bytes"]["code"] == size + lost
        bits = was["bits_per_byte"]["code"] * size + 8 * lost
        np.testing.assert_allclose(now["bits_per_byte"]["code"], bits / (size + lost), rtol=1e-6)


def test_what_a_tokenizer_changes_counts_with_the_bytes_of_the_text(model, prepared, monkeypatch):
    loaded = flexolmo_jax.load(model)
    n = len(open_records(prepared["code"], "heldout"))
    before, half = (evaluate(loaded, [prepared["code"]], limit=limit) for limit in (n, n // 2))
    monkeypatch.setattr(Records, "changed_bytes", -2 * n)
    for limit, was in ((n, before), (n // 2, half)):
        now = evaluate(loaded, [prepared["code"]], limit=limit)
        size = was["bytes"]["code"]
        assert now["bytes"]["code"] == size - 2 * limit
        bits = was["bits_per_byte"]["code"] * size
        np.testing.assert_allclose(now["bits_per_byte"]["code"], bits / (size - 2 * limit))


def test_records_longer_than_the_context_are_told(model, tmp_path, tiny_tokenizer, capfd):
    loaded = flexolmo_jax.load(model)
    source = write_jsonl(tmp_path / "long.jsonl", documents("law", 40))
    prepare([source], tiny_tokenizer, 128, tmp_path / "long", heldout=0.5)
    evaluate(loaded, [tmp_path / "long"], limit=1, batch_size=1)
    assert "long has records longer than the 64 tokens" in capfd.readouterr().err


def test_a_limit_takes_a_fair_sample_whatever_the_batch(model, prepared, capfd):
    loaded = flexolmo_jax.load(model)
    whole = evaluate(loaded, [prepared["law"]], split="train")["by_record"]["law"]
    expected = [whole[place] for place in sample_of(len(whole), 6)]
    for batch_size in (4, 6):
        part = evaluate(loaded, [prepared["law"]], split="train", limit=6, batch_size=batch_size)
        np.testing.assert_allclose(part["by_record"]["law"], expected, rtol=1e-5)
    assert f"law: 6 of {len(whole)} records are scored" in capfd.readouterr().err


def test_a_file_of_which_nothing_is_held_out_can_be_scored_whole(model, corpora, tmp_path, capfd):
    loaded = flexolmo_jax.load(model)
    texts = (text for text in documents("law", 30) if not is_heldout(digest_of(text)))
    few = write_jsonl(tmp_path / "few.jsonl", list(texts)[:20])
    with pytest.raises(UserError, match=r"none of its documents is held out; .* --split all"):
        evaluate(loaded, [corpora["law"], few])
    told = capfd.readouterr().err
    assert "law.jsonl: " in told and "of 160 documents are scored, those held out" in told
    text = evaluate(loaded, [few], split="all", batch_size=4)
    assert text["bytes"]["few"] > 0.8 * few.stat().st_size - 20 * len('{"text": ""}')
    assert "those held out" not in capfd.readouterr().err


def test_padding_the_last_batch_changes_nothing(model, prepared):
    loaded = flexolmo_jax.load(model)
    size = len(open_records(prepared["code"], "heldout"))
    assert size % 16 and size % 7
    whole, padded, sevens = (
        evaluate(loaded, [prepared["code"]], batch_size=n) for n in (size, 16, 7)
    )
    for result in (padded, sevens):
        assert result["tokens"] == whole["tokens"] and result["bytes"] == whole["bytes"]
        # Not 1e-6: products of other shapes sum in another order. A single padded token that
        # counted would show at 1e-3.
        np.testing.assert_allclose(
            result["bits_per_byte"]["code"], whole["bits_per_byte"]["code"], rtol=3e-6
        )
        np.testing.assert_allclose(
            list(result["routing"]["code"].values()),
            list(whole["routing"]["code"].values()),
            rtol=1e-5,
        )


def test_records_of_another_tokenizer_are_refused(model, corpora, tmp_path):
    from flexolmo_jax.data.prepare import prepare
    from flexolmo_jax.data.tokenizer import train_tokenizer

    other = train_tokenizer([corpora["code"]], 300, tmp_path / "other.json")
    prepare([corpora["code"]], other, SEQ_LEN, tmp_path / "code")
    with pytest.raises(UserError, match="tokenizer"):
        evaluate(flexolmo_jax.load(model), [tmp_path / "code"])
