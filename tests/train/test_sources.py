"""How often a run reads the raw documents that it is trained on."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from flexolmo_jax.config import DataConfig, Dataset
from flexolmo_jax.data import changes
from flexolmo_jax.data import prepare as preparing
from flexolmo_jax.data.changes import changed_documents
from flexolmo_jax.owner import pair as pairs
from flexolmo_jax.owner.pair import train_pair
from flexolmo_jax.train.sources import open_sources
from tests.tiny import SEQ_LEN, pair_config


@pytest.fixture
def read(monkeypatch) -> list[str]:
    """The names of what was read to compare it, and of documents read for their text."""
    seen: list[str] = []
    for module, name in ((preparing, "sha256_of"), (pairs, "read_training_documents")):
        monkeypatch.setattr(module, name, noting(seen, getattr(module, name)))
    return seen


def noting(seen: list[str], function: Callable) -> Callable:
    def noted(path: Path, *args, **options):
        seen.append(path.name)
        return function(path, *args, **options)

    return noted


@pytest.fixture
def documents(corpora, tmp_path) -> Path:
    """A domain's documents in a folder of two files, just written."""
    (tmp_path / "docs").mkdir()
    for domain in ("law", "care"):
        shutil.copyfile(corpora[domain], tmp_path / "docs" / f"{domain}.jsonl")
    return tmp_path / "docs"


def age(folder: Path) -> None:
    for file in folder.iterdir():
        os.utime(file, (1.7e9, 1.7e9))


def test_a_start_reads_raw_documents_once_at_most(documents, tiny_tokenizer, read):
    data = DataConfig(train=(Dataset(path=str(documents)),), seq_len=SEQ_LEN, batch_size=4)
    open_sources(data, tiny_tokenizer, 0)
    for _ in range(2):  # just written: they could change again without another time
        read.clear()
        open_sources(data, tiny_tokenizer, 0)
        assert sorted(read) == ["care.jsonl", "law.jsonl"]
    age(documents)
    open_sources(data, tiny_tokenizer, 0)
    read.clear()
    open_sources(data, tiny_tokenizer, 0)
    assert read == []


def test_a_resumed_pair_reads_none_of_its_documents(documents, anchor, tmp_path, read):
    age(documents)
    run = pair_config(anchor, documents, "law", "train.steps=2")
    first = train_pair(run, tmp_path / "run")
    assert {"docs", "law.jsonl", "care.jsonl"} <= set(read)
    read.clear()
    assert train_pair(run, tmp_path / "run") == first
    assert read == []


def test_unchanged_documents_are_not_read_to_compare_them_with_prepared_ones(
    corpora, prepared, monkeypatch, tmp_path
):
    seen: list[str] = []
    monkeypatch.setattr(changes, "sha256_of", noting(seen, changes.sha256_of))
    file = tmp_path / "law.jsonl"
    shutil.copyfile(corpora["law"], file)
    age(tmp_path)
    for expected in (["law.jsonl"], []):
        seen.clear()
        assert changed_documents(prepared["law"], [file]) == "" and seen == expected
    file.write_text('{"text": "another"}\n')
    assert "edited" in changed_documents(prepared["law"], [file])
