"""`flexolmo import-gguf`: a dense model in a GGUF file becomes a model here, in bfloat16.

What the file says of the model is put into the words of Hugging Face's config.json, which
hub_config.py reads and checks. Tensors are found by the gguf package's names for those of the key
table (huggingface.py). Llama's queries and keys have the two halves of each head interleaved.
"""

import math
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flexolmo_jax.artifact import Artifact
from flexolmo_jax.config import ModelConfig
from flexolmo_jax.errors import UserError
from flexolmo_jax.storage.files import clear
from flexolmo_jax.storage.outputs import check_new
from flexolmo_jax.storage.paths import absolute, takes_paths
from flexolmo_jax.storage.tensorfile import finite

from .families import FAMILIES
from .gguf_file import GgufFile, names_of
from .gguf_tokenizer import tokenizer_of
from .hub_config import model_config
from .huggingface import Entry, key_table, some, transposed
from .imported import Source, check_vocabulary, write_model

ARCHITECTURES = ("llama", "olmo2", "qwen2", "qwen3")  # a llama may be a Mistral, an olmo2 an OLMo 3
INTERLEAVED = ("llama", "mistral")
# What `<architecture>.<name>` is in config.json.
KEYS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.sliding_window": "sliding_window",
    "rope.freq_base": "rope_theta",
}
SCALING = {
    "rope.scaling.type": "rope_type",
    "rope.scaling.factor": "factor",
    "rope.scaling.original_context_length": "original_max_position_embeddings",
    "rope.scaling.attn_factor": "attention_factor",
    "rope.scaling.yarn_beta_fast": "beta_fast",
    "rope.scaling.yarn_beta_slow": "beta_slow",
}
PATTERN = "attention.sliding_window_pattern"  # of each layer, whether it has the window
SIZES = ("attention.value_length", "rope.dimension_count")  # have to be the head's
SILENT = ("vocab_size", "rope.scaling.finetuned")  # say nothing that the tensors do not
FREQUENCIES = "rope_freqs.weight"  # what Llama 3.1's are divided by
# Llama 3.1's own, of which nothing but the result is in a file
LOW, HIGH = 1.0, 4.0


@takes_paths
def import_gguf(path: Path, out: Path) -> Artifact:
    """Writes a model. A tensor is in memory at a time.

    Raises UserError, naming the field or the tensor, for what our model does not compute, for
    files that are not whole, and for values that are not finite.
    """
    check_new(out)
    clear(out)
    with GgufFile(absolute(path)) as file:
        try:
            fields = _hub_fields(file)
            config = model_config(fields)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        tokenizer = tokenizer_of(file.fields, path)
        check_vocabulary(tokenizer, config, path)
        values = _locate(file, config, fields["model_type"])
        architecture = FAMILIES[fields["model_type"]].architecture
        source = Source(config, architecture, tokenizer, "bfloat16", values)
        return write_model(out, source, lambda others: [])


class _Located(NamedTuple):
    file: GgufFile
    name: str
    entry: Entry
    interleaved: int  # heads whose halves are; 0: the rows are in our order

    def read(self) -> np.ndarray:
        values, is_finite = self.file.read(self.name)
        if not is_finite:
            finite(values, f"{self.name} in {self.file.path}")
        if self.interleaved:
            pairs = values.reshape(self.interleaved, -1, 2, values.shape[-1])
            values = pairs.swapaxes(1, 2).reshape(values.shape)
        return transposed(values) if self.entry.transpose else values


def _locate(file: GgufFile, config: ModelConfig, model_type: str) -> dict[str, list[_Located]]:
    """Where each leaf is, by its path. Raises UserError naming tensors that are missing, unexpected
    or of another shape."""
    names = names_of(file.fields["general.architecture"], config.n_layers)
    found: dict[str, list[_Located]] = defaultdict(list)
    missing, used = [], {FREQUENCIES}
    for entry in key_table(config, model_type):
        name = names.get_name(entry.name, try_suffixes=(".weight", ".bias")) or entry.name
        used.add(name)
        if name not in file.tensors:
            missing.append(name)
        elif (shape := file.tensors[name].shape) != entry.shape:
            raise UserError(
                f"{file.path}: {name} has shape {shape}; expected {entry.shape} by the file's own"
                " fields; download it again"
            )
        heads = {"q": config.n_heads, "k": config.n_kv_heads}.get(entry.path[-2], 0)
        located = _Located(file, name, entry, heads if model_type in INTERLEAVED else 0)
        found["/".join(entry.path)].append(located)
    for what, some_names in (
        ("misses", missing),
        ("has unexpected", sorted(file.tensors.keys() - used)),
    ):
        if some_names:
            raise UserError(f"{file.path} {what} tensors: {some(some_names)}; download it again")
    return found


def _hub_fields(file: GgufFile) -> dict[str, Any]:
    """The contents of a config.json. Raises UserError for what our model may not compute."""
    architecture = file.fields.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise UserError(
            f"general.architecture is {architecture!r:.80}; expected one of"
            f" {', '.join(ARCHITECTURES)}; other architectures cannot be imported"
        )
    if (parts := file.fields.get("split.count", 1)) != 1:
        raise UserError(
            f"split.count is {parts!r:.40}: it is a part of a model; join the parts with"
            " `llama-gguf-split --merge`"
        )
    own = {
        name.removeprefix(f"{architecture}."): _plain(value)
        for name, value in file.fields.items()
        if name.startswith(f"{architecture}.")
    }
    if own.get("expert_count"):
        raise UserError(
            f"{architecture}.expert_count is {own['expert_count']!r:.40}; expected a dense model;"
            " import a mixture from its Hugging Face checkpoint"
        )
    _check_known(architecture, own)
    fields = {ours: own[name] for name, ours in KEYS.items() if name in own}
    embedding = file.tensors.get("token_embd.weight")
    fields |= {
        "model_type": architecture,
        "vocab_size": embedding.shape[0] if embedding else None,
        "tie_word_embeddings": "output.weight" not in file.tensors,
    }
    scaling = _scaling(file, own, fields)
    if own.get("attention.sliding_window"):
        return fields | _windows(architecture, own, fields, scaling)
    return fields | ({"rope_scaling": scaling} if scaling else {})


