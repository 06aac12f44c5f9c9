"""Files of strangers that are good, and what reads them: what the attacks on each start from."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from flexolmo_jax.config import ModelConfig, dump_yaml, load_config
from flexolmo_jax.convert.conventions import written
from flexolmo_jax.convert.hub_config import hf_config
from flexolmo_jax.convert.huggingface import to_hf
from flexolmo_jax.convert.importing import INDEX, import_hf
from flexolmo_jax.data.chat import Chat
from flexolmo_jax.data.conventions import Conventions
from flexolmo_jax.data.records import open_records
from flexolmo_jax.data.tokenizer import Tokenizer
from flexolmo_jax.errors import UserError
from flexolmo_jax.exchange.embedder import fit_embedder, load_embedder
from flexolmo_jax.model import init_params
from tests.tiny import run_config

MODEL = ModelConfig(
    vocab_size=384,
    d_model=16,
    n_layers=2,
    n_heads=2,
    n_kv_heads=1,
    d_ffn=8,
    n_experts=2,
    n_active=2,
    router_bias=False,
)


@pytest.fixture(scope="module")
def sources(tmp_path_factory, prepared, tiny_tokenizer) -> dict[str, Path]:
    """A good one of each: a checkpoint in Hugging Face's form, prepared records, an embedder, a
    run's config, a tokenizer with a chat template."""
    root = tmp_path_factory.mktemp("foreign")
    checkpoint, fitted, chat = root / "hf", root / "embedder", root / "chat"
    for directory in (checkpoint, fitted, chat):
        directory.mkdir()
    tensors = to_hf(MODEL, jax.tree.map(np.asarray, init_params(MODEL, jax.random.key(0))))
    save_file(tensors, checkpoint / "model.safetensors")
    (checkpoint / "config.json").write_text(json.dumps(hf_config(MODEL)))
    (checkpoint / INDEX).write_text(
        json.dumps(
            {
                "metadata": {"total_size": 1},
                "weight_map": dict.fromkeys(tensors, "model.safetensors"),
            }
        )
    )
    tiny_tokenizer.save(checkpoint)
    template = "{{ messages[0].content }}{{ eos_token }}"
    fields = {"chat_template": [{"name": "default", "template": template}]}
    fields |= {"eos_token": {"content": "<|endoftext|>"}, "pad_token": "<|pad|>"}
    (checkpoint / "tokenizer_config.json").write_text(json.dumps(fields))
    (checkpoint / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [0, 1], "temperature": 0.6, "stop_strings": ["x"]})
    )
    (checkpoint / "special_tokens_map.json").write_text(
        json.dumps({"bos_token": {"content": "<s>"}, "additional_special_tokens": ["<|pad|>"]})
    )
    (checkpoint / "added_tokens.json").write_text(json.dumps({"<s>": 321, "<|pad|>": 1}))
    tiny_tokenizer.save(chat)
    Chat(template, {"eos_token": "<|endoftext|>"}, ("<|endoftext|>",)).save(chat)
    start, ids = ("<|pad|>",), {"eos_token_id": [0, 1]}
    Conventions(start, start, {"a_token": "x"}, start, {"a": "b"}, {"top_k": 1}, ids).save(chat)
    fit_embedder("tfidf", ["the river feeds the valley", "a farmer paints"], 16).save(fitted)
    config = root / "config.yaml"
    config.write_text(dump_yaml(run_config("anchor", prepared["public"])))
    return {
        "hf": checkpoint,
        "prepared": Path(shutil.copytree(prepared["public"], root / "prepared")),
        "embedder": fitted,
        "run": config,
        "chat": chat,
    }


def read_prepared(path: Path) -> None:
    data = open_records(path, "train")
    data.check_digests()
    assert data[0]["tokens"].shape == (data.seq_len,)


def read_embedder(path: Path) -> None:
    assert load_embedder(path, 16).embed(["the river"]).shape == (1, 16)


def converted(path: Path, out: Path) -> None:
    """Imported: what is kept can be read again, and written."""
    written(import_hf(path, out).tokenizer, MODEL.max_seq_len)


# By the file that is changed: what it lies in, and what reads it.
FILES: dict[str, tuple[str, Callable[[Path, Path], Any]]] = {
    "config.json": ("hf", import_hf),
    INDEX: ("hf", import_hf),
    "tokenizer_config.json": ("hf", converted),
    "generation_config.json": ("hf", converted),
    "special_tokens_map.json": ("hf", converted),
    "added_tokens.json": ("hf", converted),
    "conventions.json": ("chat", lambda path, out: Tokenizer.load(path).text_digest),
    "chat.json": ("chat", lambda path, out: Tokenizer.load(path)),
    "index.json": ("prepared", lambda path, out: read_prepared(path)),
    "embedder.json": ("embedder", lambda path, out: read_embedder(path)),
    "config.yaml": ("run", lambda path, out: load_config(path)),
}


def in_a_line(error: UserError) -> None:
    assert "\n" not in str(error) and len(str(error)) < 1500, str(error)


def laughs(levels: int) -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, levels)]
    return "\n".join(lines)
