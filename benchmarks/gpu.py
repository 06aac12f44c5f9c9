"""One GPU: the pair's step beside the card's own matrix product, attention and experts alone, and a
token of decoding beside Hugging Face's FlexOlmo on the same card.

    python benchmarks/gpu.py --out benchmarks/results/gpu.json
    python benchmarks/gpu.py --out tiny.json --size tiny      # tries the program, on any device

It needs the extras `cuda` and `test`, and for the last comparison a torch that sees the card.
Every case has a process of its own, one after the other: each has the card to itself, and peak
memory is its own. Weights and tokens are random. Times are wall seconds, the best of several. A
share is of the TFLOP/s that one bfloat16 product reached on the same card; computing something
again (`train.remat`) does not count as work. The number of records is halved until a step fits.
The study on a GPU is `flexolmo reproduce configs/reproduce/gpu.yaml --out DIR`.
"""

import argparse
import dataclasses
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pair_step import count

from flexolmo_jax.config import ModelConfig, RunConfig, load_config

ROOT = Path(__file__).parent.parent
CASES = (
    "matmul",
    "attention cudnn",
    "attention blocks",
    "experts blocks",
    "experts ragged_dot",
    "pair full",
    "pair outputs",
    "pair none",
    "decode here",
    "decode torch",
)
EXPERTS, ACTIVE = 4, 2
PROMPT, SHORT, LONG = 128, 16, 144
BATCHES = (1, 16)
AGREES = 1e-3  # of the norm: logits of the two libraries, in float32


class Size(NamedTuple):
    records: int  # of a pair's step, at first
    matmul: int  # rows and columns of the product that is the card's measure
    overrides: tuple[str, ...] = ()


SIZES = {
    "7b": Size(4, 16384),
    "1b": Size(16, 16384),
    "tiny": Size(2, 256, ("model.vocab_size=512", "data.seq_len=256")),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="a JSON file for the figures")
    parser.add_argument("--size", choices=SIZES, default="1b", help="of the models: configs/SIZE")
    parser.add_argument("--work", type=Path, help="a folder on a disk that holds the model")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)  # a process for one
    parser.add_argument("--records", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measure(options.case, options.size, options.work, options.records)))
        return
    measured: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=options.work) as work:
        for case in CASES:
            measured[case] = in_process(case, options.size, Path(work))
            print(f"{case:<18} {json.dumps(measured[case])}", flush=True)
        measured["logits differ by"] = error = difference(Path(work))
    if "failed" in measured["matmul"]:
        sys.exit(f"the card does not multiply: {measured['matmul']['failed']}")
    for found in measured.values():
        if isinstance(found, dict) and "tflops" in found:
            found["share"] = round(found["tflops"] / measured["matmul"]["tflops"], 3)
    report = {"size": options.size, "machine": machine(), "measured": measured}
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"wrote {options.out}")
    if error is not None and not error <= AGREES:
        sys.exit(f"logits differ by {error:.1e} of their norm: decoding is not to be compared")


def difference(work: Path) -> float | None:
    """Of the logits of both libraries, as a share of their norm; None where one has none."""
    paths = [work / f"{side}.npy" for side in ("here", "torch")]
    if not all(path.exists() for path in paths):
        return None
    ours, theirs = (np.load(path) for path in paths)
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def in_process(case: str, size: str, work: Path) -> dict[str, Any]:
    """What a case gives; {"failed": why} where it cannot run here."""
    records = SIZES[size].records
    while True:
        command = [sys.executable, __file__, "--out", "-", "--size", size, "--work", str(work)]
        command += ["--case", case, "--records", str(records)]
        # what is measured is what is used, not what JAX would take at once
        environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        environment["JAX_TRACEBACK_FILTERING"] = "off"  # the last line is the error
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
        if done.returncode == 0:
            return json.loads(done.stdout.splitlines()[-1])
        if "RESOURCE_EXHAUSTED" in done.stderr and case.startswith("pair") and records > 1:
            records //= 2
            continue
        return {"failed": (done.stderr.strip().splitlines() or ["no message"])[-1][:300]}


def measure(case: str, size: str, work: Path, records: int) -> dict[str, Any]:
    kind, _, how = case.partition(" ")
    if how == "torch":
        return decode_in_torch(work)
    import jax

    cases: dict[str, Callable[[], dict[str, Any]]] = {
        "matmul": lambda: of_matmul(SIZES[size].matmul),
        "attention": lambda: of_attention(model_of(size), length_of(size), how),
        "experts": lambda: of_experts(model_of(size), length_of(size), how),
        "pair": lambda: of_pair(size, records, how),
        "decode": lambda: decode_here(mixture_of(size), work),
    }
    found = cases[kind]()
    stats = jax.devices()[0].memory_stats() or {}
    return found | {"peak_bytes": stats.get("peak_bytes_in_use")}


