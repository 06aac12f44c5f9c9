"""A whole sparse model beside Hugging Face's FlexOlmoForCausalLM on torch, on one CPU thread each.

    python benchmarks/model.py --out model.json

Hidden 256, 4 layers, 8 heads, ffn 688, vocabulary 8192, 4 experts, 2 active, 8 x 256 tokens,
float32: the forward pass to all logits, a training step (loss, gradients of everything, AdamW), and
a token of greedy decoding over a KV cache for batches of 1 and 8 (the difference between a long and
a short completion), in one go and streamed, with float32 and with bfloat16 weights. The weights are
the same, and logits are compared first. How it is timed is said in timing.py. torch runs its honest
best, `experts_implementation="grouped_mm"` and `attn_implementation="sdpa"`. Its streamers take one
prompt, so that a streamed batch of 8 is one that is not streamed there.
"""

import timing  # isort: skip  (before jax)

import argparse
import copy
import json
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from safetensors.numpy import save_file
from transformers import FlexOlmoForCausalLM
from transformers.generation.streamers import BaseStreamer

from flexolmo_jax.config import ModelConfig, resolve
from flexolmo_jax.convert.hub_config import hf_config
from flexolmo_jax.convert.huggingface import to_hf
from flexolmo_jax.generate import Decoder, Generator
from flexolmo_jax.model import forward, init_params
from flexolmo_jax.train.state import TrainState
from flexolmo_jax.train.step import make_step

