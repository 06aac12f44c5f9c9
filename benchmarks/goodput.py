"""A simulated year of a run on spot slices: which share of the time that it holds slices goes into
steps that count, by how often it saves.

    python benchmarks/goodput.py --out benchmarks/results/goodput.json
    python benchmarks/goodput.py --out benchmarks/results/goodput.json --measure  # saves, restores
    python benchmarks/goodput.py --out benchmarks/results/goodput.json --table    # of docs/pods.md

A slice lives for a random time, with an exponential distribution. On each slice the run starts,
restores its last whole checkpoint, and takes steps. After `train.save_minutes` without a checkpoint
it saves the step that has just ended: a part of the save blocks the next step, the rest is written
beside it, and counts once it is whole. What comes after the last whole checkpoint is lost with the
slice. With a notice the run saves once more, if the step that is running and its save end in time.

Every interval meets the same slices (the same seeds), so that differences are not luck. The time
between two slices counts for nothing here: it costs nothing, and no interval changes it.
"""

import argparse
import datetime
import json
import math
import os
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parent.parent
HOUR, YEAR = 3600.0, 365.25 * 24 * 3600.0
MINUTES = (1, 2, 5, 10, 20, 30, 60, 120)
SEEDS = 5  # years
CHOICE = 0.005  # the longest interval is chosen that costs less than this against the best

# Mean life of a slice in hours, and where that is published.
SKYPILOT = "https://github.com/skypilot-org/skypilot/pull/1500"
TRACES = "https://github.com/skypilot-org/spot-traces"
LIVES = {
    2.0: f"16 V100 VMs on AWS, 2023: all 16 were to be had for 1.8 hours at a time ({TRACES})",
    4.0: f"4 V100 VMs on AWS, 2023: one of them lost after 4.1 hours ({TRACES})",
    16.0: f"7 spot TPU slices v2 and v3, 2022: 42 preemptions in 677 hours ({SKYPILOT})",
    27.0: f"the two of four hosts among these: 8 preemptions in 213 hours ({SKYPILOT})",
    60.0: f"4 VMs of 88 CPUs on Google Cloud, 2023: 3 preemptions in 180 hours ({TRACES})",
}
PUBLISHED = 16.0  # of spot TPUs: the life that the default is chosen at
# Seconds between the notice and the end. Pods on GKE have the first 15 of 30, if not set otherwise:
# docs.cloud.google.com/kubernetes-engine/docs/concepts/spot-vms
NOTICES = (15.0, 30.0)
RUNS = {  # plans in launch/plans
    "7B anchor": "job-anchor-v5p-4x8x8",
    "2x7B pair": "job-pair-v5p-4x4x4",
    "2x7B pair, v6e": "job-pair-v6e-16x16",
    "2x7B pair, one host": "pair-v5e-2x4",
    "7x7B router tuning": "router-v5e-2x4",
    "7x7B joint training": "joint-fsdp-v5p-4x4x4",
}
# What a save blocks is the copy to the host; a CPU has none. Orbax names this rate for TPUs:
# orbax.readthedocs.io/en/latest/guides/checkpoint/v1/maximizing_performance.html
TO_HOST = 32e9  # bytes a second of a host
BUCKET = 25e9  # bytes a second, assumed: of all hosts together
BEGIN = 60.0  # s, assumed: pulling the image, starting Python and the TPUs' runtime
FROM_CACHE = 5.0  # s, assumed: reading a compiled step instead of compiling it
COMPILED = 81.0  # seconds; on two idle cores these runs' steps took 46 to 81


@dataclass(frozen=True)
class Costs:
    """Seconds. A save blocks the next step for `block`; it is whole `write` later."""

    step: float
    block: float
    write: float
    start: float  # from getting a slice to the first step


@dataclass
class Outcome:
    """Seconds of a simulated time."""

    held: float = 0.0  # slices
    kept: float = 0.0  # steps that count
    slices: int = 0
    saved_on_notice: int = 0

    @property
    def goodput(self) -> float:
        return self.kept / self.held


def simulate(
    costs: Costs, interval: float, life: float, notice: float = 0.0, seed: int = 0,
    length: float = YEAR,
) -> Outcome:  # fmt: skip
    """A run that holds slices for `length` seconds in all, of `life` seconds in the mean, and saves
    every `interval` seconds at most. A life of infinity is one slice without an end."""
    lives, outcome = np.random.default_rng(seed), Outcome()
    while outcome.held < length:
        end = min(lives.exponential(life) if math.isfinite(life) else math.inf, length)
        kept, on_notice = on_a_slice(costs, interval, end, notice)
        outcome.held += end
        outcome.kept += kept
        outcome.slices += 1
        outcome.saved_on_notice += on_notice
    return outcome


