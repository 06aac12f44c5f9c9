"""Kills a merge and an opt-out before every single write, link, sync and rename, and looks at what
is there afterwards.

    python -m tests.faults.kill_everywhere ANCHOR WORK EVERY CONTRIBUTION...

Run as a process of its own: it imports everything once, starts nothing, and forks a child for each
place. EVERY is the distance between the places that are tried. Prints how many there were.
"""

import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from flexolmo_jax.coordinator.gate import Gate
from flexolmo_jax.coordinator.merge import merge, opt_out
from flexolmo_jax.coordinator.store import STORE, Store
from flexolmo_jax.coordinator.verify import verify
from flexolmo_jax.storage import files


def in_child(act: Callable[[], None]) -> int:
    """The exit status of a forked process."""
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1]
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        act()
    except BaseException:
        traceback.print_exc(file=sys.stdout)
        os._exit(1)
    os._exit(0)


def killed_before(place: int, act: Callable[[], object]) -> bool:
    """Runs `act` in a child that dies before its change number `place`; False where there are not
    so many."""

    def child() -> None:
        count = 0

        def observe(operation: str, path: Path) -> None:
            nonlocal count
            count += 1
            if count == place:
                os.kill(os.getpid(), signal.SIGKILL)

        files.observer = observe
        act()

    status = in_child(child)
    assert status in (0, signal.SIGKILL), f"the child ended with {status}"
    return status == signal.SIGKILL


def contents(directory: Path) -> dict[str, bytes]:
    """Every file but the receipt, which has a date, and names of folders."""
    found = {
        str(p.relative_to(directory)): p.read_bytes() if p.is_file() else b""
        for p in directory.rglob("*")
    }
    return {name: content for name, content in found.items() if not name.endswith("receipt.json")}


def try_all(
    work: Path, every: int, prepare: Callable[[Path], None], act: Callable[[Path], object]
) -> int:
    """`act(directory)` writes `directory / "out"` after `prepare(directory)` made what it needs."""
    whole = work / "whole"

    def uninterrupted() -> None:
        prepare(whole)
        act(whole)

    assert in_child(uninterrupted) == 0
    expected = contents(whole / "out")
    tried, place = 0, 1
    while True:
        here = work / str(place)
        assert in_child(lambda here=here: prepare(here)) == 0
        if not killed_before(place, lambda here=here: act(here)):
            break
        out = here / "out"
        assert not out.exists() or contents(out) == expected, f"place {place}: half a model"

        def again(here: Path = here, out: Path = out) -> None:
            if not out.exists():
                act(here)
            verify(out)
            Store.existing(here / STORE).gc()

        assert in_child(again) == 0, f"place {place}: the rerun failed"
        assert contents(out) == expected
        names = {str(p.relative_to(here)) for p in here.rglob("*")} - {"out/receipt.json"}
        left = names ^ (
            {str(p.relative_to(whole)) for p in whole.rglob("*")} - {"out/receipt.json"}
        )
        # named by where models are
        left = {name for name in left if not name.startswith(f"{STORE}/models/")}
        assert not left, f"place {place}: {sorted(left)[:5]} is left or missing"
        assert len(list((here / STORE / "models").iterdir())) == len(
            list((whole / STORE / "models").iterdir())
        )
        shutil.rmtree(here)
        tried, place = tried + 1, place + every
    shutil.rmtree(whole)
    return tried


def main() -> None:
    anchor, work, every, *contributions = sys.argv[1:]
    paths = [Path(path) for path in contributions]

    def merging(directory: Path) -> None:
        # it writes nothing, and every child would compile anew
        merge(Path(anchor), paths, directory / "out", gate=Gate(admission=False))

    def merged(directory: Path) -> None:
        merge(Path(anchor), paths, directory / "model", gate=Gate(admission=False))

    def leaving(directory: Path) -> None:
        opt_out(directory / "model", ["law"], directory / "out")

    print(
        "merge",
        try_all(
            Path(work) / "merge",
            int(every),
            lambda directory: directory.mkdir(parents=True),
            merging,
        ),
    )
    print("opt-out", try_all(Path(work) / "opt-out", int(every), merged, leaving))


if __name__ == "__main__":
    main()
