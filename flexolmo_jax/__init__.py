"""FlexOlmo (arXiv 2507.07024) in JAX: one language model of owners who do not share their data.

model = flexolmo_jax.load("demo/merged")        # a run, an anchor or a merged model
model.logits(ids, without=("legal",))           # int [B, T] -> float32 [B, T, V]
model.generate(["The patient"], without=("legal",))
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flexolmo_jax.errors import RunError, UserError
    from flexolmo_jax.loaded import LoadedModel, load

__all__ = ["LoadedModel", "RunError", "UserError", "load"]


def __getattr__(name: str) -> Any:
    # Imported on first use: `flexolmo --help` and a wrong config answer at once, without JAX.
    import importlib

    home = {"load": "loaded", "LoadedModel": "loaded", "UserError": "errors", "RunError": "errors"}
    if name in home:
        return getattr(importlib.import_module(f"flexolmo_jax.{home[name]}"), name)
    raise AttributeError(f"module 'flexolmo_jax' has no attribute {name!r}")
