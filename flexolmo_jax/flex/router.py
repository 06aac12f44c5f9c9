"""Router tuning: after a merge, router rows and biases alone are trained on public text (and proxies), every expert active."""

import dataclasses
from pathlib import Path
from typing import Any

from flexolmo_jax.config import RunConfig
from flexolmo_jax.errors import UserError
from flexolmo_jax.model.tree import flatten, unflatten
from flexolmo_jax.paths import absolute, path_of
from flexolmo_jax.train.loop import Job, train
from flexolmo_jax.train.sources import open_sources

from .merge import open_model


def is_trained(path: str) -> bool:
    """Of a merged model's parameters."""
    return path in ("experts/row", "experts/bias")


def train_router(run: RunConfig, out: Path) -> dict[str, Any]:
    """Runs a router config; see `train.loop.train`. Raises UserError for a model without experts."""
    assert run.router is not None  # checked by RunConfig
    model = open_model(path_of(run.router.model))
    if model.config.n_experts == 1:
        raise UserError(f"{model.path} has no experts; there is nothing to route")
    run = dataclasses.replace(run, model=model.config)
    batches, heldout = open_sources(run.data, model.tokenizer, run.train.seed)

    def initial(placement):
        params = flatten(model.params(placement=placement))
        return unflatten({path: a.astype("float32") if is_trained(path) else a for path, a in params.items()})

    job = Job(
        run, model.config, initial, is_trained, model.experts, model.tokenizer, batches, heldout,
        base={"base": str(absolute(model.path)), "fingerprint": model.fingerprint},
    )  # fmt: skip
    return train(job, out)
