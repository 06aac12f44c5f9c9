"""Router tuning: rows and biases alone, on proxies and public text; who was there is recorded, and
who leaves is left out of the next."""

import numpy as np
import pytest

from flexolmo_jax.artifact import open_artifact, read_sealed
from flexolmo_jax.config import Settings
from flexolmo_jax.coordinator.merge import append, apply_tuning, merge, opt_out, undo_tuning
from flexolmo_jax.coordinator.receipt import EXACT, TUNED
from flexolmo_jax.coordinator.router import train_router, tune
from flexolmo_jax.coordinator.verify import verify, verify_receipt
from flexolmo_jax.errors import UserError
from flexolmo_jax.loaded import load
from flexolmo_jax.model.tree import flatten
from tests.coordinator.test_store import contents
from tests.tiny import DOMAINS, SEQ_LEN, documents, run_config, write_jsonl

SHORT = (
    "train.steps=3",
    "data.batch_size=8",
    f"data.seq_len={SEQ_LEN}",
    "mesh.fsdp=1",
    "optim.lr=0.05",
    "optim.warmup=0",
)


@pytest.fixture(scope="module")
def proxies(tmp_path_factory):
    """Made-up public documents on each owner's subject."""
    folder = tmp_path_factory.mktemp("proxies")
    return {
        domain: write_jsonl(folder / f"{domain}.jsonl", documents(domain, 60, seed=9))
        for domain in DOMAINS
    }


@pytest.fixture(scope="module")
def tuned(model, proxies, corpora, tmp_path_factory):
    return tune(
        model,
        proxies,
        [corpora["public"]],
        tmp_path_factory.mktemp("tuned") / "model",
        settings=Settings(overrides=SHORT),
        store_path=store(model),
    ).path


def store(model):
    return model.parent / "flexolmo-store"


def test_a_tuned_model_differs_from_the_merged_one_in_rows_and_biases_and_says_who_was_there(
    model, tuned
):
    before, after = (flatten(load(path).params) for path in (model, tuned))
    changed = {
        path
        for path in before
        if np.asarray(before[path]).tobytes() != np.asarray(after[path]).tobytes()
    }
    assert changed == {"experts/row", "experts/bias"}
    assert open_artifact(tuned).description["router"]["tuned_with"] == [
        "anchor",
        *DOMAINS,
        "public",
    ]
    assert open_artifact(tuned).experts == open_artifact(model).experts
    assert verify(tuned)["verified"]


def test_who_opts_out_of_a_tuned_model_gets_the_better_grade_when_it_is_tuned_again_without_them(
    model, tuned, proxies, corpora, tmp_path
):
    left = opt_out(tuned, ["law"], tmp_path / "left", store_path=store(model)).path
    receipt = left / "receipt.json"
    assert read_sealed(receipt)["grade"] == verify_receipt(receipt, left)["grade"] == TUNED
    others = {name: path for name, path in proxies.items() if name != "law"}
    retuned = tune(
        left,
        others,
        [corpora["public"]],
        tmp_path / "retuned",
        settings=Settings(overrides=SHORT),
        store_path=store(model),
    ).path
    assert verify_receipt(receipt, retuned)["grade"] == EXACT
    assert open_artifact(retuned).description["router"]["tuned_with"] == [
        "anchor",
        "code",
        "care",
        "public",
    ]
    # ... exactly as if the leaver had never been there.
    never = opt_out(model, ["law"], tmp_path / "never").path
    assert contents(tmp_path / "retuned.work/contributed") == contents(never)
    of_never = tune(
        never,
        others,
        [corpora["public"]],
        tmp_path / "tuned-never",
        settings=Settings(overrides=SHORT),
        store_path=store(model),
    ).path
    assert contents(of_never) == contents(retuned)


def test_proxies_of_who_is_not_there_are_refused_and_a_router_run_from_tuned_rows_keeps_their_trace(
    model, tuned, proxies, corpora, tmp_path
):
    left = opt_out(tuned, ["law"], tmp_path / "left", store_path=store(model)).path
    with pytest.raises(UserError, match="no expert 'law'"):
        tune(
            left,
            proxies,
            [corpora["public"]],
            tmp_path / "no",
            settings=Settings(overrides=SHORT),
            store_path=store(model),
        )
    with pytest.raises(UserError, match="the anchor cannot"):
        tune(
            left,
            {"anchor": proxies["law"]},
            [corpora["public"]],
            tmp_path / "no",
            store_path=store(model),
        )
    run = run_config("router", corpora["public"], "train.steps=2", router={"model": str(left)})
    train_router(run, tmp_path / "run")
    again = apply_tuning(tmp_path / "run", tmp_path / "again", store_path=store(model)).path
    assert verify_receipt(left / "receipt.json", again)["grade"] == TUNED
    assert not (tmp_path / "no").exists()


def test_a_run_on_proxies_of_who_leaves_is_a_trace_even_where_the_expert_was_not_there(
    model, proxies, tmp_path
):
    without = opt_out(model, ["law"], tmp_path / "without").path
    run = run_config("router", proxies["law"], "train.steps=2", router={"model": str(without)})
    train_router(run, tmp_path / "run")
    tuned = apply_tuning(tmp_path / "run", tmp_path / "tuned", store_path=store(model)).path
    assert verify_receipt(without / "receipt.json", without)["grade"] == EXACT
    assert verify_receipt(without / "receipt.json", tuned)["grade"] == TUNED


def test_tuning_can_be_undone_and_opted_out_of_exactly_from_the_store(
    model, tuned, contributions, anchor, tmp_path
):
    assert contents(
        undo_tuning(tuned, tmp_path / "undone", store_path=store(model)).path
    ) == contents(model)
    left = opt_out(tuned, ["law"], tmp_path / "left", untuned=True, store_path=store(model)).path
    never = merge(
        anchor, [contributions["code"], contributions["care"]], tmp_path / "never", active=2
    ).path
    assert contents(left) == contents(never)
    assert (
        verify_receipt(left / "receipt.json", left)["grade"]
        == read_sealed(left / "receipt.json")["grade"]
        == EXACT
    )
    with pytest.raises(UserError, match=r"does not hold the model's anchor; give .*--store"):
        opt_out(
            tuned, ["law"], tmp_path / "no", untuned=True, store_path=tmp_path / "another-store"
        )
    with pytest.raises(UserError, match="is not a router run"):
        apply_tuning(model, tmp_path / "no")


def test_an_expert_appended_to_a_tuned_model_has_the_row_it_was_contributed_with(
    model, tuned, contributions, tmp_path
):
    left = opt_out(tuned, ["care"], tmp_path / "left", store_path=store(model)).path
    more = append(left, contributions["care"], tmp_path / "more", store_path=store(model)).path
    rows = {path: np.asarray(load(path).params["experts"]["row"]) for path in (model, tuned, more)}
    assert rows[more][:, 3].tobytes() == rows[model][:, 3].tobytes() != rows[tuned][:, 3].tobytes()
    assert rows[more][:, :3].tobytes() == rows[tuned][:, :3].tobytes()
    assert verify(more)["verified"]
    assert open_artifact(more).description["router"]["tuned_with"] == ["anchor", *DOMAINS, "public"]
