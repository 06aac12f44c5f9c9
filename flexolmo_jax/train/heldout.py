"""Bits per byte of a run's held-out sets, between its steps.

Which documents are held out is decided in data/documents.py.
"""

import functools
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh

from flexolmo_jax.model import Params
from flexolmo_jax.model.tree import combine
from flexolmo_jax.runtime.processes import compile_for_all
from flexolmo_jax.runtime.sharding import put_whole_batch

from .evaluate import make_scorer, score_records
from .job import Job


class CutShort(Exception):
    """An evaluation that was stopped."""


class Evaluation:
    """A function from (trained, frozen parameters) to bits per byte of each set, compiled once."""

    def __init__(self, job: Job, mesh: Mesh, stops: Callable[[], bool]):
        """`stops`: asked before every batch; where it says yes, the evaluation ends in CutShort."""
        # A router run, as in its training, has every expert active.
        active = job.model.n_experts if job.config.run == "router" else None
        self._job, self._stops = job, stops
        dtype, kernels = job.config.train.compute_dtype, job.config.kernels
        self._score = make_scorer(job.model, active, dtype, mesh, kernels)
        self._compiled = False
        # Of a microbatch's size: what fits in memory for a step does so here.
        self._batch_size = job.config.data.batch_size // job.config.train.accumulate
        self._mesh = mesh

    def __call__(self, trained: Params, frozen: Params) -> dict[str, float]:
        params = combine(trained, frozen)
        scores = {}
        for name, records in self._job.heldout.items():
            score = score_records(
                functools.partial(self._score_batch, params),
                records,
                self._job.tokenizer,
                loss=self._job.config.data.loss,
                batch_size=self._batch_size,
                limit=self._job.config.train.eval_records,
            )
            scores[name] = score.bits_per_byte
        return scores

    def _score_batch(self, params: Params, *batch: np.ndarray) -> tuple[jax.Array, jax.Array]:
        if self._stops():
            raise CutShort
        # every process reads all records of a batch
        placed = [put_whole_batch(self._mesh, array) for array in batch]
        if not self._compiled:
            compile_for_all(self._score, params, *placed)
        self._compiled = True
        return self._score(params, *placed)
