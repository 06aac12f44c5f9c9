"""Curves as SVG: charts with axes and legends."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .markup import element, escape

# Curves have page.html's colours c0 to c6, after Okabe and Ito: people with any colour vision can
# tell them apart. Further curves have the same colours again, with dashes.
COLOURS = 7
DASHES = (None, "7 3", "2 3", "9 3 2 3")
MOST_POINTS = 400  # drawn per curve
LEFT, RIGHT, TOP, BOTTOM = 52, 16, 10, 44  # margins around the area of the curves

Curves = Mapping[str, Sequence[tuple[float, float]]]  # points by name


def curves_section(curves: Mapping[str, Sequence[tuple[int, float]]]) -> str:
    """Losses (tokens seen, nats per token) by run: one chart, and a legend with the last losses.

    The chart is drawn twice, for wide and for narrow screens.
    """
    if not curves:
        return ""
    keys = (
        f"{escape(name)} <small>{_last_loss(points)}</small>" for name, points in curves.items()
    )
    wide, narrow = line_chart(curves, 900, 380), line_chart(curves, 380, 320)
    return (
        f'<figure>\n<div class="wide">{wide}</div>\n<div class="narrow">{narrow}</div>\n'
        f'{_legend(keys)}\n<figcaption class="note">Loss of each run against the tokens that this'
        " run has seen; strong lines are smoothed, faint ones are as logged. The highest few"
        " percent, at the start, may lie above the chart.</figcaption>\n</figure>"
    )


def line_charts_section(curves: Curves, x_label: str, y_label: str) -> str:
    """Curves of a few measured points as they are: one chart with a legend.

    The chart is drawn twice, for wide and for narrow screens.
    """
    if not curves:
        return ""
    wide = line_chart(curves, 900, 300, x_label, y_label, is_logged=False)
    narrow = line_chart(curves, 380, 280, x_label, y_label, is_logged=False)
    return (
        f'<figure>\n<div class="wide">{wide}</div><div class="narrow">{narrow}</div>\n'
        f"{_legend(map(escape, curves))}\n</figure>"
    )


def line_chart(
    curves: Curves,
    width: int,
    height: int,
    x_label: str = "tokens",
    y_label: str = "nats per token",
    *,
    is_logged: bool = True,
) -> str:
    """Curves as an SVG of the given size, with axes and ticks.

    `is_logged`: many noisy losses, drawn as a faint line and a strong smoothed one; otherwise
    every point counts, and there is one line through them.
    """
    measured = [_finite(points) for points in curves.values()]
    frame = _frame(measured, width, height, is_logged)
    # A nested SVG clips what it holds to its own box.
    area = element(
        "svg",
        "".join(_lines(frame, measured, is_logged)),
        x=LEFT,
        y=TOP,
        width=frame.inner_width,
        height=frame.inner_height,
    )
    return element(
        "svg",
        "".join(_axes(frame, x_label, y_label)) + area,
        class_="chart",
        role="img",
        aria_label=f"{y_label} of {', '.join(curves)}",
        viewBox=f"0 0 {width} {height}",
    )


def smooth(losses: np.ndarray) -> np.ndarray:
    """Losses averaged to both sides, so that a falling curve is not delayed.

    What a loss counts for halves with every 1/100 of the curve's length.
    """
    decay = 0.5 ** (100 / max(len(losses), 1))

    # the sums of all values up to each, faded by age
    def faded(values: np.ndarray) -> np.ndarray:
        sums, total = np.empty(len(values)), 0.0
        for index, value in enumerate(values):
            sums[index] = total = decay * total + value
        return sums

    def both_sides(values: np.ndarray) -> np.ndarray:
        return faded(values) + faded(values[::-1])[::-1] - values

    return both_sides(losses) / both_sides(np.ones(len(losses)))


def nice_ticks(low: float, high: float, about: int) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten from low to high.

    There are about as many as asked for, and never more than twice as many.
    """
    rough = (high - low) / max(about, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [tick * step for tick in range(first, last + 1)]


@dataclass(frozen=True)
class _Frame:
    """A chart's size, and the ends of its axes; the x axis starts at 0."""

    width: int
    height: int
    x_high: float
    y_low: float
    y_high: float

    @property
    def inner_width(self) -> int:
        return self.width - LEFT - RIGHT

    @property
    def inner_height(self) -> int:
        return self.height - TOP - BOTTOM

    def x(self, value: float) -> float:
        """From the left of the curves' area."""
        return self.inner_width * value / self.x_high

    def y(self, value: float) -> float:
        """From the top of the curves' area."""
        return self.inner_height * (self.y_high - value) / (self.y_high - self.y_low)


Points = tuple[np.ndarray, np.ndarray]  # tokens, losses


def _frame(measured: Sequence[Points], width: int, height: int, is_logged: bool) -> _Frame:
    measured = [(tokens, losses) for tokens, losses in measured if len(losses)]
    x_high = max((float(tokens.max()) for tokens, _ in measured), default=1.0) or 1.0
    # The first steps of a run from scratch would take most of the height: the axis of logged
    # losses ends at the curves' 97th percentile.
    part = 0.97 if is_logged else 1.0
    y_high = max((float(np.quantile(losses, part)) for _, losses in measured), default=1.0)
    y_low = min((float(losses.min()) for _, losses in measured), default=0.0)
    margin = 0.06 * (y_high - y_low) or 0.5
    return _Frame(width, height, x_high, y_low - margin, y_high + margin)


def _axes(frame: _Frame, x_label: str, y_label: str) -> Iterator[str]:
    right, bottom = frame.width - RIGHT, frame.height - BOTTOM
    for tick in nice_ticks(frame.y_low, frame.y_high, frame.height // 45):
        at = f"{TOP + frame.y(tick):.1f}"
        yield element("line", class_="grid", x1=LEFT, x2=right, y1=at, y2=at)
        yield element("text", f"{tick:.6g}", class_="end", x=LEFT - 7, y=at, dy="0.32em")
    for tick in nice_ticks(0, frame.x_high, frame.width // 90):
        at = f"{LEFT + frame.x(tick):.1f}"
        anchor = "end" if frame.x(tick) > frame.inner_width - 12 else "middle"
        yield element("line", class_="axis", x1=at, x2=at, y1=bottom, y2=bottom + 5)
        yield element("text", _tokens(tick), class_=anchor, x=at, y=bottom + 18)
    yield element("path", class_="axis", d=f"M{LEFT} {TOP}V{bottom}H{right}")
    middle = f"{LEFT + frame.inner_width / 2:.1f}"
    yield element("text", escape(x_label), class_="middle label", x=middle, y=frame.height - 6)
    middle = f"{TOP + frame.inner_height / 2:.1f}"
    turned = f"rotate(-90 13 {middle})"
    yield element("text", escape(y_label), class_="middle label", x=13, y=middle, transform=turned)


def _lines(frame: _Frame, measured: Sequence[Points], is_logged: bool) -> Iterator[str]:
    # all faint lines lie under all strong ones
    for is_raw in (True, False) if is_logged else (False,):
        for index, (tokens, losses) in enumerate(measured):
            if len(losses):
                shown = smooth(losses) if is_logged and not is_raw else losses
                yield element("path", d=_path(frame, tokens, shown), **_style(index, is_raw))


def _path(frame: _Frame, tokens: np.ndarray, losses: np.ndarray) -> str:
    step = math.ceil(len(losses) / MOST_POINTS)
    # taken from the end, so that the last point is always one of them
    shown = zip(tokens[::-step][::-1], losses[::-step][::-1], strict=True)
    points = [f"{frame.x(t):.1f} {frame.y(loss):.1f}" for t, loss in shown]
    # a lone point becomes a dot: a line to itself, with round ends
    return "M" + "L".join(points if len(points) > 1 else points * 2)


def _style(index: int, is_raw: bool = False) -> dict[str, str | None]:
    """The attributes of curve `index`'s lines."""
    classes = f"curve c{index % COLOURS}{' raw' if is_raw else ''}"
    dashes = None if is_raw else DASHES[index // COLOURS % len(DASHES)]
    return {"class_": classes, "stroke_dasharray": dashes}


def _legend(texts: Iterator[str]) -> str:
    """Of the curves in their order; `texts` are HTML."""
    items = []
    for index, text in enumerate(texts):
        line = element("line", x1=1, y1=5, x2=25, y2=5, **_style(index))
        key = element("svg", line, class_="key", viewBox="0 0 26 10")
        items.append(f"<li>{key}<span>{text}</span></li>")
    return f'<ul class="legend">\n{"".join(items)}\n</ul>'


def _last_loss(points: Sequence[tuple[float, float]]) -> str:
    tokens, losses = _finite(points)
    if len(losses):
        last = f"{smooth(losses)[-1]:.3f} after {_tokens(tokens[-1])}"
    else:
        last = "no finite loss"
    if lost := len(points) - len(losses):
        last += f", {lost} of {len(points)} losses not finite"
    return last


def _finite(points: Sequence[tuple[float, float]]) -> Points:
    """Tokens and losses of the points that can be drawn."""
    array = np.asarray(points, np.float64).reshape(-1, 2)
    array = array[np.isfinite(array).all(1)]
    return array[:, 0], array[:, 1]


def _tokens(count: float) -> str:
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(count) >= size * 0.9995:  # so that 999,999 is 1M, not 1000k
            return f"{count / size:.3g}{letter}"
    return f"{count:.3g}"
