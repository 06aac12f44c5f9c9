"""The notebooks run, whole, as on Colab but small: real text, real commands. On a machine without
an accelerator, and on one that has one."""

import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import nbclient
import nbconvert
import psutil
import pytest

from flexolmo_jax.artifact import open_artifact
from flexolmo_jax.data.fetch import fetch
from flexolmo_jax.errors import UserError
from launch.colab.build import build, setup_cell

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
MEMORY = 10e9  # bytes that a notebook may hold at once, on a host that has 12 GB
CALLS = ("flexolmo ", "flexolmo_jax.", "forward(")  # into the package
QUIET = (
    "ignore::DeprecationWarning",
    "ignore::ResourceWarning",
    "ignore::pytest.PytestUnraisableExceptionWarning",
)
pytestmark = pytest.mark.filterwarnings(*QUIET)

# What makes them shorter still: sizes as a notebook has them, and as a test has.
CUTS = {
    "SIZES[accelerator]": 'SIZES[accelerator] | SIZES[""] | '
    "dict(SEQ=128, STEPS=40, EXPERT_STEPS=20, SAVE_EVERY=20)",
    "STEPS=40, SAVE_EVERY=20": "STEPS=20, SAVE_EVERY=10",
    "steps: 100": "steps: 40",
}
OPEN_CUTS = {
    "SIZES[accelerator]": "SIZES[accelerator] | "
    'dict(MB=0.3, SEQ=256, BATCH=2, COMPUTE="float32", EXPERT_STEPS=10, SAVE_EVERY=5)',
}
# A JAX plugin for a device that one process owns at a time, as a TPU is. The device is the CPU; a
# process that only asks what it is (python -c) is told that it is a TPU.
PLUGIN = """
import fcntl, os, sys
from jax._src import xla_bridge
from jaxlib import xla_client

class Tpu:
    platform = "tpu"

    def __init__(self, client):
        self._client = client

    def __getattr__(self, name):
        return getattr(self._client, name)

def client():
    global lock
    lock = open(os.environ["DEVICE_LOCK"], "a")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise RuntimeError("the TPU is in use by another process") from None
    print(*sys.argv, file=lock, flush=True)
    cpu = xla_client.make_cpu_client()
    return Tpu(cpu) if sys.argv[0] == "-c" else cpu

def initialize():
    xla_bridge.register_backend_factory("owned", client, priority=400, fail_quietly=False)
"""


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


@pytest.fixture
def accelerator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with a device as the plugin has it; the value is where its driver's file lies."""
    plugin = tmp_path / "plugins" / "jax_plugins" / "owned" / "__init__.py"
    plugin.parent.mkdir(parents=True)
    plugin.write_text(PLUGIN)
    paths = [str(tmp_path / "plugins"), os.environ["PYTHONPATH"]]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    monkeypatch.setenv("DEVICE_LOCK", str(tmp_path / "lock"))
    monkeypatch.delenv("JAX_PLATFORMS")
    (tmp_path / "accel0").touch()
    return tmp_path


@pytest.fixture(scope="module")
def quickstart(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the quickstart has run."""
    return runs("quickstart", text, tmp_path_factory.mktemp("quickstart"))


@contextmanager
def little_memory(what: str) -> Iterator[None]:
    """The processes that are started inside hold less than MEMORY at once, all of them together. A
    CPU's arrays count, which on Colab lie on the accelerator."""
    most, over = 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not over.wait(0.2):
            held = 0
            for process in psutil.Process().children(recursive=True):
                with suppress(psutil.Error):  # it has ended
                    held += process.memory_info().rss
            most = max(most, held)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
    print(f"{what}: {most / 1e9:.1f} GB of the host's memory")
    assert 0 < most < MEMORY


def runs(
    name: str,
    text: Path,
    folder: Path,
    dev: Path = Path("/nowhere"),
    cuts: dict[str, str] = CUTS,
    timeout: int = 280,
) -> Path:
    """Runs a notebook in a folder that has the text in it, shorter than on a CPU."""
    if not (folder / "text").exists():
        shutil.copytree(text, folder / "text")
    notebook = build(NOTEBOOKS / f"{name}.py")
    for cell in notebook.cells:
        cell.source = cell.source.replace('"/dev/', f'"{dev}/')
        for size, shorter in cuts.items():
            cell.source = cell.source.replace(size, shorter)
    where = {"metadata": {"path": str(folder)}}
    with little_memory(name):
        nbclient.NotebookClient(
            notebook, timeout=timeout, kernel_name="python3", resources=where
        ).execute()
    html, _ = nbconvert.HTMLExporter().from_notebook_node(notebook)
    (folder / f"{name}.html").write_text(html, "utf-8")
    assert "Traceback" not in html and len(html) > 10_000
    assert ("JAX runs on tpu" in html) == dev.is_dir()
    if keep := os.environ.get("FLEXOLMO_NOTEBOOKS"):  # to look at
        shutil.copy(folder / f"{name}.html", keep)
    return folder


def test_the_quickstart_runs(quickstart: Path):
    assert (quickstart / "merged-hf" / "config.json").exists()


def test_the_routing_explorer_runs_on_the_model_of_the_quickstart(text: Path, quickstart: Path):
    runs("routing_explorer", text, quickstart)


@pytest.mark.slow
def test_the_way_from_hugging_face_runs(text: Path, tmp_path: Path):
    runs("from_hugging_face", text, tmp_path)


@pytest.mark.slow
def test_the_quickstart_runs_where_one_process_owns_the_device_and_goes_on_after_a_disconnect(
    text: Path, accelerator: Path, quickstart: Path
):
    """As on a Colab TPU. The machine was taken back while an owner trained; what lay in Drive is
    what the next machine starts from."""
    folder = accelerator / "drive"
    shutil.copytree(quickstart, folder)
    for made in ("merged", "without", "merged-hf", "contributions/legal"):
        shutil.rmtree(folder / made)
    anchor = (folder / "anchor" / "flexolmo.json").read_bytes()
    runs("quickstart", text, folder, accelerator)
    assert (folder / "merged-hf" / "config.json").exists()
    assert (folder / "anchor" / "flexolmo.json").read_bytes() == anchor
    owned = (accelerator / "lock").read_text()
    assert owned.count(" contribute ") == 1 and " eval " in owned, "not all was done again"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["quickstart", "routing_explorer", "from_hugging_face"])