def on_a_slice(costs: Costs, interval: float, end: float, notice: float) -> tuple[float, bool]:
    """Seconds of steps that a slice adds to the last whole checkpoint before it is lost at `end`,
    and whether the notice was enough for a save."""
    steps = max(1, math.ceil(interval / costs.step))  # between two saves
    now, done, whole = costs.start, 0.0, 0.0
    written, writing = 0.0, 0.0  # when the last save is whole, and the steps in it
    last = end - notice  # no step begins after it
    while now + steps * costs.step <= last:
        now, done = now + steps * costs.step, done + steps * costs.step
        now = max(now, written) + costs.block  # one save at a time
        if written <= end:
            whole = writing
        written, writing = now + costs.write, done
    if written <= end:
        whole = writing
    if not notice or now > last:
        return whole, False
    # The step that runs when the notice comes is ended and saved.
    steps = math.floor((last - now) / costs.step) + 1
    now, done = now + steps * costs.step, done + steps * costs.step
    if max(now, written) + costs.block + costs.write <= end:
        return done, True
    return whole, False


def daly(costs: Costs, interval: float, life: float) -> float:
    """The goodput that is to be expected where a save is whole at once and slices end without
    notice (J. T. Daly, Future Generation Computer Systems 22, 2006, equation 13): a piece of work
    and its save take `life * exp(start / life) * (exp((work + save) / life) - 1)`."""
    work = max(1, math.ceil(interval / costs.step)) * costs.step
    expected = life * math.exp(costs.start / life) * math.expm1((work + costs.block) / life)
    return work / expected


def young(costs: Costs, life: float) -> float:
    """The best interval, to first order (J. W. Young, CACM 17, 1974)."""
    return math.sqrt(2 * costs.block * life)


def costs_of(plan: dict[str, Any], measured: dict[str, float], cached: bool = True) -> Costs:
    """Of a plan's run, where each host saves and restores as fast as this machine, and all together
    no faster than the bucket."""
    from flexolmo_jax.runtime.tpus import slice_of

    hosts = slice_of(plan["topology"]).hosts * plan["slices"]
    saved = (plan["parameters_bytes"] + plan["optimizer_bytes"]) * plan["devices"]
    restored = plan["restore_bytes"] * plan["devices"]
    write, read = (
        max(total / hosts * measured[key], total / BUCKET)
        for total, key in ((saved, "write_s_per_byte"), (restored, "restore_s_per_byte"))
    )
    compile_s = FROM_CACHE if cached else COMPILED
    return Costs(
        step=plan["seconds"]["in_turn"],
        block=measured["block_s"] + saved / hosts * measured["block_s_per_byte"],
        write=write,
        start=BEGIN + compile_s + read,
    )


def measure(gigabytes: tuple[float, float] = (0.25, 1.0)) -> dict[str, float]:
    """Seconds of saves and restores on this machine's disk, digests included, of two sizes: a fixed
    part, and one for each byte."""
    import jax

    from flexolmo_jax.storage.checkpoint import StepCheckpoints

    taken = []
    for size in gigabytes:
        shape = (int(size * 1e9 / 4 / 16),)  # numbers at random: Orbax compresses what it writes
        keys = jax.random.split(jax.random.key(0), 16)
        state = {"params": {f"{i}": jax.random.normal(key, shape) for i, key in enumerate(keys)}}
        jax.block_until_ready(state)
        abstract = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state
        )
        times, restores = [], []
        with (
            tempfile.TemporaryDirectory() as folder,
            StepCheckpoints(Path(folder) / "checkpoints", keep=1) as checkpoints,
        ):
            for step in range(1, 6):
                start = time.perf_counter()
                checkpoints.save(step, state)
                blocked = time.perf_counter()
                checkpoints.wait()
                times.append((blocked - start, time.perf_counter() - blocked))
                start = time.perf_counter()
                jax.block_until_ready(checkpoints.restore(abstract, step))
                restores.append(time.perf_counter() - start)
        block, write = (min(column) for column in zip(*times[1:], strict=True))
        taken.append((block, write, min(restores)))
    (block, _, _), (block_2, write_2, restore_2) = taken
    small, large = (size * 1e9 for size in gigabytes)
    slope = max(0.0, (block_2 - block) / (large - small))
    return {
        "block_s": max(0.0, block - slope * small),
        "block_s_per_byte": slope + 1 / TO_HOST,
        "write_s_per_byte": write_2 / large,
        "restore_s_per_byte": restore_2 / large,
    }


