"""Orbax, and nothing else touches it: training checkpoints by step.

Training checkpoints are asynchronous; the newest few and the best are kept. Orbax restores a
flipped bit without a word, so each step carries digests of its files; reading a step checks them,
and a run that goes on falls back over damaged ones with a note. Published weights are Orbax
checkpoints too, written by weights.py and read by loading.py without it.

On a disk a step gets its name when all of it is there. In a bucket, where nothing can be renamed,
it is complete when Orbax has written `commit_success.txt`; the digests are those that the object
store keeps of every object, so that no byte is read again to seal or check.
"""

import functools
import hashlib
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as managers

from flexolmo_jax.errors import UserError
from flexolmo_jax.runtime.processes import by_the_first, is_first, joined
from flexolmo_jax.runtime.progress import note
from flexolmo_jax.storage.files import discard, make_folder, move, write_text
from flexolmo_jax.storage.outputs import is_whole
from flexolmo_jax.storage.paths import absolute, children, in_bucket, listing, open_to_read
from flexolmo_jax.storage.untrusted import JSON_LIMIT, parse_json, read_bytes

DIGESTS = "_DIGESTS"
COMMIT = "commit_success.txt"  # Orbax's, in a bucket
# the last two Orbax writes last into a step's directory: times, no state
UNSEALED = {DIGESTS, COMMIT, "_CHECKPOINT_METADATA"}
# of digests, by their length in hex: sealed on a disk, sealed in a bucket
ALGORITHMS = {64: "sha256", 32: "md5"}
# where Orbax writes the metrics of a checkpoint that was saved with some
METRICS = "metrics/metrics"
Tree = dict[str, Any]


class StepCheckpoints:
    """The checkpoints of one run. A context manager: leaving it waits for the save that is under
    way.

    Without `keep`, the number of newest ones that stay, it only reads.
    """

    def __init__(self, directory: Path, keep: int | None = None):
        self._directory = directory
        self._manager: ocp.CheckpointManager | None = None
        if keep is None:
            return
        by_the_first(self._tidy)
        best = managers.BestN(
            get_metric_fn=lambda m: m["loss"],
            reverse=True,
            n=1,
            keep_checkpoints_without_metrics=False,
        )
        policy = managers.AnyPreservationPolicy([managers.LatestN(keep), best])
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policy,
            best_fn=lambda m: m["loss"],
            best_mode="min",
            cleanup_tmp_directories=True,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._seal),
        )
        self._manager = ocp.CheckpointManager(absolute(directory), options=options)

    def _tidy(self) -> None:
        make_folder(self._directory)
        for path in children(self._directory):
            if path.name.isdigit() and not _is_committed(path):
                # what a killed save, or a killed removal, left; on a disk it has another name, and
                # goes by Orbax
                discard(path)
            elif path.name.isdigit() and not (_is_step(path.name) and _is_complete(path)):
                note(f"warning: checkpoint {path} is incomplete; it is set aside")
                self._set_aside(path.name)

    def __enter__(self) -> "StepCheckpoints":
        return self

    def __exit__(self, *_: object) -> None:
        if self._manager is not None:
            try:
                self._manager.wait_until_finished()
            finally:
                self._manager.close()

    def save(self, step: int, state: Tree, loss: float | None = None) -> None:
        """Starts saving; `loss` (lower is better) decides which checkpoint is the best."""
        assert self._manager is not None
        metrics = None if loss is None else {"loss": loss}
        self._manager.save(step, args=ocp.args.PyTreeSave(state), metrics=metrics, force=True)

    def _seal(self) -> None:
        """Puts digests into the step that Orbax is about to finish: it calls this before it gives
        the directory its name, or its mark."""
        if is_first():
            for path in children(self._directory):
                is_finished = path.name.isdigit() and _is_committed(path)
                if not is_finished and not (path / DIGESTS).exists():
                    digests = _digests(path, "md5" if in_bucket(path) else "sha256")
                    write_text(path / DIGESTS, json.dumps(digests, indent=1, sort_keys=True) + "\n")

    def wait(self) -> None:
        """Until the save that is under way is complete."""
        assert self._manager is not None
        self._manager.wait_until_finished()

    def steps(self) -> list[int]:
        """The complete ones, newest first."""
        return sorted(
            (
                int(p.name)
                for p in children(self._directory)
                if _is_step(p.name) and _is_complete(p)
            ),
            reverse=True,
        )

    def choose(self, which: str) -> int:
        """The step that "last", "best" or a number names."""
        steps = self.steps()
        if not steps:
            raise UserError(
                f"{self._directory} holds no complete checkpoint; let the run reach its first one"
            )
        if which == "last":
            return steps[0]
        if which == "best":
            metrics = {step: self._directory / str(step) / METRICS for step in steps}
            metrics = {step: path for step, path in metrics.items() if path.exists()}
            for step in metrics:
                _check(self._directory / str(step), [METRICS])
            losses = {step: _json(path)["loss"] for step, path in metrics.items()}
            if not losses:
                raise UserError(
                    f"{self._directory} keeps no best checkpoint: the run never evaluated; set"
                    " train.eval_every"
                )
            return min(losses, key=lambda step: losses[step])
        if not _is_step(which) or int(which) not in steps:
            raise UserError(
                f"no checkpoint {which!r} in {self._directory}; expected last, best or one of"
                f" {', '.join(map(str, steps))}"
            )
        return int(which)

    def restore(self, target: Tree, step: int) -> Tree:
        """`target`: ShapeDtypeStructs with shardings. Raises UserError for a damaged or missing
        checkpoint."""
        return self._restore(
            ocp.args.PyTreeRestore(
                target, restore_args=ocp.checkpoint_utils.construct_restore_args(target)
            ),
            step,
        )

    def restore_part(self, key: str, target: Tree, step: int) -> Tree:
        """Only the branch `key` of what was saved, without reading the rest (an optimiser's state,
        say)."""
        target = {key: target}
        args = ocp.args.PyTreeRestore(
            target,
            restore_args=ocp.checkpoint_utils.construct_restore_args(target),
            partial_restore=True,
        )
        return self._restore(args, step)[key]

    def _restore(self, args: ocp.args.PyTreeRestore, step: int) -> Any:
        by_the_first(functools.partial(_check, self._directory / str(step)))
        path = absolute(self._directory) / str(step) / "default"
        try:
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
                restored = checkpointer.restore(path, args=args)
        except Exception as error:  # Orbax raises bare Exception for data that it cannot read
            if joined():  # the files are right: what failed is this process, or the way to another
                raise
            raise UserError(
                f"checkpoint {self._directory / str(step)} cannot be restored: {_first_line(error)}"
            ) from error
        if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(restored)):
            raise UserError(
                f"checkpoint {self._directory / str(step)} lacks parameters that its run trained;"
                " restore the run's own checkpoints"
            )
        return restored

    def restore_latest(self, target: Tree) -> tuple[int, Tree] | None:
        """The newest checkpoint that restores, None where there is none. Damaged newer ones are
        noted and set aside, in `damaged/`."""
        for step in by_the_first(self.steps):
            try:
                return step, self.restore(target, step)
            except UserError as error:
                note(f"warning: {error}; going back to the one before it")
                by_the_first(functools.partial(self._set_aside, str(step)))
                if self._manager is not None:
                    self._manager.reload()
        return None

    def _set_aside(self, step: str) -> None:
        """Not deleted: what looks damaged may be a disk that failed to answer."""
        aside = self._directory.with_name("damaged")
        again = sum(path.name.split(".")[0] == step for path in children(aside))
        move(self._directory / step, aside / (f"{step}.{again}" if again else step))


