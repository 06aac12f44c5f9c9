"""The one training loop. It knows nothing of FlexOlmo: a job is initial parameters, and which of
them are trained.

In the order of events: place parameters on the mesh; restore the newest good checkpoint; for each
step take its batch (a pure function of the step), dispatch, then read the metrics of the step
before; evaluate and save now and then; always at the end.
"""

import functools
import json
import math
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from flexolmo_jax.artifact import DESCRIPTION, Placement, describe, open_artifact, write_description
from flexolmo_jax.config import (
    ModelConfig,
    RunConfig,
    check_microbatch,
    dump_yaml,
    load_config,
    to_dict,
)
from flexolmo_jax.data.mixture import Batches
from flexolmo_jax.data.records import Record, loss_targets
from flexolmo_jax.data.tokenizer import Tokenizer
from flexolmo_jax.data.tokens import Source
from flexolmo_jax.errors import RunError, UserError
from flexolmo_jax.model import Params, logical_axes
from flexolmo_jax.model.tree import combine, flatten, partition
from flexolmo_jax.runtime import sharding
from flexolmo_jax.runtime.processes import by_the_first, is_first, stop_requests
from flexolmo_jax.runtime.progress import bar, note
from flexolmo_jax.storage import checkpoint
from flexolmo_jax.storage.files import is_whole, new_directory, write_text

from .accounting import Accounting, peak_flops
from .evaluate import make_scorer, score_records
from .flops import step_flops
from .metrics import MetricsWriter
from .optimizer import abstract_state, make_optimizer
from .profile import Profile
from .step import TrainState, make_step
from .watchdog import Watchdog


@dataclass(frozen=True)
class Job:
    """Everything the loop needs."""

    config: RunConfig
    model: ModelConfig
    # makes or reads the whole parameter tree, each tensor where the placement says
    initial: Callable[[Placement], Params]
    # by path; the rest is frozen: no gradient, no optimiser state, not in checkpoints
    is_trained: Callable[[str], bool]
    experts: tuple[str, ...]  # names, the anchor's first
    tokenizer: Tokenizer
    batches: Batches
    heldout: dict[str, Source]
    # for each source of the mixture: (expert its tokens belong to, weight in the loss)
    contrast: tuple[tuple[int, float], ...] = ()
    # pair, router: {"base": path, "fingerprint": digest, ...}
    base: dict[str, Any] = field(default_factory=dict)


def train(job: Job, out: Path) -> dict[str, Any]:
    """Runs the job to its last step in the directory `out`, from its newest checkpoint if it has
    one.

    Returns the last evaluation: {"step", "tokens", "bits_per_byte": {name: x}}. Raises UserError
    where `out` holds another run, RunError where the loss is not finite; SystemExit after a signal,
    with everything saved.
    """
    run = job.config
    accounting = Accounting()
    with ExitStack() as stack:
        watchdog = stack.enter_context(Watchdog())
        with accounting.spent("init"):
            mesh = sharding.make_mesh(run.mesh)
            check_microbatch(run, mesh.shape)
            _claim(job, out)
            params = job.initial(_placement(job, mesh))
            trained, frozen = partition(params, job.is_trained)
            optimizer = make_optimizer(run.optim, run.train.steps)
            state = TrainState(trained, _init_optimizer(optimizer, trained, mesh))
            by_the_first(lambda: _describe(job, out, trained))
            step = make_step(job.model, run, optimizer, mesh)
            evaluate = _evaluator(job, mesh)
            checkpoints = stack.enter_context(
                checkpoint.StepCheckpoints(out / "checkpoints", keep=run.train.keep)
            )
        with accounting.spent("restore"):
            restored = checkpoints.restore_latest(checkpoint.abstract(state._asdict()))
        start, scores = 0, {}
        if restored is not None:
            start, saved = restored
            state = TrainState(**saved)
            note(f"{out} goes on from step {start}")
        metrics = stack.enter_context(MetricsWriter(out, start)) if is_first() else None
        log = _Log(
            job,
            out,
            mesh,
            accounting,
            metrics,
            stack.enter_context(bar(f"train {out.name}", run.train.steps)),
            checkpoints,
        )
        log.advance(start)
        stop_status = stack.enter_context(stop_requests())
        profile = stack.enter_context(Profile(run.train.profiled, out))
        rows = sharding.local_rows(mesh, run.data.batch_size)
        batches = job.batches.iterate(start, rows)
        stack.callback(batches.close)

        pending = None  # the metrics of step n are read after step n + 1 is dispatched
        for number in range(start + 1, run.train.steps + 1):
            # the first is compiled
            watchdog.expect(f"step {number}", run.train.watchdog if number > start + 1 else 0)
            with accounting.spent("data"):
                batch = {
                    name: sharding.put_batch(mesh, rows, run.data.batch_size, a)
                    for name, a in _with_targets(job, next(batches)).items()
                }
            if number == start + 1:
                with accounting.spent("compile"):
                    compile_for_all(step, state, frozen, batch, number)
            profile.before(number)
            with (
                accounting.spent("step"),
                jax.profiler.StepTraceAnnotation("train", step_num=number),
            ):
                state, values = step(state, frozen, batch, number)
                if pending is not None:
                    log.read(*pending)
            pending = number, values
            last, stop = number == run.train.steps, stop_status(number)
            scored = last or _due(number, run.train.eval_every)
            saved = scored or stop is not None or _due(number, run.train.save_every)
            if saved or profile.ends(number):
                with accounting.spent("step"):
                    log.read(*pending)  # nothing that is not finite is ever saved
                pending = None
            profile.after(number)
            if saved:
                watchdog.expect(f"evaluating and saving after step {number}", 0)
                if scored:
                    with accounting.spent("eval"):
                        scores = evaluate(state.params, frozen)
                log.write(
                    number,
                    ({"bits_per_byte": scores} if scored else {})
                    | {"seconds": accounting.seconds()},
                    flush=True,
                )
                with accounting.spent("save"):
                    checkpoints.save(
                        number,
                        state._asdict(),
                        loss=sum(scores.values()) / len(scores) if scored and scores else None,
                    )
                log.clock = time.perf_counter()
            if stop is not None and not last:
                with accounting.spent("save"):
                    checkpoints.wait()
                by_the_first(lambda: None)  # until it is complete for all
                note(
                    f"stopped by a signal at step {number}, saved in {out}; the same command goes"
                    " on from there"
                )
                sys.exit(stop)
        if start == run.train.steps:
            scores = evaluate(state.params, frozen)
    result = {
        "step": run.train.steps,
        "tokens": run.train.steps * run.data.batch_size * run.data.seq_len,
        "bits_per_byte": scores,
    }
    summary = result | {"seconds": accounting.seconds()}
    by_the_first(lambda: write_text(out / "summary.json", json.dumps(summary) + "\n"))
    return result