def pair_run(size: str, *overrides: str) -> RunConfig:
    path = ROOT / "configs" / size / "pair.yaml"
    return load_config(path, [*SIZES[size].overrides, *overrides, "pair.anchor=/nowhere"])


def model_of(size: str) -> ModelConfig:
    return pair_run(size).model


def length_of(size: str) -> int:
    return pair_run(size).data.seq_len


def mixture_of(size: str) -> ModelConfig:
    more = {"n_experts": EXPERTS, "n_active": ACTIVE, "router_bias": False}
    return dataclasses.replace(model_of(size), **more)


def seconds(run: Callable[[], Any], calls: int = 5, turns: int = 5) -> float:
    """Of one call, in the best turn. The first calls compile and are not counted."""
    import jax

    jax.block_until_ready([run(), run()])
    taken = []
    for _ in range(turns):
        start = time.perf_counter()
        jax.block_until_ready([run() for _ in range(calls)])
        taken.append((time.perf_counter() - start) / calls)
    return min(taken)


def of_matmul(n: int) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp

    square, multiply = jnp.ones((n, n), jnp.bfloat16), jax.jit(jnp.matmul)
    taken = seconds(lambda: multiply(square, square))
    return {"shape": [n, n, n], "seconds": taken, "tflops": 2 * n**3 / taken / 1e12}


