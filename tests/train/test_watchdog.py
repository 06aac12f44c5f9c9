"""What a step may take follows from what the steps before it took."""

import re
import subprocess
import sys

from flexolmo_jax.config import dump_yaml
from flexolmo_jax.train.metrics import read_metrics
from tests.tiny import run_config


def ended(program: str, *arguments: object) -> "subprocess.CompletedProcess[str]":
    """How a process that runs this ends: a watchdog leaves none of it."""
    words = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, timeout=200)


def test_a_step_may_take_four_times_what_steps_usually_take():
    process = ended(
        "import time\n"
        "from flexolmo_jax.train.watchdog import Watchdog\n"
        "with Watchdog(0.3) as watchdog:\n"
        "    for step in range(1, 5):\n"
        "        watchdog.expect_step(step)\n"
        "        time.sleep(0.6)\n"
        "        watchdog.measured(0.6)\n"
        "    watchdog.measured(1000)\n"  # of one slow step nothing follows
        "    watchdog.expect_step(5)\n"
        "    time.sleep(60)\n"
    )
    assert process.returncode == 75, process.stderr
    assert "step 5 took more than 2.4 s; this process ends here" in process.stderr


def test_a_step_may_take_what_was_set_however_fast_the_others_are():
    process = ended(
        "import time\n"
        "from flexolmo_jax.train.watchdog import Watchdog\n"
        "with Watchdog(2.0) as watchdog:\n"
        "    watchdog.measured(0.01)\n"
        "    watchdog.expect_step(2)\n"
        "    time.sleep(0.5)\n"
        "    print('in time', flush=True)\n"
        "    time.sleep(60)\n"
    )
    assert (process.returncode, process.stdout) == (75, "in time\n"), process.stderr
    assert "step 2 took more than 2 s; this process ends here" in process.stderr


def test_a_run_whose_steps_are_longer_than_was_set_goes_on_until_one_hangs(prepared, tmp_path):
    """Steps of a second where 0.3 are set; the sixth hangs."""
    config = run_config("anchor", prepared["public"], "train.watchdog=0.3")
    (tmp_path / "run.yaml").write_text(dump_yaml(config))
    process = ended(
        "import sys, time\n"
        "from flexolmo_jax.cli import main\n"
        "from flexolmo_jax.train.feed import Feed\n"
        "seconds = iter([1, 1, 1, 1, 1, 100])\n"
        "def slow(self, read=Feed.next):\n"
        "    time.sleep(next(seconds))\n"
        "    return read(self)\n"
        "Feed.next = slow\n"
        "sys.exit(main())\n",
        *("train", tmp_path / "run.yaml", "--out", tmp_path / "run"),
    )
    assert process.returncode == 75, process.stderr
    told = re.search(r"step 6 took more than ([0-9.]+) s; this process ends here", process.stderr)
    assert told and 4 <= float(told[1]) < 10, process.stderr
    assert "in slow" in process.stderr
    assert [entry["step"] for entry in read_metrics(tmp_path / "run")] == [1, 2, 3, 4]
