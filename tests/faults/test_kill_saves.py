"""A run killed while it saves into a bucket, at any moment: nothing that was saved is lost, and it
goes on."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EVERY = 5  # how many writes lie between two kills


@pytest.mark.slow
def test_a_save_killed_on_its_way_into_a_bucket_loses_nothing_and_the_next_goes_on(bucket):
    command = [sys.executable, "-m", "tests.faults.kill_saves", str(bucket), str(EVERY)]
    result = subprocess.run(
        command,
        cwd=Path(__file__).parents[2],
        env=os.environ,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stdout + result.stderr[-2000:]
    assert int(result.stdout) >= 100 // EVERY
