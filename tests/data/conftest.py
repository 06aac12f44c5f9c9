"""A small tokenizer and made-up text, the same for all data tests."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest

from flexolmo_jax.data.byte_level import BYTES
from flexolmo_jax.data.tokenizer import Tokenizer, train_tokenizer

WORDS = [
    "the",
    "cell",
    "merges",
    "an",
    "expert",
    "with",
    "naïve",
    "weights,",
    "1234",
    "—",
    "東京",
    "(yes);",
    "x",
    "+=",
    "1\n",
]


@pytest.fixture(scope="session")
def made_up_documents() -> Callable[..., list[str]]:
    """`made_up_documents(count, seed, longest=60)`: different documents of 1 to `longest` words."""

    def make(count: int, seed: int, longest: int = 60) -> list[str]:
        rng = np.random.default_rng(seed)
        return [
            f"{seed}.{i} " + " ".join(rng.choice(WORDS, rng.integers(1, longest + 1)))
            for i in range(count)
        ]

    return make


@pytest.fixture(scope="session")
def write_jsonl() -> Callable[[Path, Iterable[str]], Path]:
    """`write_jsonl(path, texts)`: writes documents as a JSONL file and returns its path."""

    def write(path: Path, texts: Iterable[str]) -> Path:
        path.write_text(
            "".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(texts)),
            "utf-8",
        )
        return path

    return write


@pytest.fixture(scope="session")
def tokenizer(
    tmp_path_factory: pytest.TempPathFactory, made_up_documents: Callable, write_jsonl: Callable
) -> Tokenizer:
    """A byte-level BPE of 400 tokens."""
    folder = tmp_path_factory.mktemp("tokenizer")
    corpus = write_jsonl(folder / "corpus.jsonl", made_up_documents(300, seed=0))
    return train_tokenizer([corpus], 400, folder / "tokenizer.json")


@pytest.fixture(scope="session")
def lossy_tokenizer(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """The same without some bytes that text hardly ever has, as SmolLM2's vocabulary."""
    folder = tmp_path_factory.mktemp("lossy")
    tokenizer.save(folder)
    fields = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    for sign, byte in BYTES.items():
        if byte in (0x04, 0x1D, 0xF1):
            del fields["model"]["vocab"][sign]
    return Tokenizer(json.dumps(fields))
