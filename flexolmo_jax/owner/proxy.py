"""Proxies: public documents like an owner's private ones, for tuning the router after a merge.

The owner chooses them. A classifier learns private against public from an embedder's vectors of
both (FlexOlmo, arXiv 2507.07024, section 3.3). It scores the public documents, and those most like
private ones are kept. It is trained twice, on one half of the documents each, so that every
document is scored by the classifier that has not seen it.

Only public documents leave the owner, ordered by their digests. The choice tells something about
the private ones, as a domain's name does. That is by design. A document that is both private and
public is neither learnt from nor chosen: choosing it would tell that the owner has it.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flexolmo_jax.artifact import Artifact
from flexolmo_jax.data.documents import HELDOUT, digest_of, read_training_documents
from flexolmo_jax.errors import UserError
from flexolmo_jax.exchange.anchor import open_anchor
from flexolmo_jax.exchange.embedder import CHUNK, Embedder, load_embedder, widened
from flexolmo_jax.runtime.progress import bar
from flexolmo_jax.storage.files import write_new
from flexolmo_jax.storage.outputs import check_new_file

SHARE = 0.01  # of the public documents
# documents of each kind that the classifiers are trained on (the paper: 500k, balanced)
FEWEST, MOST = 10, 250_000
GROUP = 4096  # candidates among which diverse ones are chosen at once
# added to the kernel's diagonal, relative to it: then more documents can be chosen than vectors
# have numbers
RIDGE = 1e-3


class Proxies(NamedTuple):
    """How many documents were chosen, and how accurate the classifiers were."""

    documents: int
    of: int  # public documents that were scored
    accuracy: float  # on documents they were not trained on, as many private as public
    private: int  # private documents they were trained on, and as many public ones

    @property
    def share(self) -> float:
        return self.documents / self.of


def select_proxies(  # noqa: PLR0913 - the verb's options
    anchor_path: Path,
    private: Sequence[Path],
    public: Sequence[Path],
    out: Path,
    *,
    share: float = SHARE,
    diversity: int = 1,
    heldout: float = HELDOUT,
    allow_hub: bool = False,
) -> Proxies:
    """Writes a share of the public documents, those most like the private ones, as a .jsonl.

    Documents held out for evaluation are neither learnt from nor chosen. In memory is the text of
    the private documents and of the candidates only.

    Args:
        share: the part of the public documents to choose.
        diversity: candidates for each document to choose. Above 1, a greedy determinantal point
            process chooses among them: it weighs likeness to the private documents against likeness
            to the chosen ones.
        heldout: the share of documents that is for evaluation only.
        allow_hub: see `load_embedder`.

    Raises:
        UserError: for an output that exists or is not a .jsonl, and for too few documents of either
            kind.
    """
    if out.suffix != ".jsonl":
        raise UserError(f"--out is {out}; expected a new file that ends in .jsonl")
    check_new_file(out)
    if not 0 < share < 1 or diversity < 1:
        raise UserError(
            f"--share is {share} and --diversity {diversity}; expected a share between 0 and 1, and"
            " a diversity of 1 or more"
        )
    anchor = open_anchor(anchor_path)
    loaded = _embedder(anchor, allow_hub)
    embedder = widened(loaded)
    learnt_from, seen = _learnt_from(private, public, heldout)
    classifiers, accuracy = _fitted(embedder, learnt_from)
    scored = _scored(classifiers, embedder, _distinct(public, heldout, seen), len(seen))
    count = max(1, round(share * len(scored)))
    candidates = {digest: score for score, digest in scored[: count * diversity]}
    chosen = {digest_of(text): text for text in _distinct(public, heldout, set(candidates))}
    kept = sorted(candidates) if diversity == 1 else _diverse(embedder, chosen, candidates, count)
    lines = (json.dumps({"text": chosen[digest]}, ensure_ascii=False) for digest in sorted(kept))
    write_new(out, "".join(f"{line}\n" for line in lines).encode())
    learnt = sum(is_private for _, is_private in learnt_from.values())
    return Proxies(len(kept), len(scored), accuracy, learnt)


def _embedder(anchor: Artifact, allow_hub: bool) -> Embedder:
    loaded = load_embedder(anchor.path / "embedder", anchor.config.d_model, allow_hub=allow_hub)
    anchor.ensure()  # again, now that it is read
    return loaded


def _learnt_from(
    private: Sequence[Path], public: Sequence[Path], heldout: float
) -> tuple[dict[bytes, tuple[str, bool]], set[bytes]]:
    """The documents to learn from, and the digests of all documents that are only public.

    The former are as many private as public ones, by digest: the text, and whether it is private.
    Raises UserError where there are too few.
    """
    own = {digest_of(text): text for text in _documents(private, heldout)}
    both, seen = set[bytes](), set[bytes]()
    for text in _documents(public, heldout):
        digest = digest_of(text)
        (both if digest in own else seen).add(digest)
    own = {digest: own[digest] for digest in sorted(own.keys() - both)}
    count = min(len(own), len(seen), MOST)
    if count < FEWEST:
        raise UserError(
            f"there are {len(own)} private and {len(seen)} public documents to learn from"
            f" ({len(both)} are both, held-out ones are not counted); expected at least {FEWEST} of"
            " each"
        )
    learnt_from = {digest: (own[digest], True) for digest in list(own)[:count]}
    for text in _distinct(public, heldout, set(sorted(seen)[:count])):
        learnt_from[digest_of(text)] = text, False
    return learnt_from, seen


def _fitted(
    embedder: Embedder, learnt_from: dict[bytes, tuple[str, bool]]
) -> tuple["Classifiers", float]:
    """Classifiers of private text, and their accuracy on documents they were not fitted on."""
    digests = sorted(learnt_from)
    texts = [learnt_from[digest][0] for digest in digests]
    labels = np.array([learnt_from[digest][1] for digest in digests], np.float32)
    vectors = _embed(embedder, texts, "embedding what is learnt from")
    classifiers = Classifiers.fit(digests, vectors, labels)
    return classifiers, float(np.mean((classifiers.logits(digests, vectors) > 0) == (labels > 0)))


def _scored(
    classifiers: "Classifiers", embedder: Embedder, texts: Iterator[str], count: int
) -> list[tuple[float, bytes]]:
    """Each document's logit and digest, the most private-like first."""
    scored: list[tuple[float, bytes]] = []
    with bar("scoring public documents", count) as advance:
        for chunk in _chunks(texts):
            digests = [digest_of(text) for text in chunk]
            logits = classifiers.logits(digests, embedder.embed(chunk)).tolist()
            scored += zip(logits, digests, strict=True)
            advance(len(chunk))
    return sorted(scored, key=lambda one: (-one[0], one[1]))


