"""The loop: it learns, stops and goes on bit for bit, falls back over damage, and refuses what is
not its own."""

import functools
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from flexolmo_jax.artifact import open_artifact
from flexolmo_jax.cli import main
from flexolmo_jax.config import RunConfig, dump_yaml
from flexolmo_jax.coordinator.router import train_router
from flexolmo_jax.data.prepare import prepare
from flexolmo_jax.data.records import open_records
from flexolmo_jax.errors import RunError, UserError
from flexolmo_jax.model.tree import flatten
from flexolmo_jax.owner.pair import train_pair
from flexolmo_jax.storage.checkpoint import StepCheckpoints
from flexolmo_jax.train.evaluate import make_scorer, score_records
from flexolmo_jax.train.metrics import MetricsWriter, read_metrics
from flexolmo_jax.train.pretrain import pretrain
from tests.faults.test_interrupts import STARTED
from tests.tiny import documents, pair_config, run_config, train_until, write_jsonl

EVERY = ("train.eval_every=4", "train.save_every=4")
# Orbax leaves coroutines behind when one of many arrays cannot be read.
# They are collected in whichever test comes next.
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning", "ignore:coroutine:RuntimeWarning"
)


def saved(run: Path, step: int) -> dict[str, Any]:
    """Everything in a checkpoint, of whatever devices: parameters, moments and counters."""
    directory = (run / "checkpoints" / str(step) / "default").absolute()
    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.metadata(directory).item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        tree = checkpointer.restore(directory, restore_args=as_numpy)
    return {
        jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }


