"""Training checkpoints by step. No other module uses Orbax.

Saving is asynchronous. The newest few checkpoints and the best are kept. Orbax does not notice a
flipped bit, so each step has digests of its files, which are checked when it is restored. A run
that resumes skips damaged checkpoints with a note. Files that are not its own are left alone: what
systems leave silently, others with a note. Published weights are Orbax checkpoints too, but
weights.py writes them and loading.py reads them, both without Orbax.

On a disk, a step gets its name when it is complete. In a bucket nothing can be renamed: there a
step is complete once Orbax has written `commit_success.txt`. The digests are then those that the
object store keeps of its objects, so that sealing and checking read no data again.
"""

import functools
import hashlib
import json
import logging
import operator
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as managers

from flexolmo_jax.errors import RunError, UserError
from flexolmo_jax.runtime.processes import by_the_first, is_first, joined
from flexolmo_jax.runtime.progress import note
from flexolmo_jax.storage.files import discard, make_folder, move, write_text
from flexolmo_jax.storage.outputs import is_whole
from flexolmo_jax.storage.paths import (
    File,
    absolute,
    check_for_checkpoints,
    children,
    in_bucket,
    is_clutter,
    listing,
    literal,
    open_to_read,
)
from flexolmo_jax.storage.untrusted import JSON_LIMIT, parse_json, read_bytes

# Orbax raises errors and also logs them, each with several tracebacks
logging.getLogger("absl").setLevel(logging.CRITICAL)
DIGESTS = "_DIGESTS"
COMMIT = "commit_success.txt"  # Orbax's, in a bucket
TEMPORARY = ".orbax-checkpoint-tmp"  # Orbax's, in the name of a step that it is writing on a disk
# files without a digest; Orbax writes the last two after the digests: they hold times, no state
UNSEALED = {DIGESTS, COMMIT, "_CHECKPOINT_METADATA"}
ALGORITHMS = {64: "sha256", 32: "md5"}  # by a digest's length in hex: on a disk, in a bucket
# what reading a damaged file of digests raises
_MALFORMED = ValueError, KeyError, TypeError, AttributeError, StopIteration
METRICS = "metrics/metrics"  # Orbax's file of metrics, in steps that were evaluated
Tree = dict[str, Any]
Leaves = Mapping[str, jax.ShapeDtypeStruct]  # by path, as "experts/gate"


