"""Keys that a run of its kind does not use: what is given there is refused, not ignored.

A key at its default is no wish of anybody's: the resolved config of a run has all of them. Runs of
earlier versions may have others. They go on, as `without_unused` compares them.
"""

import dataclasses
import typing

from flexolmo_jax.errors import UserError

from .run import RunConfig

_OF_SCALINGS = {  # keys of `model.rope_scaling`, and the kinds that have them
    "first_seq_len": ("llama3", "yarn"),
    "low_frequency": ("llama3",),
    "high_frequency": ("llama3",),
    "beta_fast": ("yarn",),
    "beta_slow": ("yarn",),
    "attention_factor": ("yarn",),
}


def refuse_unused(run: RunConfig) -> None:
    """Raises UserError for a key that is given and changes nothing."""
    for key, why in _unused(run).items():
        *branches, leaf = key.split(".")
        section = _at(run, branches)
        value, default = getattr(section, leaf), _defaults(section)[leaf]
        is_off = key.startswith("pair.") and value == 0
        if value != default and not is_off:
            raise UserError(f"{key} is {value!r:.80}, which has no effect: {why}; leave it out")
    for i, dataset in enumerate(run.data.eval):
        if dataset.weight != 1:
            raise UserError(
                f"data.eval[{i}].weight is {dataset.weight:g}, which has no effect: each set is"
                " evaluated for itself; leave it out"
            )


def without_unused(run: RunConfig) -> RunConfig:
    """The run with the default of every key that it does not use."""
    for key in _unused(run):
        *branches, leaf = key.split(".")
        changed = _at(run, branches)
        changed = dataclasses.replace(changed, **{leaf: _defaults(changed)[leaf]})
        for depth in reversed(range(len(branches))):
            changed = dataclasses.replace(_at(run, branches[:depth]), **{branches[depth]: changed})
        run = changed
    data = run.data
    sets = tuple(dataclasses.replace(dataset, weight=1.0) for dataset in data.eval)
    return dataclasses.replace(run, data=dataclasses.replace(data, eval=sets))


def _unused(run: RunConfig) -> dict[str, str]:
    """By key: why this run does not use it."""
    return _of_kind(run) | _of_pair(run) | _of_scaling(run)


def _of_kind(run: RunConfig) -> dict[str, str]:
    found: dict[str, str] = {}
    if run.run == "anchor":
        for key in ("router_lr", "router_z_loss"):
            found[f"optim.{key}"] = "an anchor has one expert, and so no router that learns"
        if not run.train.init:
            for key in ("router_bias", "init_bias"):
                found[f"model.{key}"] = "an anchor's expert has no bias: it is a pair's key"
    if run.run != "joint":
        found["optim.load_balance"] = f"in {run.run} runs every expert is active"
    if run.run in ("pair", "joint") and not run.model.router_bias:
        found["model.init_bias"] = "model.router_bias is false"
    return found


def _of_pair(run: RunConfig) -> dict[str, str]:
    pair = run.pair
    if pair is None:
        return {}
    if not pair.beside_anchor:
        why = "pair.beside_anchor is false, so the router has no choice"
        noise = {} if run.optim.router_z_loss else {"pair.router_noise": why}
        return {"pair.contrast": why, **noise}
    if pair.public_share == 0:
        return {"pair.contrast": "pair.public_share is 0, so there is nothing to tell apart"}
    return {}


def _of_scaling(run: RunConfig) -> dict[str, str]:
    scaling = run.model.rope_scaling
    if scaling is None or run.pair or run.router or run.train.init:
        return {}
    return {
        f"model.rope_scaling.{key}": f"it is for the kind {' or '.join(kinds)}"
        for key, kinds in _OF_SCALINGS.items()
        if scaling.kind not in kinds
    }


def _at(run: RunConfig, branches: list[str]) -> typing.Any:
    section: typing.Any = run
    for branch in branches:
        section = getattr(section, branch)
    return section


def _defaults(section: typing.Any) -> dict[str, typing.Any]:
    return {field.name: field.default for field in dataclasses.fields(section)}
