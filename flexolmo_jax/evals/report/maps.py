"""Routing as SVG: heat maps of the experts' shares in every layer."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from .markup import element, escape, printable

LABEL_LETTERS = 14  # of an expert's name above a map
LEFT, HEIGHT = 42, 22  # the margin with the layers' numbers; the height of a layer


def routing_section(routing: Mapping[str, np.ndarray], experts: Sequence[str]) -> str:
    """A heat map of every data set's shares, float [L, E], on one colour scale.

    Raises ValueError for shares of another shape.
    """
    if not routing:
        return ""
    for name, shares in routing.items():
        if np.ndim(shares) != 2 or np.shape(shares)[1] != len(experts) or not np.size(shares):
            raise ValueError(
                f"routing of {name!r} has shape {np.shape(shares)}; expected [layers,"
                f" {len(experts)} experts]"
            )
    known = [np.asarray(shares)[np.isfinite(shares)] for shares in routing.values()]
    most = math.ceil(10 * float(np.concatenate(known).max(initial=0.1)) - 1e-6) / 10
    figures = []
    for name, shares in routing.items():
        drawing = routing_map(name, np.asarray(shares), experts, most)
        figures.append(f"<figure><figcaption>{escape(name)}</figcaption>{drawing}</figure>")
    maps = "\n".join(figures)
    return (
        f'<div class="maps">\n{maps}\n</div>\n'
        f'<div class="note scale"><span>share of the expert (%)</span>{_scale(most)}</div>\n'
        '<p class="note">Each line is a layer, the first at the top; the last is the mean over the'
        " layers.</p>"
    )


def routing_map(name: str, shares: np.ndarray, experts: Sequence[str], most: float = 1.0) -> str:
    """Shares, float [L, E], as a heat map with each share in %; the darkest cell means `most`."""
    cell = 42 if len(experts) <= 9 else 28  # its width
    labels = list(map(_label, experts))
    longest = max(map(len, labels))
    is_slanted = 6.8 * longest > cell
    top = 14 + 5 * longest if is_slanted else 22
    parts = []
    for index, (expert, label) in enumerate(zip(experts, labels, strict=True)):
        title = f"<title>{escape(expert)}</title>{escape(label)}"
        parts.append(_heading(title, LEFT + cell * (index + 0.5), top, is_slanted))
    layers = {str(layer): shares[layer] for layer in range(len(shares))}
    for index, (label, of_layer) in enumerate((layers | {"mean": shares.mean(0)}).items()):
        y = top + HEIGHT * index + (6 if label == "mean" else 0)
        middle = f"{y + HEIGHT / 2:g}"
        parts.append(element("text", label, class_="end", x=LEFT - 6, y=middle, dy="0.34em"))
        parts += [_cell(LEFT + cell * e, y, cell, of_layer[e], most) for e in range(len(experts))]
    width = LEFT + cell * len(experts) + (5 * longest if is_slanted else 8)
    height = top + HEIGHT * (len(layers) + 1) + 8  # with the gap of 6 before the mean
    return element(
        "svg",
        "".join(parts),
        class_="map",
        role="img",
        aria_label=f"Routing shares on {name}",
        width=width,
        viewBox=f"0 0 {width} {height}",
    )


def _heading(text: str, x: float, top: int, is_slanted: bool) -> str:
    if not is_slanted:
        return element("text", text, class_="middle", x=f"{x:g}", y=top - 7)
    turned = f"rotate(-45 {x - 4:g} {top - 6})"
    return element("text", text, class_="", x=f"{x - 4:g}", y=top - 6, transform=turned)


def _cell(x: int, y: int, width: int, share: float, most: float) -> str:
    place = {"x": x + 1, "y": y + 1, "width": width - 2, "height": HEIGHT - 2}
    box = element("rect", class_="cell", **place, rx=2)
    is_known = math.isfinite(share)
    heat = _heat(share / most, **place) if is_known else ""
    figure = f"{100 * share:.0f}" if is_known else "–"
    middle = {"x": f"{x + width / 2:g}", "y": f"{y + HEIGHT / 2:g}"}
    return box + heat + element("text", figure, class_="middle", **middle, dy="0.34em")


def _heat(strength: float, x: int, y: int, width: int, height: int) -> str:
    opacity = f"{0.78 * min(max(strength, 0.0), 1.0):.3f}"
    place = {"x": x, "y": y, "width": width, "height": height}
    return element("rect", class_="heat", **place, rx=2, fill_opacity=opacity)


def _scale(most: float) -> str:
    """The maps' legend: eleven shades from nothing to `most`, and the shares of three of them."""
    boxes = [_heat(index / 10, 10 + 18 * index, 2, 17, 12) for index in range(11)]
    shares = [
        element("text", f"{10 * most * i:g}", class_="middle", x=f"{18.5 + 18 * i:g}", y=28)
        for i in (0, 5, 10)
    ]
    return element(
        "svg",
        "".join([*boxes, *shares]),
        class_="scale",
        role="img",
        aria_label=f"Colour scale, 0 to {100 * most:g} %",
        width=218,
        viewBox="0 0 218 32",
    )


def _label(expert: str) -> str:
    """An expert's name, cut in the middle: names of one study often begin alike."""
    label = printable(expert)
    if len(label) <= LABEL_LETTERS:
        return label
    return f"{label[: LABEL_LETTERS - 7]}…{label[-6:]}"
