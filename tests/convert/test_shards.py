"""Which files of a folder hold the weights, where more lie there than the model's own."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from flexolmo_jax.convert.exporting import export_hf
from flexolmo_jax.convert.importing import ADAPTER, EMBEDDING, HEAD, INDEX, WHOLE, import_hf
from flexolmo_jax.errors import UserError
from tests.convert.conftest import DENSE

NORM = "model.norm.weight"


@pytest.fixture
def both(checkpoint, tmp_path) -> Path:
    """Shards with an index, and a newer model in one file, whose norm is 2."""
    newer = checkpoint(DENSE, name="newer", change=lambda t, _: t.update({NORM: 2 * t[NORM]}))
    older = import_hf(checkpoint(DENSE, name="older"), tmp_path / "older-model").path
    export_hf(older, tmp_path / "hf", max_shard_size=20_000)
    assert (tmp_path / "hf" / INDEX).exists()
    shutil.copy(newer / WHOLE, tmp_path / "hf")
    return tmp_path / "hf"


def norm_of(path: Path) -> float:
    return float(import_hf(path, path.with_name("out")).arrays()["trunk/norm/scale"][0])


@pytest.mark.parametrize("kept", ["an index", "no index"])
def test_one_whole_file_goes_before_older_shards_with_a_word(both, capsys, kept):
    if kept == "no index":
        (both / INDEX).unlink()
    assert norm_of(both) == 2
    told = capsys.readouterr().err
    assert f"passed over in {both}: model-00001-of-" in told
    assert "the weights are in model.safetensors" in told


@pytest.mark.parity
def test_transformers_takes_the_same_file(both):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(both, dtype="float32")
    assert theirs.model.norm.weight[0].item() == norm_of(both) == 2


def test_an_index_that_names_the_whole_file_is_followed(checkpoint, tmp_path, capsys):
    source = checkpoint(DENSE)
    tensors = load_file(source / WHOLE)
    save_file({NORM: tensors.pop(NORM)}, source / "rest.safetensors", {"format": "pt"})
    save_file(tensors, source / WHOLE, {"format": "pt"})
    index = dict.fromkeys(tensors, WHOLE) | {NORM: "rest.safetensors"}
    (source / INDEX).write_text(json.dumps({"weight_map": index}))
    assert norm_of(source) == 1 and "passed over" not in capsys.readouterr().err


def test_shards_of_two_models_without_an_index_are_refused(both, tmp_path):
    (both / INDEX).unlink()
    (both / WHOLE).unlink()
    shutil.copy(next(both.glob("*.safetensors")), both / "model-00001-of-00099.safetensors")
    with pytest.raises(UserError, match=r"model-\*-of-000.. and model-\*-of-00099, and no model"):
        import_hf(both, tmp_path / "model")


def test_files_beside_those_of_the_index_are_told(both, capsys):
    (both / WHOLE).rename(both / "model-00001-of-00099.safetensors")
    (both / "pytorch_model.bin").write_bytes(b"pickle")
    assert norm_of(both) == 1
    assert (
        "model-00001-of-00099.safetensors, pytorch_model.bin; the weights are in model-00001-of-0"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize("change", ["a shard is missing", "in two shards", "in no shard"])
def test_shards_that_are_not_one_model_are_refused(both, tmp_path, change):
    (both / WHOLE).unlink()
    named = json.loads((both / INDEX).read_text())["weight_map"][NORM]
    tensors = load_file(both / named)
    if change == "a shard is missing":
        (both / named).unlink()
    elif change == "in two shards":
        other = next(file for file in sorted(both.glob("*.safetensors")) if file.name != named)
        save_file(load_file(other) | {NORM: tensors[NORM]}, other, {"format": "pt"})
    else:
        save_file({n: t for n, t in tensors.items() if n != NORM}, both / named)
    told = {
        "a shard is missing": f"misses {named}; download the whole checkpoint, or remove",
        "in two shards": f"{NORM} is in .* and in .*; remove the file",
        "in no shard": f"misses tensors: {NORM}",
    }[change]
    with pytest.raises(UserError, match=told):
        import_hf(both, tmp_path / "model")


def test_other_files_beside_the_whole_one_are_told_and_not_read(checkpoint, capsys):
    source = checkpoint(DENSE)  # as Mistral's, which have their own form too
    save_file({"tok_embeddings.weight": np.ones(2)}, source / "consolidated.safetensors")
    assert norm_of(source) == 1
    assert "consolidated.safetensors; the weights are in model.safetensors" in (
        capsys.readouterr().err
    )


def test_rotary_frequencies_in_older_files_are_passed_over(checkpoint, tmp_path, capsys):
    def with_buffers(tensors, _):
        for layer in range(DENSE.n_layers):
            name = f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"
            tensors[name] = np.ones(4, np.float32)

    plain, old = checkpoint(DENSE), checkpoint(DENSE, name="old", change=with_buffers)
    models = [import_hf(path, path.with_name(f"{path.name}-model")) for path in (plain, old)]
    assert models[0].description == models[1].description
    assert "cast from" not in capsys.readouterr().err


@pytest.mark.parametrize("with_weights", [True, False])
def test_an_adapter_is_refused_by_name(checkpoint, tmp_path, with_weights):
    source = checkpoint(DENSE)
    (source / ADAPTER).write_text("{}")
    if not with_weights:
        (source / WHOLE).rename(source / "adapter_model.safetensors")
        (source / "config.json").unlink()
    with pytest.raises(UserError, match=r"an adapter \(adapter_config.json\).*merge_and_unload"):
        import_hf(source, tmp_path / "model")


def tied(change: Callable[[dict], object]) -> Callable[[dict, dict], None]:
    def edit(tensors, fields):
        fields["tie_word_embeddings"] = True
        change(tensors)

    return edit


def test_a_tied_head_may_have_either_name_or_both(checkpoint, tmp_path):
    changes = {
        "embedding": lambda t: t.pop(HEAD),
        "head": lambda t: t.update({HEAD: t.pop(EMBEDDING)}),
        "both": lambda t: t.update({HEAD: t[EMBEDDING].copy()}),
    }
    found = [
        import_hf(checkpoint(DENSE, name=name, change=tied(change)), tmp_path / f"{name}-model")
        for name, change in changes.items()
    ]
    assert found[0].config.tied_head
    assert found[0].description == found[1].description == found[2].description


def test_a_head_that_is_not_the_embedding_it_is_said_to_be_is_refused(checkpoint, tmp_path):
    other = checkpoint(DENSE, change=tied(lambda t: t.update({HEAD: 2 * t[EMBEDDING]})))
    with pytest.raises(UserError, match=f"{HEAD} is not {EMBEDDING}, .*tie_word_embeddings to fal"):
        import_hf(other, tmp_path / "model")
