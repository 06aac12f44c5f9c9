"""`flexolmo export-hf`: a run, anchor or model becomes a Hugging Face checkpoint.

A dense one keeps its family. One with several experts (a pair too) becomes the mixture that
computes the same: FlexOlmo, Mixtral, Qwen 3 MoE or OLMoE. The files are those that
`save_pretrained` would write: safetensors with one matrix for each expert, config, tokenizer and a
model card.
"""

import dataclasses
import json
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from flexolmo_jax.artifact import Artifact, open_artifact
from flexolmo_jax.config import MeshConfig, ModelConfig
from flexolmo_jax.data.tokenizer import TOKENIZER_FILE, Tokenizer
from flexolmo_jax.errors import UserError
from flexolmo_jax.evals.bits_per_byte import evaluate
from flexolmo_jax.integrity import MATRICES, name_of_tensor
from flexolmo_jax.loaded import load
from flexolmo_jax.runtime.progress import bar, note
from flexolmo_jax.runtime.sharding import batch_over
from flexolmo_jax.storage.files import clear, new_directory, write_bytes, write_text
from flexolmo_jax.storage.outputs import check_new
from flexolmo_jax.storage.paths import takes_paths
from flexolmo_jax.storage.tensorfile import finite, write_tensors
from flexolmo_jax.train.evaluate import BATCH_SIZE

from .card import model_card, rows_advice
from .chat import TEMPLATE
from .conventions import write_templates, written
from .hub_config import hf_config
from .huggingface import Entry, check_bias, key_table, transposed
from .identity import Tensors, by_expert, described, note_of

INDEX = "model.safetensors.index.json"
DTYPES = ("bfloat16", "float16", "float32")


@takes_paths
def export_hf(  # noqa: PLR0913 - the verb's options
    path: Path,
    out: Path,
    *,
    max_shard_size: int = 5 * 10**9,
    dtype: str | None = None,
    drop_bias: bool = False,
    eval_data: Sequence[Path] = (),
    which: str = "last",
    mesh: MeshConfig | None = None,
    anchor: Path | None = None,
) -> dict[str, Any]:
    """Writes the checkpoint and returns its figures. In memory is a tensor of it, or of a run.

    Args:
        max_shard_size: the most bytes of a file, unless one tensor has more.
        dtype: by default the stored one.
        drop_bias: leave router biases out, which changes the model.
        eval_data: is scored with and without the biases that are dropped.
        which, anchor: as in `load`.
        mesh: the devices that the model is spread over to be scored (default: one device).

    Raises UserError for biases that matter and are not to be dropped, an unknown dtype, values that
    are not finite or beyond the dtype, and a mesh that does not fit the devices or comes without
    `eval_data`.
    """
    check_new(out)
    clear(out)
    artifact = open_artifact(path, anchor)
    _check_options(dtype, drop_bias, eval_data, mesh)
    arrays, config = _arrays(artifact, which)
    dtype = dtype or str(arrays["trunk/embedding"].dtype)
    lowest = _lowest_bias(arrays, drop_bias)
    scores = _scores(artifact, which, eval_data, mesh) if lowest < 0 and eval_data else {}
    configs = _configs(config, artifact.own_tokenizer, dtype)
    files = shards(_table(artifact, config), np.dtype(dtype).itemsize, max_shard_size)
    with new_directory(out) as directory:
        _write_tokenizer(directory, artifact.own_tokenizer)
        total, others = _write_weights(directory, files, arrays, dtype)
        configs["config.json"] |= note_of(artifact, others)
        write_text(directory / "README.md", model_card(artifact, config, dtype, lowest, scores))
        for name, content in configs.items():
            _write_json(directory / name, content)
        artifact.ensure()  # again: another directory may have got its name meanwhile
    (architecture,) = configs["config.json"]["architectures"]
    note(f"exported {out}: {architecture}, {total:,} bytes, files: {len(files)}, {dtype}")
    if advice := rows_advice(config, dtype):
        note(advice)
    made = {"out": str(out), "architecture": architecture, "dtype": dtype}
    return made | {"bytes": total, "files": len(files)} | scores


def _lowest_bias(arrays: dict[str, Any], drop: bool) -> float:
    """Of the router's biases, where there are any; see `check_bias`."""
    return (
        check_bias(np.asarray(arrays["experts/bias"][:]), drop) if "experts/bias" in arrays else 0
    )


def _check_options(
    dtype: str | None, drop_bias: bool, eval_data: Sequence[Path], mesh: MeshConfig | None
) -> None:
    if dtype not in (None, *DTYPES):
        raise UserError(f"--dtype is {dtype!r}; expected one of {', '.join(DTYPES)}")
    if eval_data and not drop_bias:
        raise UserError(
            "--eval-data is scored before and after biases are dropped; give --drop-bias too"
        )
    if mesh and not eval_data:
        raise UserError(
            "--mesh is for scoring --eval-data; exporting needs no device: leave it out"
        )


def _configs(
    config: ModelConfig, tokenizer: Tokenizer | None, dtype: str
) -> dict[str, dict[str, Any]]:
    """The contents of the JSON files beside the weights, by name."""
    files = written(tokenizer, config.max_seq_len) if tokenizer else {}
    return files | {"config.json": hf_config(config, dtype=dtype) | files.get("config.json", {})}


