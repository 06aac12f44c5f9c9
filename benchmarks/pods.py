"""Plans the paper's runs on TPU slices: for every run and type of TPU the smallest slice that fits,
as libtpu compiles it. Nothing is run.

    python benchmarks/pods.py --out launch/plans            # with libtpu (see `flexolmo plan`)
    python benchmarks/pods.py --out launch/plans --table    # the tables of docs/pods.md

It takes an hour on 2 cores.

A microbatch is one record of 4096 tokens a device along data, fsdp and expert. Slices whose memory
could not hold what lies there from step to step are not tried. Every plan is kept, also of the
largest slice that was refused. Those that are there are not made again.
"""

import argparse
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax

from flexolmo_jax.config import RunConfig, load_config
from flexolmo_jax.model.tree import flatten, partition
from flexolmo_jax.plan.steps import IS_TRAINED, architecture
from flexolmo_jax.runtime.tpus import CHIPS, slice_of, slices_of

ROOT = Path(__file__).parent.parent
GIB = 2**30
DECODED = "16x4096"  # prompts and context of a decoding step


class Run(NamedTuple):
    title: str
    config: str
    overrides: tuple[str, ...] = ()
    decode: str | None = None
    types: tuple[str, ...] = tuple(CHIPS)


MANY = ("v5p", "v6e", "tpu7x")
OPEN = {"olmo3-7b": "OLMo 3 7B", "llama3.1-8b": "Llama 3.1 8B", "qwen3-8b": "Qwen3 8B"}
RUNS = {  # by the name in files
    "anchor": Run("7B anchor", "anchor"),
    "pair": Run("2x7B pair", "pair"),
    **{
        f"pair-{preset}": Run(
            f"pair on {title}", "pair", (f"model.preset={preset}",), None, ("v5e", "v5p", "v6e")
        )
        for preset, title in OPEN.items()
    },
    "router": Run("7x7B router tuning", "router"),
    "joint": Run("7x7B top-5 joint training", "joint"),
    "decode": Run("7x7B top-5 decoding, 16 x 4096", "joint", (), DECODED),
    **{
        f"decode{experts}": Run(
            f"{experts}x7B top-5 decoding, 16 x 4096",
            "joint",
            (f"model.n_experts={experts}", f"mesh.expert={spread}"),
            DECODED,
            MANY,
        )
        for experts, spread in ((64, 8), (128, 16))
    },
}
# Beside the smallest slices: two layouts of joint training on one slice, and the pair with
# everything trainable on what fits both, at one microbatch.
LAYOUTS = {"joint-fsdp": (), "joint-fsdp-expert": ("mesh.expert=8",)}
LAYOUTS_ON = "v5p:4x4x4"
# of launch/jobs, whose preflight asks for these
JOBS = (("pair", "v5p:4x4x4"), ("pair", "v6e:16x16"), ("anchor", "v5p:4x8x8"))
TUNED = tuple((config, "v5p:2x2x1") for config in ("anchor", "pair", "router"))
LIMIT_S = 900  # of one compilation


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="a directory for the plans")
    parser.add_argument("--runs", nargs="*", default=list(RUNS), choices=RUNS)
    parser.add_argument("--types", nargs="*", default=list(CHIPS), choices=CHIPS)
    parser.add_argument("--table", action="store_true", help="only print what is there")
    options = parser.parse_args()
    if options.table:
        if not any(options.out.glob("*.json")):
            parser.error(f"{options.out} has no plans; leave out --table to make them")
        print(tables(options.out))
        return
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.runs:
        for kind in (kind for kind in options.types if kind in RUNS[name].types):
            smallest(name, kind, options.out)
    for config, topology in JOBS:
        plan(f"job-{config}", config, topology, (), (), options.out)
    for name, overrides in LAYOUTS.items():
        plan(
            name,
            "joint",
            LAYOUTS_ON,
            one_record(load("joint"), LAYOUTS_ON, *overrides),
            (),
            options.out,
        )
    trainable(options.out)
    for config, topology in TUNED:
        plan(f"tuned-{config}", config, topology, (), ("--tune",), options.out)
    print(tables(options.out))


def load(config: str, overrides: tuple[str, ...] = ()) -> RunConfig:
    return load_config(ROOT / "configs" / "7b" / f"{config}.yaml", overrides)


