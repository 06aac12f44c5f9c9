"""A study as cells: each makes one output of earlier ones, is done when its output is there, and is
a process of its own.

text -> tokenizer, data -> for every seed: anchor -> pairs, dense models, control, proxies ->
merged, tuned, joint, BTX -> scores
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flexolmo_jax.coordinator.merge import merge
from flexolmo_jax.data.prepare import prepare
from flexolmo_jax.data.sources import fetch
from flexolmo_jax.data.tokenizer import Tokenizer, train_tokenizer
from flexolmo_jax.errors import UserError
from flexolmo_jax.evals.upcycle import assemble
from flexolmo_jax.train.pretrain import pretrain

from . import scores
from .overlap import overlaps
from .spec import Spec
from .trial import Trial, write_json


@dataclasses.dataclass(frozen=True)
class Cell:
    """`do` makes `output`, whole or not at all, from the outputs of the cells that it needs; runs
    go on from their checkpoints."""

    output: Path
    needs: tuple[str, ...]
    do: Callable[[], Any]

    @property
    def is_done(self) -> bool:
        return self.output.exists()


def cells(spec: Spec, root: Path) -> dict[str, Cell]:
    """By name, each after those that it needs."""
    found: dict[str, Cell] = {}

    def cell(name: str, output: Path, needs: list[str], do: Callable[[], Any]) -> None:
        found[name] = Cell(output, tuple(needs), do)

    text = {name: root / "text" / f"{name}.jsonl" for name in (*spec.public, *spec.domains)}
    public_text = [text[name] for name in spec.public]
    cell("text", root / "text.json", [], lambda: _fetch(spec, root))
    cell(
        "tokenizer",
        root / "tokenizer.json",
        ["text"],
        lambda: train_tokenizer(public_text, spec.vocab_size, root / "tokenizer.json"),
    )
    for name in ("public", *spec.domains):
        inputs = public_text if name == "public" else [text[name]]
        cell(
            f"data-{name}",
            root / "data" / name,
            ["tokenizer"],
            lambda inputs=inputs, name=name: prepare(
                inputs, Tokenizer.load(root), spec.seq_len, root / "data" / name
            ),
        )
    cell(
        "overlap",
        root / "overlap.json",
        ["text"],
        lambda: write_json(root / "overlap.json", overlaps(public_text, text, spec.domains)),
    )
    for seed in range(spec.seeds):
        for name, of_seed in cells_of(Trial(spec, root, seed)).items():
            found[f"seed{seed}-{name}"] = of_seed
    return found


def cells_of(trial: Trial) -> dict[str, Cell]:
    """By name without the seed."""
    spec, path = trial.spec, trial.path
    found: dict[str, Cell] = {}
    each_data = [f"data-{name}" for name in ("public", *spec.domains)]

    def cell(name: str, output: Path, needs: list[str], do: Callable[[], Any]) -> None:
        """Needs of the same seed are named without it."""
        found[name] = Cell(
            output,
            tuple(
                need if need in ("text", *each_data) else f"seed{trial.seed}-{need}"
                for need in needs
            ),
            do,
        )

    def run(name: str, needs: list[str], do: Callable[[Path], Any]) -> None:
        cell(name, path / name / "summary.json", needs, lambda: do(path / name))

    run("anchor-run", ["data-public"], trial.train_anchor)
    cell("anchor", path / "anchor", ["anchor-run"], trial.publish_anchor)
    run("control", ["anchor"], lambda out: pretrain(trial.continued("public"), out))
    variants = {"pairs": {}} | (spec.ablations if trial.seed == 0 else {})
    for variant, overrides in variants.items():
        for domain in spec.domains:
            do = lambda v=variant, o=overrides, d=domain: trial.train_expert(v, o, d)  # noqa: E731
            cell(f"{variant}-{domain}", path / variant / domain, ["anchor", f"data-{domain}"], do)
        merged = "merged" if variant == "pairs" else f"merged-{variant}"
        needs = [f"{variant}-{domain}" for domain in spec.domains]
        cell(
            merged,
            path / merged,
            needs,
            lambda v=variant, m=merged: merge(path / "anchor", trial.contributions(v), path / m),
        )
    for domain in spec.domains:
        run(
            f"dense-{domain}",
            ["anchor", f"data-{domain}"],
            lambda out, d=domain: pretrain(trial.continued(d), out),
        )
        cell(
            f"proxies-{domain}",
            path / f"proxies-{domain}.json",
            ["anchor", "text"],
            lambda d=domain: trial.choose_proxies(d),
        )
    all_proxies = [f"proxies-{domain}" for domain in spec.domains]
    tuned = {"merged": "tuned"} | {
        f"merged-{variant}": f"tuned-{variant}"
        for variant in spec.tuned_ablations
        if trial.seed == 0
    }
    for merged, out in tuned.items():
        cell(
            out, path / out, [merged, *all_proxies], lambda m=merged, o=out: trial.tune_router(m, o)
        )
    same = {name: path / "anchor" for name in ("anchor", *spec.domains)}
    cell(
        "joint-start",
        path / "joint-start",
        ["anchor"],
        lambda: assemble(same, path / "joint-start", active=trial.active),
    )
    for times in (1, 2):
        run(
            f"joint-{times}x",
            ["joint-start", *each_data],
            lambda out, times=times: pretrain(trial.joint(times), out),
        )
    dense = {"anchor": path / "anchor"} | {
        domain: path / f"dense-{domain}" for domain in spec.domains
    }
    all_dense = [f"dense-{domain}" for domain in spec.domains]
    cell(
        "btx-start",
        path / "btx-start",
        all_dense,
        lambda: assemble(dense, path / "btx-start", active=trial.active),
    )
    run("btx", ["btx-start"], lambda out: pretrain(trial.btx(), out))
    scored = {
        "models": ["control", *(f"pairs-{domain}" for domain in spec.domains), *all_dense],
        "ensembles": all_dense,
        "merged": ["merged", "tuned"],
        "joint": ["joint-1x", "joint-2x", "btx"],
    }
    if trial.seed == 0:
        run("overfit", ["anchor", "text"], trial.train_overfit)
        needs = ["overfit", "merged", f"dense-{spec.domains[0]}", f"pairs-{spec.domains[0]}"]
        cell(
            "scores-extraction",
            path / "scores" / "extraction.json",
            needs,
            lambda: scores.write_extraction(trial),
        )
    if trial.seed == 0 and spec.ablations:
        scored["ablations"] = [f"merged-{variant}" for variant in spec.ablations] + [
            f"tuned-{variant}" for variant in spec.tuned_ablations
        ]
    for group, needs in scored.items():
        cell(
            f"scores-{group}",
            path / "scores" / f"{group}.json",
            [*needs, *each_data],
            lambda g=group: scores.write(trial, g),
        )
    return found


def _fetch(spec: Spec, root: Path) -> None:
    report = fetch(root / "text", [*spec.public, *spec.domains], int(spec.max_mb * 1e6))
    if empty := [name for name, entry in report.items() if not entry["documents"]]:
        why = next(iter(report[empty[0]]["missing"].values()), "nothing is left of it")
        raise UserError(
            f"no text of {', '.join(empty)} could be had: {why}; take other domains, or try again"
            " where it can be had"
        )
    write_json(root / "text.json", report)