def assert_same_bits(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and a[name].tobytes() == b[name].tobytes(), name


@pytest.fixture(scope="module")
def config(prepared: dict[str, Path]) -> RunConfig:
    return run_config("anchor", prepared["public"], *EVERY)


@pytest.fixture(scope="module")
def uninterrupted(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("loop") / "run"
    pretrain(config, run)
    return run


@pytest.fixture
def finished(uninterrupted: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(uninterrupted, tmp_path / "run"))


@pytest.mark.slow
def test_a_two_layer_model_memorises_64_records(tiny_tokenizer, tmp_path):
    corpus = write_jsonl(
        tmp_path / "c.jsonl",
        (text for domain in ("code", "law", "care") for text in documents(domain, 60, seed=9)),
    )
    index = prepare([corpus], tiny_tokenizer, 32, tmp_path / "all", heldout=0)
    assert index.splits["train"].records >= 64
    for kind in ("tokens", "segments"):  # exactly 64 of them
        path = tmp_path / "all" / f"train.{kind}.npy"
        np.save(path, np.load(path)[:64])
    text = (
        (tmp_path / "all" / "index.json")
        .read_text()
        .replace(f'"records": {index.splits["train"].records}', '"records": 64', 1)
    )
    (tmp_path / "all" / "index.json").write_text(text)
    size = ("model.d_model=64", "model.d_ffn=192", "data.batch_size=64", "train.steps=100")
    run = run_config(
        "anchor",
        tmp_path / "all",
        *size,
        "optim.lr=1e-2",
        "optim.warmup=10",
        "optim.weight_decay=0",
    )
    pretrain(run, tmp_path / "run")
    losses = [entry["loss"] for entry in read_metrics(tmp_path / "run") if "loss" in entry]
    assert losses[0] > 2 and losses[-1] < 0.1, losses


def test_a_run_that_is_stopped_and_goes_on_equals_the_uninterrupted_one_bitwise(
    config, uninterrupted, tmp_path, monkeypatch
):
    def write(self, step, values, write=MetricsWriter.write):
        write(self, step, values)
        if step == 9:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(MetricsWriter, "write", write)
        pretrain(config, tmp_path / "run")
    assert stopped.value.code == 42
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    with StepCheckpoints(tmp_path / "run" / "checkpoints") as checkpoints:
        assert checkpoints.steps()[0] == 10
    result = pretrain(config, tmp_path / "run")
    assert result["step"] == 20 and set(result["bits_per_byte"]) == {"public"}
    assert_same_bits(saved(tmp_path / "run", 20), saved(uninterrupted, 20))


def test_a_damaged_newest_checkpoint_is_set_aside_and_the_one_before_it_goes_on(
    config, uninterrupted, finished, capsys
):
    for path in (finished / "checkpoints" / "20").rglob("*"):
        if path.is_file() and path.parent.name == "d":
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with (finished / "metrics.jsonl").open("a") as file:
        file.write('{"step": 21, "loss": 1')  # the torn line of a kill
    pretrain(config, finished)
    told = capsys.readouterr().err
    assert (
        "warning" in told and "checkpoints/20" in told.replace("\n", "") and "from step 16" in told
    )
    assert (finished / "damaged" / "20").is_dir()
    assert_same_bits(saved(finished, 20), saved(uninterrupted, 20))
    entries, expected = read_metrics(finished), read_metrics(uninterrupted)
    assert [entry["step"] for entry in entries] == [entry["step"] for entry in expected]
    assert [entry.get("loss") for entry in entries] == [entry.get("loss") for entry in expected]
    assert len(list((finished / "tensorboard").glob("events*"))) == 2


def test_an_empty_directory_named_like_a_step_is_no_checkpoint(
    config, uninterrupted, finished, capsys
):
    (finished / "checkpoints" / "24").mkdir()
    assert open_artifact(finished).step() == 20
    before = flatten(open_artifact(uninterrupted).params())
    after = flatten(open_artifact(finished).params())
    assert_same_bits(
        {k: np.asarray(v) for k, v in before.items()}, {k: np.asarray(v) for k, v in after.items()}
    )
    assert pretrain(config, finished)["step"] == 20
    assert "from step 20" in capsys.readouterr().err
    assert not (finished / "checkpoints" / "24").exists()


def test_a_damaged_checkpoint_is_an_error_of_one_line_when_it_is_asked_for(finished):
    for path in (finished / "checkpoints" / "20").rglob("d/*"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match="20 is damaged") as error:
        open_artifact(finished).params("20")
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="expected last, best or one of"):
        open_artifact(finished).params("17")
    shutil.rmtree(finished / "checkpoints")
    with pytest.raises(UserError, match="no complete checkpoint"):
        open_artifact(finished).params()


def test_the_newest_checkpoints_and_the_best_are_kept(tmp_path):
    def save(steps: dict[int, float | None]) -> list[int]:
        with StepCheckpoints(tmp_path / "c", keep=2) as checkpoints:
            for step, loss in steps.items():
                checkpoints.save(step, {"params": {"a": np.full(3, step)}}, loss)
                checkpoints.wait()
        with StepCheckpoints(tmp_path / "c") as checkpoints:
            return checkpoints.steps()

    assert save({1: 3.0, 2: 1.0, 3: 2.0, 4: 5.0, 5: 4.0}) == [5, 4, 2]
    # another process, and steps that were not evaluated
    assert save({6: None, 7: None}) == [7, 6, 2]
    with StepCheckpoints(tmp_path / "c") as checkpoints:
        assert (
            checkpoints.choose("best") == 2
            and checkpoints.choose("last") == 7
            and checkpoints.choose("6") == 6
        )
    assert save({8: 0.5}) == [8, 7]
    with StepCheckpoints(tmp_path / "d", keep=1) as checkpoints:
        checkpoints.save(1, {"params": {"a": np.zeros(3)}})
    with (
        StepCheckpoints(tmp_path / "d") as checkpoints,
        pytest.raises(UserError, match="no best checkpoint"),
    ):
        checkpoints.choose("best")


def test_a_loss_that_is_not_finite_stops_the_run_with_its_step_and_the_last_good_checkpoint(
    prepared, tmp_path
):
    run = run_config(
        "anchor", prepared["public"], "optim.lr=1e18", "optim.warmup=0", "train.save_every=1"
    )
    with pytest.raises(
        RunError, match=r"at step \d+ .*the last good checkpoint is step \d+"
    ) as error:
        pretrain(run, tmp_path / "run")
    failed, good = (
        int(word) for word in str(error.value).replace(";", " ").split() if word.isdigit()
    )
    assert good < failed
    assert open_artifact(tmp_path / "run").step() == good
    assert all(np.isfinite(array).all() for array in saved(tmp_path / "run", good).values())


def test_a_directory_with_something_else_in_it_is_left_alone(config, tmp_path):
    (tmp_path / "thesis.tex").write_text("draft")
    with pytest.raises(UserError, match="not empty"):
        pretrain(config, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    "change",
    ["optim.lr=0.001", "train.steps=30", "train.seed=1", "model.d_ffn=128", "data.batch_size=16"],
)
def test_another_config_may_not_go_on_with_a_run(prepared, uninterrupted, change):
    before = (uninterrupted / "config.yaml").read_text()
    key, _, value = change.partition("=")
    with pytest.raises(UserError, match=rf"another {key} \([0-9.]+, now {value}\); give the"):
        pretrain(run_config("anchor", prepared["public"], *EVERY, change), uninterrupted)
    assert (uninterrupted / "config.yaml").read_text() == before


def test_how_often_to_look_and_the_mesh_may_change(prepared, finished):
    looks = (
        "train.eval_every=1",
        "train.save_every=3",
        "train.keep=5",
        "train.log_every=2",
        "mesh.fsdp=2",
        "train.eval_records=4",
    )
    assert pretrain(run_config("anchor", prepared["public"], *looks), finished)["step"] == 20


def test_a_run_goes_on_on_another_mesh(prepared, uninterrupted, tmp_path):
    """Eight steps on each of three; parameters, moments and counters are laid out anew from what
    was saved."""
    for last, mesh in (
        (8, ("mesh.fsdp=8",)),
        (16, ("mesh.fsdp=4", "mesh.tensor=2")),
        (20, ("mesh.data=2", "mesh.fsdp=4")),
    ):
        config = run_config("anchor", prepared["public"], *EVERY, *mesh)
        train_until(last, pretrain, config, tmp_path / "run")
    assert [entry["step"] for entry in read_metrics(tmp_path / "run") if "loss" in entry] == list(
        range(1, 21)
    )
    on_one, on_three = saved(uninterrupted, 20), saved(tmp_path / "run", 20)
    for name, array in on_one.items():
        np.testing.assert_allclose(
            on_three[name], array, rtol=1e-4, atol=1e-4 * np.abs(array).max(), err_msg=name
        )


def test_a_pair_may_not_go_on_with_another_anchor_at_the_same_path(
    anchor, anchor32, prepared, pair_runs, tmp_path
):
    here, run = tmp_path / "anchor", tmp_path / "run"
    here.symlink_to(anchor)
    config = pair_config(here, prepared["code"], "code", "train.steps=2")
    train_pair(config, run)
    here.unlink()
    here.symlink_to(anchor32)
    with pytest.raises(UserError, match="was trained against"):
        train_pair(config, run)


def test_a_joint_run_with_fewer_active_experts_than_it_has_trains_and_loads(prepared, tmp_path):
    moe = (
        "model.n_experts=3",
        "model.n_active=2",
        "optim.load_balance=0.01",
        "train.steps=4",
        "mesh.fsdp=2",
        "mesh.expert=1",
    )
    result = pretrain(run_config("joint", prepared["public"], *moe), tmp_path / "run")
    assert np.isfinite(result["bits_per_byte"]["public"])
    entries = [entry for entry in read_metrics(tmp_path / "run") if "loss" in entry]
    assert len(entries) == 4
    assert set(entries[-1]["router_share"]) == {"anchor", "expert1", "expert2"}
    params = flatten(open_artifact(tmp_path / "run").params())
    assert params["experts/gate"].shape[1] == 3 and all(
        np.isfinite(np.asarray(a)).all() for a in params.values()
    )


def test_router_tuning_trains_rows_and_biases_and_nothing_else(model, prepared, tmp_path):
    sources = f"data.train=[{{path: {prepared['public']}}}, {{path: {prepared['code']}}}]"
    run = run_config(
        "router", prepared["public"], sources, "train.steps=3", router={"model": str(model)}
    )
    result = train_router(run, tmp_path / "run")
    tuned = open_artifact(tmp_path / "run")
    assert set(tuned.description["tensors"]) == {"experts/row", "experts/bias"}
    before, after = flatten(open_artifact(model).params()), flatten(tuned.params())
    assert before.keys() == after.keys() and tuned.experts == open_artifact(model).experts
    changed = {
        path
        for path in before
        if np.asarray(before[path], np.float32).tobytes()
        != np.asarray(after[path], np.float32).tobytes()
    }
    assert changed == {"experts/row", "experts/bias"}

    # It trains and scores with all four experts active, of which the model uses two: their
    # probabilities add up to 1.
    shares = [entry["router_share"] for entry in read_metrics(tmp_path / "run") if "loss" in entry]
    assert len(shares) == 3 and tuned.config.n_active == 2
    assert [sum(share.values()) for share in shares] == pytest.approx([1, 1, 1], rel=1e-5)
    records = open_records(prepared["code"], "heldout")
    of_all, of_two = (
        score_records(
            functools.partial(make_scorer(tuned.config, active), tuned.params()),
            records,
            tuned.tokenizer,
        ).bits_per_byte
        for active in (4, 2)
    )
    assert result["bits_per_byte"]["code"] == pytest.approx(of_all, rel=1e-5)
    assert of_two != pytest.approx(of_all, rel=1e-4)


@pytest.mark.parametrize(
    ("number", "code"),
    [pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow), (signal.SIGTERM, 42)],
)
def test_a_signal_saves_and_exits_and_the_same_command_goes_on(prepared, tmp_path, number, code):
    config = run_config("anchor", prepared["public"], "train.steps=400", "train.log_every=1")
    (tmp_path / "run.yaml").write_text(dump_yaml(config))
    arguments = ["train", str(tmp_path / "run.yaml"), "--out", str(tmp_path / "run")]
    process = subprocess.Popen(
        [sys.executable, "-c", STARTED, *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ,
    )
    try:
        deadline = time.monotonic() + 120
        while (
            len(read_metrics(tmp_path / "run")) < 3
            and process.poll() is None
            and time.monotonic() < deadline
        ):
            time.sleep(0.01)
        process.send_signal(number)
        _, told = process.communicate(timeout=120)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == code, told
    step = open_artifact(tmp_path / "run").step()
    assert (
        3 <= step < 400
        and f"stopped by a signal at step {step}" in told
        and "Traceback" not in told
    )
    assert main(arguments) == 0
    steps = [entry["step"] for entry in read_metrics(tmp_path / "run") if "loss" in entry]
    assert steps == list(range(1, 401)) and open_artifact(tmp_path / "run").step() == 400
