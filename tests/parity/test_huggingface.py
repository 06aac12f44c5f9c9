"""Our model against transformers on torch, with the same random weights, in float32.

Layer by layer first: each layer runs on the hidden states that transformers gave its own, so that a
failure names the layer and whether its attention, its router or its experts differ. Then logits,
loss and the gradient of every parameter.
"""

import dataclasses
import functools
import json
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flexolmo_jax.config import ModelConfig
from flexolmo_jax.convert.hub_config import hf_config, model_config
from flexolmo_jax.convert.huggingface import from_hf, to_hf
from flexolmo_jax.model import Params, forward, init_params
from flexolmo_jax.model.layers import PackedContext
from flexolmo_jax.model.moe import Choices, mixture
from flexolmo_jax.model.transformer import bind

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.numpy")

pytestmark = pytest.mark.parity

BATCH, LENGTHS = 2, (1, 257)
# of probabilities: a token whose last chosen and first unchosen expert are closer may be routed
# either way
MARGIN = 1e-5

# Odd sizes, so that nothing is right because two of them are equal.
SHAPE = ModelConfig(
    vocab_size=131,
    d_model=60,
    n_layers=3,
    n_heads=6,
    n_kv_heads=6,
    d_ffn=37,
    router_bias=False,
    norm_eps=1e-5,
    rope_theta=1e4,
)


def case(architecture: str, experts: int, active: int, kv_heads: int):
    config = dataclasses.replace(SHAPE, n_experts=experts, n_active=active, n_kv_heads=kv_heads)
    return pytest.param(
        architecture, config, id=f"{architecture}-{active}-of-{experts}-{kv_heads}-kv-heads"
    )


CASES = [
    case("olmo2", 1, 1, 6),
    case("olmo2", 1, 1, 2),
    *(
        case("flex_olmo", experts, active, 6 if active % 2 else 2)
        for experts in (1, 2, 4, 7)
        for active in range(1, experts + 1)
    ),
]


class Trace(NamedTuple):
    """What transformers computed; hidden states are stacked over layers."""

    logits: np.ndarray
    inputs: np.ndarray  # [L, B, T, D] of the layers
    middles: np.ndarray  # [L, B, T, D] after attention, where experts and router read
    outputs: np.ndarray  # [L, B, T, D]
    router_logits: np.ndarray | None  # [L, B, T, E]


@pytest.mark.parametrize(("architecture", "config"), CASES)
def test_every_layer_and_the_logits_equal_those_of_transformers(architecture, config):
    params = random_params(config)
    model = torch_model(config, params, architecture)
    for length in LENGTHS:
        tokens = random_tokens(config, length)
        theirs = traced(model, tokens)
        whole, middles, probabilities, outputs = ours(
            config, params, jnp.asarray(tokens), theirs.inputs, theirs.middles
        )
        # tokens for which, in the whole model too, every layer chose the same experts
        agree = np.ones(tokens.shape, bool)
        for l in range(config.n_layers):
            np.testing.assert_allclose(
                middles[l],
                theirs.middles[l],
                atol=2e-5,
                err_msg=f"attention of layer {l}, length {length}",
            )
            clear = np.ones(tokens.shape, bool)
            if theirs.router_logits is not None:
                expected, clear = top_k(theirs.router_logits[l], config.n_active)
                agree &= ((whole.router.probabilities[l] > 0) == (expected > 0)).all(axis=-1)
                message = f"router of layer {l}, length {length}"
                assert np.array_equal((probabilities[l] > 0)[clear], (expected > 0)[clear]), message
                np.testing.assert_allclose(
                    probabilities[l][clear], expected[clear], atol=1e-5, err_msg=message
                )
            message = f"experts of layer {l}, length {length}"
            np.testing.assert_allclose(
                outputs[l][clear], theirs.outputs[l][clear], atol=2e-5, err_msg=message
            )
        agree = np.logical_and.accumulate(agree, axis=1)  # later tokens attend to earlier ones
        assert agree.mean() > 0.5, "too few tokens are left to compare"
        assert 0.3 < theirs.logits.std() < 3, "the tolerance is for logits of order 1"
        np.testing.assert_allclose(whole.logits[agree], theirs.logits[agree], atol=2e-4, rtol=0)


@pytest.mark.parametrize(("architecture", "config"), [CASES[1], CASES[6], CASES[-3]])
def test_the_loss_equals_that_of_transformers(architecture, config):
    params, tokens = random_params(config), random_tokens(config, 257)
    labels = torch.as_tensor(tokens)
    with torch.no_grad():
        theirs = torch_model(config, params, architecture)(labels, labels=labels).loss.item()
    assert abs(float(loss(config, params, jnp.asarray(tokens))) - theirs) < 1e-5


