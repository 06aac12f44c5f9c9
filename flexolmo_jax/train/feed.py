"""A run's batches on its devices: each process reads its own records of a batch."""

import numpy as np
from jax.sharding import Mesh

from flexolmo_jax.config import Loss
from flexolmo_jax.data.records import Record, left_out, loss_targets
from flexolmo_jax.runtime import sharding

from .job import Job
from .step import Batch


class Feed:
    """The batches after step `start`. They are read ahead by a thread, which `close` ends."""

    def __init__(self, job: Job, mesh: Mesh, start: int):
        self._mesh, self._size, self._contrast = mesh, job.config.data.batch_size, job.contrast
        self._loss: Loss = job.config.data.loss
        self._records = sharding.local_records(mesh, self._size)
        self._batches = job.batches.iterate(start, self._records)

    def next(self) -> Batch:
        batch = self._with_targets(next(self._batches))
        return {
            name: sharding.put_batch(self._mesh, self._records, self._size, array)
            for name, array in batch.items()
        }

    def close(self) -> None:
        self._batches.close()

    def _with_targets(self, batch: Record) -> Record:
        source = batch.pop("source")
        batch["targets"] = loss_targets(batch["segments"], left_out(batch, self._loss))
        batch.pop("context", None)
        if self._contrast:
            experts, counts = (np.array(column) for column in zip(*self._contrast, strict=True))
            batch["expert"] = experts[source].astype(np.int32)
            batch["expert_weight"] = counts[source].astype(np.float32)
        return batch
