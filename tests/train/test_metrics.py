"""A run's log never decides whether work goes on."""

import json
from pathlib import Path

import pytest

from flexolmo_jax.train.metrics import MetricsWriter, last_entry, read_metrics

GOOD = [{"step": step, "loss": 1.5} for step in (1, 2, 3)]
BAD = {
    "zeros of a crash": b"\0\0\0\0\n",
    "half a line": b'{"step": 2, "lo\n',
    "no object": b"7\n",
    "no step": b'{"loss": 1}\n',
    "no UTF-8": b"\xff\xfe\n",
    "deep": b"[" * 100_000 + b"\n",
}


def log(directory: Path, bad: bytes, at: int) -> Path:
    lines = [json.dumps(entry).encode() + b"\n" for entry in GOOD]
    file = directory / "metrics.jsonl"
    file.write_bytes(b"".join([*lines[:at], bad, *lines[at:]]))
    return file


@pytest.mark.parametrize("at", [0, 2, 3])
@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_a_line_that_is_no_entry_is_left_out_with_a_note(tmp_path, capsys, bad, at):
    file = log(tmp_path, bad, at)
    assert read_metrics(tmp_path) == GOOD and last_entry(tmp_path) == GOOD[-1]
    assert "has lines that are no entries (1); they are left out" in capsys.readouterr().err
    with MetricsWriter(tmp_path, 2) as writer:
        writer.write(3, {"loss": 2.5})
    assert [*map(json.loads, file.read_text().splitlines())] == [
        *GOOD[:2],
        {"step": 3, "loss": 2.5},
    ]


def test_a_log_that_cannot_be_read_is_told_and_begun_anew(tmp_path, capsys):
    (tmp_path / "elsewhere").write_text("{}\n")
    (tmp_path / "metrics.jsonl").symlink_to(tmp_path / "elsewhere")
    with MetricsWriter(tmp_path, 2) as writer:
        writer.write(3, {"loss": 2.5})
    assert "cannot read" in capsys.readouterr().err
    assert read_metrics(tmp_path) == [{"step": 3, "loss": 2.5}]
    assert (tmp_path / "elsewhere").read_text() == "{}\n"