class StepCheckpoints:
    """The checkpoints of one run. A context manager: leaving it waits for a save in progress.

    `keep` is how many of the newest stay. Without it, this only reads.
    """

    def __init__(self, directory: Path, keep: int | None = None):
        check_for_checkpoints(directory)
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
        self._manager = ocp.CheckpointManager(literal(absolute(directory)), options=options)

    def _tidy(self) -> None:
        make_folder(self._directory)
        for path in children(self._directory):
            if not (path.name.isdigit() or _is_temporary(path.name)):
                note(f"warning: {path} is no checkpoint of this run; it is left alone")
            elif path.name.isdigit() and not _is_committed(path):
                # A save or a removal was killed in a bucket. What it leaves on a disk has another
                # name, and Orbax removes it.
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
        """Starts saving. The checkpoint with the lowest `loss` is the best."""
        assert self._manager is not None
        metrics = None if loss is None else {"loss": loss}
        self._manager.save(step, args=ocp.args.PyTreeSave(state), metrics=metrics, force=True)

    def _seal(self) -> None:
        """Writes the digests of a step's files.

        Orbax calls this just before it completes a step, by its name or its `commit_success.txt`.
        """
        if is_first():
            for path in children(self._directory):
                if _is_being_saved(path) and not (path / DIGESTS).exists():
                    algorithm = "md5" if in_bucket(path) else "sha256"
                    digests = _digests(path, _files(path), algorithm)
                    write_text(path / DIGESTS, json.dumps(digests, indent=1, sort_keys=True) + "\n")

    def wait(self) -> None:
        """Waits until a save in progress is complete."""
        assert self._manager is not None
        self._manager.wait_until_finished()

    def read_back(self, step: int, saved: Tree) -> None:
        """Waits until a step is complete, and reads what was saved of this state: each file, and
        what each array is. Raises RunError where that is not what was saved."""
        self.wait()
        place = self._directory / str(step)
        shapes = sorted((str(a.dtype), tuple(a.shape)) for a in jax.tree.leaves(saved))
        try:
            by_the_first(functools.partial(_check_arrays, place, shapes))
        except UserError as error:
            raise RunError(
                f"{error}; it was saved just now: look whether the disk is sound, and run it again"
            ) from error

    def steps(self) -> list[int]:
        """The steps of complete checkpoints, newest first."""
        named = (path for path in children(self._directory) if _is_step(path.name))
        return sorted((int(path.name) for path in named if _is_complete(path)), reverse=True)

    def choose(self, which: str) -> int:
        """The step that "last", "best" or a number names. Raises UserError if there is none."""
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
        """Restores a step into `target`'s shapes and shardings (a tree of ShapeDtypeStructs).

        Raises UserError for a damaged or missing checkpoint.
        """
        return self._restore(_all_of(target), step)

    def restore_part(self, key: str, target: Tree, step: int) -> Tree:
        """Restores only the branch `key`, without reading the rest, such as optimiser state."""
        target = {key: target}
        args = ocp.args.PyTreeRestore(
            target,
            restore_args=ocp.checkpoint_utils.construct_restore_args(target),
            partial_restore=True,
        )
        return self._restore(args, step)[key]

    def reader(self, key: str, target: Leaves, step: int) -> "StepReader":
        """A reader of the branch `key`. `target`: the shape and dtype of each leaf, by its path.

        The step's files are checked now. Raises UserError as `restore` does.
        """
        _check(self._directory / str(step))
        return StepReader(self._directory / str(step), key, target)

    def _restore(self, args: ocp.args.PyTreeRestore, step: int) -> Any:
        by_the_first(functools.partial(_check, self._directory / str(step)))
        return _restore(self._directory / str(step), args)

    def restore_latest(self, target: Tree) -> tuple[int, Tree] | None:
        """Restores the newest checkpoint that is intact; None if there is none.

        Damaged ones are moved to `damaged/`, with a note. One that is intact stays in its place:
        where it cannot be restored, that is raised.
        """
        for step in by_the_first(self.steps):
            try:
                by_the_first(functools.partial(_check, self._directory / str(step)))
            except UserError as error:
                note(f"warning: {error}; going back to the one before it")
                by_the_first(functools.partial(self._set_aside, str(step)))
                if self._manager is not None:
                    self._manager.reload()
                continue
            return step, _restore(self._directory / str(step), _all_of(target))
        return None

    def _set_aside(self, step: str) -> None:
        """Moves a step to `damaged/`. It is not deleted: perhaps only the disk failed to read."""
        aside = self._directory.with_name("damaged")
        again = sum(path.name.split(".")[0] == step for path in children(aside))
        move(self._directory / step, aside / (f"{step}.{again}" if again else step))


class StepReader:
    """Reads the leaves of one branch of a step into the host's memory.

    Orbax keeps a leaf as its devices had it, all layers together. So the whole leaf that was read
    last stays in memory, until another one is read.
    """

    def __init__(self, step: Path, key: str, target: Leaves):
        self._step, self._key, self._target = step, key, target
        self._kept: tuple[str, np.ndarray] | None = None

    def read(self, path: str, box: Any) -> np.ndarray:
        """A copy of a part of a leaf. Raises UserError as `StepCheckpoints.restore` does."""
        if self._kept is None or self._kept[0] != path:
            self._kept = None  # before the next is read: only one is in memory
            self._kept = path, self._whole(path)
        return np.array(self._kept[1][box])

    def _whole(self, path: str) -> np.ndarray:
        keys, wanted = (self._key, *path.split("/")), self._target[path]

        def alone(leaf: Any) -> Any:
            """The tree with no other leaf."""
            return functools.reduce(lambda tree, key: {key: tree}, reversed(keys), leaf)

        how = alone(ocp.RestoreArgs(restore_type=np.ndarray))
        args = ocp.args.PyTreeRestore(alone(wanted), restore_args=how, partial_restore=True)
        leaf = functools.reduce(operator.getitem, keys, _restore(self._step, args))
        if (leaf.shape, leaf.dtype) != (wanted.shape, wanted.dtype):
            raise UserError(
                f"checkpoint {self._step}: {path} is {leaf.dtype} {list(leaf.shape)}; expected"
                f" {wanted.dtype} {list(wanted.shape)}; restore the run's own checkpoints"
            )
        return leaf


def _all_of(target: Tree) -> ocp.args.PyTreeRestore:
    restore_args = ocp.checkpoint_utils.construct_restore_args(target)
    return ocp.args.PyTreeRestore(target, restore_args=restore_args)


