"""Tests lean on nothing around them: neither on what a demo leaves, nor on a home folder, nor on
the order they run in."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "launch" / "demo.sh"
# One that fails where `demo/anchor` can be read, some that keep examples, and one that starts
# processes.
CHOSEN = (
    "tests/plan/test_report.py::test_an_architecture_that_nothing_says_is_asked_for",
    "tests/data/test_packing.py",
    "tests/storage/test_cache.py",
)


def test_tests_pass_beside_a_demo_without_a_home_folder_in_any_order(
    tmp_path: Path, anchor: Path, prepared: dict[str, Path]
):
    (tmp_path / "demo").mkdir()
    shutil.copytree(anchor, tmp_path / "demo" / "anchor")
    shutil.copytree(prepared["public"], tmp_path / "demo" / "data" / "public")
    (tmp_path / "file").write_text("")  # below which no home folder can be made
    before = sorted(tmp_path.rglob("*"))
    unset = ("JAX_COMPILATION_CACHE_DIR", "XDG_CACHE_HOME", "HYPOTHESIS_STORAGE_DIRECTORY")
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in unset and not name.startswith("PYTEST_")
    }
    environment |= {
        "HOME": str(tmp_path / "file" / "home"),
        "SLURM_NTASKS": "2",
        "PYTHONPATH": str(ROOT),
    }
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-n",
        "0",
        "-p",
        "no:cacheprovider",
        "-c",
        ROOT / "pyproject.toml",
        "--rootdir",
        ROOT,
    ]
    command += [
        "--shuffle",
        "7",
        "--basetemp",
        tmp_path.with_name(f"{tmp_path.name}-of-chosen"),
        *(ROOT / test for test in CHOSEN),
    ]
    done = subprocess.run(
        [*map(str, command)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "--shuffle 7" in done.stdout and " passed" in done.stdout
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "left", [None, "demo of layout 1 and scale small", "demo of layout 2 and scale large"]
)
def test_a_demo_does_not_go_on_from_another_one(left: str | None, tmp_path: Path):
    (tmp_path / "demo" / "merged").mkdir(parents=True)
    if left:
        (tmp_path / "demo" / ".made-by").write_text(left + "\n")
    environment = os.environ | {"DEMO_SCALE": "small", "DEMO_DIR": "demo"}
    done = subprocess.run(
        ["bash", str(DEMO)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert (
        left or "an earlier version's"
    ) in done.stderr and "remove 'demo', or set DEMO_DIR" in done.stderr
    assert list((tmp_path / "demo" / "merged").iterdir()) == []
