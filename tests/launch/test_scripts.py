"""The launchers themselves: bats with fakes in place of every command they call, shellcheck, and
hadolint on the image."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from launch.job import ROOT, load_job

from .real_tools import GOLDEN, ORIGIN, beginning, dry_run

HERE = Path(__file__).parent
SCRIPTS = [
    *ROOT.glob("launch/*.sh"),
    ROOT / "launch/slurm.sbatch",
    *HERE.glob("*.bats"),
    HERE / "helpers.bash",
    HERE / "fake",
]


def run(tool: str, *arguments: str | Path) -> None:
    """Runs what the `test` extra installs beside Python. Where it is missing the test is skipped,
    but never in CI."""
    beside = Path(sys.executable).parent
    path = shutil.which(tool, path=f"{beside}{os.pathsep}{os.environ['PATH']}")
    if path is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(
            f"there is no {tool}; pip install -e '.[test]' has it"
        )
    environment = os.environ | {"PYTHON": sys.executable}
    done = subprocess.run(
        [path, *map(str, arguments)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("file", sorted(HERE.glob("*.bats")), ids=lambda path: path.stem)
def test_a_launcher_does_what_it_says(file):
    run("bats", file)


def test_shellcheck_finds_nothing():
    run("shellcheck", "--external-sources", *SCRIPTS)


def test_hadolint_finds_nothing():
    run("hadolint", ROOT / "launch/Dockerfile")


def test_the_image_is_built_of_nothing_but_what_it_copies():
    dockerfile = (ROOT / "launch/Dockerfile").read_text()
    copied = {
        word
        for line in dockerfile.splitlines()
        if line.startswith("COPY ")
        for word in line.split()[1:-1]
    }
    let_in = {
        line[1:]
        for line in (ROOT / "launch/Dockerfile.dockerignore").read_text().splitlines()
        if line.startswith("!")
    }
    assert let_in == copied
    assert all((ROOT / name).exists() for name in copied)


def test_the_golden_manifest_is_of_what_gke_xpk_runs():
    create = beginning(dry_run("gke_xpk.sh"), "xpk workload create")
    golden = GOLDEN.read_text()
    assert golden.startswith(f"{ORIGIN}{create}\n"), "make test-launch ARGS=--update writes it anew"
    jobset = yaml.safe_load(golden)["spec"]
    (slice_,) = jobset["replicatedJobs"]
    pods = slice_["template"]["spec"]
    (rule,) = pods["podFailurePolicy"]["rules"]
    pod = pods["template"]["spec"]
    (container,) = pod["containers"]
    job = load_job(ROOT / "launch/jobs/biomed.yaml")
    assert (jobset["failurePolicy"]["maxRestarts"], slice_["replicas"], pods["parallelism"]) == (
        job.restarts,
        job.slices,
        job.slice.hosts,
    )
    # A pod that ends with a code outside this list fails the run.
    assert (rule["action"], rule["onExitCodes"]["operator"]) == ("FailJob", "NotIn")
    assert {42, 75, 76, 134, 137} <= set(rule["onExitCodes"]["values"]) and not {1, 2} & set(
        rule["onExitCodes"]["values"]
    )
    assert pod["terminationGracePeriodSeconds"] == 300
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == job.slice.grid
    assert (container["name"], container["image"]) == ("jax-tpu", job.image)
    assert f"(exec {shlex.join(job.command)}) & PID=$!" in container["command"][-1]
