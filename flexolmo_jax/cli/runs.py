"""Verbs for runs of a config: train it, plan it for a TPU slice, reproduce a study of many."""

import argparse
from typing import Any

from flexolmo_jax.errors import UserError
from flexolmo_jax.runtime.processes import join
from flexolmo_jax.storage.paths import path_of

from .options import CONTINUE, KERNELS, OUT, SET, local, positive, prompts_by_context
from .verbs import option, refuse_given, verb

_SEVERAL = (
    "several processes of one run",
    "found by themselves on TPU pods, on GKE and under Slurm's srun",
)


DISTRIBUTED = option(
    "--distributed",
    choices=("auto", "none"),
    default="auto",
    help="none: this process alone, whatever is around it",
    group=_SEVERAL,
)


@verb(
    "train",
    "Run a config: anchor, pair, router or joint. Goes on from its newest checkpoint.",
    "train configs/tiny/anchor.yaml --set train.steps=200 --out runs/anchor",
    option("config", type=path_of),
    SET,
    OUT,
    CONTINUE,
    option(
        "--profile",
        metavar="START:STOP",
        help="write a profile of these steps into OUT/profile, for xprof",
    ),
    option(
        "--coordinator", metavar="HOST:PORT", help="where the first process listens", group=_SEVERAL
    ),
    option("--processes", type=positive, metavar="N", help="how many there are", group=_SEVERAL),
    option("--process", type=int, metavar="I", help="which this is, from 0 on", group=_SEVERAL),
    DISTRIBUTED,
    joins=True,
)
def _train(args: argparse.Namespace) -> dict[str, Any]:
    from flexolmo_jax.config import load_config

    profile = [f"train.profile='{args.profile}'"] if args.profile else []
    run = load_config(args.config, [*args.set, *profile])
    if args.coordinator is not None:
        refuse_given(args, (DISTRIBUTED,), "--coordinator says who the others are")
    join(args.coordinator, args.processes, args.process, look=args.distributed == "auto")
    if run.run == "pair":
        from flexolmo_jax.owner.pair import train_pair as start
    elif run.run == "router":
        from flexolmo_jax.coordinator.router import train_router as start
    else:
        from flexolmo_jax.train.pretrain import pretrain as start
    return {"out": str(args.out), **start(run, args.out, continues=args.continues)}


@verb(
    "plan",
    "Compile a step for a TPU slice, without one: memory, work, collectives, time at least. "
    "Exits 1 where it does not fit.",
    "plan configs/7b/pair.yaml --topology v5p:4x4x4",
    option("path", type=path_of, help="a run's YAML; with --decode also a model"),
    option(
        "--topology",
        required=True,
        metavar="TYPE:SHAPE",
        help="v5e, v5p, v6e or tpu7x, and chips along each axis: v5p:4x4x4",
    ),
    option(
        "--slices",
        type=positive,
        default=1,
        help="joined by the data centre's network; mesh.data spans them",
    ),
    option(
        "--decode",
        type=prompts_by_context,
        metavar="PROMPTSxCONTEXT",
        help="a decoding step instead, as 16x4096",
    ),
    option(
        "--tune",
        action="store_true",
        help="compile with every train.remat and train.accumulate that could be the fastest, and "
        "plan the fastest that fits: minutes",
    ),
    option("--out", type=path_of, metavar="FILE", help="also write the report: a new .json"),
    SET,
    KERNELS,
)
def _plan(args: argparse.Namespace) -> dict[str, Any]:
    import json
    import os

    from flexolmo_jax.runtime.tpus import COMPILER_ENVIRONMENT, slice_of
    from flexolmo_jax.storage.files import write_new
    from flexolmo_jax.storage.outputs import check_new_file

    where = slice_of(args.topology)
    _check_options(args)
    if args.out:
        check_new_file(args.out)
    os.environ.update(COMPILER_ENVIRONMENT)  # before JAX is imported
    from flexolmo_jax.plan.report import plan_decoding, plan_training, show

    if args.decode is None:
        from flexolmo_jax.config import load_config
        from flexolmo_jax.plan.tune import show_tuned, tune

        run = load_config(args.path, args.set)
        plan, show = (tune, show_tuned) if args.tune else (plan_training, show)
        report = plan(run, where, args.slices)
    else:
        from flexolmo_jax.plan.steps import decoded

        prompts, context = args.decode
        what = decoded(args.path, args.set)
        report = plan_decoding(what, where, prompts, context, args.kernels)
    if args.out:
        write_new(args.out, (json.dumps(report, indent=1) + "\n").encode())
    return report if args.json else report | {"text": show(report)}


def _check_options(args: argparse.Namespace) -> None:
    """Raises UserError for options of `plan` that do not go together."""
    if args.decode is None and args.kernels != "auto":
        raise UserError(
            f"--kernels {args.kernels} is for --decode; a run's step has those of its config: --set"
            f" kernels={args.kernels}"
        )
    if args.decode is not None and args.tune:
        raise UserError("--tune is for training steps; leave out --tune or --decode")
    if args.decode is not None and args.slices > 1:
        raise UserError(
            "--slices is for training steps: what generates runs on one slice; leave out --slices"
            " or --decode"
        )


@verb(
    "reproduce",
    "Run a study of the paper's table: every baseline and ablation. Goes on where it was.",
    "reproduce configs/reproduce/cpu.yaml --out study",
    option("spec", type=local, help="a study's YAML"),
    option("--out", required=True, type=local),
)
def _reproduce(args: argparse.Namespace) -> dict[str, Any]:
    from flexolmo_jax.reproduce.results import text
    from flexolmo_jax.reproduce.spec import load_spec
    from flexolmo_jax.reproduce.study import reproduce

    results = reproduce(args.spec, args.out)
    return results if args.json else results | {"text": text(load_spec(args.spec), results)}


@verb(
    "demo",
    "The whole story on an open model: four owners, a merge, one leaves, a table. Goes on where it "
    "was.",
    "demo --anchor smollm2 --out demo-smollm2",
    option(
        "--anchor",
        required=True,
        help="smollm2: SmolLM2-135M from PyPI; less than 50 minutes on two cores",
    ),
    option("--out", required=True, type=local),
)
def _demo(args: argparse.Namespace) -> dict[str, Any]:
    from flexolmo_jax.reproduce.demo.run import run_demo
    from flexolmo_jax.reproduce.demo.spec import read_demo

    results = run_demo(read_demo(args.anchor), args.out)
    return results if args.json else results | {"text": results["table"]}
