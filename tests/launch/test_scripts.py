"""The launchers themselves: bats with fakes in place of every command they call, shellcheck, and hadolint on the image."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from launch.job import ROOT

HERE = Path(__file__).parent
SCRIPTS = [*ROOT.glob("launch/*.sh"), ROOT / "launch/slurm.sbatch", *HERE.glob("*.bats"), HERE / "helpers.bash", HERE / "fake"]


def run(tool: str, *arguments: str | Path) -> None:
    """Runs what the `test` extra installs beside Python. Where it is missing the test is skipped, but never in CI."""
    beside = Path(sys.executable).parent
    path = shutil.which(tool, path=f"{beside}{os.pathsep}{os.environ['PATH']}")
    if path is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"there is no {tool}; pip install -e '.[test]' has it")
    done = subprocess.run([path, *map(str, arguments)], cwd=ROOT, env=os.environ | {"PYTHON": sys.executable}, capture_output=True, text=True)
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
    copied = {word for line in dockerfile.splitlines() if line.startswith("COPY ") for word in line.split()[1:-1]}
    let_in = {line[1:] for line in (ROOT / "launch/Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")}
    assert let_in == copied
    assert all((ROOT / name).exists() for name in copied)