def year(costs: Costs, life: float, notice: float) -> dict[str, Any]:
    """Goodput by interval, and the interval that comes of it."""
    goodput, error = {}, {}
    for minutes in MINUTES:
        outcomes = [
            simulate(costs, 60.0 * minutes, life * HOUR, notice, seed) for seed in range(SEEDS)
        ]
        values = [outcome.goodput for outcome in outcomes]
        goodput[minutes] = float(np.mean(values))
        error[minutes] = float(np.std(values, ddof=1) / math.sqrt(SEEDS))
    best = max(goodput.values())
    return {
        "goodput": goodput,
        "standard_error": error,
        "chosen_minutes": max(m for m in MINUTES if goodput[m] >= best - CHOICE),
        "young_minutes": young(costs, life * HOUR) / 60,
    }


def results(measured: dict[str, float]) -> dict[str, Any]:
    """Of every run: its costs, and years by life and notice."""
    found: dict[str, Any] = {}
    for title, name in RUNS.items():
        plan = json.loads((ROOT / "launch/plans" / f"{name}.json").read_text())
        costs, without = (costs_of(plan, measured, cached) for cached in (True, False))
        others = {
            "ten times the block": replace(costs, block=10 * costs.block),
            "half the write": replace(costs, write=costs.write / 2),
            "no compile cache": without,
        }
        met = [(life, 0.0) for life in LIVES] + [(PUBLISHED, notice) for notice in NOTICES]
        found[title] = {
            "plan": name,
            "topology": plan["topology"],
            "costs": asdict(costs),
            "years": {met_by(*each): year(costs, *each) for each in met},
            "start_without_cache": without.start,
            "others": {name: year(other, PUBLISHED, 0.0) for name, other in others.items()},
        }
    return found


def met_by(life: float, notice: float) -> str:
    return f"{life:g} h | {notice:g} s"


def tables(report: dict[str, Any]) -> str:
    """Of docs/pods.md."""
    runs = report["runs"]
    head = [f"{minutes} min" for minutes in MINUTES]
    lines = ["| run | slice | a step | blocks | whole after | a start | " + " | ".join(head) + " |"]
    lines.append("|---" * (6 + len(head)) + "|")
    for title, run in runs.items():
        costs = run["costs"]
        shares = run["years"][met_by(PUBLISHED, 0.0)]["goodput"].values()
        cells = [title, run["topology"]]
        cells += [f"{costs[key]:.3g} s" for key in ("step", "block", "write", "start")]
        lines.append("| " + " | ".join(cells + [f"{share:.2%}" for share in shares]) + " |")
    lines += ["", "| mean life of a slice | notice | " + " | ".join(head) + " | chosen | Young |"]
    lines.append("|---" * (4 + len(head)) + "|")
    for when, found in runs["2x7B pair"]["years"].items():
        shares = [f"{share:.2%}" for share in found["goodput"].values()]
        chosen = f"{found['chosen_minutes']} min | {found['young_minutes']:.1f} min"
        lines.append(f"| {when} | " + " | ".join(shares) + f" | {chosen} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="a JSON file")
    parser.add_argument("--measure", action="store_true", help="save and restore here first")
    parser.add_argument("--table", action="store_true", help="only print what is there")
    options = parser.parse_args()
    report = json.loads(options.out.read_text()) if options.out.exists() else {}
    if options.table and "runs" not in report:
        parser.error(f"{options.out} has no results; leave out --table to make them")
    if not options.table:
        if options.measure or "measured" not in report:
            report["measured"] = measure()
            where = {"cores": os.cpu_count(), "date": datetime.date.today().isoformat()}
            report["machine"] = where
        report["lives"] = {f"{life:g} h": source for life, source in LIVES.items()}
        report["runs"] = results(report["measured"])
        # at which no run loses more than `CHOICE` where slices live as long as is published
        runs = report["runs"].values()
        at = met_by(PUBLISHED, 0.0)
        report["save_minutes"] = min(run["years"][at]["chosen_minutes"] for run in runs)
        report["save_minutes_with"] = {
            name: min(run["others"][name]["chosen_minutes"] for run in runs)
            for name in next(iter(runs))["others"]
        }
        options.out.write_text(json.dumps(report, indent=1) + "\n")
        report = json.loads(options.out.read_text())
    print(tables(report))


if __name__ == "__main__":
    main()
