"""Odd numbers, texts and streams. The promise: a command ends in a result or in one line, whatever
it is given."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from flexolmo_jax.cli import main
from flexolmo_jax.coordinator import info
from flexolmo_jax.errors import UserError
from flexolmo_jax.exchange.contribution import MANIFEST, open_contribution, sealed
from flexolmo_jax.integrity import embedder_digest
from flexolmo_jax.loaded import load
from flexolmo_jax.storage.checkpoint import StepCheckpoints
from flexolmo_jax.storage.tensorfile import TensorFile
from flexolmo_jax.train import metrics
from tests.attacks.test_contributions import costing_at_most


def command(
    arguments: list[str], streams: str = "", **environment: str
) -> subprocess.CompletedProcess[bytes]:
    """A command in a process of its own, from a shell that redirects its streams."""
    program = [sys.executable, "-m", "flexolmo_jax.cli", *arguments]
    return subprocess.run(
        ["sh", "-c", f'exec "$@" {streams}', "sh", *program],
        capture_output=True, env=os.environ | environment, check=False,
    )  # fmt: skip


@pytest.fixture
def told_in_a_line(capsys):
    def check(*arguments: object) -> str:
        try:
            status = main([str(a) for a in arguments])
        except SystemExit as error:  # argparse's own
            status = error.code
        told = capsys.readouterr().err.splitlines()[-1]
        assert status == 2 and told.startswith("flexolmo"), (status, told)
        return told

    return check


@pytest.mark.parametrize("number", ["nan", "inf", "1e400", "-1", "0"])
def test_no_amount_of_text_is_a_traceback(told_in_a_line, tmp_path, number):
    """Promise: a mistake is one line. 0 was taken for no limit."""
    told_in_a_line("data", "fetch", tmp_path / "out", "--domain", "code", "--max-mb", number)


def test_no_size_of_a_file_or_record_or_vocabulary_is_a_traceback(
    told_in_a_line, anchor, corpora, tmp_path
):
    """Promise: a mistake is one line. A vocabulary of 1e9 tokens took 70 GB, and the process died
    of it."""
    docs, out = corpora["code"], tmp_path / "out"
    told_in_a_line("export-hf", anchor, out, "--max-shard-size", "9" * 400)
    for number in (10**9, 10**30, 2**21 + 1):
        told = told_in_a_line(
            "tokenizer", "train", "--input", docs, "--vocab-size", number, "--out", out
        )
        assert "expected 258 or more" in told
    for number in (2**30 + 1, 10**30):
        told = told_in_a_line(
            "data",
            "prepare",
            "--input",
            docs,
            "--tokenizer",
            anchor,
            "--seq-len",
            number,
            "--out",
            out,
        )
        assert "1073741824 at most" in told
    assert not out.exists()


def test_memory_that_is_not_there_is_told_in_a_line(told_in_a_line, contributions, monkeypatch):
    """Promise: a mistake is one line, that of asking for too much as well."""
    monkeypatch.setattr(info, "info", lambda path: bytearray(1 << 62))
    assert "not enough memory" in told_in_a_line("info", contributions["law"])


@pytest.mark.parametrize("name", ["\u00b2", "\u0663", "9" * 5000, "9" * 200])
def test_a_checkpoint_is_named_by_a_number(anchor_run, told_in_a_line, corpora, tmp_path, name):
    """Promise: a mistake is one line. What other scripts write as digits are no numbers, or other
    names."""
    told_in_a_line(
        "publish",
        anchor_run,
        "--public",
        corpora["public"],
        "--out",
        tmp_path / "out",
        "--checkpoint",
        name,
    )
    if len(name) > 255:
        return
    run = Path(shutil.copytree(anchor_run, tmp_path / "run"))
    (run / "checkpoints" / name).mkdir()
    with StepCheckpoints(run / "checkpoints", keep=1) as checkpoints:
        assert checkpoints.steps() == [20]
    assert (run / "damaged" / name).is_dir()


def test_a_prompt_that_is_no_unicode_is_refused(model, told_in_a_line):
    """Promise: a mistake is one line: bytes of a command line that are no UTF-8."""
    for more in ([], ["--json"], ["--prompt", "b"]):
        assert "is not Unicode" in told_in_a_line("generate", model, "--prompt", "a\udcff", *more)
    with pytest.raises(UserError, match="prompt 1: character 0"):
        load(model).generate(["a", "\ud800"])


def test_what_a_terminal_cannot_spell_is_spelled_out(contributions, tmp_path):
    """Promise: a command ends in a result. An owner's name ended `info` in a traceback where the
    terminal has another encoding."""
    copy = Path(shutil.copytree(contributions["law"], tmp_path / "law"))
    (copy / MANIFEST).write_bytes(
        sealed(open_contribution(copy).manifest | {"owner": "\u65e5\u672c Z\u00fcrich"})
    )
    told = command(["info", str(copy)], PYTHONIOENCODING="ascii")
    assert told.returncode == 0 and rb"\u65e5\u672c Z\xfcrich" in told.stdout, told


def test_a_closed_stream_costs_nothing_but_what_is_written_to_it(contributions):
    """Promise: a command ends in a result or one line. It was a traceback, and the next file that
    was opened could have got the number of a closed stderr, to which libraries write."""
    law = str(contributions["law"])
    told = command(["info", law, "--json"], "2>&-")
    assert told.returncode == 0 and json.loads(told.stdout)["name"] == "law", told
    told = command(["info", law], ">&-")
    assert told.returncode == 1 and told.stderr.splitlines() == [
        b"flexolmo: the result cannot be written: Bad file descriptor"
    ], told


def test_long_names_in_several_files_do_not_add_up(tmp_path):
    """Promise: nothing fills the machine: tensors' names of 95 MB, of every file of a checkpoint,
    stayed in memory together."""
    header = json.dumps(
        {"x" * 1001: {"dtype": "BF16", "shape": [0], "data_offsets": [0, 0]}}
    ).encode()
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(UserError, match="a name of 1001 characters"):
        TensorFile(tmp_path / "a.safetensors")


def test_a_large_embedder_or_metrics_file_costs_little(tmp_path):
    """Promise: nothing fills the machine: a gigabyte of nothing in an anchor's embedder, or in a
    run's metrics, was held in memory."""
    (tmp_path / "embedder").mkdir()
    for name in ("embedder/embedder.npz", "metrics.jsonl"):
        with (tmp_path / name).open("wb") as file:
            file.truncate(2**30 - 1)
    with costing_at_most(100, 60):
        embedder_digest(tmp_path / "embedder")
        with pytest.raises(UserError, match="is damaged"):
            metrics.last_entry(tmp_path)
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n' * 100_000 + b'{"step": 2}\n{"st')
    assert metrics.last_entry(tmp_path) == {"step": 2}
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1')
    with pytest.raises(UserError, match="is damaged"):
        metrics.last_entry(tmp_path)
    os.truncate(tmp_path / "embedder" / "embedder.npz", 2**30 + 1)
    with pytest.raises(UserError, match="expected at most"):
        embedder_digest(tmp_path / "embedder")


def test_a_fetch_takes_no_place_of_a_users_text(told_in_a_line, tmp_path):
    """Promise: nothing of the user's is changed. A text of one's own by a domain's name was
    overwritten."""
    (tmp_path / "code.jsonl").write_text('{"text": "mine"}\n')
    assert "no fetch wrote it" in told_in_a_line("data", "fetch", tmp_path, "--domain", "code")
    assert (tmp_path / "code.jsonl").read_text() == '{"text": "mine"}\n'