def _is_step(name: str) -> bool:
    """Whether a name is a step's number: other scripts have digits too, which are no numbers, and a
    name has 255 of them."""
    return name.isascii() and name.isdigit() and len(name) < 19


def _is_complete(step: Path) -> bool:
    """Whether everything that says what a checkpoint is can be read: Orbax lists, and trips over,
    anything named like a step."""
    metrics = step / METRICS
    if not _is_committed(step):
        return False
    try:
        for path in (
            step / "_CHECKPOINT_METADATA",
            step / "default" / "_METADATA",
            step / DIGESTS,
            *([metrics] if metrics.exists() else []),
        ):
            _json(path)
    except (OSError, ValueError, UserError):
        return False
    return True


def _json(path: Path) -> Any:
    """Raises OSError, ValueError or UserError for what is no JSON in a regular file of a bounded
    size."""
    return parse_json(read_bytes(path, JSON_LIMIT))


def _is_committed(step: Path) -> bool:
    """Whether a save into a directory with a step's name has finished, and nobody has begun to
    remove it. On a disk the name says so."""
    return not in_bucket(step) or (is_whole(step) and (step / COMMIT).exists())


def _digests(step: Path, algorithm: str, names: Iterable[str] | None = None) -> dict[str, str]:
    """Of a step's files, or these of them, by name: as the object store tells them, where it
    does."""
    found = listing(step)

    def of(name: str) -> tuple[str, str]:
        if algorithm == "md5" and found[name].md5:
            return name, found[name].md5
        with open_to_read(step / name) as file:
            return name, hashlib.file_digest(file, algorithm).hexdigest()  # type: ignore[arg-type]

    with ThreadPoolExecutor(4) as pool:
        return dict(pool.map(of, sorted(found.keys() - UNSEALED) if names is None else names))


def _check(step: Path, names: Iterable[str] | None = None) -> None:
    """Raises UserError where a step's files, or these of them, are not those that were saved."""
    try:
        expected = _json(step / DIGESTS)
        found = _digests(step, ALGORITHMS[len(next(iter(expected.values())))], names)
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        StopIteration,
        UserError,
    ) as error:
        raise UserError(f"checkpoint {step} cannot be read: {_first_line(error)}") from None
    expected = expected if names is None else {name: expected.get(name) for name in found}
    if wrong := sorted(
        name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)
    ):
        raise UserError(f"checkpoint {step} is damaged: {wrong[0]} is not what was saved")


def abstract(tree: Tree, sharding: jax.sharding.Sharding | None = None) -> Tree:
    """ShapeDtypeStructs of a tree of arrays, each with its own sharding or with the one given."""
    return jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding or a.sharding), tree
    )


def _first_line(error: BaseException) -> str:
    # what TensorStore said, without Orbax's page of JSON around it
    error = error.__cause__ or error
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
