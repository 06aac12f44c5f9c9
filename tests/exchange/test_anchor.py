"""Publishing: one fingerprint over every part, the same whenever the same is published."""

import copy
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from flexolmo_jax.artifact import open_artifact
from flexolmo_jax.coordinator.verify import verify
from flexolmo_jax.data.documents import digest_of, is_heldout
from flexolmo_jax.data.records import sha256_of
from flexolmo_jax.description import canonical_json
from flexolmo_jax.errors import UserError
from flexolmo_jax.exchange.anchor import embed_domain, open_anchor, publish
from flexolmo_jax.exchange.embedder import domain_embedding, load_embedder
from flexolmo_jax.integrity import embedder_digest, fingerprint_of
from flexolmo_jax.loaded import load
from flexolmo_jax.model.tree import flatten, unflatten
from tests.tiny import documents, write_jsonl


def digests(params: dict[str, Any]) -> dict[str, dict[str, Any]]:
    arrays = {path: np.asarray(a) for path, a in flatten(params).items()}
    return {
        path: {
            "dtype": str(a.dtype),
            "shape": list(a.shape),
            "sha256": hashlib.sha256(a.tobytes()).hexdigest(),
        }
        for path, a in arrays.items()
    }


def parts_of(anchor: Path) -> dict:
    opened = open_anchor(anchor)
    public = {
        name: sha256_of(anchor / "public" / name)
        for name in ("train.tokens.npy", "train.segments.npy")
    }
    return {
        "model": opened.description["model"],
        "tensors": digests(opened.params()),
        "tokenizer": opened.tokenizer.digest,
        "embedder": embedder_digest(anchor / "embedder"),
        "public": hashlib.sha256(canonical_json(public).encode()).hexdigest(),
    }


def test_publishing_twice_gives_the_same_fingerprint(anchor, anchor_run, corpora, tmp_path):
    again = publish(anchor_run, [corpora["public"]], tmp_path / "again")
    assert again.fingerprint == open_anchor(anchor).fingerprint
    assert verify(again.path, anchor)["verified"]


def test_the_fingerprint_changes_with_each_part_and_can_be_recomputed(anchor, anchor32):
    parts = parts_of(anchor)
    own = open_anchor(anchor).fingerprint
    assert fingerprint_of(parts) == own != open_anchor(anchor32).fingerprint
    params = flatten(open_anchor(anchor).params())
    for path in ("trunk/embedding", "experts/gate", "experts/row"):
        changed = params | {path: params[path].at[(0,) * params[path].ndim].add(0.5)}
        assert fingerprint_of(parts | {"tensors": digests(unflatten(changed))}) != own, path
    renamed = {("trunk/other" if k == "trunk/embedding" else k): v for k, v in params.items()}
    assert fingerprint_of(parts | {"tensors": digests(unflatten(renamed))}) != own
    for key, value in {
        "tokenizer": "0" * 64,
        "embedder": "0" * 64,
        "model": parts["model"] | {"rope_theta": 1e4},
    }.items():
        assert fingerprint_of(parts | {key: value}) != own, key
    assert fingerprint_of(copy.deepcopy(parts)) == own


def test_an_anchor_is_its_run_cast_once_with_the_mean_public_embedding_in_row_0(anchor, anchor_run):
    released, trained = (
        flatten(open_anchor(anchor).params()),
        flatten(open_artifact(anchor_run).params()),
    )
    row = released.pop("experts/row")
    for path, array in released.items():
        assert array.dtype == jnp.bfloat16
        np.testing.assert_array_equal(
            np.asarray(array), np.asarray(trained[path].astype(jnp.bfloat16)), err_msg=path
        )
    learnt_from = [text for text in documents("public", 160) if not is_heldout(digest_of(text))]
    mean = domain_embedding(load_embedder(anchor / "embedder"), learnt_from)
    np.testing.assert_array_equal(
        np.asarray(row[:, 0]), np.broadcast_to(mean.astype(row.dtype), (2, 32))
    )
    assert np.isfinite(load(anchor).logits(np.zeros((1, 4), np.int32))).all()


@pytest.mark.parametrize(
    "file",
    [
        "tokenizer.json",
        "embedder/embedder.json",
        "embedder/embedder.npz",
        "public/train.tokens.npy",
    ],
)
def test_a_changed_file_beside_the_weights_is_found(anchor, tmp_path, file):
    changed = Path(shutil.copytree(anchor, tmp_path / "anchor"))
    content = bytearray((changed / file).read_bytes())
    if file == "tokenizer.json":  # another merge order is still a valid tokenizer
        fields = json.loads(content)
        fields["model"]["merges"][0], fields["model"]["merges"][1] = (
            fields["model"]["merges"][1],
            fields["model"]["merges"][0],
        )
        content = bytearray(json.dumps(fields).encode())
    else:
        content[len(content) // 2] ^= 1
    (changed / file).write_bytes(content)
    with pytest.raises(UserError):
        verify(changed)


def test_a_model_with_experts_and_an_unknown_dtype_are_refused(
    model, anchor_run, pair_runs, corpora, tmp_path
):
    for source in (model, pair_runs["code"]):
        with pytest.raises(UserError, match="dense"):
            publish(source, [corpora["public"]], tmp_path / "out")
    with pytest.raises(UserError, match="float16"):
        publish(anchor_run, [corpora["public"]], tmp_path / "out", dtype="float16")
    with pytest.raises(UserError, match="expected a published anchor"):
        open_anchor(model)
    assert not (tmp_path / "out").exists()


def test_what_is_held_out_for_evaluation_leaves_no_trace_in_an_anchor_and_no_row(
    anchor, anchor_run, corpora, tmp_path
):
    held_out = next(
        text for i in range(1000) if is_heldout(digest_of(text := f"{i} " + "qxyzzyq " * 200))
    )
    corpus = write_jsonl(tmp_path / "more.jsonl", [*documents("public", 160), held_out])
    published = publish(anchor_run, [corpus], tmp_path / "anchor")
    assert published.fingerprint == open_anchor(anchor).fingerprint
    assert (
        publish(anchor_run, [corpus], tmp_path / "all", heldout=0).fingerprint
        != published.fingerprint
    )
    rows = [
        embed_domain(anchor, [path], tmp_path / f"{path.stem}.npy")
        for path in (corpora["public"], corpus)
    ]
    np.testing.assert_array_equal(rows[0], rows[1])