def test_the_gradient_of_every_parameter_equals_that_of_transformers():
    config = dataclasses.replace(SHAPE, n_experts=4, n_active=2, n_kv_heads=2)
    params, tokens = random_params(config), random_tokens(config, 61)
    model = torch_model(config, params, "flex_olmo")
    labels = torch.as_tensor(tokens)
    model(labels, labels=labels).loss.backward()
    theirs = split_experts(
        {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}
    )
    gradients = to_hf(
        config,
        jax.jit(jax.grad(loss, argnums=1), static_argnums=0)(config, params, jnp.asarray(tokens)),
    )
    assert set(gradients) == set(theirs)
    for name, gradient in gradients.items():
        size = np.linalg.norm(theirs[name])
        assert size > 0, f"{name} has no gradient to compare"
        assert np.linalg.norm(gradient - theirs[name]) <= 1e-4 * size, name


def test_a_dense_model_written_as_flex_olmo_with_one_expert_is_the_same_model():
    params, tokens = random_params(SHAPE), random_tokens(SHAPE, 33)
    dense, sparse = (
        traced(torch_model(SHAPE, params, name), tokens).logits for name in ("olmo2", "flex_olmo")
    )
    np.testing.assert_allclose(dense, sparse, atol=1e-5)


@pytest.mark.parametrize(("architecture", "config"), [CASES[1], CASES[6]])
def test_transformers_loads_what_is_exported_and_what_it_saves_imports_bitwise(
    architecture, config, tmp_path
):
    params, tokens = random_params(config), random_tokens(config, 33)
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "config.json").write_text(json.dumps(hf_config(config, architecture)))
    safetensors.save_file(
        to_hf(config, params, architecture),
        tmp_path / "ours" / "model.safetensors",
        {"format": "pt"},
    )
    cls = getattr(transformers, hf_config(config, architecture)["architectures"][0])
    options = dict(experts_implementation="eager") if architecture == "flex_olmo" else {}
    model, report = cls.from_pretrained(tmp_path / "ours", output_loading_info=True, **options)
    assert not any(
        report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
    ), report
    np.testing.assert_allclose(
        traced(model.eval(), tokens).logits,
        forward(config, params, jnp.asarray(tokens)).logits,
        atol=2e-4,
    )

    model.save_pretrained(tmp_path / "theirs")
    saved = model_config(json.loads((tmp_path / "theirs" / "config.json").read_text()))
    assert dataclasses.replace(saved, router_bias=False) == config
    imported = from_hf(saved, safetensors.load_file(tmp_path / "theirs" / "model.safetensors"))
    # it has no router: our one row has no influence and comes back as 0
    if architecture == "olmo2":
        params = params | {
            "experts": params["experts"] | {"row": np.zeros_like(params["experts"]["row"])}
        }
    assert jax.tree.structure(imported) == jax.tree.structure(params)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, imported, params)))


@functools.lru_cache
def random_params(config: ModelConfig) -> Params:
    """Weights that keep hidden states, logits and router logits of order 1, so that tolerances and
    margins mean something."""
    generator = np.random.default_rng(config.n_experts)

    def draw(path, leaf):
        noise = generator.standard_normal(leaf.shape, np.float32)
        name = path[-1].key
        if name == "scale":
            return 1 + 0.3 * noise
        if name == "embedding":
            return noise
        fan_in = leaf.shape[-1] if name == "row" else leaf.shape[-2]
        return noise / np.sqrt(fan_in, dtype=np.float32)

    shapes = jax.eval_shape(functools.partial(init_params, config), jax.random.key(0))
    return jax.tree.map(jnp.asarray, jax.tree_util.tree_map_with_path(draw, shapes))


def random_tokens(config: ModelConfig, length: int) -> np.ndarray:
    return np.random.default_rng(length).integers(config.vocab_size, size=(BATCH, length))


def torch_model(config: ModelConfig, params: Params, architecture: str):
    """The transformers model with these weights. Its experts run one by one: the grouped kernel
    refuses odd sizes."""
    values = hf_config(config, architecture)
    options = dict(experts_implementation="eager") if architecture == "flex_olmo" else {}
    config_cls = (
        transformers.FlexOlmoConfig if architecture == "flex_olmo" else transformers.Olmo2Config
    )
    model = getattr(transformers, values["architectures"][0])._from_config(
        config_cls(**values), **options
    )
    tensors = fuse_experts(config, to_hf(config, params, architecture))
    model.load_state_dict({name: torch.tensor(value) for name, value in tensors.items()})
    return model.eval()


