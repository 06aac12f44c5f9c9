"""Shards: files in order, and records that never reach across two of them."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexolmo_jax.data import shards as module
from flexolmo_jax.data.prepare import prepare
from flexolmo_jax.data.records import SPLITS
from flexolmo_jax.data.shards import shards_of
from tests.data.test_prepare import T


@given(st.lists(st.integers(0, 3 * module.SHARD // 2), max_size=20))
def test_shards_are_all_files_in_order_and_as_long_as_they_may_be(sizes):
    files = [Path(str(number)) for number in range(len(sizes))]
    found = shards_of(files, sizes)
    assert [file for shard in found for file in shard.files] == files
    assert [shard.number for shard in found] == list(range(len(found)))
    for shard in found:
        assert shard.bytes == sum(sizes[int(file.name)] for file in shard.files)
        assert shard.bytes <= module.SHARD or len(shard.files) == 1
    for shard, after in itertools.pairwise(found):
        assert shard.bytes + sizes[int(after.files[0].name)] > module.SHARD


@pytest.mark.parametrize("heldout", [0, 0.3])
def test_the_records_of_a_corpus_are_those_of_its_shards(
    tmp_path, write_jsonl, made_up_documents, tokenizer, monkeypatch, heldout
):
    parts = [made_up_documents(60, seed=seed) for seed in range(3)]
    files = [write_jsonl(tmp_path / f"{n}.jsonl", part) for n, part in enumerate(parts)]
    how = {"heldout": heldout, "workers": 2}
    for number, file in enumerate(files):
        prepare([file], tokenizer, T, tmp_path / f"one-{number}", **how)
    monkeypatch.setattr(module, "SHARD", 1)
    index = prepare(files, tokenizer, T, tmp_path / "all", **how)
    for split in SPLITS:
        for kind in ("tokens", "segments"):
            name = f"{split}.{kind}.npy"
            each = [np.load(tmp_path / f"one-{number}" / name) for number in range(3)]
            assert np.array_equal(np.load(tmp_path / "all" / name), np.concatenate(each))
        assert index.splits[split].records == len(np.load(tmp_path / "all" / f"{split}.tokens.npy"))
