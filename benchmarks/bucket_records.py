"""Records a second out of a bucket, in batches drawn at random as in training and one after
another, beside those of a disk.

    python benchmarks/bucket_records.py --bucket gs://bucket/place --disk /some/disk

Prepares the same made-up text in both places (which stays there) and reads each in a process of its
own, whose memory is measured too. With an emulator of an object store, the environment has its
address (tests/object_store.py); the time that a service takes to answer is then not in these
numbers, and the emulator's own work on the same cores is.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from flexolmo_jax.data.mixture import mixture
from flexolmo_jax.data.prepare import prepare
from flexolmo_jax.data.records import open_records
from flexolmo_jax.data.tokenizer import train_tokenizer
from flexolmo_jax.storage.paths import path_of

SEQ_LEN = 4096
BATCH = 256
BATCHES = 16
DOCUMENTS = 4000


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bucket", type=path_of, required=True)
    parser.add_argument("--disk", type=Path, required=True)
    parser.add_argument("--read", type=path_of, help=argparse.SUPPRESS)  # a process for one of them
    options = parser.parse_args()
    if options.read:
        print(json.dumps(measure(options.read)))
        return
    text = options.disk / "text.jsonl"
    if not text.exists():
        options.disk.mkdir(parents=True, exist_ok=True)
        write_text(text)
    tokenizer = train_tokenizer(
        [text], 320, options.disk / f"tokenizer-{time.time_ns()}.json", sample_bytes=1 << 20
    )
    for name, place in (("disk", options.disk / "records"), ("bucket", options.bucket / "records")):
        if not (place / "index.json").exists():
            start = time.perf_counter()
            prepare([text], tokenizer, SEQ_LEN, place)
            print(
                f"{name}: prepared {text.stat().st_size / 1e6:.0f} MB in"
                f" {time.perf_counter() - start:.1f} s"
            )
        command = [
            sys.executable,
            __file__,
            "--bucket",
            str(options.bucket),
            "--disk",
            str(options.disk),
            "--read",
            str(place),
        ]
        print(
            name,
            subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip(),
        )


def write_text(path: Path) -> None:
    rng, words = np.random.default_rng(0), np.array([f"word{i}" for i in range(3000)])
    with path.open("w") as file:
        for _ in range(DOCUMENTS):
            file.write(json.dumps({"text": " ".join(rng.choice(words, 2000))}) + "\n")


def measure(place: Path) -> dict[str, float]:
    records = open_records(place, "train")
    batches = mixture([(records, 1.0)], BATCH, seed=0)
    batches.at(0)
    start = time.perf_counter()
    for step in range(1, 1 + BATCHES):
        batches.at(step)
    random = BATCH * BATCHES / (time.perf_counter() - start)
    start = time.perf_counter()
    for i in range(BATCH):
        records[i]
    in_order = BATCH / (time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    held = len(records) * SEQ_LEN * 4 / 1e6
    return {
        "records": len(records),
        "megabytes": round(held),
        "at random, records/s": round(random),
        "tokens/s": round(random * SEQ_LEN),
        "one by one, records/s": round(in_order),
        "peak memory, MB": round(peak),
    }


if __name__ == "__main__":
    main()
