"""The one training loop. It knows nothing of FlexOlmo: a job is initial parameters, and which of them are trained.

In the order of events: place parameters on the mesh; restore the newest good checkpoint; for each step take its batch (a pure
function of the step), dispatch, then read the metrics of the step before; evaluate and save now and then; always at the end.
"""

import functools
import json
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import yaml
from jax.sharding import Mesh

from flexolmo_jax import checkpoint, sharding
from flexolmo_jax.artifact import DESCRIPTION, Placement, describe, open_artifact, write_description
from flexolmo_jax.config import ModelConfig, RunConfig, check_microbatch, dump_yaml, to_dict
from flexolmo_jax.data.mixture import Batches
from flexolmo_jax.data.records import Record, loss_targets
from flexolmo_jax.data.tokenizer import Tokenizer
from flexolmo_jax.data.tokens import Source
from flexolmo_jax.errors import RunError, UserError
from flexolmo_jax.files import is_whole, new_directory, write_text
from flexolmo_jax.model import Params, logical_axes
from flexolmo_jax.model.tree import combine, flatten, partition
from flexolmo_jax.progress import bar, note

from .evaluate import make_scorer, score_records
from .metrics import MetricsWriter
from .optimizer import abstract_state, make_optimizer
from .step import TrainState, make_step

EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 42}  # 42: preempted and saved, start again


@dataclass(frozen=True)
class Job:
    """Everything the loop needs."""

    config: RunConfig
    model: ModelConfig
    initial: Callable[[Placement], Params]  # makes or reads the whole parameter tree, each tensor where the placement says
    is_trained: Callable[[str], bool]  # by path; the rest is frozen: no gradient, no optimiser state, not in checkpoints
    experts: tuple[str, ...]  # names, the anchor's first
    tokenizer: Tokenizer
    batches: Batches
    heldout: dict[str, Source]
    contrast: tuple[tuple[int, float], ...] = ()  # for each source of the mixture: (expert its tokens belong to, weight in the loss)
    base: dict[str, Any] = field(default_factory=dict)  # pair, router: {"base": path, "fingerprint": digest}


def train(job: Job, out: Path) -> dict[str, Any]:
    """Runs the job to its last step in the directory `out`, from its newest checkpoint if it has one.

    Returns the last evaluation: {"step", "tokens", "bits_per_byte": {name: x}}. Raises UserError where `out` holds another
    run, RunError where the loss is not finite; SystemExit after a signal, with everything saved.
    """
    run = job.config
    mesh = sharding.make_mesh(run.mesh)
    check_microbatch(run, mesh.shape)
    _claim(job, out)
    params = job.initial(_placement(job, mesh))
    trained, frozen = partition(params, job.is_trained)
    optimizer = make_optimizer(run.optim, run.train.steps)
    state = TrainState(trained, _init_optimizer(optimizer, trained, mesh))
    _describe(job, out, trained)
    step = make_step(job.model, run, optimizer, mesh)
    evaluate = _evaluator(job, mesh)
    tokens_per_step = run.data.batch_size * run.data.seq_len
    scores: dict[str, float] = {}

    with ExitStack() as stack:
        checkpoints = stack.enter_context(checkpoint.StepCheckpoints(out / "checkpoints", keep=run.train.keep))
        restored = checkpoints.restore_latest(checkpoint.abstract(state._asdict()))
        start = 0
        if restored is not None:
            start, saved = restored
            state = TrainState(**saved)
            note(f"{out} goes on from step {start}")
        metrics = stack.enter_context(MetricsWriter(out, start))
        signals = stack.enter_context(_caught_signals())
        advance = stack.enter_context(bar(f"train {out.name}", run.train.steps))
        advance(start)
        batches = job.batches.iterate(start)
        stack.callback(batches.close)
        clock = time.perf_counter()

        def read(number: int, values: dict[str, jax.Array]) -> None:
            nonlocal clock
            row = {name: value.tolist() for name, value in jax.device_get(values).items()}
            if not (math.isfinite(row["loss"]) and math.isfinite(row["gradient_norm"])):
                checkpoints.wait()
                good = next(iter(checkpoints.steps()), None)
                kept = f"the last good checkpoint is step {good}" if good else "there is no checkpoint yet"
                raise RunError(
                    f"loss {row['loss']}, gradient norm {row['gradient_norm']} at step {number} of {out}; {kept}; "
                    "start a new --out with a lower optim.lr, or look at the data of this step"
                )
            now = time.perf_counter()
            rate, clock = tokens_per_step / (now - clock), now
            advance(1, text=f"loss {row['loss']:.3f}  {rate:,.0f} tokens/s")
            if number % run.train.log_every == 0:
                row["router_share"] = dict(zip(job.experts, row["router_share"], strict=True))
                metrics.write(number, row | {"tokens": number * tokens_per_step, "tokens_per_second": rate})

        pending = None  # the metrics of step n are read after step n + 1 is dispatched
        for number in range(start + 1, run.train.steps + 1):
            batch = jax.device_put(_with_targets(job, next(batches)), sharding.batch_sharding(mesh))
            state, values = step(state, frozen, batch, number)
            if pending is not None:
                read(*pending)
            pending = number, values
            last, stop = number == run.train.steps, bool(signals)
            scored = last or _due(number, run.train.eval_every)
            if scored or stop or _due(number, run.train.save_every):
                read(*pending)  # nothing that is not finite is ever saved
                pending = None
                if scored:
                    scores = evaluate(state.params, frozen)
                    metrics.write(number, {"bits_per_byte": scores})
                metrics.flush()
                checkpoints.save(number, state._asdict(), loss=sum(scores.values()) / len(scores) if scored and scores else None)
                clock = time.perf_counter()
            if stop and not last:
                checkpoints.wait()
                note(f"stopped by a signal at step {number}, saved in {out}; the same command goes on from there")
                sys.exit(EXIT_CODES[signals[0]])
        if start == run.train.steps:
            scores = evaluate(state.params, frozen)
    result = {"step": run.train.steps, "tokens": run.train.steps * tokens_per_step, "bits_per_byte": scores}
    write_text(out / "summary.json", json.dumps(result) + "\n")
    return result


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
    shardings = jax.tree.map(lambda a: a.sharding, abstract_state(optimizer, trained, sharding.replicated(mesh)))
    return jax.jit(optimizer.init, out_shardings=shardings)(trained)


