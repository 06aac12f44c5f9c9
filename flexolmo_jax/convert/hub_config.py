"""`config.json` of Hugging Face's models: from ours, and to ours."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from flexolmo_jax.config import LARGEST, ModelConfig, RopeScaling
from flexolmo_jax.errors import UserError
from flexolmo_jax.storage.untrusted import conform

from .families import FAMILIES, Family, family_of

# FFNs of all layers and experts: a model's description has no room for the digests of more
BLOCKS = 1 << 15
WHOLE = 28  # Qwen's layers without a window, where config.json has no max_window_layers
TYPES = ("full_attention", "sliding_attention")
# What our model computes and has no setting for: the values of a key that say so, the usual one
# first. A key that is absent has it in transformers too. The last ones no class of these families
# reads; a publisher who sets them means another model.
FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "clip_qkv": (None,),
    "partial_rotary_factor": (None, 1),
    "decoder_sparse_step": (1,),
    "logit_scale": (None, 1),
    "logits_scaling": (None, 1),
    "embedding_multiplier": (None, 1),
    "residual_multiplier": (None, 1),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
}
Kind = Literal["default", "linear", "llama3", "yarn"]

Positive = Annotated[float, Field(gt=0, le=1e12)]
Length = Annotated[int, Field(ge=1, le=LARGEST["max_seq_len"])]


@dataclasses.dataclass(frozen=True)
class RopeParameters:
    """`rope_parameters` of transformers 5, `rope_scaling` of 4."""

    rope_type: Kind | None = None
    type: Kind | None = None  # an older name
    rope_theta: Positive | None = None
    factor: Positive | None = None
    original_max_position_embeddings: Length | None = None
    low_freq_factor: Positive | None = None
    high_freq_factor: Positive | None = None
    beta_fast: Positive | None = None
    beta_slow: Positive | None = None
    attention_factor: Positive | None = None
    truncate: Literal[True] | None = True
    partial_rotary_factor: Annotated[float, Field(ge=1, le=1)] | None = None
    finetuned: bool | None = None  # says nothing of what is computed


@dataclasses.dataclass(frozen=True)
class RopeByType:
    """`rope_parameters` of OLMo 3; of others, where they are the same for all layers."""

    full_attention: RopeParameters | None = None
    sliding_attention: RopeParameters | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fields:
    """What is read of a `config.json`, beside `model_type` and FIXED."""

    vocab_size: Annotated[int, Field(ge=1, le=2**24)]
    hidden_size: Annotated[int, Field(ge=1, le=LARGEST["d_model"])]
    num_hidden_layers: Annotated[int, Field(ge=1, le=LARGEST["n_layers"])]
    num_attention_heads: Annotated[int, Field(ge=1, le=LARGEST["n_heads"])]
    num_key_value_heads: Annotated[int, Field(ge=1, le=LARGEST["n_kv_heads"])] | None = None
    intermediate_size: Annotated[int, Field(ge=1, le=LARGEST["d_ffn"])]
    max_position_embeddings: Length
    rms_norm_eps: Positive
    initializer_range: Positive | None = None
    rope_theta: Positive | None = None  # of transformers 4
    rope_scaling: RopeParameters | None = None  # the same
    original_max_position_embeddings: Length | None = None  # goes before that of the scaling
    rope_parameters: RopeParameters | RopeByType | None = None
    head_dim: Annotated[int, Field(ge=1, le=2**12)] | None = None
    tie_word_embeddings: bool | None = None
    sliding_window: Length | None = None
    use_sliding_window: bool | None = None
    max_window_layers: Annotated[int, Field(ge=0, le=LARGEST["n_layers"])] | None = None
    layer_types: (
        Annotated[
            tuple[Literal["full_attention", "sliding_attention"], ...],
            Field(max_length=LARGEST["n_layers"]),
        ]
        | None
    ) = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixtureFields(Fields):
    num_experts: Annotated[int, Field(ge=1, le=LARGEST["n_experts"])]
    num_experts_per_tok: Annotated[int, Field(ge=1, le=LARGEST["n_active"])]
    norm_topk_prob: bool | None = None
    moe_intermediate_size: Annotated[int, Field(ge=1, le=LARGEST["d_ffn"])] | None = None
    mlp_only_layers: Annotated[tuple[int, ...], Field(max_length=0)] | None = None


def hf_config(
    config: ModelConfig,
    model_type: str | None = None,
    *,
    dtype: str = "float32",
    eos_token_id: int | None = None,
    pad_token_id: int | None = None,
) -> dict[str, Any]:
    """The contents of `config.json`."""
    model_type = model_type or family_of(config)
    family = FAMILIES[model_type]
    if config.vocab_size <= 0:
        raise UserError(
            "model.vocab_size is not set; expected the size that the weights have; use the config"
            " saved beside them"
        )
    tree: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": model_type,
        "dtype": dtype,
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ffn,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        "initializer_range": config.init_std,
        "hidden_act": FIXED["hidden_act"][0],
        "attention_bias": FIXED["attention_bias"][0],
        "attention_dropout": 0.0,
        "tie_word_embeddings": config.tied_head,
        # written even where None: transformers' defaults are those of AllenAI's tokenizer
        "bos_token_id": None,
        "eos_token_id": eos_token_id,
        "pad_token_id": pad_token_id,
        "use_cache": True,
    }
    if config.d_head or family.keys["norm"] == "pre":
        tree["head_dim"] = config.head_size
    return (
        tree
        | _written_rope(config, family)
        | _written_windows(config, family)
        | ({} if family.experts is None else _written_experts(config, family))
    )


def _written_rope(config: ModelConfig, family: Family) -> dict[str, Any]:
    """Both spellings: transformers 5 reads rope_parameters, 4 reads rope_theta and rope_scaling."""
    theta, scaling = config.rope_theta, config.rope_scaling
    plain = {"rope_type": "default", "rope_theta": theta}
    scaled = plain if scaling is None else _written_scaling(scaling) | {"rope_theta": theta}
    tree: dict[str, Any] = {"rope_parameters": scaled, "rope_theta": theta}
    if family.windows == "by type":
        near = plain | {"rope_theta": config.window_rope_theta or theta}
        tree["rope_parameters"] = {"full_attention": scaled, "sliding_attention": near}
    if scaling is not None:
        tree["rope_scaling"] = _written_scaling(scaling)
    return tree


def _written_scaling(scaling: RopeScaling) -> dict[str, Any]:
    tree: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind != "linear":
        tree["original_max_position_embeddings"] = scaling.first_seq_len
    if scaling.kind == "llama3":
        tree["low_freq_factor"] = scaling.low_frequency
        tree["high_freq_factor"] = scaling.high_frequency
    if scaling.kind == "yarn":
        tree |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
        if scaling.attention_factor:
            tree["attention_factor"] = scaling.attention_factor
    return tree


def _written_windows(config: ModelConfig, family: Family) -> dict[str, Any]:
    if family.windows == "none":
        return {}
    tree: dict[str, Any] = {"sliding_window": config.window or None}
    if family.windows == "if used":
        tree |= {"use_sliding_window": config.window > 0, "max_window_layers": 0}
    if family.windows != "all":
        tree["layer_types"] = [TYPES[config.has_window(l)] for l in range(config.n_layers)]
    return tree


def _written_experts(config: ModelConfig, family: Family) -> dict[str, Any]:
    tree = {
        "num_experts": config.n_experts,
        "num_experts_per_tok": config.n_active,
        "norm_topk_prob": config.renormalise,
        "output_router_logits": False,
    }
    if family.experts == "block_sparse_moe":
        tree["num_local_experts"] = tree.pop("num_experts")
        del tree["norm_topk_prob"]
    if family.architecture == "Qwen3MoeForCausalLM":
        tree |= {"moe_intermediate_size": config.d_ffn, "mlp_only_layers": []}
    return tree


def model_config(hf_config: Mapping[str, Any]) -> ModelConfig:
    """Our config from the contents of a `config.json`. A mixture's has no router bias.

    Raises UserError, naming the key, for what our model does not compute.
    """
    fields = _fields(hf_config)
    family = FAMILIES[hf_config["model_type"]]
    is_mixture = family.experts is not None
    keys = dict(family.keys)
    if is_mixture and family.has_topk_key:
        keys["renormalise"] = bool(fields.get("norm_topk_prob"))
    d_model, heads = fields["hidden_size"], fields["num_attention_heads"]
    head = fields.get("head_dim") or (128 if hf_config["model_type"] == "qwen3" else None)
    config = ModelConfig(
        vocab_size=fields["vocab_size"],
        d_model=d_model,
        n_layers=fields["num_hidden_layers"],
        n_heads=heads,
        n_kv_heads=fields.get("num_key_value_heads") or heads,
        d_ffn=fields.get("moe_intermediate_size") or fields["intermediate_size"],
        n_experts=fields.get("num_experts", 1),
        n_active=fields.get("num_experts_per_tok", 1),
        router_bias=not is_mixture,
        norm_eps=float(fields["rms_norm_eps"]),
        init_std=float(fields.get("initializer_range") or ModelConfig.init_std),
        max_seq_len=fields["max_position_embeddings"],
        d_head=0 if head is None or head * heads == d_model else head,
        tied_head=bool(fields.get("tie_word_embeddings")),
        **keys,
        **(windows := _windows(fields, family)),
        **_rope(fields, family, windows.get("full_every", 0) > 0),
    )
    config.check()
    return config


def _rope(fields: Mapping[str, Any], family: Family, has_both: bool) -> dict[str, Any]:
    """`has_both`: whether layers with a window and others are there."""
    rope, near = fields.get("rope_parameters") or {}, None
    of_types = [rope[kind] or {} for kind in TYPES if kind in rope]
    if family.windows == "by type":
        near = (rope.get("sliding_attention") or {}).get("rope_theta") or family.theta
        # A theta beside them is that of whole attention alone; so is a scaling.
        rope = (rope.get("full_attention") or {}) if of_types else rope
    elif any(of_type != of_types[0] for of_type in of_types):
        raise UserError(
            "rope_parameters are by type of layer; expected one for all; it cannot be imported"
        )
    elif of_types:
        rope = of_types[0]
    # transformers 4 and 5 read rope_scaling first
    rope = _named(rope) | _named(fields.get("rope_scaling") or {})
    if family.windows == "by type" and fields.get("sliding_window") and not has_both:
        rope = {"rope_theta": near}
    theta = rope.get("rope_theta") or fields.get("rope_theta") or family.theta
    if theta is None:
        raise UserError(
            "rope_theta is missing from config.json; expected it in every OLMo 2 or FlexOlmo"
            " config; add it"
        )
    found: dict[str, Any] = {"rope_theta": float(theta), "rope_scaling": _scaling(rope, fields)}
    if has_both and near not in (None, theta):
        found["window_rope_theta"] = float(near)
    if has_both and found["rope_scaling"] and family.windows != "by type":
        raise UserError(
            "rope_parameters scale layers with a window too; expected that only where all layers"
            " have one, or none; it cannot be imported"
        )
    return found


def _named(rope: Mapping[str, Any]) -> dict[str, Any]:
    """The same with its kind as `rope_type`, if it has one."""
    kind = rope.get("rope_type") or rope.get("type")
    return {key: rope[key] for key in rope if key != "type"} | ({"rope_type": kind} if kind else {})


def _scaling(rope: Mapping[str, Any], fields: Mapping[str, Any]) -> RopeScaling | None:
    kind = rope.get("rope_type") or "default"
    if kind == "default" or (kind == "linear" and rope.get("factor") == 1):
        return None
    needed = ["factor"]
    if kind == "llama3":
        needed += ["original_max_position_embeddings", "low_freq_factor", "high_freq_factor"]
    if missing := [key for key in needed if rope.get(key) is None]:
        raise UserError(
            f"rope_parameters lack {', '.join(missing)}, which {kind} needs; such a model cannot be"
            " imported"
        )
    ours = {
        "factor": "factor",
        "low_freq_factor": "low_frequency",
        "high_freq_factor": "high_frequency",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "attention_factor": "attention_factor",
    }
    key = "original_max_position_embeddings"
    first = fields.get(key) or rope.get(key) or fields["max_position_embeddings"]
    # A whole number in JSON is a float here: descriptions have one text for each value.
    said = {name: float(rope[key]) for key, name in ours.items() if rope.get(key) is not None}
    return RopeScaling(kind=kind, first_seq_len=first, **said)


def _windows(fields: Mapping[str, Any], family: Family) -> dict[str, Any]:
    window, types = fields.get("sliding_window"), fields.get("layer_types")
    if window is None or (family.windows == "none" and window >= fields["max_position_embeddings"]):
        return {}
    if family.windows == "none":
        raise UserError(
            f"sliding_window is {window}; expected None; a model with another value cannot be"
            " imported"
        )
    layers, every = fields["num_hidden_layers"], 0
    if family.windows == "by type":
        every = 4
    if types is not None:
        full = [l + 1 for l, kind in enumerate(types) if kind == "full_attention"]
        every = full[0] if full else 0
    elif family.windows == "if used":
        whole = fields.get("max_window_layers", 0 if family.experts else WHOLE)
        if 0 < whole < layers:
            raise UserError(
                f"max_window_layers is {whole}; expected 0, or all {layers}: windows in all layers"
                " or in none; it cannot be imported"
            )
        every = min(whole, 1)
    found = {"window": window, "full_every": every}
    pattern = ModelConfig(**found)
    if types is not None and [kind == "sliding_attention" for kind in types] != [
        pattern.has_window(l) for l in range(layers)
    ]:
        raise UserError(
            "layer_types follow no period; expected full_attention in each n-th layer, or in none;"
            " it cannot be imported"
        )
    return {} if family.windows == "if used" and every == 1 else found


def _fields(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a `config.json` that we read, checked: fixed values, types and bounds."""
    kind = hf_config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise UserError(
            f"model_type is {kind!r:.80}; expected one of {', '.join(FAMILIES)}; other"
            " architectures cannot be imported"
        )
    for key, values in FIXED.items():
        if (value := hf_config.get(key, values[0])) not in values:
            raise UserError(
                f"{key} is {value!r:.80}; expected {values[0]!r}; a model with another value cannot"
                " be imported"
            )
    family = FAMILIES[kind]
    if family.experts is None:
        schema: type[Fields] = Fields
    else:  # transformers knows the number by two names, in each of them
        count = hf_config.get("num_experts", hf_config.get("num_local_experts"))
        schema, hf_config = MixtureFields, {**hf_config, "num_experts": count}
    names = [field.name for field in dataclasses.fields(schema)]
    fields = {name: hf_config[name] for name in names if name in hf_config}
    for key in ("rope_parameters", "rope_scaling"):
        fields[key] = _without_nulls(fields.get(key))
    is_used = fields.get("use_sliding_window")
    if (family.windows == "if used" and not is_used) or (
        family.windows == "none" and is_used is False
    ):
        fields |= {"sliding_window": None, "max_window_layers": None}
    try:
        conform(schema, fields)
    except ValueError as error:
        raise UserError(f"{error}, in config.json; such a model cannot be imported") from None
    if (blocks := fields["num_hidden_layers"] * fields.get("num_experts", 1)) > BLOCKS:
        raise UserError(
            f"num_hidden_layers x num_experts is {blocks}; expected at most {BLOCKS}; such a model"
            " cannot be imported"
        )
    return fields


def _without_nulls(value: Any) -> Any:
    """A JSON value whose objects lack the keys that are null."""
    if not isinstance(value, dict):
        return value
    return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
