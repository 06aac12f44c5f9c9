"""What a study's cells left, as results.json, results.md and report.html: rows with means and
spreads; which of the orderings hold."""

import datetime
import json
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from flexolmo_jax.evals.report.charts import line_charts_section
from flexolmo_jax.evals.report.maps import routing_section
from flexolmo_jax.evals.report.page import Check, checks_section, page
from flexolmo_jax.evals.report.tables import Table, format_table, markdown_table, table_section
from flexolmo_jax.storage.files import write_text

from .scores import MIXED
from .spec import Spec

# means over the private domains; over these and public text
PRIVATE, AVERAGE = "private", "average"
Figures = Mapping[str, float]  # bits per byte by column


class Ordering(NamedTuple):
    """A claim about two figures: that the first is lower, by a margin relative to the second of at
    least `least`."""

    name: str
    margin: float | None  # None where a figure is not there
    least: float = 0.0

    @property
    def holds(self) -> bool:
        return self.margin is not None and self.margin >= self.least


def write_results(spec: Spec, root: Path) -> dict[str, Any]:
    """Returns what results.json holds: `rows` {row: {column: {mean, spread, seeds}}}, `orderings`
    {name: {holds, margin}} and more."""
    by_seed = [_read(root / f"seed{seed}" / "scores") for seed in range(spec.seeds)]
    rows = {name: [scores[name] for scores in by_seed if name in scores] for name in by_seed[0]}
    means = {
        name: {column: statistics.fmean(of[column] for of in each) for column in each[0]}
        for name, each in rows.items()
    }
    attack = json.loads((root / "seed0" / "scores" / "extraction.json").read_text())
    checks = [
        *orderings(spec, means, by_seed[0]),
        Ordering(
            "the attack extracts half of what the overfitted control learnt",
            attack["overfit"]["rate"],
            0.5,
        ),
    ]
    found = [
        one
        for scores in by_seed
        for one in orderings(spec, scores, scores)
        if one.margin is not None
    ]
    seeds = {
        check.name: [one.holds for one in found if one.name == check.name] or [check.holds]
        for check in checks
    }
    took = [json.loads(line) for line in (root / "seconds.jsonl").read_text().splitlines()]
    results = {
        "title": spec.title,
        "rows": {
            name: {column: _figure([of[column] for of in each]) for column in each[0]}
            for name, each in rows.items()
        },
        "orderings": {
            one.name: {
                "holds": one.holds,
                "margin": one.margin,
                "at_least": one.least,
                "seeds": len(seeds[one.name]),
                "seeds_where_it_holds": sum(seeds[one.name]),
            }
            for one in checks
        },
        "flops": {
            file.stem: json.loads(file.read_text())
            for file in sorted((root / "seed0").glob("flops-*.json"))
        },
        "proxies": {
            file.stem: json.loads(file.read_text())
            for file in sorted((root / "seed0").glob("proxies-*.json"))
        },
        "extraction": attack,
        "heldout": json.loads((root / "overlap.json").read_text()),
        # of a cell that was made again the last
        "cell_seconds": sum({one["cell"]: one["seconds"] for one in took}.values()),
        "hardware": hardware(),
        "date": datetime.date.today().isoformat(),
    }
    write_text(root / "results.json", json.dumps(results, indent=1) + "\n")
    write_text(root / "results.md", markdown(spec, results, means, checks))
    routing = json.loads((root / "seed0" / "scores" / "routing.json").read_text())
    write_text(root / "report.html", html(spec, results, means, checks, routing))
    return results


