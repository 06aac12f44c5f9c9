"""A study's results.json, results.md and report.html, made of what its cells left.

They hold the figures of every model, means and spreads over the seeds, and which orderings hold.
"""

import datetime
import json
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from flexolmo_jax.evals.report.charts import line_charts_section
from flexolmo_jax.evals.report.maps import routing_section
from flexolmo_jax.evals.report.page import Check, checks_section, page
from flexolmo_jax.evals.report.tables import Table, format_table, markdown_table, table_section
from flexolmo_jax.storage.files import write_text

from .orderings import AVERAGE, PRIVATE, Figures, Lines, Ordering, orderings
from .running import seconds_of
from .scores import MIXED
from .spec import Spec


def write_results(spec: Spec, root: Path) -> dict[str, Any]:
    """Writes the three files and returns what results.json holds.

    That is `rows` {line: {column: {mean, spread, seeds}}}, `orderings` {name: {holds, margin, ...}}
    and more.
    """
    by_seed = [_read(root / f"seed{seed}" / "scores") for seed in range(spec.seeds)]
    scores = root / "seed0" / "scores"
    attack = _json(scores / "extraction.json") if spec.overfit else {}
    lines = {
        name: _summary([lines[name] for lines in by_seed if name in lines]) for name in by_seed[0]
    }
    results = {
        "title": spec.title,
        "rows": lines,
        "orderings": _orderings(spec, _means(lines), by_seed, attack),
        "flops": {path.stem: _json(path) for path in sorted((root / "seed0").glob("flops-*.json"))},
        "proxies": {
            path.stem: _json(path) for path in sorted((root / "seed0").glob("proxies-*.json"))
        },
        "extraction": attack,
        "heldout": _json(root / "overlap.json"),
        "cell_seconds": sum(seconds_of(root).values()),
        "hardware": hardware(),
        "date": datetime.date.today().isoformat(),
    }
    write_text(root / "results.json", json.dumps(results, indent=1) + "\n")
    write_text(root / "results.md", markdown(spec, results))
    write_text(root / "report.html", html(spec, results, _json(scores / "routing.json")))
    return results


def hardware() -> str:
    """The device, the CPU and the versions that a study ran on."""
    device, cpu = jax.devices()[0], platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        named = (line for line in info.read_text().splitlines() if line.startswith("model name"))
        cpu = next((line.split(":")[1].strip() for line in named), cpu)
    accelerator = f"{jax.device_count()} x {device.device_kind}, "
    return (
        f"{'' if device.platform == 'cpu' else accelerator}{cpu}, {os.cpu_count()} cores, Python"
        f" {platform.python_version()}, jax {jax.__version__}"
    )


def markdown(spec: Spec, results: Mapping[str, Any]) -> str:
    """What results.md holds."""
    means = _means(results["rows"])
    lines = [
        f"# {spec.title}",
        "",
        _intro(spec, results),
        "",
        markdown_table(_table(means, _columns(spec))),
        "| ordering | holds | margin | in seeds |",
        "|---|---|---:|---|",
    ]
    for name, one in results["orderings"].items():
        holds = "yes" if one["holds"] else "no"
        lines.append(f"| {name} | {holds} | {_margin(one)} | {_seeds(one)} |")
    if results["extraction"]:
        lines += ["", *_extraction_lines(results["extraction"])]
    averages = {name: columns[AVERAGE]["spread"] for name, columns in results["rows"].items()}
    spreads = [f"{name} {x:.3f}" for name, x in averages.items() if x is not None]
    if spreads:
        over = f"Standard deviation over {spec.seeds} seeds of the average"
        lines += ["", f"{over}: {', '.join(spreads)}."]
    return "\n".join([*lines, "", _made(spec, results)]) + "\n"


