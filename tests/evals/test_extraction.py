"""The extraction attack: it works where a model has learnt a text by heart, and its figures are
those of their definitions."""

import json
import tracemalloc

import numpy as np
import pytest

from flexolmo_jax.cli import main
from flexolmo_jax.data.documents import digest_of, is_heldout
from flexolmo_jax.errors import UserError
from flexolmo_jax.evals.extraction import extract, sample_documents, similarities, wilson
from flexolmo_jax.loaded import load
from flexolmo_jax.train.pretrain import pretrain
from tests.tiny import documents, run_config, write_jsonl

PREFIX, TOKENS = 8, 16


def levenshtein(a: list[int], b: list[int]) -> int:
    distances = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        distances, before = [i], distances
        for j, y in enumerate(b, 1):
            either = min(before[j], distances[j - 1]) + 1
            distances.append(min(either, before[j - 1] + (x != y)))
    return distances[-1]


def test_similarities_are_levenshtein_s():
    rng = np.random.default_rng(0)
    truths = rng.integers(0, 4, (30, 12))
    completions = [rng.integers(0, 4, rng.integers(0, 15)).tolist() for _ in range(28)] + [
        truths[28].tolist(),
        truths[29, 1:].tolist(),
    ]
    expected = [
        1 - levenshtein(c, t.tolist()) / max(len(c), 12)
        for c, t in zip(completions, truths, strict=True)
    ]
    np.testing.assert_allclose(similarities(completions, truths), expected, rtol=1e-12)
    assert expected[28] == 1 and expected[29] == pytest.approx(11 / 12)
    np.testing.assert_allclose(similarities([[]], truths[:1]), [0])


def test_intervals_are_wilsons():
    assert wilson(0, 10) == pytest.approx((0, 0.2775), abs=1e-4)
    assert wilson(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert wilson(10, 10) == pytest.approx((0.7225, 1), abs=1e-4)


@pytest.fixture(scope="module")
def secrets(tmp_path_factory):
    """Ten texts, none of which is held out."""
    texts = [
        text
        for text in (" ".join(t.split()[2:]) for t in documents("care", 200, seed=5))
        if not is_heldout(digest_of(text)) and len(text) > 120
    ]
    return write_jsonl(tmp_path_factory.mktemp("secrets") / "secrets.jsonl", texts[:10])


@pytest.fixture(scope="module")
def control(anchor32, secrets, tmp_path_factory):
    """A model that has learnt them by heart."""
    folder = tmp_path_factory.mktemp("control")
    run = run_config(
        "anchor",
        secrets,
        f"train.init={anchor32}",
        "train.steps=250",
        "optim.lr=1e-2",
        "optim.weight_decay=0",
        "train.log_every=50",
    )
    pretrain(run, folder / "run")
    return folder / "run"


def test_what_was_learnt_by_heart_is_extracted_and_what_was_never_seen_is_not(
    control, anchor32, secrets, capsys
):
    attack = [
        "--documents",
        str(secrets),
        "--limit",
        "8",
        "--prefix",
        str(PREFIX),
        "--tokens",
        str(TOKENS),
        "--samples",
        "4",
        "--json",
    ]
    assert main(["extract", str(control), *attack, "--batch-size", "8"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (
        found["documents"] == 8
        and found["rate"] >= 0.5
        and found["low"] < found["rate"] <= found["high"]
    )
    assert main(["extract", str(anchor32), *attack, "--batch-size", "5"]) == 0
    assert json.loads(capsys.readouterr().out)["rate"] == 0


def test_a_sample_is_of_whole_different_documents_whatever_their_order(tiny_tokenizer):
    texts = documents("care", 40)
    chosen = sample_documents(texts, tiny_tokenizer, 5, PREFIX, TOKENS)
    assert chosen == sample_documents([*reversed(texts), *texts], tiny_tokenizer, 5, PREFIX, TOKENS)
    assert len({tuple(ids) for ids in chosen}) == 5 and {len(ids) for ids in chosen} == {
        PREFIX + TOKENS
    }
    with pytest.raises(UserError, match="no document has 508 tokens"):
        sample_documents(texts, tiny_tokenizer, 5, PREFIX, 500)
    with pytest.raises(UserError, match="expected 1 or more"):
        sample_documents(texts, tiny_tokenizer, 0, PREFIX, TOKENS)


def test_of_how_many_documents_a_sample_is_is_told(tiny_tokenizer, capfd):
    texts = documents("care", 20)
    sample_documents(texts, tiny_tokenizer, 5, prefix=2, tokens=2)
    assert capfd.readouterr().err == "5 of 20 documents are tried\n"
    sample_documents([*texts, "a"], tiny_tokenizer, 21, prefix=2, tokens=2)
    assert capfd.readouterr().err == "20 of 21 documents are tried; no more have 4 tokens\n"


def test_a_sample_holds_no_more_texts_than_it_takes(tiny_tokenizer):
    def corpus():
        for i in range(4000):
            yield f"{i} " + "the river feeds the valley " * 200

    tracemalloc.start()
    chosen = sample_documents(corpus(), tiny_tokenizer, 3, PREFIX, TOKENS)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    smallest = sorted(map(digest_of, corpus()))[:3]
    by_digest = {digest_of(text): text for text in corpus()}
    assert chosen == [
        tiny_tokenizer.encode(by_digest[digest])[: PREFIX + TOKENS] for digest in smallest
    ]
    assert peak < 2_000_000  # the texts have 20 MB


def test_experts_are_excluded_by_name(model, tiny_tokenizer):
    chosen = sample_documents(documents("law", 40), tiny_tokenizer, 4, PREFIX, TOKENS)
    figures = [
        extract(load(model), chosen, prefix=PREFIX, samples=2, without=without, batch_size=4)
        for without in ((), ("law",))
    ]
    assert figures[0].rate == figures[1].rate == 0 and 0 < figures[1].mean_similarity < 0.5
    with pytest.raises(UserError, match="no expert 'nobody'"):
        extract(load(model), chosen, prefix=PREFIX, without=["nobody"])