def orderings(
    spec: Spec, means: Mapping[str, Figures], first: Mapping[str, Figures]
) -> list[Ordering]:
    """The paper's, and what is asked of a reproduction. Ablations have one seed: they are held
    against the first seed's merge."""

    def lower(
        name: str,
        better: str,
        worse: str,
        column: str,
        rows: Mapping[str, Figures] = means,
        least: float = 0.0,
    ) -> Ordering:
        known = better in rows and worse in rows
        return Ordering(
            name, 1 - rows[better][column] / rows[worse][column] if known else None, least
        )

    ablation = {
        "public contrast helps": "without contrast",
        "the routers' bias helps": "without bias",
        "rows from the domain's embedding help: against random rows": "random rows",
        "rows from the domain's embedding help: against the anchor's hidden states": "hidden rows",
        "training beside the anchor helps": "without coordination",
    }
    found = [
        lower("merged beats the anchor on private domains", "merged", "anchor", PRIVATE),
        *(
            lower(name, "merged", row, AVERAGE, first)
            for name, row in ablation.items()
            if row in spec.ablations
        ),
        lower("tuning the router helps", "merged+tuned", "merged", AVERAGE),
        *(
            lower(f"tuning the router helps {row}", f"{row}+tuned", row, AVERAGE, first)
            for row in spec.tuned_ablations
        ),
        lower("merged beats the uniform soup", "merged", "soup", AVERAGE),
        lower("merged beats the weighted soup", "merged", "weighted soup", AVERAGE),
        lower("merged beats BTM on single domains", "merged", "BTM:top2", PRIVATE),
        lower("merged beats BTM on mixed documents", "merged", "BTM:top2", MIXED),
        lower("merged beats prompt routing on mixed documents", "merged", "prompt routing", MIXED),
        lower("merged beats BTX", "merged", "BTX", AVERAGE),
        lower("merged reaches the joint model of equal FLOPs", "merged", "joint 1x", AVERAGE),
        lower("the joint model of twice the FLOPs wins", "joint 2x", "merged", AVERAGE),
    ]
    E = len(spec.domains) + 1
    others = min(means[row][AVERAGE] for row in ("merged", *(f"merged:k={k}" for k in range(2, E))))
    worst = all(
        means["merged:k=1"][AVERAGE] >= means[row][AVERAGE]
        for row in ("merged", *(f"merged:k={k}" for k in range(2, E)))
    )
    found.append(
        Ordering(
            "one active expert is worst",
            (1 if worst else -1) * abs(means["merged:k=1"][AVERAGE] / others - 1),
        )
    )
    tuned = "merged+tuned"
    found += [
        lower(
            "merged and tuned beats the anchor by 20 % on private domains",
            tuned,
            "anchor",
            PRIVATE,
            least=0.20,
        ),
        lower(
            "merged and tuned beats anchor+public by 15 % on private domains",
            tuned,
            "anchor+public",
            PRIVATE,
            least=0.15,
        ),
        lower(
            "merged and tuned is at most 1 % worse on public text",
            tuned,
            "anchor",
            "public",
            least=-0.01,
        ),
        *(
            lower(f"merged and tuned beats the uniform soup on {domain}", tuned, "soup", domain)
            for domain in spec.domains
        ),
        *(
            lower(f"merged and tuned beats {row} on mixed documents", tuned, row, MIXED)
            for row in ("soup", "weighted soup", "BTM:top2")
        ),
    ]
    for domain in spec.domains:
        without, stay = (
            f"merged-{domain}",
            [name for name in ("public", *spec.domains) if name != domain],
        )
        lost = means[without][domain] / means["merged"][domain] - 1
        moved = max(abs(means[without][name] / means["merged"][name] - 1) for name in stay)
        found.append(
            Ordering(
                f"opting {domain} out takes its own domain most: how much more than any other",
                lost - moved,
            )
        )
    return found


def hardware() -> str:
    device = jax.devices()[0]
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        cpu = next(
            (
                line.split(":")[1].strip()
                for line in info.read_text().splitlines()
                if line.startswith("model name")
            ),
            cpu,
        )
    kind = (
        cpu if device.platform == "cpu" else f"{jax.device_count()} x {device.device_kind}, {cpu}"
    )
    return (
        f"{kind}, {os.cpu_count()} cores, Python {platform.python_version()}, jax {jax.__version__}"
    )


def markdown(
    spec: Spec, results: Mapping[str, Any], means: Mapping[str, Figures], checks: Sequence[Ordering]
) -> str:
    lines = [
        f"# {spec.title}",
        "",
        _intro(spec, results),
        "",
        markdown_table(_table(means, _columns(spec))),
        "| ordering | holds | margin | in seeds |",
        "|---|---|---:|---|",
    ]
    lines += [
        f"| {one.name} | {'yes' if one.holds else 'no'} | {_percent(one)} |"
        f" {_seeds(one, results)} |"
        for one in checks
    ]
    lines += [
        "",
        "| extraction | documents | extracted | rate, 95 % interval | mean similarity |",
        "|---|---:|---:|---|---:|",
    ]
    for name, one in results["extraction"].items():
        rate = f"{one['rate']:.1%} ({one['low']:.1%} to {one['high']:.1%})"
        lines.append(
            f"| {name} | {one['documents']} | {one['extracted']} | {rate} |"
            f" {one['mean_similarity']:.2f} |"
        )
    spread = {
        name: columns[AVERAGE]["spread"]
        for name, columns in results["rows"].items()
        if columns[AVERAGE]["spread"] is not None
    }
    if spread:
        lines += [
            "",
            f"Standard deviation over {spec.seeds} seeds of the average: "
            + ", ".join(f"{k} {v:.3f}" for k, v in spread.items())
            + ".",
        ]
    return "\n".join([*lines, "", _made(spec, results)]) + "\n"


