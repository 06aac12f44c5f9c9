"""The walk through the code: what it names exists, and who comes later is imported from earlier."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WALK = (ROOT / "docs" / "architecture.md").read_text()
STEP = re.compile(r"^\d+\. `(\S+)`, `(\w+)`", re.MULTILINE)


def legs() -> list[list[tuple[str, str]]]:
    """The steps of each journey as (file, name), cut where something is handed over in files."""
    parts = re.split(r"^(?:## |The \w+ goes to )", WALK, flags=re.MULTILINE)
    return [steps for part in parts if (steps := STEP.findall(part))]


@cache
def imports(file: str) -> frozenset[str]:
    """The package's files that a file imports, inside of functions too, and what these import."""
    found, left = set[str](), [file]
    while left:
        for path in _direct(left.pop()) - found:
            found.add(path)
            left.append(path)
    return frozenset(found)


@cache
def _direct(file: str) -> frozenset[str]:
    path = ROOT / file
    package = list(path.parent.relative_to(ROOT).parts)
    names = set[str]()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*above, *filter(None, [node.module])])
            names |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    places = (Path(*name.split(".")) for name in names if name.startswith("flexolmo_jax"))
    files = (file for place in places for file in (place.with_suffix(".py"), place / "__init__.py"))
    return frozenset(str(file) for file in files if (ROOT / file).is_file())


def test_there_are_two_journeys_of_ten_steps():
    numbers = [int(number) for number in re.findall(r"^(\d+)\. `", WALK, re.MULTILINE)]
    assert numbers == [*range(1, 11), *range(1, 11)]


@pytest.mark.parametrize(("file", "name"), [step for leg in legs() for step in leg])
def test_every_step_names_a_function_that_exists(file, name):
    defined = ast.parse((ROOT / file).read_text()).body
    kinds = (ast.FunctionDef, ast.ClassDef)
    assert name in {node.name for node in defined if isinstance(node, kinds)}


@pytest.mark.parametrize("leg", legs(), ids=lambda leg: leg[0][1])
def test_a_step_is_imported_by_one_before_it(leg):
    for number, (file, _) in enumerate(leg[1:], 1):
        assert any(file in imports(before) for before, _ in leg[:number]), file


def test_every_place_that_a_question_leads_to_exists():
    table = WALK.partition("| question | place |")[2]
    for text in re.findall(r"`([\w/]+(?:\.py|\.md|/|(?<=kernels/route)))`", table):
        assert (ROOT / "flexolmo_jax" / text).exists() or (ROOT / text).exists(), text