def _evaluator(job: Job, mesh: Mesh) -> Callable[[Params, Params], dict[str, float]]:
    """Bits per byte of each held-out set."""
    active = job.model.n_experts if job.config.run == "router" else None
    scorer = make_scorer(job.model, active, job.config.train.compute_dtype, mesh)
    put = functools.partial(jax.device_put, device=sharding.batch_sharding(mesh))
    batch_size = job.config.data.batch_size // job.config.train.accumulate

    def evaluate(trained: Params, frozen: Params) -> dict[str, float]:
        params, scores = combine(trained, frozen), {}
        for name, records in job.heldout.items():
            score = score_records(
                scorer, params, records, job.tokenizer, batch_size=batch_size, limit=job.config.train.eval_records, put=put
            )
            scores[name] = score.bits_per_byte
        return scores

    return evaluate


def _claim(job: Job, out: Path) -> None:
    """Makes the run's directory, or checks that it holds this very run. Raises UserError otherwise."""
    path = out / "config.yaml"
    if not (is_whole(out) and path.exists()):
        with new_directory(out) as directory:  # a kill in between must not leave a directory that no run may claim
            job.tokenizer.save(directory / "tokenizer.json")
            write_text(directory / "config.yaml", dump_yaml(job.config))
        return
    before, now = (_identity(config) for config in (yaml.safe_load(path.read_text()), to_dict(job.config)))
    changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    if changed:
        raise UserError(f"{out} holds a run with another {', '.join(changed)}; give a new --out, or the config it was started with")
    if (out / DESCRIPTION).exists():
        before, now = open_artifact(out).fingerprint, job.base.get("fingerprint")
        if before != now:
            raise UserError(f"{out} was trained against {before}; {job.base['base']} is now {now}; restore that one or give a new --out")
    write_text(path, dump_yaml(job.config))


def _identity(config: dict[str, Any]) -> dict[str, Any]:
    """What makes two configs the same run: everything but the mesh and how often to look at it."""
    flat = flatten({key: value for key, value in config.items() if value is not None and key != "mesh"})
    free = {"eval_every", "eval_records", "save_every", "keep", "log_every", "remat"}
    return {key.replace("/", "."): value for key, value in flat.items() if key.split("/")[-1] not in free}


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


@contextmanager
def _caught_signals() -> Iterator[list[signal.Signals]]:
    """Collects Ctrl-C and SIGTERM instead of dying of them; a second Ctrl-C kills as usual. Threads cannot catch signals."""
    caught: list[signal.Signals] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return

    def catch(number: int, _frame: object) -> None:
        if caught and number == signal.SIGINT:
            raise KeyboardInterrupt
        caught.append(signal.Signals(number))

    before = {number: signal.signal(number, catch) for number in EXIT_CODES}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
