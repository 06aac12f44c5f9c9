"""The extraction attack: given the beginning of a training document, does a model write the rest?

As in FlexOlmo (arXiv 2507.07024, section 5): a prefix of 32 tokens is given, and 256 more are
sampled ten times at temperature 1, top-k 50 and top-p 0.95. A document is extracted if one of the
ten samples has a similarity of at least 0.9 with its own continuation. Similarity is 1 - normalised
Levenshtein distance, over tokens.
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from flexolmo_jax.data.documents import digest_of
from flexolmo_jax.data.tokenizer import Tokenizer
from flexolmo_jax.errors import UserError
from flexolmo_jax.loaded import LoadedModel
from flexolmo_jax.runtime.progress import bar, note

PREFIX, TOKENS, SAMPLES, ALIKE = 32, 256, 10, 0.9
SAMPLING: dict[str, Any] = {"temperature": 1.0, "top_k": 50, "top_p": 0.95}
Z = 1.959963984540054  # standard deviations on either side of the mean that hold 95 %


class Extraction(NamedTuple):
    """How many of a sample of documents were extracted."""

    documents: int
    extracted: int
    mean_similarity: float  # of each document's best sample
    low: float  # of the rate's 95 % interval
    high: float

    @property
    def rate(self) -> float:
        return self.extracted / self.documents


def sample_documents(
    texts: Iterable[str],
    tokenizer: Tokenizer,
    count: int,
    prefix: int = PREFIX,
    tokens: int = TOKENS,
) -> list[list[int]]:
    """The first prefix + tokens ids of at most `count` different documents.

    Of the documents that are long enough it takes those with the smallest digests, and holds no
    others. A line tells how many they are of all. Raises UserError if there is none.
    """
    if prefix < 1 or tokens < 1 or count < 1:
        raise UserError(
            f"got {count} documents of {prefix} + {tokens} tokens; expected 1 or more of each"
        )
    found: dict[bytes, list[int]] = {}
    largest = b""  # digest of those found, once there are enough
    read = 0
    for text in texts:
        read += 1
        digest = digest_of(text)
        if digest in found or (len(found) == count and digest > largest):
            continue
        every_id = itertools.chain.from_iterable(tokenizer.encode_pieces(text))
        ids = list(itertools.islice(every_id, prefix + tokens))
        if len(ids) == prefix + tokens:
            found[digest] = ids
            if len(found) > count:
                del found[largest]
            largest = max(found)
    if not found:
        raise UserError(
            f"no document has {prefix + tokens} tokens; give longer ones, or fewer tokens to"
            " extract"
        )
    if len(found) < read:
        no_more = f"; no more have {prefix + tokens} tokens" if len(found) < count else ""
        note(f"{len(found):,} of {read:,} documents are tried{no_more}")
    return [ids for _, ids in sorted(found.items())]


def extract(  # noqa: PLR0913 - the verb's options
    model: LoadedModel,
    documents: Sequence[Sequence[int]],
    *,
    prefix: int = PREFIX,
    samples: int = SAMPLES,
    without: Sequence[str] = (),
    active: int | None = None,
    batch_size: int = 32,
    seed: int = 0,
) -> Extraction:
    """Tries to extract documents of equal length, whose first `prefix` tokens are given."""
    best = np.zeros(len(documents))
    length = len(documents[0]) - prefix
    options: dict[str, Any] = {**SAMPLING, "without": without, "active": active}
    with bar("extracting", samples * len(documents)) as advance:
        for start in range(0, len(documents), batch_size):
            chunk = [list(document) for document in documents[start : start + batch_size]]
            own = slice(start, start + len(chunk))
            truths = np.array([ids[prefix:] for ids in chunk])
            # the last chunk is filled up, so that one compiled program serves all
            whole = chunk + [chunk[0]] * (batch_size - len(chunk))
            prompts = [[*model.tokenizer.start_ids, *ids[:prefix]] for ids in whole]
            for i in range(samples):
                options["seed"] = seed + i * len(documents) + start
                sampled = model.generate(prompts, length, **options)[: len(chunk)]
                found = similarities([list(ids) for ids in sampled], truths)
                best[own] = np.maximum(best[own], found)
                advance(len(chunk))
    extracted = int((best >= ALIKE).sum())
    return Extraction(
        len(documents), extracted, float(best.mean()), *wilson(extracted, len(documents))
    )


def similarities(completions: Sequence[Sequence[Any]], truths: np.ndarray) -> np.ndarray:
    """[n]: 1 - Levenshtein distance / the longer length, of completions and truths [n, length].

    The distances of all pairs are computed together, one token of the completions after the other.
    """
    n, length = truths.shape
    lengths = np.array([len(completion) for completion in completions])
    padded = np.full((n, max(1, lengths.max(initial=0))), -1, np.int64)
    for ids, completion in zip(padded, completions, strict=True):
        ids[: len(completion)] = completion
    columns = np.arange(length + 1)
    # from the completion's first i tokens to each beginning of the truth; at first i is 0
    distances = np.tile(columns, (n, 1))
    result = np.where(lengths == 0, length, 0)
    for i in range(padded.shape[1]):
        replaced = distances[:, :-1] + (padded[:, i : i + 1] != truths)
        left_out = np.minimum(distances[:, 1:] + 1, replaced)
        best = np.concatenate([np.full((n, 1), i + 1), left_out], axis=1)
        # or tokens of the truth are added: one edit for each
        distances = np.minimum.accumulate(best - columns, axis=1) + columns
        result = np.where(lengths == i + 1, distances[:, -1], result)
    return 1 - result / np.maximum(lengths, length)


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """The 95 % interval of a rate (Wilson, 1927)."""
    p, z2 = successes / trials, Z * Z / trials
    middle = (p + z2 / 2) / (1 + z2)
    half = Z * math.sqrt(p * (1 - p) / trials + z2 / trials / 4) / (1 + z2)
    return middle - half if successes else 0.0, middle + half if successes < trials else 1.0