class _Log:
    """Reads the metrics of steps, checks them, shows them and writes them down."""

    def __init__(
        self,
        job: Job,
        out: Path,
        mesh: Mesh,
        accounting: Accounting,
        metrics: MetricsWriter | None,
        advance: Callable[..., None],
        checkpoints: checkpoint.StepCheckpoints,
    ):
        self._out = out
        self._job, self._accounting, self._metrics, self._checkpoints = (
            job,
            accounting,
            metrics,
            checkpoints,
        )
        self.advance = advance
        self.clock = time.perf_counter()
        self._tokens = job.config.data.batch_size * job.config.data.seq_len
        peak = peak_flops(mesh.devices.flat[0])
        # seconds of a step at best
        self._peak = peak and step_flops(job.config, job.model).model / (peak * mesh.size)

    def read(self, number: int, values: dict[str, jax.Array]) -> None:
        """Waits for a step. Raises RunError where its loss is not finite."""
        row = {name: value.tolist() for name, value in jax.device_get(values).items()}
        if not (math.isfinite(row["loss"]) and math.isfinite(row["gradient_norm"])):
            self._checkpoints.wait()
            good = next(iter(self._checkpoints.steps()), None)
            kept = (
                f"the last good checkpoint is step {good}" if good else "there is no checkpoint yet"
            )
            raise RunError(
                f"loss {row['loss']}, gradient norm {row['gradient_norm']} at step {number} of"
                f" {self._out}; {kept}; start a new --out with a lower optim.lr, or look at the"
                " data of this step"
            )
        now = time.perf_counter()
        took, self.clock = now - self.clock, now
        self.advance(1, text=f"loss {row['loss']:.3f}  {self._tokens / took:,.0f} tokens/s")
        if number % self._job.config.train.log_every == 0:
            row["router_share"] = dict(zip(self._job.experts, row["router_share"], strict=True))
            row |= {
                "tokens": number * self._tokens,
                "tokens_per_second": self._tokens / took,
                "goodput": self._accounting.goodput(),
            }
            self.write(number, row | ({"mfu": self._peak / took} if self._peak else {}))

    def write(self, number: int, row: dict[str, Any], flush: bool = False) -> None:
        if self._metrics is not None:
            self._metrics.write(number, row)
            if flush:
                self._metrics.flush()


