"""The report page: whole, standing alone, safe with any text, and saying every figure; and the
table as text and Markdown."""

import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import numpy as np
import pytest

from flexolmo_jax.evals.report.charts import (
    curves_section,
    line_chart,
    line_charts_section,
    nice_ticks,
    smooth,
)
from flexolmo_jax.evals.report.maps import routing_map, routing_section
from flexolmo_jax.evals.report.markup import escape
from flexolmo_jax.evals.report.page import Check, Sample, checks_section, page, samples_section
from flexolmo_jax.evals.report.tables import Table, format_table, markdown_table, table_section

EXPERTS = ["anchor", "code", "law"]
HOSTILE = (
    """<script>alert("x")</script>'"><img src=//evil.example/a onerror='b'>&amp;\x1b[31m\x00|**]"""
    "(http://evil.example)\ud800"
)


def table(**lines: dict[str, float | None]) -> Table:
    figures: dict[str, dict[str, float | None]] = {
        "anchor": {"public": 1.4, "code": 1.6, "law": 1.5},
        "pair:code": {"public": 1.4421, "code": 1.2345, "law": 1.5},
        "merged": {"public": 1.386, "code": 1.3001, "law": 1.2},
    }
    return Table(["public", "code", "law"], figures | lines)


def written(name: str = "code") -> str:
    """A whole page with `name` wherever a name or text may stand."""
    rng = np.random.default_rng(0)
    figures: dict[str, dict[str, float | None]] = {
        "anchor": {"public": 1.4, name: 1.6},
        f"pair:{name}": {"public": 1.5, name: 1.2},
    }
    checks = [Check(f"{name} is better", True, f"-25% on {name}"), Check("not so", False, "+7%")]
    curves = {name: [(512 * step, 3 + 5 / step) for step in range(1, 900)], "short": [(512, 4.0)]}
    routing = {name: rng.dirichlet(np.ones(3), 4), "public": rng.dirichlet(np.ones(3), 4)}
    sample = Sample(f"\n  {name}:\n\tdef", {f"without {name}": f"  two  spaces {name}\n"})
    sections = {
        f"Claims on {name}": checks_section(checks),
        "Table": table_section(Table(["public", name], figures, unit=name)),
        "Curves": curves_section(curves),
        "Routing": routing_section(routing, ["anchor", name, "law"]),
        "Samples": samples_section([sample]),
    }
    footer = f"one line of {name}\nand another"
    return page(f"A study of {name}", f"First {name}.\n\nSecond.", sections, footer)


