"""Hugging Face checkpoints on disk, both ways: bit for bit, tensor by tensor; nothing half-written
stays."""

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from flexolmo_jax import cli
from flexolmo_jax.artifact import open_artifact
from flexolmo_jax.config import ModelConfig
from flexolmo_jax.convert.exporting import export_hf
from flexolmo_jax.convert.families import family_of
from flexolmo_jax.convert.huggingface import transposed
from flexolmo_jax.convert.importing import import_hf
from flexolmo_jax.coordinator.merge import append, merge, opt_out
from flexolmo_jax.coordinator.verify import verify
from flexolmo_jax.errors import UserError
from flexolmo_jax.evals.bits_per_byte import evaluate
from flexolmo_jax.exchange.anchor import publish
from flexolmo_jax.exchange.contribution import open_contribution
from flexolmo_jax.loaded import load
from flexolmo_jax.model import forward, init_params
from flexolmo_jax.owner.package import package, package_imported
from flexolmo_jax.owner.pair import train_pair
from flexolmo_jax.storage import files
from tests.convert.conftest import DENSE, MOE
from tests.families import OTHERS, as_family
from tests.tiny import pair_config

NAMES = ("chemistry", "poetry")


def tensors_of(directory: Path) -> dict[str, np.ndarray]:
    found = {}
    for file in directory.glob("*.safetensors"):
        found |= load_file(file)
    return found


def assert_same(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and ours[name].tobytes() == tensor.tobytes(), name


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        *itertools.product((DENSE, MOE), (ml_dtypes.bfloat16, np.float16, np.float32)),
        *((as_family(DENSE, family), ml_dtypes.bfloat16) for family in OTHERS),
        *((as_family(MOE, family), ml_dtypes.bfloat16) for family in ("mistral", "qwen3")),
    ],
    ids=lambda value: family_of(value) if isinstance(value, ModelConfig) else np.dtype(value).name,
)
def test_import_then_export_is_bitwise(checkpoint, config, dtype, tmp_path):
    source = checkpoint(config, dtype)
    model = import_hf(source, tmp_path / "model", NAMES[: config.n_experts - 1])
    assert verify(model.path)["verified"]
    assert model.experts == ("anchor", *NAMES)[: config.n_experts]
    export_hf(model.path, tmp_path / "back", max_shard_size=5_000)
    assert len(list((tmp_path / "back").glob("model-*.safetensors"))) > 3
    assert_same(tensors_of(tmp_path / "back"), tensors_of(source))
    theirs = json.loads((source / "config.json").read_text())
    ours = json.loads((tmp_path / "back" / "config.json").read_text())
    assert all(ours[key] == theirs[key] for key in theirs if "token_id" not in key)
    assert (tmp_path / "back/tokenizer.json").read_text() == (source / "tokenizer.json").read_text()
    again = import_hf(tmp_path / "back", tmp_path / "again", NAMES[: config.n_experts - 1])
    assert {**again.description, "sha256": ""} == {**model.description, "sha256": ""}


def test_what_is_imported_computes_what_the_checkpoint_does(checkpoint, tmp_path):
    model = load(import_hf(checkpoint(MOE, np.float32), tmp_path / "model").path)
    ids = np.random.default_rng(0).integers(300, size=(2, 17))
    params = init_params(MOE, jax.random.key(1))
    np.testing.assert_allclose(
        model.logits(ids), forward(MOE, params, jnp.asarray(ids)).logits, atol=1e-6
    )
    assert model.experts == ("anchor", "expert1", "expert2")


def test_fused_experts_tied_heads_and_indexless_shards_are_read(checkpoint, tmp_path):
    def fuse(tensors, fields):
        for l in range(MOE.n_layers):
            at = f"model.layers.{l}.mlp.experts"
            gate, up, down = (
                [tensors.pop(f"{at}.{e}.{kind}_proj.weight") for e in range(3)]
                for kind in ("gate", "up", "down")
            )
            tensors[f"{at}.gate_up_proj"] = np.concatenate([gate, up], axis=1)
            tensors[f"{at}.down_proj"] = np.stack(down)

    plain = import_hf(checkpoint(), tmp_path / "plain")
    fused = import_hf(checkpoint(name="hf2", change=fuse), tmp_path / "fused")
    assert fused.description == plain.description

    def tie(tensors, fields):  # some such files have the head too
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
        fields["tie_word_embeddings"] = True

    tied = load(import_hf(checkpoint(DENSE, name="hf3", change=tie), tmp_path / "tied").path)
    assert tied.config.tied_head and "head" not in tied.params["trunk"]

    export_hf(plain.path, tmp_path / "shards", max_shard_size=20_000)
    (tmp_path / "shards/model.safetensors.index.json").unlink()
    assert import_hf(tmp_path / "shards", tmp_path / "unindexed").description == plain.description
    next((tmp_path / "shards").glob("model-00002-*")).unlink()
    with pytest.raises(UserError, match="misses model-00002-of"):
        import_hf(tmp_path / "shards", tmp_path / "none")


