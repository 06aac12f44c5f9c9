"""Attacks by whoever renames directories while a command runs. The promise: what is verified is
what runs, and what is remembered as verified was."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any, cast

import pytest

from flexolmo_jax.artifact import Artifact, open_artifact, read_sealed, sealed_json
from flexolmo_jax.convert.exporting import export_hf
from flexolmo_jax.convert.importing import import_hf
from flexolmo_jax.coordinator import composition
from flexolmo_jax.coordinator import verify as verifying
from flexolmo_jax.coordinator.materialize import materialize
from flexolmo_jax.coordinator.merge import append, merge, opt_out
from flexolmo_jax.coordinator.objects import Inventory
from flexolmo_jax.coordinator.receipt import read_receipt
from flexolmo_jax.errors import UserError
from flexolmo_jax.exchange.anchor import embed_domain, open_anchor, publish
from flexolmo_jax.exchange.embedder import TfidfEmbedder, load_embedder
from flexolmo_jax.exchange.signature import keygen
from flexolmo_jax.loaded import load
from flexolmo_jax.owner.pair import initial_row
from flexolmo_jax.owner.proxy import select_proxies
from flexolmo_jax.storage import files, weights
from tests.tiny import pair_config


@pytest.fixture
def mine(model, tmp_path) -> Path:
    return shutil.copytree(model, tmp_path / "mine")


@pytest.fixture
def other(anchor, contributions, tmp_path) -> Path:
    """A model with the same experts' names in another order: all its files have the same names and
    sizes."""
    order = [contributions[name] for name in ("care", "law", "code")]
    return merge(anchor, order, tmp_path / "other", active=2, store_path=tmp_path / "others").path


def experts_in(store: Path) -> set[Path]:
    return {path for path in (store / "objects").iterdir() if Inventory.read(path).kind == "expert"}


def swap(one: Path, other: Path) -> None:
    one.rename(one.with_name("aside"))
    other.rename(one)


@pytest.fixture
def swaps(monkeypatch):
    """Lets two directories change their names when a command has verified the first."""

    def prepare(one: Path, other: Path) -> None:
        ensure = Artifact.ensure

        def then_swap(artifact: Artifact) -> None:
            ensure(artifact)
            if artifact.path == one and other.exists():
                swap(one, other)

        monkeypatch.setattr(Artifact, "ensure", then_swap)

    return prepare


def test_weights_are_those_of_the_directory_that_was_verified(mine, other, swaps):
    """What is verified is what runs: a directory of the same name was loaded instead."""
    swaps(mine, other)
    with pytest.raises(UserError, match=r"not those of its description|changed"):
        load(mine)


def test_what_is_exported_was_verified(mine, other, swaps, tmp_path):
    """What is verified is what runs: a directory of the same name was exported instead."""
    swaps(mine, other)
    with pytest.raises(UserError, match="not those of its description"):
        export_hf(mine, tmp_path / "hf", drop_bias=True)
    assert not (tmp_path / "hf").exists()


def test_a_tokenizer_is_that_of_its_description(mine):
    """What is verified is what runs: it is read when it is first used, long after the weights."""
    artifact = open_artifact(mine)
    artifact.ensure()
    fields = json.loads((mine / "tokenizer.json").read_text())
    vocabulary = fields["model"]["vocab"]
    one, two = list(vocabulary)[-2:]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    (mine / "tokenizer.json").unlink()
    (mine / "tokenizer.json").write_text(json.dumps(fields))
    with pytest.raises(UserError, match="not the one of its description"):
        _ = artifact.tokenizer


@pytest.fixture
def embedders(anchor, tmp_path) -> tuple[Path, Path]:
    """Two anchors of all the same files, but for the weights of the second one's embedder."""
    mine, theirs = (shutil.copytree(anchor, tmp_path / name) for name in ("mine", "theirs"))
    embedder = cast(TfidfEmbedder, load_embedder(theirs / "embedder"))
    shutil.rmtree(theirs / "embedder")
    dataclasses.replace(embedder, idf=embedder.idf + 1).save(theirs / "embedder")
    return mine, theirs


def test_an_embedder_is_that_of_its_anchor(corpora, embedders, swaps, tmp_path):
    """What is verified is what runs: rows came from an embedder that was exchanged meanwhile."""
    swaps(*embedders)
    with pytest.raises(UserError):
        embed_domain(embedders[0], [corpora["law"]], tmp_path / "row.npy")
    assert not (tmp_path / "row.npy").exists()


