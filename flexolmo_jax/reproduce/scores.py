"""The lines of a study's table: every model and ensemble on held-out text and mixed documents."""

import json
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from flexolmo_jax.data.documents import read_training_documents
from flexolmo_jax.data.records import Record, open_records
from flexolmo_jax.data.sample import sample_of, tell_part
from flexolmo_jax.errors import UserError
from flexolmo_jax.evals.bits_per_byte import evaluate
from flexolmo_jax.evals.extraction import extract
from flexolmo_jax.evals.mixed import mixed_documents
from flexolmo_jax.evals.predictors import (
    BranchTrainMerge,
    OfModel,
    Predictor,
    PromptRouting,
    Remembered,
    Soup,
    WeightedSoup,
    bits_per_byte,
)
from flexolmo_jax.exchange.anchor import open_anchor
from flexolmo_jax.exchange.embedder import domain_embedding, load_embedder
from flexolmo_jax.loaded import LoadedModel, load
from flexolmo_jax.runtime.progress import note

from .trial import Trial, write_json

MIXED = "mixed"  # the column of documents of two private domains
SWITCH = 0.01  # of tokens, after which a document may go on as another domain's


class Line(NamedTuple):
    name: str
    predictor: Callable[[], Predictor]  # loaded when the line is scored


def write(trial: Trial, group: str) -> None:
    """Scores a group of lines into `scores/<group>.json`: {line: {column: bits per byte}}.

    Every line has a file of its own too: after a kill, those that were scored before are kept.
    """
    columns, tokenizer = heldout(trial), open_anchor(trial.anchor).tokenizer
    folder = trial.path / "scores" / group
    lines = {}
    for line in LINES[group](trial):
        file = folder / f"{line.name.replace('/', '_')}.json"
        if not file.exists():
            note(f"scoring {line.name}")
            predictor = line.predictor()
            figures = {
                name: bits_per_byte(predictor, records, tokenizer, trial.spec.score_batch)
                for name, records in columns.items()
            }
            write_json(file, figures)
        lines[line.name] = json.loads(file.read_text())
    if group == "merged":
        write_json(trial.path / "scores" / "routing.json", routing(trial))
    write_json(trial.path / "scores" / f"{group}.json", lines)


def write_extraction(trial: Trial) -> None:
    """Attacks documents of the first private domain; writes `scores/extraction.json`, by model."""
    documents, domain = trial.attacked_documents(), trial.spec.domains[0]
    merged = load(trial.path / "merged")
    E = len(merged.experts)
    models: dict[str, tuple[LoadedModel, dict[str, Any]]] = {
        "anchor": (load(trial.anchor), {}),
        f"dense:{domain}": (load(trial.path / f"dense-{domain}"), {}),
        f"pair:{domain}": (load(trial.path / "pairs" / f"{domain}.run"), {}),
        "merged": (merged, {"active": E}),
        f"merged-{domain}": (merged, {"active": E - 1, "without": [domain]}),
        "overfit": (load(trial.path / "overfit"), {}),
    }
    found = {}
    for name, (model, selection) in models.items():
        note(f"extracting from {name}")
        one = extract(model, documents, prefix=trial.spec.extraction_prefix, **selection)
        found[name] = one._asdict() | {"rate": one.rate}
    write_json(trial.path / "scores" / "extraction.json", found)


def heldout(trial: Trial) -> dict[str, list[Record]]:
    """What is scored, by column: a sample of its records (data/sample.py).

    Raises UserError for a column without any.
    """
    sources = {
        name: open_records(trial.data(name), "heldout") for name in ("public", *trial.spec.domains)
    }
    columns: dict[str, list[Record]] = {}
    for name, source in sources.items():
        chosen = sample_of(len(source), trial.spec.heldout_records)
        tell_part(len(chosen), len(source), name)
        columns[name] = [source[place] for place in chosen]
    tokenizer = open_anchor(trial.anchor).tokenizer
    mixed = [
        record
        for first, second in trial.pairs_of_domains()
        for record in mixed_documents(
            sources[first], sources[second], tokenizer, trial.spec.mixed_documents
        )
    ]
    columns |= {MIXED: mixed}
    if empty := [name for name, records in columns.items() if not records]:
        raise UserError(
            f"of {', '.join(empty)} there is no held-out text to score; raise max_mb, or choose"
            " other domains"
        )
    return columns


