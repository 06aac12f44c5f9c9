"""Attacks that make one thing verify and another run. The promise: what is verified is what
runs."""

import hashlib
import json
import math
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts

from flexolmo_jax import integrity
from flexolmo_jax.artifact import open_artifact
from flexolmo_jax.coordinator.merge import merge, opt_out
from flexolmo_jax.coordinator.verify import verify
from flexolmo_jax.data.tokenizer import Tokenizer
from flexolmo_jax.errors import UserError
from flexolmo_jax.exchange.anchor import open_anchor, publish
from flexolmo_jax.integrity import fingerprint_of, layouts, parts_of, tensor_digest
from flexolmo_jax.loaded import load
from flexolmo_jax.owner.contribute import contribute
from flexolmo_jax.owner.pair import train_pair
from flexolmo_jax.storage import verified
from flexolmo_jax.storage.weights import Reader
from tests.attacks.forging import copied, redescribed
from tests.tiny import documents, pair_config, write_jsonl


@pytest.mark.parametrize("hidden", ["ocdbt", "metadata", "another array", "a file beside"])
def test_weights_hidden_beside_the_verified_ones_are_refused_by_everyone(
    model, anchor, tmp_path, hidden
):
    """One directory with two sets of weights once verified as one model and ran as another."""
    for source in (model, anchor):
        copy = copied(source, tmp_path / source.name)
        weights = copy / "weights"
        if hidden == "ocdbt":
            store = {
                "driver": "ocdbt",
                "base": {"driver": "file", "path": f"{weights}/"},
                "path": "trunk.norm.scale/",
            }
            spec = {
                "driver": "zarr3",
                "kvstore": store,
                "metadata": {"shape": [32], "data_type": "float32"},
            }
            ts.open(spec, create=True).result().write(np.ones(32, np.float32)).result()
        elif hidden == "metadata":
            fields = json.loads((weights / "_METADATA").read_text())
            (weights / "_METADATA").write_text(json.dumps(fields | {"use_ocdbt": True}))
        elif hidden == "another array":
            shutil.copytree(weights / "trunk.norm.scale", weights / "params.trunk.norm.scale")
        else:
            (copy / "public_weights.safetensors").write_bytes(b"0" * 100)
        for use in (verify, load, lambda path: open_artifact(path).arrays()):
            with pytest.raises(UserError, match=r"unknown files|does not belong"):
                use(copy)
        with pytest.raises(UserError, match=r"unknown files|does not belong"):
            if source == anchor:
                merge(copy, [], tmp_path / "out")
            else:
                opt_out(copy, ["law"], tmp_path / "out")


@pytest.mark.parametrize(
    "instead", ["a link", "a folder", "a pipe", "a shorter file", "zarr metadata"]
)
def test_a_shard_that_is_no_regular_file_of_its_size_is_refused(anchor, tmp_path, instead):
    """Nothing is opened that could hang, lead elsewhere, or ask for memory that the description
    does not."""
    copy = copied(anchor, tmp_path / "copy")
    shard = next(file for file in sorted((copy / "weights").rglob("c/**/*")) if file.is_file())
    content = shard.read_bytes()
    if instead == "zarr metadata":
        file = copy / "weights" / "trunk.embedding" / "zarr.json"
        fields = json.loads(file.read_text())
        fields["chunk_grid"]["configuration"]["chunk_shape"] = [0, 1 << 60]
        file.write_text(json.dumps(fields))
    else:
        shard.unlink()
        if instead == "a link":
            (tmp_path / "elsewhere").write_bytes(content)
            shard.symlink_to(tmp_path / "elsewhere")
        elif instead == "a folder":
            shard.mkdir()
        elif instead == "a pipe":
            os.mkfifo(shard)
        else:
            shard.write_bytes(content[:-1])
    for use in (verify, load, open_anchor):
        with pytest.raises(UserError) as error:
            use(copy)
        assert "\n" not in str(error.value)


