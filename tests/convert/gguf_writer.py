"""Writes small GGUF files as llama.cpp's converter does, by the gguf package's own writer."""

import json
import tempfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from flexolmo_jax.config import ModelConfig
from flexolmo_jax.convert.huggingface import to_hf
from flexolmo_jax.data.tokenizer import Tokenizer

PLAIN = ("tokenizer", "general", "split")  # fields that are not an architecture's
ARCHITECTURES = {"olmo3": "olmo2", "mistral": "llama"}  # where they are not the family's name


def write_gguf(
    path: Path,
    family: str,
    config: ModelConfig,
    params: Any,
    tokenizer: Tokenizer,
    *,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    change: Any = None,
) -> None:
    """`change` edits the fields {name: value} and the tensors {name: array} before they are
    written; matrices are quantised to `kind`."""
    architecture = ARCHITECTURES.get(family, family)
    tensors = _tensors(family, architecture, config, params)
    fields = _fields(config) | _tokens(tokenizer)
    if config.rope_scaling and config.rope_scaling.kind == "llama3":
        tensors["rope_freqs.weight"] = _divisors(config)
    if change:
        change(fields, tensors)
    writer = gguf.GGUFWriter(path, fields.pop("architecture", architecture))
    for name, value in fields.items():
        is_plain = name.split(".")[0] in PLAIN
        _add(writer, name if is_plain else f"{architecture}.{name}", value)
    for name, tensor in tensors.items():
        if tensor.ndim == 1 or kind == gguf.GGMLQuantizationType.F32:
            writer.add_tensor(name, tensor)
        else:
            writer.add_tensor(name, gguf.quants.quantize(tensor, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add(writer: gguf.GGUFWriter, name: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(name, value)
    elif isinstance(value, int):
        writer.add_uint32(name, value)
    elif isinstance(value, float):
        writer.add_float32(name, value)
    elif isinstance(value, str):
        writer.add_string(name, value)
    else:
        writer.add_array(name, value)


def _fields(config: ModelConfig) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "block_count": config.n_layers,
        "context_length": config.max_seq_len,
        "embedding_length": config.d_model,
        "feed_forward_length": config.d_ffn,
        "attention.head_count": config.n_heads,
        "attention.head_count_kv": config.n_kv_heads,
        "attention.key_length": config.head_size,
        "attention.value_length": config.head_size,
        "attention.layer_norm_rms_epsilon": config.norm_eps,
        "rope.freq_base": config.rope_theta,
        "rope.dimension_count": config.head_size,
        "vocab_size": config.vocab_size,
    }
    if config.window:
        fields["attention.sliding_window"] = config.window
    if config.full_every:
        layers = range(config.n_layers)
        fields["attention.sliding_window_pattern"] = [config.has_window(l) for l in layers]
    scaling = config.rope_scaling
    if scaling and scaling.kind != "llama3":
        fields["rope.scaling.type"] = scaling.kind
        fields["rope.scaling.factor"] = scaling.factor
        if scaling.kind == "yarn":
            fields["rope.scaling.original_context_length"] = scaling.first_seq_len
    return fields


def _tokens(tokenizer: Tokenizer) -> dict[str, Any]:
    """Of a tokenizer whose rule is dolma2's."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(Path(folder))
        content = json.loads((Path(folder) / "tokenizer.json").read_text("utf-8"))
    names = {i: name for name, i in content["model"]["vocab"].items()}
    special = {token["id"] for token in content["added_tokens"] if token["special"]}
    merges = content["model"]["merges"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "dbrx",
        "tokenizer.ggml.tokens": [names[i] for i in range(len(names))],
        "tokenizer.ggml.token_type": [3 if i in special else 1 for i in range(len(names))],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in merges],
    }


def _tensors(
    family: str, architecture: str, config: ModelConfig, params: Any
) -> dict[str, np.ndarray]:
    kind = next(k for k, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(kind, config.n_layers)
    tensors = {}
    for name, tensor in to_hf(config, params, family).items():
        heads = {"q_proj": config.n_heads, "k_proj": config.n_kv_heads}.get(name.split(".")[-2], 0)
        if architecture == "llama" and heads:  # as `LlamaModel.permute` of the converter
            halves = tensor.reshape(heads, 2, -1, tensor.shape[-1])
            tensor = halves.swapaxes(1, 2).reshape(tensor.shape)
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert found is not None, name
        tensors[found] = np.ascontiguousarray(tensor)
    return tensors


def _divisors(config: ModelConfig) -> np.ndarray:
    """Of the frequencies, as the converter computes them for Llama 3.1: by wavelengths."""
    scaling, C = config.rope_scaling, config.head_size
    assert scaling is not None
    found = []
    for i in range(C // 2):
        wavelength = 2 * np.pi * config.rope_theta ** (2 * i / C)
        first = scaling.first_seq_len
        if wavelength < first / scaling.high_frequency:
            found.append(1.0)
        elif wavelength > first / scaling.low_frequency:
            found.append(scaling.factor)
        else:
            width = scaling.high_frequency - scaling.low_frequency
            smooth = (first / wavelength - scaling.low_frequency) / width
            found.append(1 / ((1 - smooth) / scaling.factor + smooth))
    return np.array(found, np.float32)
