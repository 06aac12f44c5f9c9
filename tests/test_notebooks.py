"""The notebooks run, whole, as on Colab but small: real text, real commands."""

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import jupytext
import nbclient
import nbconvert
import pytest

from flexolmo_jax.data.sources import fetch
from flexolmo_jax.errors import UserError

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
CALLS = ("flexolmo ", "flexolmo_jax.", "forward(")  # into the package
QUIET = (
    "ignore::DeprecationWarning",
    "ignore::ResourceWarning",
    "ignore::pytest.PytestUnraisableExceptionWarning",
)
pytestmark = pytest.mark.filterwarnings(*QUIET)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory, elsewhere: str | None) -> Path:
    """The text that the notebooks fetch; the packages that it comes from are kept where `flexolmo
    data fetch` keeps them."""
    folder = tmp_path_factory.mktemp("notebooks") / "text"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLEXOLMO_CACHE", elsewhere or "")
        try:
            fetched = fetch(folder, ["public", "code", "legal"], 500_000)
        except UserError as error:
            pytest.skip(f"no registry can be reached: {error}")
    if empty := [name for name, entry in fetched.items() if not entry["documents"]]:
        pytest.skip(f"no text of {', '.join(empty)} can be had")
    return folder


@pytest.fixture(scope="module", autouse=True)
def environment() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(
            "PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        )
        patch.setenv("JAX_NUM_CPU_DEVICES", "1")
        for name in ("FLEXOLMO_MODEL", "HF_CHECKPOINT"):  # what the notebooks ask a user for
            patch.delenv(name, raising=False)
        yield


@pytest.fixture(scope="module")
def quickstart(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the quickstart has run."""
    return runs("quickstart", text, tmp_path_factory.mktemp("quickstart"))


def runs(name: str, text: Path, folder: Path) -> Path:
    """Runs a notebook in a folder that has the text in it."""
    if not (folder / "text").exists():
        shutil.copytree(text, folder / "text")
    notebook = jupytext.read(NOTEBOOKS / f"{name}.py")
    nbclient.NotebookClient(
        notebook, timeout=280, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    ).execute()
    html, _ = nbconvert.HTMLExporter().from_notebook_node(notebook)
    (folder / f"{name}.html").write_text(html, "utf-8")
    assert "Traceback" not in html and len(html) > 10_000
    if keep := os.environ.get("FLEXOLMO_NOTEBOOKS"):  # to look at
        shutil.copy(folder / f"{name}.html", keep)
    return folder


def test_the_quickstart_runs(quickstart: Path):
    assert (quickstart / "merged-hf" / "config.json").exists()


def test_the_routing_explorer_runs_on_the_model_of_the_quickstart(text: Path, quickstart: Path):
    runs("routing_explorer", text, quickstart)


def test_the_way_from_hugging_face_runs(text: Path, tmp_path: Path):
    runs("from_hugging_face", text, tmp_path)


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.py")), ids=lambda path: path.stem)
def test_a_notebook_has_an_install_cell_a_device_check_and_few_calls(path):
    source = path.read_text()
    lines = [line.removeprefix("# ").strip() for line in source.splitlines()]
    assert "!pip install" in source and "jax.devices()" in source
    assert (
        sum(
            any(call in line for call in CALLS) and not line.startswith(("import", "from"))
            for line in lines
            if "`" not in line
        )
        <= 10
    )
