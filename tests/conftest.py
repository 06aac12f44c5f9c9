"""What every test stands on: eight CPU devices, no network, one compilation cache, and shapes checked at run time.

The environment is set before JAX is first imported, and as environment variables, so that processes a test starts inherit it.
"""

import os
import pathlib
import platform

import jaxtyping

# Packages whose annotations (dtypes and shapes of arrays too) are checked at every call in tests. They must not be imported yet.
CHECKED_AT_RUN_TIME = ("flexolmo_jax.model",)

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"

# Compiled programs are kept between runs. The folder is one machine's own: they hold instructions that another CPU may lack.
_cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "flexolmo-jax" / platform.node()
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_cache))
os.environ["JAX_COMPILATION_CACHE_MAX_SIZE"] = str(2**30)  # with a limit, JAX also locks the folder against other test processes
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"

jaxtyping.install_import_hook(CHECKED_AT_RUN_TIME, "beartype.beartype")

# Fixtures that several directories of tests share: trained anchors, experts and merges; an object store.
pytest_plugins = ("tests.tiny", "tests.object_store")


def pytest_collection_modifyitems(items):
    if os.environ["JAX_PLATFORMS"] != "tpu":
        items[:] = [item for item in items if not any(mark.kwargs.get("only") for mark in item.iter_markers("tpu"))]
