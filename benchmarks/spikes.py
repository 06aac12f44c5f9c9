"""What garbage in a run costs, what `train.skip_spikes` saves of it; what `train.average` gives.

    python benchmarks/spikes.py --out benchmarks/results/spikes.json

A small model (2 layers, d 64) learns this repository's own pages on a CPU for 300 steps of 2048
tokens, three times: as they are, with three batches of random tokens in a row, and with the same
and `train.skip_spikes: 6`. Each is scored on held-out paragraphs twice: its last checkpoint, and
the mean of the last four (`train.average: 4`, a checkpoint every 20 steps).
"""

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax

from flexolmo_jax.config import resolve
from flexolmo_jax.data.prepare import prepare
from flexolmo_jax.data.tokenizer import train_tokenizer
from flexolmo_jax.train.feed import Feed
from flexolmo_jax.train.metrics import read_metrics
from flexolmo_jax.train.pretrain import pretrain

ROOT = Path(__file__).parent.parent
VOCABULARY, LENGTH = 1024, 128
GARBAGE = (200, 201, 202)  # steps
RUNS = {"clean": (False, 0), "garbage": (True, 0), "garbage, skipped": (True, 6)}


class Spoilt(Feed):
    """Random tokens in place of the batches of GARBAGE."""

    def __init__(self, job: Any, mesh: Any, start: int):
        super().__init__(job, mesh, start)
        self._number = start

    def next(self) -> dict[str, jax.Array]:
        batch = super().next()
        self._number += 1
        if self._number not in GARBAGE:
            return batch
        key = jax.random.key(self._number)
        tokens = jax.random.randint(key, batch["tokens"].shape, 0, VOCABULARY)
        return batch | {"tokens": jax.device_put(tokens, batch["tokens"].sharding)}


def corpus(out: Path) -> Path:
    """A document for each paragraph of the pages."""
    pages = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("kernels/*.md")])
    texts = [text for page in pages for text in page.read_text().split("\n\n") if len(text) > 200]
    out.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return out


def measure(data: Path, out: Path, skip_spikes: float) -> dict[str, Any]:
    size = dict(d_model=64, n_layers=2, n_heads=4, n_kv_heads=4, d_ffn=176, max_seq_len=LENGTH)
    saving = dict(save_every=20, save_minutes=0, keep=4, average=4, eval_records=1000)
    run = resolve(
        {
            "model": size,
            "data": {"train": [{"path": str(data)}], "batch_size": 16, "seq_len": LENGTH},
            "train": {"steps": 300, "skip_spikes": skip_spikes, **saving},
            "optim": {"lr": 3e-3},
            "mesh": {"fsdp": 1},
        }
    )
    (mean,) = pretrain(run, out)["bits_per_byte"].values()
    entries = read_metrics(out)
    (last,) = entries[-1]["bits_per_byte"].values()
    spikes = [entry["step"] for entry in entries if entry.get("spike")]
    losses = {entry["step"]: entry["loss"] for entry in entries if "loss" in entry}
    after = [losses[step] for step in range(GARBAGE[-1] + 1, GARBAGE[-1] + 6)]
    found = {"last": last, "mean of 4": mean, "loss of the 5 steps after": sum(after) / 5}
    return {name: round(value, 4) for name, value in found.items()} | {"skipped": spikes}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="a JSON file for the figures")
    options = parser.parse_args()
    from flexolmo_jax.train import loop

    found = {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        pages = corpus(work / "pages.jsonl")
        tokenizer = train_tokenizer([pages], VOCABULARY, work / "tokenizer.json")
        prepare([pages], tokenizer, LENGTH, work / "data", heldout=0.1, workers=1)
        for name, (is_spoilt, skip_spikes) in RUNS.items():
            loop.Feed = Spoilt if is_spoilt else Feed
            found[name] = measure(work / "data", work / name, skip_spikes)
            print(name, json.dumps(found[name]), flush=True)
    options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
