"""A run's directory: one run claims it, and only the same run resumes in it.

A run is its config and what it reads: data, tokenizer, and the anchor or model that it starts from.
These are compared by their digests. How their paths are spelled, and where they lie, does not
matter.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from flexolmo_jax.artifact import (
    DESCRIPTION,
    Artifact,
    describe,
    open_artifact,
    write_description,
)
from flexolmo_jax.config import RunConfig, dump_yaml, read_config, to_dict, without_unused
from flexolmo_jax.data.records import Content
from flexolmo_jax.data.tokenizer import Tokenizer
from flexolmo_jax.description import canonical_json
from flexolmo_jax.errors import UserError
from flexolmo_jax.model import Params
from flexolmo_jax.model.tree import flatten
from flexolmo_jax.runtime.processes import by_the_first
from flexolmo_jax.runtime.progress import note
from flexolmo_jax.storage.checkpoint import StepCheckpoints
from flexolmo_jax.storage.files import new_directory, write_text
from flexolmo_jax.storage.outputs import is_whole
from flexolmo_jax.storage.paths import absolute, check_for_checkpoints, path_of

from .job import Job
from .optimizer import learning_rate

Inputs = Mapping[str, Mapping[str, str]]
Changes = dict[str, tuple[str, str]]  # by key: what was, and what is now
CONFIG = "config.yaml"
ELSEWHERE = "a new place (--out, or --work where that was given)"
# Keys that may change when a run is resumed, beside the mesh: none of them changes what is learnt,
# but for rounding.
FREE = {"eval_every", "eval_records", "save_every", "save_minutes", "keep", "log_every", "average"}
FREE |= {"accumulate", "kernels", "remat", "watchdog", "profile", "allow_hub_embedder", "strict"}
FREE |= {"owner", "domain", "licence", "expires", "sequence"}  # what an owner states
# keys, by how they begin, that may change where a run is trained on
CONTINUED = ("train.steps", "optim.", "data.train", "data.eval")


def claim(job: Job, out: Path, continues: bool = False) -> None:
    """Makes the run's directory, or checks that it holds this very run; with `continues`, this run
    but for the keys of `CONTINUED`.

    Raises UserError where it holds another, or cannot hold its checkpoints.
    """
    check_for_checkpoints(out)
    by_the_first(lambda: _make_or_check(job, out, continues))
    if not (out / CONFIG).exists():
        raise UserError(
            f"{out} is not the same place for all processes of this run; give a directory that all"
            " of them see, or a bucket"
        )


def describe_run(job: Job, out: Path, trained: Params) -> None:
    """Writes what its checkpoints hold and what it reads, so that the directory can be opened as an
    artifact, and only the same run resumes in it."""

    def write() -> None:
        kept = open_artifact(out).description if (out / DESCRIPTION).exists() else {}
        description = {
            "kind": "run",
            "run": job.config.run,
            "model": to_dict(job.model),
            "experts": list(job.experts),
            "tensors": describe(trained),
            "inputs": _inputs(job),
            **job.base,
            **({"average": job.config.train.average} if job.config.train.average else {}),
            **{key: kept[key] for key in ("lineage",) if key in kept},
        }
        write_description(out, description)

    by_the_first(write)


def _make_or_check(job: Job, out: Path, continues: bool) -> None:
    if is_whole(out) and (out / CONFIG).exists():
        # What was stopped before it began to train has no description.
        kept = open_artifact(out).description if (out / DESCRIPTION).exists() else {}
        now = _inputs(job)
        _check_tokenizer(job, out)
        if kept:
            _check_base(job, out, kept)
        settings, read = _changed_settings(job, out, kept, now), _changed_inputs(out, kept, now)
        if continues and (settings or read):
            _continue(job, out, kept, settings | read)
        else:
            _refuse(out, settings, read)
        write_text(out / CONFIG, dump_yaml(job.config))
        return
    if continues:
        raise UserError(f"{out} holds no run to train on (--continue); leave --continue out")
    # Whole or not there at all: half a directory, left by a kill, could be claimed by no run.
    with new_directory(out) as directory:
        job.tokenizer.save(directory)
        write_text(directory / CONFIG, dump_yaml(job.config))


def _refuse(out: Path, settings: Changes, read: Changes) -> None:
    """Raises UserError where anything has changed."""
    if settings:
        told = (f"{key} ({old:.80}, now {new:.80})" for key, (old, new) in settings.items())
        on = "; --continue trains a run on with these" if all(map(_may_change, settings)) else ""
        raise UserError(
            f"{out} holds a run with another {', '.join(told)}; give the config it was started"
            f" with, or {ELSEWHERE}{on}"
        )
    if read:
        told = (f"{key}: {old}; now {new}" for key, (old, new) in read.items())
        raise UserError(
            f"{out} holds a run that read something else: {'; '.join(told)}; restore what it read,"
            f" or give {ELSEWHERE}"
        )


def _continue(job: Job, out: Path, kept: Mapping[str, Any], changed: Changes) -> None:
    """Notes in the run's description what changes after its newest step.

    Raises UserError for changes that would make it another run, and where no step is left.
    """
    if other := [key for key in changed if not _may_change(key)]:
        old, new = changed[other[0]]
        raise UserError(
            f"{out} cannot be trained on with another {other[0]} ({old:.80}, now {new:.80});"
            f" --continue takes {', '.join(CONTINUED)}; give {ELSEWHERE}"
        )
    was = read_config(out / CONFIG).optim.router_lr
    if (was > 0) != (job.config.optim.router_lr > 0):
        raise UserError(
            f"{out} has optim.router_lr {was:g}; got {job.config.optim.router_lr:g}; a rate of the"
            " router's own has to be there from the start, or not at all"
        )
    done = _newest(out)
    if not done or job.config.train.steps <= done:
        raise UserError(
            f"{out} has {done} steps, and train.steps is {job.config.train.steps}; to train it on"
            " give more than it has"
        )
    entry = {"step": done, "changed": {key: list(both) for key, both in changed.items()}}
    lineage = kept.get("lineage", [])
    if entry not in lineage[-1:]:  # else this was killed right after it was written
        write_description(out, {**kept, "lineage": [*lineage, entry]})
    told = ", ".join(f"{key} {old:.80} -> {new:.80}" for key, (old, new) in changed.items())
    rate = np.asarray(learning_rate(job.config.optim, job.config.train.steps)(done)).item()
    note(f"{out} is trained on from step {done}, at a learning rate of {rate:.3g}: {told}")


def _may_change(key: str) -> bool:
    return key.startswith(CONTINUED)


def _changed_settings(job: Job, out: Path, kept: Mapping[str, Any], inputs: Inputs) -> Changes:
    """Keys with another value, but for paths of what the other checks compare."""
    compared = {"data.tokenizer"}
    if "inputs" in kept:  # runs of earlier versions have none
        compared |= kept["inputs"].keys() | inputs.keys()
    for key, digest in (("pair.anchor", "fingerprint"), ("router.model", "base_sha256")):
        compared |= {key} if digest in kept else set()

    def place(key: str, path: str) -> str:
        return str(absolute(path_of(path))) if path and key not in compared else ""

    both = read_config(out / CONFIG), job.config
    # Balance is a microbatch's own: no other number of them adds up to the same loss.
    free = FREE - {"accumulate"} if all(c.optim.load_balance for c in both) else FREE
    if "inputs" in kept:  # what was read says how
        free = free | {"text_key", "separator"}
    old, new = (_settings(config.reading(place), free) for config in both)
    shown, now = (_settings(config, free) for config in both)
    changed = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    return {key: (f"{shown.get(key)!r:.900}", f"{now.get(key)!r:.900}") for key in changed}


def _check_base(job: Job, out: Path, description: Mapping[str, Any]) -> None:
    """Raises UserError where the anchor or model is another one by now."""
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


def _check_tokenizer(job: Job, out: Path) -> None:
    if Tokenizer.load(out).digests != job.tokenizer.digests:
        given = job.config.data.tokenizer or "that of its data or its anchor"
        raise UserError(
            f"{out} holds a run with another tokenizer (data.tokenizer) than {given} is now;"
            f" restore the one in {out}, or give {ELSEWHERE}"
        )


def _changed_inputs(out: Path, description: Mapping[str, Any], now: Inputs) -> Changes:
    """What the run reads that is not what it has learnt from."""
    kept = description.get("inputs", now)
    changed, same_places = {}, True
    # earlier versions did not score, nor note, a set of which nothing was held out
    unscored = {key for key in now.keys() - kept.keys() if key.startswith("data.eval")}
    for key in sorted((kept.keys() | now.keys()) - unscored):
        old, new = (inputs.get(key, {"holds": "nothing"}) for inputs in (kept, now))
        if old.get("sha256") != new.get("sha256"):
            was = f"{old['path']} held {old['holds']}" if "path" in old else "it was not there"
            holds = "others" if old["holds"] == new["holds"] else new["holds"]
            place = new.get("path", old.get("path"))
            changed[key] = (was, f"{place} holds {holds}")
            same_places &= place == old.get("path", place)
    return {} if same_places and not _newest(out) else changed


def _newest(out: Path) -> int:
    """The step of the newest checkpoint, 0 where there is none."""
    with StepCheckpoints(out / "checkpoints") as checkpoints:
        return max(checkpoints.steps(), default=0)


def _settings(config: RunConfig, free: set[str]) -> dict[str, Any]:
    """What two configs of the same run have in common: all keys but the mesh and those that are
    free."""
    tree = to_dict(without_unused(config)).items()
    given = {key: value for key, value in tree if value is not None and key != "mesh"}
    return {
        path.replace("/", "."): value
        for path, value in flatten(given).items()
        if path.split("/")[-1] not in free
    }


def _inputs(job: Job) -> dict[str, dict[str, str]]:
    """What a run reads beside its anchor or model, by the config's key: see `description.Input`."""
    config, data = job.config, job.config.data
    found: dict[str, dict[str, str]] = {}

    def add(key: str, path: str, content: Content) -> None:
        found[key] = {"path": str(absolute(path_of(path))), **content._asdict()}

    trained = [(f"data.train[{i}].path", source.path) for i, source in enumerate(data.train)]
    trained += [("pair.public", config.pair.public)] if config.pair else []
    # where public text has no share it is not among the sources
    for (key, path), source in zip(trained, job.batches.sources, strict=False):
        add(key, path or str(source.path), source.content)
    for i, dataset in enumerate(data.eval):
        if (source := job.heldout.get(dataset.title)) is not None:
            add(f"data.eval[{i}].path", dataset.path, source.content)
    if job.init is not None:
        add("train.init", config.train.init, _content_of(job.init))
    return found


def _content_of(start: Artifact) -> Content:
    """What weights are started from. A run is the same however far it has come."""
    if start.kind != "run":
        sha256 = start.description["sha256"]
        return Content(sha256, f"the {start.kind} {(start.fingerprint or sha256)[:16]}")
    file, inputs = start.path / CONFIG, start.description.get("inputs", {})
    settings: dict[str, Any] = {}
    if file.exists():
        settings = _settings(read_config(file).reading(lambda *_: ""), FREE)
    digests = {key: read["sha256"] for key, read in inputs.items()}
    whole = canonical_json([settings, digests, start.fingerprint]).encode()
    return Content(hashlib.sha256(whole).hexdigest(), f"a run (run: {start.description['run']})")
