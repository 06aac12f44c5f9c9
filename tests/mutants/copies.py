"""A copy of this tree to change, and its tests."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
LIMIT_S = 600  # a fault may loop for ever


def copy_of_the_tree(folder: Path) -> Path:
    """What git knows or would know of it, without its history."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_symlink() or (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name, follow_symlinks=False)
    return folder


def run_tests(tree: Path, tests: str) -> bool:
    """Whether the fast tests in these files or folders pass there, or the one of this name."""
    which = [] if "::" in tests else ["-m", "not slow"]
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-x", "-q", "-n", "0", *which, *tests.split()],
            cwd=tree,
            env=os.environ | {"PYTHONPATH": str(tree)},
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
        )
    except subprocess.TimeoutExpired:
        return False
    if done.returncode > 1:  # neither passed nor failed
        raise SystemExit(done.stdout[-2000:] + done.stderr[-2000:])
    return done.returncode == 0