def test_every_notebook_runs_whole_where_one_process_owns_the_device(
    text: Path, accelerator: Path, quickstart: Path, name: str
):
    folder = quickstart if name == "routing_explorer" else accelerator / "drive"
    runs(name, text, folder, accelerator)


@pytest.mark.slow
def test_the_quickstart_takes_an_open_model_where_there_is_an_accelerator(
    text: Path, accelerator: Path
):
    folder = runs("quickstart", text, accelerator / "drive", accelerator, OPEN_CUTS, timeout=1200)
    assert open_artifact(folder / "merged").experts == ("anchor", "news", "biomed")
    assert not (folder / "anchor-run").exists()


def set_up(folder: Path, cell: str, before: str = "") -> subprocess.CompletedProcess:
    """What the set-up cell does in a folder, on a machine that has the packages but not ours."""
    (folder / "pip").mkdir()
    (folder / "pip" / "__init__.py").touch()
    (folder / "pip" / "__main__.py").write_text("import sys; print(sys.argv[1:]); sys.exit(3)")
    hidden = "import importlib.util\nimportlib.util.find_spec = lambda name: None\n"
    return subprocess.run(
        [sys.executable, "-c", hidden + before + cell],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("driver, extra", [("accel0", "tpu"), ("nvidia0", "cuda"), ("", "")])
def test_the_set_up_cell_installs_for_the_accelerator_and_stops_where_that_fails(
    tmp_path: Path, driver: str, extra: str
):
    (tmp_path / (driver or "null")).touch()
    cell = setup_cell("https://example.org/flexolmo-jax").replace('"/dev/', f'"{tmp_path}/')
    done = set_up(tmp_path, cell)
    wanted = f"flexolmo-jax[{extra}] @ git+https://example.org/flexolmo-jax"
    assert wanted in done.stdout and "JAX runs on" not in done.stdout
    assert done.returncode == 1 and "CalledProcessError" in done.stderr


@pytest.mark.parametrize("name", ["flexolmo_jax-0.1.0-py3-none-any.whl", "flexolmo-jax/"])
def test_without_a_public_address_a_wheel_or_a_clone_in_drive_is_installed(
    tmp_path: Path, name: str
):
    drive = tmp_path / "content" / "drive"
    mine = drive / "MyDrive" / "flexolmo" / name
    mine.parent.mkdir(parents=True)
    mine.mkdir() if name.endswith("/") else mine.touch()
    colab = (
        "import sys, types\n"
        "sys.modules['google.colab'] = colab = types.ModuleType('colab')\n"
        "sys.modules['google'] = types.ModuleType('google')\n"
        "colab.drive = types.SimpleNamespace(mount=print)\n"
    )
    cell = setup_cell("").replace('"/content/drive', f'"{drive}')
    done = set_up(tmp_path, cell, colab)
    assert f"has no public address yet: installing {name.rstrip('/')}\n" in done.stdout
    assert f"@ {mine.as_uri()}" in done.stdout


def test_where_there_is_nothing_to_install_the_set_up_cell_says_what_to_do(tmp_path: Path):
    done = set_up(tmp_path, setup_cell(""))
    assert done.returncode == 1 and "put a wheel" in done.stderr and "Traceback" not in done.stderr


def test_the_set_up_cell_stops_where_jax_falls_back_to_the_cpu(tmp_path: Path):
    (tmp_path / "accel0").touch()
    cell = setup_cell("").replace('"/dev/', f'"{tmp_path}/')
    done = subprocess.run([sys.executable, "-c", cell], capture_output=True, text=True)
    assert done.returncode == 1 and "JAX cannot use this machine's accelerator" in done.stderr


def test_only_the_packaging_holds_the_public_address():
    files = [*NOTEBOOKS.glob("*.py"), *NOTEBOOKS.parent.glob("docs/*.md")]
    files += [NOTEBOOKS.parent / name for name in ("README.md", "CONTRIBUTING.md")]
    for path in files:
        assert not re.search(r"https?://\S*/flexolmo-jax\b", path.read_text()), path


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.py")), ids=lambda path: path.stem)
def test_a_notebook_sets_up_first_and_makes_few_calls(path):
    setup = next(cell for cell in build(path).cells if cell.cell_type == "code").source
    assert '"pip", "install"' in setup and "jax.devices()" in setup
    lines = [line.removeprefix("# ").strip() for line in path.read_text().splitlines()]
    assert (
        sum(
            any(call in line for call in CALLS) and not line.startswith(("import", "from"))
            for line in lines
            if "`" not in line
        )
        <= 14
    )
