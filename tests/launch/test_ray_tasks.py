"""launch/ray: the job for KubeRay and the task for SkyPilot start commands that exist."""

import re
import shlex
import tomllib

import pytest
import yaml

from flexolmo_jax.cli.command import PARSER
from flexolmo_jax.runtime.cluster import ADDRESS
from launch.job import ROOT
from launch.ray_job import ray_job

RAY = ROOT / "launch/ray"


def documents(name: str) -> list:
    return list(yaml.safe_load_all((RAY / name).read_text()))


def test_the_job_for_kuberay_runs_a_command_that_is_understood():
    job = ray_job(RAY / "kuberay.yaml", documents("kuberay.yaml"))
    program, *words = shlex.split(job.command)
    assert program == "flexolmo"
    assert PARSER.parse_args(words).ray == ""  # the address is the cluster's own
    assert ADDRESS == "RAY_ADDRESS"  # what Ray's job has


def test_the_task_for_skypilot_runs_a_command_that_is_understood(tmp_path):
    (task,) = documents("skypilot.yaml")
    said = (RAY / "skypilot.yaml").read_text()
    command = re.search(r'--env=COMMAND="flexolmo (.*?)"', said, re.DOTALL)
    assert command
    words = shlex.split(command[1].replace("\\\n#", ""))
    assert '$COMMAND --ray $(echo "$SKYPILOT_NODE_IPS" | head -n 1):6379' in task["run"]
    assert PARSER.parse_args([*words, "--ray", "10.0.0.1:6379"]).ray == "10.0.0.1:6379"
    assert task["envs"] == {"COMMAND": None, "RAY_USAGE_STATS_ENABLED": "0"}


@pytest.mark.parametrize("name", ["kuberay.yaml", "skypilot.yaml"])
def test_their_images_have_ray(name):
    extras = re.search(r"EXTRAS=(\S+)", (RAY / name).read_text())
    assert extras
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    known = project["optional-dependencies"]
    assert {"ray", "gcs", "formats"} == set(extras[1].split(",")) <= known.keys()
    # "default" has the server that jobs are submitted to
    assert any(one.startswith("ray[data,default]") for one in known["ray"])


def test_the_jobs_ray_is_one_that_the_package_takes():
    job = next(one for one in documents("kuberay.yaml") if one["kind"] == "RayJob")
    version = job["spec"]["rayClusterSpec"]["rayVersion"]
    assert version.startswith("2.60.")
