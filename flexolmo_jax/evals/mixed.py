"""Mixed documents: two domains in one text, which no single-domain model knows all of; the case
that merging is for."""

import numpy as np

from flexolmo_jax.data.records import Record
from flexolmo_jax.data.tokenizer import Tokenizer
from flexolmo_jax.data.tokens import Source


def mixed_documents(
    first: Source, second: Source, tokenizer: Tokenizer, count: int
) -> list[Record]:
    """At most so many records, each one document: its first half from a record of one source, its
    second half from one of the other.

    Ends of the documents inside a half are left out. Records with less than half a record of text
    are passed over.
    """
    half = first.seq_len // 2

    def halves(source: Source) -> list[np.ndarray]:
        found = []
        for i in range(len(source)):
            record = source[i]
            text = record["tokens"][
                (record["segments"] > 0) & (record["tokens"] != tokenizer.eos_id)
            ]
            if len(text) >= half:
                found.append(text[:half])
            if len(found) == count:
                break
        return found

    pairs = zip(halves(first), halves(second), strict=False)  # as many as the shorter has
    return [
        {"tokens": np.concatenate(pair), "segments": np.ones(2 * half, np.int32)} for pair in pairs
    ]