def _extraction_lines(extraction: Mapping[str, Any]) -> list[str]:
    lines = [
        "| extraction | documents | extracted | rate, 95 % interval | mean similarity |",
        "|---|---:|---:|---|---:|",
    ]
    for name, one in extraction.items():
        rate = f"{one['rate']:.1%} ({one['low']:.1%} to {one['high']:.1%})"
        similarity = f"{one['mean_similarity']:.2f}"
        counts = f"{one['documents']} | {one['extracted']}"
        lines.append(f"| {name} | {counts} | {rate} | {similarity} |")
    return lines


def html(spec: Spec, results: Mapping[str, Any], routing: Mapping[str, Any]) -> str:
    """What report.html holds; `routing` is {model: {data: {expert: [share of each layer]}}}."""
    means = _means(results["rows"])
    checks = [
        Check(name, one["holds"], f"{_margin(one)} · {_seeds(one)} seeds")
        for name, one in results["orderings"].items()
    ]
    domains = ", ".join(spec.domains)
    by_active = _curves(means, _by_active(spec), 1)
    by_experts = _curves(means, _by_experts(spec), 0)
    x_active, x_experts = "experts that a token uses", f"experts beside the anchor: {domains}"
    opted_out = {"merged": means["merged"]} | {
        f"without {domain}": means[f"merged-{domain}"] for domain in spec.domains
    }
    each_domain = ["public", *spec.domains, MIXED]
    experts = ["anchor", *spec.domains]
    maps = {
        f"{model}: {data}": np.array([of_data[expert] for expert in experts]).T
        for model, by_data in routing.items()
        for data, of_data in by_data.items()
    }
    sections = {
        "What the paper says, and what was measured": checks_section(checks),
        "Bits per byte": table_section(_table(means, _columns(spec))),
        "Active experts": line_charts_section(by_active, x_active, "bits per byte"),
        "Experts merged": line_charts_section(by_experts, x_experts, "bits per byte"),
        "Extraction: best similarity of ten samples to the document": _extraction_section(
            spec, results["extraction"]
        ),
        "Opting out": table_section(_table(opted_out, each_domain, "merged")),
        "Routing": routing_section(maps, experts),
    }
    return page(spec.title, _intro(spec, results), sections, _made(spec, results))


def text(spec: Spec, results: Mapping[str, Any]) -> str:
    """For a terminal."""
    lines = [
        f"{'holds ' if one['holds'] else 'FAILS '} {name}: {one['margin']}"
        for name, one in results["orderings"].items()
    ]
    return "\n".join([format_table(_table(_means(results["rows"]), _columns(spec))), *lines])


def _json(path: Path) -> Any:
    return json.loads(path.read_text())


def _read(scores: Path) -> dict[str, dict[str, float]]:
    """The lines of a seed's table, with the means over its columns."""
    groups = ("models", "ensembles", "joint", "merged", "ablations")
    files = [scores / f"{group}.json" for group in groups]
    lines: dict[str, dict[str, float]] = {}
    for file in files:
        lines |= _json(file) if file.exists() else {}
    for figures in lines.values():
        domains = [column for column in figures if column not in ("public", MIXED)]
        figures[PRIVATE] = statistics.fmean(figures[domain] for domain in domains)
        figures[AVERAGE] = statistics.fmean(figures[column] for column in ("public", *domains))
    return lines


def _summary(seeds: Sequence[Figures]) -> dict[str, dict[str, Any]]:
    """{column: {mean, spread, seeds}} of a line's figures with each seed."""
    summary = {}
    for column in seeds[0]:
        values = [figures[column] for figures in seeds]
        spread = statistics.stdev(values) if len(values) > 1 else None
        summary[column] = {
            "mean": statistics.fmean(values),
            "spread": spread,
            "seeds": len(values),
        }
    return summary


def _means(lines: Mapping[str, Any]) -> dict[str, Figures]:
    """Of lines as results.json has them."""
    return {
        name: {column: figure["mean"] for column, figure in columns.items()}
        for name, columns in lines.items()
    }