def test_proxies_are_chosen_by_the_verified_embedder(corpora, embedders, swaps, tmp_path):
    """What is verified is what runs: an embedder that was exchanged meanwhile chose proxies."""
    swaps(*embedders)
    with pytest.raises(UserError):
        select_proxies(embedders[0], [corpora["law"]], [corpora["public"]], tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


def test_a_pairs_row_comes_from_the_verified_embedder(prepared, embedders, swaps):
    """What is verified is what runs: a pair started from the row of an embedder that was exchanged
    meanwhile."""
    run = pair_config(embedders[0], prepared["law"], "law", "pair.row=embedding")
    assert run.pair is not None
    swaps(*embedders)
    verified = open_anchor(embedders[0])
    with pytest.raises(UserError):
        initial_row(run.pair, run, verified)


def test_what_is_published_was_verified(model, corpora, monkeypatch, tmp_path):
    """What is verified is what runs: an anchor was published from another model's weights."""
    export_hf(model, tmp_path / "hf", drop_bias=True)
    import_hf(tmp_path / "hf", tmp_path / "one")
    shard = next((tmp_path / "hf").glob("*.safetensors"))
    values = bytearray(shard.read_bytes())
    for at in range(len(values) - 50_000, len(values), 2):
        values[at] ^= 1
    shard.unlink()
    shard.write_bytes(values)
    import_hf(tmp_path / "hf", tmp_path / "two", names=["code", "law", "care"])

    def swap_and_save(*given: Any, **more: Any) -> dict[str, str]:
        swap(tmp_path / "one", tmp_path / "two")
        return save(*given, **more)

    save = weights.save
    monkeypatch.setattr(weights, "save", swap_and_save)
    with pytest.raises(UserError, match=r"not those of its description|changed"):
        publish(tmp_path / "one", [corpora["public"]], tmp_path / "anchor")
    assert not (tmp_path / "anchor").exists()


@pytest.mark.parametrize("of", ["model", "store"])
def test_what_is_composed_of_is_what_was_verified(
    anchor, contributions, mine, other, tmp_path, monkeypatch, of
):
    """What is verified is what runs: files of another directory got into the new model, which
    counted as verified from then on."""
    store = tmp_path / "store"
    law, code = ([contributions[name]] for name in ("law", "code"))
    merge(anchor, law, tmp_path / "law", store_path=store)
    one = experts_in(store)
    merge(anchor, code, tmp_path / "code", store_path=store)
    pair = (mine, other) if of == "model" else (*one, *(experts_in(store) - one))

    def materialize_others(*given, **more):
        if not (pair[0].with_name("aside")).exists():
            swap(*pair)
        return materialize(*given, **more)

    monkeypatch.setattr(composition, "materialize", materialize_others)
    with pytest.raises((UserError, OSError)):
        if of == "model":
            opt_out(mine, ["law"], tmp_path / "out", store_path=store)
        else:
            merge(anchor, law, tmp_path / "out", store_path=store)
    assert not (tmp_path / "out").exists()


def test_a_receipt_is_read_once(model, tmp_path, monkeypatch):
    """A claim is believed with cause only: a forged receipt was read, and then the signature of the
    one that had taken its place was checked."""
    keygen(tmp_path / "key")
    out = opt_out(
        model, ["law"], tmp_path / "out", sign_key=tmp_path / "key", store_path=tmp_path / "s"
    )
    signed, forged = tmp_path / "signed.json", tmp_path / "receipt.json"
    shutil.copy(out.path / "receipt.json", signed)
    shutil.copy(out.path / "receipt.sig", tmp_path)
    forged.write_text(sealed_json(read_sealed(signed) | {"date": "2000-01-01"}))

    def read_then_swap(path: Path) -> dict[str, Any]:
        receipt = read_receipt(path)
        if signed.exists():
            signed.replace(path)
        return receipt

    monkeypatch.setattr(verifying, "read_receipt", read_then_swap)
    with pytest.raises(UserError, match="is for other bytes"):
        verifying.verify_receipt(forged, out.path)


def test_what_takes_a_new_models_place_does_not_count_as_verified(
    anchor, contributions, model, other, tmp_path
):
    """Nothing is verified that was not: what lay at --out when the command ended was remembered,
    whoever had put it there."""
    forged = shutil.copytree(model, tmp_path / "forged")
    shard = next(
        p for p in sorted(forged.rglob("*")) if "experts.gate/c/" in str(p) and p.is_file()
    )
    values = bytearray(shard.read_bytes())
    values[10] ^= 1
    shard.chmod(0o644)
    shard.write_bytes(values)

    def put(operation: str, path: Path) -> None:
        if operation == "sync" and path == tmp_path and (tmp_path / "out").exists():
            shutil.rmtree(tmp_path / "out")
            forged.rename(tmp_path / "out")

    files.observer = put
    try:
        merge(anchor, list(contributions.values()), tmp_path / "out", active=2)
    except UserError:
        pass
    finally:
        files.observer = None
    assert not forged.exists()
    with pytest.raises(UserError):
        open_artifact(tmp_path / "out").ensure()


def test_a_model_of_copied_files_still_gives_others(mine, contributions, tmp_path):
    """A correct result: linking a model's files is no change of them."""
    store = tmp_path / "store"
    assert opt_out(mine, ["law"], tmp_path / "less", store_path=store).experts[-1] == "care"
    append(tmp_path / "less", contributions["law"], tmp_path / "more", store_path=store)
    load(tmp_path / "more")
