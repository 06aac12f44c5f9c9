"""What is named for evaluation is evaluated on whole, or a line says what of it is."""

import json
import shutil
from pathlib import Path

import pytest

from flexolmo_jax.config import DataConfig, Dataset
from flexolmo_jax.data.documents import digest_of, is_heldout
from flexolmo_jax.data.prepare import prepare
from flexolmo_jax.data.records import open_records
from flexolmo_jax.description import DESCRIPTION, read_sealed, sealed_json
from flexolmo_jax.runtime.progress import note_once
from flexolmo_jax.train.pretrain import pretrain
from flexolmo_jax.train.sources import open_sources
from tests.tiny import SEQ_LEN, documents, run_config, write_jsonl


@pytest.fixture(autouse=True)
def unsaid():
    """What other tests were told once is told here again."""
    note_once.cache_clear()


@pytest.fixture
def sets(corpora, prepared, tiny_tokenizer):
    """Opens what a run on these is evaluated on; trains on prepared public text by default."""

    def opened(*eval_paths: Path, train: Path = prepared["public"], **options):
        given = tuple(Dataset(path=str(path)) for path in eval_paths)
        data = DataConfig(train=(Dataset(path=str(train)),), eval=given, seq_len=SEQ_LEN)
        return open_sources(data, tiny_tokenizer, 0, **options)[1]

    return opened


def few(path: Path, domain: str) -> Path:
    """Documents of which none is held out."""
    texts = documents(domain, 30, seed=3)
    return write_jsonl(path, [text for text in texts if not is_heldout(digest_of(text))][:20])


def test_a_file_named_in_data_eval_is_scored_whole(sets, tmp_path, capfd):
    found = sets(few(tmp_path / "few.jsonl", "law"))
    assert found["few"].stats.documents == 20
    assert "documents are scored" not in capfd.readouterr().err


def test_of_a_file_that_is_trained_on_only_held_out_documents_are_scored(
    sets, corpora, tmp_path, capfd
):
    """Whatever it is called and wherever it lies: its content tells."""
    (tmp_path / "all").mkdir()
    copy = Path(shutil.copy(corpora["public"], tmp_path / "all" / "copy.jsonl"))
    few(tmp_path / "all" / "few.jsonl", "law")
    found = sets(copy, tmp_path / "all")
    told = capfd.readouterr().err
    for name, path, total in (("copy", copy, 160), ("all", tmp_path / "all", 180)):
        own = found[name].stats.documents
        assert 0 < own < total / 5
        assert f"{path}: {own} of {total} documents are scored, those held out" in told


def test_what_the_base_has_learnt_from_is_scored_by_its_held_out_documents(
    sets, corpora, prepared, anchor
):
    (whole,) = sets(corpora["public"], train=prepared["law"]).values()
    (part,) = sets(corpora["public"], train=prepared["law"], learnt=[anchor / "public"]).values()
    assert whole.stats.documents == 160 and 0 < part.stats.documents < 40


def test_a_prepared_directory_keeps_its_held_out_part(
    sets, prepared, tiny_tokenizer, tmp_path, capfd
):
    (part,) = sets(prepared["care"]).values()
    assert len(part) == len(open_records(prepared["care"], "heldout"))
    assert f"{prepared['care']}: {part.stats.documents} of 160 documents" in capfd.readouterr().err
    text = write_jsonl(tmp_path / "unsplit.jsonl", documents("law", 30))
    prepare([text], tiny_tokenizer, SEQ_LEN, tmp_path / "unsplit", heldout=0)
    (whole,) = sets(tmp_path / "unsplit").values()
    assert whole.stats.documents == 30


def test_a_source_of_which_nothing_is_held_out_is_told(sets, tmp_path, capfd):
    path = few(tmp_path / "trained.jsonl", "law")
    for named in ((), (path,)):
        assert sets(*named, train=path) == {}
    told = f"warning: {path}: none of its 20 documents is held out, so nothing is evaluated on it"
    assert capfd.readouterr().err.count(told) == 1


def test_a_run_that_noted_no_unscored_set_goes_on(prepared, tiny_tokenizer, tmp_path):
    """As earlier versions, which left a set out where nothing of it was held out."""
    tiny_tokenizer.save(tmp_path / "tokenizer.json")
    named = f"data.eval=[{{path: {few(tmp_path / 'few.jsonl', 'law')}}}]"
    tokenizer = f"data.tokenizer={tmp_path / 'tokenizer.json'}"
    run = run_config("anchor", prepared["public"], "train.steps=1", named, tokenizer)
    assert pretrain(run, tmp_path / "run")["bits_per_byte"]["few"] > 0
    file = tmp_path / "run" / DESCRIPTION
    description = read_sealed(file)
    del description["inputs"]["data.eval[0].path"]
    file.write_text(sealed_json(description))
    assert pretrain(run, tmp_path / "run")["bits_per_byte"]["few"] > 0
    assert "data.eval[0].path" in json.loads(file.read_text())["inputs"]
