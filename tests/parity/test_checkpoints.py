"""Checkpoints that transformers wrote, and what it makes of ours: keys, files, greedy tokens. The
numbers are in test_huggingface.py."""

import dataclasses
import json

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from flexolmo_jax.config import PRESETS, ModelConfig
from flexolmo_jax.convert.exporting import export_hf
from flexolmo_jax.convert.hub_config import hf_config, model_config
from flexolmo_jax.convert.huggingface import key_table, to_hf
from flexolmo_jax.convert.importing import import_hf
from flexolmo_jax.loaded import load
from flexolmo_jax.model import init_params
from tests.tiny import documents

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.parity

OLMO2_7B = ModelConfig(**PRESETS["7b"])
SIZES = {
    "OLMo-2-7B": OLMO2_7B,
    "OLMo-2-1B": ModelConfig(**PRESETS["1b"]),
    "FlexOlmo-7x7B": dataclasses.replace(OLMO2_7B, n_experts=7, n_active=5, router_bias=False),
}


@pytest.mark.parametrize("name", SIZES)
def test_the_key_table_is_that_of_transformers_own_model(name):
    """At real sizes, without weights: no key missing, none left, every shape the same."""
    fields = hf_config(SIZES[name])
    ours = {entry.name: entry.shape for entry in key_table(SIZES[name])}
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(**fields)
        )
    theirs = {}
    for key, tensor in model.state_dict().items():
        at, _, kind = key.rpartition(".")
        shape = tuple(tensor.shape)
        if kind == "gate_up_proj":  # stacked in memory, one matrix an expert on disk
            half = (shape[1] // 2, shape[2])
            theirs |= {
                f"{at}.{e}.{part}_proj.weight": half
                for e in range(shape[0])
                for part in ("gate", "up")
            }
        elif kind == "down_proj":
            theirs |= {f"{at}.{e}.down_proj.weight": shape[1:] for e in range(shape[0])}
        else:
            theirs[key] = shape
    assert ours == theirs
    assert sum(int(np.prod(shape)) for shape in ours.values()) == model.num_parameters()
    assert (
        dataclasses.replace(
            model_config(model.config.to_dict()), router_bias=SIZES[name].router_bias
        )
        == SIZES[name]
    )


@pytest.mark.parametrize("kind", ["anchor", "merged"])
def test_what_transformers_saves_of_our_export_imports_bitwise(kind, anchor, model, tmp_path):
    """As it saves by default, one matrix an expert, and with `save_original_format=False`, all
    experts of a layer in one."""
    export_hf(
        {"anchor": anchor, "merged": model}[kind],
        tmp_path / "ours",
        drop_bias=True,
        max_shard_size=40_000,
    )
    ours = import_hf(tmp_path / "ours", tmp_path / "model")
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not any(
        report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
    ), report
    assert theirs.generation_config.eos_token_id == ours.tokenizer.eos_id
    for fused in (False, True):
        saved = tmp_path / f"theirs-{fused}"
        theirs.save_pretrained(saved, save_original_format=not fused, max_shard_size="50KB")
        (saved / "tokenizer.json").write_bytes((tmp_path / "ours/tokenizer.json").read_bytes())
        names = json.loads((saved / "model.safetensors.index.json").read_text())["weight_map"]
        assert any("gate_up_proj" in name for name in names) == (fused and kind == "merged")
        back = import_hf(saved, tmp_path / f"back-{fused}")
        assert (
            back.description["tensors"] == ours.description["tensors"]
            and back.config == ours.config
        )
        for path, array in back.arrays().items():
            assert np.array_equal(np.asarray(array[:]), np.asarray(ours.arrays()[path][:])), path


@pytest.mark.parametrize("kind", ["anchor", "merged"])
def test_transformers_generates_the_same_greedy_tokens(kind, anchor, model, tmp_path):
    """Of the export, and we of the re-import; prompts in one batch here, one by one there.
    Activations are float32 on both sides."""
    export_hf(
        {"anchor": anchor, "merged": model}[kind], tmp_path / "hf", drop_bias=True, dtype="float32"
    )
    ours = load(import_hf(tmp_path / "hf", tmp_path / "model").path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", experts_implementation="eager"
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    prompts = [
        text[:15]
        for domain in ("public", "code", "law", "care")
        for text in documents(domain, 2, seed=9)
    ]
    new, asked, expected = 40, [], []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        assert ids[0].tolist() == ours.tokenizer.encode(prompt)
        with torch.no_grad():
            continued = theirs.generate(ids, max_new_tokens=new, do_sample=False)[
                0, ids.shape[1] :
            ].tolist()
        logits = np.asarray(ours.logits(np.array([ids[0].tolist() + continued])))[
            0, ids.shape[1] - 1 : -1
        ]
        best, second = -np.sort(-logits, axis=-1)[:, :2].T
        assert (best - second).min() > 1e-4, (
            "take another prompt: the choice here is a matter of rounding"
        )
        asked.append(ids[0].tolist())
        expected.append(
            continued[: continued.index(ours.tokenizer.eos_id)]
            if ours.tokenizer.eos_id in continued
            else continued
        )
    assert ours.generate(asked, max_new_tokens=new) == expected


@pytest.mark.parametrize(("width", "has_advice"), [(24, False), (20, True)])
def test_an_export_says_where_transformers_own_product_of_groups_fails(
    width, has_advice, tmp_path, tiny_tokenizer, capsys
):
    config = ModelConfig(
        vocab_size=384,
        d_model=32,
        n_layers=1,
        n_heads=2,
        n_kv_heads=2,
        d_ffn=width,
        n_experts=2,
        n_active=1,
        router_bias=False,
    )
    source = tmp_path / "hf"
    source.mkdir()
    params = init_params(config, jax.random.key(0))
    params = jax.tree.map(lambda a: np.asarray(a, ml_dtypes.bfloat16), params)
    save_file(to_hf(config, params), source / "model.safetensors", {"format": "pt"})
    (source / "config.json").write_text(json.dumps(hf_config(config, dtype="bfloat16")))
    tiny_tokenizer.save(source)
    export_hf(import_hf(source, tmp_path / "model").path, tmp_path / "out")
    advice = 'load this model with experts_implementation="eager"'
    assert (advice in capsys.readouterr().err) == has_advice
    assert (advice in (tmp_path / "out" / "README.md").read_text()) == has_advice
    read = transformers.AutoModelForCausalLM.from_pretrained
    ids = torch.as_tensor([[1, 2, 3]])
    read(tmp_path / "out", experts_implementation="eager")(ids)
    default = read(tmp_path / "out", experts_implementation="grouped_mm")
    if not has_advice:
        default(ids)
    else:
        with pytest.raises(RuntimeError):
            default(ids)
