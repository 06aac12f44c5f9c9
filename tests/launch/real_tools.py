"""What the launchers say to XPK and SkyPilot, said to the real ones, offline: `make test-launch`.

XPK makes the manifest of the first example, which has to be the golden one (ARGS=--update writes it
anew), and knows every slice by its torus. SkyPilot checks the task against its schema, alone and
with what skypilot.sh fills in, and its command line our options.
"""

import argparse
import copy
import json
import logging
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from flexolmo_jax.runtime.tpus import CHIPS, Slice, slices_of
from launch.job import ROOT, load_job
from tests.launch.plan_for import plan_for

GOLDEN = Path(__file__).parent / "xpk.golden.yaml"
ORIGIN = (
    "# What XPK 1.16.0 makes of the command below; `make test-launch ARGS=--update` writes it"
    " anew.\n# "
)
UNKNOWN_TO_XPK = ("v5e:1x1", "v5e:2x2")
OFFLINE = ["--dry-run", "--skip-validation", "--project-number=1"]


def dry_run(launcher: str) -> list[str]:
    """The commands that a launcher prints for the first example, for which a plan is made up."""
    with tempfile.TemporaryDirectory() as folder:
        example = ROOT / "launch/jobs/biomed.yaml"
        (Path(folder) / "plan.json").write_text(json.dumps(plan_for(load_job(example))))
        job = Path(folder) / "biomed.yaml"
        job.write_text(yaml.safe_dump(yaml.safe_load(example.read_text()) | {"plans": folder}))
        command, environment = (
            [f"launch/{launcher}", job, "--dry-run"],
            os.environ | {"PYTHON": sys.executable},
        )
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
        )
    return done.stdout.splitlines()


def beginning(lines: list[str], words: str) -> str:
    return next(line for line in lines if line.startswith(words))


def manifest(command: list[str]) -> str:
    """What XPK would have the cluster run."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "manifest.yaml"
        done = subprocess.run(
            [*command, *OFFLINE, f"--output-manifest-file={path}"], capture_output=True, text=True
        )
        if done.returncode or not path.exists():
            sys.exit(f"{shlex.join(command)}\n{done.stdout}{done.stderr}")
        return "".join(f"{line.rstrip()}\n" for line in path.read_text().splitlines())


def torus(slice_: Slice) -> str:
    """Of the nodes that XPK asks for."""
    names = [
        "--workload=w",
        "--cluster=c",
        "--project=p-12345",
        "--zone=us-east5-a",
        "--docker-image=i",
        "--command=true",
    ]
    made = yaml.safe_load(
        manifest(
            [
                "xpk",
                "workload",
                "create",
                *names,
                f"--tpu-type={slice_.chip.accelerator}-{slice_.grid}",
            ]
        )
    )
    pod = made["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    if [container["name"] for container in pod["containers"]] != ["jax-tpu"]:
        sys.exit(
            f"{slice_.name} runs in {pod['containers']}; gke_xpk.sh follows the logs of one"
            " container, jax-tpu"
        )
    return pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]


def check_xpk(update: bool) -> None:
    lines = dry_run("gke_xpk.sh")
    create = beginning(lines, "xpk workload create")
    made = f"{ORIGIN}{create}\n{manifest(shlex.split(create))}"
    if update:
        GOLDEN.write_text(made)
    if made != GOLDEN.read_text():
        sys.exit(
            f"XPK makes another manifest than {GOLDEN}; see what `make test-launch ARGS=--update`"
            " changes"
        )
    print(f"{GOLDEN.name} is what XPK makes")
    delete = shlex.split(beginning(lines, "xpk workload delete"))
    subprocess.run([*delete, *OFFLINE], check=True, capture_output=True)
    slices = [
        slice_ for kind in CHIPS for slice_ in slices_of(kind) if slice_.name not in UNKNOWN_TO_XPK
    ]
    for slice_ in slices:
        if torus(slice_) != slice_.grid:
            sys.exit(f"XPK takes {slice_.name} to be {torus(slice_)}")
    print(f"XPK knows {len(slices)} slices, all but {', '.join(UNKNOWN_TO_XPK)}")


def check_skypilot() -> None:
    logging.disable(logging.WARNING)  # on which runtime it picks for a TPU
    import sky
    from sky.client.cli.command import cli

    command = shlex.split(beginning(dry_run("skypilot.sh"), "sky jobs launch"))
    options = cli.commands["jobs"].commands["launch"].make_context("launch", command[3:]).params
    tree = yaml.safe_load((ROOT / "launch/skypilot.yaml").read_text())

    def check(tree: dict[str, Any]) -> None:
        # it takes its dictionary apart
        sky.Task.from_yaml_config(copy.deepcopy(tree), env_overrides=options["env"])

    check(tree)
    tree["config"] = {"gcp": {"vpc_name": options["config_override"]["gcp"]["vpc_name"]}}
    slices = [slice_ for kind in ("v5p", "v6e") for slice_ in slices_of(kind)]
    for slice_ in slices:
        given = {"accelerators": f"tpu-{slice_.accelerator}:1"} | {
            key: options[key] for key in ("infra", "image_id", "use_spot")
        }
        check(tree | {"resources": tree["resources"] | given})
    print(
        "SkyPilot's schema takes launch/skypilot.yaml, the options of skypilot.sh and"
        f" {len(slices)} slices"
    )
    task = yaml.safe_load((ROOT / "launch/ray/skypilot.yaml").read_text())
    sky.Task.from_yaml_config(task, env_overrides=[("COMMAND", "flexolmo data prepare")])
    print("SkyPilot's schema takes launch/ray/skypilot.yaml")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--update", action="store_true", help="write the golden manifest anew")
    check_xpk(parser.parse_args().update)
    check_skypilot()
