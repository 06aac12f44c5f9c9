"""A study as cells: each makes one output of earlier ones, in a process of its own.

text -> tokenizer, data -> for every seed: anchor -> pairs, dense models, control, proxies ->
merged, tuned, joint, BTX -> scores
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from flexolmo_jax.config import RunConfig
from flexolmo_jax.coordinator.merge import merge
from flexolmo_jax.data.changes import changed_documents
from flexolmo_jax.data.fetch import fetch
from flexolmo_jax.data.prepare import prepare
from flexolmo_jax.data.records import Index
from flexolmo_jax.data.tokenizer import Tokenizer, train_tokenizer
from flexolmo_jax.errors import UserError
from flexolmo_jax.evals.upcycle import assemble
from flexolmo_jax.train.pretrain import pretrain

from . import scores
from .overlap import overlaps
from .running import Cell, Command
from .spec import Spec
from .trial import Trial, write_json

NamedCells = Iterator[tuple[str, Cell]]


def cells(spec: Spec, root: Path) -> dict[str, Cell]:
    """By name, each after those that it needs; a seed's own begin with `seed0-`, `seed1-`, ..."""
    found = dict(_data_cells(spec, root))
    for seed in range(spec.seeds):
        own = dict(_cells_of(Trial(spec, root, seed)))
        for name, cell in own.items():
            needs = (f"seed{seed}-{need}" if need in own else need for need in cell.needs)
            found[f"seed{seed}-{name}"] = dataclasses.replace(cell, needs=tuple(needs))
    return found


def _data_cells(spec: Spec, root: Path) -> NamedCells:
    """What all seeds share."""
    text, sources = _text(spec, root), _sources(spec, root)
    public = sources["public"]
    overlap = root / "overlap.json"
    yield "text", Cell(root / "text.json", (), partial(_fetch, spec, root))
    if spec.open_anchor:
        anchor = root / "anchor"
        fetched = ("anchor", "fetch", spec.open_anchor, str(anchor))
        yield "anchor", Cell(anchor, (), Command(fetched))
        of_tokenizer, tokenizer = "anchor", anchor
    else:
        of_tokenizer, tokenizer = "tokenizer", root
        do = partial(train_tokenizer, public, spec.vocab_size, root / "tokenizer.json")
        yield "tokenizer", Cell(root / "tokenizer.json", ("text",), do)
    for name, inputs in sources.items():
        out = root / "data" / name
        do = partial(_prepare, spec, tokenizer, inputs, out)
        yield f"data-{name}", Cell(out, ("text", of_tokenizer), do)
    do = partial(_count_overlap, public, text, spec.domains, overlap)
    yield "overlap", Cell(overlap, ("text",), do)


def _text(spec: Spec, root: Path) -> dict[str, Path]:
    return {name: root / "text" / f"{name}.jsonl" for name in (*spec.public, *spec.domains)}


def _sources(spec: Spec, root: Path) -> dict[str, list[Path]]:
    """What each prepared directory is made of."""
    text = _text(spec, root)
    public = [text[name] for name in spec.public]
    return {"public": public} | {name: [text[name]] for name in spec.domains}


def check_sources(spec: Spec, root: Path) -> None:
    """Raises UserError where a study's text or tokenizer is not what its data were made of."""
    tokenizer = root / "anchor" if spec.open_anchor else root / "tokenizer.json"
    for name, inputs in _sources(spec, root).items():
        data = root / "data" / name
        if not data.exists():
            continue
        changes = changed_documents(data, inputs) if all(map(Path.exists, inputs)) else ""
        prepared_with = Index.read(data).tokenizer_digest
        if tokenizer.exists() and Tokenizer.load(tokenizer).digest != prepared_with:
            changes = f"another {tokenizer}"
        if changes:
            raise UserError(
                f"{data} was made from other text ({changes}); restore what it was made from, or"
                " give a new --out"
            )


def _cells_of(trial: Trial) -> NamedCells:
    """Those of one seed, by name without the seed."""
    yield from _anchor_cells(trial)
    yield from _merged_cells(trial)
    yield from _dense_cells(trial)
    if trial.spec.router:
        yield from _tuned_cells(trial)
    if trial.spec.joint:
        yield from _joint_cells(trial)
    if trial.spec.btx:
        yield from _btx_cells(trial)
    yield from _score_cells(trial)


def _anchor_cells(trial: Trial) -> NamedCells:
    if not trial.spec.open_anchor:
        yield _run(trial, "anchor-run", ["data-public"], trial.train_anchor)
        yield "anchor", Cell(trial.anchor, ("anchor-run",), trial.publish_anchor)
    yield _run(trial, "control", ["anchor"], _train(trial.continued, "public"))


def _merged_cells(trial: Trial) -> NamedCells:
    """Pairs and their merge: the study's, and with the first seed those of its ablations."""
    path, domains = trial.path, trial.spec.domains
    for variant, overrides in ({"pairs": {}} | _ablations(trial)).items():
        for domain in domains:
            do = partial(trial.train_expert, variant, overrides, domain)
            needs = ("anchor", f"data-{domain}")
            yield f"{variant}-{domain}", Cell(path / variant / domain, needs, do)
        merged = "merged" if variant == "pairs" else f"merged-{variant}"
        do = partial(merge, trial.anchor, trial.contributions(variant), path / merged)
        needs = tuple(f"{variant}-{domain}" for domain in domains)
        yield merged, Cell(path / merged, needs, do)