def _restore(step: Path, args: ocp.args.PyTreeRestore) -> Any:
    """What `args` asks for of a step whose files have been checked."""
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            restored = checkpointer.restore(literal(absolute(step) / "default"), args=args)
    except Exception as error:  # Orbax raises bare Exception for data that it cannot read
        # The files passed their check. With several processes, one of them or the network
        # between them may have failed, so the checkpoint is not to blame.
        if joined():
            raise
        raise UserError(
            f"checkpoint {step} is intact, but cannot be restored: {_first_line(error)}; run it"
            " again, or move the checkpoint away to go on from the one before it"
        ) from error
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(restored)):
        raise UserError(
            f"checkpoint {step} lacks parameters that its run trained; restore the run's own"
            " checkpoints"
        )
    return restored


def _is_step(name: str) -> bool:
    """Whether a name is a step's number: few digits, all in ASCII (`isdigit` takes others too)."""
    return name.isascii() and name.isdigit() and len(name) < 19


def _is_temporary(name: str) -> bool:
    """Whether Orbax calls a step so while it writes it on a disk."""
    step, mark, _ = name.partition(TEMPORARY)
    return bool(mark) and step.isdigit()


def _is_being_saved(path: Path) -> bool:
    if in_bucket(path):
        return _is_step(path.name) and not _is_committed(path)
    return _is_temporary(path.name)


def _is_complete(step: Path) -> bool:
    """Whether a step is finished and its metadata can be read.

    Orbax lists every directory with a step's name, and fails if one of them is incomplete.
    """
    if not _is_committed(step):
        return False
    needed = ["_CHECKPOINT_METADATA", "default/_METADATA", DIGESTS]
    try:
        if (step / METRICS).exists():
            needed.append(METRICS)
        for name in needed:
            _json(step / name)
    except (OSError, ValueError, UserError):
        return False
    return True


def _json(path: Path) -> Any:
    """The JSON in a small regular file. Raises OSError, ValueError or UserError."""
    return parse_json(read_bytes(path, JSON_LIMIT))


def _is_committed(step: Path) -> bool:
    """Whether a step's save has finished and no removal has begun. On a disk its name says so."""
    return not in_bucket(step) or (is_whole(step) and (step / COMMIT).exists())


def _digests(step: Path, files: Mapping[str, File], algorithm: str) -> dict[str, str]:
    """The digests of files of a step, by name; the object store's own if it has."""

    def digest_of(name: str) -> tuple[str, str]:
        if algorithm == "md5" and files[name].md5:
            return name, files[name].md5
        with open_to_read(step / name) as file:
            return name, hashlib.file_digest(file, algorithm).hexdigest()  # type: ignore[arg-type]

    with ThreadPoolExecutor(4) as pool:
        return dict(pool.map(digest_of, sorted(files)))


def _files(step: Path) -> dict[str, File]:
    """Every file in a step that gets a digest when it is saved."""
    return {name: file for name, file in listing(step).items() if name not in UNSEALED}


def _check(step: Path, names: Collection[str] | None = None) -> None:
    """Raises UserError unless a step's files, or those in `names`, are what was saved."""
    try:
        saved, files = _json(step / DIGESTS), _files(step)
        expected = {name: digest for name, digest in saved.items() if not is_clutter(name)}
        algorithm = ALGORITHMS[len(next(iter(expected.values())))]
        wanted = expected.keys() if names is None else names
        found = _digests(step, {n: file for n, file in files.items() if n in wanted}, algorithm)
    except (OSError, UserError, *_MALFORMED) as error:
        raise UserError(f"checkpoint {step} cannot be read: {_first_line(error)}") from None
    for name in sorted(wanted):
        if name not in found or expected.get(name) != found[name]:
            raise UserError(f"checkpoint {step} is damaged: {name} is not what was saved")
    if names is None and (strangers := sorted(files.keys() - expected.keys())):
        shown = ", ".join(map(repr, strangers[:3]))
        note(f"warning: checkpoint {step} holds {shown}, which its run did not save; not read")


def _check_arrays(step: Path, expected: list[tuple[str, tuple[int, ...]]]) -> None:
    """Raises UserError unless a step is intact and holds arrays of these dtypes and shapes."""
    _check(step)
    try:
        handler = ocp.PyTreeCheckpointHandler()
        arrays = jax.tree.leaves(handler.metadata(literal(absolute(step) / "default")).tree)
        found = sorted((str(np.dtype(a.dtype)), tuple(a.shape)) for a in arrays)
    except Exception as error:  # Orbax raises bare Exception for data that it cannot read
        raise UserError(f"checkpoint {step} cannot be read: {_first_line(error)}") from error
    if found != expected:
        raise UserError(f"checkpoint {step} lacks arrays of its state: it has {len(found)}")


def _first_line(error: BaseException) -> str:
    # TensorStore's message, without the long JSON that Orbax puts around it
    error = error.__cause__ or error
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
