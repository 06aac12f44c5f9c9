"""How much of the held-out text stands in the training text: no document may; runs of words are
counted."""

import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from flexolmo_jax.data.documents import digest_of, is_heldout, read_documents
from flexolmo_jax.errors import RunError

WORDS = 13  # in a run; what GPT-3's authors counted (arXiv 2005.14165, appendix C)


def overlaps(
    public: Sequence[Path], text: Mapping[str, Path], domains: Sequence[str]
) -> dict[str, dict[str, float | int]]:
    """By domain: how many documents are held out, and which share of their runs of WORDS words
    stands in training text that any model of the study sees. Raises RunError where a held-out
    document is a training document.
    """
    files = {"public": list(public)} | {domain: [text[domain]] for domain in domains}
    trained_on, training = set[bytes](), []
    for paths in files.values():
        for document in _documents(paths):
            if not is_heldout(digest := digest_of(document)):
                trained_on.add(digest)
                training.append(_runs(document))
    known = np.unique(np.concatenate(training)) if training else np.zeros(0, np.uint64)
    result: dict[str, dict[str, float | int]] = {}
    for name, paths in files.items():
        heldout = [document for document in _documents(paths) if is_heldout(digest_of(document))]
        if both := sum(digest_of(document) in trained_on for document in heldout):
            raise RunError(f"{both} held-out documents of {name} are also trained on")
        runs = (
            np.concatenate([_runs(document) for document in heldout])
            if heldout
            else np.zeros(0, np.uint64)
        )
        found = float(np.isin(runs, known).mean()) if len(runs) else 0.0
        result[name] = {
            "documents": len(heldout),
            "runs": len(runs),
            "share_in_training_text": found,
        }
    return result


def _documents(paths: Sequence[Path]) -> Iterator[str]:
    return (document for path in paths for document in read_documents(path))


def _runs(document: str) -> np.ndarray:
    """uint64 digests of every WORDS words in a row, lower case, without punctuation."""
    words = np.array(
        [zlib.crc32(word.encode()) for word in re.findall(r"\w+", document.lower())], np.uint64
    )
    if len(words) < WORDS:
        return np.zeros(0, np.uint64)
    digests = np.zeros(len(words) - WORDS + 1, np.uint64)
    with np.errstate(over="ignore"):
        for i in range(WORDS):
            digests = (
                digests * np.uint64(0x9E3779B97F4A7C15) + words[i : len(words) - WORDS + 1 + i]
            )
    return digests
