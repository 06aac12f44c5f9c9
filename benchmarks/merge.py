"""Ingesting and composing beside `cp -r && sync` and sha256 of the same bytes, on this machine's
disk.

    python benchmarks/merge.py --work /some/disk --out merge.json

A synthetic anchor and 7 contributions (bfloat16, random bits; 9.6 GB by default, and as much again
for the store and for a copy) are ingested, composed by link, by copy and by streaming, and an
expert is dropped, replaced and appended. Each operation runs in a process of its own: wall and CPU
seconds of the operation, bytes of the result, and the peak memory of the process, its imports
included. Then the real shapes of the 7 x 7B model, 66 GB in sparse files: composing does not read
them.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from flexolmo_jax.artifact import Artifact, describe, open_artifact, write_description
from flexolmo_jax.config import ModelConfig, to_dict
from flexolmo_jax.coordinator.composition import Composition
from flexolmo_jax.coordinator.gate import Gate
from flexolmo_jax.coordinator.materialize import StoredExpert
from flexolmo_jax.coordinator.merge import append, merge, opt_out, replace
from flexolmo_jax.coordinator.objects import sketch_claim
from flexolmo_jax.coordinator.sketch import BUCKETS, encoded
from flexolmo_jax.coordinator.store import Store
from flexolmo_jax.coordinator.verify import verify
from flexolmo_jax.data.tokenizer import train_tokenizer
from flexolmo_jax.exchange.admission import admit
from flexolmo_jax.exchange.anchor import open_anchor
from flexolmo_jax.exchange.contribution import (
    MANIFEST,
    TENSORS,
    open_contribution,
    sealed,
    tensor_shapes,
)
from flexolmo_jax.exchange.manifest import FORMAT
from flexolmo_jax.integrity import fingerprint_of, layouts, tensor_digest
from flexolmo_jax.storage import verified
from flexolmo_jax.storage.tensorfile import TensorFile
from flexolmo_jax.storage.weights import Writer

EXPERTS = 7
MODEL = ModelConfig(
    vocab_size=50304, d_model=2048, n_layers=16, n_heads=16, n_kv_heads=16, d_ffn=5504
)
REAL = ModelConfig(
    vocab_size=100352, d_model=4096, n_layers=32, n_heads=32, n_kv_heads=32, d_ffn=11008
)
DTYPE = "bfloat16"


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
    # a process for one of them
    parser.add_argument("--operation", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.operation:
        measure(options.operation)
        return
    work = options.work / "flexolmo-merge"
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


def run(work: Path, config: ModelConfig) -> dict[str, dict[str, Any]]:  # noqa: PLR0915 - a list
    inputs = work / "inputs"
    make_anchor(inputs / "anchor", work / "dense", config)
    for number in range(EXPERTS):
        make_contribution(inputs / f"c{number}", inputs / "anchor", config, number)
    make_contribution(work / "c0-new", inputs / "anchor", config, 0, seed=100)
    os.sync()
    results: dict[str, dict[str, Any]] = {}
    print(f"{'':<22} {'wall s':>8} {'CPU s':>8} {'GB':>7} {'peak MB':>8}")

    def show(name: str, result: dict[str, Any]) -> None:
        results[name] = result
        peak = f"{result['peak_bytes'] / 1e6:>8.0f}" if "peak_bytes" in result else ""
        print(
            f"{name:<22} {result['wall_s']:>8.2f} {result['cpu_s']:>8.2f}"
            f" {result['bytes'] / 1e9:>7.2f} {peak}",
            flush=True,
        )

    def operation(name: str, *arguments: Any, of: Path) -> None:
        command = [
            sys.executable,
            __file__,
            "--work",
            str(work),
            "--operation",
            *map(str, arguments),
        ]
        show(
            name,
            json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
            | {"bytes": size(of)},
        )

    read_all(inputs)  # into the page cache, for everybody
    show(
        "cp -r && sync",
        shell(f"cp -r {inputs} {work / 'cp'} && sync {work / 'cp'} && sync")
        | {"bytes": size(work / "cp")},
    )
    shutil.rmtree(work / "cp")
    show("sha256", sha256_all(inputs) | {"bytes": size(inputs)})
    all_of_them = [inputs / f"c{n}" for n in range(EXPERTS)]
    for experts in (2, 4, EXPERTS):
        shutil.rmtree(work / "flexolmo-store", ignore_errors=True)
        paths = all_of_them[:experts]
        operation(
            f"ingest {experts}",
            "ingest",
            work / "flexolmo-store",
            inputs / "anchor",
            *paths,
            of=work / "flexolmo-store",
        )
    for experts in (2, 4, 6, EXPERTS):
        model = work / f"model-{experts}"
        operation(
            f"compose {experts} by link",
            "merge",
            "link",
            inputs / "anchor",
            model,
            *all_of_them[:experts],
            of=model,
        )
    operation("admit an expert", "admit", inputs / "anchor", inputs / "c6", of=inputs / "c6")
    operation("open the anchor again", "open", inputs / "anchor", of=inputs / "anchor")
    operation("open the model again", "open", work / "model-7", of=work / "model-7")
    operation("drop", "drop", work / "model-7", work / "dropped", of=work / "dropped")
    operation(
        "append", "append", work / "model-6", inputs / "c6", work / "appended", of=work / "appended"
    )
    operation(
        "ingest one more",
        "ingest",
        work / "flexolmo-store",
        inputs / "anchor",
        work / "c0-new",
        of=work / "c0-new",
    )
    operation("admit one more", "admit", inputs / "anchor", work / "c0-new", of=work / "c0-new")
    operation(
        "replace",
        "replace",
        work / "model-7",
        work / "c0-new",
        work / "replaced",
        of=work / "replaced",
    )
    show(
        "cp -r && sync, model",
        shell(f"cp -r {work / 'model-7'} {work / 'cp'} && sync") | {"bytes": size(work / "cp")},
    )
    shutil.rmtree(work / "cp")
    for way in ("copy", "stream"):
        model = work / f"model-{way}"
        operation(
            f"compose 7 by {way}", "merge", way, inputs / "anchor", model, *all_of_them, of=model
        )
        shutil.rmtree(model)
    operation("verify a contribution", "verify", inputs / "c0", of=inputs / "c0")
    operation("verify the model", "verify", work / "model-7", of=work / "model-7")

    sparse = work / "real" / "model"
    make_sparse_model(sparse, open_artifact(inputs / "anchor"))
    operation(
        "drop of 7 x 7B, sparse",
        "drop",
        sparse,
        work / "real" / "dropped",
        of=work / "real" / "dropped",
    )
    return results


def measure(operation: list[str]) -> None:
    """Runs one operation and prints its figures."""
    act = prepared(*operation)
    wall, cpu = time.perf_counter(), time.process_time()
    act()
    taken = {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}
    # Not ru_maxrss: it starts at what the parent had when this process was forked off.
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(line for line in status if line.startswith("VmHWM"))
    print(json.dumps(taken | {"peak_bytes": int(peak.split()[1]) * 1024}))


def prepared(name: str, *words: str) -> Callable[[], object]:
    """An operation with all that it imports imported, so that the imports are not measured."""
    if name == "merge":
        way, anchor, out, *contributions = words
        gate = Gate(admission=False)  # measured apart
        paths = list(map(Path, contributions))
        return lambda: merge(Path(anchor), paths, Path(out), ways=(way,), gate=gate)
    paths = list(map(Path, words))
    if name == "open":
        open_artifact(paths[0]).ensure()  # what it compiles and imports
    operations: dict[str, Callable[[], object]] = {
        "ingest": lambda: ingest(*paths),
        "verify": lambda: verify(paths[0]),
        "admit": lambda: admit(open_contribution(paths[1]), open_anchor(paths[0])),
        "open": lambda: open_artifact(paths[0]).ensure(),
        "drop": lambda: opt_out(paths[0], ["e3"], paths[1]),
        "replace": lambda: replace(paths[0], paths[1], paths[2], allow_older=True),
        "append": lambda: append(*paths),
    }
    return operations[name]


def ingest(store: Path, anchor: Path, *contributions: Path) -> None:
    kept = Store(store)
    with kept.shared():
        kept.anchor(open_anchor(anchor))
        for path in contributions:
            kept.expert(open_contribution(path))


def shell(command: str) -> dict[str, float]:
    before, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, shell=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "wall_s": time.perf_counter() - wall,
        "cpu_s": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
    }


def sha256_all(path: Path) -> dict[str, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    for file in files(path):
        with file.open("rb") as opened:
            hashlib.file_digest(opened, "sha256")
    return {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}


def read_all(path: Path) -> None:
    for file in files(path):
        with file.open("rb") as opened:
            while opened.read(1 << 24):
                pass


def files(path: Path) -> Iterator[Path]:
    return (file for file in path.rglob("*") if file.is_file())


def size(path: Path) -> int:
    return sum(file.stat().st_size for file in files(path))


def random_numbers(count: int, seed: int) -> np.ndarray:
    """Small finite ones, every time other bits, quickly."""
    numbers = (
        np.random.default_rng(seed)
        .integers(0, 2**63, -(-count // 4), dtype=np.int64)
        .view(np.uint16)[:count]
    )
    return ((numbers & 0x81FF) | 0x3C00).view(np.dtype(DTYPE))


def anchor_tensors(config: ModelConfig) -> dict[str, dict[str, Any]]:
    import jax

    from flexolmo_jax.model import init_params

    shapes = jax.eval_shape(
        lambda: init_params(dataclasses.replace(config, router_bias=False), jax.random.key(0))
    )
    return {path: entry | {"dtype": DTYPE} for path, entry in describe(shapes).items()}


def make_anchor(path: Path, dense: Path, config: ModelConfig) -> None:
    """Published of a dense model of random numbers."""
    from flexolmo_jax.exchange.anchor import publish

    tensors = anchor_tensors(config)
    dense.mkdir(parents=True)
    text = dense.with_name("text.txt")
    text.write_text("some text to train a tokenizer on, and some more of it\n" * 20)
    tokenizer = train_tokenizer([text], 300, dense / "tokenizer.json")
    target = layouts(config, tensors)
    with Writer(dense / "weights", target) as writer:
        for number, (name, layout) in enumerate(target.items()):
            digest = hashlib.sha256()
            for index in layout.indices():
                shape = tuple(part.stop - part.start for part in layout.box(index))
                values = random_numbers(int(np.prod(shape)), 1000 * number + index[0]).reshape(
                    shape
                )
                digest.update(values.reshape(-1).view(np.uint8).data)
                writer.write(name, index, values)
            tensors[name] |= {"sha256": digest.hexdigest()}
    description = {
        "kind": "model",
        "model": to_dict(config),
        "experts": ["dense"],
        "members": [],
        "tensors": tensors,
    }
    write_description(dense, description | {"tokenizer": tokenizer.digest, "fingerprint": None})
    publish(dense, [text], path, dtype=DTYPE, seq_len=32)
    shutil.rmtree(dense)


def make_contribution(
    path: Path, anchor: Path, config: ModelConfig, number: int, seed: int = 0
) -> None:
    path.mkdir(parents=True)
    shapes, entries, header, end = tensor_shapes(config, False), {}, {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    with (path / TENSORS).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for i, (name, shape) in enumerate(shapes.items()):
            values = random_numbers(int(np.prod(shape)), 100_000 * (number + 1 + seed) + i).reshape(
                shape
            )
            file.write(values.view(np.uint8).data)
            entries[name] = {"dtype": DTYPE, "shape": list(shape), "sha256": tensor_digest(values)}
    with TensorFile(path / TENSORS) as opened:
        digest = opened.header_sha256
    manifest = manifest_of(
        config, f"e{number}", entries, digest, str(open_artifact(anchor).fingerprint)
    )
    (path / MANIFEST).write_bytes(sealed(manifest))


def manifest_of(
    config: ModelConfig, name: str, tensors: dict[str, Any], header: str, anchor: str
) -> dict[str, Any]:
    return {
        **{
            "format": FORMAT,
            "sequence": 1,
            "name": name,
            "owner": "-",
            "domain": "-",
            "licence": "-",
            "expires": None,
        },
        **{
            "anchor": anchor,
            "model": to_dict(config),
            "router_bias": False,
            "dtype": DTYPE,
            "tensors": tensors,
        },
        **{"header": header, "training": {}, "privacy": "none", "tool": "benchmark"},
    }


def make_sparse_model(path: Path, like: Artifact) -> None:
    """A model of the paper's size whose files have their length and no content. It and its sketches
    count as verified."""
    shapes = tensor_shapes(REAL, False)

    def member(number: int) -> dict[str, Any]:
        tensors = {
            name: {"dtype": DTYPE, "shape": list(shape), "sha256": f"{number:064x}"}
            for name, shape in shapes.items()
        }
        manifest = manifest_of(REAL, f"e{number}", tensors, "0" * 64, str(like.fingerprint))
        sketches = np.random.default_rng(number).normal(size=(3 * REAL.n_layers, BUCKETS))
        return {
            "name": f"e{number}",
            "manifest": json.loads(sealed(manifest)),
            "signature": None,
            "sketch": encoded(sketches),
        }

    parts = {
        "model": to_dict(REAL),
        "tensors": {
            name: entry | {"sha256": "0" * 64} for name, entry in anchor_tensors(REAL).items()
        },
    }
    parts |= {"tokenizer": like.tokenizer.digest, "embedder": "0" * 64, "public": "0" * 64}
    members = tuple(member(number) for number in range(6))
    experts = tuple(StoredExpert(path / "weights", index) for index in range(7))
    composition = Composition(
        tokenizer=like.tokenizer,
        anchor=parts,
        fingerprint=fingerprint_of(parts),
        model=parts["model"],
        trunk=path / "weights",
        members=members,
        stored=experts,
        active=5,
    )
    description = composition.describe()
    target = layouts(ModelConfig(**description["model"]), description["tensors"])
    with Writer(path / "weights", target) as writer:
        for name, layout in target.items():
            for index in layout.indices():
                file = writer.file(name, index)
                file.parent.mkdir(parents=True, exist_ok=True)
                file.touch()
                os.truncate(file, layout.shard_bytes)
                file.chmod(0o444)
    like.tokenizer.save(path / "tokenizer.json")
    write_description(path, description)
    model = open_artifact(path)
    model.remember()
    verified.remember(path, sketch_claim(model))


if __name__ == "__main__":
    main()
