"""Anchor and joint runs: every weight trained, from random initial values or from those of an
earlier model (`train.init`)."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from flexolmo_jax.artifact import Artifact, Placement, open_artifact
from flexolmo_jax.config import ModelConfig, RunConfig
from flexolmo_jax.data.tokenizer import Tokenizer
from flexolmo_jax.errors import UserError
from flexolmo_jax.model import Params, init_params
from flexolmo_jax.model.tree import flatten, unflatten
from flexolmo_jax.runtime.environment import random_key
from flexolmo_jax.storage.locks import alone_at
from flexolmo_jax.storage.paths import takes_paths

from .job import Job
from .loop import train
from .sources import check_tokenizer, choose_tokenizer, open_sources


@takes_paths
@alone_at("out")
def pretrain(run: RunConfig, out: Path, *, continues: bool = False) -> dict[str, Any]:
    """Runs an anchor or joint config; see `loop.train`."""
    return train(
        _job_from_weights(run) if run.train.init else _job_from_nothing(run), out, continues
    )


def _job_from_nothing(run: RunConfig) -> Job:
    tokenizer = choose_tokenizer(run.data)
    vocab_size = run.model.vocab_size or -(-tokenizer.vocab_size // 128) * 128
    if vocab_size < tokenizer.vocab_size:
        raise UserError(
            f"model.vocab_size is {vocab_size}; expected at least the tokenizer's"
            f" {tokenizer.vocab_size}"
        )
    model = dataclasses.replace(run.model, vocab_size=vocab_size)
    initialise = functools.partial(init_params, model)

    def initial(placement: Placement, base: Params) -> Params:
        key = random_key(run.train.seed)
        shapes = flatten(jax.eval_shape(initialise, key))
        shardings = unflatten({path: placement(path, a.shape) for path, a in shapes.items()})
        return jax.jit(initialise, out_shardings=shardings)(key)

    return _job(run, model, tokenizer, initial)


def _job_from_weights(run: RunConfig) -> Job:
    start = open_artifact(run.train.init)
    if start.is_pair or (start.config.n_experts > 1) != (run.run == "joint"):
        raise UserError(
            f"train.init {start.path} is a {start.kind} of {len(start.experts)} experts; run:"
            f" {run.run} cannot start from it"
        )

    check_tokenizer(run.data, start.tokenizer, start.path)

    def initial(placement: Placement, base: Params) -> Params:
        # Masters are float32 whatever the release dtype: steps of 1e-4 vanish in bfloat16.
        return jax.tree.map(lambda a: a.astype("float32"), start.params(placement=placement))

    return _job(run, start.config, start.tokenizer, initial, start)


def _job(
    run: RunConfig,
    model: ModelConfig,
    tokenizer: Tokenizer,
    initial: Callable[[Placement, Params], Params],
    init: Artifact | None = None,
) -> Job:
    run = run.of_model(model, f"{init.kind} {init.path}" if init else "")
    learnt = [init.path / "public"] if init and init.kind == "anchor" else []
    batches, heldout = open_sources(run.data, tokenizer, run.train.seed, learnt=learnt)
    experts = ("anchor", *(f"expert{i}" for i in range(1, model.n_experts)))
    return Job(
        config=run,
        model=model,
        is_trained=lambda path: True,
        initial=initial,
        experts=experts,
        tokenizer=tokenizer,
        batches=batches,
        heldout=heldout,
        init=init,
    )
