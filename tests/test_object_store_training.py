"""Everything before the merger in a bucket: preparing, training, stopping and going on, contributing; as on a disk, and nothing on the disk."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from flexolmo_jax import cli
from flexolmo_jax.artifact import open_artifact
from flexolmo_jax.checkpoint import StepCheckpoints
from flexolmo_jax.config import dump_yaml
from flexolmo_jax.model.tree import flatten
from flexolmo_jax.paths import listing
from flexolmo_jax.train.metrics import read_metrics
from tests.tiny import SEQ_LEN, documents, run_config, write_jsonl

STEPS = 24


@pytest.fixture
def empty_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this process and those it starts would put files that nobody gave a place."""
    for name in ("work", "temporary", "home"):
        (tmp_path / "disk" / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "disk" / "work")
    for name, folder in (("TMPDIR", "temporary"), ("HOME", "home"), ("FLEXOLMO_CACHE", "home")):
        monkeypatch.setenv(name, str(tmp_path / "disk" / folder))
    return tmp_path / "disk"


def bits(path: Path | str) -> dict[str, bytes]:
    return {name: np.asarray(array).tobytes() for name, array in flatten(open_artifact(path).params()).items()}


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict:
    assert cli.main([*map(str, arguments), "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def kill(arguments: list[object], when: Callable[[], bool]) -> None:
    command = [sys.executable, "-m", "flexolmo_jax.cli", *map(str, arguments)]
    root = Path(__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": str(root)}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    deadline = time.monotonic() + 180
    while process.poll() is None and not when() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    told = process.communicate()[1]
    assert process.returncode == -signal.SIGKILL, told


def test_the_whole_story_in_a_bucket(bucket, empty_disk, tmp_path, capsys):
    for domain in ("public", "law", "code"):
        (bucket / "docs" / f"{domain}.jsonl").write_bytes(write_jsonl(tmp_path / "one.jsonl", documents(domain, 160)).read_bytes())
    public, tokenizer = bucket / "docs" / "public.jsonl", bucket / "tokenizer.json"
    run(capsys, "tokenizer", "train", "--input", public, "--vocab-size", 320, "--out", tokenizer)
    prepare = ["data", "prepare", "--input", public, "--tokenizer", tokenizer, "--seq-len", SEQ_LEN, "--heldout", 0.1]
    assert run(capsys, *prepare, "--out", bucket / "public")["train"]["records"] > 100
    run(capsys, *prepare, "--out", tmp_path / "public")
    contents = [{name: (place / name).read_bytes() for name in listing(place)} for place in (bucket / "public", tmp_path / "public")]
    assert contents[0] == contents[1]
    assert run(capsys, "verify", bucket / "public")["verified"]

    often = (f"train.steps={STEPS}", "train.save_every=2", "train.eval_every=6", "train.eval_records=8")
    config = bucket / "anchor.yaml"
    config.write_text(dump_yaml(run_config("anchor", bucket / "public", *often)))
    train = ["train", config, "--out", bucket / "run"]
    kill(train, lambda: max(StepCheckpoints(bucket / "run" / "checkpoints").steps(), default=0) >= 6)
    assert STEPS > open_artifact(bucket / "run").step() >= 6
    result = run(capsys, *train)
    assert result["bits_per_byte"] == run(capsys, *train[:-1], tmp_path / "run")["bits_per_byte"]
    assert bits(bucket / "run") == bits(tmp_path / "run") and bits(bucket / "run")
    steps = [[row["step"] for row in read_metrics(place) if "loss" in row] for place in (bucket / "run", tmp_path / "run")]
    assert steps[0] == steps[1] == list(range(1, STEPS + 1))
    assert {"config.yaml", "summary.json", "flexolmo.json", "tokenizer.json"} < listing(bucket / "run").keys()
    assert any(name.startswith("tensorboard/events") for name in listing(bucket / "run"))

    run(capsys, "publish", bucket / "run", "--public", public, "--out", bucket / "anchor")
    for name in ("law", "code"):
        contribute = [
            "contribute", "--anchor", bucket / "anchor", "--documents", bucket / "docs" / f"{name}.jsonl", "--name", name,
            "--set", "data.batch_size=8", "--set", "train.steps=12", "--set", "train.save_every=2", "--out", bucket / name,
        ]  # fmt: skip
        if name == "law":
            work = bucket / "law.work"
            kill(contribute, lambda: bool(StepCheckpoints(work / "run" / "checkpoints").steps()))
        assert run(capsys, *contribute)["training"]["steps"] == 12
        assert run(capsys, "verify", bucket / name, "--anchor", bucket / "anchor", "--public", bucket / "public")["verified"]
    assert run(capsys, "package", bucket / "law.work" / "run", "--out", bucket / "law-2")["name"] == "law"
    run(capsys, "merge", "--anchor", bucket / "anchor", bucket / "law", bucket / "code", "--out", bucket / "model")
    run(capsys, "opt-out", bucket / "model", "--expert", "law", "--out", bucket / "model-2")
    scores = run(capsys, "eval", bucket / "model-2", "--data", bucket / "public", "--limit", 8)
    assert 0 < scores["bits_per_byte"]["public"] < 8 and set(scores["routing"]["public"]) == {"anchor", "code"}
    assert run(capsys, "generate", bucket / "model-2", "--prompt", "the river", "--max-new-tokens", 2)["completions"]
    assert run(capsys, "embed-domain", "--anchor", bucket / "anchor", "--input", public, "--out", bucket / "row.npy")["dim"] == 32
    assert not [path for path in empty_disk.rglob("*") if path.is_file()]
