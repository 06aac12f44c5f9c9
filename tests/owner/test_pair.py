"""What a pair starts from and is trained beside: the choices that ablations switch off."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from flexolmo_jax.artifact import open_artifact
from flexolmo_jax.config import RunConfig
from flexolmo_jax.coordinator.router import train_router
from flexolmo_jax.data.records import open_records
from flexolmo_jax.errors import UserError
from flexolmo_jax.model import forward
from flexolmo_jax.model.tree import flatten
from flexolmo_jax.owner import pair as pair_module
from flexolmo_jax.owner.pair import initial_row, train_pair
from flexolmo_jax.plan.report import plan_training, size_of
from flexolmo_jax.runtime.sharding import make_mesh
from flexolmo_jax.runtime.tpus import slice_of
from flexolmo_jax.train.feed import Feed
from flexolmo_jax.train.job import Job
from flexolmo_jax.train.metrics import read_metrics
from flexolmo_jax.train.pretrain import pretrain
from flexolmo_jax.train.state import abstract_params
from tests.tiny import Held, pair_config, run_config

OTHERS = 2**13  # bytes of a batch and of constants; the anchor has 2**16.5, a device of 8 2**13.5


def test_rows_of_hidden_states_are_what_the_routers_read_on_average(anchor32, prepared):
    run = pair_config(anchor32, prepared["law"], "law", "pair.row=hidden")
    assert run.pair is not None
    artifact = open_artifact(anchor32)
    rows = np.asarray(initial_row(run.pair, run, artifact))
    params = artifact.params()
    own = np.asarray(params["experts"]["row"])[:, 0]
    np.testing.assert_allclose(
        np.linalg.norm(rows, axis=-1), np.linalg.norm(own, axis=-1), rtol=1e-5
    )
    records = open_records(prepared["law"], "train")
    batch = [records[i] for i in np.random.default_rng(0).permutation(len(records))[:64].tolist()]
    tokens, segments = (
        jnp.stack([record[key] for record in batch]) for key in ("tokens", "segments")
    )

    def log_z(layer: int, change: np.ndarray) -> np.ndarray:
        """Of a dense model: row . hidden state."""
        changed = {
            "row": params["experts"]["row"].at[layer, 0].add(jnp.asarray(change, jnp.float32))
        }
        return np.asarray(
            forward(
                artifact.config, params | {"experts": params["experts"] | changed}, tokens, segments
            ).router.log_z
        )

    for layer in (0, 1):
        unit = np.eye(32)[:6]
        of_first = [
            ((log_z(layer, e) - log_z(layer, 0 * e))[layer] * (segments > 0)).sum() for e in unit
        ]
        cosine = (
            np.dot(of_first, rows[layer, :6])
            / np.linalg.norm(of_first)
            / np.linalg.norm(rows[layer, :6])
        )
        assert cosine > 0.999


@pytest.mark.parametrize(
    "mesh",
    [
        pytest.param(("mesh.fsdp=8",), marks=pytest.mark.slow),
        ("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2"),
    ],
)
def test_rows_of_hidden_states_are_the_same_on_a_mesh_and_no_device_holds_all_of_the_anchor(
    mesh, anchor, prepared, held: Held
):
    def run(*overrides: str) -> RunConfig:
        return pair_config(anchor, prepared["law"], "law", "pair.row=hidden", *overrides)

    # 64 records in batches of 8, and of 24, the last of which is filled up
    padded = ("data.batch_size=48", "train.accumulate=2", *mesh)
    artifact, alone, spread = open_artifact(anchor), run(), run(*padded)
    assert len(open_records(prepared["law"], "train")) >= pair_module.HIDDEN_RECORDS
    assert alone.pair is not None and spread.pair is not None
    expected = np.asarray(initial_row(alone.pair, alone, artifact))
    found = held(pair_module, "put_whole_batch")
    rows = np.asarray(initial_row(spread.pair, spread, artifact))
    np.testing.assert_allclose(rows, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    shardings = make_mesh(spread.mesh)
    params = abstract_params(artifact.config, shardings, pair=False, dtype=lambda _: "bfloat16")
    assert size_of(params) <= min(found) <= max(found) <= size_of(params) + OTHERS


def test_rows_of_hidden_states_need_a_microbatch_that_divides_over_the_mesh(anchor, prepared):
    run = pair_config(anchor, prepared["law"], "law", "pair.row=hidden", "mesh.fsdp=3")
    assert run.pair is not None
    with pytest.raises(UserError, match="does not divide over the 3 devices"):
        initial_row(run.pair, run, open_artifact(anchor))


LONG = ("data.seq_len=128", "model.max_seq_len=4096")  # the tiny models read 64 tokens


@pytest.mark.parametrize("kind", ["pair", "router", "anchor", "plan"])
def test_records_are_no_longer_than_what_a_run_starts_from_reads(
    kind, anchor, model, anchor_run, corpora, tmp_path
):
    def start() -> object:
        if kind == "router":
            run = run_config("router", corpora["law"], *LONG, router={"model": str(model)})
            return train_router(run, tmp_path / "run")
        if kind == "anchor":
            init = f"train.init={anchor_run}"
            return pretrain(run_config("anchor", corpora["law"], *LONG, init), tmp_path / "run")
        run = pair_config(anchor, corpora["law"], "law", *LONG, "pair.public_share=0")
        if kind == "plan":
            return plan_training(run, slice_of("v5e:1x1"))
        return train_pair(run, tmp_path / "run")

    with pytest.raises(UserError, match=r"seq_len is 128; expected at most .* \(64\)"):
        start()


def test_an_anchor_may_read_longer_records_than_a_configs_default_model(anchor, prepared):
    run = pair_config(anchor, prepared["law"], "law", "data.seq_len=48")
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, max_seq_len=32), stated=())
    assert run.of_model(open_artifact(anchor).config, "the anchor").data.seq_len == 48


@pytest.mark.parametrize("beside", [True, False])
def test_an_expert_trained_alone_has_all_the_weight_and_leaves_its_router_as_it_was(
    beside, anchor, prepared, tmp_path
):
    run = pair_config(
        anchor,
        prepared["law"],
        "law",
        f"pair.beside_anchor={str(beside).lower()}",
        "train.steps=3",
        "optim.router_z_loss=0",
    )
    assert run.pair is not None and run.pair.is_contrasted == beside
    train_pair(run, tmp_path / "run")
    trained = flatten(open_artifact(tmp_path / "run").trained())
    row = np.asarray(initial_row(run.pair, run, open_artifact(anchor)), np.float32)
    unchanged = np.array_equal(
        np.asarray(trained["expert/row"])[:, 0], np.broadcast_to(row, (2, 32))
    )
    share = read_metrics(tmp_path / "run")[0]["router_share"]
    assert unchanged == (not beside) and (share["law"] == 1.0) == (not beside)
    assert not np.array_equal(
        trained["expert/gate"],
        np.asarray(open_artifact(anchor).params()["experts"]["gate"], np.float32),
    )


def test_the_owners_text_belongs_to_the_new_expert_and_public_text_to_the_anchors(
    anchor, prepared, tmp_path, monkeypatch
):
    """A batch's records are told apart by their tokens: no two domains share a sentence."""
    jobs: list[Job] = []
    monkeypatch.setattr(pair_module, "train", lambda job, *_: jobs.append(job))
    run = pair_config(anchor, prepared["law"], "law", "pair.contrast=0.5", "pair.public_share=0.25")
    train_pair(run, tmp_path / "run")
    records = open_records(prepared["law"], "train")
    of_owner = {records[i]["tokens"].tobytes() for i in range(len(records))}
    feed = Feed(jobs[0], make_mesh(run.mesh), 0)
    batches = [feed.next() for _ in range(4)]
    feed.close()
    is_owners = [
        np.asarray(tokens, np.int32).tobytes() in of_owner
        for batch in batches
        for tokens in batch["tokens"]
    ]
    assert 0 < sum(is_owners) < len(is_owners)
    expert, weight = (
        np.concatenate([batch[key] for batch in batches]) for key in ("expert", "expert_weight")
    )
    np.testing.assert_array_equal(expert, np.where(is_owners, 1, 0))
    expected = np.where(is_owners, 0.5 * 0.4 / 0.75, 0.5 * 0.6 / 0.25)
    np.testing.assert_allclose(weight, expected, rtol=1e-6)
