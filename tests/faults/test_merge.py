"""Merging when things go wrong: killed at any moment, a full disk, two at once, and bytes that
change on the disk."""

import errno
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from flexolmo_jax.artifact import Artifact, open_artifact
from flexolmo_jax.coordinator.gate import Gate
from flexolmo_jax.coordinator.merge import append, merge, opt_out
from flexolmo_jax.coordinator.store import STORE, Store
from flexolmo_jax.coordinator.verify import verify
from flexolmo_jax.errors import UserError
from flexolmo_jax.model.tree import flatten
from flexolmo_jax.storage import files
from tests.faults.kill_everywhere import contents, killed_before

# Orbax leaves coroutines behind when one of many arrays cannot be read.
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning", "ignore:coroutine:RuntimeWarning"
)


@pytest.mark.parametrize("every", [53, pytest.param(1, marks=pytest.mark.slow)])
def test_a_killed_merge_or_opt_out_leaves_nothing_or_all_and_a_rerun_finishes(
    anchor, contributions, tmp_path, every
):
    paths = [str(contributions["code"]), str(contributions["law"])]
    command = [
        sys.executable,
        "-m",
        "tests.faults.kill_everywhere",
        str(anchor),
        str(tmp_path),
        str(every),
        *paths,
    ]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    tried = dict(line.split() for line in result.stdout.splitlines())
    assert int(tried["merge"]) > 200 // every and int(tried["opt-out"]) > 60 // every


def test_gc_removes_what_a_process_left_beside_the_store_that_it_had_just_made(
    anchor, contributions, tmp_path
):
    """Killed after the store got its name, before its temporary folder was gone."""

    def left() -> list[Path]:
        return list(tmp_path.glob(f".{STORE}.*.tmp"))

    def act() -> None:
        merge(anchor, [contributions["law"]], tmp_path / "out", gate=Gate(admission=False))

    place = 1
    while not left():
        assert killed_before(place, act), "the merge ended before it was killed at that moment"
        if not (tmp_path / STORE).exists():
            for path in left():
                shutil.rmtree(path)
        place += 1
    assert Store.existing(tmp_path / STORE).gc()["leftovers"] > 0
    assert not left()


@pytest.fixture
def fails_at(monkeypatch) -> Callable[[int], None]:
    """`fails_at(n)`: the n-th change to the disk from now on meets a full one."""

    def arm(place: int) -> None:
        count = 0

        def observe(operation: str, path: Path) -> None:
            nonlocal count
            count += 1
            if count == place and operation != "remove":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

        monkeypatch.setattr(files, "observer", observe)

    return arm


def test_a_full_disk_at_any_stage_is_told_and_leaves_no_half_model(
    anchor, contributions, model, fails_at, monkeypatch, tmp_path
):
    one, other = contributions["code"], contributions["law"]
    merged = merge(anchor, [other], tmp_path / "merged").path
    operations: dict[str, Callable[[Path], Artifact]] = {
        "merge": lambda out: merge(anchor, [one, other], out, store_path=out.parent / "store"),
        "append": lambda out: append(merged, one, out, store_path=out.parent / "store"),
        "opt-out": lambda out: opt_out(merged, ["law"], out, store_path=out.parent / "store"),
    }
    for name, operation in operations.items():
        for place in range(1, 10_000, 23):
            directory = tmp_path / name / str(place)
            directory.mkdir(parents=True)
            fails_at(place)
            try:
                operation(directory / "out")
            except (UserError, OSError) as error:
                assert isinstance(error, UserError) or files.is_disk_full(error)
                assert not (directory / "out").exists()
                assert [p.name for p in directory.iterdir()] == [], f"{name}, place {place}"
                monkeypatch.setattr(files, "observer", None)
                assert verify(operation(directory / "out").path)["verified"]
            else:
                break
        assert place > 60


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount")
def test_a_disk_that_is_really_full(anchor, contributions, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=160k", "tmpfs", str(disk)], capture_output=True
    ).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        with pytest.raises(UserError, match="no space left on the disk"):
            merge(anchor, list(contributions.values()), disk / "model")
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_two_merges_at_once_into_one_store_both_succeed(anchor, contributions, tmp_path):
    program = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from flexolmo_jax.coordinator.merge import merge\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "anchor, out, *paths = map(Path, sys.argv[1:])\n"
        "merge(anchor, paths, out, store_path=out.parent / 'store')\n"
    )
    paths = [str(path) for path in contributions.values()]
    command = [sys.executable, "-c", program, str(anchor)]
    processes = [
        subprocess.Popen(
            [*command, str(tmp_path / f"model{i}"), *paths],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ,
        )
        for i in range(3)
    ]
    for process in processes:
        assert process.stdout and process.stdout.readline() == b"ready\n"
    for process in processes:
        process.communicate(b"\n")
    assert [process.returncode for process in processes] == [0, 0, 0]
    for i in range(3):
        assert verify(tmp_path / f"model{i}")["verified"]
        assert contents(tmp_path / f"model{i}") == contents(tmp_path / "model0")
    assert Store.existing(tmp_path / "store").gc()["removed"] == []


