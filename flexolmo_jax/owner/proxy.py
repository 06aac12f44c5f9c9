"""Proxies: public documents like an owner's private ones, for tuning the router after a merge.

The owner chooses them. A classifier learns private against public from an embedder's vectors of
both (FlexOlmo, arXiv 2507.07024, section 3.3). It scores the public documents, and those most like
private ones are kept. It is trained twice, on one half of the documents each, so that every
document is scored by the classifier that has not seen it.

Only public documents leave the owner, ordered by their digests. The choice tells something about
the private ones, as a domain's name does. That is by design. A document that is both private and
public is neither learnt from nor chosen: choosing it would tell that the owner has it.
"""

import contextlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flexolmo_jax.artifact import Artifact
from flexolmo_jax.config import Reading
from flexolmo_jax.data.documents import AS_TEXT, HELDOUT, digest_of
from flexolmo_jax.data.over_shards import everywhere
from flexolmo_jax.errors import UserError
from flexolmo_jax.exchange.anchor import open_anchor
from flexolmo_jax.exchange.embedder import Embedder, load_embedder, widened
from flexolmo_jax.owner.classifier import Classifier, Classifiers, half
from flexolmo_jax.owner.proxy_cluster import OnCluster, Published
from flexolmo_jax.owner.proxy_documents import Corpus, Counted, Documents, InProcess, chunks
from flexolmo_jax.runtime.cluster import connected
from flexolmo_jax.runtime.progress import bar
from flexolmo_jax.storage.files import write_new
from flexolmo_jax.storage.outputs import check_new_file
from flexolmo_jax.storage.paths import takes_paths

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


@takes_paths
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
    ray: str | None = None,
    reading: Reading = AS_TEXT,
    public_reading: Reading | None = None,
) -> Proxies:
    """Writes a share of the public documents, those most like the private ones, as a .jsonl.

    Documents held out for evaluation are neither learnt from nor chosen. In memory is the text of
    the documents that are learnt from and of the candidates only.

    Args:
        share: the part of the public documents to choose.
        diversity: candidates for each document to choose. Above 1, a greedy determinantal point
            process chooses among them: it weighs likeness to the private documents against likeness
            to the chosen ones.
        heldout: the share of documents that is for evaluation only.
        allow_hub: see `load_embedder`.
        ray: the address of a Ray cluster that reads and scores the documents, as `connected` takes
            it; None is this process alone. The choice is the same.
        reading: how documents are read; `public_reading`: public ones, if otherwise.

    Raises:
        UserError: for an output that exists or is not a .jsonl, and for too few documents of either
            kind.
    """
    _check(out, share, diversity)
    anchor = open_anchor(anchor_path)
    embedder = widened(_embedder(anchor, allow_hub))
    both = Corpus(private, reading), Corpus(public, public_reading or reading)
    with _documents(*both, heldout, anchor, allow_hub, ray) as documents:
        counted = documents.count(MOST)
        learnt_from = _learnt_from(documents, counted)
        classifiers, accuracy = _fitted(embedder, learnt_from)
        count = max(1, round(share * counted.public))
        scored = documents.score(embedder, classifiers, count * diversity)
        candidates = {digest: score for score, digest in scored}
        chosen = {digest_of(text): text for text in documents.texts(candidates, private=False)}
    kept = sorted(candidates) if diversity == 1 else _diverse(embedder, chosen, candidates, count)
    _write(out, (chosen[digest] for digest in sorted(kept)))
    learnt = sum(is_private for _, is_private in learnt_from.values())
    return Proxies(len(kept), counted.public, accuracy, learnt)


def _write(out: Path, texts: Iterable[str]) -> None:
    lines = (json.dumps({"text": text}, ensure_ascii=False) for text in texts)
    write_new(out, "".join(f"{line}\n" for line in lines).encode())


def _check(out: Path, share: float, diversity: int) -> None:
    if out.suffix != ".jsonl":
        raise UserError(f"--out is {out}; expected a new file that ends in .jsonl")
    check_new_file(out)
    if not 0 < share < 1 or diversity < 1:
        raise UserError(
            f"--share is {share} and --diversity {diversity}; expected a share between 0 and 1, and"
            " a diversity of 1 or more"
        )


def _embedder(anchor: Artifact, allow_hub: bool) -> Embedder:
    loaded = load_embedder(anchor.path / "embedder", anchor.config.d_model, allow_hub=allow_hub)
    anchor.ensure()  # again, now that it is read
    return loaded


@contextlib.contextmanager
def _documents(
    private: Corpus,
    public: Corpus,
    heldout: float,
    anchor: Artifact,
    allow_hub: bool,
    ray: str | None,
) -> Iterator[Documents]:
    if ray is None:
        yield InProcess(private, public, heldout)
        return
    place = everywhere(anchor.path / "embedder")
    published = Published(place, anchor.config.d_model, allow_hub)
    with connected(ray):
        yield OnCluster(private, public, heldout, published)


def _learnt_from(documents: Documents, counted: Counted) -> dict[bytes, tuple[str, bool]]:
    """The documents to learn from, by digest: the text, and whether it is private.

    They are as many private as public ones. Raises UserError where there are too few.
    """
    count = min(counted.private, counted.public, MOST)
    if count < FEWEST:
        raise UserError(
            f"there are {counted.private} private and {counted.public} public documents to learn"
            f" from ({counted.both} are both, held-out ones are not counted); expected at least"
            f" {FEWEST} of each"
        )
    own = documents.texts(counted.private_digests[:count], private=True)
    others = documents.texts(counted.public_digests[:count], private=False)
    return {digest_of(text): (text, True) for text in own} | {
        digest_of(text): (text, False) for text in others
    }


def _fitted(
    embedder: Embedder, learnt_from: dict[bytes, tuple[str, bool]]
) -> tuple[Classifiers, float]:
    """Classifiers of private text, and their accuracy on documents they were not fitted on."""
    digests = sorted(learnt_from)
    texts = [learnt_from[digest][0] for digest in digests]
    labels = np.array([learnt_from[digest][1] for digest in digests], np.float32)
    vectors = _embed(embedder, texts, "embedding what is learnt from")
    halves = np.array([half(digest) for digest in digests])
    first, second = (fit(vectors[halves == one], labels[halves == one]) for one in (0, 1))
    classifiers = Classifiers((first, second))
    return classifiers, float(np.mean((classifiers.logits(digests, vectors) > 0) == (labels > 0)))


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
        for chunk in chunks(texts):
            vectors.append(embedder.embed(chunk))
            advance(len(chunk))
    return np.concatenate(vectors)