def test_an_import_is_taken_apart_and_merged_with_a_new_expert(
    checkpoint, corpora, prepared, tmp_path
):
    old = import_hf(checkpoint(), tmp_path / "old", NAMES)
    anchor = publish(old.path, [corpora["public"]], tmp_path / "anchor", seq_len=32)
    assert verify(anchor.path)["verified"]
    parts = [package_imported(old.path, name, anchor.path, tmp_path / name).path for name in NAMES]
    assert open_contribution(parts[0]).manifest["training"] == {"imported": "FlexOlmoForCausalLM"}
    again = merge(anchor.path, parts, tmp_path / "again", active=2)
    assert again.description["tensors"] == old.description["tensors"]
    export_hf(again.path, tmp_path / "back")
    assert_same(tensors_of(tmp_path / "back"), tensors_of(tmp_path / "hf"))

    train_pair(pair_config(anchor.path, prepared["law"], "law", "train.steps=8"), tmp_path / "pair")
    law = package(tmp_path / "pair", tmp_path / "law")
    grown = load(append(again.path, law.path, tmp_path / "grown").path)
    ids = np.random.default_rng(0).integers(300, size=(2, 33))
    before = load(old.path).logits(ids)
    after = grown.logits(ids, without=["law"])
    assert np.abs(after - before).max() <= 1e-5 * np.abs(before).max()
    assert np.abs(grown.logits(ids) - before).max() > 1e-3
    left = opt_out(old.path, ["poetry"], tmp_path / "left")
    assert left.experts == ("anchor", "chemistry") and verify(left.path)["verified"]


def test_an_anchor_in_another_dtype_takes_experts_cast_to_it_and_another_anchor_none(
    checkpoint, corpora, anchor, tmp_path
):
    old = import_hf(checkpoint(MOE, np.float16), tmp_path / "old", NAMES)
    released = publish(old.path, [corpora["public"]], tmp_path / "anchor", dtype="float32")
    part = package_imported(old.path, "poetry", released.path, tmp_path / "poetry")
    merged = load(merge(released.path, [part.path], tmp_path / "merged").path)
    np.testing.assert_array_equal(
        merged.params["experts"]["up"][:, 1],
        np.asarray(load(old.path).params["experts"]["up"][:, 2], np.float32),
    )
    other = import_hf(checkpoint(MOE, np.float32, "hf2"), tmp_path / "other")
    with pytest.raises(UserError, match="is not the anchor of"):
        package_imported(other.path, "expert1", anchor, tmp_path / "none")
    with pytest.raises(UserError, match="is not an imported model"):
        package_imported(merged.artifact.path, "poetry", released.path, tmp_path / "none")


@pytest.mark.parametrize("kind", ["anchor", "run", "pair", "merged"])
def test_everything_we_make_exports_and_comes_back_bitwise(
    kind, anchor, anchor_run, pair_runs, model, tmp_path
):
    source = {"anchor": anchor, "run": anchor_run, "pair": pair_runs["code"], "merged": model}[kind]
    if kind in ("pair", "merged"):
        with pytest.raises(UserError, match="--drop-bias leaves them out"):
            export_hf(source, tmp_path / "hf")
    export_hf(source, tmp_path / "hf", drop_bias=True)
    back, loaded = load(import_hf(tmp_path / "hf", tmp_path / "back").path), load(source)
    params = loaded.params
    if kind == "pair":  # its new expert is cast to the anchor's dtype, as it is when it is packaged
        assert back.config.n_experts == back.config.n_active == 2
        old, new = params["experts"], params["expert"]
        params = params | {
            "experts": {
                name: jnp.concatenate([a, new[name].astype(a.dtype)], 1) for name, a in old.items()
            }
        }
    for branch, name in (("experts", "gate"), ("experts", "down"), ("trunk", "embedding")):
        np.testing.assert_array_equal(back.params[branch][name], params[branch][name])
    np.testing.assert_array_equal(
        back.params["trunk"]["head"]["kernel"], params["trunk"]["head"]["kernel"]
    )
    if kind == "merged":
        np.testing.assert_array_equal(back.params["experts"]["row"], params["experts"]["row"])
        assert "| code |" in (tmp_path / "hf/README.md").read_text() and back.config.n_active == 2


