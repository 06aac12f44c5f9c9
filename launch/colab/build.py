"""Makes the notebooks for Colab: those of notebooks/*.py, with the cell that installs the package.

python launch/colab/build.py        # notebooks/*.ipynb; `make notebooks` does it
"""

import tomllib
from pathlib import Path

import jupytext
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell

ROOT = Path(__file__).parents[2]
SETUP = Path(__file__).with_name("setup_cell.py")


def build(source: Path) -> NotebookNode:
    """The notebook of a .py file, its set-up cell below the title."""
    notebook = jupytext.read(source)
    notebook.cells.insert(1, new_code_cell(setup_cell(address()), metadata={"tags": ["setup"]}))
    return notebook


def setup_cell(repository: str) -> str:
    return SETUP.read_text().replace('REPOSITORY = ""', f"REPOSITORY = {repository!r}").strip()


def address() -> str:
    """The project's public address, or nothing as long as it has none."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return project["urls"].get("Repository", "")


if __name__ == "__main__":
    for source in sorted((ROOT / "notebooks").glob("*.py")):
        jupytext.write(build(source), source.with_suffix(".ipynb"))
        print(source.with_suffix(".ipynb").relative_to(ROOT))
