"""A table of figures in its three forms: HTML for the page, text for a terminal, Markdown."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from .markup import element, escape, printable


@dataclass
class Table:
    """A figure for every line (a model) and column (a data set), read against the line `reference`.

    A figure that is None or absent was not measured. Raises ValueError for a line with figures
    outside the columns.
    """

    columns: list[str]
    lines: Mapping[str, Mapping[str, float | None]]
    unit: str = "bits per byte"
    reference: str = "anchor"
    lowest_is_best: bool = True

    def __post_init__(self) -> None:
        for name, figures in self.lines.items():
            if unknown := set(figures) - set(self.columns):
                raise ValueError(
                    f"line {name!r} has figures for {sorted(unknown)}, which are not among the"
                    f" columns {self.columns}"
                )


@dataclass
class _Cell:
    text: str  # the figure, a dash where there is none
    change: float | None  # against the reference, 0.01 for +1%; None where either is unknown
    is_better: bool  # than the reference
    is_best: bool  # of its column

    @property
    def percent(self) -> str:
        if self.change is None:
            return ""
        return f"{100 * self.change:+.1f}%" if self.change else "0.0%"


def table_section(table: Table) -> str:
    """The table in HTML: the best of a column is bold, a change has a shade and a percentage.

    Cells stack on a narrow screen.
    """
    if not table.lines:
        return ""
    cells = _cells(table)
    strongest = max((abs(cell.change or 0.0) for cell in cells.values()), default=0.0)
    head = "".join(element("th", escape(column), scope="col") for column in table.columns)
    lines = (
        element("th", escape(name), scope="row")
        + "".join(_html_cell(column, cells[name, column], strongest) for column in table.columns)
        for name in table.lines
    )
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    return (
        '<div class="scroll"><table class="figures">\n'
        f"<thead><tr><td></td>{head}</tr></thead>\n"
        f"<tbody>\n{body}\n</tbody>\n"
        f'</table></div>\n<p class="note">{_note(table)}</p>'
    )


def format_table(table: Table) -> str:
    """The table as aligned text: the best of a column is starred, changes are in %."""
    cells = _cells(table)
    names = [_one_line(table.unit), *map(_one_line, table.lines)]
    columns = [[f"{name:<{max(map(len, names))}}" for name in names]]
    for column in table.columns:
        texts = [_one_line(column), *_text_cells([cells[name, column] for name in table.lines])]
        columns.append([f"{text:>{max(map(len, texts))}}" for text in texts])
    lines = ["  ".join(line).rstrip() for line in zip(*columns, strict=True)]
    note = "* best of the column"
    if table.reference in table.lines:
        note += f"; %: change against {_one_line(table.reference)}"
    return "\n".join([*lines, note]) + "\n"


def markdown_table(table: Table) -> str:
    """The table in Markdown (GitHub's pipe tables): the best of a column is bold, changes in %."""
    cells = _cells(table)

    def line(parts: Iterable[str]) -> str:
        return f"| {' | '.join(parts)} |"

    def figure(cell: _Cell) -> str:
        number = f"**{cell.text}**" if cell.is_best else cell.text
        return f"{number} ({cell.percent})" if cell.percent else number

    lines = [
        line(map(_markdown, [table.unit, *table.columns])),
        line(["---"] + ["---:"] * len(table.columns)),
    ]
    for name in table.lines:
        figures = (figure(cells[name, column]) for column in table.columns)
        lines.append(line([_markdown(name), *figures]))
    return "\n".join(lines) + "\n"


def _cells(table: Table) -> dict[tuple[str, str], _Cell]:
    """By (line, column): what every form of the table says there."""
    cells = {}
    for column in table.columns:
        figures = {name: line.get(column) for name, line in table.lines.items()}
        best = _best(figures.values(), table.lowest_is_best)
        for name, figure in figures.items():
            text = "–" if figure is None else f"{figure:.3f}"
            is_best = figure is not None and round(figure, 3) == best
            is_reference = name == table.reference
            change = None if is_reference else _change(figure, figures.get(table.reference))
            is_better = (change or 0.0) < 0 if table.lowest_is_best else (change or 0.0) > 0
            cells[name, column] = _Cell(text, change, is_better, is_best)
    return cells


def _best(figures: Iterable[float | None], lowest_is_best: bool) -> float | None:
    """Of the figures as they are shown: two that look the same are both the best."""
    known = [round(x, 3) for x in figures if x is not None and math.isfinite(x)]
    if not known:
        return None
    return min(known) if lowest_is_best else max(known)


def _change(figure: float | None, base: float | None) -> float | None:
    """Relative to the reference's figure; 0 where no digit of it would be shown."""
    if figure is None or not base or not math.isfinite(change := figure / base - 1):
        return None
    return 0.0 if f"{100 * abs(change):.1f}" == "0.0" else change


def _html_cell(column: str, cell: _Cell, strongest: float) -> str:
    classes, shade = ["best"] if cell.is_best else [], None
    if cell.change:
        classes.append("better" if cell.is_better else "worse")
        # A root: an expert may lose half on its neighbour's data, and beside that a change of a
        # few percent should still show.
        shade = f"--shade: {0.06 + 0.44 * math.sqrt(abs(cell.change) / strongest):.3f}"
    content = f"<span>{cell.text}</span> <small>{cell.percent.replace('-', '−')}</small>"
    return element("td", content, class_=" ".join(classes), style=shade, data_column=column)


def _note(table: Table) -> str:
    better = "lower" if table.lowest_is_best else "higher"
    note = f"{table.unit.capitalize()}, {better} is better; the best of each column is bold."
    if table.reference not in table.lines:
        return f"{escape(note)} "
    note += f" Percentages and shades: change against {table.reference}."
    keys = "".join(element("span", key, class_=f"key {key}") for key in ("better", "worse"))
    return f"{escape(note)} {keys}"


def _text_cells(cells: list[_Cell]) -> list[str]:
    """A column's figures and stars, then its changes, aligned among themselves."""
    width = max((len(cell.percent) for cell in cells), default=0)
    width += bool(width)  # a space before the changes, where there is any
    return [f"{cell.text}{'*' if cell.is_best else ' '}{cell.percent:>{width}}" for cell in cells]


def _one_line(text: str) -> str:
    return " ".join(printable(text).split())


def _markdown(text: str) -> str:
    escaped = re.sub(r"([\\`*\[\]|])", r"\\\1", _one_line(text))
    return escaped.replace("&", "&amp;").replace("<", "&lt;")