def smallest(name: str, kind: str, out: Path) -> None:
    """Plans a run on ever larger slices until it fits; where none holds it with fsdp alone, the
    largest with experts spread too."""
    _, config, always, decode, _ = RUNS[name]
    run, options = load(config, always), ("--decode", decode) if decode else ()
    large_enough = [
        s for s in slices_of(kind) if resident(run, decode) <= s.devices * s.chip.usable_gib * GIB
    ]
    for slice_ in large_enough:
        overrides = always if decode else one_record(run, slice_.name, *always)
        if plan(name, config, slice_.name, overrides, options, out)["fits"]:
            return
    if name == "joint":
        topology = large_enough[-1].name
        plan(
            f"{name}-expert",
            config,
            topology,
            one_record(run, topology, *always, "mesh.expert=8"),
            options,
            out,
        )


def one_record(run: RunConfig, topology: str, *overrides: str) -> tuple[str, ...]:
    """As many microbatches a step as leave each device one record."""
    return (*overrides, f"train.accumulate={run.data.batch_size // slice_of(topology).devices}")


def resident(run: RunConfig, decode: str | None) -> int:
    """Bytes that lie on all devices together: of what is trained parameters, gradients and both
    moments in float32; the rest bfloat16."""
    from flexolmo_jax.model import init_params

    model = architecture(run)
    shapes = jax.eval_shape(
        lambda key: init_params(model, key, pair=run.pair is not None), jax.random.key(0)
    )
    is_trained = (lambda _: False) if decode else IS_TRAINED.get(run.run, lambda _: True)
    trained, frozen = (
        sum(math.prod(a.shape) for a in flatten(tree).values())
        for tree in partition(shapes, is_trained)
    )
    cache = 0
    if decode:
        rows, context = map(int, decode.split("x"))
        cache = 2 * 2 * rows * context * model.n_layers * model.n_kv_heads * model.head_size
    return 16 * trained + 2 * frozen + cache


def plan(
    name: str,
    config: str,
    topology: str,
    overrides: tuple[str, ...],
    options: tuple[str, ...],
    out: Path,
) -> dict[str, Any]:
    """The plan of one run on one slice, from a process of its own, kept as a file."""
    path = out / f"{name}-{topology.replace(':', '-')}.json"
    if not path.exists():
        sets = [word for override in overrides for word in ("--set", override)]
        arguments = [
            f"configs/7b/{config}.yaml",
            "--topology",
            topology,
            *sets,
            *options,
        ]
        print(f"flexolmo plan {' '.join(arguments)}", file=sys.stderr, end=" ", flush=True)
        start = time.perf_counter()
        command = [sys.executable, "-m", "flexolmo_jax.cli", "plan", *arguments, "--json"]
        limit = 20 * LIMIT_S if "--tune" in options else LIMIT_S
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit)
        if done.returncode not in (0, 1) or not done.stdout:
            raise RuntimeError(done.stderr[-2000:])
        report = json.loads(done.stdout)
        keep(
            path,
            report
            | {
                "command": ["plan", *arguments],
                "wall_seconds": round(time.perf_counter() - start),
            },
        )
    report = json.loads(path.read_text())
    print(
        f"{'fits' if report['fits'] else 'does not fit'}: {report['peak_bytes'] / GIB:.1f} GiB",
        file=sys.stderr,
    )
    return report


def keep(path: Path, report: dict[str, Any]) -> None:
    path.write_text(json.dumps(report, indent=1) + "\n")


def trainable(out: Path) -> None:
    """The pair's step at one microbatch, and the same with everything trainable, on the smallest
    v5p slice that fits both."""
    import os

    from flexolmo_jax.config import resolve, to_dict
    from flexolmo_jax.runtime.tpus import COMPILER_ENVIRONMENT

    os.environ.update(COMPILER_ENVIRONMENT)
    from flexolmo_jax.plan.report import plan_training

    for slice_ in slices_of("v5p"):
        paths = {
            name: out / f"{name}-{slice_.name.replace(':', '-')}.json"
            for name in ("pair-once", "pair-once-trainable")
        }
        if not all(path.exists() for path in paths.values()):
            run = resolve(
                to_dict(load("pair")), [f"data.batch_size={slice_.devices}", "train.accumulate=1"]
            )
            keep(
                paths["pair-once-trainable"], plan_training(run, slice_, is_trained=lambda _: True)
            )
            keep(paths["pair-once"], plan_training(run, slice_))
        if all(json.loads(path.read_text())["fits"] for path in paths.values()):
            return


