"""What a run reports of its steps while it trains: a bar on stderr and entries in its metrics."""

import math
import time
from collections.abc import Callable
from typing import Any

from flexolmo_jax.runtime.progress import note

from .accounting import Accounting
from .job import Job
from .metrics import MetricsWriter


class Log:
    """Shows each step and writes every `train.log_every`-th down."""

    def __init__(
        self,
        job: Job,
        accounting: Accounting,
        least_seconds: float | None,
        advance: Callable[..., None],
        metrics: MetricsWriter | None,
    ):
        """`least_seconds`: of a step at the devices' peak, where that is known. `metrics`: only the
        first process has them."""
        self._experts, self._every = job.experts, job.config.train.log_every
        self._tokens = job.config.data.batch_size * job.config.data.seq_len
        self._accounting, self._least_seconds = accounting, least_seconds
        self._advance, self._metrics = advance, metrics
        self.restart_clock()

    def restart_clock(self) -> None:
        """Times the next step from now on, without what went before it: compiling, evaluating,
        saving."""
        self._clock = time.perf_counter()

    def step(self, number: int, entry: dict[str, Any]) -> float:
        """`entry`: the metrics of a step that has just ended, as Python's numbers and lists.
        Returns the seconds that it took."""
        now = time.perf_counter()
        took, self._clock = now - self._clock, now
        speed = self._tokens / took
        skipped = f"  {entry['skipped']} skipped" if entry.get("skipped") else ""
        self._advance(1, text=f"loss {entry['loss']:.3f}{skipped}  {speed:,.0f} tokens/s")
        if entry.get("spike") and self._metrics is not None:
            note(
                f"step {number} is not applied (train.skip_spikes), {entry['skipped']} until now:"
                f" loss {entry['loss']:.4g}, gradient norm {entry['gradient_norm']:.4g}"
            )
        if number % self._every:
            return took
        for key in ("loss", "total_loss", "gradient_norm"):  # of a step that was not applied
            entry[key] = entry[key] if math.isfinite(entry[key]) else None
        entry |= {
            "router_share": dict(zip(self._experts, entry["router_share"], strict=True)),
            "tokens": number * self._tokens,
            "tokens_per_second": speed,
            "goodput": self._accounting.goodput(),
        }
        if self._least_seconds is not None:
            entry["mfu"] = self._least_seconds / took
        self.write(number, entry)
        return took

    def write(self, number: int, entry: dict[str, Any], flush: bool = False) -> None:
        if self._metrics is not None:
            self._metrics.write(number, entry)
            if flush:
                self._metrics.flush()
