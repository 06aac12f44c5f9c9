"""The one training loop, in the order of events.

Restore the newest good checkpoint, or make the first state; for each step take its batch (a pure
function of the step's number), dispatch it, then read the metrics of the step before; evaluate and
save now and then, and always at the end.
"""

import json
import math
import sys
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NoReturn

import jax
import optax
from jax.sharding import Mesh

from flexolmo_jax.artifact import placement_on
from flexolmo_jax.config import check_microbatch
from flexolmo_jax.errors import RunError
from flexolmo_jax.model import Params
from flexolmo_jax.model.tree import partition
from flexolmo_jax.runtime import sharding
from flexolmo_jax.runtime.processes import by_the_first, compile_for_all, is_first, stop_requests
from flexolmo_jax.runtime.progress import bar, note
from flexolmo_jax.storage import checkpoint
from flexolmo_jax.storage.averages import restore_mean
from flexolmo_jax.storage.files import write_text

from .accounting import Accounting, least_step_seconds
from .feed import Feed
from .heldout import CutShort, Evaluation
from .job import Job
from .log import Log
from .metrics import MetricsWriter, read_metrics
from .optimizer import make_optimizer
from .profile import Profile
from .run_directory import claim, describe_run
from .state import TrainState, abstract_params, abstract_state, first_state
from .step import check_remat, make_step
from .watchdog import Watchdog


def train(job: Job, out: Path, continues: bool = False) -> dict[str, Any]:
    """Runs the job to its last step in the directory `out`, from its newest checkpoint if it has
    one.

    `continues`: the run may have other steps, another rate or other data than before. Its
    optimiser's state stays, and its description says what changed after which step.

    Returns the last evaluation: {"step", "tokens", "bits_per_byte": {name: x}}. Raises UserError
    where `out` holds another run, RunError where the loss is not finite; SystemExit after a signal,
    with everything saved.
    """
    every, last = job.config.train, job.config.train.steps
    with ExitStack() as stack:
        trainer = Trainer(job, out, stack, continues)
        done = trainer.restore()
        trainer.begin(done)
        trainer.catch_up(done)
        for number in range(done + 1, last + 1):
            trainer.step(number, compiles=number == done + 1)
            saved = trainer.is_scored(number) or trainer.stops() or _due(number, every.save_every)
            saved = saved or trainer.is_save_late()
            trainer.settle(number, saved)
            if saved:
                trainer.save(number)
        if done < last:
            trainer.read_back(last)
        if every.average:
            trainer.evaluate_mean()
    return trainer.finish()


