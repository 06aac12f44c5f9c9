"""How much of the held-out text is in the training text.

No whole document may be. Runs of words are counted: some, like licences, are in many documents.
"""

import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from flexolmo_jax.data.documents import digest_of, is_heldout, read_documents
from flexolmo_jax.errors import RunError

WORDS = 13  # in a run, as GPT-3's authors counted (arXiv 2005.14165, appendix C)


def overlaps(
    public: Sequence[Path], text: Mapping[str, Path], domains: Sequence[str]
) -> dict[str, dict[str, float | int]]:
    """By domain: how many documents are held out, and the share of their runs in training text.

    Training text is what any model of the study sees. Raises RunError if a held-out document is a
    training document too.
    """
    files = {"public": list(public)} | {domain: [text[domain]] for domain in domains}
    trained_on, training = set[bytes](), []
    for paths in files.values():
        for document in _documents(paths):
            if not is_heldout(digest := digest_of(document)):
                trained_on.add(digest)
                training.append(_runs(document))
    known = np.unique(np.concatenate([np.zeros(0, np.uint64), *training]))
    result: dict[str, dict[str, float | int]] = {}
    for name, paths in files.items():
        heldout = [document for document in _documents(paths) if is_heldout(digest_of(document))]
        if both := sum(digest_of(document) in trained_on for document in heldout):
            raise RunError(f"{both} held-out documents of {name} are also trained on")
        runs = np.concatenate([np.zeros(0, np.uint64), *map(_runs, heldout)])
        share = float(np.isin(runs, known).mean()) if len(runs) else 0.0
        result[name] = {
            "documents": len(heldout),
            "runs": len(runs),
            "share_in_training_text": share,
        }
    return result


def _documents(paths: Sequence[Path]) -> Iterator[str]:
    return (document for path in paths for document in read_documents(path))


def _runs(document: str) -> np.ndarray:
    """uint64 digests of every WORDS consecutive words, lower case, without punctuation."""
    words = re.findall(r"\w+", document.lower())
    digests = np.array([zlib.crc32(word.encode()) for word in words], np.uint64)
    count = max(0, len(words) - WORDS + 1)
    of_runs = np.zeros(count, np.uint64)
    with np.errstate(over="ignore"):
        for i in range(WORDS):
            of_runs = of_runs * np.uint64(0x9E3779B97F4A7C15) + digests[i : i + count]
    return of_runs
