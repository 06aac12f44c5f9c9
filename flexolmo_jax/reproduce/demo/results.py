"""A demo's table: every model on held-out text, what the figures should bear out, and samples."""

import datetime
import filecmp
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flexolmo_jax.coordinator.verify import verify_receipt
from flexolmo_jax.data.records import open_records
from flexolmo_jax.evals.bits_per_byte import evaluate
from flexolmo_jax.evals.report.charts import curves_section
from flexolmo_jax.evals.report.maps import routing_section
from flexolmo_jax.evals.report.page import Check, Sample, checks_section, page, samples_section
from flexolmo_jax.evals.report.tables import Table, format_table, table_section
from flexolmo_jax.integrity import RECEIPT
from flexolmo_jax.loaded import load
from flexolmo_jax.storage.files import write_text
from flexolmo_jax.storage.paths import listing
from flexolmo_jax.train.metrics import read_metrics

from ..results import hardware
from ..running import seconds_of
from ..trial import write_json
from .spec import CONTROL, Demo, Places

DRAWS = 2000  # of the bootstrap that gives intervals
INTRO = (
    "One language model from owners who share no data. Each trained an expert against an open"
    " model, alone; the experts were merged without data or further training. Bits per byte on"
    " held-out text: lower is better.\n\n"
    "control is an expert that was trained on public text alone, for as many tokens: what more"
    " training does without new text. pair:X is owner X's own result before the merge. merged runs"
    " the experts that score highest at each token, merged:k=K K of them, merged-X is what is left"
    " when X has gone."
)


@dataclass(frozen=True)
class Line:
    """A line of the table: a model, and what it is scored on."""

    name: str  # a file's name too
    needs: tuple[str, ...]  # cells
    columns: tuple[str, ...]
    model: Path
    active: int | None = None


def lines(spec: Demo, places: Places) -> Iterator[Line]:
    """The table's lines, in its order."""
    experts = tuple(f"expert-{name}" for name in spec.domains)
    yield Line("anchor", experts, spec.columns, places.anchor)
    yield Line(CONTROL, (*experts, CONTROL), spec.columns, places.run(CONTROL))
    for name in spec.domains:
        yield Line(f"pair:{name}", (f"expert-{name}",), ("public", name), places.run(name))
    yield Line("merged", ("merged",), spec.columns, places.merged)
    every = len(spec.domains) + 1
    yield Line(f"merged:k={every}", ("merged",), spec.columns, places.merged, every)
    left = f"merged-{spec.leaver}"
    yield Line(left, (left,), spec.columns, places.without(spec.leaver))


def score(spec: Demo, places: Places, line: Line) -> None:
    """Writes a line's figures: {column: {bits_per_byte, by_record, routing_by_layer}}."""
    paths = [places.data(column) for column in line.columns]
    how = {"limit": spec.records, "batch_size": spec.records, "active": line.active}
    found = evaluate(load(line.model), paths, names=line.columns, **how)
    kept = ("bits_per_byte", "by_record", "routing_by_layer")
    by_column = {column: {key: found[key][column] for key in kept} for column in line.columns}
    write_json(places.scores(line.name), by_column)


def write_results(spec: Demo, places: Places) -> None:
    """Writes results.json, results.txt and at last report.html."""
    figures = {
        line.name: json.loads(places.scores(line.name).read_text()) for line in lines(spec, places)
    }
    shown = {
        name: {column: one["bits_per_byte"] for column, one in of_line.items()}
        for name, of_line in figures.items()
    }
    table = Table(list(spec.columns), shown)
    left, never = places.without(spec.leaver), places.never(spec.leaver)
    verify_receipt(left / RECEIPT, left)
    checks = [*claims(spec, figures), left_exactly(left, never, spec.leaver)]
    samples = list(_samples(spec, places))
    took = seconds_of(places.root)
    told = _text(table, checks, samples, f"{sum(took.values()) / 60:.0f} minutes of commands")
    write_text(places.root / "results.txt", told)
    results = {
        "table": told,
        "rows": shown,
        "claims": {check.claim: check.holds for check in checks},
        "figures": {check.claim: check.figure for check in checks},
        "seconds": took,
        "hardware": hardware(),
        "date": datetime.date.today().isoformat(),
    }
    write_text(places.results, json.dumps(results, indent=1) + "\n")
    experts = ["anchor", *spec.domains]
    maps = {
        column: np.array([one["routing_by_layer"][expert] for expert in experts]).T
        for column, one in figures["merged"].items()
    }
    sections = {
        "What was claimed, and what was measured": checks_section(checks),
        "Bits per byte": table_section(table),
        "Samples": samples_section(samples),
        "Training loss": curves_section(_curves(spec, places)),
        "Routing": routing_section(maps, experts),
    }
    made = f"{results['date']} · {results['hardware']}"
    write_text(places.report, page(f"FlexOlmo on {spec.anchor}", INTRO, sections, made))