def of_attention(model: ModelConfig, T: int, implementation: Any) -> dict[str, Any]:
    """Forward and backward of a layer's attention, for two records of eight documents each."""
    import jax
    import jax.numpy as jnp

    from flexolmo_jax.kernels.attention import attention

    keys = jax.random.split(jax.random.key(0), 3)
    heads = (model.n_heads, model.n_kv_heads, model.n_kv_heads)
    qkv = [
        jax.random.normal(key, (2, T, H, model.head_size), jnp.bfloat16)
        for key, H in zip(keys, heads, strict=True)
    ]
    segments = jnp.tile(jnp.arange(T) // (T // 8) + 1, (2, 1))

    @jax.jit
    @jax.value_and_grad
    def run(qkv: list[jax.Array]) -> jax.Array:
        out = attention(*qkv, segments=segments, implementation=implementation)
        return jnp.sum(out.astype(jnp.float32) ** 2)

    return {"shape": [2, T, heads[0], model.head_size], "seconds": seconds(lambda: run(qkv))}


def of_experts(model: ModelConfig, N: int, implementation: Any) -> dict[str, Any]:
    """Forward and backward of a layer's grouped SwiGLU, N tokens each at ACTIVE of EXPERTS."""
    import jax
    import jax.numpy as jnp

    from flexolmo_jax.kernels.grouped_matmul import expert_ffn

    D, F, M = model.d_model, model.d_ffn, N * ACTIVE
    shapes = {"x": (M, D), "gate": (EXPERTS, D, F), "up": (EXPERTS, D, F), "down": (EXPERTS, F, D)}
    arrays = {
        name: 0.02 * jax.random.normal(jax.random.key(i), shape, jnp.bfloat16)
        for i, (name, shape) in enumerate(shapes.items())
    }
    sizes, probabilities = jnp.full(EXPERTS, M // EXPERTS), jnp.ones(M)

    @jax.jit
    @jax.value_and_grad
    def run(a: dict[str, jax.Array]) -> jax.Array:
        matrices = a["gate"], a["up"], a["down"]
        out = expert_ffn(a["x"], probabilities, sizes, *matrices, implementation=implementation)
        return jnp.sum(out.astype(jnp.float32) ** 2)

    taken = seconds(lambda: run(arrays))
    return {"shape": [EXPERTS, M, D, F], "seconds": taken, "tflops": 18 * M * D * F / taken / 1e12}


def of_pair(size: str, records: int, remat: str) -> dict[str, Any]:
    """The step that `flexolmo train` runs, one microbatch."""
    import jax
    import jax.numpy as jnp

    from flexolmo_jax.plan.steps import architecture, training_step
    from flexolmo_jax.runtime.sharding import make_mesh

    how = (f"data.batch_size={records}", f"train.remat={remat}", "train.accumulate=1")
    run = pair_run(size, *how, "train.compute_dtype=bfloat16")
    model = architecture(run)
    step = training_step(run, model, make_mesh(run.mesh, jax.devices()[:1]))

    def filled(a: jax.ShapeDtypeStruct) -> jax.Array:
        if jnp.issubdtype(a.dtype, jnp.floating):
            make = lambda: 0.02 * jax.random.normal(jax.random.key(0), a.shape, a.dtype)  # noqa: E731
        else:
            make = lambda: jnp.ones(a.shape, a.dtype)  # noqa: E731
        return jax.jit(make, out_shardings=a.sharding)()

    state, frozen, batch, number = jax.tree.map(filled, step.arguments)
    kept = [state._replace(optimizer=jax.tree.map(jnp.zeros_like, state.optimizer))]
    del state

    def one() -> Any:
        kept[0], metrics = step.function(kept[0], frozen, batch, number)
        return metrics

    taken = seconds(one, calls=3, turns=3)
    T = run.data.seq_len
    flops = count("pair", model, records, T).flops
    return {
        "records": records,
        "seconds": taken,
        "tokens_per_second": records * T / taken,
        "tflops": flops / taken / 1e12,
    }


def decode_here(model: ModelConfig, work: Path) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp
    from safetensors.flax import save_file

    from flexolmo_jax.convert.hub_config import hf_config
    from flexolmo_jax.convert.huggingface import to_hf
    from flexolmo_jax.generate import Decoder, Generator
    from flexolmo_jax.model import forward, init_params

    make = jax.jit(
        lambda key: jax.tree.map(lambda a: a.astype(jnp.bfloat16), init_params(model, key))
    )
    params = make(jax.random.key(0))
    config = hf_config(model, pad_token_id=0)
    (work / "config.json").write_text(json.dumps(config))
    tensors = {name: jnp.asarray(a) for name, a in to_hf(model, params).items()}
    save_file(tensors, work / "model.safetensors", {"format": "pt"})
    del tensors
    prompts = prompts_of(model.vocab_size)
    run = jax.jit(lambda p, t: forward(model, p, t, dtype=jnp.float32).logits)
    with jax.default_matmul_precision("highest"):
        np.save(work / "here.npy", np.asarray(run(params, prompts[:2])[..., :512]))
    generator = Generator(Decoder(model, params, model.vocab_size, eos_id=-1), dtype="bfloat16")
    experts = model.n_active, np.ones(model.n_experts, bool)

    def complete(batch: int, new: int) -> None:
        generator.generate(prompts[:batch].tolist(), new, experts)

    return a_token(complete)


def decode_in_torch(work: Path) -> dict[str, Any]:
    import jax
    import torch
    from transformers import FlexOlmoForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and jax.default_backend() == "gpu":
        sys.exit(f"torch {torch.__version__} does not see the card; install one built for CUDA")
    options: dict[str, Any] = {"attn_implementation": "sdpa", "dtype": torch.float32}
    options["experts_implementation"] = "grouped_mm"
    model: Any = FlexOlmoForCausalLM.from_pretrained(work, **options)
    model.to(device).eval()
    prompts = torch.from_numpy(prompts_of(model.config.vocab_size)).to(device)
    with torch.no_grad():
        logits = model(input_ids=prompts[:2], use_cache=False).logits
        np.save(work / "torch.npy", logits[..., :512].cpu().numpy())
    model.bfloat16()

    def complete(batch: int, new: int) -> None:
        ids = prompts[:batch]
        length = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
        with torch.no_grad():
            model.generate(ids, attention_mask=torch.ones_like(ids), use_cache=True, **length)
        if device == "cuda":
            torch.cuda.synchronize()

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    found = a_token(complete)
    is_there = device == "cuda"
    return found | {"peak_bytes": torch.cuda.max_memory_allocated() if is_there else None}


def a_token(complete: Callable[[int, int], None]) -> dict[str, Any]:
    """Seconds of a token for every batch: what a long completion takes above a short one."""
    found = {}
    for batch in BATCHES:
        taken = {new: [] for new in (SHORT, LONG)}
        for new in taken:
            complete(batch, new)  # compiles
        for _ in range(3):
            for new in taken:
                start = time.perf_counter()
                complete(batch, new)
                taken[new].append(time.perf_counter() - start)
        found[f"batch {batch}"] = (min(taken[LONG]) - min(taken[SHORT])) / (LONG - SHORT)
    return {"seconds_a_token": found}


def prompts_of(vocab_size: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.integers(1, vocab_size, size=(max(BATCHES), PROMPT), dtype=np.int64)


def machine() -> dict[str, Any]:
    query = "import jax; d = jax.devices()[0]; print(d.platform, d.device_kind, sep='|')"
    told = subprocess.run([sys.executable, "-c", query], check=True, stdout=-1, text=True).stdout
    kind = told.strip().splitlines()[-1].split("|")
    packages = ("jax", "torch", "transformers")
    versions = {name: metadata.version(name) for name in packages if find_spec(name)}
    where = {"platform": kind[0], "device": kind[1], "python": platform.python_version()}
    return where | versions | {"date": datetime.date.today().isoformat()}


if __name__ == "__main__":
    main()
