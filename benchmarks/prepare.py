"""Documents a second that `data prepare` takes in: one process, and a Ray cluster of this machine.

    python benchmarks/prepare.py --work /some/disk --out benchmarks/results/prepare.json

The corpus is made-up text. One process tokenizes with one thread and with two; the cluster has one
worker and two, a core each, beside a head that only schedules. Each is measured in a process of its
own, the cluster when its worker processes have to start first, and again when they run; the best of
several turns counts. All results have to be the same files. Then digests: the memory and time of a
set of them with and without its table on disk.
"""

import argparse
import datetime
import hashlib
import json
import logging
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from flexolmo_jax.data import digests, shards
from flexolmo_jax.data.documents import digest_of
from flexolmo_jax.data.prepare import prepare
from flexolmo_jax.data.tokenizer import Tokenizer, train_tokenizer
from flexolmo_jax.runtime.cluster import ALONE

SEQ_LEN = 4096
FILES, DOCUMENTS = 16, 1000  # of each file
TURNS = 1  # of which the best counts
DIGESTS = 8_000_000
CASES = ("process 1", "process 2", "ray 1", "ray 2", "digests table", "digests set")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)  # a process for one
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measure(options.case, options.work)))
        return
    files = write_corpus(options.work / "corpus")
    measured = {}
    for case in CASES:
        command = [sys.executable, __file__, "--work", options.work, "--out", options.out]
        done = subprocess.run([*command, "--case", case], check=True, stdout=-1, text=True)
        measured[case] = json.loads(done.stdout.splitlines()[-1])
        print(case, measured[case])
    if len({found.pop("sha256") for found in measured.values() if "sha256" in found}) > 1:
        sys.exit("the cases give different files")
    options.out.write_text(json.dumps(report(files, measured), indent=1) + "\n")


def measure(case: str, work: Path) -> dict[str, Any]:
    kind, how = case.split()
    if kind == "digests":
        return of_digests(how, work)
    files = sorted((work / "corpus").iterdir())
    shards.SHARD = max(file.stat().st_size for file in files)  # a file a shard
    tokenizer = Tokenizer.load(work / "tokenizer.json")
    count = FILES * DOCUMENTS
    if kind == "process":
        turns = [run(files, tokenizer, work, workers=int(how)) for _ in range(TURNS)]
        return {"documents_per_s": round(count / min(turns)[0]), "sha256": turns[0][1]}
    with cluster(int(how)) as address:
        first, *turns = (run(files, tokenizer, work, ray=address) for _ in range(1 + TURNS))
    return {
        "documents_per_s": round(count / min(turns)[0]),
        "documents_per_s_at_first": round(count / first[0]),
        "sha256": first[1],
    }


def run(files: list[Path], tokenizer: Tokenizer, work: Path, **how: Any) -> tuple[float, str]:
    """Seconds, and a digest of all files."""
    out = work / f"{time.time_ns()}" / "out"
    start = time.perf_counter()
    index = prepare(files, tokenizer, SEQ_LEN, out, **how)
    seconds = time.perf_counter() - start
    return seconds, hashlib.sha256(json.dumps(index.files).encode()).hexdigest()


@contextmanager
def cluster(workers: int) -> Iterator[str]:
    """The address of a cluster that this process is connected to, with a core for each worker."""
    os.environ |= ALONE | {"RAY_USAGE_STATS_ENABLED": "0"}
    import ray
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    for _ in range(workers):
        made.add_node(num_cpus=1)
    ray.init(made.address, log_to_driver=False, logging_level=logging.CRITICAL)
    yield str(made.address)
    ray.shutdown()
    made.shutdown()


def of_digests(how: str, work: Path) -> dict[str, Any]:
    if how == "set":
        digests.IN_MEMORY = sys.maxsize
    before, start = peak(), time.perf_counter()
    with digests.open_digests(work) as seen:
        for number in range(DIGESTS):
            seen.add(digest_of(str(number)))
    return {
        "digests": DIGESTS,
        "seconds": round(time.perf_counter() - start, 1),
        "peak_bytes": peak() - before,
    }


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def write_corpus(folder: Path) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    rng, words = np.random.default_rng(0), np.array([f"word{i}" for i in range(3000)])
    for number in range(FILES):
        file = folder / f"{number:02}.jsonl"
        if not file.exists():
            texts = (" ".join(rng.choice(words, rng.integers(20, 500))) for _ in range(DOCUMENTS))
            file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    files = sorted(folder.iterdir())
    if not (folder.parent / "tokenizer.json").exists():
        train_tokenizer(files, 4000, folder.parent / "tokenizer.json", sample_bytes=1 << 22)
    return files


def report(files: list[Path], measured: dict[str, Any]) -> dict[str, Any]:
    import ray

    return {
        "machine": {
            "cpu": "AMD EPYC" if "AMD" in Path("/proc/cpuinfo").read_text() else platform.machine(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            "ray": ray.__version__,
            "load": max(os.getloadavg()),  # above the cores, others used the machine too
            "date": datetime.date.today().isoformat(),
        },
        "corpus": {
            "documents": FILES * DOCUMENTS,
            "files": len(files),
            "bytes": sum(file.stat().st_size for file in files),
        },
        "measured": measured,
    }


if __name__ == "__main__":
    main()
