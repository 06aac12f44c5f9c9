"""How long the records were that a model was trained on: it is kept with the model, raw documents
are scored in records of that length, and longer ones are told."""

import json
import shutil
from typing import Any

import numpy as np
import pytest

from flexolmo_jax.artifact import open_artifact
from flexolmo_jax.coordinator.merge import opt_out
from flexolmo_jax.data.prepare import prepare
from flexolmo_jax.description import DESCRIPTION, read_description, read_sealed, sealed_json
from flexolmo_jax.errors import UserError
from flexolmo_jax.evals.bits_per_byte import evaluate, raw_seq_len
from flexolmo_jax.exchange.anchor import open_anchor, publish
from flexolmo_jax.integrity import fingerprint_of, parts_of
from flexolmo_jax.loaded import load
from flexolmo_jax.runtime.progress import note_once
from tests.tiny import MODEL, SEQ_LEN, documents, write_jsonl


@pytest.fixture(autouse=True)
def unsaid():
    """What other tests were told once is told here again."""
    note_once.cache_clear()


def test_it_goes_from_a_run_to_its_anchor_and_every_model_of_it(
    anchor_run, anchor, pair_runs, model, tmp_path
):
    dropped = opt_out(model, ["law"], tmp_path / "dropped").path
    again = publish(anchor, [write_jsonl(tmp_path / "p.jsonl", documents("public", 60))],
                    tmp_path / "again").path  # fmt: skip
    for path in (anchor_run, anchor, pair_runs["code"], model, dropped, again):
        assert open_artifact(path).trained_seq_len == SEQ_LEN < MODEL["max_seq_len"]
        assert raw_seq_len(load(path)) == SEQ_LEN


def test_the_fingerprint_does_not_depend_on_it(anchor, tmp_path):
    description = read_description(anchor)[0]
    assert description["seq_len"] == SEQ_LEN
    assert fingerprint_of(parts_of(description)) == description["fingerprint"]
    assert "seq_len" not in parts_of(description)


def test_an_anchor_of_an_earlier_version_has_none_and_is_used_as_before(anchor, tmp_path):
    earlier = tmp_path / "earlier"
    shutil.copytree(anchor, earlier)
    description = read_sealed(earlier / DESCRIPTION)
    del description["seq_len"]
    (earlier / DESCRIPTION).write_text(sealed_json(description))
    opened = open_anchor(earlier)
    assert opened.fingerprint == open_anchor(anchor).fingerprint
    assert opened.trained_seq_len is None
    assert raw_seq_len(load(earlier)) == MODEL["max_seq_len"]


@pytest.mark.parametrize("length", [1, 65, "32", None])
def test_one_that_the_model_cannot_have_is_refused(length, anchor, tmp_path):
    description = json.loads((anchor / DESCRIPTION).read_text()) | {"seq_len": length}
    (tmp_path / DESCRIPTION).write_text(sealed_json(description))
    with pytest.raises(UserError, match="seq_len"):
        read_description(tmp_path)


def test_longer_records_and_ids_are_told(model, tiny_tokenizer, tmp_path, capfd):
    loaded = load(model)
    source = write_jsonl(tmp_path / "long.jsonl", documents("law", 40))
    prepare([source], tiny_tokenizer, 48, tmp_path / "long", heldout=0.5)
    how: dict[str, Any] = {"limit": 1, "batch_size": 1}
    evaluate(loaded, [tmp_path / "long"], **how)
    told = "longer than the 32 tokens of the records that the model was trained on"
    assert f"long has records {told}" in capfd.readouterr().err
    loaded.logits(np.zeros((1, SEQ_LEN + 1), np.int32))
    assert f"ids are {told}" in capfd.readouterr().err
    evaluate(loaded, [source], split="all", **how)
    loaded.logits(np.zeros((1, SEQ_LEN), np.int32))
    assert told not in capfd.readouterr().err
