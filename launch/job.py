#!/usr/bin/env python3
"""A job: what one owner runs where, as a strict YAML says it; checked before anything is created.

    launch/job.py launch/jobs/biomed.yaml    # preflight; prints the launchers' shell variables
    launch/job.py --devices 16 configs/7b/pair.yaml [--set ...]  # of a run on so many GPUs

Preflight says in one line what is wrong with a job: a TPU type that does not exist, a mesh that is
not the slice's, a batch that does not divide, a config of which no stored plan says that it fits.
It needs neither JAX nor a cloud.
"""

import argparse
import dataclasses
import importlib.util
import itertools
import json
import math
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

if importlib.util.find_spec("yaml") is None:
    print(
        f"launch: {sys.executable} has no PyYAML; pip install -e . first, or name a Python that has"
        " it: PYTHON=",
        file=sys.stderr,
    )
    sys.exit(2)

ROOT = Path(__file__).resolve().parents[1]
# this checkout's package, installed or not: its configs are what the image is built with
sys.path.insert(0, str(ROOT))

from flexolmo_jax.config import RunConfig, build, check_microbatch, load_config  # noqa: E402
from flexolmo_jax.config.loading import JOB, expect_kind  # noqa: E402
from flexolmo_jax.errors import UserError  # noqa: E402
from flexolmo_jax.plain_yaml import read_yaml  # noqa: E402
from flexolmo_jax.plan.program import program_of  # noqa: E402
from flexolmo_jax.runtime.tpus import Slice, slice_of  # noqa: E402

GIB = 2**30
# What a TPU VM boots (docs.cloud.google.com/tpu/docs/runtimes, November 2026); TPU7x is to be had
# through GKE only.
RUNTIMES = {"v5e": "v2-alpha-tpuv5-lite", "v5p": "v2-alpha-tpuv5", "v6e": "v2-alpha-tpuv6e"}
IN_BUCKET = re.compile(r"gs://[a-z0-9][-_.a-z0-9]+")
NAME = r"[a-z]([-a-z0-9]*[a-z0-9])?"
# What Google accepts, as far as a mistake here would only come out once something has been created.
EXPECTED = {
    "owner": (rf"{NAME}", "a short name such as biomed"),
    "project": (r"[a-z][-a-z0-9]{4,28}[a-z0-9]", "a project's id such as biomed-4711"),
    "zone": (r"[a-z]+-[a-z]+[0-9]+-[a-z]", "a zone such as us-east5-a"),
    "bucket": (r"[a-z0-9][-_.a-z0-9]{1,61}[a-z0-9]", "a bucket's name, without gs://"),
    "service_account": (
        r"[a-z][-a-z0-9]{4,28}[a-z0-9]@[-.a-z0-9]+\.gserviceaccount\.com",
        "NAME@PROJECT.iam.gserviceaccount.com",
    ),
    "network": (rf"{NAME}", "the name of a network of the project"),
    "subnetwork": (rf"({NAME})?", "the name of a subnetwork, or nothing"),
    "cluster": (rf"({NAME})?", "the name of a GKE cluster, or nothing"),
    "reservation": (rf"({NAME})?", "the name of a reservation, or nothing"),
    "image": (
        r"[a-z0-9][-a-z0-9.:]*/[-a-z0-9._/]+(:[-\w.]+|@sha256:[0-9a-f]{64})",
        "a container image REGISTRY/NAME:TAG or @sha256:...",
    ),
    # XPK's limit
    "run": (
        rf"(?=.{{1,40}}$){NAME}",
        "a name of at most 40 lower-case letters, digits and hyphens",
    ),
}


