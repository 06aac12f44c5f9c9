"""A domain's documents on a Ray cluster: those of each shard that its embedding may be the mean of.

They are the ones with the smallest digests. Of the documents of all shards, the smallest are among
the smallest of their shards. So the embedding is, bit for bit, that of one process.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from flexolmo_jax.config import Reading
from flexolmo_jax.data.documents import read_training_documents
from flexolmo_jax.data.over_shards import Columns, Files, over_shards, seen
from flexolmo_jax.runtime.cluster import connected, on_workers

from .embedder import DOMAIN_DOCUMENTS, sample


def sampled(paths: Sequence[Path], heldout: float, reading: Reading, address: str) -> Iterator[str]:
    """Documents of all shards. Raises what `connected` raises, and what reading them does."""
    with connected(address):
        call = on_workers("flexolmo_jax.exchange.sampling", "sample_shard")
        for row in over_shards(paths, reading, call, heldout=heldout):
            yield row["text"]


def sample_shard(
    batch: Columns, files: Files, reading: Reading, heldout: float
) -> Iterator[Columns]:
    """On a worker: the documents of a shard with the smallest digests."""
    for shard in batch["shard"].tolist():
        paths = seen(files[shard])
        texts = (t for path in paths for t in read_training_documents(path, heldout, reading))
        kept = sample((text for text in texts if text.strip()), DOMAIN_DOCUMENTS)
        yield {"text": np.array(kept, dtype=object)}
