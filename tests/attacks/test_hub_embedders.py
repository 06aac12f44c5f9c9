"""An anchor names its embedder. The promise: no owner's machine fetches and runs a stranger's model
because an anchor says so."""

import dataclasses
import json
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flexolmo_jax.cli import main
from flexolmo_jax.description import write_description
from flexolmo_jax.errors import UserError
from flexolmo_jax.exchange.embedder import TfidfEmbedder, fit_embedder, load_embedder
from flexolmo_jax.exchange.embedder_file import PROJECTION_SEED
from flexolmo_jax.integrity import embedder_digest, fingerprint_of, parts_of


@pytest.fixture
def fetched(monkeypatch) -> list[tuple[str, dict[str, Any]]]:
    """What sentence-transformers is asked for."""
    asked: list[tuple[str, dict[str, Any]]] = []

    class Model:
        def __init__(self, name: str, **options: Any):
            asked.append((name, options))

        def state_dict(self) -> dict[str, Any]:
            return {}

        def encode(self, texts: list[str], **_: Any) -> np.ndarray:
            return np.ones((len(texts), 8), np.float32)

    package = types.ModuleType("sentence_transformers")
    package.SentenceTransformer, package.__version__ = Model, "1"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sentence_transformers", package)
    monkeypatch.setitem(sys.modules, "torch", types.ModuleType("torch"))
    return asked


@pytest.fixture
def hostile(anchor, tmp_path) -> Path:
    """A whole anchor, its fingerprint right, whose embedder is a stranger's model."""
    copy = Path(shutil.copytree(anchor, tmp_path / "anchor"))
    shutil.rmtree(copy / "embedder")
    (copy / "embedder").mkdir()
    saved = {
        "format": 1,
        "projection_seed": PROJECTION_SEED,
        "name": "attacker/model",
        "version": "1",
        "dim": 32,
    }
    (copy / "embedder" / "embedder.json").write_text(json.dumps(saved))
    description = json.loads((copy / "flexolmo.json").read_text())
    description["embedder"] = {
        "name": "attacker/model",
        "version": "1",
        "sha256": embedder_digest(copy / "embedder"),
    }
    write_description(copy, description | {"fingerprint": fingerprint_of(parts_of(description))})
    return copy


@pytest.mark.parametrize("verb", ["contribute", "embed-domain", "proxy"])
def test_no_model_of_a_hub_is_loaded_without_the_owners_word(
    hostile, corpora, fetched, tmp_path, capsys, verb
):
    """Each verb that embeds an owner's documents refuses in a line that names the model and the
    flag."""
    code, public = str(corpora["code"]), str(corpora["public"])
    arguments = {
        "contribute": [
            "--documents",
            code,
            "--name",
            "code",
            "--set",
            "train.steps=1",
            "--out",
            str(tmp_path / "out"),
        ],
        "embed-domain": ["--input", code, "--out", str(tmp_path / "row.npy")],
        "proxy": ["--private", code, "--public", public, "--out", str(tmp_path / "p.jsonl")],
    }[verb]
    assert main([verb, "--anchor", str(hostile), *arguments]) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert "attacker/model" in told and "--allow-hub-embedder" in told and fetched == []


@pytest.mark.parametrize(
    "name",
    [
        "./nowhere",
        "/nowhere/x",
        "../a/b",
        "~/.ssh",
        "https://evil.example/x",
        "a" * 300,
        "a/b/c",
        "",
    ],
)
def test_a_name_that_is_none_of_a_hub_is_loaded_by_nobody(fetched, name):
    """A path or an address, whether there is anything or not."""
    with pytest.raises(UserError, match="expected tfidf, minilm or a hub's name"):
        fit_embedder(name, [], 8)
    assert fetched == []


def test_with_the_owners_word_it_is_loaded_without_remote_code(hostile, fetched):
    # another version than the anchor's
    with pytest.raises(UserError, match="the anchor was published with 1"):
        load_embedder(hostile / "embedder", allow_hub=True)
    assert fetched == [("attacker/model", {"trust_remote_code": False})]


CHANGES: dict[str, Callable[[TfidfEmbedder], dict[str, Any]]] = {
    "idf of zeros": lambda e: {"idf": np.zeros_like(e.idf)},
    "idf beyond all": lambda e: {"idf": np.full_like(e.idf, 3e38)},
    "another projection": lambda e: {"signs": ~e.signs},
    "words twice": lambda e: {"words": (e.words[0],) * len(e.words)},
}


@pytest.mark.parametrize("change", CHANGES)
def test_an_embedder_is_one_that_publishing_makes(tmp_path, change):
    """A claim is believed with cause only: the projection is said to be the fixed one, and that of
    a hostile anchor was taken, its fingerprint being right. With an idf out of bounds, owners got
    rows that are no numbers, and were told to lower their learning rate."""
    embedder = fit_embedder("tfidf", ["the river", "a farmer", "our village"], 8)
    assert isinstance(embedder, TfidfEmbedder)
    dataclasses.replace(embedder, **CHANGES[change](embedder)).save(tmp_path)
    with pytest.raises(UserError, match="does not make that"):
        load_embedder(tmp_path, 8)
