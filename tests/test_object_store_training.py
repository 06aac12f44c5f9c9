"""Everything before the merger in a bucket, as on a disk: preparing, training, stopping and going
on, contributing."""

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
from flexolmo_jax.config import dump_yaml
from flexolmo_jax.coordinator.router import train_router
from flexolmo_jax.errors import UserError
from flexolmo_jax.model.tree import flatten
from flexolmo_jax.owner.pair import train_pair
from flexolmo_jax.storage import checkpoint
from flexolmo_jax.storage.checkpoint import DIGESTS, StepCheckpoints
from flexolmo_jax.storage.paths import children, listing
from flexolmo_jax.train import metrics
from flexolmo_jax.train.metrics import MetricsWriter, read_metrics
from flexolmo_jax.train.pretrain import pretrain
from tests.object_store import upload
from tests.tiny import SEQ_LEN, documents, pair_config, run_config, write_jsonl

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
    return {
        name: np.asarray(array).tobytes()
        for name, array in flatten(open_artifact(path).params()).items()
    }


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


@pytest.mark.slow
def test_the_whole_story_in_a_bucket(bucket, empty_disk, tmp_path, capsys):
    for domain in ("public", "law", "code"):
        (bucket / "docs" / f"{domain}.jsonl").write_bytes(
            write_jsonl(tmp_path / "one.jsonl", documents(domain, 160)).read_bytes()
        )
    public, tokenizer = bucket / "docs" / "public.jsonl", bucket / "tokenizer.json"
    run(capsys, "tokenizer", "train", "--input", public, "--vocab-size", 320, "--out", tokenizer)
    prepare = [
        "data",
        "prepare",
        "--input",
        public,
        "--tokenizer",
        tokenizer,
        "--seq-len",
        SEQ_LEN,
        "--heldout",
        0.1,
    ]
    assert run(capsys, *prepare, "--out", bucket / "public")["train"]["records"] > 100
    run(capsys, *prepare, "--out", tmp_path / "public")
    contents = [
        {name: (place / name).read_bytes() for name in listing(place)}
        for place in (bucket / "public", tmp_path / "public")
    ]
    assert contents[0] == contents[1]
    assert run(capsys, "verify", bucket / "public")["verified"]

    often = (
        f"train.steps={STEPS}",
        "train.save_every=2",
        "train.eval_every=6",
        "train.eval_records=8",
    )
    config = bucket / "anchor.yaml"
    config.write_text(dump_yaml(run_config("anchor", bucket / "public", *often)))
    train = ["train", config, "--out", bucket / "run"]
    kill(
        train, lambda: max(StepCheckpoints(bucket / "run" / "checkpoints").steps(), default=0) >= 6
    )
    assert STEPS > open_artifact(bucket / "run").step() >= 6
    result = run(capsys, *train)
    assert result["bits_per_byte"] == run(capsys, *train[:-1], tmp_path / "run")["bits_per_byte"]
    assert bits(bucket / "run") == bits(tmp_path / "run") and bits(bucket / "run")
    steps = [
        [entry["step"] for entry in read_metrics(place) if "loss" in entry]
        for place in (bucket / "run", tmp_path / "run")
    ]
    assert steps[0] == steps[1] == list(range(1, STEPS + 1))
    assert {"config.yaml", "summary.json", "flexolmo.json", "tokenizer.json"} < listing(
        bucket / "run"
    ).keys()
    assert any(name.startswith("tensorboard/events") for name in listing(bucket / "run"))

    run(capsys, "publish", bucket / "run", "--public", public, "--out", bucket / "anchor")
    for name in ("law", "code"):
        contribute = [
            "contribute", "--anchor", bucket / "anchor", "--documents",
            bucket / "docs" / f"{name}.jsonl", "--name", name,
            "--set", "data.batch_size=8", "--set", "train.steps=12", "--set", "train.save_every=2",
            "--out", bucket / name,
            *(["--work", bucket / "secret"] if name == "code" else []),
        ]  # fmt: skip
        if name == "law":
            # of a process that was killed while it prepared
            for left_over in (".unfinished", "train.tokens.npy"):
                (bucket / "law.work" / "data" / left_over).write_text("")
            kill(
                contribute,
                lambda: bool(StepCheckpoints(bucket / "law.work" / "run" / "checkpoints").steps()),
            )
        assert run(capsys, *contribute)["training"]["steps"] == 12
        assert run(
            capsys,
            "verify",
            bucket / name,
            "--anchor",
            bucket / "anchor",
            "--public",
            bucket / "public",
        )["verified"]
    assert {path.name for path in children(bucket / "secret")} == {"data", "run"} and not children(
        bucket / "code.work"
    )
    assert (
        run(capsys, "package", bucket / "law.work" / "run", "--out", bucket / "law-2")["name"]
        == "law"
    )
    run(
        capsys,
        "merge",
        "--anchor",
        bucket / "anchor",
        bucket / "law",
        bucket / "code",
        "--out",
        bucket / "model",
    )
    run(capsys, "opt-out", bucket / "model", "--expert", "law", "--out", bucket / "model-2")
    scores = run(capsys, "eval", bucket / "model-2", "--data", bucket / "public", "--limit", 8)
    assert 0 < scores["bits_per_byte"]["public"] < 8 and set(scores["routing"]["public"]) == {
        "anchor",
        "code",
    }
    assert run(
        capsys, "generate", bucket / "model-2", "--prompt", "the river", "--max-new-tokens", 2
    )["completions"]
    assert (
        run(
            capsys,
            "embed-domain",
            "--anchor",
            bucket / "anchor",
            "--input",
            public,
            "--out",
            bucket / "row.npy",
        )["dim"]
        == 32
    )
    assert not [path for path in empty_disk.rglob("*") if path.is_file()]


