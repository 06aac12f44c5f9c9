"""The locks that tell live writers from dead ones."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flexolmo_jax.storage.locks import locked


def other_process(body: str, path: Path) -> subprocess.Popen[bytes]:
    """Runs `body` in a process of its own, with `path` and `locked`."""
    program = (
        "import sys; from pathlib import Path; from flexolmo_jax.storage.locks import locked\n"
        f"path = Path(sys.argv[1])\n{body}"
    )
    return subprocess.Popen(
        [sys.executable, "-c", program, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ,
    )


HOLD = "with locked(path, shared={shared}):\n    print('in', flush=True); sys.stdin.readline()"


def said(process: subprocess.Popen[bytes]) -> bytes:
    assert process.stdout
    return process.stdout.readline()


@pytest.mark.parametrize(
    ("held", "wanted", "waits"),
    [(False, False, True), (False, True, True), (True, False, True), (True, True, False)],
)
def test_a_lock_keeps_another_process_out_unless_both_only_share_it(tmp_path, held, wanted, waits):
    holder = other_process(HOLD.format(shared=held), tmp_path)
    assert said(holder) == b"in\n"
    if waits:
        with pytest.raises(OSError), locked(tmp_path, shared=wanted, wait=False):
            pass
    other = other_process("print('begun', flush=True)\n" + HOLD.format(shared=wanted), tmp_path)
    assert said(other) == b"begun\n"
    if waits:
        os.set_blocking(other.stdout.fileno(), False)  # type: ignore[union-attr]
        time.sleep(0.5)
        assert said(other) == b""
        os.set_blocking(other.stdout.fileno(), True)  # type: ignore[union-attr]
        holder.communicate(b"\n")
        assert said(other) == b"in\n"
    else:
        assert said(other) == b"in\n"
        holder.communicate(b"\n")
    other.communicate(b"\n")
    assert holder.returncode == other.returncode == 0
