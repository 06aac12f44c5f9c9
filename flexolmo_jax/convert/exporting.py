"""`flexolmo export-hf`: a run, anchor or model becomes a Hugging Face checkpoint, tensor by tensor:
OLMo 2 of what is dense, FlexOlmo of what has experts (a pair too). What is written is what
`save_pretrained` would write: safetensors with one matrix an expert, config, tokenizer, and a model
card.
"""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from flexolmo_jax.artifact import Artifact, open_artifact
from flexolmo_jax.config import ModelConfig
from flexolmo_jax.errors import UserError, printable
from flexolmo_jax.evals.bits_per_byte import evaluate
from flexolmo_jax.integrity import manifest_of
from flexolmo_jax.loaded import LoadedModel, load
from flexolmo_jax.runtime.progress import bar, note
from flexolmo_jax.storage.files import check_new, clear, new_directory, write_bytes
from flexolmo_jax.storage.tensorfile import write_tensors

from .huggingface import Entry, architecture_of, check_bias, hf_config, key_table, transposed

INDEX = "model.safetensors.index.json"
DTYPES = ("bfloat16", "float16", "float32")


def export_hf(
    source: Path,
    out: Path,
    *,
    max_shard_size: int = 5 * 10**9,
    dtype: str | None = None,
    drop_bias: bool = False,
    eval_data: Sequence[Path] = (),
    which: str = "last",
) -> dict[str, Any]:
    """Writes the checkpoint; returns what was written. Anchors and models are read a tensor at a
    time, runs into memory.

    `max_shard_size`: bytes of a file at most, unless one tensor is larger. `dtype`: default the
    stored one. `drop_bias` leaves router biases out, which changes the model: `eval_data` is then
    scored before and after. Raises UserError for biases that matter where they are not to be
    dropped, and for an unknown dtype.
    """
    check_new(out)
    clear(out)
    artifact = open_artifact(source)
    if dtype not in (None, *DTYPES):
        raise UserError(f"--dtype is {dtype!r}; expected one of {', '.join(DTYPES)}")
    if eval_data and not drop_bias:
        raise UserError(
            "--eval-data is scored before and after biases are dropped; give --drop-bias too"
        )
    arrays, config = _arrays(artifact, which)
    dtype = dtype or str(arrays["trunk/embedding"].dtype)
    scores: dict[str, Any] = {}
    if "experts/bias" in arrays:
        check_bias(np.asarray(arrays["experts/bias"][:]), drop_bias)
        scores = _scores(artifact, which, eval_data) if drop_bias and eval_data else {}
    tokenizer, architecture = artifact.tokenizer, architecture_of(config)
    table = key_table(config, architecture)
    fields = hf_config(
        config,
        architecture,
        dtype=dtype,
        eos_token_id=tokenizer.eos_id,
        pad_token_id=tokenizer.pad_id,
    )
    generation = {
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
        "do_sample": False,
    }
    marks = {
        "eos_token": tokenizer.token(tokenizer.eos_id),
        "pad_token": tokenizer.token(tokenizer.pad_id),
    }
    with_class = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.max_seq_len,
        **marks,
    }
    files = shards(table, np.dtype(dtype).itemsize, max_shard_size)
    total = sum(int(np.prod(entry.shape)) for entry in table) * np.dtype(dtype).itemsize
    with new_directory(out) as directory:
        tokenizer.save(directory / "tokenizer.json")
        with bar("export", total, in_bytes=True) as advance:

            def tensors(entries: Sequence[Entry]) -> Iterator[np.ndarray]:
                for entry in entries:
                    values = np.asarray(
                        arrays["/".join(entry.path)][entry.index or slice(None)]
                    ).astype(dtype, copy=False)
                    yield transposed(values) if entry.transpose else values
                    advance(values.nbytes)

            for name, entries in files.items():
                write_tensors(
                    directory / name,
                    {e.name: (dtype, e.shape) for e in entries},
                    tensors(entries),
                    {"format": "pt"},
                )
        if len(files) > 1:
            weight_map = {entry.name: name for name, entries in files.items() for entry in entries}
            _write_json(
                directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map}
            )
        _write_json(directory / "tokenizer_config.json", with_class)
        _write_json(directory / "generation_config.json", generation)
        write_bytes(directory / "README.md", _card(artifact, config, scores).encode())
        _write_json(directory / "config.json", fields)
    note(
        f"exported {out}: {fields['architectures'][0]}, {total:,} bytes in {len(files)}"
        f" file{'s' * (len(files) > 1)}, {dtype}"
    )
    return {
        "out": str(out),
        "architecture": fields["architectures"][0],
        "dtype": dtype,
        "bytes": total,
        "files": len(files),
        **scores,
    }


