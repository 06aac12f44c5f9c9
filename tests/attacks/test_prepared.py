"""Hostile prepared data, whose index and digests fit each other. The promise: it is told in one
line, and no number comes of it that nothing made."""

import json
import shutil

import numpy as np
import pytest

from flexolmo_jax import cli
from flexolmo_jax.data.records import sha256_of


def with_token(prepared, target, token, vocabulary=None):
    """The same data with one more token in it, and digests to match."""
    shutil.copytree(prepared, target)
    index = json.loads((target / "index.json").read_text())
    index["vocab_size"] = vocabulary or index["vocab_size"]
    for split in ("train", "heldout"):
        file = target / f"{split}.tokens.npy"
        tokens = np.load(file)
        tokens[:, 3] = token
        np.save(file, tokens)
        index["files"][file.name] = sha256_of(file)
    (target / "index.json").write_text(json.dumps(index))
    return target


@pytest.mark.parametrize("vocabulary", [None, 500])
def test_a_token_that_no_vocabulary_has_is_refused(model, prepared, tmp_path, capsys, vocabulary):
    """Told in one line: scoring ended in an IndexError, and training took another token for it."""
    data = with_token(prepared["law"], tmp_path / "data", 400, vocabulary)
    assert cli.main(["eval", str(model), "--data", str(data)]) == 2
    assert "has token 400" in capsys.readouterr().err
    (tmp_path / "pair.yaml").write_text(
        "run: joint\nmodel: {d_model: 32, n_layers: 2, n_heads: 4, n_kv_heads: 4, d_ffn: 64}\n"
        f"data: {{train: [{{path: {data}}}], batch_size: 8, seq_len: 32}}\n"
        "train: {steps: 1}\nmesh: {fsdp: 1}\n"
    )
    assert cli.main(["train", str(tmp_path / "pair.yaml"), "--out", str(tmp_path / "run")]) == 2
    told = capsys.readouterr().err
    assert "has token 400" in told or "another tokenizer" in told