@dataclass(frozen=True)
class Job:
    """One owner's job; launch/jobs/biomed.yaml says what each key is."""

    owner: str = ""
    project: str = ""
    zone: str = ""
    bucket: str = ""
    service_account: str = ""
    network: str = ""
    subnetwork: str = ""
    tpu: str = ""
    fallbacks: tuple[str, ...] = ()
    patience: int = 30
    slices: int = 1
    capacity: Literal["spot", "on-demand", "reserved"] = "spot"
    reservation: str = ""
    cluster: str = ""
    image: str = ""
    config: str = ""
    set: tuple[str, ...] = ()
    run: str = ""
    restarts: int = 20
    plans: str = "launch/plans"

    def check(self) -> None:
        for key, (pattern, expected) in EXPECTED.items():
            if not re.fullmatch(pattern, getattr(self, key)):
                raise UserError(f"{key} is {getattr(self, key)!r}; expected {expected}")
        suffix = ".iam.gserviceaccount.com"
        project = self.service_account.partition("@")[2].removesuffix(suffix)
        if self.service_account.endswith(suffix) and project != self.project:
            raise UserError(
                f"service_account is of project {project!r}; expected one of the job's own,"
                f" {self.project!r}"
            )
        for key, least in (("slices", 1), ("restarts", 0), ("patience", 1)):
            if getattr(self, key) < least:
                raise UserError(f"{key} is {getattr(self, key)}; expected at least {least}")
        if not self.config.startswith("configs/") or ".." in Path(self.config).parts:
            raise UserError(
                f"config is {self.config!r}; expected a file below configs/, which is what the"
                " image carries"
            )
        self._check_slices()

    def _check_slices(self) -> None:
        slices = [slice_of(tpu) for tpu in (self.tpu, *self.fallbacks)]
        for fallback in slices[1:]:
            if fallback.chip.name not in RUNTIMES:
                raise UserError(
                    f"fallback {fallback.name} is to be had through GKE only; expected one of"
                    f" {', '.join(RUNTIMES)}"
                )
        names = [each.accelerator for each in slices]
        if len(set(names)) < len(names):
            raise UserError(
                f"tpu and fallbacks are {', '.join(names)} by gcloud's names; expected each once"
            )

    @property
    def slice(self) -> Slice:
        return slice_of(self.tpu)

    @property
    def where(self) -> str:
        return f"{self.slices} x {self.slice.name}" if self.slices > 1 else self.slice.name

    @property
    def region(self) -> str:
        return self.zone.rpartition("-")[0]

    @property
    def out(self) -> str:
        return f"gs://{self.bucket}/{self.run}"

    @property
    def compile_cache(self) -> str:
        """Where JAX keeps compiled programs. It runs whatever lies there, so only the owner may
        write to it."""
        return f"gs://{self.bucket}/.compiled"

    @property
    def command(self) -> list[str]:
        """What every worker runs, and runs again: a run goes on from its last checkpoint by
        itself, and with the programs that an earlier start compiled."""
        environment = {
            "JAX_COMPILATION_CACHE_DIR": self.compile_cache,
            # also what compiles in less than a second, so that a restart compiles nothing
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            # what a worker that takes another's place is told of slices may be out of date
            "FLEXOLMO_SLICES": str(self.slices),
        }
        variables = [f"{name}={value}" for name, value in environment.items()]
        train = ["flexolmo", "train", self.config, *_flags(self.set), "--out", self.out]
        return ["env", *variables, *train]