def forged(anchor: Path, to: Path, part: str) -> Path:
    """An anchor that names the fingerprint of another and differs in one part; every digest that a
    forger can compute is right."""
    copy = copied(anchor, to)
    if part == "tokenizer":
        fields = json.loads((copy / "tokenizer.json").read_text())
        fields["model"]["merges"][0], fields["model"]["merges"][1] = (
            fields["model"]["merges"][1],
            fields["model"]["merges"][0],
        )
        (copy / "tokenizer.json").write_text(json.dumps(fields))
        digest = Tokenizer.load(copy).digest
        return redescribed(copy, lambda d: d.update(tokenizer=digest))
    if part == "embedder":
        content = bytearray((copy / "embedder" / "embedder.npz").read_bytes())
        content[-300] ^= 1
        (copy / "embedder" / "embedder.npz").write_bytes(content)
        return copy
    if part == "public text":
        index = json.loads((copy / "public" / "index.json").read_text())
        file = copy / "public" / "train.tokens.npy"
        content = bytearray(file.read_bytes())
        content[-2] ^= 1
        file.write_bytes(content)
        index["files"]["train.tokens.npy"] = hashlib.sha256(content).hexdigest()
        (copy / "public" / "index.json").write_text(json.dumps(index, indent=1) + "\n")
        return copy
    other = publish(
        part_source(anchor),
        [write_jsonl(to.parent / "other.jsonl", documents("law", 40))],
        to.parent / "other-anchor",
    ).path
    shutil.rmtree(copy)
    copied(other, copy)
    fingerprint = open_artifact(anchor).fingerprint
    return redescribed(copy, lambda d: d.update(fingerprint=fingerprint))


def part_source(anchor: Path) -> Path:
    return anchor.with_name("anchor-run")


@pytest.mark.parametrize("part", ["tokenizer", "embedder", "public text", "weights"])
def test_a_forged_anchor_is_used_by_nobody(
    anchor, prepared, corpora, contributions, tmp_path, part
):
    """The old fingerprint on other weights, another tokenizer, embedder or public sample: a string
    proves nothing."""
    fake = forged(anchor, tmp_path / "fake", part)
    uses: list[Callable[[], object]] = [
        lambda: verify(fake),
        lambda: load(fake),
        lambda: merge(fake, [contributions["code"]], tmp_path / "out"),
        lambda: contribute(fake, [corpora["code"]], "code", tmp_path / "out"),
        lambda: train_pair(
            pair_config(fake, prepared["code"], "code", "train.steps=1"), tmp_path / "out"
        ),
        lambda: verify(contributions["code"], fake),
    ]
    for use in uses:
        with pytest.raises(
            UserError, match=r"fingerprint|tokenizer|embedder|bytes of|not the file"
        ):
            use()
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.work").exists()


