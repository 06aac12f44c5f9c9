"""The documents that proxies are chosen by and from, on a Ray cluster.

Workers read, embed and score a shard at a time. The public documents' digests are counted by a
shuffle, and are nowhere together. Here, and on every worker, are the digests of the private ones;
here are also the texts that are learnt from and the candidates. The choice is, bit for bit, that of
one process: a document's score does not depend on those beside it.
"""

import functools
import itertools
from collections.abc import Collection, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from flexolmo_jax.config import Reading
from flexolmo_jax.data.documents import digest_of
from flexolmo_jax.data.over_shards import (
    Columns,
    Files,
    files_of,
    mapped,
    over_shards,
    seen,
    shards_in,
)
from flexolmo_jax.exchange.embedder import Embedder, load_embedder, widened
from flexolmo_jax.owner.classifier import Classifiers
from flexolmo_jax.owner.proxy_documents import (
    Corpus,
    Counted,
    Scored,
    chunks,
    distinct,
    in_order,
    scores,
    training_documents,
)
from flexolmo_jax.runtime.cluster import on_workers
from flexolmo_jax.runtime.progress import note

PARTITIONS = 200  # of the public digests
ROWS = 1 << 16  # digests that a worker hands on at once
DIGEST = np.dtype("V32")  # compares as bytes do, zeros at the end included
_HERE = "flexolmo_jax.owner.proxy_cluster"


class Published(NamedTuple):
    """Where every worker finds the embedder."""

    directory: str
    dim: int
    allow_hub: bool


class OnCluster:
    """Documents that workers read, inside `connected`."""

    def __init__(self, private: Corpus, public: Corpus, heldout: float, embedder: Published):
        self._private, self._public, self._heldout = private, public, heldout
        self._embedder = embedder
        self._own = b""  # the private digests in order, one behind the other

    def count(self, most: int) -> Counted:
        found = self._over(self._private, "read_digests", partitions=1)
        own = np.unique(_digests(b"".join(row["digests"] for row in found)))
        self._own = own.tobytes()
        note(f"{len(own)} private documents are read")
        public, both, first = 0, [], [_digests(b"")]
        for row in self._partitions(most):
            public += row["public"]
            both.append(_digests(row["both"]))
            first.append(_digests(row["first"]))
        only_own = np.setdiff1d(own, np.concatenate(both)) if both else own
        return Counted(
            len(only_own),
            public,
            len(own) - len(only_own),
            only_own[:most].tolist(),
            np.sort(np.concatenate(first))[:most].tolist(),
        )

    def texts(self, wanted: Collection[bytes], *, private: bool) -> Iterator[str]:
        corpus = self._private if private else self._public
        found = self._over(corpus, "find_texts", wanted=b"".join(sorted(wanted)))
        return distinct((row["text"] for row in found), wanted)

    def score(self, embedder: Embedder, classifiers: Classifiers, most: int) -> Scored:
        how = {"own": self._own, "published": self._embedder, "classifiers": classifiers}
        best: dict[bytes, float] = {}
        for row in self._over(self._public, "score_shard", **how):
            logits = np.frombuffer(row["logits"]).tolist()
            best |= zip(_digests(row["digests"]).tolist(), logits, strict=True)
            if len(best) > 2 * most + ROWS:
                best = {digest: logit for logit, digest in _first(best, most)}
        return _first(best, most)

    def _over(self, corpus: Corpus, function: str, **how: Any) -> Iterator[dict[str, Any]]:
        return over_shards(*corpus, on_workers(_HERE, function), heldout=self._heldout, **how)

    def _partitions(self, most: int) -> Iterator[dict[str, Any]]:
        """What `count_partition` says of each partition of the public digests."""
        shards = shards_in(*self._public)
        partitions = min(len(shards), PARTITIONS)
        how: dict[str, Any] = {"files": files_of(shards), "reading": self._public.reading}
        how |= {"heldout": self._heldout, "partitions": partitions}
        digests = mapped(shards, on_workers(_HERE, "read_digests"), **how)
        counted = digests.groupby("partition", partitions).map_groups(
            on_workers(_HERE, "count_partition"), fn_kwargs={"own": self._own, "most": most}
        )
        yield from counted.iter_rows()


# ---- on workers ----


def read_digests(
    batch: Columns, files: Files, reading: Reading, heldout: float, partitions: int
) -> Iterator[Columns]:
    """The digests of a shard, those of each partition one behind the other."""
    for shard in batch["shard"].tolist():
        texts = training_documents(seen(files[shard]), reading, heldout)
        while digests := list(map(digest_of, itertools.islice(texts, ROWS))):
            parts: list[list[bytes]] = [[] for _ in range(partitions)]
            for digest in digests:
                parts[int.from_bytes(digest[8:16], "big") % partitions].append(digest)
            yield {"partition": np.arange(partitions), "digests": _objects(map(b"".join, parts))}


def count_partition(partition: Columns, own: bytes, most: int) -> Columns:
    """How many public documents there are, which are private too, and the smallest others."""
    digests = np.unique(_digests(b"".join(partition["digests"].tolist())))
    is_own = np.isin(digests, _digests(own))
    others = digests[~is_own]
    return {
        "public": np.array([len(others)]),
        "both": _objects([digests[is_own].tobytes()]),
        "first": _objects([others[:most].tobytes()]),
    }


def find_texts(
    batch: Columns, files: Files, reading: Reading, heldout: float, wanted: bytes
) -> Iterator[Columns]:
    """The documents of a shard with a wanted digest, each once."""
    digests = set(_digests(wanted).tolist())
    for shard in batch["shard"].tolist():
        texts = training_documents(seen(files[shard]), reading, heldout)
        for chunk in chunks(distinct(texts, digests)):
            yield {"text": _objects(chunk)}


def score_shard(  # noqa: PLR0913 - what a worker needs to score
    batch: Columns,
    files: Files,
    reading: Reading,
    heldout: float,
    own: bytes,
    published: Published,
    classifiers: Classifiers,
) -> Iterator[Columns]:
    """The scores of a shard's documents that are not private, each once."""
    embedder, private = _embedder(published), set(_digests(own).tolist())
    for shard in batch["shard"].tolist():
        done = set(private)
        texts = training_documents(seen(files[shard]), reading, heldout)
        for chunk in chunks(_new(texts, done)):
            logits, digests = zip(*scores(chunk, embedder, classifiers), strict=True)
            yield {
                "digests": _objects([b"".join(digests)]),
                "logits": _objects([np.array(logits).tobytes()]),
            }


@functools.lru_cache(1)
def _embedder(published: Published) -> Embedder:
    (directory,) = seen([published.directory])
    return widened(load_embedder(directory, published.dim, allow_hub=published.allow_hub))


def _new(texts: Iterator[str], done: set[bytes]) -> Iterator[str]:
    """The texts whose digests are not done yet, which they are then."""
    for text in texts:
        if (digest := digest_of(text)) not in done:
            done.add(digest)
            yield text


def _objects(values: Iterable[Any]) -> np.ndarray:
    """An array of Python's objects, which NumPy would otherwise turn into its own kinds."""
    found = list(values)
    array = np.empty(len(found), object)
    array[:] = found
    return array


def _digests(data: bytes) -> np.ndarray:
    return np.frombuffer(data, DIGEST)


def _first(best: dict[bytes, float], most: int) -> Scored:
    return in_order([(logit, digest) for digest, logit in best.items()])[:most]
