"""Only one process writes a place at a time: on a disk by a lock that dies with it, in a bucket by
a lease that it renews."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from flexolmo_jax.cli import main
from flexolmo_jax.errors import UserError
from flexolmo_jax.storage import leases
from flexolmo_jax.storage.folders import below
from flexolmo_jax.storage.leases import Holder
from flexolmo_jax.storage.locks import alone
from flexolmo_jax.storage.paths import LOCK, children, file_system, listing

HOLD = """
import sys
from flexolmo_jax.storage.locks import alone
from flexolmo_jax.storage.paths import path_of
with alone(path_of(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
"""


@contextmanager
def held(place: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that is alone at a place."""
    command = [sys.executable, "-c", HOLD, str(place)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=os.environ) as process:
        assert process.stdout and process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


def lock_of(place: Path) -> Path:
    return place.with_name(f".{place.name}{LOCK}")


def test_a_place_that_another_process_writes_is_refused_at_once_and_told_whose_it_is(tmp_path):
    place = tmp_path / "new" / "out"
    with held(place) as process:
        told = rf"^.*pid {process.pid} on .*, since 20[-0-9: ]* UTC\); wait [^\n]*$"
        with pytest.raises(UserError, match=told), alone(place):
            pass
        (tmp_path / "link").symlink_to(tmp_path / "new")
        with pytest.raises(UserError, match="is being written"), alone(tmp_path / "link" / "out"):
            pass
        with alone(tmp_path / "new" / "other"):
            pass
        assert lock_of(place).exists()
        process.communicate("\n")
    (tmp_path / "link").unlink()
    assert list(tmp_path.iterdir()) == []


def test_the_lock_of_a_process_that_was_killed_holds_nobody_up(tmp_path):
    with held(tmp_path / "out") as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert lock_of(tmp_path / "out").exists()
        with alone(tmp_path / "out"), alone(tmp_path / "out"):
            assert Holder.read(lock_of(tmp_path / "out").read_bytes()).pid == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_two_threads_are_not_at_one_place(tmp_path):
    told: list[str] = []

    def enter() -> None:
        try:
            with alone(tmp_path / "out"):
                pass
        except UserError as error:
            told.append(str(error))

    with alone(tmp_path / "out"):
        thread = threading.Thread(target=enter)
        thread.start()
        thread.join()
    assert len(told) == 1 and f"pid {os.getpid()}" in told[0]


def test_the_lock_of_another_user_is_one_too(tmp_path, monkeypatch):
    lock_of(tmp_path / "out").write_bytes(b"")
    open_file = os.open

    def refuse(path, flags, *mode):
        if flags & os.O_RDWR:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return open_file(path, flags, *mode)

    monkeypatch.setattr(os, "open", refuse)
    with lock_of(tmp_path / "out").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="a host that is not known"), alone(tmp_path / "out"):
            pass
    with alone(tmp_path / "out"):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EBADF])