def _arrays(artifact: Artifact, which: str) -> tuple[dict[str, Any], ModelConfig]:
    """Every leaf, and the config of them; a pair's two experts stacked as a merged model's, both of
    them active."""
    arrays = artifact.arrays(which)
    if not artifact.is_pair:
        return arrays, artifact.config
    for path in [path for path in arrays if path.startswith("expert/")]:
        new = np.asarray(arrays.pop(path))
        first = arrays.get(path.replace("expert/", "experts/"))
        # the anchor has no bias
        old = np.zeros_like(new) if first is None else np.asarray(first, new.dtype)
        arrays[path.replace("expert/", "experts/")] = np.concatenate([old, new], axis=1)
    return arrays, dataclasses.replace(artifact.config, n_experts=2, n_active=2)


def _scores(artifact: Artifact, which: str, data: Sequence[Path]) -> dict[str, Any]:
    """Bits per byte with and without router biases."""
    model = load(artifact.path, which)
    branch = "expert" if artifact.is_pair else "experts"
    without = model.params | {
        branch: model.params[branch] | {"bias": jax.numpy.zeros_like(model.params[branch]["bias"])}
    }
    scores = {}
    for name, each in (
        ("with the router's biases", model),
        ("without them", LoadedModel(artifact, without)),
    ):
        scores[name] = evaluate(each, data)["bits_per_byte"]
        note(f"bits per byte {name}: {', '.join(f'{d} {x:.4f}' for d, x in scores[name].items())}")
    return {"bits_per_byte": scores}


def shards(table: Sequence[Entry], itemsize: int, limit: int) -> dict[str, list[Entry]]:
    """The tensors of each file, in the table's order."""
    parts: list[list[Entry]] = [[]]
    size = 0
    for entry in table:
        nbytes = int(np.prod(entry.shape)) * itemsize
        if parts[-1] and size + nbytes > limit:
            parts.append([])
            size = 0
        parts[-1].append(entry)
        size += nbytes
    if len(parts) == 1:
        return {"model.safetensors": parts[0]}
    return {
        f"model-{i:05}-of-{len(parts):05}.safetensors": entries
        for i, entries in enumerate(parts, 1)
    }


def _card(artifact: Artifact, config: ModelConfig, scores: dict[str, Any]) -> str:
    """The model card: who made which expert, on what terms, and on which anchor."""
    members = {
        member["name"]: manifest_of(member) or member
        for member in artifact.description.get("members", ())
    }
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [flexolmo-jax]",
        "---",
        "",
        f"# {_plain(artifact.path.name)}",
    ]
    what = (
        "A dense model (OLMo 2)"
        if config.n_experts == 1
        else f"A mixture of {config.n_experts} experts (FlexOlmo)"
    )
    lines += [
        "",
        (
            f"{what}, exported by flexolmo-jax. Anchor:"
            f" {_plain(artifact.fingerprint or 'not published')}."
        ),
        "",
    ]
    lines += ["| expert | owner | domain | licence | expires |", "|---|---|---|---|---|"]
    for name in artifact.experts:
        member = members.get(name, {})
        lines.append(
            "| "
            + " | ".join(
                _plain(word)
                for word in (name, *map(member.get, ("owner", "domain", "licence", "expires")))
            )
            + " |"
        )
    if scores:
        lines += ["", "Router biases were dropped. Bits per byte:", ""]
        for name, each in scores["bits_per_byte"].items():
            lines.append(f"- {name}: {', '.join(f'{_plain(d)} {x:.4f}' for d, x in each.items())}")
    return "\n".join(lines) + "\n"


def _plain(text: Any) -> str:
    """Strangers' words on a page: letters and digits as they are, all else as HTML's numbers, which
    no Markdown reads.

    So nothing is markup, ends a line or a table's cell, or becomes a link by itself.
    """
    return "".join(
        c if c.isalnum() or c in " ," else f"&#{ord(c)};" for c in printable(str(text or ""))
    )


def _write_json(path: Path, value: Any) -> None:
    write_bytes(path, (json.dumps(value, indent=2) + "\n").encode())