def bits(path: Path) -> dict[str, bytes]:
    return {
        name: np.asarray(a).tobytes() for name, a in flatten(open_artifact(path).params()).items()
    }


def flipped(source: Path, copy: Path, rng: random.Random) -> tuple[Path, int]:
    """Copies a directory and flips one bit anywhere in it. Returns the file and the position."""
    shutil.copytree(source, copy)
    all_files = [p for p in sorted(copy.rglob("*")) if p.is_file() and p.stat().st_size]
    file = (
        rng.choice(all_files)
        if rng.random() < 0.5
        else rng.choices(all_files, [p.stat().st_size for p in all_files])[0]
    )
    content = bytearray(file.read_bytes())
    position = rng.randrange(len(content))
    content[position] ^= 1 << rng.randrange(8)
    file.chmod(0o644)
    file.write_bytes(content)
    return file, position


@pytest.fixture(params=[60, pytest.param(400, marks=pytest.mark.slow)])
def flips(request) -> int:
    """How many bits are tried, one at a time."""
    return request.param


def test_every_flipped_bit_of_a_contribution_is_found_by_verify(
    anchor, contributions, tmp_path, flips
):
    rng = random.Random(1)
    for number in range(flips):
        file, position = flipped(contributions["care"], tmp_path / "copy", rng)
        with pytest.raises(UserError) as error:
            verify(tmp_path / "copy", anchor)
            print(number, file, position)
        assert "\n" not in str(error.value)
        shutil.rmtree(tmp_path / "copy")


def test_every_flipped_bit_of_a_model_is_found_by_verify_and_none_is_loaded_as_another_weight(
    anchor, model, tmp_path, flips
):
    source = opt_out(model, ["law"], tmp_path / "source").path  # with a receipt
    right, rng, loaded = bits(source), random.Random(2), 0
    for number in range(flips):
        file, position = flipped(source, tmp_path / "copy", rng)
        with pytest.raises(UserError):
            verify(tmp_path / "copy")
            print(number, file, position)
        if number % 8 == 0:
            try:
                assert bits(tmp_path / "copy") == right, (file, position)
                # the bit was in a tokenizer, a receipt, ...: nothing that weights come from
                loaded += 1
            except UserError:
                pass
        shutil.rmtree(tmp_path / "copy")
    assert loaded < flips // 16


def test_every_flipped_bit_of_a_store_is_found_by_verify_and_none_gets_into_a_model_unseen(
    anchor, contributions, tmp_path, flips
):
    merge(anchor, [contributions["code"]], tmp_path / "model")
    assert verify(tmp_path / STORE) == {
        "path": str(tmp_path / STORE),
        "kind": "store",
        "verified": True,
        "objects": 2,
    }
    right, rng = contents(tmp_path / "model"), random.Random(3)
    for number in range(flips):
        file, position = flipped(tmp_path / STORE, tmp_path / "store", rng)
        with pytest.raises(UserError):
            verify(tmp_path / "store")
            print(number, file, position)
        if number % 8 == 0:
            try:
                again = merge(
                    anchor,
                    [contributions["code"]],
                    tmp_path / "again",
                    store_path=tmp_path / "store",
                ).path
                verify(again)
            except UserError:
                pass
            else:
                assert contents(again) == right, (file, position)
            shutil.rmtree(tmp_path / "again", ignore_errors=True)
        shutil.rmtree(tmp_path / "store")


def test_every_flipped_bit_of_a_run_checkpoint_is_found_by_restoring(anchor_run, tmp_path, flips):
    right, rng, found = bits(anchor_run), random.Random(4), 0
    for _ in range(flips):
        copy = tmp_path / "run"
        shutil.copytree(anchor_run, copy, ignore=lambda *_: ["checkpoints"])
        file, position = flipped(anchor_run / "checkpoints", copy / "checkpoints", rng)
        try:
            assert bits(copy) == right and file.name in (
                "_CHECKPOINT_METADATA",
                "commit_success.txt",
            ), (file, position)
        except UserError:
            found += 1
        shutil.rmtree(copy)
    assert found > flips * 0.8


def test_a_missing_shard_is_an_error_and_not_zeros(model, tmp_path):
    copy = Path(shutil.copytree(model, tmp_path / "copy"))
    shard = next(p for p in sorted(copy.glob("weights/experts.up/c/**/*")) if p.is_file())
    shard.unlink()
    with pytest.raises(UserError, match="is not whole"):
        open_artifact(copy).params()
    with pytest.raises(UserError, match="is missing"):
        verify(copy)