CONFIG = ModelConfig(
    vocab_size=8192,
    d_model=256,
    n_layers=4,
    n_heads=8,
    n_kv_heads=8,
    d_ffn=688,
    n_experts=4,
    n_active=2,
    router_bias=False,
)
BATCH, LENGTH = 8, 256
PROMPT, SHORT, LONG = 32, 8, 64
DTYPES = ("float32", "bfloat16")
COMPLETIONS = [
    (batch, dtype, is_streamed)
    for batch in (1, BATCH)
    for dtype in DTYPES
    for is_streamed in (False, True)
]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument(
        "--out", type=Path, help="a JSON file for the figures, with versions and machine"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        save_torch_model(Path(folder))
        sides = {"here": timing.Worker(in_jax), "torch": timing.Worker(in_torch, folder)}
        (got, _), (want, _) = (worker.call("logits") for worker in sides.values())
    error = np.linalg.norm(got - want) / np.linalg.norm(want)
    if not error <= 1e-3:
        raise SystemExit(
            f"logits differ by {error:.1e} of their norm; a comparison of speed would mean nothing"
        )

    results = {}
    print(f"{'':<42} {timing.HEADER}")
    for name in ("forward", "training step"):
        results |= timing.in_turns(sides, [name], options.repetitions)
        print(f"{name:<42} {timing.row(results[name])}", flush=True)
    for batch, dtype, is_streamed in COMPLETIONS:
        how = batch, dtype, is_streamed
        names = [completion(count, *how) for count in (SHORT, LONG)]
        short, long = timing.in_turns(sides, names, options.repetitions).values()
        # prompt and start-up cost the same in both completions and drop out
        per_token = {
            side: {key: (long[side][key] - short[side][key]) / (LONG - SHORT) for key in long[side]}
            for side in sides
        }
        name = completion(1, *how)
        results[name] = per_token
        print(f"{name:<42} {timing.row(per_token)}", flush=True)
    if options.out:
        options.out.write_text(
            json.dumps({"machine": timing.machine(), "results": results}, indent=1) + "\n"
        )


def completion(count: int, batch: int, dtype: str, is_streamed: bool) -> str:
    tokens = "a token" if count == 1 else f"{count} tokens"
    return f"{tokens}, batch {batch}, {dtype}{', streamed' if is_streamed else ''}"


def random_tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(1, CONFIG.vocab_size, size=(BATCH, LENGTH))


def in_jax():
    params, tokens = init_params(CONFIG, jax.random.key(0)), random_tokens()
    passes = {
        "logits": lambda: np.asarray(forward(CONFIG, params, jnp.asarray(tokens[:2])).logits),
        "forward": our_forward(params, tokens),
        "training step": our_step(params, tokens),
        "matmul": timing.jax_matmul(),
    }
    generators = {dtype: our_generator(params, dtype) for dtype in DTYPES}
    completions = {
        completion(count, batch, dtype, is_streamed): our_generation(
            generators[dtype], tokens[:batch, :PROMPT], count, is_streamed
        )
        for batch, dtype, is_streamed in COMPLETIONS
        for count in (SHORT, LONG)
    }
    return passes | completions


def in_torch(folder: str):
    options: dict[str, Any] = dict(
        attn_implementation="sdpa", experts_implementation="grouped_mm", dtype=torch.float32
    )
    model, tokens = FlexOlmoForCausalLM.from_pretrained(folder, **options), random_tokens()

    def logits() -> np.ndarray:
        with torch.no_grad():
            return model(input_ids=torch.from_numpy(tokens[:2]), use_cache=False).logits.numpy()

    passes = {
        "logits": logits,
        "forward": their_forward(model, tokens),
        "training step": their_step(model, tokens),
        "matmul": timing.torch_matmul(),
    }
    models = {"float32": model, "bfloat16": copy.deepcopy(model).bfloat16()}
    completions = {
        completion(count, batch, dtype, is_streamed): their_generation(
            models[dtype], tokens[:batch, :PROMPT], count, is_streamed
        )
        for batch, dtype, is_streamed in COMPLETIONS
        for count in (SHORT, LONG)
    }
    return passes | completions


def our_forward(params, tokens: np.ndarray):
    run = jax.jit(lambda params, tokens: forward(CONFIG, params, tokens).logits)

    def run_forward() -> None:
        jax.block_until_ready(run(params, tokens))

    return run_forward


def their_forward(model, tokens: np.ndarray):
    ids = torch.from_numpy(tokens)

    def run():
        with torch.no_grad():
            model.eval()(input_ids=ids, use_cache=False)

    return run


def our_step(params, tokens: np.ndarray):
    run = resolve(
        {
            "run": "joint",
            "data": {
                "train": [{"path": "-"}],
                "tokenizer": "-",
                "batch_size": BATCH,
                "seq_len": LENGTH,
            },
            "model": {"preset": "tiny", "n_experts": CONFIG.n_experts, "n_active": CONFIG.n_active},
        }
    )
    optimizer = optax.adamw(1e-3)
    step = make_step(CONFIG, run, optimizer)
    # a copy: the step reuses the buffers of what it is given
    ours = jax.tree.map(jnp.array, params)
    state = [TrainState(ours, optimizer.init(ours))]
    batch = {
        "tokens": jnp.asarray(tokens),
        "segments": jnp.ones_like(tokens),
        "targets": jnp.ones(tokens.shape, bool),
    }

    def run_step():
        state[0], metrics = step(state[0], {}, batch, 1)
        jax.block_until_ready(metrics)

    return run_step


def their_step(model, tokens: np.ndarray):
    ids = torch.from_numpy(tokens)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def run():
        model.train()
        optimizer.zero_grad(set_to_none=True)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()

    return run


def our_generator(params, dtype: str) -> Generator:
    weights = jax.tree.map(lambda a: a.astype(dtype), params)
    return Generator(Decoder(CONFIG, weights, CONFIG.vocab_size, eos_id=-1))


def our_generation(generator: Generator, prompts: np.ndarray, count: int, is_streamed: bool):
    experts = CONFIG.n_active, np.ones(CONFIG.n_experts, bool)
    on_token = (lambda step, ids: None) if is_streamed else None

    def run() -> None:
        generator.generate(prompts.tolist(), count, experts, on_token=on_token)

    return run


class Sink(BaseStreamer):
    """Takes tokens as they come and does nothing with them."""

    def put(self, value) -> None:
        pass

    def end(self) -> None:
        pass


def their_generation(model, prompts: np.ndarray, count: int, is_streamed: bool):
    ids = torch.from_numpy(prompts)
    streamer = Sink() if is_streamed and len(prompts) == 1 else None

    def run():
        with torch.no_grad():
            model.eval().generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=count,
                min_new_tokens=count,
                do_sample=False,
                use_cache=True,
                streamer=streamer,
            )

    return run


def save_torch_model(folder: Path) -> None:
    """The same weights, as `from_pretrained` reads them."""
    (folder / "config.json").write_text(json.dumps(hf_config(CONFIG, pad_token_id=0)))
    save_file(
        to_hf(CONFIG, init_params(CONFIG, jax.random.key(0))),
        folder / "model.safetensors",
        {"format": "pt"},
    )


if __name__ == "__main__":
    main()
