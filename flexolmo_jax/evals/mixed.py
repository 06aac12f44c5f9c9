"""Mixed documents: text of two domains, all of which no model of one domain knows.

This is the case that merging is for.
"""

import numpy as np

from flexolmo_jax.data.records import Record
from flexolmo_jax.data.sample import sample_of
from flexolmo_jax.data.tokenizer import Tokenizer
from flexolmo_jax.data.tokens import Source


def mixed_documents(
    first: Source, second: Source, tokenizer: Tokenizer, count: int
) -> list[Record]:
    """At most `count` records, each one document: half from the first source, half from the second.

    The records of a source are a sample of it. Of those with less than half a record of text others
    take the place. BOS and EOS tokens inside a half are left out.
    """
    half = first.seq_len // 2

    def halves(source: Source) -> list[np.ndarray]:
        found = []
        sample = sample_of(len(source), count)
        for i in [*sample, *sorted(set(range(len(source))).difference(sample))]:
            record = source[i]
            around = [*tokenizer.start_ids, tokenizer.eos_id]
            is_text = (record["segments"] > 0) & ~np.isin(record["tokens"], around)
            text = record["tokens"][is_text]
            if len(text) >= half:
                found.append(text[:half])
            if len(found) == count:
                break
        return found

    pairs = zip(halves(first), halves(second), strict=False)  # as many as the shorter has
    start = np.array(tokenizer.start_ids, np.int32)
    segments = np.ones(2 * half, np.int32)
    return [
        {"tokens": np.concatenate([start, *pair])[: 2 * half], "segments": segments}
        for pair in pairs
    ]
