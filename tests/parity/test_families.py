"""Every family of models that can be imported, against transformers on torch with the same random
weights, in float32."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexolmo_jax.config import ModelConfig, RopeScaling
from flexolmo_jax.convert.families import FAMILIES, family_of
from flexolmo_jax.convert.hub_config import hf_config, model_config
from flexolmo_jax.convert.huggingface import from_hf, to_hf
from flexolmo_jax.generate import Decoder, Generator
from flexolmo_jax.model import forward, init_params

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.numpy")

pytestmark = pytest.mark.parity
torch.set_num_threads(1)  # the products are too small for more

# Odd sizes, so that nothing is right because two of them are equal.
SHAPE = ModelConfig(
    vocab_size=131,
    d_model=60,
    n_layers=5,
    n_heads=6,
    n_kv_heads=2,
    d_ffn=37,
    norm_eps=1e-5,
    rope_theta=1e4,
    router_bias=False,
)
LLAMA3 = RopeScaling("llama3", factor=8.0, first_seq_len=64)
YARN = RopeScaling("yarn", factor=4.0, first_seq_len=64)
LINEAR = RopeScaling("linear", factor=4.0, first_seq_len=SHAPE.max_seq_len)
OF = {name: {"renormalise": False} | family.keys for name, family in FAMILIES.items()}
DENSE = {
    "olmo3": OF["olmo3"] | dict(window=19, full_every=4, rope_scaling=YARN, window_rope_theta=5e4),
    "olmo3 without scaling": OF["olmo3"] | dict(window=19, full_every=4),
    "olmo2 whose head is the embedding": OF["olmo2"] | dict(tied_head=True, d_head=14),
    "llama": OF["llama"] | dict(rope_scaling=LLAMA3),
    "llama tied": OF["llama"] | dict(tied_head=True, n_kv_heads=6, rope_scaling=LINEAR),
    "llama yarn": OF["llama"] | dict(rope_scaling=dataclasses.replace(YARN, attention_factor=1.3)),
    "mistral": OF["mistral"] | dict(window=19, d_head=14),
    "qwen2": OF["qwen2"] | dict(tied_head=True),
    "qwen2 with windows": OF["qwen2"] | dict(window=19),
    "olmo3 with windows alone": OF["olmo3"] | dict(window=19),
    "qwen3 with windows": OF["qwen3"] | dict(window=19, rope_scaling=YARN),
    "qwen3": OF["qwen3"] | dict(d_head=22, rope_scaling=YARN),
}
EXPERTS = dict(n_experts=4, n_active=2)
MIXTURES = {
    "flex_olmo": OF["flex_olmo"] | EXPERTS,
    "mixtral": OF["mixtral"] | EXPERTS | dict(window=19),
    "mixtral of all": OF["mixtral"] | EXPERTS | dict(n_active=4, renormalise=False, d_head=14),
    "qwen3_moe": OF["qwen3_moe"] | EXPERTS | dict(d_head=22),
    "qwen3_moe not renormalised": OF["qwen3_moe"] | EXPERTS | dict(renormalise=False),
    "olmoe": OF["olmoe"] | EXPERTS,
}
CASES = [
    pytest.param(dataclasses.replace(SHAPE, **keys), id=name)
    for name, keys in (DENSE | MIXTURES).items()
]


def random_params(config: ModelConfig):
    """Weights large enough for logits of order 1; norms and biases as training leaves them."""
    params = init_params(config, jax.random.key(1))
    leaves, tree = jax.tree.flatten_with_path(params)
    keys = jax.random.split(jax.random.key(2), len(leaves))

    def spread(path, leaf, key):
        noise = jax.random.normal(key, leaf.shape)
        kind = path[-1].key
        return 1 + 0.2 * noise if kind == "scale" else noise * (0.5 if kind == "row" else 0.15)

    return tree.unflatten(
        [spread(path, leaf, key) for (path, leaf), key in zip(leaves, keys, strict=True)]
    )


def torch_model(config: ModelConfig, params, folder):
    tensors = to_hf(config, params)
    safetensors.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(hf_config(config)))
    # Experts run one by one: the grouped kernel refuses odd sizes.
    options = {"experts_implementation": "eager"} if config.n_experts > 1 else {}
    load = transformers.AutoModelForCausalLM.from_pretrained
    model, report = load(folder, dtype=torch.float32, output_loading_info=True, **options)
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
    assert not any(report[kind] for kind in kinds), report
    return model.eval()


@pytest.mark.parametrize("config", CASES)
def test_logits_and_what_is_written_equal_those_of_transformers(config, tmp_path):
    params = random_params(config)
    model = torch_model(config, params, tmp_path)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 257))
    with torch.no_grad():
        theirs = model(torch.as_tensor(tokens)).logits.numpy()
    with jax.default_matmul_precision("highest"):
        ours = np.asarray(forward(config, params, jnp.asarray(tokens)).logits)
    error = np.abs(ours - theirs).max(axis=-1) / theirs.std()
    # a token whose last chosen and first unchosen expert are close may be routed either way
    assert (error < 2e-4).mean() > (0.97 if config.n_active < config.n_experts else 0.9999)
    assert 0.3 < theirs.std() < 30, "the tolerance is for logits of order 1"


@pytest.mark.slow
@pytest.mark.parametrize("config", CASES)
def test_gradients_equal_those_of_transformers(config, tmp_path):
    config = dataclasses.replace(config, n_active=config.n_experts)  # no choice is close
    params = random_params(config)
    model = torch_model(config, params, tmp_path)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 67))
    model(torch.as_tensor(tokens), labels=torch.as_tensor(tokens)).loss.backward()
    theirs = {name: p.grad.numpy() for name, p in model.named_parameters()}

    def loss(params):
        logits = forward(config, params, jnp.asarray(tokens)).logits
        targets = jnp.asarray(tokens)[:, 1:, None]
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), targets, axis=-1))

    with jax.default_matmul_precision("highest"):
        gradients = jax.grad(loss)(params)
    ours = fused(config, to_hf(config, gradients, family_of(config)))
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        error = np.linalg.norm(ours[name] - gradient)
        assert error < 2e-4 * np.linalg.norm(gradient) + 1e-9, name


def fused(config: ModelConfig, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """With the experts of a layer in one tensor, as transformers has them in memory."""
    if config.n_experts == 1:
        return tensors
    gathered: dict[str, list[np.ndarray]] = {}
    for name, tensor in tensors.items():
        where, _, rest = name.partition(".experts.")
        where = where.replace("block_sparse_moe", "mlp")
        if not rest:
            gathered[where] = [tensor]
            continue
        kind = rest.split(".")[1]
        if kind in ("gate_proj", "w1"):
            up = {"gate_proj": "up_proj", "w1": "w3"}[kind]
            tensor = np.concatenate([tensor, tensors[name.replace(kind, up)]])
            gathered.setdefault(f"{where}.experts.gate_up_proj", []).append(tensor)
        elif kind in ("down_proj", "w2"):
            gathered.setdefault(f"{where}.experts.down_proj", []).append(tensor)
    return {
        name: np.stack(parts) if ".experts." in name else parts[0]
        for name, parts in gathered.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("config", CASES)
def test_greedy_tokens_equal_those_of_transformers(config, tmp_path):
    config = dataclasses.replace(config, n_active=config.n_experts)
    params = random_params(config)
    model = torch_model(config, params, tmp_path)
    prompts = np.random.default_rng(3).integers(0, config.vocab_size, (2, 23))
    with torch.no_grad():
        ids = torch.as_tensor(prompts)
        how = {"max_new_tokens": 64, "do_sample": False, "attention_mask": torch.ones_like(ids)}
        theirs = model.generate(ids, **how).numpy()[:, 23:]
    with jax.default_matmul_precision("highest"):
        generator = Generator(Decoder(config, params, config.vocab_size, -1))
        ours = generator.generate(
            prompts.tolist(), 64, (config.n_experts, np.ones(config.n_experts, bool))
        )
    assert np.array_equal(ours, theirs)


@pytest.mark.parametrize("config", CASES)
def test_configs_and_weights_go_there_and_back(config):
    written = hf_config(config)
    back = model_config(written)
    assert hf_config(back, written["model_type"]) == written
    params = random_params(config)
    tensors = to_hf(config, params)
    again = to_hf(back, from_hf(back, tensors))
    assert all(np.array_equal(tensors[name], again[name]) for name in tensors)
    assert family_of(back) == written["model_type"]