class Trainer:
    """A run's state and its phases, in the order of their calls. `stack` closes what they open, the
    last first."""

    def __init__(self, job: Job, out: Path, stack: ExitStack, continues: bool):
        self._job, self._out, self._stack = job, out, stack
        self._accounting = Accounting()
        self._watchdog = stack.enter_context(Watchdog(job.config.train.watchdog))
        self._pending: tuple[int, dict[str, jax.Array]] | None = None  # a step and its metrics
        self._was_finite = True  # the loss of the step that was read last
        self._scores: dict[str, float] = {}
        with self._accounting.spent("init"):
            self._mesh = sharding.make_mesh(job.config.mesh)
            self._ran_on = {
                "accumulate": job.config.train.accumulate,
                "processes": jax.process_count(),
                **self._mesh.shape,
            }
            check_microbatch(job.config, self._mesh.shape)
            check_remat(job.config.train.remat, sharding.platform_of(self._mesh))
            claim(job, out, continues)
            self._optimizer = make_optimizer(
                job.config.optim, job.config.train.steps, job.config.train.skip_spikes
            )
            self._dispatch = make_step(job.model, job.config, self._optimizer, self._mesh)
            self._evaluation = Evaluation(job, self._mesh, self.stops)
            self._checkpoints = stack.enter_context(
                checkpoint.StepCheckpoints(out / "checkpoints", keep=job.config.train.keep)
            )

    def restore(self) -> int:
        """Takes over the state of the newest good checkpoint and returns its step. Without one,
        makes the first state and returns 0.

        A run resumes bit for bit from parameters and optimiser state alone: a step's batch and its
        noise are functions of the step's number. It never holds two states at once.
        """
        job = self._job
        placement = placement_on(self._mesh, job.model, pair=job.config.run == "pair")
        with self._accounting.spent("init"):
            base = job.load_base(placement)
            self._frozen = partition(base, job.is_trained)[1]
            abstract = _abstract_state(job, self._optimizer, self._mesh)
            describe_run(job, self._out, abstract.params)
        with self._accounting.spent("restore"):
            restored = self._checkpoints.restore_latest(abstract._asdict())
        if restored is not None:
            done, state = restored
            self._state = TrainState(**state)
            note(f"{self._out} resumes from step {done}")
            return done
        with self._accounting.spent("init"):
            self._state = first_state(self._optimizer, job.initial(placement, base), abstract)
        return 0

    def begin(self, done: int) -> None:
        """Opens log, profile and batches for the steps after `done`, and listens for signals."""
        job, enter = self._job, self._stack.enter_context
        metrics = enter(MetricsWriter(self._out, done)) if is_first() else None
        advance = enter(bar(f"train {self._out.name}", job.config.train.steps))
        least_seconds = least_step_seconds(job.config, job.model, self._mesh)
        self._log = Log(job, self._accounting, least_seconds, advance, metrics)
        advance(done)
        self._saved_at = time.monotonic()
        self._stop_status = enter(stop_requests())
        self._profile = enter(Profile(job.config.train.profiled, self._out))
        self._feed = Feed(job, self._mesh, done)
        self._stack.callback(self._feed.close)

    def stops(self) -> bool:
        """Whether a signal asked for a stop. Of several processes all have to call this equally
        often: see `stop_requests`."""
        return self._stop_status() is not None

    def is_scored(self, number: int) -> bool:
        """Whether a step is evaluated before it is saved."""
        every = self._job.config.train
        return number == every.steps or _due(number, every.eval_every)

    def catch_up(self, done: int) -> None:
        """Evaluates the step that was restored, if a signal kept it from being evaluated. The last
        one anyway: a run that is started again after its end is asked for its result, which may be
        that of a mean."""
        entries = read_metrics(self._out) if is_first() and self.is_scored(done) else []
        logged = by_the_first(lambda: any(_is_score(entry, done) for entry in entries))
        is_asked = done == self._job.config.train.steps and not self._job.config.train.average
        if done and self.is_scored(done) and (is_asked or not logged):
            self._watchdog.expect(f"evaluating step {done}")
            scored = self._evaluate(self._state.params)
            if scored and not logged:
                self._log.write(done, {"bits_per_byte": self._scores}, flush=True)
            if not scored or (self.stops() and done < self._job.config.train.steps):
                self._stop(done)
            self._log.restart_clock()

    def step(self, number: int, compiles: bool) -> None:
        """Dispatches a step, and only then reads the metrics of the step before: while Python waits
        for them and writes, the devices have work."""
        self._watchdog.expect_step(number)
        with self._accounting.spent("data"):
            batch = self._feed.next()
        if compiles:
            with self._accounting.spent("compile"):
                compile_for_all(self._dispatch, self._state, self._frozen, batch, number)
            self._log.restart_clock()
        self._profile.before(number)
        traced = jax.profiler.StepTraceAnnotation("train", step_num=number)
        with self._accounting.spent("step"), traced:
            self._state, metrics = self._dispatch(self._state, self._frozen, batch, number)
            self._read_pending()
        self._pending = number, metrics

    def is_save_late(self) -> bool:
        """Whether `train.save_minutes` have passed since the last save. The first process's clock
        decides: all save the same step."""
        most = 60 * self._job.config.train.save_minutes
        return most > 0 and by_the_first(lambda: time.monotonic() - self._saved_at >= most)

    def settle(self, number: int, saved: bool) -> None:
        """Waits for a step that is to be saved, or is the profile's last, and checks it: nothing
        that is not finite is ever saved."""
        if saved or self._profile.ends(number):
            self._watchdog.expect_step(number)
            with self._accounting.spent("step"):
                self._read_pending()
        self._profile.after(number)

    def _evaluate(self, trained: Params) -> bool:
        """Whether the evaluation came to its end, before any signal."""
        with self._accounting.spent("eval"), suppress(CutShort):
            self._scores = self._evaluation(trained, self._frozen)
            return True
        return False

    def evaluate_mean(self) -> None:
        """Of the checkpoints that the run stands for when it has ended. Lets go of the state."""
        self._watchdog.expect("evaluating the mean of checkpoints")
        with self._accounting.spent("restore"):
            steps = by_the_first(self._checkpoints.steps)[: self._job.config.train.average]
            abstract = jax.tree.map(
                lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding),
                self._state.params,
            )
            self._state = TrainState({}, None)
            mean = restore_mean(self._checkpoints, "params", abstract, steps)
        if not self._evaluate(mean):
            self._stop(steps[0])

    def save(self, number: int) -> None:
        """Saves a step, which is evaluated first where `is_scored` says so. After a signal that is
        not done any more, and the process ends here."""
        self._watchdog.expect(f"evaluating and saving after step {number}")
        entry: dict[str, Any] = {}
        loss = None
        if scored := self.is_scored(number) and self._evaluate(self._state.params):
            entry["bits_per_byte"] = self._scores
            loss = sum(self._scores.values()) / len(self._scores) if self._scores else None
        entry["seconds"] = self._accounting.seconds()
        # All steps since the checkpoint before were computed so: a run resumes from a checkpoint.
        entry["ran_on"] = self._ran_on
        self._log.write(number, entry, flush=True)
        with self._accounting.spent("save"):
            self._checkpoints.save(number, self._state._asdict(), loss=loss)
        self._log.restart_clock()
        self._saved_at = time.monotonic()
        if self.stops() and not (scored and number == self._job.config.train.steps):
            self._stop(number)

    def read_back(self, number: int) -> None:
        """Makes sure that what was saved of the last step can be read. Raises RunError."""
        self._watchdog.expect(f"reading back what was saved after step {number}")
        with self._accounting.spent("save"):
            self._checkpoints.read_back(number, self._state._asdict())

    def _stop(self, number: int) -> NoReturn:
        """Ends the process with the signal's exit status, once the checkpoint is complete."""
        with self._accounting.spent("save"):
            self._checkpoints.wait()
        by_the_first(lambda: None)  # all wait until it is complete for all
        note(
            f"stopped by a signal at step {number}, saved in {self._out}; the same command resumes"
            " from there"
        )
        sys.exit(self._stop_status())

    def finish(self) -> dict[str, Any]:
        """The result of `train`, when all is closed."""
        data, steps = self._job.config.data, self._job.config.train.steps
        tokens = steps * data.batch_size * data.seq_len
        result = {"step": steps, "tokens": tokens, "bits_per_byte": self._scores}
        summary = json.dumps(result | {"seconds": self._accounting.seconds()}) + "\n"
        by_the_first(lambda: write_text(self._out / "summary.json", summary))
        return result

    def _read_pending(self) -> None:
        """Waits for the step whose metrics are not read yet, if there is one. Raises RunError where
        its loss is not finite, unless it alone was skipped as a spike."""
        if self._pending is None:
            return
        number, metrics = self._pending
        self._pending = None
        entry = {name: value.tolist() for name, value in jax.device_get(metrics).items()}
        is_finite = math.isfinite(entry["loss"]) and math.isfinite(entry["gradient_norm"])
        # One that was skipped changed nothing. Two in a row are no batch's fault.
        if not is_finite and not (entry.get("spike") and self._was_finite):
            raise self._not_finite(number, entry)
        self._was_finite = is_finite
        self._watchdog.measured(self._log.step(number, entry))

    def _not_finite(self, number: int, entry: dict[str, Any]) -> RunError:
        self._checkpoints.wait()
        good = next(iter(self._checkpoints.steps()), None)
        kept = f"the last good checkpoint is step {good}" if good else "there is no checkpoint yet"
        return RunError(
            f"loss {entry['loss']}, gradient norm {entry['gradient_norm']} at step {number} of"
            f" {self._out}; {kept}; start a new --out with a lower optim.lr, or look at the"
            " data of this step"
        )


def _is_score(entry: dict[str, Any], step: int) -> bool:
    return entry["step"] == step and "bits_per_byte" in entry


def _due(number: int, every: int) -> bool:
    return every > 0 and number % every == 0


def _abstract_state(job: Job, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    # In float32, whatever the dtype of what they start from: see `initial` of each kind of run.
    params = abstract_params(
        job.model, mesh, pair=job.config.run == "pair", dtype=lambda path: "float32"
    )
    return abstract_state(optimizer, partition(params, job.is_trained)[0], mesh)