def test_without_locks_the_work_goes_on(number, tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with alone(tmp_path / "out"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_lock_is_no_content_of_the_folder_it_lies_in(tmp_path):
    (tmp_path / "a.jsonl").write_text("{}")
    with held(tmp_path / "out"):
        assert listing(tmp_path).keys() == {"a.jsonl"}
        assert [path.name for path in children(tmp_path)] == ["a.jsonl"]
        assert [entry.path.name for entry in below(tmp_path)] == ["a.jsonl"]


def test_every_verb_with_an_out_refuses_one_that_another_process_writes(
    corpora, anchor, tmp_path, capsys
):
    documents = str(corpora["code"])
    with held(tmp_path / "out"):
        for verb in (
            [
                "data",
                "prepare",
                "--input",
                documents,
                "--tokenizer",
                str(anchor),
                "--seq-len",
                "32",
            ],
            ["tokenizer", "train", "--input", documents, "--vocab-size", "300"],
            ["merge", "--anchor", str(anchor), "nowhere"],
            ["embed-domain", "--anchor", str(anchor), "--input", documents],
            ["contribute", "--anchor", str(anchor), "--documents", documents, "--name", "x"],
        ):
            assert main([*verb, "--out", str(tmp_path / "out")]) == 2
            told = capsys.readouterr().err
            assert "out is being written by another process (pid" in told, told
        assert main(["export-hf", str(anchor), str(tmp_path / "out")]) == 2
    assert [path.name for path in tmp_path.iterdir()] == [lock_of(tmp_path / "out").name]


def test_the_work_folder_of_an_owner_is_one_process_s_whatever_the_out(
    corpora, anchor, tmp_path, capsys
):
    verb = ["contribute", "--anchor", str(anchor), "--documents", str(corpora["code"])]
    how = ["--name", "x", "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]
    with held(tmp_path / "work"):
        assert main([*verb, *how]) == 2
    assert "work is being written by another process (pid" in capsys.readouterr().err
    assert not (tmp_path / "work").exists()


def test_what_others_only_read_needs_no_lock(anchor, tmp_path, capsys):
    with held(anchor):
        assert main(["info", str(anchor)]) == 0


# ---- in a bucket ----


def written(lease: Path, **changes: str | int) -> None:
    """A lease of another process."""
    file_system().pipe_file(str(lease), Holder.this()._replace(**changes).written())


def test_in_a_bucket_a_lease_keeps_others_out_and_is_gone_at_the_end(bucket):
    with held(bucket / "out") as process:
        with pytest.raises(UserError, match=f"pid {process.pid} on"), alone(bucket / "out"):
            pass
        process.communicate("\n")
    with alone(bucket / "out"), alone(bucket / "out"):
        assert listing(bucket, clutter=True).keys() == {lock_of(bucket / "out").name}
        assert not listing(bucket)
    assert not listing(bucket, clutter=True)


def test_the_lease_of_a_process_of_this_machine_that_was_killed_holds_nobody_up(bucket):
    with held(bucket / "out") as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        start = time.monotonic()
        with alone(bucket / "out"):
            assert time.monotonic() - start < 5
    # a container that was started again may have the same number
    written(lock_of(bucket / "out"), started="1")
    with alone(bucket / "out"):
        pass


def test_the_lease_of_another_machine_is_taken_over_unless_it_is_renewed(
    bucket, monkeypatch, capsys
):
    monkeypatch.setattr(leases, "LOOKED_AT", 0.1)
    monkeypatch.setattr(leases, "EXPIRED", 1.0)
    lease = lock_of(bucket / "out")
    written(lease, machine="another", host="elsewhere")
    with alone(bucket / "out"):
        assert "to see whether its holder lives" in capsys.readouterr().err
    monkeypatch.setattr(leases, "EXPIRED", 60.0)
    written(lease, machine="another", host="elsewhere")
    renewing = threading.Timer(0.3, written, [lease], {"machine": "another", "host": "elsewhere"})
    renewing.start()
    with pytest.raises(UserError, match="on elsewhere, since"), alone(bucket / "out"):
        pass
    renewing.join()


def test_a_lease_is_renewed_while_it_is_held(bucket, monkeypatch):
    monkeypatch.setattr(leases, "RENEWED", 0.1)
    with alone(bucket / "out"):
        first = lock_of(bucket / "out").read_bytes()
        deadline = time.monotonic() + 20
        while lock_of(bucket / "out").read_bytes() == first:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_who_has_lost_its_lease_ends_before_both_write(bucket, tmp_path):
    program = f"from flexolmo_jax.storage import leases\nleases.RENEWED = 0.2\n{HOLD}"
    command = [sys.executable, "-c", program, str(bucket / "out")]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=os.environ
    ) as process:
        assert process.stdout and process.stdout.readline() == "held\n"
        written(lock_of(bucket / "out"), machine="another", host="elsewhere")
        assert process.wait(timeout=60) == 75 and process.stderr
        told = process.stderr.read()
    assert "on elsewhere" in told and told.count("\n") == 1
    assert lock_of(bucket / "out").exists()
