"""Documents a second that `data prepare` takes in where they are conversations.

    python benchmarks/conversations.py --work /some/disk --out benchmarks/results/conversations.json

Made-up conversations of one to three questions and answers, with a template in the form of ChatML.
One thread prepares them: with a process for each conversation, with one for each chunk, as it is,
and the same words as text. The first has fewer of them.
"""

import argparse
import datetime
import json
import os
import platform
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from flexolmo_jax.data import shards
from flexolmo_jax.data.chat import make_chat
from flexolmo_jax.data.documents import read_documents
from flexolmo_jax.data.prepare import prepare
from flexolmo_jax.data.tokenizer import Tokenizer, train_tokenizer

SEQ_LEN = 4096
CONVERSATIONS, FEW = 4000, 60
TEMPLATE = """{% for message in messages %}
{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' }}
{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
SPECIAL = ("<|im_start|>", "<|im_end|>")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.work.mkdir(parents=True)
    corpus = write_corpus(options.work)
    few = written(options.work / "few.jsonl", corpus.read_text().splitlines()[:FEW])
    lines = (json.dumps({"text": text}) for text in read_documents(corpus))
    text = written(options.work / "text.jsonl", lines)
    tokenizer = with_chat(options.work, text)
    chunk = shards._CHUNK_CHARACTERS
    measured = {}
    for name, file, count, characters in (
        ("a process for each conversation", few, FEW, 1),
        ("a process for each chunk", corpus, CONVERSATIONS, chunk),
        ("as text", text, CONVERSATIONS, chunk),
    ):
        shards._CHUNK_CHARACTERS = characters
        start = time.perf_counter()
        prepare([file], tokenizer, SEQ_LEN, options.work / name, workers=1)
        measured[name] = round(count / (time.perf_counter() - start), 1)
        print(name, measured[name])
    options.out.write_text(json.dumps(report(corpus, measured), indent=1) + "\n")


def write_corpus(folder: Path) -> Path:
    rng, words = np.random.default_rng(0), np.array([f"word{i}" for i in range(3000)])

    def said(role: str) -> dict[str, str]:
        return {"role": role, "content": " ".join(rng.choice(words, rng.integers(5, 150)))}

    conversations = (
        [said(role) for _ in range(rng.integers(1, 4)) for role in ("user", "assistant")]
        for _ in range(CONVERSATIONS)
    )
    lines = (json.dumps({"messages": messages}) for messages in conversations)
    return written(folder / "corpus.jsonl", lines)


def written(file: Path, lines: Iterable[str]) -> Path:
    file.write_text("".join(line + "\n" for line in lines))
    return file


def with_chat(folder: Path, text: Path) -> Tokenizer:
    """A tokenizer of 4000 tokens, with those of the template and the template."""
    file = folder / "tokenizer.json"
    train_tokenizer([text], 4000, file, sample_bytes=1 << 22)
    content = json.loads(file.read_text())
    for name in SPECIAL:
        number = len(content["model"]["vocab"]) + len(content["added_tokens"])
        more = dict.fromkeys(("normalized", "single_word", "lstrip", "rstrip"), False)
        content["added_tokens"].append({"id": number, "content": name, "special": True} | more)
    tokenizer = Tokenizer(json.dumps(content))
    tokenizer.chat = make_chat(TEMPLATE, {}, ["<|im_end|>"], tokenizer, "the benchmark")
    return tokenizer


def report(corpus: Path, measured: dict[str, float]) -> dict[str, Any]:
    return {
        "machine": {
            "cpu": "AMD EPYC" if "AMD" in Path("/proc/cpuinfo").read_text() else platform.machine(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            "load": max(os.getloadavg()),  # above the cores, others used the machine too
            "date": datetime.date.today().isoformat(),
        },
        "corpus": {"conversations": CONVERSATIONS, "bytes": corpus.stat().st_size},
        "documents_per_s": measured,
    }


if __name__ == "__main__":
    main()
