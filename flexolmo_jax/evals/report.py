"""A study's report as one HTML file, and its table for a terminal and for Markdown.

The page stands alone: inline CSS and SVG, no script, no request to any network (a content policy in
the page forbids both), light or dark as the reader's system is, fit for a phone and for paper.
`write_report` makes the whole page; `page` makes one from any sections, and each section and
drawing is a function from data to HTML of its own. All text that comes in is plain text and escaped
here.
"""

import html
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from flexolmo_jax.storage.files import write_text

COLOURS = 7  # of curves, in STYLE; later curves take the same ones again with dashes
DASHES = ("", "7 3", "2 3", "9 3 2 3")
MOST_POINTS = 400  # drawn per curve
LABEL_LETTERS = 14  # of an expert's name above a heat map


@dataclass
class Table:
    """One figure per row (a model) and column (a data set), read against the row `reference`.

    A figure that is None or absent was not measured. Raises ValueError for a row with figures
    outside the columns.
    """

    columns: list[str]
    rows: dict[str, dict[str, float | None]]
    unit: str = "bits per byte"
    reference: str = "anchor"
    lowest_is_best: bool = True

    def __post_init__(self) -> None:
        for row, figures in self.rows.items():
            if unknown := set(figures) - set(self.columns):
                raise ValueError(
                    f"row {row!r} has figures for {sorted(unknown)}, which are not among the"
                    f" columns {self.columns}"
                )


@dataclass
class Check:
    """A claim of the study, whether what was measured bears it out, and the figure that says so."""

    claim: str
    holds: bool
    figure: str


@dataclass
class Sample:
    """A prompt and its completions by who wrote them ("with all experts", "without code")."""

    prompt: str
    completions: dict[str, str] = field(default_factory=dict)


def write_report(
    path: Path,
    *,
    title: str,
    intro: str,
    table: Table,
    checks: Sequence[Check],
    curves: Mapping[str, Sequence[tuple[int, float]]],
    routing: Mapping[str, np.ndarray],
    experts: Sequence[str],
    samples: Sequence[Sample],
    footer: str,
) -> None:
    """Writes the report of a study to `path` in one step; what is empty has no section.

    intro, footer: plain text, a blank line between paragraphs; the footer keeps its line breaks.
    curves: (tokens seen, loss in nats per token) by run. routing: float [L, E], each layer's shares
    of the experts, by data set.
    """
    sections = {
        "What was claimed, and what was measured": checks_section(checks),
        table.unit.capitalize(): table_section(table),
        "Training loss": curves_section(curves),
        "Routing": routing_section(routing, experts),
        "Samples": samples_section(samples),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, page(title, intro, sections, footer))