def test_a_damaged_checkpoint_in_a_bucket_is_set_aside_and_the_run_goes_on_from_the_one_before(
    bucket, prepared, capsys
):
    config = run_config("anchor", prepared["public"], "train.steps=8", "train.save_every=4")
    # of a process that was killed before the run was one
    for name, text in ((".unfinished", ""), ("config.yaml", "run: pair")):
        (bucket / "run" / name).write_text(text)
    pretrain(config, bucket / "run")
    whole, checkpoints = bits(bucket / "run"), bucket / "run" / "checkpoints"
    largest = max(
        (name for name in listing(checkpoints / "8") if "/d/" in name),
        key=lambda name: listing(checkpoints / "8")[name].size,
    )
    content = bytearray((checkpoints / "8" / largest).read_bytes())
    content[len(content) // 2] ^= 1
    (checkpoints / "8" / largest).write_bytes(bytes(content))
    with pytest.raises(UserError, match=r"checkpoint .*/8 is damaged: default/"):
        open_artifact(bucket / "run").params()
    assert pretrain(config, bucket / "run")["step"] == 8
    assert (
        "going back to the one before it" in (told := capsys.readouterr().err)
        and "from step 4" in told
    )
    assert (bucket / "run" / "damaged" / "8" / largest).read_bytes() == content and bits(
        bucket / "run"
    ) == whole


def test_the_newest_checkpoints_and_the_best_are_kept_in_a_bucket_and_no_file_of_them_is_read_again(
    bucket, monkeypatch
):
    monkeypatch.delattr(checkpoint, "open_to_read")
    with StepCheckpoints(bucket / "c", keep=2) as checkpoints:
        for step, loss in enumerate((3.0, 1.0, 2.0, 5.0, 4.0), 1):
            checkpoints.save(step, {"params": {"a": np.full(3, step)}}, loss)
    with StepCheckpoints(bucket / "c") as checkpoints:
        assert checkpoints.steps() == [5, 4, 2] and checkpoints.choose("best") == 2
        assert checkpoints.restore_part("params", {"a": np.zeros(3, int)}, 4)["a"].tolist() == [
            4,
            4,
            4,
        ]


def test_a_run_copied_out_of_a_bucket_or_into_one_keeps_its_digests(bucket, tmp_path):
    for place in (tmp_path / "a", bucket / "a"):
        with StepCheckpoints(place, keep=1) as checkpoints:
            checkpoints.save(1, {"params": {"a": np.arange(5)}})
    for name in listing(bucket / "a"):
        (tmp_path / "b" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "b" / name).write_bytes((bucket / "a" / name).read_bytes())
    upload(tmp_path / "a", bucket / "b")
    (bucket / "b" / "1" / "commit_success.txt").write_text("copied")
    for place in (tmp_path / "b", bucket / "b"):
        with StepCheckpoints(place) as checkpoints:
            (restored,) = checkpoints.restore_part(
                "params", {"a": np.zeros(5, int)}, checkpoints.choose("last")
            ).values()
            np.testing.assert_array_equal(restored, np.arange(5))
        digests = json.loads((place / "1" / DIGESTS).read_text())
        name = next(name for name in digests if "/d/" in name)
        (place / "1" / name).write_bytes(b"damaged")
        with StepCheckpoints(place) as checkpoints, pytest.raises(UserError, match="is damaged"):
            checkpoints.restore_part("params", {"a": np.zeros(5, int)}, 1)


def test_metrics_in_a_bucket_are_added_now_and_then_and_cut_off_behind_the_restored_step(bucket):
    with MetricsWriter(bucket, 0) as writer:
        writer.write(1, {"loss": 1.0})
        assert read_metrics(bucket) == []
        writer.flush()
        assert read_metrics(bucket) == [{"step": 1, "loss": 1.0}]
        writer.write(2, {"loss": 0.5, "share": {"a": 1.0}})
        writer.flush()
        writer.write(3, {"loss": 0.25})
    assert [entry["step"] for entry in read_metrics(bucket)] == [1, 2, 3]
    # an object store that was asked again
    (bucket / "metrics.jsonl").write_text((bucket / "metrics.jsonl").read_text() * 2)
    with MetricsWriter(bucket, 2):
        assert [entry["step"] for entry in read_metrics(bucket)] == [1, 2]
    events = [name for name in listing(bucket) if name.startswith("tensorboard/")]
    assert events and all((bucket / name).read_bytes().count(b"loss") for name in events[:1])
    assert listing(bucket).keys() == {"metrics.jsonl", *events}


def test_events_that_cannot_be_written_for_a_while_do_not_stop_a_run_and_are_not_lost(
    bucket, monkeypatch, capsys
):
    def fail(path: Path, content: bytes) -> None:
        raise OSError("Forbidden: for a while")

    with MetricsWriter(bucket, 0) as writer:
        monkeypatch.setattr(metrics, "append_bytes", fail)
        for step in range(1, 40):
            writer.write(step, {"loss": float(step)})
        writer._events.flush()
        monkeypatch.undo()
    assert "cannot be written: Forbidden: for a while; the run goes on" in capsys.readouterr().err
    (events,) = (name for name in listing(bucket) if name.startswith("tensorboard/"))
    assert (bucket / events).read_bytes().count(b"loss") == 39


@pytest.mark.slow
def test_paths_inside_a_config_may_be_in_a_bucket(bucket, prepared, anchor, model):
    for name, path in {
        "public": prepared["public"],
        "code": prepared["code"],
        "anchor": anchor,
        "model": model,
    }.items():
        upload(path, bucket / name)
    two = ("train.steps=2", "train.eval_records=8")
    pair = pair_config(
        bucket / "anchor",
        bucket / "code",
        "code",
        *two,
        f"pair.public={bucket}/public",
        f"data.tokenizer={bucket}/public",
    )
    train_pair(pair, bucket / "pair")
    assert open_artifact(bucket / "pair").base().path == bucket / "anchor"
    assert open_artifact(bucket / "pair").description["base"] == str(bucket / "anchor")
    train_router(
        run_config("router", bucket / "public", *two, router={"model": str(bucket / "model")}),
        bucket / "router",
    )
    pretrain(
        run_config("anchor", bucket / "public", *two, f"train.init={bucket}/anchor"),
        bucket / "continued",
    )
    for kind in ("pair", "router", "continued"):
        assert all(len(values) for values in bits(bucket / kind).values())
