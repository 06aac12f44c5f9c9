"""Importing and exporting a Hugging Face checkpoint beside `cp -r && sync` plus sha256 of the same
bytes, on this machine's disk.

    python benchmarks/huggingface.py --work /some/disk --out huggingface.json

A synthetic FlexOlmo checkpoint of 6 experts (bfloat16, random bits, 4 GB in shards of 1 GB) is
imported, and what came of it exported, each in a process of its own: wall and CPU seconds of the
operation, bytes of the result, and the peak memory of the process, its imports included. The export
is then compared with the checkpoint, byte by byte.
"""

import argparse
import dataclasses
import filecmp
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from merge import random_numbers, read_all, sha256_all, shell, size

from flexolmo_jax.config import ModelConfig
from flexolmo_jax.convert.exporting import INDEX, export_hf, shards
from flexolmo_jax.convert.hub_config import hf_config
from flexolmo_jax.convert.huggingface import key_table
from flexolmo_jax.convert.importing import import_hf
from flexolmo_jax.data.tokenizer import train_tokenizer
from flexolmo_jax.storage.tensorfile import write_tensors

MODEL = ModelConfig(
    vocab_size=50304,
    d_model=2048,
    n_layers=8,
    n_heads=16,
    n_kv_heads=16,
    d_ffn=5504,
    n_experts=6,
    n_active=4,
    router_bias=False,
)
SHARD = 10**9  # bytes


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work",
        type=Path,
        required=True,
        help="a directory on the disk to measure; what is made there is removed",
    )
    parser.add_argument("--layers", type=int, default=MODEL.n_layers)
    parser.add_argument(
        "--out", type=Path, help="a JSON file for the figures, with versions and machine"
    )
    parser.add_argument("--operation", nargs=3, help=argparse.SUPPRESS)  # a process for one of them
    options = parser.parse_args()
    if options.operation:
        measure(*options.operation)
        return
    work = options.work / "flexolmo-huggingface"
    shutil.rmtree(work, ignore_errors=True)
    try:
        results = run(work, dataclasses.replace(MODEL, n_layers=options.layers))
    finally:
        shutil.rmtree(work, ignore_errors=True)
    if options.out:
        import timing

        options.out.write_text(
            json.dumps({"machine": timing.machine(), "results": results}, indent=1) + "\n"
        )


def run(work: Path, config: ModelConfig) -> dict[str, dict[str, Any]]:
    source, model, back = work / "hf", work / "model", work / "back"
    make_checkpoint(source, config)
    os.sync()
    results: dict[str, dict[str, Any]] = {}
    print(f"{'':<16} {'wall s':>8} {'CPU s':>8} {'GB':>7} {'peak MB':>8} {'of both':>8}")

    def show(name: str, result: dict[str, Any]) -> None:
        results[name] = result
        peak = (
            f"{result['peak_bytes'] / 1e6:>8.0f} {result['of_both']:>7.2f}x"
            if "peak_bytes" in result
            else ""
        )
        print(
            f"{name:<16} {result['wall_s']:>8.2f} {result['cpu_s']:>8.2f}"
            f" {result['bytes'] / 1e9:>7.2f} {peak}",
            flush=True,
        )

    def operation(name: str, path: Path, out: Path) -> None:
        command = [
            sys.executable,
            __file__,
            "--work",
            str(work),
            "--operation",
            name,
            str(path),
            str(out),
        ]
        result = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
        both = results["cp -r && sync"]["wall_s"] + results["sha256"]["wall_s"]
        show(name, result | {"bytes": size(out), "of_both": result["wall_s"] / both})

    read_all(source)  # into the page cache, for everybody
    show(
        "cp -r && sync",
        shell(f"cp -r {source} {work / 'cp'} && sync {work / 'cp'} && sync")
        | {"bytes": size(work / "cp")},
    )
    shutil.rmtree(work / "cp")
    show("sha256", sha256_all(source) | {"bytes": size(source)})
    operation("import-hf", source, model)
    operation("export-hf", model, back)
    for file in source.glob("model*"):
        if not filecmp.cmp(file, back / file.name, shallow=False):
            raise SystemExit(f"{file.name} differs after the way there and back")
    return results


def measure(operation: str, source: str, out: str) -> None:
    """Runs one operation and prints its figures."""
    wall, cpu = time.perf_counter(), time.process_time()
    if operation == "import-hf":
        import_hf(Path(source), Path(out))
    else:
        export_hf(Path(source), Path(out), max_shard_size=SHARD)
    taken = {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}
    peak = next(
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmHWM")
    )
    print(json.dumps(taken | {"peak_bytes": int(peak.split()[1]) * 1024}))


def make_checkpoint(path: Path, config: ModelConfig) -> None:
    path.mkdir(parents=True)
    (path / "text.txt").write_text("some text to train a tokenizer on, and some more of it\n" * 20)
    train_tokenizer([path / "text.txt"], 300, path / "tokenizer.json")
    (path / "text.txt").unlink()
    (path / "config.json").write_text(json.dumps(hf_config(config, dtype="bfloat16")))
    table = key_table(config)
    weight_map = {}
    for seed, (name, entries) in enumerate(shards(table, 2, SHARD).items()):
        values = (
            random_numbers(int(np.prod(e.shape)), 1000 * seed + i).reshape(e.shape)
            for i, e in enumerate(entries)
        )
        write_tensors(
            path / name, {e.name: ("bfloat16", e.shape) for e in entries}, values, {"format": "pt"}
        )
        weight_map |= {e.name: name for e in entries}
    total = 2 * sum(int(np.prod(e.shape)) for e in table)
    (path / INDEX).write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n"
    )


if __name__ == "__main__":
    main()