def _plain(value: Any) -> Any:
    """A float32 as the shortest number that gives it: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _check_known(architecture: str, own: Mapping[str, Any]) -> None:
    known = {*KEYS, *SCALING, PATTERN, *SIZES, *SILENT}
    for name, value in own.items():
        if name not in known and value not in (0, False):
            raise UserError(
                f"{architecture}.{name!s:.80} is {value!r:.80}; expected no such field, for our"
                " model may not compute it; such a model cannot be imported"
            )
    width, heads = own.get("embedding_length"), own.get("attention.head_count")
    if not (type(width) is int and type(heads) is int and heads):
        raise UserError(
            f"{architecture}.attention.head_count is {heads!r:.40} for a width of {width!r:.40};"
            " expected one number for all layers; such a model cannot be imported"
        )
    size = own.get("attention.key_length", width // heads)
    for name in SIZES:
        if own.get(name, size) != size:
            raise UserError(
                f"{architecture}.{name} is {own[name]!r:.40}; expected {size}, the size of a head;"
                " such a model cannot be imported"
            )


def _windows(
    architecture: str, own: Mapping[str, Any], fields: Mapping[str, Any], scaling: Any
) -> dict[str, Any]:
    """Of a Mistral or an OLMo 3, whose layers with a window are not scaled."""
    if architecture == "llama" and PATTERN not in own:
        return {"model_type": "mistral"} | ({"rope_scaling": scaling} if scaling else {})
    pattern = own.get(PATTERN)
    if architecture != "olmo2" or not isinstance(pattern, list):
        raise UserError(
            f"{architecture}.attention.sliding_window is {fields['sliding_window']!r:.40}; expected"
            " windows in all layers of a llama, or by a pattern in an olmo2; it cannot be imported"
        )
    theta = fields.get("rope_theta")
    kinds = ("full_attention", "sliding_attention")
    return {
        "model_type": "olmo3",
        "layer_types": [kinds[bool(is_near)] for is_near in pattern],
        "rope_parameters": {
            "full_attention": (scaling or {}) | {"rope_theta": theta},
            "sliding_attention": {"rope_theta": theta},
        },
    }


def _scaling(
    file: GgufFile, own: Mapping[str, Any], fields: Mapping[str, Any]
) -> dict[str, Any] | None:
    said = {ours: own[name] for name, ours in SCALING.items() if name in own}
    # llama.cpp takes a factor without a type as linear
    kind = said.pop("rope_type", "linear" if said.get("factor") else "none")
    if FREQUENCIES in file.tensors and kind == "none":
        return _llama3(file, fields)
    if FREQUENCIES in file.tensors:
        raise UserError(
            f"rope.scaling.type is {kind!r:.40} beside {FREQUENCIES}; expected one of the two; such"
            " a model cannot be imported"
        )
    if kind == "none":
        return None
    factor = said.get("factor")
    if kind == "yarn" and isinstance(factor, float) and factor >= 1:
        # llama.cpp multiplies by its own 1 + 0.1 ln factor; converters write 1 for that, or the
        # product.
        usual = 1 + 0.1 * math.log(factor)
        given = said.pop("attention_factor", 1.0)
        if given != 1 and not (
            isinstance(given, float) and math.isclose(given, usual, rel_tol=1e-4)
        ):
            raise UserError(
                f"rope.scaling.attn_factor is {given!r:.40}; expected 1 or {usual:.5g}; such a"
                " model cannot be imported"
            )
    return {"rope_type": kind} | said


def _llama3(file: GgufFile, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Llama 3.1's scaling, found again from what each frequency is divided by.

    Raises UserError where these numbers are not that scaling's.
    """
    refused = UserError(
        f"{FREQUENCIES} holds another scaling than Llama 3.1's (low frequency {LOW:g}, high"
        f" {HIGH:g}); such a model cannot be imported"
    )
    divisors = file.read(FREQUENCIES, np.float64)[0].reshape(-1)
    theta, half = fields.get("rope_theta"), len(divisors)
    if not isinstance(theta, float) or theta <= 1 or not np.isfinite(divisors).all():
        raise refused
    fast, factor = theta ** -(np.arange(half) / half), float(divisors.max())
    between = (divisors > 1.001) & (divisors < factor * 0.999)
    if factor <= 1 or not between.any():
        raise refused
    kept = (1 / divisors - 1 / factor) / (1 - 1 / factor)
    i = int(np.argmax(between))
    first = round((kept[i] * (HIGH - LOW) + LOW) * 2 * math.pi / fast[i])
    expected = np.clip((first * fast / (2 * math.pi) - LOW) / (HIGH - LOW), 0, 1)
    if not np.allclose(kept, expected, atol=1e-3):
        raise refused
    return {
        "rope_type": "llama3",
        "factor": factor,
        "original_max_position_embeddings": first,
        "low_freq_factor": LOW,
        "high_freq_factor": HIGH,
    }
