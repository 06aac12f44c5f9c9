"""The documents of an owner and of the public that proxies are chosen by and from.

They are counted, read and scored here, in one process; `proxy_cluster.py` does the same on a Ray
cluster. Held-out and blank documents are left out, and repeated ones count once.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from flexolmo_jax.config import Reading
from flexolmo_jax.data.documents import AS_TEXT, digest_of, read_training_documents
from flexolmo_jax.exchange.embedder import CHUNK, Embedder
from flexolmo_jax.owner.classifier import Classifiers
from flexolmo_jax.runtime.progress import bar

Scored = list[tuple[float, bytes]]  # logits and digests, the most private-like first


class Corpus(NamedTuple):
    """Files and directories of documents, and how they are read."""

    paths: Sequence[Path]
    reading: Reading = AS_TEXT


class Counted(NamedTuple):
    """How many documents there are; the digests are the smallest ones, in order."""

    private: int  # not public as well
    public: int  # not private as well
    both: int
    private_digests: list[bytes]
    public_digests: list[bytes]


class Documents(Protocol):
    """Documents of an owner and of the public."""

    def count(self, most: int) -> Counted:
        """Counts them, with at most so many digests of each. Has to be called first."""
        ...

    def texts(self, wanted: Collection[bytes], *, private: bool) -> Iterator[str]:
        """The private or public documents with these digests, each once, in any order."""
        ...

    def score(self, embedder: Embedder, classifiers: Classifiers, most: int) -> Scored:
        """The public documents that are not private as well: those most like private ones."""
        ...


class InProcess:
    """Documents that this process reads. All digests are in memory."""

    def __init__(self, private: Corpus, public: Corpus, heldout: float):
        self._private, self._public, self._heldout = private, public, heldout
        self._choosable: set[bytes] = set()

    def count(self, most: int) -> Counted:
        own = set(map(digest_of, training_documents(*self._private, self._heldout)))
        public = set(map(digest_of, training_documents(*self._public, self._heldout)))
        self._choosable = public - own
        only_own = own - public
        return Counted(
            len(only_own),
            len(self._choosable),
            len(own & public),
            sorted(only_own)[:most],
            sorted(self._choosable)[:most],
        )

    def texts(self, wanted: Collection[bytes], *, private: bool) -> Iterator[str]:
        corpus = self._private if private else self._public
        return distinct(training_documents(*corpus, self._heldout), wanted)

    def score(self, embedder: Embedder, classifiers: Classifiers, most: int) -> Scored:
        scored: Scored = []
        with bar("scoring public documents", len(self._choosable)) as advance:
            for chunk in chunks(self.texts(self._choosable, private=False)):
                scored += scores(chunk, embedder, classifiers)
                advance(len(chunk))
        return in_order(scored)[:most]


def training_documents(paths: Iterable[Path], reading: Reading, heldout: float) -> Iterator[str]:
    """The documents of all paths, without held-out and blank ones."""
    for path in paths:
        texts = read_training_documents(path, heldout, reading)
        yield from (text for text in texts if text.strip())


def distinct(texts: Iterable[str], wanted: Collection[bytes]) -> Iterator[str]:
    """The texts with a wanted digest, each once."""
    left = set(wanted)
    for text in texts:
        digest = digest_of(text)
        if digest in left:
            left.remove(digest)
            yield text


def scores(texts: Sequence[str], embedder: Embedder, classifiers: Classifiers) -> Scored:
    """Each document's logit and digest."""
    digests = [digest_of(text) for text in texts]
    logits = classifiers.logits(digests, embedder.embed(texts)).tolist()
    return list(zip(logits, digests, strict=True))


def in_order(scored: Scored) -> Scored:
    """The most private-like first; of equal ones, by digest."""
    return sorted(scored, key=lambda one: (-one[0], one[1]))


def chunks(texts: Iterable[str]) -> Iterator[list[str]]:
    """Lists of as many texts as are embedded at once."""
    chunk: list[str] = []
    for text in texts:
        chunk.append(text)
        if len(chunk) == CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