def _dense_cells(trial: Trial) -> NamedCells:
    """What else a domain's owner makes: a dense model."""
    for domain in trial.spec.domains:
        needs = ["anchor", f"data-{domain}"]
        yield _run(trial, f"dense-{domain}", needs, _train(trial.continued, domain))


def _tuned_cells(trial: Trial) -> NamedCells:
    """The owners' choices of proxies, and the routers that are tuned on them."""
    proxies = [f"proxies-{domain}" for domain in trial.spec.domains]
    for name, domain in zip(proxies, trial.spec.domains, strict=True):
        do = partial(trial.choose_proxies, domain)
        yield name, Cell(trial.path / f"{name}.json", ("anchor", "text"), do)
    ablations = trial.spec.tuned_ablations if trial.seed == 0 else ()
    for suffix in ("", *(f"-{variant}" for variant in ablations)):
        merged, tuned = f"merged{suffix}", f"tuned{suffix}"
        do = partial(trial.tune_router, merged, tuned)
        yield tuned, Cell(trial.path / tuned, (merged, *proxies), do)


def _joint_cells(trial: Trial) -> NamedCells:
    """Mixtures that see all data, trained from the anchor."""
    same = dict.fromkeys(("anchor", *trial.spec.domains), trial.anchor)
    out = trial.path / "joint-start"
    do = partial(assemble, same, out, active=trial.active)
    yield "joint-start", Cell(out, ("anchor",), do)
    for times in (1, 2):
        needs = ["joint-start", *_all_data(trial)]
        yield _run(trial, f"joint-{times}x", needs, _train(trial.joint, times))


def _btx_cells(trial: Trial) -> NamedCells:
    """A mixture of the dense models' FFNs, trained on public text."""
    dense = {"anchor": trial.anchor}
    dense |= {name: trial.path / f"dense-{name}" for name in trial.spec.domains}
    out = trial.path / "btx-start"
    do = partial(assemble, dense, out, active=trial.active)
    yield "btx-start", Cell(out, tuple(_all_dense(trial)), do)
    yield _run(trial, "btx", ["btx-start"], _train(trial.btx))


def _score_cells(trial: Trial) -> NamedCells:
    spec, domains, dense = trial.spec, trial.spec.domains, _all_dense(trial)
    scored = {
        "models": ["control", *(f"pairs-{domain}" for domain in domains), *dense],
        "ensembles": dense,
        "merged": ["merged", *(["tuned"] if spec.router else [])],
    }
    joint = [*(["joint-1x", "joint-2x"] if spec.joint else []), *(["btx"] if spec.btx else [])]
    if joint:
        scored["joint"] = joint
    if trial.seed == 0 and spec.overfit:
        yield _run(trial, "overfit", ["anchor", "text"], trial.train_overfit)
        needs = ("overfit", "merged", f"dense-{domains[0]}", f"pairs-{domains[0]}")
        out = trial.path / "scores" / "extraction.json"
        yield "scores-extraction", Cell(out, needs, partial(scores.write_extraction, trial))
    if _ablations(trial):
        merged = [f"merged-{variant}" for variant in trial.spec.ablations]
        tuned = [f"tuned-{variant}" for variant in trial.spec.tuned_ablations]
        scored["ablations"] = [*merged, *tuned]
    for group, models in scored.items():
        out = trial.path / "scores" / f"{group}.json"
        needs = (*models, *_all_data(trial))
        yield f"scores-{group}", Cell(out, needs, partial(scores.write, trial, group))


def _run(
    trial: Trial, name: str, needs: Sequence[str], do: Callable[[Path], Any]
) -> tuple[str, Cell]:
    """A training run into the folder of its name."""
    out = trial.path / name
    return name, Cell(out / "summary.json", tuple(needs), partial(do, out))


def _train(config_of: Callable[..., RunConfig], *arguments: Any) -> Callable[[Path], Any]:
    """Trains a run whose config is only made then: it may depend on what other cells made."""
    return lambda out: pretrain(config_of(*arguments), out)


def _ablations(trial: Trial) -> dict[str, Any]:
    return trial.spec.ablations if trial.seed == 0 else {}


def _all_data(trial: Trial) -> list[str]:
    return [f"data-{name}" for name in ("public", *trial.spec.domains)]


def _all_dense(trial: Trial) -> list[str]:
    return [f"dense-{domain}" for domain in trial.spec.domains]


def _count_overlap(
    public: Sequence[Path], text: Mapping[str, Path], domains: Sequence[str], out: Path
) -> None:
    write_json(out, overlaps(public, text, domains))


def _prepare(spec: Spec, tokenizer: Path, inputs: Sequence[Path], out: Path) -> None:
    prepare(inputs, Tokenizer.load(tokenizer), spec.seq_len, out)


def _fetch(spec: Spec, root: Path) -> None:
    report = fetch(root / "text", [*spec.public, *spec.domains], int(spec.max_mb * 1e6))
    if empty := [name for name, entry in report.items() if not entry["documents"]]:
        why = next(iter(report[empty[0]]["missing"].values()), "nothing is left of it")
        raise UserError(
            f"no text of {', '.join(empty)} could be fetched: {why}; choose other domains, or run"
            " this again where the text is available"
        )
    write_json(root / "text.json", report)