def check_launcher(job: Job, launcher: str) -> None:
    """Raises UserError for what a launcher, by the name of its script, cannot do."""
    kind, is_reserved = job.slice.chip.name, job.capacity == "reserved"
    slices = f"slices is {job.slices}; expected 1"
    fallbacks = f"fallbacks has {len(job.fallbacks)}; expected none"
    gke, vms = "launch/gke_xpk.sh", "launch/tpu_vm.sh"
    cluster = f"the name of the owner's GKE cluster in {job.region}"
    refused = {
        "tpu_vm": {
            f"{slices} on TPU VMs; {gke} runs several": job.slices > 1,
            f"tpu is {job.tpu}, which is to be had through GKE only; use {gke}": kind == "tpu7x",
        },
        "gke_xpk": {
            f"{fallbacks} on GKE; {vms} takes them": bool(job.fallbacks),
            f"cluster is ''; expected {cluster}": not job.cluster,
            "reservation is ''; expected its name, for capacity: reserved on GKE": (
                is_reserved and not job.reservation
            ),
        },
        # SkyPilot boots a v5e with a v5p's runtime, which its command line cannot change, and knows
        # no TPU7x.
        "skypilot": {
            f"{fallbacks} with SkyPilot; {vms} takes them": bool(job.fallbacks),
            f"{slices} with SkyPilot; {gke} runs several": job.slices > 1,
            f"tpu is {job.tpu}; expected v5p or v6e with SkyPilot; use {vms} or {gke}": (
                kind not in ("v5p", "v6e")
            ),
            f"capacity is reserved; expected spot or on-demand with SkyPilot; use {vms} or {gke}": (
                is_reserved
            ),
        },
    }
    for told, is_so in refused[launcher].items():
        if is_so:
            raise UserError(told)


def choices(job: Job) -> list[Job]:
    """The job on each slice that it may get, the preferred one first. On another number of devices
    it takes other microbatches, as large for each device as before; the batch is the same.

    Raises UserError where no number of microbatches is, and where it would change what is learnt.
    """
    found = [job]
    run = load_config(ROOT / job.config, job.set)
    for tpu in job.fallbacks:
        devices = slice_of(tpu).devices
        accumulate, rest = divmod(run.train.accumulate * job.slice.devices, devices)
        if rest:
            raise UserError(
                f"fallback {tpu} has {devices} devices; expected a divisor of {job.tpu}'s"
                f" {job.slice.devices} x train.accumulate {run.train.accumulate}"
            )
        if run.optim.load_balance and accumulate != run.train.accumulate:
            raise UserError(
                f"fallback {tpu} needs train.accumulate {accumulate} instead of"
                f" {run.train.accumulate}, with which optim.load_balance is another loss; take"
                " fallbacks out, or set optim.load_balance=0"
            )
        overrides = (*job.set, f"train.accumulate={accumulate}")
        found.append(replace(job, tpu=tpu, set=overrides))
    return found


def load_job(path: Path) -> Job:
    """A checked Job. Raises UserError, with the file's name."""
    tree = read_yaml(path, what="job")
    try:
        expect_kind(JOB, tree)
        job = build(Job, tree)
        job.check()
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return job


def preflight(job: Job) -> None:
    """Raises UserError for what would come out only once the slice is there and costs."""
    run = load_config(ROOT / job.config, job.set)
    check_devices(run, job.slice.devices * job.slices, job.where, job.slices)
    check_paths(run, job)
    plan = stored_plan(job, run)
    if not plan["fits"]:
        raise UserError(
            f"{job.config} does not fit {job.where}: a device needs {plan['peak_bytes'] / GIB:.1f}"
            f" GiB and has {plan['hbm_bytes'] / GIB:.1f} GiB; change it: {plan['change']}"
        )


def check_devices(run: RunConfig, devices: int, where: str, slices: int = 1) -> None:
    """Raises UserError unless the mesh is of all the devices and its microbatch divides over
    them."""
    sizes = run.mesh.sizes(devices, slices)
    if math.prod(sizes.values()) != devices:
        shown = " x ".join(f"{axis} {n}" for axis, n in sizes.items())
        raise UserError(
            f"mesh {shown} does not fill the {devices} devices of {where}; set one axis to -1, or"
            " change the slice"
        )
    check_microbatch(run, sizes)


def check_paths(run: RunConfig, job: Job) -> None:
    """Raises UserError for what the run would read from this machine: the workers have only the
    image and buckets."""
    elsewhere = {key: path for key, path in run.paths.items() if not IN_BUCKET.match(path)}
    if elsewhere:
        got = " and ".join(f"{key} is {path!r}" for key, path in elsewhere.items())
        raise UserError(
            f"{got}; expected gs://{job.bucket}/... or another bucket, because workers see nothing"
            " else; copy it there and say so in the job's set"
        )


