"""Hugging Face's OLMo 2 (dense) and FlexOlmo: the config and the name of every tensor, both ways.

`key_table` is the whole correspondence: one entry for each tensor of a Hugging Face checkpoint, in
that checkpoint's order, with its place in our parameters. Ours stack layers and experts and store
matrices as [in, out]; Hugging Face has one matrix a layer and expert, as [out, in]. `to_hf` and
`from_hf` apply the table in memory, importing.py and exporting.py to files, tensor by tensor.

A dense model is written as `olmo2` (which has no router: its one row has no influence) and a merged
one as `flex_olmo`. Names checked against transformers 5.23 (`models/olmo2`, `models/flex_olmo`).
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field

from flexolmo_jax.config import LARGEST, ModelConfig
from flexolmo_jax.errors import UserError
from flexolmo_jax.model import Params, init_params
from flexolmo_jax.storage.untrusted import conform

Architecture = Literal["olmo2", "flex_olmo"]

CLASSES: dict[Architecture, str] = {"olmo2": "Olmo2ForCausalLM", "flex_olmo": "FlexOlmoForCausalLM"}

# What our model computes and has no setting for. A key that is absent has this value in
# transformers too.
FIXED: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "norm_topk_prob": False,
    "clip_qkv": None,
    "sliding_window": None,
    "rope_scaling": None,
    "partial_rotary_factor": None,
}


# FFNs of all layers and experts: a model's description has room for the digests of fewer
BLOCKS = 1 << 15
TILE = 256  # rows and columns
TOGETHER = "check that config.json and the weights belong together"


Positive = Annotated[float, Field(gt=0, le=1e12)]


@dataclasses.dataclass(frozen=True)
class RopeParameters:
    rope_type: Literal["default"] = "default"
    rope_theta: Positive | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Olmo2Fields:
    """What is read of a `config.json`, beside `model_type` and FIXED."""

    vocab_size: Annotated[int, Field(ge=1, le=2**24)]
    hidden_size: Annotated[int, Field(ge=1, le=LARGEST["d_model"])]
    num_hidden_layers: Annotated[int, Field(ge=1, le=LARGEST["n_layers"])]
    num_attention_heads: Annotated[int, Field(ge=1, le=LARGEST["n_heads"])]
    num_key_value_heads: Annotated[int, Field(ge=1, le=LARGEST["n_kv_heads"])] | None = None
    intermediate_size: Annotated[int, Field(ge=1, le=LARGEST["d_ffn"])]
    max_position_embeddings: Annotated[int, Field(ge=1, le=LARGEST["max_seq_len"])]
    rms_norm_eps: Positive
    initializer_range: Positive | None = None
    rope_theta: Positive | None = None  # of transformers 4
    rope_parameters: RopeParameters | None = None  # of transformers 5
    head_dim: int | None = None
    tie_word_embeddings: bool | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlexOlmoFields(Olmo2Fields):
    num_experts: Annotated[int, Field(ge=1, le=LARGEST["n_experts"])]
    num_experts_per_tok: Annotated[int, Field(ge=1, le=LARGEST["n_active"])]


class Entry(NamedTuple):
    """One tensor of a Hugging Face checkpoint: element `index` of our leaf at `path`, transposed
    where it is a linear map."""

    name: str
    shape: tuple[int, ...]  # in the Hugging Face checkpoint
    path: tuple[str, ...]  # of our leaf
    index: tuple[int, ...] = ()  # into our leaf: (), (layer,) or (layer, expert)
    transpose: bool = False


def architecture_of(config: ModelConfig) -> Architecture:
    """What a model is written as: dense models as OLMo 2, those with several experts as
    FlexOlmo."""
    return "olmo2" if config.n_experts == 1 else "flex_olmo"


def key_table(config: ModelConfig, architecture: Architecture | None = None) -> list[Entry]:
    """Every tensor of this model's Hugging Face checkpoint. Raises UserError for OLMo 2 with
    several experts: it is dense."""
    architecture = architecture or architecture_of(config)
    if architecture == "olmo2" and config.n_experts > 1:
        raise UserError(
            f"olmo2 is a dense model; got {config.n_experts} experts; write it as flex_olmo"
        )
    V, D, F, E = config.vocab_size, config.d_model, config.d_ffn, config.n_experts
    q_size, kv_size = config.n_heads * config.d_head, config.n_kv_heads * config.d_head
    layers = ("trunk", "layers")
    projections = {"q": (q_size, D), "k": (kv_size, D), "v": (kv_size, D), "o": (D, q_size)}
    ffn = {"gate": (F, D), "up": (F, D), "down": (D, F)}
    table = [Entry("model.embed_tokens.weight", (V, D), ("trunk", "embedding"))]
    for l in range(config.n_layers):
        hf = f"model.layers.{l}"
        for name, shape in projections.items():
            table.append(
                Entry(
                    f"{hf}.self_attn.{name}_proj.weight",
                    shape,
                    (*layers, "attention", name, "kernel"),
                    (l,),
                    True,
                )
            )
        table.append(
            Entry(
                f"{hf}.self_attn.q_norm.weight",
                (q_size,),
                (*layers, "attention", "q_norm", "scale"),
                (l,),
            )
        )
        table.append(
            Entry(
                f"{hf}.self_attn.k_norm.weight",
                (kv_size,),
                (*layers, "attention", "k_norm", "scale"),
                (l,),
            )
        )
        table.append(
            Entry(
                f"{hf}.post_attention_layernorm.weight",
                (D,),
                (*layers, "attention_norm", "scale"),
                (l,),
            )
        )
        table.append(
            Entry(
                f"{hf}.post_feedforward_layernorm.weight",
                (D,),
                (*layers, "ffn_norm", "scale"),
                (l,),
            )
        )
        if architecture == "flex_olmo":
            table.append(Entry(f"{hf}.mlp.gate.weight", (E, D), ("experts", "row"), (l,)))
        for e in range(E):
            mlp = f"{hf}.mlp.experts.{e}" if architecture == "flex_olmo" else f"{hf}.mlp"
            for name, shape in ffn.items():
                table.append(
                    Entry(f"{mlp}.{name}_proj.weight", shape, ("experts", name), (l, e), True)
                )
    table.append(Entry("model.norm.weight", (D,), ("trunk", "norm", "scale")))
    table.append(Entry("lm_head.weight", (V, D), ("trunk", "head", "kernel"), (), True))
    return table


def hf_config(
    config: ModelConfig,
    architecture: Architecture | None = None,
    *,
    dtype: str = "float32",
    eos_token_id: int | None = None,
    pad_token_id: int | None = None,
) -> dict[str, Any]:
    """The contents of `config.json`. Token ids are written even where None: transformers' defaults
    are AllenAI's tokenizer's."""
    architecture = architecture or architecture_of(config)
    if config.vocab_size <= 0:
        raise UserError(
            "model.vocab_size is not set; expected the size that the weights have; use the config"
            " saved beside them"
        )
    tree: dict[str, Any] = {
        "architectures": [CLASSES[architecture]],
        "model_type": architecture,
        "dtype": dtype,
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ffn,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        # Both spellings: transformers 5 reads rope_parameters, 4 reads rope_theta.
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "rope_theta": config.rope_theta,
        "initializer_range": config.init_std,
        "hidden_act": FIXED["hidden_act"],
        "attention_bias": FIXED["attention_bias"],
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": eos_token_id,
        "pad_token_id": pad_token_id,
        "use_cache": True,
    }
    if architecture == "flex_olmo":
        tree |= {
            "num_experts": config.n_experts,
            "num_experts_per_tok": config.n_active,
            "norm_topk_prob": FIXED["norm_topk_prob"],
            "output_router_logits": False,
        }
    return tree


def model_config(hf_config: Mapping[str, Any]) -> ModelConfig:
    """Our config from the contents of a `config.json`. Raises UserError, naming the key, for what
    our model does not compute.

    FlexOlmo has no router bias, so the result has none either.
    """
    kind = hf_config.get("model_type")
    if not isinstance(kind, str) or kind not in CLASSES:
        raise UserError(
            f"model_type is {kind!r:.80}; expected one of {', '.join(CLASSES)}; other architectures"
            " cannot be imported"
        )
    for key, value in FIXED.items():
        if hf_config.get(key, value) != value:
            raise UserError(
                f"{key} is {hf_config[key]!r:.80}; expected {value!r}; a model with another value"
                " cannot be imported"
            )
    schema = FlexOlmoFields if kind == "flex_olmo" else Olmo2Fields
    fields = {
        field.name: hf_config[field.name]
        for field in dataclasses.fields(schema)
        if field.name in hf_config
    }
    try:
        conform(schema, fields)
    except ValueError as error:
        raise UserError(f"{error}, in config.json; such a model cannot be imported") from None
    experts = fields.get("num_experts", 1)
    if (blocks := fields["num_hidden_layers"] * experts) > BLOCKS:
        raise UserError(
            f"num_hidden_layers x num_experts is {blocks}; expected at most {BLOCKS}; such a model"
            " cannot be imported"
        )
    theta = (fields.get("rope_parameters") or {}).get("rope_theta") or fields.get("rope_theta")
    if theta is None:
        raise UserError(
            "rope_theta is missing from config.json; expected it in every OLMo 2 or FlexOlmo"
            " config; add it"
        )
    config = ModelConfig(
        vocab_size=fields["vocab_size"],
        d_model=fields["hidden_size"],
        n_layers=fields["num_hidden_layers"],
        n_heads=fields["num_attention_heads"],
        n_kv_heads=fields.get("num_key_value_heads") or fields["num_attention_heads"],
        d_ffn=fields["intermediate_size"],
        n_experts=experts,
        n_active=fields.get("num_experts_per_tok", 1),
        router_bias=kind != "flex_olmo",
        rope_theta=float(theta),
        norm_eps=float(fields["rms_norm_eps"]),
        init_std=float(fields.get("initializer_range") or ModelConfig.init_std),
        max_seq_len=fields["max_position_embeddings"],
    )
    config.check()
    head_size = fields.get("head_dim")
    if head_size is not None and head_size != config.d_head:
        raise UserError(
            f"head_dim is {head_size!r}; expected {config.d_head} (hidden_size /"
            " num_attention_heads); it cannot be imported"
        )
    return config


def to_hf(
    config: ModelConfig,
    params: Params,
    architecture: Architecture | None = None,
    *,
    drop_bias: bool = False,
) -> dict[str, np.ndarray]:
    """The tensors of the Hugging Face checkpoint, by name, contiguous and of the parameters'
    dtypes.

    Raises UserError for a pair, and for a router bias that matters (one below 0 of an expert other
    than the anchor's) unless it is to be dropped: the format has no place for it, so the exported
    model would route otherwise.
    """
    if "expert" in params:
        raise UserError(
            "got a pair, whose new expert is stored apart; expected an anchor or a merged model;"
            " merge it first"
        )
    check_bias(params["experts"].get("bias", np.zeros((1, 1))), drop_bias)
    # one copy from the device a leaf
    leaf = functools.lru_cache(None)(lambda path: np.asarray(_at(params, path)))
    tensors = {}
    for entry in key_table(config, architecture):
        value = leaf(entry.path)[entry.index]
        value = np.ascontiguousarray(value.T if entry.transpose else value)
        if value.shape != entry.shape:
            raise UserError(
                f"{'/'.join(entry.path)} gives {entry.name} shape {value.shape}; expected"
                f" {entry.shape} by the config"
            )
        tensors[entry.name] = value
    return tensors


def from_hf(config: ModelConfig, tensors: Mapping[str, np.ndarray]) -> Params:
    """Parameters from the tensors of an OLMo 2 or FlexOlmo checkpoint (told apart by the router),
    in the tensors' dtypes.

    What the checkpoint lacks is zero: the router row of OLMo 2 and, where the config has them,
    biases. Raises UserError naming tensors that are missing, unexpected or of another shape than
    the config's.
    """
    architecture = (
        "flex_olmo"
        if config.n_experts > 1 or "model.layers.0.mlp.gate.weight" in tensors
        else "olmo2"
    )
    table = key_table(config, architecture)
    _check_tensors(table, tensors)
    stacks: dict[tuple[str, ...], list[np.ndarray]] = {}
    for entry in table:  # layers and, within them, experts come in order
        stacks.setdefault(entry.path, []).append(
            tensors[entry.name].T if entry.transpose else tensors[entry.name]
        )
    dtype = stacks["experts", "gate"][0].dtype

    def fill(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        parts = stacks.get(tuple(key.key for key in path))
        return (
            jnp.zeros(leaf.shape, dtype)
            if parts is None
            else jnp.asarray(np.stack(parts).reshape(leaf.shape))
        )

    return jax.tree_util.tree_map_with_path(
        fill, jax.eval_shape(functools.partial(init_params, config), jax.random.key(0))
    )


def check_bias(bias: np.ndarray, drop: bool) -> None:
    """Raises UserError for router biases [L, E] that matter, unless they are to be dropped."""
    lowest = float(np.min(np.asarray(bias, np.float32)[:, 1:], initial=0))
    if lowest < 0 and not drop:
        raise UserError(
            f"router biases (down to {lowest:.3g}) have no place in Hugging Face's format;"
            " --drop-bias leaves them out"
        )


def transposed(matrix: np.ndarray) -> np.ndarray:
    """Contiguous; in blocks that stay in the cache, several times as fast as NumPy's own copy."""
    rows, columns = matrix.shape
    result = np.empty((columns, rows), matrix.dtype)
    for i in range(0, rows, TILE):
        for j in range(0, columns, TILE):
            result[j : j + TILE, i : i + TILE] = matrix[i : i + TILE, j : j + TILE].T
    return result


def _check_tensors(table: Sequence[Entry], tensors: Mapping[str, np.ndarray]) -> None:
    expected = {entry.name: entry.shape for entry in table}
    missing = [name for name in expected if name not in tensors]
    extra = [name for name in tensors if name not in expected]
    if missing:
        raise UserError(
            f"missing tensors: {some(missing)}; expected all that config.json describes; {TOGETHER}"
        )
    if extra:
        raise UserError(
            f"unexpected tensors: {some(extra)}; expected only those that config.json describes;"
            f" {TOGETHER}"
        )
    for name, shape in expected.items():
        if tuple(tensors[name].shape) != shape:
            got = tuple(tensors[name].shape)
            raise UserError(f"{name} has shape {got}; expected {shape} by config.json; {TOGETHER}")


def some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _at(params: Params, path: Sequence[str]) -> Any:
    return functools.reduce(lambda branch, key: branch[key], path, params)
