"""Orbax, and nothing else touches it: training checkpoints by step, and the weights of published artifacts.

Training checkpoints are asynchronous; the newest few and the best are kept; restoring falls back over damaged ones with a note.
Published weights are written as plain Zarr arrays (one directory of files an array, no OCDBT), so that equal arrays are equal
files; any Orbax restores them.
"""

import shutil
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as managers

from flexolmo_jax.errors import UserError
from flexolmo_jax.progress import note

Tree = dict[str, Any]


class StepCheckpoints:
    """The checkpoints of one run. A context manager: leaving it waits for the save that is under way.

    Without `keep`, the number of newest ones that stay, it only reads.
    """

    def __init__(self, directory: Path, keep: int | None = None):
        if keep is None:
            options = ocp.CheckpointManagerOptions(read_only=True)
        else:
            directory.mkdir(parents=True, exist_ok=True)
            best = managers.BestN(get_metric_fn=lambda m: m["loss"], reverse=True, n=1, keep_checkpoints_without_metrics=False)
            policy = managers.AnyPreservationPolicy([managers.LatestN(keep), best])
            options = ocp.CheckpointManagerOptions(
                preservation_policy=policy, best_fn=lambda m: m["loss"], best_mode="min", cleanup_tmp_directories=True
            )
        self._directory = directory
        self._manager = ocp.CheckpointManager(directory.absolute(), options=options)

    def __enter__(self) -> "StepCheckpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.wait_until_finished()
        self._manager.close()

    def save(self, step: int, state: Tree, loss: float | None = None) -> None:
        """Starts saving; `loss` (lower is better) decides which checkpoint is the best."""
        metrics = None if loss is None else {"loss": loss}
        self._manager.save(step, args=ocp.args.PyTreeSave(state), metrics=metrics, force=True)

    def wait(self) -> None:
        self._manager.wait_until_finished()

    def steps(self) -> list[int]:
        """Newest first, damaged ones included."""
        return sorted(self._manager.all_steps(), reverse=True)

    def choose(self, which: str) -> int:
        """The step that "last", "best" or a number names."""
        steps = self.steps()
        if not steps:
            raise UserError(f"{self._directory} holds no complete checkpoint; let the run reach its first one")
        if which == "last":
            return steps[0]
        if which == "best":
            best = self._manager.best_step()
            if best is None:
                raise UserError(f"{self._directory} keeps no best checkpoint: the run never evaluated; set train.eval_every")
            return best
        if not which.isdigit() or int(which) not in steps:
            raise UserError(f"no checkpoint {which!r} in {self._directory}; expected last, best or one of {', '.join(map(str, steps))}")
        return int(which)

    def restore(self, target: Tree, step: int) -> Tree:
        """`target`: ShapeDtypeStructs with shardings. Raises UserError for a damaged or missing checkpoint."""
        return self._restore(ocp.args.PyTreeRestore(target, restore_args=ocp.checkpoint_utils.construct_restore_args(target)), step)

    def restore_part(self, key: str, target: Tree, step: int) -> Tree:
        """Only the branch `key` of what was saved, without reading the rest (an optimiser's state, say)."""
        target = {key: target}
        args = ocp.args.PyTreeRestore(target, restore_args=ocp.checkpoint_utils.construct_restore_args(target), partial_restore=True)
        return self._restore(args, step)[key]

    def _restore(self, args: Any, step: int) -> Tree:
        try:
            return self._manager.restore(step, args=args)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"checkpoint {self._directory / str(step)} cannot be restored: {_first_line(error)}") from error

    def restore_latest(self, target: Tree) -> tuple[int, Tree] | None:
        """The newest checkpoint that restores, None where there is none. Damaged newer ones are noted and removed."""
        for step in self.steps():
            try:
                return step, self.restore(target, step)
            except UserError as error:
                note(f"warning: {error}; going back to the one before it")
                shutil.rmtree(self._directory / str(step))
                self._manager.reload()
        return None


def save_weights(directory: Path, params: Tree) -> None:
    """Writes a parameter tree as a plain Orbax checkpoint of Zarr arrays."""
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_zarr3=True)
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(directory.absolute(), args=ocp.args.PyTreeSave(params))


def load_weights(directory: Path, target: Tree) -> Tree:
    """Reads a parameter tree into the shapes, dtypes and shardings of `target` (ShapeDtypeStructs)."""
    restore_args = ocp.checkpoint_utils.construct_restore_args(target)
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_zarr3=True)
    try:
        with ocp.Checkpointer(handler) as checkpointer:
            return checkpointer.restore(directory.absolute(), args=ocp.args.PyTreeRestore(target, restore_args=restore_args))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"the weights in {directory} cannot be read: {_first_line(error)}") from error


def abstract(tree: Tree, sharding: jax.sharding.Sharding | None = None) -> Tree:
    """ShapeDtypeStructs of a tree of arrays, each with its own sharding or with the one given."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding or a.sharding), tree)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
