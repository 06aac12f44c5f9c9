"""Every kind of bad checkpoint is named, and nothing of it stays."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from flexolmo_jax.convert.importing import import_hf
from flexolmo_jax.errors import UserError

# Edits of a good checkpoint, which spoil it.


def edited(change: Callable[[dict[str, np.ndarray]], Any]) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        tensors = load_file(directory / "model.safetensors")
        change(tensors)
        save_file(tensors, directory / "model.safetensors", {"format": "pt"})

    return edit


def with_norm(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], None]:
    return edited(lambda tensors: tensors.update({NORM: change(tensors[NORM])}))


def without(name: str) -> Callable[[Path], None]:
    return lambda directory: (directory / name).unlink()


def setting(key: str, value: Any) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        fields = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps(fields | {key: value}))

    return change


def indexed(name: str) -> Callable[[Path], None]:
    """With an index that says a tensor is in this file."""
    index = json.dumps({"weight_map": {"a": name}})

    def change(directory: Path) -> None:
        (directory / "model.safetensors.index.json").write_text(index)

    return change


def truncate(directory: Path) -> None:
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


def pickle(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


def spoil_json(directory: Path) -> None:
    (directory / "config.json").write_text("{")


NORM, BIAS = "model.norm.weight", "model.layers.7.bias"
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "mscale": 0.7}
BAD = {
    "missing key": (edited(lambda tensors: tensors.pop(NORM)), f"misses tensors: {NORM}"),
    "extra key": (
        edited(lambda tensors: tensors.update({BIAS: tensors[NORM]})),
        f"has unexpected tensors: {BIAS}",
    ),
    "shape": (
        with_norm(lambda norm: norm[:-1]),
        rf"{NORM} has shape \(23,\); expected \(24,\) by config.json",
    ),
    "dtype": (
        with_norm(lambda _: np.ones(24, np.int64)),
        "has dtype 'I64'; expected BF16, F16, F32",
    ),
    "truncated": (truncate, "cannot be read as safetensors: it has"),
    "pickle": (pickle, "pytorch_model.bin, a pickle"),
    "missing shard": (indexed("model-2.safetensors"), "misses model-2.safetensors"),
    "NaN": (
        with_norm(lambda norm: np.where(np.arange(24) == 3, np.nan, norm).astype(norm.dtype)),
        f"{NORM} in .* has the value nan; expected finite numbers",
    ),
    "escape": (
        indexed("../model.safetensors"),
        "no weight_map from tensors to files beside it",
    ),
    "no weights": (without("model.safetensors"), r"no \*.safetensors"),
    "no config": (without("config.json"), "cannot read .*config.json"),
    "no JSON": (spoil_json, "is not JSON"),
    "rope scaling": (setting("rope_parameters", YARN), "rope_parameters"),
    "attention bias": (setting("attention_bias", True), "attention_bias is True"),
    "activation": (setting("hidden_act", "gelu"), "hidden_act is 'gelu'"),
    "clipping": (setting("clip_qkv", 8.0), "clip_qkv is 8.0"),
    "architecture": (setting("model_type", "gpt2"), "model_type is 'gpt2'"),
    "vocabulary": (setting("vocab_size", 128), "tokenizer of 3.. tokens and vocab_size 128"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_named_and_leaves_nothing(change, message, checkpoint, tmp_path):
    source = checkpoint()
    change(source)
    with pytest.raises(UserError, match=message):
        import_hf(source, tmp_path / "model")
    assert {path.name for path in tmp_path.iterdir()} == {"hf"}


@pytest.mark.parametrize("names", [("one",), ("same", "same"), ("anchor", "b"), ("../a", "b")])
def test_names_must_be_as_many_as_experts_and_fit_to_be_paths(names, checkpoint, tmp_path):
    with pytest.raises(UserError, match="expected"):
        import_hf(checkpoint(), tmp_path / "model", names)