def traced(model, tokens: np.ndarray) -> Trace:
    """One forward pass. Hidden states come from hooks: the model's own output has the last one only
    after the final norm."""
    seen: dict[str, list[np.ndarray]] = {"inputs": [], "middles": [], "outputs": [], "router": []}

    def keep(kind):
        def hook(_module, values, *_output):
            seen[kind].append(values[0].numpy())

        return hook

    hooks = []
    for layer in model.model.layers:
        hooks.append(layer.register_forward_pre_hook(keep("inputs")))
        hooks.append(layer.mlp.register_forward_pre_hook(keep("middles")))
        hooks.append(
            layer.register_forward_hook(
                lambda _module, _inputs, output: seen["outputs"].append(output.numpy())
            )
        )
        if hasattr(layer.mlp, "gate"):
            hooks.append(
                layer.mlp.gate.register_forward_hook(
                    lambda _m, _i, output: seen["router"].append(output[0].numpy())
                )
            )
    with torch.no_grad():
        logits = model(torch.as_tensor(tokens)).logits.numpy()
    for hook in hooks:
        hook.remove()
    router = (
        np.stack(seen["router"]).reshape(len(seen["router"]), *tokens.shape, -1)
        if seen["router"]
        else None
    )
    return Trace(
        logits,
        np.stack(seen["inputs"]),
        np.stack(seen["middles"]),
        np.stack(seen["outputs"]),
        router,
    )


def top_k(logits: np.ndarray, active: int) -> tuple[np.ndarray, np.ndarray]:
    """The probability of each expert (0 where not chosen) by the definition, and which tokens'
    choice is not a matter of rounding."""
    p = np.exp(logits - logits.max(-1, keepdims=True), dtype=np.float64)
    p /= p.sum(-1, keepdims=True)
    ranked = -np.sort(-p, axis=-1)
    clear = (
        ranked[..., active - 1] - ranked[..., active] > MARGIN
        if active < p.shape[-1]
        else np.ones(p.shape[:-1], bool)
    )
    return np.where(p >= ranked[..., active - 1 : active], p, 0), clear


@functools.partial(jax.jit, static_argnums=0)
def ours(config: ModelConfig, params: Params, tokens, inputs, middles):
    """Our whole model's output; of each layer its attention on `inputs`, its router and experts on
    `middles` [L, B, T, D]."""
    model = bind(config, params)
    layers_graph, layers = nnx.split(model.trunk.layers)
    experts_graph, experts = nnx.split(model.experts)
    B, T = tokens.shape
    positions, segments = jnp.broadcast_to(jnp.arange(T), (B, T)), jnp.ones((B, T), jnp.int32)

    def run(xs):
        layer_state, group_state, x, h = xs
        layer = nnx.merge(layers_graph, layer_state)
        group = nnx.merge(experts_graph, group_state)
        attended, _ = layer.attention(x, positions, PackedContext(segments), False)
        choices = Choices(config.n_active, jnp.ones(config.n_experts, bool))
        mixed, router = mixture(h, (group,), choices)
        return x + layer.attention_norm(attended), router.probabilities, h + layer.ffn_norm(mixed)

    return forward(config, params, tokens), *jax.lax.map(run, (layers, experts, inputs, middles))


def loss(config: ModelConfig, params: Params, tokens) -> jax.Array:
    """Mean cross-entropy of every token but each sequence's first, in nats."""
    log_p = jax.nn.log_softmax(forward(config, params, tokens).logits[:, :-1])
    return -jnp.mean(jnp.take_along_axis(log_p, tokens[:, 1:, None], axis=-1))


def fuse_experts(config: ModelConfig, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """From the names on disk to those in memory, where transformers 5 stacks the experts of a
    layer, gate on top of up."""
    fused = {name: value for name, value in tensors.items() if ".experts." not in name}
    for l in range(config.n_layers):
        at = f"model.layers.{l}.mlp.experts"
        if f"{at}.0.gate_proj.weight" in tensors:
            gate, up, down = (
                np.stack([tensors[f"{at}.{e}.{name}_proj.weight"] for e in range(config.n_experts)])
                for name in ("gate", "up", "down")
            )
            fused[f"{at}.gate_up_proj"], fused[f"{at}.down_proj"] = (
                np.concatenate([gate, up], axis=1),
                down,
            )
    return fused


def split_experts(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The inverse of `fuse_experts`."""
    split = {}
    for name, value in tensors.items():
        at, _, kind = name.rpartition(".")
        if kind == "gate_up_proj":
            for e, (gate, up) in enumerate(np.split(matrix, 2) for matrix in value):
                split |= {f"{at}.{e}.gate_proj.weight": gate, f"{at}.{e}.up_proj.weight": up}
        elif kind == "down_proj":
            split |= {f"{at}.{e}.down_proj.weight": matrix for e, matrix in enumerate(value)}
        else:
            split[name] = value
    return split