class Classifiers(NamedTuple):
    """Two classifiers, each trained on one half of the documents to judge the other half."""

    each: tuple["Classifier", "Classifier"]

    @classmethod
    def fit(
        cls, digests: Sequence[bytes], vectors: np.ndarray, labels: np.ndarray
    ) -> "Classifiers":
        halves = np.array([_half(digest) for digest in digests])
        first, second = (fit(vectors[halves == half], labels[halves == half]) for half in (0, 1))
        return cls((first, second))

    def logits(self, digests: Sequence[bytes], vectors: np.ndarray) -> np.ndarray:
        """Logits [n] of documents, above 0 where one seems private."""
        first, second = (vectors @ one.coefficients + one.bias for one in self.each)
        return np.where([_half(digest) for digest in digests], first, second)


class Classifier(NamedTuple):
    """A linear classifier: the logit of a vector x is x @ coefficients + bias."""

    coefficients: np.ndarray  # [F]
    bias: float


def fit(vectors: np.ndarray, labels: np.ndarray, steps: int = 100) -> Classifier:
    """Logistic regression of labels 0 and 1 on vectors [n, F], by L-BFGS.

    The prior of the coefficients is Gaussian with a standard deviation of 1.
    """
    n = len(labels)
    # Unit vectors times this have entries of about 1.
    scale = np.float32(np.sqrt(vectors.shape[1]))

    def loss(model):
        logits = vectors @ (scale * model[0]) + model[1]
        prior = jnp.sum((scale * model[0]) ** 2) / (2 * n)
        return jnp.mean(jnp.logaddexp(0, logits) - labels * logits) + prior

    solver = optax.lbfgs()

    @jax.jit
    def solve():
        model = (jnp.zeros(vectors.shape[1]), jnp.zeros(()))
        value_and_gradient = optax.value_and_grad_from_state(loss)

        def step(_, carry):
            model, state = carry
            value, gradient = value_and_gradient(model, state=state)
            updates, state = solver.update(
                gradient, state, model, value=value, grad=gradient, value_fn=loss
            )
            return optax.apply_updates(model, updates), state

        return jax.lax.fori_loop(0, steps, step, (model, solver.init(model)))[0]

    coefficients, bias = solve()
    return Classifier(np.asarray(scale * coefficients), float(bias))