def routing(trial: Trial) -> dict[str, Any]:
    """{model: {data: {expert: [share of each layer]}}}, with every expert active."""
    paths = [trial.data(name) for name in ("public", *trial.spec.domains)]
    found = {}
    for name in ("merged", *(["tuned"] if trial.spec.router else [])):
        model = load(trial.path / name)
        result = evaluate(
            model,
            paths,
            active=len(model.experts),
            limit=trial.spec.heldout_records,
            batch_size=trial.spec.score_batch,
        )
        found[name] = result["routing_by_layer"]
    return found


def _models(trial: Trial) -> Iterator[Line]:
    yield Line("anchor", lambda: OfModel(load(trial.anchor)))
    yield Line("anchor+public", lambda: OfModel(load(trial.path / "control")))
    for domain in trial.spec.domains:
        yield Line(
            f"pair:{domain}",
            lambda domain=domain: OfModel(load(trial.path / "pairs" / f"{domain}.run")),
        )
        yield Line(
            f"dense:{domain}", lambda domain=domain: OfModel(load(trial.path / f"dense-{domain}"))
        )


def _ensembles(trial: Trial) -> Iterator[Line]:
    dense = [
        load(path)
        for path in (
            trial.anchor,
            *(trial.path / f"dense-{domain}" for domain in trial.spec.domains),
        )
    ]
    each = [Remembered(OfModel(model)) for model in dense]
    yield Line("soup", lambda: Soup(dense))
    yield Line("weighted soup", lambda: WeightedSoup(dense))
    yield Line("BTM", lambda: BranchTrainMerge(each))
    yield Line("BTM:top1", lambda: BranchTrainMerge(each, top=1))
    yield Line("BTM:top2", lambda: BranchTrainMerge(each, top=2))
    yield Line("BTM:switching", lambda: BranchTrainMerge(each, switch=SWITCH))
    yield Line("prompt routing", lambda: PromptRouting(each, nearest_domain(trial, dense[0])))


def _merged(trial: Trial) -> Iterator[Line]:
    models = {"merged": load(trial.path / "merged")}
    if trial.spec.router:
        models["merged+tuned"] = load(trial.path / "tuned")
    merged = models["merged"]
    E = len(merged.experts)
    for name, model in models.items():
        yield Line(name, lambda model=model: OfModel(model, active=E))
        for k in range(1, E):
            yield Line(f"{name}:k={k}", lambda model=model, k=k: OfModel(model, active=k))
    for domain in trial.spec.domains:
        yield Line(
            f"merged-{domain}",
            lambda domain=domain: OfModel(merged, without=[domain], active=E - 1),
        )
    for n in range(1, E - 1):  # with all of them it is `merged`, with none the anchor
        without = trial.spec.domains[n:]
        yield Line(
            f"merged:experts={n}",
            lambda n=n, without=without: OfModel(merged, without=without, active=n + 1),
        )


def _joint(trial: Trial) -> Iterator[Line]:
    of_joint = {"joint-1x": "joint 1x", "joint-2x": "joint 2x"} if trial.spec.joint else {}
    of_btx = {"btx": "BTX"} if trial.spec.btx else {}
    for name, title in (of_joint | of_btx).items():
        yield Line(title, lambda name=name: OfModel(load(trial.path / name)))


def _ablations(trial: Trial) -> Iterator[Line]:
    E = len(trial.spec.domains) + 1
    for variant in trial.spec.ablations:
        yield Line(
            variant,
            lambda variant=variant: OfModel(load(trial.path / f"merged-{variant}"), active=E),
        )
    for variant in trial.spec.tuned_ablations:
        yield Line(
            f"{variant}+tuned",
            lambda variant=variant: OfModel(load(trial.path / f"tuned-{variant}"), active=E),
        )


LINES: dict[str, Callable[[Trial], Iterator[Line]]] = {
    "models": _models,
    "ensembles": _ensembles,
    "merged": _merged,
    "joint": _joint,
    "ablations": _ablations,
}


def nearest_domain(trial: Trial, anchor: LoadedModel) -> Callable[[Any], int]:
    """A prompt's domain by the nearest mean embedding.

    These means are all that a server has to know of the owners' text.
    """
    embedder = load_embedder(trial.anchor / "embedder")
    means = []
    for names in (trial.spec.public, *((domain,) for domain in trial.spec.domains)):
        texts = (text for name in names for text in read_training_documents(trial.text(name)))
        mean = domain_embedding(embedder, texts)
        means.append(mean / np.linalg.norm(mean))

    def classify(ids: Any) -> int:
        return int(np.argmax(np.stack(means) @ embedder.embed([anchor.tokenizer.decode(ids)])[0]))

    return classify