def _orderings(
    spec: Spec, means: Lines, by_seed: Sequence[Lines], attack: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """The orderings of the means, and in how many of the seeds each holds."""
    checks = orderings(spec, means, by_seed[0])
    if attack:
        claim = "the attack extracts half of what the overfitted control learnt"
        checks.append(Ordering(claim, attack["overfit"]["rate"], 0.5))
    of_seeds = [one for lines in by_seed for one in orderings(spec, lines, lines)]
    found = {}
    for check in checks:
        same = [one for one in of_seeds if one.name == check.name and one.margin is not None]
        seeds = [one.holds for one in same] or [check.holds]
        found[check.name] = {
            "holds": check.holds,
            "margin": check.margin,
            "at_least": check.least,
            "seeds": len(seeds),
            "seeds_where_it_holds": sum(seeds),
        }
    return found


def _curves(means: Lines, names: Sequence[str], start: int) -> dict[str, list[tuple[int, float]]]:
    """By column: the figures of these lines, at x = start, start + 1, ..."""
    return {
        column: [(x, means[name][column]) for x, name in enumerate(names, start)]
        for column in (AVERAGE, PRIVATE, "public", MIXED)
    }


def _by_active(spec: Spec) -> list[str]:
    """The merged model with 1, 2, ... experts active, at last all."""
    return [*(f"merged:k={k}" for k in range(1, len(spec.domains) + 1)), "merged"]


def _by_experts(spec: Spec) -> list[str]:
    """The anchor, and models with 1, 2, ... experts merged to it, at last all."""
    return ["anchor", *(f"merged:experts={n}" for n in range(1, len(spec.domains))), "merged"]


def _extraction_section(spec: Spec, extraction: Mapping[str, Any]) -> str:
    if not extraction:
        return ""
    lines = {
        name: {"similarity": one["mean_similarity"], "rate": one["rate"]}
        for name, one in extraction.items()
    }
    unit = f"of {extraction['anchor']['documents']} documents of {spec.domains[0]}"
    return table_section(Table(["similarity", "rate"], lines, unit))


def _table(means: Lines, columns: list[str], reference: str = "anchor") -> Table:
    lines = {
        name: {column: figures[column] for column in columns} for name, figures in means.items()
    }
    return Table(columns, lines, reference=reference)


def _columns(spec: Spec) -> list[str]:
    return ["public", *spec.domains, PRIVATE, AVERAGE, MIXED]


def _intro(spec: Spec, results: Mapping[str, Any]) -> str:
    accuracy = ", ".join(
        f"{name.removeprefix('proxies-')} {chosen['accuracy']:.1%}"
        for name, chosen in results["proxies"].items()
    )
    flops = ", ".join(
        f"{run['times']}x {run['joint_of_pairs']:.3f}" for run in results["flops"].values()
    )
    overlap = ", ".join(
        f"{name} {text['share_in_training_text']:.1%}" for name, text in results["heldout"].items()
    )
    seeds = "one seed" if spec.seeds == 1 else f"means over {spec.seeds} seeds, of ablations one"
    return (
        f"Bits per byte on held-out text, lower is better; {seeds}. {PRIVATE}: mean of the private"
        f" domains; {AVERAGE}: of these and public text; {MIXED}: documents of two private"
        " domains.\n\n"
        + (f"FLOPs of the joint runs over the pairs' together: {flops}. " if flops else "")
        + (f"Classifiers of proxies, accuracy: {accuracy}. " if accuracy else "")
        + "No held-out document is trained on; of their runs of 13 words these stand in training"
        f" text: {overlap}."
    )


def _made(spec: Spec, results: Mapping[str, Any]) -> str:
    minutes = f"{results['cell_seconds'] / 60:.0f} minutes of cells, {spec.workers} at a time"
    return f"{results['date']} · {results['hardware']} · {minutes}"


def _seeds(ordering: Mapping[str, Any]) -> str:
    """In how many of the seeds it holds by itself."""
    return f"{ordering['seeds_where_it_holds']} of {ordering['seeds']}"


def _margin(ordering: Mapping[str, Any]) -> str:
    if ordering["margin"] is None:
        return "not measured"
    least = f" of {ordering['at_least']:+.0%}" if ordering["at_least"] else ""
    return f"{ordering['margin']:+.1%}{least}"