def compile_for_all(function: Any, *arguments: Any) -> None:
    """Compiles a jitted function for these arguments, and waits until all processes have: their
    first exchange does not wait long."""
    function.lower(*arguments).compile()
    by_the_first(lambda: None)


def _due(number: int, every: int) -> bool:
    return every > 0 and number % every == 0


def _with_targets(job: Job, batch: Record) -> Record:
    source = batch.pop("source")
    batch["targets"] = loss_targets(batch["segments"])
    if job.contrast:
        expert, weight = (np.array(column)[source] for column in zip(*job.contrast, strict=True))
        batch |= {"expert": expert.astype(np.int32), "expert_weight": weight.astype(np.float32)}
    return batch


def _placement(job: Job, mesh: Mesh) -> Placement:
    axes = flatten(logical_axes(job.model, pair=job.config.run == "pair"))
    return lambda path, shape: sharding.parameter_sharding(mesh, axes[path], shape)


def _init_optimizer(optimizer: optax.GradientTransformation, trained: Params, mesh: Mesh) -> Any:
    shardings = jax.tree.map(
        lambda a: a.sharding, abstract_state(optimizer, trained, sharding.replicated(mesh))
    )
    return jax.jit(optimizer.init, out_shardings=shardings)(trained)


def _evaluator(job: Job, mesh: Mesh) -> Callable[[Params, Params], dict[str, float]]:
    """Bits per byte of each held-out set."""
    active = job.model.n_experts if job.config.run == "router" else None
    score = make_scorer(job.model, active, job.config.train.compute_dtype, mesh)
    compiled = False

    def scorer(*arguments: Any) -> Any:
        nonlocal compiled
        if not compiled:
            compile_for_all(score, *arguments)
        compiled = True
        return score(*arguments)

    batch_size = job.config.data.batch_size // job.config.train.accumulate
    put = functools.partial(sharding.put_batch, mesh, range(batch_size), batch_size)

    def evaluate(trained: Params, frozen: Params) -> dict[str, float]:
        params, scores = combine(trained, frozen), {}
        for name, records in job.heldout.items():
            of_set = score_records(
                scorer,
                params,
                records,
                job.tokenizer,
                batch_size=batch_size,
                limit=job.config.train.eval_records,
                put=put,
            )
            scores[name] = of_set.bits_per_byte
        return scores

    return evaluate


def _claim(job: Job, out: Path) -> None:
    """Makes the run's directory, or checks that it holds this very run. Raises UserError
    otherwise."""
    by_the_first(lambda: _make_or_check(job, out))
    if not (out / "config.yaml").exists():
        raise UserError(
            f"{out} is not the same place for all processes of this run; give a directory that all"
            " of them see, or a bucket"
        )


def _make_or_check(job: Job, out: Path) -> None:
    path = out / "config.yaml"
    if not (is_whole(out) and path.exists()):
        # a kill in between must not leave a directory that no run may claim
        with new_directory(out) as directory:
            job.tokenizer.save(directory / "tokenizer.json")
            write_text(directory / "config.yaml", dump_yaml(job.config))
        return
    before, now = (
        _identity(config) for config in (to_dict(load_config(path)), to_dict(job.config))
    )
    changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    if changed:
        raise UserError(
            f"{out} holds a run with another {', '.join(changed)}; give a new --out, or the config"
            " it was started with"
        )
    if (out / DESCRIPTION).exists():
        kept = open_artifact(out).description
        for key in ("fingerprint", "base_sha256"):
            before, now = kept.get(key), job.base.get(key)
            # earlier versions kept no base_sha256
            if before != now and (before is not None or key == "fingerprint"):
                raise UserError(
                    f"{out} was trained against {before}; {job.base['base']} is now {now}; restore"
                    " that one or give a new --out"
                )
    write_text(path, dump_yaml(job.config))


def _identity(config: dict[str, Any]) -> dict[str, Any]:
    """What makes two configs the same run: everything but the mesh, how often to look at it, and
    what an owner states of it."""
    flat = flatten(
        {key: value for key, value in config.items() if value is not None and key != "mesh"}
    )
    free = {
        "eval_every",
        "eval_records",
        "save_every",
        "keep",
        "log_every",
        "remat",
        "watchdog",
        "profile",
    }
    free |= {"owner", "domain", "licence", "expires", "sequence", "allow_hub_embedder"}
    return {
        key.replace("/", "."): value
        for key, value in flat.items()
        if key.split("/")[-1] not in free
    }


def _describe(job: Job, out: Path, trained: Params) -> None:
    description = {
        "kind": "run",
        "run": job.config.run,
        "model": to_dict(job.model),
        "experts": list(job.experts),
        "tensors": describe(trained),
        **job.base,
    }
    write_description(out, description)