def stored_plan(job: Job, run: RunConfig) -> dict[str, Any]:
    """The report of `flexolmo plan` for this program on these slices. Raises UserError where there
    is none. Files that are no plan count for nothing."""
    wanted = (job.slice.name, job.slices, program_of(run))
    broken = []
    for path in sorted((ROOT / job.plans).glob("*.json")):
        try:
            plan = json.loads(path.read_text())
            found = plan["topology"], plan["slices"], plan["program"]
            plan["fits"]
        except (OSError, ValueError, KeyError, TypeError):
            broken.append(path.name)
            continue
        if found == wanted:
            return plan
    also = f" (these are no plans, remove them: {', '.join(broken)})" if broken else ""
    raise UserError(
        f"no plan in {job.plans} says whether {job.config} fits {job.where}{also}; make one:"
        f" {shlex.join(_planning(job, run, broken))}"
    )


def _planning(job: Job, run: RunConfig, broken: Sequence[str]) -> list[str]:
    """The command that makes the plan. It needs no bucket: of the job's overrides it has those on
    which the program depends, and no path is one of them."""
    needed = list(job.set)
    for override in job.set:
        others = [other for other in needed if other is not override]
        try:
            if program_of(load_config(ROOT / job.config, others)) == program_of(run):
                needed = others
        except UserError:  # without it there is no such run
            continue
    slices = ["--slices", str(job.slices)] if job.slices > 1 else []
    where = job.slice.name.replace(":", "-") + "".join(f"-{n}" for n in slices[1:])
    name = job.config.removeprefix("configs/").removesuffix(".yaml").replace("/", "-")
    for number in itertools.count(1):  # another program's plan may have the name
        target = f"{name}-{where}.json" if number == 1 else f"{name}-{where}_{number}.json"
        if target in broken or not (ROOT / job.plans / target).exists():
            break
    plan = ["flexolmo", "plan", job.config, *_flags(needed), "--topology", job.slice.name, *slices]
    return [*plan, "--out", f"{job.plans}/{target}"]


def variables(job: Job) -> str:
    """What the launchers go by, for `eval`: JOB_RUN and so on."""
    lists = ("set", "fallbacks")
    known = {key: str(value) for key, value in dataclasses.asdict(job).items() if key not in lists}
    derived = {
        "accelerator": job.slice.accelerator,
        "chip": job.slice.chip.accelerator,
        "torus": job.slice.grid,
        "runtime": RUNTIMES.get(job.slice.chip.name, ""),
        "hosts": str(job.slice.hosts),
        "region": job.region,
        "out": job.out,
        "command": shlex.join(job.command),
    }
    return "\n".join(
        f"JOB_{key.upper()}={shlex.quote(value)}" for key, value in (known | derived).items()
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", type=Path, help="a job's YAML; with --devices a run's")
    parser.add_argument("--devices", type=int, help="GPUs, all processes together")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="K=V",
        help="with --devices: overrides of the run's config",
    )
    parser.add_argument("--launcher", help="tpu_vm, gke_xpk or skypilot: refuse what it cannot do")
    parser.add_argument(
        "--choice", type=int, default=0, help="which slice: 0 is the job's tpu, then its fallbacks"
    )
    args = parser.parse_args(argv)
    try:
        if args.devices is not None:
            check_devices(load_config(args.path, args.set), args.devices, "this job")
        else:
            job = load_job(args.path)
            if args.launcher:
                check_launcher(job, args.launcher)
            jobs = choices(job)
            for job in jobs:
                preflight(job)
            print(variables(jobs[args.choice]))
            print(f"JOB_CHOICE={args.choice}\nJOB_CHOICES={len(jobs)}")
    except UserError as error:
        print(f"launch: {error}", file=sys.stderr)
        return 2
    return 0


def _flags(overrides: Sequence[str]) -> list[str]:
    return [word for override in overrides for word in ("--set", override)]


if __name__ == "__main__":
    sys.exit(main())