def tables(out: Path) -> str:
    found = {path.stem: json.loads(path.read_text()) for path in sorted(out.glob("*.json"))}
    lines = [
        (
            "| run | slice | chips | mesh | peak, of what a device has | temporaries | a step |"
            " tokens/s | bound | bytes moved / least |"
        ),
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, run in RUNS.items():
        for kind in CHIPS:
            for stem, report in found.items():
                if report["fits"] and stem.startswith(
                    (f"{name}-{kind}-", f"{name}-expert-{kind}-")
                ):
                    lines.append(row(run.title, report))
    lines += [
        row(RUNS["joint"].title, found[stem])
        for stem in found
        if stem.startswith(tuple(LAYOUTS)) and found[stem]["fits"]
    ]
    lines += ["", *prompts(found), "", *tuned(found)]
    refused = [
        f"| {stem.removesuffix('-' + r['topology'].replace(':', '-'))} | {r['topology']} |"
        f" {r['peak_bytes'] / GIB:.1f} of {r['hbm_bytes'] / GIB:.1f} GiB |"
        for stem, r in sorted(found.items())
        if not r["fits"]
    ]
    lines += ["", "| refused | slice | needed |", "|---|---|---|", *refused]
    for stem, report in found.items():
        if stem.startswith("pair-once-v5p") and report["fits"]:
            everything = found[stem.replace("pair-once", "pair-once-trainable")]
            if everything["fits"]:
                share = report["peak_bytes"] / everything["peak_bytes"]
                lines += [
                    "",
                    (
                        f"The pair's peak on {report['topology']}, one microbatch a step:"
                        f" {report['peak_bytes'] / GIB:.1f} GiB; with everything trainable"
                        f" {everything['peak_bytes'] / GIB:.1f} GiB ({share:.0%})."
                    ),
                ]
    return "\n".join(lines)


def prompts(found: dict[str, Any]) -> list[str]:
    """What reading all prompts of a decoding plan takes: a sparse forward pass."""
    lines = [
        (
            "| run | slice | mesh | peak | received | of it all-to-all | all prompts | tokens/s |"
            " bound |"
        ),
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for stem, report in found.items():
        if "seconds" in (prefill := report.get("prefill", {})):
            (low, high), seconds = prefill["tokens_per_second"], prefill["seconds"]
            exchanged = sum(
                entry["bytes"] for entry in prefill["collectives"] if entry["kind"] == "all-to-all"
            )
            cells = [
                RUNS[stem.split("-")[0]].title,
                report["topology"],
                _mesh(report),
                f"{prefill['peak_bytes'] / GIB:.1f} of {report['hbm_bytes'] / GIB:.1f} GiB",
                f"{prefill['collective_bytes'] / GIB:.1f} GiB",
                f"{exchanged / GIB:.1f} GiB",
                _seconds(prefill),
                f"{low:,.0f} to {high:,.0f}",
                seconds["bound"],
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def _mesh(report: dict[str, Any]) -> str:
    return " x ".join(f"{axis} {n}" for axis, n in report["mesh"].items() if n > 1)


def tuned(found: dict[str, Any]) -> list[str]:
    """What `plan --tune` chose, beside the plan of the table above."""
    lines = [
        "| run | slice | `full`, one record | the fastest that fits | compiled | peak | a step |",
        "|---|---|---|---|---|---|---|",
    ]
    for config, topology in TUNED:
        name = f"{config}-{topology.replace(':', '-')}"
        if f"tuned-{name}" in found and name in found:
            report, plain = found[f"tuned-{name}"], found[name]
            tune = report["tune"]
            tried, left_out = len(tune["tried"]), len(tune["left_out"])
            cells = [
                RUNS[config].title,
                topology,
                f"{plain['peak_bytes'] / GIB:.1f} GiB, {_seconds(plain)}",
                " ".join(f"`{word}`" for word in tune["set"]),
                f"{tried} of {tried + left_out}",
                f"{report['peak_bytes'] / GIB:.1f} of {report['hbm_bytes'] / GIB:.1f} GiB",
                _seconds(report),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def _seconds(report: dict[str, Any]) -> str:
    return f"{report['seconds']['overlapped']:.3g} to {report['seconds']['in_turn']:.3g} s"


def row(title: str, report: dict[str, Any]) -> str:
    seconds, (low, high) = report["seconds"], report["tokens_per_second"]
    cells = [
        title,
        report["topology"],
        str(report["chips"]),
        _mesh(report),
        f"{report['peak_bytes'] / GIB:.1f} of {report['hbm_bytes'] / GIB:.1f} GiB",
        f"{report['temporary_bytes'] / GIB:.1f} GiB",
        f"{seconds['overlapped']:.3g} to {seconds['in_turn']:.3g} s",
        f"{low:,.0f} to {high:,.0f}",
        seconds["bound"],
        (
            f"{report['collective_bytes'] / report['fsdp_minimum_bytes']:.2f}"
            if report.get("fsdp_minimum_bytes")
            else ""
        ),
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
