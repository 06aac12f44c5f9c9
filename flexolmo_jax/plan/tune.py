"""`flexolmo plan --tune`: what the forward pass should keep, and how many microbatches a step
should have, to be fast on a slice.

Every `train.remat`, and every `train.accumulate` that the batch and the mesh allow, is a candidate.
They are compiled one after the other, the one first that could be the fastest. Bounds that need no
compiler leave out

- what cannot fit: state, gradients and the activations that are kept fill the device; or another
  was refused that keeps no more, of no larger a microbatch;
- what cannot win: products, gathers of the layers' weights and the way to the host's memory take as
  long as the fastest that fits.

"none" is no candidate: it multiplies as much as "dots" and keeps more. Nor is "offload" where this
jax does not offload.

A step takes some time between where everything overlaps and where nothing does. The fastest is the
one with the smallest middle of the two; among equals, the smallest peak. Times are equal if their
first three digits are.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, get_args

import jax

from flexolmo_jax.config import Remat, RunConfig
from flexolmo_jax.model.rematerialisation import KEPT
from flexolmo_jax.runtime import sharding
from flexolmo_jax.runtime.progress import note
from flexolmo_jax.runtime.tpus import Slice
from flexolmo_jax.train.activations import kept_bytes
from flexolmo_jax.train.flops import step_flops
from flexolmo_jax.train.step import OFFLOADS_FROM

from .report import GIB, mesh_of, more_memory, plan_training, show, size_of
from .roofline import bandwidth, seconds
from .steps import architecture, fsdp_minimum, training_step

TOO_LARGE, NOT_FASTER = "cannot fit", "cannot be faster"


class Candidate(NamedTuple):
    """A choice, and what its step takes at least."""

    run: RunConfig
    bytes: int  # on a device
    seconds: dict[str, Any]  # as `roofline`

    @property
    def settings(self) -> dict[str, Any]:
        return {"remat": self.run.train.remat, "accumulate": self.run.train.accumulate}

    def keeps_as_little_as(self, other: "Candidate") -> bool:
        """Whether its activations on the device are all among the other's."""
        ours, theirs = self.run.train, other.run.train
        return ours.accumulate >= theirs.accumulate and _on_device(ours.remat) <= _on_device(
            theirs.remat
        )


class Tried(NamedTuple):
    candidate: Candidate
    report: dict[str, Any]

    @property
    def row(self) -> dict[str, Any]:
        row = self.candidate.settings | {key: self.report[key] for key in ("fits", "peak_bytes")}
        if not self.report["fits"]:
            return row
        times = self.report["seconds"]
        return row | {"seconds": [times["overlapped"], times["in_turn"]]}


class Search(NamedTuple):
    tried: list[Tried]
    left_out: list[dict[str, Any]]  # settings, and why
    best: Tried | None


def tune(run: RunConfig, slice_: Slice, slices: int = 1) -> dict[str, Any]:
    """The report of the fastest candidate that fits (where none does, of the last one tried), with
    "tune": {"tried", "left_out", "set"}.

    Raises UserError for a mesh that does not fit the slice's devices, or a batch that does not
    divide over them.
    """
    found = list(candidates(run, slice_, slices))
    note(f"{len(found)} ways to keep activations and to split the batch on {slice_.name}")
    limit = int(slice_.chip.usable_gib * GIB)
    tried, left_out, best = search(found, limit, lambda one: plan_training(one, slice_, slices))
    chosen = best or tried[-1]
    settings = [f"train.{key}={value}" for key, value in chosen.candidate.settings.items()]
    tuned = {
        "tried": [one.row for one in tried],
        "left_out": left_out,
        "set": settings if best else [],
    }
    more = {} if best else {"change": more_memory(slice_, slices, chosen.report)}
    return chosen.report | {"tune": tuned} | more