def test_dropping_biases_is_scored_before_and_after(model, prepared, tmp_path, capsys):
    command = ["export-hf", model, tmp_path / "hf", "--drop-bias", "--max-shard-size", "10KB"]
    command += ["--eval-data", prepared["public"], "--json"]
    assert cli.main([*map(str, command)]) == 0
    scores = json.loads(capsys.readouterr().out)["bits_per_byte"]
    assert scores.keys() == {"with the router's biases", "without them"}
    command[2] = tmp_path / "spread"
    assert cli.main([*map(str, command), "--mesh", "data=3,fsdp=2"]) == 0
    spread = json.loads(capsys.readouterr().out)["bits_per_byte"]
    for name, bits in scores.items():
        assert spread[name] == pytest.approx(bits, rel=1e-5)
    assert cli.main(["import-hf", str(tmp_path / "hf"), str(tmp_path / "back")]) == 0
    back = evaluate(load(tmp_path / "back"), [prepared["public"]])["bits_per_byte"]["public"]
    assert abs(back - scores["without them"]["public"]) < 1e-6


def test_a_full_disk_leaves_nothing_of_an_import_or_an_export(checkpoint, tmp_path, monkeypatch):
    source = checkpoint()
    good = import_hf(source, tmp_path / "good").path
    for operation in (
        lambda: import_hf(source, tmp_path / "x"),
        lambda: export_hf(good, tmp_path / "x", max_shard_size=9_000),
    ):
        for place in range(1, 1000, 7):
            left = place

            def observe(operation: str, path: Path) -> None:
                nonlocal left
                left -= 1
                if not left:
                    raise OSError(28, "No space left on device", str(path))

            monkeypatch.setattr(files, "observer", observe)
            try:
                operation()
            except UserError as error:
                assert "no space left" in str(error)
                assert {path.name for path in tmp_path.iterdir()} == {"hf", "good"}
            else:
                break
        assert place > 8
        monkeypatch.setattr(files, "observer", None)
        shutil.rmtree(tmp_path / "x")


@pytest.mark.parametrize("verb", ["import_hf", "export_hf"])
def test_a_killed_import_or_export_leaves_nothing_that_loads_and_a_rerun_finishes(
    verb, checkpoint, tmp_path
):
    """Killed before its every eleventh change to the disk, each time in another process."""
    source = checkpoint()
    whole = {"import_hf": source, "export_hf": import_hf(source, tmp_path / "good").path}[verb]
    out = tmp_path / "x"
    program = (
        "import sys; from pathlib import Path; from tests.faults.kill_everywhere import"
        " killed_before\n"
        "from flexolmo_jax.convert.importing import import_hf; from flexolmo_jax.convert.exporting"
        " import export_hf\n"
        "from flexolmo_jax.storage.files import clear\n"
        f"act, source, out = {verb}, Path(sys.argv[1]), Path(sys.argv[2])\n"
        "place = 1\n"
        "while killed_before(place, lambda: act(source, out)):\n"
        # only its folder's entry was not synced: it must be whole, as is looked at below
        "    if out.exists(): break\n"
        "    place += 11\n"
        # of what the last kill may have left beside it, as the next to write there would
        "clear(out)\n"
        "print(place)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, str(whole), str(out)],
        capture_output=True,
        text=True,
        env=os.environ,
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    assert int(result.stdout.split()[-1]) > 12
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "good", "x"}
    if verb == "export_hf":
        assert_same(tensors_of(out), tensors_of(source))
    else:
        assert verify(out)["verified"]


def test_exporting_refuses_what_it_cannot_write(model, tmp_path, capsys):
    with pytest.raises(UserError, match="--dtype is 'int8'"):
        export_hf(model, tmp_path / "hf", dtype="int8")
    with pytest.raises(UserError, match="give --drop-bias too"):
        export_hf(model, tmp_path / "hf", eval_data=[tmp_path])
    with pytest.raises(SystemExit):
        cli.main(["export-hf", str(model), str(tmp_path / "hf"), "--max-shard-size", "many"])
    assert "expected a size as 5GB" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    assert open_artifact(model).config.n_active == 2


@pytest.mark.parametrize("shape", [(1, 1), (3, 700), (513, 256), (255, 1000)])
def test_transposing_in_blocks_is_transposing(shape):
    matrix = np.random.default_rng(0).normal(size=shape).astype(np.float16)
    assert np.array_equal(transposed(matrix), matrix.T) and transposed(matrix).flags.c_contiguous