class Elements(HTMLParser):
    """The tags of a page with their attributes, and its visible text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def drawings(text: str) -> list[ElementTree.Element]:
    """Every outermost SVG, parsed as XML."""
    found, depth, start = [], 0, 0
    for match in re.finditer(r"<svg\b|</svg>", text):
        if match[0] == "</svg>":
            depth -= 1
            if not depth:
                found.append(ElementTree.fromstring(text[start : match.end()]))
        else:
            start = start if depth else match.start()
            depth += 1
    return found


@pytest.mark.parametrize("name", ["code", HOSTILE])
def test_the_page_loads_nothing_and_runs_nothing_whatever_its_texts_are(name):
    text = written(name)
    elements = Elements(text)
    known = (
        "html head meta title style body main header footer section article figure figcaption h1 h2"
        " h3 p b ul li div span small"
    )
    known += " table thead tbody tr th td svg g path line rect text"
    assert {tag for tag, _ in elements.tags} <= set(known.split())
    attributes = [(key, value or "") for _, found in elements.tags for key, value in found.items()]
    assert not [
        key
        for key, _ in attributes
        if key in ("src", "href", "srcset", "action", "xlink:href") or key.startswith("on")
    ]
    styles = re.findall(r"<style>(.*?)</style>", text, re.S)
    assert len(styles) == 1
    assert not re.search(
        r"url\(|@import",
        " ".join([*styles, *(value for key, value in attributes if key == "style")]),
    )
    policies = [
        found["content"] for tag, found in elements.tags if tag == "meta" and "http-equiv" in found
    ]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'"]


def test_hostile_text_is_shown_as_text():
    text = written(HOSTILE)
    assert "<script" not in text and "<img" not in text
    assert not re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f]", text)
    shown = HOSTILE.replace("\x1b", "\ufffd").replace("\x00", "\ufffd").replace("\ud800", "\ufffd")
    elements = Elements(text)
    for around in (
        "A study of {}",
        "First {}.",
        "{} is better",
        "-25% on {}",
        "pair:{}",
        "without {}",
        "  two  spaces {}\n",
        "of {}\nand",
    ):
        assert around.format(shown) in elements.text
    assert shown in [found["data-column"] for _, found in elements.tags if "data-column" in found]


@pytest.mark.parametrize("name", ["code", HOSTILE])
def test_every_drawing_is_well_formed(name):
    found = drawings(written(name))
    # Two charts, two curves' keys, two maps and a scale.
    assert len(found) == 7
    numbers = [
        value
        for svg in found
        for node in svg.iter()
        for key, value in node.items()
        if key in ("d", "x", "y", "x1", "y1")
    ]
    assert numbers and not [value for value in numbers if "nan" in value or "inf" in value]


def test_every_figure_of_the_table_is_in_all_its_forms_with_its_change():
    made = table()
    forms = [
        Elements(table_section(made)).text.replace("−", "-"),
        format_table(made),
        markdown_table(made),
    ]
    for form in forms:
        for figures in made.lines.values():
            for figure in figures.values():
                assert f"{figure:.3f}" in form
        for percent in ("+3.0%", "-22.8%", "-1.0%", "-18.7%", "-20.0%", " 0.0%"):
            assert percent.strip() in form


def test_a_lower_figure_is_shaded_better_and_the_lowest_of_each_column_is_best():
    def classes(made: Table) -> dict[str, str]:
        cells = re.findall(r'<td class="([^"]*)"[^>]*><span>([^<]*)</span>', table_section(made))
        return {figure: names for names, figure in cells}

    found = classes(table())
    assert found["1.442"] == "worse"
    assert found["1.234"] == found["1.200"] == found["1.386"] == "best better"
    assert found["1.300"] == "better"
    assert found["1.600"] == found["1.500"] == ""
    accuracy = Table(
        ["law"],
        {"anchor": {"law": 0.4}, "merged": {"law": 0.5}, "soup": {"law": 0.3}},
        "accuracy",
        lowest_is_best=False,
    )
    assert classes(accuracy) == {"0.400": "", "0.500": "best better", "0.300": "worse"}


def test_a_larger_change_has_a_stronger_shade():
    cells = re.findall(r"--shade: ([0-9.]+)\".*?<small>([^<]*)%", table_section(table()))
    shades = {abs(float(percent.replace("−", "-"))): float(shade) for shade, percent in cells}
    assert sorted(shades, key=lambda size: shades[size]) == sorted(shades)
    assert min(shades.values()) > 0 and max(shades.values()) == 0.5


def test_cells_without_a_figure_are_dashes_and_are_never_best():
    made = table(
        joint={"public": float("nan"), "code": None, "law": float("-inf")},
        soup={"public": float("inf")},
        none={"public": 1.399999},
    )
    text = format_table(made)
    assert re.search(r"^joint +nan +– +-inf *$", text, re.M)
    assert re.search(r"^soup +inf +– +–$", text, re.M)
    assert re.search(r"^none +1.400 +0.0% ", text, re.M)  # neither +0.0% nor -0.0%
    assert "**nan**" not in markdown_table(made) and "**-inf**" not in markdown_table(made)
    assert markdown_table(made).count("**") == 2 * 3
    page_text = table_section(made)
    assert page_text.count('class="best') == 3
    assert "nan%" not in page_text and "inf%" not in page_text


@pytest.mark.parametrize("reference", [None, 0.0, float("nan")])
def test_a_reference_without_a_usable_figure_gives_no_changes(reference):
    made = Table(["law"], {"anchor": {"law": reference}, "merged": {"law": 1.2}})
    for form in (Elements(table_section(made)).text, format_table(made), markdown_table(made)):
        assert "1.200" in form and not re.search(r"\d%", form)


def test_a_table_without_its_reference_has_figures_and_no_changes():
    made = Table(["law"], {"merged": {"law": 1.2}, "soup": {"law": 1.3}})
    assert (
        format_table(made)
        == "bits per byte     law\nmerged         1.200*\nsoup           1.300\n* best of the"
        " column\n"
    )
    assert "change against" not in table_section(made)


def test_the_text_table_is_aligned():
    assert (
        format_table(table()) == "bits per byte        public           code            law\n"
        "anchor         1.400         1.600          1.500\n"
        "pair:code      1.442  +3.0%  1.234* -22.8%  1.500    0.0%\n"
        "merged         1.386* -1.0%  1.300  -18.7%  1.200* -20.0%\n"
        "* best of the column; %: change against anchor\n"
    )


def test_the_markdown_table_keeps_its_cells_with_hostile_names():
    made = Table(
        [HOSTILE, "law"], {"anchor": {"law": 1.5}, f"{HOSTILE}\nnext": {HOSTILE: 1.2, "law": 1.2}}
    )
    lines = markdown_table(made).splitlines()
    assert len(lines) == 4
    assert [len(re.findall(r"(?<!\\)\|", line)) for line in lines] == [4] * 4
    assert (
        "<" not in markdown_table(made)
        and "\x1b" not in markdown_table(made)
        and "\x1b" not in format_table(made)
    )


def test_figures_outside_the_columns_are_refused():
    with pytest.raises(ValueError, match=r"line 'merged' has figures for \['poetry'\]"):
        Table(["law"], {"merged": {"law": 1.0, "poetry": 2.0}})


def test_empty_parts_have_no_section():
    empty = [
        checks_section([]),
        table_section(Table([], {})),
        curves_section({}),
        line_charts_section({}, "x", "y"),
        routing_section({}, EXPERTS),
        samples_section([]),
    ]
    text = page("A study", "", {str(index): part for index, part in enumerate(empty)}, "")
    assert "<section>" not in text and "A study" in text


def test_failed_checks_say_so():
    text = Elements(written()).text
    assert "1 of 2 hold." in text and "✗ does not hold" in text and "+7%" in text


def test_white_space_of_samples_is_kept():
    text = written()
    assert '<div class="text" dir="auto">\n  code:\n\tdef</div>' in text
    assert re.search(r"\.text \{[^}]*white-space: pre-wrap", text)


def test_losses_that_are_not_finite_are_counted_and_not_drawn():
    curves = {
        "broken": [(1, 4.0), (2, float("nan")), (3, 3.0), (4, float("inf"))],
        "lost": [(1, float("nan"))],
        "empty": [],
    }
    text = curves_section(curves)
    assert "2 of 4 losses not finite" in text and "no finite loss, 1 of 1 losses not finite" in text
    assert not re.search(r'[" ML]-?(nan|inf)', line_chart(curves, 400, 300))


@pytest.mark.parametrize("points", [[(0, 2.0)], [(5, 2.0), (10, 2.0)], [(0, 0.0), (10**12, 9.0)]])
def test_curves_with_hardly_any_range_are_drawn_inside_the_chart(points):
    (svg,) = drawings(line_chart({"run": points}, 400, 300))
    paths = [node.get("d", "") for node in svg.iter("path") if "curve" in node.get("class", "")]
    assert len(paths) == 2
    numbers = [float(number) for number in re.findall(r"[-0-9.]+", " ".join(paths))]
    assert all(0 <= number <= 400 for number in numbers[::2])


def test_a_long_curve_is_thinned_and_keeps_its_last_point():
    steps = [(step, 2.0 + (step == 100_000)) for step in range(1, 100_001)]
    text = line_chart({"run": steps}, 900, 380)
    assert len(text) < 30_000
    raw = re.search(r'<path d="([^"]*)" class="curve c0 raw"', text)
    assert raw is not None
    *_, before, last = [float(point.split()[1]) for point in raw[1].removeprefix("M").split("L")]
    assert last < before  # higher up


def test_smoothing_keeps_a_straight_line_and_quietens_noise():
    line = np.linspace(5, 3, 1000)
    np.testing.assert_allclose(smooth(line)[150:-150], line[150:-150], atol=1e-3)  # no delay
    np.testing.assert_allclose(smooth(np.full(7, 2.5)), 2.5)
    noise = np.random.default_rng(0).normal(size=1000)
    assert smooth(noise).std() < 0.3 * noise.std()


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (2.1, 4.9), (0, 6.14e6), (-3, 2e12), (1.0, 1.0001)]
)
def test_ticks_lie_in_the_range_and_are_round(low, high):
    ticks = nice_ticks(low, high, 6)
    assert 3 <= len(ticks) <= 12
    slack = 1e-9 * (high - low)
    assert min(ticks) >= low - slack and max(ticks) <= high + slack
    step = f"{ticks[1] - ticks[0]:.0e}"
    assert step[0] in "125"


def test_a_map_shows_each_share_and_darker_where_it_is_larger():
    shares = np.array([[0.7, 0.2, 0.1], [0.5, 0.5, float("nan")]])
    (svg,) = drawings(routing_map("law", shares, EXPERTS, most=0.8))
    words = [node.text for node in svg.iter("text") if not len(node)]
    assert words[-12:] == ["0", "70", "20", "10", "1", "50", "50", "–", "mean", "60", "35", "–"]
    shades = [
        float(node.get("fill-opacity", 0))
        for node in svg.iter("rect")
        if node.get("class") == "heat"
    ]
    np.testing.assert_allclose(
        np.array(shades) / shades[0],
        np.array([0.7, 0.2, 0.1, 0.5, 0.5, 0.6, 0.35]) / 0.7,
        atol=2e-3,
    )


def test_long_expert_names_stay_distinguishable_and_whole_in_their_title():
    experts = ["anchor", "university-hospital-1", "university-hospital-2"]
    (svg,) = drawings(routing_map("law", np.full((2, 3), 1 / 3), experts))
    assert [node.text for node in svg.iter("title")] == experts
    shown = [list(node.itertext())[-1] for node in svg.iter("text") if len(node)]
    assert len(set(shown)) == 3 and max(map(len, shown)) == 14


def test_shares_of_other_experts_are_refused():
    with pytest.raises(
        ValueError, match=r"routing of 'law' has shape \(4, 2\); expected \[layers, 3 experts\]"
    ):
        routing_section({"law": np.ones((4, 2))}, EXPERTS)


def test_pages_can_be_made_of_any_sections():
    text = page("T", "", {"One": "<p>a</p>", "None": "", "Two & more": table_section(table())}, "")
    assert re.findall("<h2>(.*?)</h2>", text) == ["One", "Two &amp; more"]


def test_escaping_keeps_all_of_unicode_that_html_can_hold():
    assert escape("tab\tnew\nline äöü 日本 😀 \u202e") == "tab\tnew\nline äöü 日本 😀 \u202e"
    assert escape("\x00\x7f\ud800\uffff") == "\ufffd" * 4