def _write_tokenizer(directory: Path, tokenizer: Tokenizer | None) -> None:
    """Writes `tokenizer.json`, and the files of chat templates."""
    if tokenizer is None:
        return
    tokenizer.save(directory / TOKENIZER_FILE)
    if tokenizer.chat:
        write_text(directory / TEMPLATE, tokenizer.chat.template)
    write_templates(directory, tokenizer)


def _table(artifact: Artifact, config: ModelConfig) -> list[Entry]:
    """The tensors to write. Those of a run by our parameter: each of these is read once, whole."""
    table = key_table(config)
    return sorted(table, key=lambda entry: entry.path) if artifact.kind == "run" else table


def _write_weights(
    directory: Path, files: dict[str, list[Entry]], arrays: dict[str, Any], dtype: str
) -> tuple[int, list[Tensors]]:
    """Writes the files, with an index where they are several; returns the bytes of all tensors, and
    the tensors of each expert but the anchor."""
    table = [entry for entries in files.values() for entry in entries]
    others: dict[int, Tensors] = defaultdict(dict)
    total = sum(math.prod(entry.shape) for entry in table) * np.dtype(dtype).itemsize
    with bar("export", total, in_bytes=True) as advance:

        def tensors(entries: Sequence[Entry]) -> Iterator[np.ndarray]:
            for entry in entries:
                path = "/".join(entry.path)
                part = arrays[path][entry.index or slice(None)]
                values = finite(np.asarray(part), entry.name, dtype)
                for layer, expert, each in by_expert(path, entry.index, values):
                    if expert > 0:
                        others[expert][name_of_tensor(path, layer)] = described(each)
                yield transposed(values) if entry.transpose else values
                advance(values.nbytes)

        for name, entries in files.items():
            header = {entry.name: (dtype, entry.shape) for entry in entries}
            write_tensors(directory / name, header, tensors(entries), {"format": "pt"})
    if len(files) > 1:
        weight_map = {entry.name: name for name, entries in files.items() for entry in entries}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(directory / INDEX, index)
    return total, [others[expert] for expert in sorted(others)]


@dataclasses.dataclass(frozen=True)
class _Pair:
    """The matrices of a pair's two experts: one is read when it is indexed."""

    anchors: Any
    new: Any

    def __getitem__(self, index: tuple[int, int]) -> np.ndarray:
        layer, expert = index
        return (self.anchors, self.new)[expert][layer, 0]


def _arrays(artifact: Artifact, which: str) -> tuple[dict[str, Any], ModelConfig]:
    """Every leaf, and its config. A pair's two experts are stacked as those of a merged model are,
    with both active."""
    arrays: dict[str, Any] = dict(artifact.arrays(which))
    if not artifact.is_pair:
        return arrays, artifact.config
    for name in MATRICES:
        arrays[f"experts/{name}"] = _Pair(arrays[f"experts/{name}"], arrays.pop(f"expert/{name}"))
    for path in [path for path in arrays if path.startswith("expert/")]:
        new, stacked = arrays.pop(path)[:], path.replace("expert/", "experts/")
        # The anchor has no bias. The model ignores what is stored as one.
        old = arrays[stacked][:].astype(new.dtype) if stacked in arrays else np.zeros_like(new)
        arrays[stacked] = np.concatenate([old, new], axis=1)
    return arrays, dataclasses.replace(artifact.config, n_experts=2, n_active=2)


def _scores(
    artifact: Artifact, which: str, data: Sequence[Path], mesh: MeshConfig | None
) -> dict[str, Any]:
    """Bits per byte with and without router biases."""
    model = load(artifact.path, which, mesh, anchor=artifact.base_at)
    branch = "expert" if artifact.is_pair else "experts"
    experts = model.params[branch]
    dropped = experts | {"bias": jax.numpy.zeros_like(experts["bias"])}
    models = {
        "with the router's biases": model,
        "without them": dataclasses.replace(model, params=model.params | {branch: dropped}),
    }
    scores, size = {}, batch_over(model.mesh, BATCH_SIZE)
    for name, each in models.items():
        scores[name] = evaluate(each, data, batch_size=size)["bits_per_byte"]
        figures = ", ".join(f"{domain} {bits:.4f}" for domain, bits in scores[name].items())
        note(f"bits per byte {name}: {figures}")
    return {"bits_per_byte": scores}


def shards(table: Sequence[Entry], itemsize: int, limit: int) -> dict[str, list[Entry]]:
    """The tensors of each file, in the table's order."""
    files: list[list[Entry]] = [[]]
    size = 0
    for entry in table:
        nbytes = math.prod(entry.shape) * itemsize
        if files[-1] and size + nbytes > limit:
            files.append([])
            size = 0
        files[-1].append(entry)
        size += nbytes
    if len(files) == 1:
        return {"model.safetensors": files[0]}
    count = len(files)
    return {f"model-{i:05}-of-{count:05}.safetensors": file for i, file in enumerate(files, 1)}


def _write_json(path: Path, value: Any) -> None:
    write_bytes(path, (json.dumps(value, indent=2) + "\n").encode())