def diverse(vectors: np.ndarray, quality: np.ndarray, count: int) -> list[int]:
    """`count` items, greedily the likeliest set under a determinantal point process, in order.

    The method is that of Chen et al. (arXiv 1709.05135). The kernel is quality_i * quality_j *
    cosine(vectors i, j): a set is likelier if its items are better and less alike.
    """
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    left = quality.astype(np.float64) ** 2 * (1 + RIDGE)
    basis = np.zeros((count, len(unit)))
    chosen: list[int] = []
    for step in range(min(count, len(unit))):
        best = int(np.argmax(left))
        chosen.append(best)
        alike = quality * quality[best] * (unit @ unit[best]) - basis[:step].T @ basis[:step, best]
        basis[step] = alike / np.sqrt(left[best])
        left = np.maximum(left - basis[step] ** 2, 1e-30)
        left[chosen] = -np.inf
    return chosen


def _diverse(
    embedder: Embedder, texts: dict[bytes, str], scores: dict[bytes, float], count: int
) -> list[bytes]:
    """The digests of `count` diverse texts: the same share of each group of at most GROUP texts."""
    order = sorted(texts)
    groups = np.array_split(np.arange(len(order)), -(-len(order) // GROUP))
    sizes = np.cumsum([0, *(len(group) for group in groups)])
    ends = np.round(sizes * count / len(order)).astype(int)
    kept = []
    for group, start, end in zip(groups, ends[:-1], ends[1:], strict=True):
        digests = [order[i] for i in group]
        quality = np.array([1 / (1 + np.exp(-scores[digest])) for digest in digests])
        vectors = _embed(embedder, [texts[digest] for digest in digests], "embedding candidates")
        kept += [digests[i] for i in diverse(vectors, quality, int(end - start))]
    return kept


def _embed(embedder: Embedder, texts: Sequence[str], title: str) -> np.ndarray:
    """The vectors of texts, with a bar of this title."""
    vectors = []
    with bar(title, len(texts)) as advance:
        for chunk in _chunks(texts):
            vectors.append(embedder.embed(chunk))
            advance(len(chunk))
    return np.concatenate(vectors)


def _chunks(texts: Iterable[str]) -> Iterator[list[str]]:
    chunk: list[str] = []
    for text in texts:
        chunk.append(text)
        if len(chunk) == CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _documents(paths: Sequence[Path], heldout: float) -> Iterator[str]:
    for path in paths:
        yield from (text for text in read_training_documents(path, heldout) if text.strip())


def _distinct(paths: Sequence[Path], heldout: float, wanted: set[bytes]) -> Iterator[str]:
    """The documents with a wanted digest, each once."""
    left = set(wanted)
    for text in _documents(paths, heldout):
        digest = digest_of(text)
        if digest in left:
            left.remove(digest)
            yield text


def _half(digest: bytes) -> int:
    """The half that a document is in, 0 or 1; other bytes decide what is held out."""
    return digest[-1] & 1
