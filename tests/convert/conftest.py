"""What several modules stand on: Hugging Face checkpoints of tiny models."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from flexolmo_jax.config import ModelConfig
from flexolmo_jax.convert.hub_config import hf_config
from flexolmo_jax.convert.huggingface import to_hf
from flexolmo_jax.model import init_params

DENSE = ModelConfig(
    vocab_size=384,
    d_model=24,
    n_layers=2,
    n_heads=3,
    n_kv_heads=1,
    d_ffn=20,
    max_seq_len=64,
    rope_theta=1e4,
    norm_eps=1e-5,
)
MOE = dataclasses.replace(DENSE, n_experts=3, n_active=2, router_bias=False)


Make = Callable[..., Path]


def write_checkpoint(directory: Path, config, dtype, tokenizer, change=None) -> None:
    """A Hugging Face checkpoint; `change` edits its tensors and config first."""
    directory.mkdir()
    params = init_params(config, jax.random.key(1))
    params = jax.tree.map(lambda a: np.asarray(a).astype(dtype), params)
    tensors, fields = to_hf(config, params), hf_config(config, dtype=np.dtype(dtype).name)
    if change:
        change(tensors, fields)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_text(json.dumps(fields))
    tokenizer.save(directory)


@pytest.fixture
def checkpoint(tmp_path, tiny_tokenizer) -> Make:
    """Writes a Hugging Face checkpoint; `change` edits its tensors and config first."""

    def make(config=MOE, dtype=ml_dtypes.bfloat16, name="hf", change=None) -> Path:
        write_checkpoint(tmp_path / name, config, dtype, tiny_tokenizer, change)
        return tmp_path / name

    return make
