"""Proxies: public documents alone leave, those like the private ones, chosen by a classifier that
has not seen them."""

import json
from pathlib import Path

import numpy as np
import pytest

from flexolmo_jax.data.documents import digest_of, is_heldout
from flexolmo_jax.errors import UserError
from flexolmo_jax.owner.proxy import diverse, fit, select_proxies
from tests.tiny import documents, write_jsonl


@pytest.fixture
def texts() -> dict[str, list[str]]:
    """The public ones hold some of each subject, so that there is something to find; two documents
    are on both sides."""
    law, care = documents("law", 400, seed=1), documents("care", 400, seed=2)
    public = [*documents("public", 300, seed=3), *law[:60], *care[:60], *law[398:]]
    return {"private": law[60:], "public": public}


@pytest.fixture
def paths(texts, tmp_path) -> dict[str, Path]:
    return {
        name: write_jsonl(tmp_path / f"{name}.jsonl", of_name) for name, of_name in texts.items()
    }


def read(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


def test_what_leaves_is_public_like_the_private_and_held_out_nowhere(
    anchor, texts, paths, tmp_path
):
    proxies = select_proxies(
        anchor, [paths["private"]], [paths["public"]], tmp_path / "p.jsonl", share=0.1
    )
    kept = read(tmp_path / "p.jsonl")
    candidates = [
        text
        for text in texts["public"]
        if text not in texts["private"] and not is_heldout(digest_of(text))
    ]
    assert proxies.documents == len(kept) == len(set(kept)) == round(0.1 * len(candidates))
    assert proxies.of == len(candidates) and proxies.share == pytest.approx(0.1, abs=0.005)
    assert set(kept) <= set(candidates)
    # also not the two that are public too: they would tell that the owner has them
    assert not set(kept) & set(texts["private"])
    assert all(text.startswith("law") for text in kept)
    # the public documents on the private ones' subject are told apart by nothing
    assert 0.85 < proxies.accuracy < 1
    # in an order that says nothing
    assert [digest_of(text) for text in kept] == sorted(map(digest_of, kept))


def test_no_word_of_the_private_documents_alone_gets_out_and_the_order_of_files_does_not_matter(
    anchor, texts, paths, tmp_path
):
    secret = write_jsonl(
        tmp_path / "secret.jsonl", [f"{text} qxyzzyq" for text in texts["private"]]
    )
    select_proxies(
        anchor, [secret], [paths["public"]], tmp_path / "a.jsonl", share=0.1, diversity=3
    )
    assert "qxyzzyq" not in (tmp_path / "a.jsonl").read_text()
    shuffled = write_jsonl(
        tmp_path / "shuffled.jsonl", [f"{text} qxyzzyq" for text in reversed(texts["private"])]
    )
    select_proxies(
        anchor, [shuffled], [paths["public"]], tmp_path / "b.jsonl", share=0.1, diversity=3
    )
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()


def test_diverse_proxies_are_less_alike_and_still_like_the_private_ones(anchor, paths, tmp_path):
    words = {}
    for diversity in (1, 4):
        out = tmp_path / f"{diversity}.jsonl"
        select_proxies(
            anchor, [paths["private"]], [paths["public"]], out, share=0.03, diversity=diversity
        )
        kept = read(out)
        words[diversity] = len({word for text in kept for word in text.split()[2:]})
        assert all(text.startswith("law") for text in kept)
    assert words[4] >= words[1]


def test_a_likely_set_holds_no_two_that_are_alike_before_there_is_no_other():
    vectors = np.eye(5)[[0, 0, 1, 1, 2, 3]] + 0.0
    quality = np.array([1.0, 0.9, 0.8, 0.9, 0.7, 0.1])
    chosen = diverse(vectors, quality, 6)
    assert chosen[:4] == [0, 3, 4, 5] and sorted(chosen) == list(range(6))
    best = max(
        ((a, b, c) for a in range(6) for b in range(a) for c in range(b)),
        key=lambda s: np.linalg.det(
            np.outer(quality[list(s)], quality[list(s)]) * (vectors[list(s)] @ vectors[list(s)].T)
        ),
    )
    assert sorted(chosen[:3]) == sorted(best)


def test_the_classifier_is_where_the_gradient_of_its_loss_is_zero():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(200, 8)).astype(np.float32) / np.sqrt(8)
    labels = (vectors @ rng.normal(size=8) + 0.1 * rng.normal(size=200) > 0).astype(np.float32)
    weights, bias = fit(vectors, labels)
    error = 1 / (1 + np.exp(-(vectors @ weights + bias))) - labels
    np.testing.assert_allclose(vectors.T @ error / 200 + weights / 200, 0, atol=2e-4)
    assert (
        abs(error.mean()) < 2e-4 and ((vectors @ weights + bias > 0) == (labels > 0)).mean() > 0.85
    )


def test_bad_input_is_told_in_one_line(anchor, model, paths, tmp_path):
    def select(out: str = "p.jsonl", private: Path = paths["private"], **options):
        return select_proxies(
            options.pop("anchor", anchor), [private], [paths["public"]], tmp_path / out, **options
        )

    (tmp_path / "there.jsonl").touch()
    few = write_jsonl(tmp_path / "few.jsonl", documents("law", 5))
    for message, options in {
        r"ends in \.jsonl": {"out": "p.txt"},
        "exists": {"out": "there.jsonl"},
        "--share is 1.5": {"share": 1.5},
        "--diversity 0": {"diversity": 0},
        "expected a published anchor": {"anchor": model},
        "at least 10 of each": {"private": few},
    }.items():
        with pytest.raises(UserError, match=message):
            select(**options)
    assert not (tmp_path / "p.jsonl").exists()