def page(title: str, intro: str, sections: Mapping[str, str], footer: str) -> str:
    """A whole HTML page of sections, heading -> HTML; those with no HTML are left out."""
    body = "\n".join(
        f"<section>\n<h2>{escape(heading)}</h2>\n{content}\n</section>"
        for heading, content in sections.items()
        if content
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<header>
<h1>{escape(title)}</h1>
{_paragraphs(intro)}
</header>
{body}
<footer>
{_paragraphs(footer)}
</footer>
</main>
</body>
</html>
"""


def checks_section(checks: Sequence[Check]) -> str:
    """The claims, each with its verdict and figure, under a count of those that hold."""
    if not checks:
        return ""
    items = "\n".join(
        f'<li class="{"holds" if check.holds else "fails"}"><b>{"✓ holds" if check.holds else "✗ does not hold"}</b><span>{escape(check.claim)}</span><span'
        f' class="figure">{escape(check.figure)}</span></li>'
        for check in checks
    )
    return (
        f"<p>{sum(check.holds for check in checks)} of {len(checks)} hold.</p>\n<ul"
        f' class="checks">\n{items}\n</ul>'
    )


def table_section(table: Table) -> str:
    """The table: changes against the reference as shades and in %, the best of each column bold.
    Cells stack on a narrow screen."""
    if not table.rows:
        return ""
    cells = _cells(table)
    strongest = max(
        (abs(cell.change) for cell in cells.values() if cell.change is not None), default=0.0
    )
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in table.columns)
    body = "\n".join(
        f'<tr><th scope="row">{escape(row)}</th>'
        + "".join(_table_cell(column, cells[row, column], strongest) for column in table.columns)
        + "</tr>"
        for row in table.rows
    )
    note = (
        f"{table.unit.capitalize()}, {'lower' if table.lowest_is_best else 'higher'} is better; the"
        " best of each column is bold."
    )
    if table.reference in table.rows:
        note += f" Percentages and shades: change against {table.reference}."
    better, worse = ("better", "worse") if table.reference in table.rows else ("", "")
    key = (
        f'<span class="key {better}">better</span><span class="key {worse}">worse</span>'
        if better
        else ""
    )
    return (
        '<div class="scroll"><table'
        f' class="figures">\n<thead><tr><td></td>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>\n<p'
        f' class="note">{escape(note)} {key}</p>'
    )


def curves_section(curves: Mapping[str, Sequence[tuple[int, float]]]) -> str:
    """The loss curves in one chart (drawn twice, for wide and for narrow screens) with a legend."""
    if not curves:
        return ""
    items = []
    for index, (name, points) in enumerate(curves.items()):
        tokens, losses = _finite(points)
        last = (
            f"{smooth(losses)[-1]:.3f} after {_tokens(tokens[-1])}"
            if len(losses)
            else "no finite loss"
        )
        if lost := len(points) - len(losses):
            last += f", {lost} of {len(points)} losses not finite"
        items.append(f"<li>{_key(index)}<span>{escape(name)} <small>{last}</small></span></li>")
    return (
        f'<figure>\n<div class="wide">{line_chart(curves, 900, 380)}</div>\n<div'
        f' class="narrow">{line_chart(curves, 380, 320)}</div>\n<ul'
        f' class="legend">\n{"".join(items)}\n</ul>\n<figcaption class="note">Loss of each run'
        " against the tokens that this run has seen; strong lines are smoothed, faint ones are as"
        " logged. The highest few percent, at the start, may lie above the"
        " chart.</figcaption>\n</figure>"
    )


def line_charts_section(
    curves: Mapping[str, Sequence[tuple[float, float]]], x_label: str, y_label: str
) -> str:
    """Few measured points a curve, as they are, in one chart (drawn twice, for wide and for narrow
    screens) with a legend."""
    if not curves:
        return ""
    keys = (
        f"<li>{_key(index)}<span>{escape(name)}</span></li>" for index, name in enumerate(curves)
    )
    charts = (
        "<div"
        f' class="{kind}">{line_chart(curves, width, height, x_label, y_label, is_logged=False)}</div>'
        for kind, width, height in (("wide", 900, 300), ("narrow", 380, 280))
    )
    return f'<figure>\n{"".join(charts)}\n<ul class="legend">\n{"".join(keys)}\n</ul>\n</figure>'


def line_chart(
    curves: Mapping[str, Sequence[tuple[float, float]]],
    width: int,
    height: int,
    x_label: str = "tokens",
    y_label: str = "nats per token",
    *,
    is_logged: bool = True,
) -> str:
    """Curves as an SVG of the given size, with axes and ticks. `is_logged`: of losses by tokens,
    many and noisy: a faint line as they are and a strong smoothed one; otherwise each point counts.
    """
    left, right, top, bottom = 52, 16, 10, 44
    inner_width, inner_height = width - left - right, height - top - bottom
    drawn = [_finite(points) for points in curves.values()]
    measured = [(tokens, losses) for tokens, losses in drawn if len(losses)]
    x_high = max((float(tokens.max()) for tokens, _ in measured), default=1.0) or 1.0
    # The first steps of a run from scratch would take most of the height: the axis ends at the
    # curves' 97th percentile.
    y_high = max(
        (float(np.quantile(losses, 0.97 if is_logged else 1.0)) for _, losses in measured),
        default=1.0,
    )
    y_low = min((float(losses.min()) for _, losses in measured), default=0.0)
    margin = 0.06 * (y_high - y_low) or 0.5
    y_low, y_high = y_low - margin, y_high + margin

    def x(tokens: float) -> float:
        return inner_width * tokens / x_high

    def y(loss: float) -> float:
        return inner_height * (y_high - loss) / (y_high - y_low)

    parts = []
    for tick in nice_ticks(y_low, y_high, height // 45):
        at = f"{top + y(tick):.1f}"
        parts.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{at}" y2="{at}"/>')
        parts.append(f'<text class="end" x="{left - 7}" y="{at}" dy="0.32em">{tick:.6g}</text>')
    for tick in nice_ticks(0, x_high, width // 90):
        at = f"{left + x(tick):.1f}"
        anchor = "end" if x(tick) > inner_width - 12 else "middle"
        parts.append(
            f'<line class="axis" x1="{at}" x2="{at}" y1="{height - bottom}"'
            f' y2="{height - bottom + 5}"/>'
        )
        parts.append(
            f'<text class="{anchor}" x="{at}" y="{height - bottom + 18}">{_tokens(tick)}</text>'
        )
    parts.append(f'<path class="axis" d="M{left} {top}V{height - bottom}H{width - right}"/>')
    parts.append(
        f'<text class="middle label" x="{left + inner_width / 2:.1f}"'
        f' y="{height - 6}">{escape(x_label)}</text>'
    )
    middle = f"{top + inner_height / 2:.1f}"
    parts.append(
        f'<text class="middle label" x="13" y="{middle}" transform="rotate(-90 13'
        f' {middle})">{escape(y_label)}</text>'
    )
    lines = []
    # all faint lines lie under all strong ones
    for raw in (True, False) if is_logged else (False,):
        for index, (tokens, losses) in enumerate(drawn):
            step = max(1, math.ceil(len(losses) / MOST_POINTS))
            # the last point is always one of them
            shown = (smooth(losses) if is_logged and not raw else losses)[::-1][::step][::-1]
            points = [
                (x(t), y(loss)) for t, loss in zip(tokens[::-1][::step][::-1], shown, strict=True)
            ]
            if points:  # a lone point becomes a dot, a line to itself with round ends
                d = "M" + "L".join(
                    f"{a:.1f} {b:.1f}" for a, b in (points if len(points) > 1 else points * 2)
                )
                lines.append(f'<path d="{d}" {_series(index, raw)}/>')
    # A nested SVG clips what it holds to its own box.
    parts.append(
        f'<svg x="{left}" y="{top}" width="{inner_width}"'
        f' height="{inner_height}">{"".join(lines)}</svg>'
    )
    names = escape(", ".join(curves))
    return (
        f'<svg class="chart" role="img" aria-label="{escape(y_label)} of {names}" viewBox="0 0'
        f' {width} {height}">{"".join(parts)}</svg>'
    )


def routing_section(routing: Mapping[str, np.ndarray], experts: Sequence[str]) -> str:
    """One heat map of expert shares per data set, on one colour scale. Raises ValueError for shares
    that are not [L, E]."""
    if not routing:
        return ""
    for name, shares in routing.items():
        if np.ndim(shares) != 2 or np.shape(shares)[1] != len(experts) or not np.size(shares):
            raise ValueError(
                f"routing of {name!r} has shape {np.shape(shares)}; expected [layers,"
                f" {len(experts)} experts]"
            )
    finite = np.concatenate(
        [np.asarray(shares)[np.isfinite(shares)] for shares in routing.values()]
    )
    most = math.ceil(10 * float(finite.max(initial=0.1)) - 1e-6) / 10
    maps = "\n".join(
        f"<figure><figcaption>{escape(name)}</figcaption>{routing_map(name, np.asarray(shares), experts, most)}</figure>"
        for name, shares in routing.items()
    )
    return (
        f'<div class="maps">\n{maps}\n</div>\n<div class="note scale"><span>share of the expert'
        f' (%)</span>{_scale(most)}</div>\n<p class="note">Rows are layers, the first at the top;'
        " the last row is the mean over the layers.</p>"
    )


def routing_map(name: str, shares: np.ndarray, experts: Sequence[str], most: float = 1.0) -> str:
    """Expert shares, float [L, E], as an SVG heat map with each share in %; the darkest cell means
    `most`."""
    cell, row, left = (42 if len(experts) <= 9 else 28), 22, 42
    labels = [_printable(expert) for expert in experts]
    # Cut in the middle: names of one study often begin alike.
    labels = [
        label if len(label) <= LABEL_LETTERS else f"{label[: LABEL_LETTERS - 7]}…{label[-6:]}"
        for label in labels
    ]
    slanted = any(6.8 * len(label) > cell for label in labels)
    longest = max(len(label) for label in labels)
    top = 14 + 5 * longest if slanted else 22
    width = left + cell * len(experts) + (5 * longest if slanted else 8)
    rows = [
        *((str(layer), shares[layer]) for layer in range(len(shares))),
        ("mean", shares.mean(0)),
    ]
    height = top + row * len(rows) + 8  # with a gap of 6 before the mean
    parts = []
    for index, (expert, label) in enumerate(zip(experts, labels, strict=True)):
        at = left + cell * (index + 0.5)
        place = (
            f'x="{at - 4:g}" y="{top - 6}" transform="rotate(-45 {at - 4:g} {top - 6})"'
            if slanted
            else f'x="{at:g}" y="{top - 7}"'
        )
        parts.append(
            f'<text class="{"" if slanted else "middle"}"'
            f" {place}><title>{escape(expert)}</title>{escape(label)}</text>"
        )
    for index, (label, values) in enumerate(rows):
        y = top + row * index + (6 if label == "mean" else 0)
        parts.append(
            f'<text class="end" x="{left - 6}" y="{y + row / 2:g}" dy="0.34em">{label}</text>'
        )
        for column, share in enumerate(values):
            x, known = left + cell * column, math.isfinite(share)
            parts.append(
                f'<rect class="cell" x="{x + 1}" y="{y + 1}" width="{cell - 2}" height="{row - 2}"'
                ' rx="2"/>'
            )
            if known:
                parts.append(_heat(share / most, x + 1, y + 1, cell - 2, row - 2))
            figure = f"{100 * share:.0f}" if known else "–"
            parts.append(
                f'<text class="middle" x="{x + cell / 2:g}" y="{y + row / 2:g}"'
                f' dy="0.34em">{figure}</text>'
            )
    return (
        f'<svg class="map" role="img" aria-label="Routing shares on {escape(name)}" width="{width}"'
        f' viewBox="0 0 {width} {height}">'
        f"{''.join(parts)}</svg>"
    )


def samples_section(samples: Sequence[Sample]) -> str:
    """Prompts, and under each its completions side by side, white space kept."""
    return "\n".join(
        '<article class="sample">\n<h3>Prompt</h3><div class="text"'
        f' dir="auto">{escape(sample.prompt)}</div>\n<div class="sides">'
        + "".join(
            f'<div><h3>{escape(author)}</h3><div class="text" dir="auto">{escape(text)}</div></div>'
            for author, text in sample.completions.items()
        )
        + "</div>\n</article>"
        for sample in samples
    )


def format_table(table: Table) -> str:
    """The table as aligned plain text: the best of a column is starred, changes against the
    reference are in %."""
    cells = _cells(table)
    columns = []
    for column in table.columns:
        below = [cells[row, column] for row in table.rows]
        room = max((len(cell.percent) for cell in below), default=0)
        lines = [
            f"{cell.text + ('*' if cell.best else ' ')}{cell.percent:>{room + 1 if room else 0}}"
            for cell in below
        ]
        columns.append([_one_line(column), *lines])
    names = [_one_line(table.unit), *map(_one_line, table.rows)]
    name_width, widths = max(map(len, names)), [max(map(len, column)) for column in columns]
    lines = [
        "  ".join(
            [
                f"{name:<{name_width}}",
                *(
                    f"{column[index]:>{width}}"
                    for column, width in zip(columns, widths, strict=True)
                ),
            ]
        )
        for index, name in enumerate(names)
    ]
    notes = ["* best of the column"]
    if table.reference in table.rows:
        notes.append(f"%: change against {_one_line(table.reference)}")
    return "\n".join([*(line.rstrip() for line in lines), "; ".join(notes)]) + "\n"


def markdown_table(table: Table) -> str:
    """The table in Markdown (GitHub's pipe tables): the best of a column is bold, changes against
    the reference are in %."""
    cells = _cells(table)

    def line(parts: Iterable[str]) -> str:
        return f"| {' | '.join(parts)} |"

    def figure(row: str, column: str) -> str:
        cell = cells[row, column]
        number = f"**{cell.text}**" if cell.best else cell.text
        return f"{number} ({cell.percent})" if cell.percent else number

    lines = [
        line(map(_markdown, [table.unit, *table.columns])),
        line(["---"] + ["---:"] * len(table.columns)),
    ]
    lines += [
        line([_markdown(row), *(figure(row, column) for column in table.columns)])
        for row in table.rows
    ]
    return "\n".join(lines) + "\n"


def smooth(losses: np.ndarray) -> np.ndarray:
    """Losses averaged with weights that halve with every 1/100 of the curve to either side, so that
    a falling curve is not delayed."""
    decay = 0.5 ** (100 / max(len(losses), 1))

    # the sums of all values up to each, weighted by age
    def faded(values: np.ndarray) -> np.ndarray:
        sums, total = np.empty(len(values)), 0.0
        for index, value in enumerate(values):
            sums[index] = total = decay * total + value
        return sums

    def both_sides(values: np.ndarray) -> np.ndarray:
        return faded(values) + faded(values[::-1])[::-1] - values

    return both_sides(losses) / both_sides(np.ones(len(losses)))


def nice_ticks(low: float, high: float, about: int) -> list[float]:
    """The multiples of 1, 2 or 5 times a power of ten from low to high, about as many as asked for
    and never more than twice."""
    rough = (high - low) / max(about, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    return [
        tick * step
        for tick in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    ]


def escape(text: str) -> str:
    """Text for HTML and XML, in elements and in quoted attributes; what neither may hold (control
    characters) becomes U+FFFD."""
    return html.escape(
        re.sub(
            "[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", text
        )
    )


@dataclass
class _Cell:
    text: str  # the figure, a dash where there is none
    change: float | None  # against the reference, 0.01 for +1%; None where either is unknown
    percent: str  # the change, "" where there is none
    better: bool
    best: bool  # of its column


def _cells(table: Table) -> dict[tuple[str, str], _Cell]:
    """What every form of the table says of each (row, column)."""
    cells = {}
    for column in table.columns:
        figures = {row: values.get(column) for row, values in table.rows.items()}
        known = [
            round(figure, 3)
            for figure in figures.values()
            if figure is not None and math.isfinite(figure)
        ]
        best = (min(known) if table.lowest_is_best else max(known)) if known else None
        base = figures.get(table.reference)
        for row, figure in figures.items():
            text = "–" if figure is None else f"{figure:.3f}"
            is_best = figure is not None and round(figure, 3) == best
            change = (
                figure / base - 1
                if figure is not None and base and row != table.reference
                else None
            )
            if change is None or not math.isfinite(change):
                cells[row, column] = _Cell(text, None, "", False, is_best)
                continue
            percent = f"{100 * change:+.1f}%"
            if percent in ("+0.0%", "-0.0%"):
                change, percent = 0.0, "0.0%"
            cells[row, column] = _Cell(
                text, change, percent, (change < 0) == table.lowest_is_best, is_best
            )
    return cells


def _table_cell(column: str, cell: _Cell, strongest: float) -> str:
    names = ["best"] if cell.best else []
    shade = ""
    if cell.change:
        names.append("better" if cell.better else "worse")
        # A root, so that a few percent still show beside an expert's loss of half on its
        # neighbour's data.
        shade = f' style="--shade: {0.06 + 0.44 * math.sqrt(abs(cell.change) / strongest):.3f}"'
    percent = cell.percent.replace("-", "−")
    return (
        f'<td class="{" ".join(names)}"{shade}'
        f' data-column="{escape(column)}"><span>{cell.text}</span> <small>{percent}</small></td>'
    )


def _finite(points: Sequence[tuple[float, float]]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and losses of the points that can be drawn."""
    array = np.asarray(points, np.float64).reshape(-1, 2)
    array = array[np.isfinite(array).all(1)]
    return array[:, 0], array[:, 1]


def _series(index: int, raw: bool = False) -> str:
    """The attributes of curve `index`'s lines."""
    dashes = "" if raw else DASHES[index // COLOURS % len(DASHES)]
    dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
    return f'class="curve c{index % COLOURS}{" raw" if raw else ""}"{dashed}'


def _key(index: int) -> str:
    """Curve `index` in a legend."""
    return (
        '<svg class="key" viewBox="0 0 26 10"><line x1="1" y1="5" x2="25" y2="5"'
        f" {_series(index)}/></svg>"
    )


def _tokens(count: float) -> str:
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(count) >= size * 0.9995:  # so that 999,999 is 1M, not 1000k
            return f"{count / size:.3g}{letter}"
    return f"{count:.3g}"


def _heat(strength: float, x: float, y: float, width: float, height: float) -> str:
    opacity = 0.78 * min(max(strength, 0.0), 1.0)
    return (
        f'<rect class="heat" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="2"'
        f' fill-opacity="{opacity:.3f}"/>'
    )


def _scale(most: float) -> str:
    """The heat maps' legend: eleven shades from nothing to `most`, with the share below the ends
    and the middle."""
    boxes = "".join(_heat(index / 10, 10 + 18 * index, 2, 17, 12) for index in range(11))
    ends = "".join(
        f'<text class="middle" x="{10 + 18 * index + 8.5:g}" y="28">{10 * most * index:g}</text>'
        for index in (0, 5, 10)
    )
    label = f"Colour scale, 0 to {100 * most:g} %"
    return (
        f'<svg class="scale" role="img" aria-label="{label}" width="218" viewBox="0 0 218'
        f' 32">{boxes}{ends}</svg>'
    )


def _paragraphs(text: str) -> str:
    return "\n".join(
        f"<p>{escape(part.strip())}</p>" for part in re.split(r"\n\s*\n", text) if part.strip()
    )


def _printable(text: str) -> str:
    """Text without what would move a terminal's cursor or colour it, or turn a line's direction
    round."""
    return "".join(
        letter if letter.isprintable() or letter.isspace() else "\ufffd" for letter in text
    )


def _one_line(text: str) -> str:
    return " ".join(_printable(text).split())


def _markdown(text: str) -> str:
    return (
        re.sub(r"([\\`*\[\]|])", r"\\\1", _one_line(text))
        .replace("&", "&amp;")
        .replace("<", "&lt;")
    )


# Colours after Okabe and Ito, which people with any colour vision can tell apart, darkened or
# lightened for contrast.
STYLE = """
:root { color-scheme: light; --ink: #1b1f24; --soft: #59636e; --page: #ffffff; --panel: #f5f6f8; --rule: #d5d9de;
  --good: 0 158 115; --bad: 213 94 0; --good-ink: #00684b; --bad-ink: #a34700; --heat: #0072b2;
  --c0: #0072b2; --c1: #d55e00; --c2: #008f68; --c3: #b8558c; --c4: #b07600; --c5: #3a9bd9; --c6: #59636e; }
@media screen and (prefers-color-scheme: dark) { :root { color-scheme: dark; --ink: #e6e9ed; --soft: #9aa4af; --page: #14171c;
  --panel: #1d2229; --rule: #353c46; --good-ink: #3dd6a5; --bad-ink: #ff9a57; --heat: #0d86cc;
  --c0: #4fa8e0; --c1: #ff8a3d; --c2: #2cc79a; --c3: #e59ac4; --c4: #e6b13a; --c5: #9ad8ff; --c6: #a5afba; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--page); color: var(--ink); overflow-wrap: anywhere; -webkit-print-color-adjust: exact;
  print-color-adjust: exact; font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 28px 20px 40px; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 0.8rem; }
h2 { font-size: 1.2rem; margin: 2.4rem 0 0.8rem; padding-bottom: 0.3rem; border-bottom: 1px solid var(--rule); break-after: avoid; }
h3 { font-size: 0.78rem; font-weight: 600; color: var(--soft); margin: 0 0 0.25rem; break-after: avoid; }
p { margin: 0 0 0.8rem; } header p { max-width: 46rem; }
small { font-size: 0.78em; color: var(--soft); }
figure { margin: 0; break-inside: avoid; }
.note { color: var(--soft); font-size: 0.85rem; margin: 0.6rem 0 0; }
.checks { list-style: none; margin: 0; padding: 0; }
.checks li { display: grid; grid-template-columns: 9.5rem 1fr minmax(9rem, auto); gap: 0 1rem; align-items: baseline;
  padding: 0.45rem 0.7rem; border-left: 4px solid rgb(var(--good)); background: var(--panel); margin-bottom: 4px; break-inside: avoid; }
.checks li.fails { border-color: rgb(var(--bad)); }
.checks b { color: var(--good-ink); white-space: nowrap; font-size: 0.9rem; } .checks .fails b { color: var(--bad-ink); }
.checks .figure { text-align: right; font-variant-numeric: tabular-nums; font-size: 0.9rem; max-width: 24rem; justify-self: end; }
.scroll { overflow-x: auto; }
.figures { border-collapse: separate; border-spacing: 2px; width: 100%; font-variant-numeric: tabular-nums; font-size: 0.95rem; }
.figures th { font-weight: 600; text-align: left; padding: 0.3rem 0.5rem; }
.figures thead th { text-align: right; font-size: 0.85rem; color: var(--soft); vertical-align: bottom; }
.figures tbody th { font-weight: 500; min-width: 7rem; }
.figures tr { break-inside: avoid; }
.figures td { text-align: right; padding: 0.3rem 0.5rem; border-radius: 3px; }
.figures tbody td { background: var(--panel); }
.figures td span, .figures small { display: inline-block; white-space: nowrap; }
.figures td span { min-width: 2.9em; }
.figures small { min-width: 3.6rem; color: var(--ink); opacity: 0.8; }
.figures td.best span { font-weight: 800; text-decoration: underline; text-underline-offset: 3px; }
.figures td.better, .key.better { background: rgb(var(--good) / var(--shade)); }
.figures td.worse, .key.worse { background: rgb(var(--bad) / var(--shade)); }
.note .key { --shade: 0.4; color: var(--ink); padding: 0.1rem 0.5rem; border-radius: 3px; margin-right: 0.3rem; }
svg { display: block; max-width: 100%; height: auto; } svg text { fill: var(--ink); font-size: 12px; }
.chart { width: 100%; } .narrow { display: none; }
.end { text-anchor: end; } .middle { text-anchor: middle; } .chart text { fill: var(--soft); }
.grid { stroke: var(--rule); stroke-width: 1; } .axis { stroke: var(--soft); stroke-width: 1; fill: none; }
.curve { fill: none; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
.curve.raw { stroke-width: 1; stroke-opacity: 0.25; }
.c0 { stroke: var(--c0); } .c1 { stroke: var(--c1); } .c2 { stroke: var(--c2); } .c3 { stroke: var(--c3); }
.c4 { stroke: var(--c4); } .c5 { stroke: var(--c5); } .c6 { stroke: var(--c6); }
.legend { list-style: none; margin: 0.5rem 0 0; padding: 0; display: flex; flex-wrap: wrap; gap: 0.2rem 1.4rem; font-size: 0.9rem; }
.legend li { display: flex; align-items: center; gap: 0.4rem; } .legend svg { width: 26px; flex: none; }
.maps { display: flex; flex-wrap: wrap; gap: 1.2rem 1.6rem; } .maps figure { max-width: 100%; }
.maps figcaption { font-weight: 600; font-size: 0.9rem; }
.cell { fill: var(--panel); } .heat { fill: var(--heat); }
.note.scale { display: flex; flex-wrap: wrap; gap: 0 0.6rem; align-items: flex-start; } svg.scale text { fill: var(--soft); }
.sample { background: var(--panel); border-radius: 6px; padding: 0.9rem 1rem; margin-bottom: 1rem; }
.text { white-space: pre-wrap; font: 0.85rem/1.5 ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
.sides { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 18rem), 1fr)); gap: 0.9rem 1.4rem; margin-top: 0.9rem; }
.sides > div { border-left: 3px solid var(--rule); padding-left: 0.8rem; min-width: 0; }
footer { margin-top: 2.4rem; padding-top: 0.8rem; border-top: 1px solid var(--rule); color: var(--soft); font-size: 0.85rem;
  white-space: pre-line; }
@media (max-width: 640px) {
  main { padding: 18px 14px 28px; } h1 { font-size: 1.4rem; }
  .wide { display: none; } .narrow { display: block; }
  .checks li { grid-template-columns: 1fr; } .checks .figure { text-align: left; justify-self: start; color: var(--soft); }
  .figures, .figures tbody { display: block; } .figures thead { display: none; }
  .figures tr { display: grid; grid-template-columns: repeat(auto-fill, minmax(6.6rem, 1fr)); gap: 2px; margin-bottom: 0.7rem; }
  .figures tbody th { grid-column: 1 / -1; padding: 0.2rem 0; font-weight: 600; }
  .figures td { text-align: left; } .figures small { min-width: 0; }
  .figures td::before { content: attr(data-column); display: block; font-size: 0.75rem; opacity: 0.8; }
}
@page { margin: 14mm; }
@media print {
  html { font-size: 9.5pt; } body { font-size: 1rem; }
  main { max-width: none; padding: 0; } .scroll { overflow: visible; } .sample { break-inside: avoid; }
}
"""
