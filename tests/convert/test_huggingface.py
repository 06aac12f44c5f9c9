"""The key table of Hugging Face checkpoints: both ways, and what it refuses. Parity of the numbers
is tested in tests/parity."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexolmo_jax.config import ModelConfig, to_dict
from flexolmo_jax.convert.hub_config import hf_config, model_config
from flexolmo_jax.convert.huggingface import from_hf, key_table, to_hf
from flexolmo_jax.errors import UserError
from flexolmo_jax.model import init_params

DENSE = ModelConfig(vocab_size=32, d_model=12, n_layers=2, n_heads=3, n_kv_heads=1, d_ffn=10)
MERGED = dataclasses.replace(DENSE, n_experts=3, n_active=2, router_bias=False)


@pytest.fixture(scope="module")
def merged():
    return init_params(MERGED, jax.random.key(0))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_export_then_import_is_bitwise(merged, dtype):
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), merged)
    tensors = to_hf(MERGED, params)
    assert list(tensors) == [entry.name for entry in key_table(MERGED)]
    assert all(tensor.dtype == dtype and tensor.flags.c_contiguous for tensor in tensors.values())
    imported = from_hf(MERGED, tensors)
    assert jax.tree.structure(imported) == jax.tree.structure(params)
    assert all(
        jax.tree.leaves(
            jax.tree.map(lambda a, b: a.dtype == b.dtype and np.array_equal(a, b), imported, params)
        )
    )


def test_a_table_covers_every_element_of_every_leaf_once(merged):
    leaves = jax.tree.map(lambda leaf: np.zeros(leaf.shape, int), merged)
    for entry in key_table(MERGED):
        leaf = leaves
        for key in entry.path:
            leaf = leaf[key]
        assert leaf[entry.index].shape == (entry.shape[::-1] if entry.transpose else entry.shape), (
            entry
        )
        leaf[entry.index] += 1
    assert all((leaf == 1).all() for leaf in jax.tree.leaves(leaves))


def test_a_dense_model_has_the_names_of_olmo2_and_gets_a_row_of_zeros_back():
    params = init_params(DENSE, jax.random.key(0))
    tensors = to_hf(DENSE, params)
    assert "model.layers.1.mlp.down_proj.weight" in tensors
    assert not any("gate.weight" in name for name in tensors)
    imported = from_hf(DENSE, tensors)
    assert not imported["experts"].pop("row").any()
    params["experts"].pop("row")
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, imported, params)))


def test_flex_olmo_with_one_expert_keeps_its_router_row():
    params = init_params(DENSE, jax.random.key(0))
    imported = from_hf(DENSE, to_hf(DENSE, params, "flex_olmo"), "flex_olmo")
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, imported, params)))
    with pytest.raises(UserError, match="dense"):
        to_hf(MERGED, params, "olmo2")


def test_a_bias_that_matters_is_refused_unless_dropped(merged):
    config = dataclasses.replace(MERGED, router_bias=True)

    def with_bias(*bias):
        return merged | {
            "experts": (
                merged["experts"] | {"bias": jnp.tile(jnp.asarray(bias, jnp.float32), (2, 1))}
            )
        }

    with pytest.raises(UserError, match="biases"):
        to_hf(config, with_bias(0, 0, -0.1))
    without = to_hf(config, with_bias(0, 0, -0.1), drop_bias=True)
    # the anchor's is ignored, and min(b, 0) of a positive one is 0
    harmless = to_hf(config, with_bias(-1, 0, 0.5))
    assert without.keys() == harmless.keys() == to_hf(MERGED, merged).keys()
    assert not from_hf(config, without)["experts"]["bias"].any()


def test_a_pair_is_refused():
    with pytest.raises(UserError, match="pair"):
        to_hf(DENSE, init_params(DENSE, jax.random.key(0), pair=True))


def test_tensors_that_are_missing_unexpected_or_misshaped_are_named(merged):
    tensors = to_hf(MERGED, merged)
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    with pytest.raises(UserError, match=f"missing.*{name}"):
        from_hf(MERGED, {key: value for key, value in tensors.items() if key != name})
    with pytest.raises(UserError, match=r"unexpected.*model\.layers\.0\.bias"):
        from_hf(MERGED, tensors | {"model.layers.0.bias": np.zeros(3)})
    with pytest.raises(UserError, match=rf"{name} has shape \(12, 10\); expected \(10, 12\)"):
        from_hf(MERGED, tensors | {name: tensors[name].T})


@pytest.mark.parametrize(
    "config",
    [DENSE, MERGED, dataclasses.replace(MERGED, rope_theta=1e4, norm_eps=1e-5, init_std=0.1)],
)
def test_a_config_survives_the_way_there_and_back(config):
    assert model_config(hf_config(config)) == config


def test_a_config_of_transformers_4_is_read():
    values = hf_config(DENSE)
    del values["rope_parameters"], values["num_key_value_heads"]
    values |= {"rope_theta": 1e4, "rope_scaling": None, "torch_dtype": "bfloat16"}
    assert model_config(values) == dataclasses.replace(
        DENSE, rope_theta=1e4, n_kv_heads=DENSE.n_heads
    )


def test_a_scaling_in_whole_numbers_is_read_as_floats():
    rope = {"rope_type": "yarn", "rope_theta": 10000, "factor": 4, "beta_fast": 32}
    read = model_config(hf_config(DENSE) | {"rope_parameters": rope})
    scaling = to_dict(read)["rope_scaling"]
    assert json.dumps(scaling["factor"]) == "4.0" and json.dumps(scaling["beta_fast"]) == "32.0"
    assert scaling["first_seq_len"] == DENSE.max_seq_len


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_type", "deepseek_v3"),
        ("hidden_act", "gelu"),
        ("attention_bias", True),
        ("sliding_window", 128),
        ("rope_parameters", {"rope_type": "dynamic", "rope_theta": 5e5, "factor": 2.0}),
        ("rope_parameters", {"rope_type": "llama3", "rope_theta": 5e5, "factor": 2.0}),
        (
            "rope_parameters",
            {"rope_type": "default", "rope_theta": 5e5, "partial_rotary_factor": 0.5},
        ),
        ("head_dim", "13"),
        ("num_experts", None),
        ("hidden_size", "12"),
        ("rms_norm_eps", None),
    ],
)
def test_a_config_that_our_model_does_not_compute_is_refused_by_name(key, value):
    with pytest.raises(UserError, match=key):
        model_config(hf_config(MERGED) | {key: value})


def test_an_unset_vocabulary_is_refused():
    with pytest.raises(UserError, match="vocab_size"):
        hf_config(dataclasses.replace(DENSE, vocab_size=0))
