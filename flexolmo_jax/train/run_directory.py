"""A run's directory: one run claims it, and only the same run resumes in it."""

from pathlib import Path
from typing import Any

from flexolmo_jax.artifact import DESCRIPTION, describe, open_artifact, write_description
from flexolmo_jax.config import dump_yaml, load_config, to_dict
from flexolmo_jax.errors import UserError
from flexolmo_jax.model import Params
from flexolmo_jax.model.tree import flatten
from flexolmo_jax.runtime.processes import by_the_first
from flexolmo_jax.storage.files import new_directory, write_text
from flexolmo_jax.storage.outputs import is_whole

from .job import Job

CONFIG = "config.yaml"
# Keys that may change when a run is resumed, beside the mesh: none of them changes what is learnt,
# but for rounding.
FREE = {"eval_every", "eval_records", "save_every", "save_minutes", "keep", "log_every"}
FREE |= {"accumulate", "kernels", "remat", "watchdog", "profile", "allow_hub_embedder", "strict"}
FREE |= {"owner", "domain", "licence", "expires", "sequence"}  # what an owner states


def claim(job: Job, out: Path) -> None:
    """Makes the run's directory, or checks that it holds this very run. Raises UserError where it
    holds another."""
    by_the_first(lambda: _make_or_check(job, out))
    if not (out / CONFIG).exists():
        raise UserError(
            f"{out} is not the same place for all processes of this run; give a directory that all"
            " of them see, or a bucket"
        )


def describe_run(job: Job, out: Path, trained: Params) -> None:
    """Writes what its checkpoints hold, so that the directory can be opened as an artifact."""
    description = {
        "kind": "run",
        "run": job.config.run,
        "model": to_dict(job.model),
        "experts": list(job.experts),
        "tensors": describe(trained),
        **job.base,
    }
    by_the_first(lambda: write_description(out, description))


def _make_or_check(job: Job, out: Path) -> None:
    if is_whole(out) and (out / CONFIG).exists():
        _check_config(job, out)
        if (out / DESCRIPTION).exists():
            _check_base(job, out)
        write_text(out / CONFIG, dump_yaml(job.config))
        return
    # Whole or not there at all: half a directory, left by a kill, could be claimed by no run.
    with new_directory(out) as directory:
        job.tokenizer.save(directory)
        write_text(directory / CONFIG, dump_yaml(job.config))


def _check_config(job: Job, out: Path) -> None:
    both = to_dict(load_config(out / CONFIG)), to_dict(job.config)
    # Balance is a microbatch's own: no other number of them adds up to the same loss.
    free = FREE - {"accumulate"} if all(c["optim"]["load_balance"] for c in both) else FREE
    kept, now = (_identity(config, free) for config in both)
    changed = sorted(key for key in kept.keys() | now.keys() if kept.get(key) != now.get(key))
    if changed:
        both = (f"{key} ({kept.get(key)!r:.80}, now {now.get(key)!r:.80})" for key in changed)
        raise UserError(
            f"{out} holds a run with another {', '.join(both)}; give the config it was started"
            " with, or a new place (--out, or --work where that was given)"
        )


def _check_base(job: Job, out: Path) -> None:
    """Raises UserError where the anchor or model at the same path is another one by now."""
    description = open_artifact(out).description
    if description["run"] != job.config.run:
        raise UserError(
            f"{out} holds a run of run: {description['run']}; got a config of run:"
            f" {job.config.run}; restore the config it was started with, or give a new --out"
        )
    for key in ("fingerprint", "base_sha256"):
        kept, now = description.get(key), job.base.get(key)
        if kept is None and key == "base_sha256":  # runs of earlier versions have none
            continue
        if kept != now:
            raise UserError(
                f"{out} was trained against {kept}; {job.base['base']} is now {now}; restore"
                " that one or give a new --out"
            )


def _identity(config: dict[str, Any], free: set[str]) -> dict[str, Any]:
    """What two configs of the same run have in common: all keys but the mesh and those that are
    free."""
    given = {key: value for key, value in config.items() if value is not None and key != "mesh"}
    return {
        path.replace("/", "."): value
        for path, value in flatten(given).items()
        if path.split("/")[-1] not in free
    }