def search(
    found: Sequence[Candidate], limit: int, plan: Callable[[RunConfig], dict[str, Any]]
) -> Search:
    """The best of the candidates on devices of `limit` bytes, by the reports that `plan` makes.

    Where the bounds say that all are too large, the smallest is planned: the compiler says what it
    needs.
    """
    tried: list[Tried] = []
    left_out: list[dict[str, Any]] = []
    best: Tried | None = None
    smallest = min(found, key=lambda one: one.bytes)
    for one in sorted(found, key=lambda one: _rank(one.seconds, one.bytes)):
        why = _left_out(one, limit, tried, best)
        if why and (one is not smallest or tried):
            left_out.append(one.settings | {"why": why})
            continue
        tried.append(Tried(one, plan(one.run)))
        note(_line(tried[-1].row))
        if tried[-1].report["fits"] and (best is None or _time(tried[-1]) < _time(best)):
            best = tried[-1]
    return Search(tried, left_out, best)


def candidates(run: RunConfig, slice_: Slice, slices: int) -> Iterator[Candidate]:
    """All of them, with their bounds."""
    model = architecture(run)
    mesh = mesh_of(run.mesh, slice_, slices, _with(run, accumulate=1))
    step = training_step(_with(run, accumulate=1), model, mesh)
    state, gradients = size_of(step.arguments), size_of(step.kinds["parameters"])
    gathered = fsdp_minimum(step, run.train.compute_dtype, of_layers=True)
    rate = max(bandwidth(slice_, mesh, axes) for axes in (("fsdp",), ("fsdp", "expert")))
    untried = {"none"} | ({"offload"} if jax.__version_info__ < OFFLOADS_FROM else set())
    remats = [remat for remat in get_args(Remat) if remat not in untried]
    records = run.data.batch_size // sharding.devices_of_batch(mesh)
    for accumulate in (n for n in range(1, records + 1) if records % n == 0):
        for remat in remats:
            one = _with(run, accumulate=accumulate, remat=remat)
            kept = kept_bytes(one, model)
            sums = gradients if accumulate > 1 else 0  # over microbatches
            flops, moved = step_flops(one, model).hardware, accumulate * gathered
            offloaded = accumulate * kept.on_host // mesh.size
            yield Candidate(
                one,
                state + sums + kept.on_device // mesh.size,
                seconds(slice_, mesh, flops, 0, moved / rate, offloaded),
            )


def show_tuned(report: dict[str, Any]) -> str:
    """For people."""
    tuned, left_out = report["tune"], report["tune"]["left_out"]
    best = " ".join(f"--set {word}" for word in tuned["set"])
    reasons = [one["why"] for one in left_out]
    counts = (f"{reasons.count(why)} {why}" for why in (TOO_LARGE, NOT_FASTER))
    return "\n".join(
        [
            "tried:",
            *(f"  {_line(row)}" for row in tuned["tried"]),
            f"not compiled: {', '.join(counts)}",
            f"the fastest that fits: {best}" if best else "none fits",
            "",
            show(report),
        ]
    )


def _with(run: RunConfig, **train: Any) -> RunConfig:
    return dataclasses.replace(run, train=dataclasses.replace(run.train, **train))


def _on_device(remat: Remat) -> set[str]:
    return set() if remat == "offload" else set(KEPT[remat])


def _left_out(one: Candidate, limit: int, tried: list[Tried], best: Tried | None) -> str | None:
    """Why a candidate need not be compiled, if so."""
    refused = (other.candidate for other in tried if not other.report["fits"])
    if one.bytes > limit or any(other.keeps_as_little_as(one) for other in refused):
        return TOO_LARGE
    return NOT_FASTER if best and _rank(one.seconds, one.bytes) >= _time(best) else None


def _time(tried: Tried) -> tuple[float, int]:
    return _rank(tried.report["seconds"], tried.report["peak_bytes"])


def _rank(times: dict[str, Any], peak: int) -> tuple[float, int]:
    """The smaller the better."""
    return float(f"{(times['overlapped'] + times['in_turn']) / 2:.3g}"), peak


def _line(row: dict[str, Any]) -> str:
    how = f"train.remat={row['remat']:<10}train.accumulate={row['accumulate']:<6}"
    peak = f"{row['peak_bytes'] / GIB:>7.1f} GiB"
    if not row["fits"]:
        return f"{how}{peak}  does not fit"
    low, high = row["seconds"]
    return f"{how}{peak}  {low:.3g} to {high:.3g} s"
