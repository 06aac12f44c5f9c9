"""What holds for every family of models: documents are packed as if alone, and what is generated
over a cache is what a forward pass says."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexolmo_jax.config import ModelConfig
from flexolmo_jax.generate import Decoder, Generator
from flexolmo_jax.model import forward, init_params
from tests.families import FAMILIES, as_family, distinct_first

CONFIG = ModelConfig(
    vocab_size=96,
    d_model=32,
    n_layers=4,
    n_heads=4,
    n_kv_heads=2,
    d_ffn=48,
    n_experts=3,
    n_active=2,
    max_seq_len=64,
    init_std=0.3,
)
EVERY = pytest.mark.parametrize("family", distinct_first(FAMILIES))


@pytest.fixture
def config(family: str) -> ModelConfig:
    return as_family(CONFIG, family)


@EVERY
def test_packed_documents_are_as_if_alone(config):
    params = init_params(config, jax.random.key(0))
    tokens = np.random.default_rng(0).integers(96, size=(1, 40))
    segments = np.repeat([[1, 2, 0]], [13, 22, 5], axis=1)
    run = jax.jit(lambda tokens, segments: forward(config, params, tokens, segments).logits)
    packed = run(tokens, segments)
    for start, end in ((0, 13), (13, 35)):
        alone = run(tokens[:, start:end], np.ones((1, end - start), int))
        np.testing.assert_allclose(packed[:, start:end], alone, atol=2e-4)


@EVERY
def test_what_is_generated_over_a_cache_is_what_a_forward_pass_says(config):
    """Prompts of unequal length, of which one is longer than the window."""
    params = init_params(config, jax.random.key(0))
    generator = Generator(Decoder(config, params, 96, eos_id=-1))
    prompts = [[5, 17, 3, 80, 41, 2, 7, 9, 33, 12, 8], [60, 4]]
    experts = config.n_active, np.ones(config.n_experts, bool)
    run = jax.jit(lambda tokens: forward(config, params, tokens).logits)
    for prompt, new in zip(prompts, generator.generate(prompts, 24, experts), strict=True):
        logits = run(np.array([[*prompt, *new]]))[0]
        chosen = logits[len(prompt) - 1 : -1].argmax(axis=-1)
        np.testing.assert_array_equal(chosen, new)


def test_weights_of_the_active_experts_add_up_to_one_where_they_are_renormalised():
    params = init_params(CONFIG, jax.random.key(0))
    tokens = jnp.arange(20)[None]
    for renormalise in (False, True):
        config = dataclasses.replace(CONFIG, renormalise=renormalise)
        summed = forward(config, params, tokens).router.probabilities.sum(axis=-1)
        assert np.allclose(summed, 1, atol=1e-6) == renormalise
