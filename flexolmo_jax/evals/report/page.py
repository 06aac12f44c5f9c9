"""A study's report as one HTML file.

The page stands alone: CSS and SVG are inline, there is no script, and a content policy in the page
forbids every request to a network. It is light or dark as the reader's system is, and fits a phone
and paper. `page.html` is the template; a section is HTML that a function here, in `tables`,
`charts` or `maps` makes from data.
"""

import importlib.resources
import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from .markup import element, escape


@dataclass
class Check:
    """A claim of the study, whether the measurements support it, and the figure that decides."""

    claim: str
    holds: bool
    figure: str


@dataclass
class Sample:
    """A prompt and its completions by who wrote them ("with all experts", "without code")."""

    prompt: str
    completions: dict[str, str] = field(default_factory=dict)


def page(title: str, intro: str, sections: Mapping[str, str], footer: str) -> str:
    """A whole HTML page of sections, heading -> HTML; a section without HTML is left out.

    intro, footer: plain text, a blank line between paragraphs; the footer keeps its line breaks.
    """
    template = importlib.resources.files("flexolmo_jax.evals.report").joinpath("page.html")
    body = "\n".join(
        f"<section>\n<h2>{escape(heading)}</h2>\n{content}\n</section>"
        for heading, content in sections.items()
        if content
    )
    return string.Template(template.read_text(encoding="utf-8")).substitute(
        title=escape(title), intro=_paragraphs(intro), sections=body, footer=_paragraphs(footer)
    )


def checks_section(checks: Sequence[Check]) -> str:
    """The claims, each with its verdict and figure, under a count of those that hold."""
    if not checks:
        return ""
    items = "\n".join(map(_check_item, checks))
    count = f"<p>{sum(check.holds for check in checks)} of {len(checks)} hold.</p>"
    return f'{count}\n<ul class="checks">\n{items}\n</ul>'


def samples_section(samples: Sequence[Sample]) -> str:
    """Prompts, and under each its completions side by side, white space kept."""
    return "\n".join(map(_sample_article, samples))


def _check_item(check: Check) -> str:
    kind, verdict = ("holds", "✓ holds") if check.holds else ("fails", "✗ does not hold")
    claim = element("span", escape(check.claim))
    figure = element("span", escape(check.figure), class_="figure")
    return element("li", f"<b>{verdict}</b>{claim}{figure}", class_=kind)


def _sample_article(sample: Sample) -> str:
    sides = "".join(
        element("div", f"<h3>{escape(author)}</h3>{_written(text)}")
        for author, text in sample.completions.items()
    )
    prompt = f"<h3>Prompt</h3>{_written(sample.prompt)}"
    return f'<article class="sample">\n{prompt}\n<div class="sides">{sides}</div>\n</article>'


def _written(text: str) -> str:
    """Text in any script, right to left too."""
    return element("div", escape(text), class_="text", dir="auto")


def _paragraphs(text: str) -> str:
    parts = (part.strip() for part in re.split(r"\n\s*\n", text))
    return "\n".join(f"<p>{escape(part)}</p>" for part in parts if part)