def claims(spec: Demo, figures: dict[str, Any]) -> list[Check]:
    """What a merged model should be. Its figures are relative changes, with 95 % intervals."""

    def change(line: str, against: str, column: str) -> "Change":
        return Change.of(
            *(np.array(figures[name][column]["by_record"]) for name in (line, against))
        )

    found, by_tenth = [], []
    for x in spec.domains:
        rivals = [change("merged", name, x) for name in ("anchor", CONTROL)]
        nearest = max(rivals, key=lambda rival: rival.mean)
        by_tenth.append(nearest.mean <= -0.10)
        told = f"{rivals[0]} against the anchor, {rivals[1]} against the control"
        found.append(Check(f"{x}: merged beats the anchor and the control", nearest.mean < 0, told))
        behind = change("merged", f"pair:{x}", x)
        claim = f"{x}: merged is within 3 % of its owner's pair"
        found.append(Check(claim, behind.mean <= 0.03, str(behind)))
    enough = sum(by_tenth) >= len(by_tenth) - 1
    claim = "on all private domains, or all but one, it is by 10 % or more"
    found.append(Check(claim, enough, f"{sum(by_tenth)} of {len(by_tenth)}"))
    public = change("merged", "anchor", "public")
    claim = "merged is no worse than the anchor on public text"
    found.append(Check(claim, public.mean <= 0, str(public)))
    left, x = f"merged-{spec.leaver}", spec.leaver
    lost = change(left, "merged", x)
    found.append(Check(f"{x}: without its expert its text costs more", lost.low > 0, str(lost)))
    others = [change(left, "merged", column) for column in spec.columns if column != x]
    most = max(others, key=lambda other: abs(other.mean))
    claim = f"{x}: without its expert everything else moves by less than 3 %"
    return [*found, Check(claim, abs(most.mean) < 0.03, f"most: {most}")]


@dataclass(frozen=True)
class Change:
    """By how much a model needs more bits than another on the same records: 0.01 is 1 % more."""

    mean: float
    low: float  # 95 % interval: records drawn again and again
    high: float

    @classmethod
    def of(cls, model: np.ndarray, other: np.ndarray) -> "Change":
        """model, other: [R, 2], bits and bytes of each record."""
        records = len(model)
        drawn = np.random.default_rng(0).integers(records, size=(DRAWS, records))
        ratios = model[drawn, 0].sum(axis=1) / other[drawn, 0].sum(axis=1) - 1
        low, high = np.quantile(ratios, [0.025, 0.975]).tolist()
        return cls(float(model[:, 0].sum() / other[:, 0].sum()) - 1, low, high)

    def __str__(self) -> str:
        return f"{self.mean:+.1%} ({self.low:+.1%} to {self.high:+.1%})"


def left_exactly(left: Path, never: Path, name: str) -> Check:
    """Whether a model that an expert has left is, byte for byte, one that it never was in."""

    def arrays(model: Path) -> set[str]:
        chunks = (f"weights/{name}" for name in listing(model / "weights"))
        return {name for name in chunks if "c" in name.split("/")}

    files = arrays(never)
    same = files == arrays(left) and all(
        filecmp.cmp(left / file, never / file, shallow=False) for file in files
    )
    described = [(model / "flexolmo.json").read_bytes() for model in (left, never)]
    return Check(
        f"opting {name} out gives exactly the model that never had it",
        bool(files) and same and described[0] == described[1],
        f"{len(files)} array files compared byte for byte",
    )


def _samples(spec: Demo, places: Places) -> Iterator[Sample]:
    """Held-out documents of the leaver and of another owner, as models go on with them."""
    merged = load(places.merged)
    for name in (spec.leaver, spec.domains[0]):
        ids = open_records(places.data(name), "heldout")[0]["tokens"].tolist()
        prompt, rest = ids[: spec.prompt], ids[spec.prompt : spec.prompt + spec.answer]
        decode = merged.tokenizer.decode
        how: dict[str, Any] = {"temperature": 0.7, "top_p": 0.95, "seed": 1}
        without: dict[str, Any] = how | {"without": [spec.leaver]}
        authors = {
            "anchor": load(places.anchor).generate([prompt], spec.answer, **how),
            "with all experts": merged.generate([prompt], spec.answer, **how),
            f"without {spec.leaver}": merged.generate([prompt], spec.answer, **without),
            "the document": [rest],
        }
        yield Sample(decode(prompt), {who: decode(of[0]) for who, of in authors.items()})


def _curves(spec: Demo, places: Places) -> dict[str, list[tuple[int, float]]]:
    return {
        name: [(r["tokens"], r["loss"]) for r in read_metrics(places.run(name)) if "loss" in r]
        for name in (*spec.domains, CONTROL)
    }


def _text(table: Table, checks: Sequence[Check], samples: Sequence[Sample], made: str) -> str:
    parts = [
        "bits per byte on held-out text",
        format_table(table),
        *(f"{'holds ' if one.holds else 'FAILS '} {one.claim}: {one.figure}" for one in checks),
        "In brackets: 95 % intervals, by drawing records again.",
    ]
    for sample in samples:
        written = (f"  {who}: {text!r}" for who, text in sample.completions.items())
        parts += ["", f"prompt: {sample.prompt!r}", *written]
    return "\n".join([*parts, "", made]) + "\n"
