"""A checkpoint without a tokenizer: weights and logits need none, and what does says how to give
one."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from flexolmo_jax import cli
from flexolmo_jax.artifact import open_artifact
from flexolmo_jax.convert.exporting import export_hf
from flexolmo_jax.convert.importing import import_hf
from flexolmo_jax.coordinator.info import info
from flexolmo_jax.coordinator.merge import opt_out
from flexolmo_jax.coordinator.verify import verify
from flexolmo_jax.errors import UserError
from flexolmo_jax.evals.bits_per_byte import evaluate
from flexolmo_jax.exchange.anchor import publish
from flexolmo_jax.loaded import load
from tests.chats import CHATML, with_tokens
from tests.convert.conftest import DENSE, MOE

TOLD = r"has no tokenizer: it was imported without one; import it again with `import-hf --tokenizer"
IDS = np.array([[5, 6, 7, 8]])


@pytest.fixture
def bare(checkpoint) -> Path:
    """A checkpoint without a tokenizer."""
    source = checkpoint(MOE)
    (source / "tokenizer.json").unlink()
    return source


def test_weights_and_logits_need_no_tokenizer(bare, checkpoint, tmp_path, capsys):
    model = import_hf(bare, tmp_path / "model")
    told = capsys.readouterr().err
    assert f"{bare} has no tokenizer.json: the model will have weights and logits, and no" in told
    assert verify(model.path)["verified"] and info(model.path)["kind"] == "model"
    whole = import_hf(checkpoint(MOE, name="whole-hf"), tmp_path / "whole")
    ours, theirs = load(model.path), load(whole.path)
    np.testing.assert_array_equal(ours.logits(IDS), theirs.logits(IDS))
    assert len(ours.generate([[5, 6]], 4)[0]) == 4
    left = opt_out(model.path, ["expert2"], tmp_path / "left")
    assert verify(left.path)["verified"] and "tokenizer" not in left.description
    export_hf(model.path, tmp_path / "back")
    assert {path.name for path in (tmp_path / "back").iterdir()} == {
        "README.md",
        "config.json",
        "model.safetensors",
    }
    theirs, ours = (load_file(path / "model.safetensors") for path in (bare, tmp_path / "back"))
    assert all(ours[name].tobytes() == theirs[name].tobytes() for name in theirs)
    again = import_hf(tmp_path / "back", tmp_path / "again")
    assert again.description == model.description


def test_what_needs_a_tokenizer_says_how_to_give_one(bare, corpora, prepared, tmp_path, capsys):
    path = import_hf(bare, tmp_path / "model").path
    model = load(path)
    for use in (
        lambda: model.generate(["text"]),
        lambda: model.chat([{"role": "user", "content": "hello"}]),
        lambda: model.tokenizer,
        lambda: evaluate(model, [prepared["law"]]),
        lambda: publish(path, [corpora["public"]], tmp_path / "anchor"),
    ):
        with pytest.raises(UserError, match=TOLD):
            use()
    capsys.readouterr()
    assert cli.main(["generate", str(path), "--prompt", "The"]) == 2
    assert "import it again with `import-hf --tokenizer" in capsys.readouterr().err
    assert {file.name for file in tmp_path.iterdir()} == {"hf", "model"}


@pytest.mark.parametrize("given", ["a file", "a folder", "a model"])
def test_a_tokenizer_can_be_given(checkpoint, tiny, tmp_path, given, capsys):
    full = checkpoint(DENSE, name="full")
    with_tokens(tiny / "tokenizer.json", "<|im_start|>", "<|im_end|>").save(full)
    (full / "chat_template.jinja").write_text(CHATML)
    known = import_hf(full, tmp_path / "known")
    bare = checkpoint(DENSE)
    (bare / "tokenizer.json").unlink()
    shutil.copy(tiny / "tokenizer.json", tmp_path / "other.json")
    path = {"a file": full / "tokenizer.json", "a folder": full, "a model": known.path}[given]
    command = ["import-hf", str(bare), str(tmp_path / "model"), "--tokenizer", str(path), "--json"]
    assert cli.main(command) == 0
    assert "has no tokenizer.json" not in capsys.readouterr().err
    model = open_artifact(tmp_path / "model")
    assert model.tokenizer.digest == known.tokenizer.digest and verify(model.path)["verified"]
    assert (model.tokenizer.chat == known.tokenizer.chat) == (given != "a file")
    instead = import_hf(full, tmp_path / "instead", tokenizer_path=tmp_path / "other.json")
    assert instead.tokenizer.vocab_size == 320
    with pytest.raises(UserError, match=r"cannot read .*nowhere"):
        import_hf(bare, tmp_path / "none", tokenizer_path=tmp_path / "nowhere")


def test_a_given_tokenizer_of_more_tokens_than_the_model_is_refused(checkpoint, tiny, tmp_path):
    large = with_tokens(tiny / "tokenizer.json", *(f"<|{i}|>" for i in range(65)))
    large.save(tmp_path / "large.json")
    source = checkpoint(DENSE)
    with pytest.raises(UserError, match=r"large\.json has a tokenizer of 385 tokens and vocab"):
        import_hf(source, tmp_path / "model", tokenizer_path=tmp_path / "large.json")


def test_a_merged_model_that_hides_its_tokenizer_is_refused(model, tmp_path):
    from tests.attacks.forging import copied, redescribed

    copy = copied(model, tmp_path / "copy")
    (copy / "tokenizer.json").unlink()
    redescribed(copy, lambda description: description.pop("tokenizer"))
    for use in (verify, load):
        with pytest.raises(UserError, match="another tokenizer than its anchor"):
            use(copy)
    assert json.loads((copy / "flexolmo.json").read_text())["kind"] == "model"
