"""Keys of `config.json` that change nothing are harmless; those that do are refused by name and
value. Where transformers is there, it says which are which."""

import dataclasses

import numpy as np
import pytest

from flexolmo_jax.config import ModelConfig
from flexolmo_jax.convert.hub_config import hf_config, model_config
from flexolmo_jax.errors import UserError
from flexolmo_jax.model.rope import rope_of
from tests.families import as_family

DENSE = ModelConfig(
    vocab_size=32, d_model=12, n_layers=2, n_heads=3, n_kv_heads=1, d_ffn=10, max_seq_len=64
)
PLAIN = {
    "olmo2": DENSE,
    "llama": dataclasses.replace(as_family(DENSE, "llama"), rope_scaling=None),
    "qwen2": as_family(DENSE, "qwen2"),
    "qwen3": dataclasses.replace(as_family(DENSE, "qwen3"), d_head=0),
    "flex_olmo": dataclasses.replace(DENSE, n_experts=3, n_active=2, router_bias=False),
}
THETA = {"rope_theta": 5e5}
DEFAULT = {"rope_type": "default"} | THETA
LINEAR = {"rope_type": "linear", "factor": 2.0}
HARMLESS = [
    {"rope_scaling": {"rope_type": "default"}},
    {"rope_scaling": {"type": "default"}},
    {"rope_scaling": {"rope_type": "default", "type": None, "mscale": None}},
    {"rope_scaling": None},
    {"rope_scaling": {}},
    {"rope_scaling": {"rope_type": "linear", "factor": 1.0}},
    {"rope_scaling": {"type": "linear", "factor": 1}},
    {"rope_parameters": DEFAULT},
    {"rope_parameters": THETA},
    {"rope_parameters": THETA | {"type": "default"}},
    {"rope_parameters": DEFAULT | {"partial_rotary_factor": 1.0}},
    {"rope_parameters": THETA | {"rope_type": "linear", "factor": 1.0}},
    {"rope_parameters": {"full_attention": DEFAULT, "sliding_attention": DEFAULT}},
    {"rope_parameters": {"full_attention": DEFAULT, "sliding_attention": None}},
    {"rope_parameters": None, "rope_theta": 5e5},
    {"attention_dropout": 0},
    {"attention_dropout": 0.0},
    {"sliding_window": 8, "use_sliding_window": False, "max_window_layers": 1},
    {"sliding_window": 0, "use_sliding_window": False},
    {"sliding_window": None, "use_sliding_window": None},
    {"hidden_act": "swish"},
    {"pretraining_tp": 1},
    {"attention_bias": False, "mlp_bias": False},
    {"attention_bias": None, "mlp_bias": None},
    {"logit_scale": 1},
    {"logit_scale": None, "logits_scaling": 1.0, "residual_multiplier": 1},
    {"partial_rotary_factor": 1.0},
    {"partial_rotary_factor": None},
]
OTHERS = [
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling.type: .*got 'dynamic'"),
    ({"rope_scaling": LINEAR | {"mscale": 0.7}}, "rope_scaling.mscale: .*got 0.7"),
    ({"rope_parameters": DEFAULT | {"partial_rotary_factor": 0.5}}, "rotary_factor: .*got 0.5"),
    (
        {"rope_parameters": {"full_attention": DEFAULT, "sliding_attention": DEFAULT | LINEAR}},
        "rope_parameters are by type of layer",
    ),
    (
        {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1}
        | {"layer_types": None},
        "sliding_window is 8; expected None|max_window_layers is 1; expected 0",
    ),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ({"attention_bias": True}, "attention_bias is True"),
    ({"mlp_bias": True}, "mlp_bias is True"),
    ({"logit_scale": 0.0625}, "logit_scale is 0.0625; expected None"),
    ({"logits_scaling": 8.0}, "logits_scaling is 8.0"),
    ({"embedding_multiplier": 12.0}, "embedding_multiplier is 12.0"),
    ({"residual_multiplier": 0.2}, "residual_multiplier is 0.2"),
    ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
    ({"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    ({"clip_qkv": 8.0}, "clip_qkv is 8.0"),
]


@pytest.mark.parametrize("family", PLAIN)
@pytest.mark.parametrize("keys", HARMLESS, ids=str)
def test_keys_that_change_nothing_are_harmless(family, keys):
    plain = hf_config(PLAIN[family], family)
    assert model_config(plain | keys) == model_config(plain)


@pytest.mark.parametrize("family", PLAIN)
@pytest.mark.parametrize(("keys", "told"), OTHERS, ids=str)
def test_keys_that_change_the_model_are_refused_by_name_and_value(family, keys, told):
    with pytest.raises(UserError, match=told):
        model_config(hf_config(PLAIN[family], family) | keys)


@pytest.mark.parametrize(("layers", "window"), [(2, 0), (30, None)])
def test_windows_of_a_qwen_begin_behind_layer_28_where_it_does_not_say_where(layers, window):
    fields = hf_config(dataclasses.replace(PLAIN["qwen2"], n_layers=layers))
    fields |= {"sliding_window": 8, "use_sliding_window": True}
    del fields["max_window_layers"], fields["layer_types"]
    if window is None:
        with pytest.raises(UserError, match="max_window_layers is 28; expected 0, or all 30"):
            model_config(fields)
    else:
        assert model_config(fields).window == window


def test_a_window_as_wide_as_the_context_is_none_to_a_family_without_windows():
    fields = hf_config(PLAIN["llama"])
    assert model_config(fields | {"sliding_window": 64}) == PLAIN["llama"]
    with pytest.raises(UserError, match="sliding_window is 63"):
        model_config(fields | {"sliding_window": 63})


@pytest.mark.parity
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize(
    "keys",
    [
        # of layers' types it reads for other families only
        *(
            keys
            for keys in HARMLESS
            if ("rope" in str(keys) or "rotary" in str(keys)) and "_attention" not in str(keys)
        ),
        {"rope_scaling": LINEAR, "rope_parameters": DEFAULT},
        {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": None},
        {"rope_parameters": THETA | LINEAR},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "rope_parameters": DEFAULT},
    ],
    ids=str,
)
def test_positions_are_those_of_transformers_in_every_spelling(family, keys):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    fields = hf_config(PLAIN[family], family) | keys
    config = model_config(fields)
    theirs = transformers.AutoConfig.for_model(**fields)
    model = transformers.AutoModel.from_config(theirs)
    expected = np.asarray(model.rotary_emb.inv_freq)
    np.testing.assert_allclose(rope_of(config, False).frequencies, expected, rtol=1e-6)


@pytest.mark.parametrize("kind", ["flex_olmo", "olmoe", "mixtral", "qwen3_moe"])
@pytest.mark.parametrize("name", ["num_experts", "num_local_experts"])
def test_the_number_of_experts_has_either_of_transformers_names(kind, name):
    family = {"mixtral": "llama", "qwen3_moe": "qwen3"}.get(kind)
    dense = PLAIN[family] if family else dataclasses.replace(DENSE, router_bias=False)
    config = dataclasses.replace(dense, n_experts=3, n_active=2, router_bias=False)
    fields = hf_config(config) | {"model_type": kind}
    count = fields.pop("num_experts", None) or fields.pop("num_local_experts")
    assert model_config(fields | {name: count}).n_experts == 3
    with pytest.raises(UserError, match="num_experts"):
        model_config(fields)