def html(
    spec: Spec,
    results: Mapping[str, Any],
    means: Mapping[str, Figures],
    checks: Sequence[Ordering],
    routing: Mapping[str, Any],
) -> str:
    E = len(spec.domains) + 1
    experts = ["anchor", *spec.domains]
    by_active, by_experts = {}, {}
    for column in (AVERAGE, PRIVATE, "public", MIXED):
        by_active[column] = [
            (k, means[f"merged:k={k}" if k < E else "merged"][column]) for k in range(1, E + 1)
        ]
        rows = ["anchor", *(f"merged:experts={n}" for n in range(1, E - 1)), "merged"]
        by_experts[column] = [(n, means[row][column]) for n, row in enumerate(rows)]
    matrix: dict[str, Figures] = {"merged": means["merged"]} | {
        f"without {domain}": means[f"merged-{domain}"] for domain in spec.domains
    }
    columns = ["public", *spec.domains, MIXED]
    maps = {
        f"{model}: {data}": np.array([of_data[expert] for expert in experts]).T
        for model, by_data in routing.items()
        for data, of_data in by_data.items()
    }
    sections = {
        "What the paper says, and what was measured": checks_section(
            [
                Check(one.name, one.holds, f"{_percent(one)} · {_seeds(one, results)} seeds")
                for one in checks
            ]
        ),
        "Bits per byte": table_section(_table(means, _columns(spec))),
        "Active experts": line_charts_section(
            by_active, "experts that a token uses", "bits per byte"
        ),
        "Experts merged": line_charts_section(
            by_experts, f"experts beside the anchor: {', '.join(spec.domains)}", "bits per byte"
        ),
        "Extraction: best similarity of ten samples to the document": table_section(
            Table(
                ["similarity", "rate"],
                {
                    name: {"similarity": one["mean_similarity"], "rate": one["rate"]}
                    for name, one in results["extraction"].items()
                },
                unit=(
                    f"of {results['extraction']['anchor']['documents']} documents of"
                    f" {spec.domains[0]}"
                ),
            )
        ),
        "Opting out": table_section(_table(matrix, columns, "merged")),
        "Routing": routing_section(maps, experts),
    }
    return page(spec.title, _intro(spec, results), sections, _made(spec, results))


def text(spec: Spec, results: Mapping[str, Any]) -> str:
    """For a terminal."""
    means = {
        name: {column: figure["mean"] for column, figure in columns.items()}
        for name, columns in results["rows"].items()
    }
    lines = [
        f"{'holds ' if one['holds'] else 'FAILS '} {name}: {one['margin']}"
        for name, one in results["orderings"].items()
    ]
    return "\n".join([format_table(_table(means, _columns(spec))), *lines])


def _read(scores: Path) -> dict[str, dict[str, float]]:
    rows: dict[str, dict[str, float]] = {}
    for file in (
        scores / f"{group}.json"
        for group in ("models", "ensembles", "joint", "merged", "ablations")
    ):
        if file.exists():
            rows |= json.loads(file.read_text())
    for figures in rows.values():
        domains = [column for column in figures if column not in ("public", MIXED)]
        figures[PRIVATE] = statistics.fmean(figures[domain] for domain in domains)
        figures[AVERAGE] = statistics.fmean(figures[column] for column in ("public", *domains))
    return rows


def _figure(values: Sequence[float]) -> dict[str, Any]:
    spread = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "spread": spread, "seeds": len(values)}


def _table(means: Mapping[str, Figures], columns: list[str], reference: str = "anchor") -> Table:
    return Table(
        columns,
        {name: {column: of[column] for column in columns} for name, of in means.items()},
        reference=reference,
    )


def _columns(spec: Spec) -> list[str]:
    return ["public", *spec.domains, PRIVATE, AVERAGE, MIXED]


def _intro(spec: Spec, results: Mapping[str, Any]) -> str:
    accuracy = ", ".join(
        f"{name.removeprefix('proxies-')} {of['accuracy']:.1%}"
        for name, of in results["proxies"].items()
    )
    flops = ", ".join(
        f"{of['times']}x {of['joint_of_pairs']:.3f}" for of in results["flops"].values()
    )
    overlap = ", ".join(
        f"{name} {of['share_in_training_text']:.1%}" for name, of in results["heldout"].items()
    )
    seeds = "one seed" if spec.seeds == 1 else f"means over {spec.seeds} seeds, of ablations one"
    return (
        f"Bits per byte on held-out text, lower is better; {seeds}. {PRIVATE}: mean of the private"
        f" domains; {AVERAGE}: of these and public text; {MIXED}: documents of two private"
        f" domains.\n\nFLOPs of the joint runs over the pairs' together: {flops}. Classifiers of"
        f" proxies, accuracy: {accuracy}. No held-out document is trained on; of their runs of 13"
        f" words these stand in training text: {overlap}."
    )


def _made(spec: Spec, results: Mapping[str, Any]) -> str:
    minutes = f"{results['cell_seconds'] / 60:.0f} minutes of cells, {spec.workers} at a time"
    return f"{results['date']} · {results['hardware']} · {minutes}"


def _seeds(ordering: Ordering, results: Mapping[str, Any]) -> str:
    """How many of the seeds show it by themselves."""
    one = results["orderings"][ordering.name]
    return f"{one['seeds_where_it_holds']} of {one['seeds']}"


def _percent(ordering: Ordering) -> str:
    return (
        "not measured"
        if ordering.margin is None
        else f"{ordering.margin:+.1%}" + (f" of {ordering.least:+.0%}" if ordering.least else "")
    )
