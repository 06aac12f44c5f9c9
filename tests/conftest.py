"""What every test stands on: eight CPU devices, no network, one compilation cache, and shapes
checked at run time.

It stands on nothing else: not on what lies in the working tree (`make demo` leaves its folder
there), in the home folder or in the user's environment, nor on another test; `--shuffle SEED` runs
them in another order. The environment is set before JAX is first imported, and as environment
variables, so that processes a test starts inherit it.
"""

import gc
import os
import pathlib
import platform
import random
import tempfile
from collections.abc import Iterator
from importlib.metadata import version

import jaxtyping
import pytest
from hypothesis import settings

# Packages whose annotations (dtypes and shapes of arrays too) are checked at every call in tests.
# They must not be imported yet.
CHECKED_AT_RUN_TIME = ("flexolmo_jax.model",)
MAPS = 15_000  # of a process's memory
# These run first: a worker that began one of them last would work alone for minutes.
LONGEST = ("test_notebooks.py", "test_study.py", "test_ray.py", "test_merge.py", "test_loop.py")
# What tells the program that it has peers, as in a shell of a pod or of Slurm: it would wait for
# them.
PEERS = (
    "JAX_COORDINATOR_ADDRESS",
    "JAX_NUM_PROCESSES",
    "JAX_PROCESS_ID",
    "SLURM_NTASKS",
    "TPU_WORKER_HOSTNAMES",
    "MEGASCALE_COORDINATOR_ADDRESS",
)

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"
for name in PEERS:
    os.environ.pop(name, None)
# Processes that tests start find this tree from the empty folder that they start in.
ROOT = str(pathlib.Path(__file__).parents[1])
os.environ["PYTHONPATH"] = os.pathsep.join([ROOT, *filter(None, [os.environ.get("PYTHONPATH")])])


def compiled() -> str:
    """Where compiled programs are kept between runs: one machine's own, as they hold instructions
    that another CPU may lack."""
    try:
        cache = (
            pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
            / "flexolmo-jax"
            / platform.node()
        )
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache):
            return str(cache)
    # no home folder, or one that cannot be written: as long as this run
    except (OSError, RuntimeError):
        global _compiled  # kept, as the folder goes with it; the workers of xdist inherit its name
        _compiled = tempfile.TemporaryDirectory(prefix="flexolmo-compiled-")
        return _compiled.name


if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = compiled()
# with a limit, JAX also locks the folder against other test processes
os.environ["JAX_COMPILATION_CACHE_MAX_SIZE"] = str(2**30)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"
# A test's program is small and runs a few times: compiling it costs more than it runs. What XLA and
# LLVM do to make it fast is left out; XLA_FLAGS of the user's own come last and win.
os.environ["XLA_FLAGS"] = " ".join(
    (
        "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
        # The older way to compile a fusion is quicker. XLA ends at a flag that it does not know.
        "--xla_cpu_use_new_xtile_lowering=false"
        if version("jaxlib") >= "0.11.1"
        else "--xla_cpu_use_fusion_emitters=false",
        os.environ.get("XLA_FLAGS", ""),
    )
)
# Tracing makes many objects and hardly a cycle.
gc.set_threshold(200_000, 20, 50)
# Hypothesis keeps failing examples; by default in the working tree, which need not be one that can
# be written.
os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = os.path.join(
    os.environ["JAX_COMPILATION_CACHE_DIR"], "hypothesis"
)

# On a busy machine an example may take any time.
settings.register_profile("any machine", settings(), deadline=None)
settings.load_profile("any machine")

jaxtyping.install_import_hook(CHECKED_AT_RUN_TIME, "beartype.beartype")

# Fixtures that several files of tests share: trained anchors, experts and merges; an object store;
# verbs that must refuse; a program that generates.
pytest_plugins = ("tests.tiny", "tests.object_store", "tests.command_line", "tests.generation")


@pytest.fixture(scope="session", autouse=True)
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str | None]:
    """Tests work in an empty folder and keep their caches in another one, neither in the working
    tree nor in the home folder. What `FLEXOLMO_CACHE` was is the value."""
    users = os.environ.get("FLEXOLMO_CACHE")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("empty"))
        patch.setenv("FLEXOLMO_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("verified")))
        yield users
        left = os.listdir()
    assert left == [], "tests left these in the working directory"


@pytest.fixture(scope="module", autouse=True)
def room_for_programs() -> Iterator[None]:
    """Lets go of compiled programs where there are many. Each takes some of a process's memory
    maps, of which Linux allows 65,530: a worker that had compiled the whole suite ended by SIGSEGV
    in the next compilation."""
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MAPS:
        import jax

        jax.clear_caches()
        gc.collect()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--shuffle",
        type=int,
        metavar="SEED",
        help="runs the files, and the tests of a file, in an order of this seed",
    )


def pytest_report_header(config: pytest.Config) -> str | None:
    seed = config.getoption("--shuffle")
    return None if seed is None else f"shuffled: the same order comes with --shuffle {seed}"


@pytest.hookimpl(trylast=True)  # pytest itself puts together what shares a fixture
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if os.environ["JAX_PLATFORMS"] != "tpu":
        items[:] = [
            item
            for item in items
            if not any(mark.kwargs.get("only") for mark in item.iter_markers("tpu"))
        ]
    items.sort(key=lambda item: item.path.name not in LONGEST)
    if (seed := config.getoption("--shuffle")) is not None:
        files: dict[pathlib.Path, list[pytest.Item]] = {}
        for item in items:
            files.setdefault(item.path, []).append(item)
        shuffled = random.Random(seed)
        groups = list(files.values())
        shuffled.shuffle(groups)
        for group in groups:
            shuffled.shuffle(group)
        items[:] = [item for group in groups for item in group]