def test_what_was_verified_once_is_not_read_again_until_it_changes(anchor, tmp_path, monkeypatch):
    """The memory of it lies with the user, and nothing in an artifact can speak for itself."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    copy = copied(anchor, tmp_path / "copy")
    checks = []
    check = integrity.check
    monkeypatch.setattr(
        integrity, "check", lambda path, *rest: checks.append(path) or check(path, *rest)
    )
    for _ in range(3):
        open_anchor(copy)
    assert len(checks) == 1
    os.utime(copy / "tokenizer.json")
    open_anchor(copy)
    assert len(checks) == 2
    # others could write there: it says nothing
    (tmp_path / "cache" / "flexolmo-jax" / "verified").chmod(0o777)
    open_anchor(copy)
    assert len(checks) == 3


def test_a_directory_that_changes_while_it_is_verified_is_not_remembered(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "it").mkdir()
    with pytest.raises(UserError, match="changed while it was verified"):
        verified.once(tmp_path / "it", "claim", lambda: (tmp_path / "it" / "file").write_text("x"))
    called = []
    for _ in range(2):
        verified.once(tmp_path / "it", "claim", lambda: called.append(1))
    assert called == [1]


def test_a_model_with_another_trunk_does_not_pass_for_one_of_this_anchor(model, anchor, tmp_path):
    """Its description is consistent; the fingerprint that it names is of other tensors."""
    fake = copied(model, tmp_path / "fake")
    spec = {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": f"{fake}/weights/trunk.norm.scale"},
    }
    array = ts.open(spec, open=True).result()
    doubled = np.asarray(array.read().result()) * 2
    array.write(doubled).result()
    redescribed(
        fake,
        lambda d: d["anchor"]["tensors"]["trunk/norm/scale"].update(sha256=tensor_digest(doubled)),
    )
    for use in (lambda: verify(fake), lambda: verify(fake, anchor), lambda: load(fake)):
        with pytest.raises(UserError, match=r"names (a|the) fingerprint"):
            use()
    redescribed(fake, lambda d: d.update(fingerprint=fingerprint_of(parts_of(d))))
    # its members were trained against another one
    for use in (lambda: verify(fake, anchor), lambda: verify(fake)):
        with pytest.raises(UserError, match="was made from the anchor"):
            use()


def test_the_anchors_expert_cannot_be_another_one(model, anchor, tmp_path):
    """A removed expert in the anchor's place passed every check that compared a string."""
    fake = copied(model, tmp_path / "fake")
    for file in sorted((fake / "weights").glob("experts.*/c/*/1/**/*")):
        if file.is_file():
            array, c, layer, _, *rest = file.relative_to(fake / "weights").parts
            shutil.copy(file, fake.joinpath("weights", array, c, layer, "0", *rest))
    for use in (lambda: verify(fake), lambda: verify(fake, anchor), lambda: load(fake)):
        with pytest.raises(UserError, match="of anchor are not those"):
            use()


def test_a_model_restores_in_plain_orbax_as_it_loads(model):
    """The reader is ours; the format stays Orbax's."""
    with ocp.PyTreeCheckpointer() as plain, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Orbax prefers to be told shardings
        restored = plain.restore((model / "weights").absolute())
    np.testing.assert_array_equal(
        np.asarray(restored["trunk"]["norm"]["scale"]),
        np.asarray(load(model).params["trunk"]["norm"]["scale"]),
    )


def test_nothing_hides_inside_a_shard(anchor, tmp_path):
    """Promise: what is verified is all that is there. An index at a shard's end finds its chunks
    whatever lies between."""
    copy = copied(anchor, tmp_path / "copy")
    layout = layouts(open_artifact(copy).config, open_artifact(copy).description["tensors"])[
        "trunk/embedding"
    ]
    shard = next(
        file for file in sorted(copy.glob("weights/trunk.embedding/c/**/*")) if file.is_file()
    )
    content, index = shard.read_bytes(), 16 * math.prod(layout.shard) // math.prod(layout.chunk) + 4
    shard.write_bytes(content[:-index] + b"somebody's documents" + content[-index:])
    Reader(copy / "weights").read("trunk/embedding", layout.whole()[0])  # it is read as before
    for use in (verify, load, open_anchor):
        with pytest.raises(
            UserError, match=f"has {len(content) + 20} bytes; expected {len(content)}"
        ):
            use(copy)


def test_two_files_of_an_embedder_that_change_places_are_another_embedder(tmp_path):
    """Promise: what is verified is what runs. The same bytes under other names do something
    else."""
    for folder, names in (("one", "ab"), ("other", "ba")):
        for name, content in zip(names, (b"1", b"2"), strict=True):
            (tmp_path / folder).mkdir(exist_ok=True)
            (tmp_path / folder / name).write_bytes(content)
    (tmp_path / "renamed").mkdir()
    for name, content in (("a", b"1"), ("c", b"2")):
        (tmp_path / "renamed" / name).write_bytes(content)
    assert (
        len(
            {integrity.embedder_digest(tmp_path / folder) for folder in ("one", "other", "renamed")}
        )
        == 3
    )
