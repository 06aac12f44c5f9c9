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
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts

from flexolmo_jax import integrity
from flexolmo_jax.artifact import open_artifact
from flexolmo_jax.config import Settings
from flexolmo_jax.coordinator.gate import Gate
from flexolmo_jax.coordinator.merge import append, apply_tuning, merge, opt_out, replace
from flexolmo_jax.coordinator.router import train_router, tune
from flexolmo_jax.coordinator.verify import verify
from flexolmo_jax.description import write_description
from flexolmo_jax.errors import UserError
from flexolmo_jax.exchange.anchor import open_anchor, publish
from flexolmo_jax.exchange.contribution import MANIFEST, TENSORS, open_contribution, sealed
from flexolmo_jax.exchange.signature import Trust, keygen
from flexolmo_jax.integrity import fingerprint_of, layouts, parts_of, tensor_digest
from flexolmo_jax.loaded import load
from flexolmo_jax.owner.contribute import contribute
from flexolmo_jax.owner.package import package
from flexolmo_jax.owner.pair import train_pair
from flexolmo_jax.storage import verified
from flexolmo_jax.storage.tensorfile import TensorFile, write_tensors
from flexolmo_jax.storage.weights import Reader
from flexolmo_jax.train.pretrain import pretrain
from tests.tiny import documents, pair_config, run_config, write_jsonl


def copied(source: Path, to: Path) -> Path:
    """With files that may be changed."""
    shutil.copytree(source, to)
    for file in to.rglob("*"):
        if file.is_file():
            file.chmod(0o644)
    return to


def redescribed(path: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """With another description, sealed anew: what a forger does first."""
    description = json.loads((path / "flexolmo.json").read_text())
    change(description)
    write_description(path, description)
    return path


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
        digest = open_artifact(copy).tokenizer.digest
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


@pytest.fixture
def signed(pair_runs, tmp_path) -> dict[str, Any]:
    """Signed contributions, and a coordinator's directory of keys."""
    (tmp_path / "trusted").mkdir()
    parts = {}
    for name in ("code", "law"):
        keygen(tmp_path / name)
        shutil.copy(tmp_path / f"{name}.pub", tmp_path / "trusted" / f"{name}.pub")
        parts[name] = package(
            pair_runs[name], tmp_path / f"c-{name}", sign_key=tmp_path / name
        ).path
    return {"trust": Trust.of(tmp_path / "trusted"), **parts}


def test_what_a_model_claims_of_its_members_can_be_checked(anchor, signed, contributions, tmp_path):
    """Owners, licences, privacy and signatures are those of manifests that a model carries
    whole."""
    model = merge(
        anchor, [signed["code"], signed["law"]], tmp_path / "model", gate=Gate(signed["trust"])
    ).path
    told = verify(model, anchor, signed["trust"])["members"]
    assert [member["signed_by"]["name"] for member in told] == ["code", "law"]
    for change in (
        lambda d: d["members"][0]["manifest"].update(owner="somebody else"),
        lambda d: d["members"][0]["manifest"].update(licence="anything goes"),
        lambda d: d["members"][0].update(signature=d["members"][1]["signature"]),
        lambda d: d["members"][0].update(manifest=d["members"][1]["manifest"]),
    ):
        fake = redescribed(copied(model, tmp_path / "fake"), change)
        with pytest.raises(UserError):
            verify(fake)
        shutil.rmtree(fake)

    def reseal(description: dict[str, Any]) -> None:
        manifest = description["members"][0]["manifest"]
        description["members"][0]["manifest"] = json.loads(
            sealed(manifest | {"owner": "somebody else"})
        )

    fake = redescribed(copied(model, tmp_path / "fake"), reseal)
    with pytest.raises(UserError, match="signature"):
        verify(fake)
    redescribed(fake, lambda d: d["members"][0].update(signature=None))
    # anybody can write an unsigned manifest ...
    assert verify(fake)["members"][0]["signed_by"] is None
    with pytest.raises(UserError, match="not signed"):
        verify(fake, anchor, signed["trust"])  # ... so whoever asks for signatures does not take it
    with pytest.raises(UserError, match="not signed"):
        verify(
            merge(anchor, [contributions["code"]], tmp_path / "unsigned").path,
            trust=Trust(signed=True),
        )


def with_zeros(model: Path) -> Path:
    """In the place of a shard."""
    shard = next(
        file for file in sorted(model.glob("weights/trunk.embedding/c/**/*")) if file.is_file()
    )
    shard.write_bytes(bytes(shard.stat().st_size))
    return model


def test_the_verbs_that_change_a_model_check_it_first(
    model, contributions, corpora, prepared, tmp_path
):
    """append, replace, tune and router training trust what they start from as little as verify
    does."""
    fake = with_zeros(copied(model, tmp_path / "fake"))
    part = with_zeros(copied(opt_out(model, ["law"], tmp_path / "one").path, tmp_path / "part"))
    public = [corpora["public"]]
    for use in (
        lambda: append(part, contributions["law"], tmp_path / "out"),
        lambda: replace(fake, contributions["law"], tmp_path / "out", allow_older=True),
        lambda: tune(
            fake,
            {"code": corpora["code"]},
            public,
            tmp_path / "out",
            settings=Settings(overrides=["train.steps=1"]),
        ),
    ):
        with pytest.raises(UserError, match=r"bytes of|cannot be read"):
            use()
        assert not (tmp_path / "out").exists()
    run = run_config(
        "joint", prepared["public"], "model.n_experts=4", f"train.init={fake}", "train.steps=1"
    )
    with pytest.raises(UserError, match=r"bytes of|cannot be read"):
        pretrain(run, tmp_path / "run")


def test_a_model_restores_in_plain_orbax_as_it_loads(model):
    """The reader is ours; the format stays Orbax's."""
    with ocp.PyTreeCheckpointer() as plain, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Orbax prefers to be told shardings
        restored = plain.restore((model / "weights").absolute())
    np.testing.assert_array_equal(
        np.asarray(restored["trunk"]["norm"]["scale"]),
        np.asarray(load(model).params["trunk"]["norm"]["scale"]),
    )


def test_models_and_anchors_of_format_1_are_read_and_their_claims_are_not_taken(
    anchor, contributions, tmp_path
):
    """What earlier versions wrote is read; what cannot be checked of it is said, or refused by
    name."""
    old = copied(anchor, tmp_path / "anchor")

    def anchor_1(d: dict[str, Any]) -> None:
        del d["public_sha256"]
        d.update(
            format=1,
            fingerprint=fingerprint_of({k: v for k, v in parts_of(d).items() if k != "public"}),
        )

    redescribed(old, anchor_1)
    assert verify(old)["verified"] and load(old).experts == ("anchor",)

    model = merge(anchor, [contributions["code"]], tmp_path / "new").path
    keys = (
        "name",
        "owner",
        "domain",
        "licence",
        "expires",
        "router_bias",
        "tensors",
        "training",
        "privacy",
    )

    def model_1(d: dict[str, Any]) -> None:
        members = [m["manifest"] for m in d["members"]]
        d.update(format=1, anchor=d["anchor"]["tensors"], files={})
        d["members"] = [{k: m[k] for k in keys} | {"manifest": m["sha256"]} for m in members]

    before = redescribed(copied(model, tmp_path / "model"), model_1)
    assert verify(before, anchor)["members"] == [
        {"name": "code", "manifest": None, "signed_by": None}
    ]
    assert load(before).experts == ("anchor", "code")
    with pytest.raises(UserError, match="has no signed manifest"):
        verify(before, trust=Trust(signed=True))
    with pytest.raises(UserError, match="merged by an earlier version"):
        opt_out(before, ["code"], tmp_path / "out")


def written(model: Path, array: str, at: tuple[int, ...], value: float) -> None:
    """Another number in an array, with right checksums: what plain TensorStore writes."""
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{model}/weights/{array}"}}
    ts.open(spec, open=True).result()[at].write(value).result()


def refused_by_all(fake: Path, match: str) -> None:
    for use in (
        lambda: verify(fake),
        lambda: load(fake),
        lambda: opt_out(fake, ["code"], fake.with_name("out")),
    ):
        with pytest.raises(UserError, match=match):
            use()
    assert not fake.with_name("out").exists()


def without_bias(contribution: Path, to: Path) -> Path:
    """The same expert as its owner would have trained it without router biases."""
    tensors = {
        name: a
        for name, a in open_contribution(contribution).tensors()
        if not name.endswith("bias")
    }
    to.mkdir()
    write_tensors(
        to / TENSORS,
        {name: (str(a.dtype), a.shape) for name, a in tensors.items()},
        tensors.values(),
    )
    manifest = open_contribution(contribution).manifest
    entries = {name: entry for name, entry in manifest["tensors"].items() if name in tensors}
    with TensorFile(to / TENSORS) as file:
        changes = {"header": file.header_sha256, "tensors": entries, "router_bias": False}
    (to / MANIFEST).write_bytes(sealed(manifest | changes))
    return to


@pytest.mark.parametrize(("expert", "whose"), [(0, "of anchor"), (1, "of code"), (2, "of law")])
def test_a_bias_that_nobody_handed_over_is_found(anchor, contributions, tmp_path, expert, whose):
    """Promise: what is verified is what runs. One number decides how often an expert is chosen: the
    anchor's and that of an expert trained without one are 0, and the others their owners'."""
    law = without_bias(contributions["law"], tmp_path / "law")
    model = merge(anchor, [contributions["code"], law], tmp_path / "model", ways=("copy",)).path
    assert verify(model)["verified"]
    fake = copied(model, tmp_path / "fake")
    written(fake, "experts.bias", (1, expert), -7.0)
    refused_by_all(fake, f"bias {whose} are not those of its description")


def test_a_tuned_router_is_held_to_its_digests_too(model, prepared, tmp_path):
    """Promise: what is verified is what runs. Tuned rows are no owner's: the description has
    digests of their own."""
    run = run_config("router", prepared["public"], "train.steps=1", router={"model": str(model)})
    train_router(run, tmp_path / "run")
    tuned = apply_tuning(
        tmp_path / "run", tmp_path / "tuned", store_path=tmp_path / "store", ways=("copy",)
    ).path
    assert verify(tuned)["verified"]
    for number, (array, at) in enumerate(
        {"experts.row": (0, 1, 3), "experts.bias": (0, 2)}.items()
    ):
        fake = copied(tuned, tmp_path / str(number) / "fake")
        written(fake, array, at, -7.0)
        refused_by_all(fake, f"bytes of {array.replace('.', '/')} are not those")


def test_an_expert_does_not_go_by_the_name_of_another(model, tmp_path):
    """Promise: what a model claims of its members can be checked. An opt-out is by name: it would
    take out somebody else."""
    fake = copied(model, tmp_path / "fake")

    def renamed(d: dict[str, Any]) -> None:
        names = {"code": "law", "law": "code"}
        d["experts"] = [names.get(name, name) for name in d["experts"]]
        for member in d["members"]:
            member["name"] = names.get(member["name"], member["name"])

    redescribed(fake, renamed)
    with pytest.raises(
        UserError, match="the expert 'law' has the manifest of 'code'; do not use the model"
    ):
        verify(fake)


def test_a_model_of_format_1_is_held_to_every_digest_of_the_anchor_that_is_given(
    model, anchor, tmp_path
):
    """Promise: what is verified is what runs. Format 1 kept no parts of a fingerprint: only the
    anchor itself tells."""
    fake = copied(model, tmp_path / "fake")
    written(fake, "trunk.norm.scale", (0,), 7.0)
    scale = Reader(fake / "weights").read("trunk/norm/scale", (slice(None),))
    keys = (
        "name",
        "owner",
        "domain",
        "licence",
        "expires",
        "router_bias",
        "tensors",
        "training",
        "privacy",
    )

    def forge(d: dict[str, Any]) -> None:
        d.update(format=1, anchor=d["anchor"]["tensors"], files={})
        d["members"] = [
            {k: m["manifest"][k] for k in keys} | {"manifest": m["manifest"]["sha256"]}
            for m in d["members"]
        ]
        d["anchor"]["trunk/norm/scale"]["sha256"] = tensor_digest(scale)

    redescribed(fake, forge)
    assert verify(fake)["verified"]
    with pytest.raises(
        UserError, match=r"names the fingerprint of .* but has another trunk/norm/scale"
    ):
        verify(fake, anchor)


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


def test_a_run_does_not_go_on_with_another_base_in_the_place_of_its_own(
    anchor, anchor32, model, contributions, prepared, pair_runs, tmp_path
):
    """Promise: what is verified is what runs. A run names its base by path: what lies there now may
    be another one, and whole."""
    base = copied(model, tmp_path / "base")
    run = run_config("router", prepared["public"], "train.steps=1", router={"model": str(base)})
    train_router(run, tmp_path / "router")
    earlier = copied(tmp_path / "router", tmp_path / "earlier")
    # as an earlier version wrote it: it knew names only
    redescribed(earlier, lambda d: d.pop("base_sha256"))
    pair = copied(pair_runs["code"], tmp_path / "pair")
    redescribed(pair, lambda d: d.update(base=str(anchor32)))
    shutil.rmtree(base)
    # the same experts in another order
    merge(anchor, [contributions["law"], contributions["code"], contributions["care"]], base)
    uses: list[Callable[[], object]] = [
        lambda: load(tmp_path / "router"),
        lambda: load(earlier),
        lambda: apply_tuning(tmp_path / "router", tmp_path / "out"),
        lambda: opt_out(tmp_path / "router", ["law"], tmp_path / "out"),
        lambda: load(pair),
        lambda: package(pair, tmp_path / "out"),
    ]
    for use in uses:
        with pytest.raises(UserError, match="was trained on another version of"):
            use()
    assert not (tmp_path / "out").exists()


def test_tuned_rows_are_not_put_on_a_newer_expert_of_the_same_name(
    model, contributions, prepared, tmp_path
):
    """Promise: what is verified is what runs. Rows that were tuned and measured on one expert would
    decide on another."""
    base = copied(model, tmp_path / "base")
    run = run_config("router", prepared["public"], "train.steps=1", router={"model": str(base)})
    train_router(run, tmp_path / "router")
    newer = Path(shutil.copytree(contributions["code"], tmp_path / "newer"))
    (newer / MANIFEST).write_bytes(sealed(open_contribution(newer).manifest | {"sequence": 2}))
    shutil.rmtree(base)
    replace(model, newer, base, store_path=tmp_path / "store")
    for use in (
        lambda: load(tmp_path / "router"),
        lambda: apply_tuning(tmp_path / "router", tmp_path / "out"),
    ):
        with pytest.raises(UserError, match="was trained on another version of"):
            use()
    with pytest.raises(UserError, match=r"was trained against .* is now"):
        train_router(run, tmp_path / "router")
    description = json.loads((tmp_path / "router" / "flexolmo.json").read_text())
    del description["base_sha256"]  # as an earlier version wrote it
    write_description(tmp_path / "router", description)
    assert load(tmp_path / "router").experts == ("anchor", "code", "law", "care")


def test_nothing_passes_for_signed_that_has_no_signature(
    anchor, model, contributions, prepared, tmp_path
):
    """Promise: a claim is checked or refused. Prepared data laid beside an unsigned contribution or
    model made `verify --trust` look at the data alone, and succeed; anchors, stores and data did so
    always, whatever anchor or keys were asked for."""
    keygen(tmp_path / "keys" / "code")
    trust = Trust.of(tmp_path / "keys")
    for source in (contributions["code"], model):
        both = copied(source, tmp_path / f"{source.name}-with-data")
        for file in prepared["code"].iterdir():
            if not (both / file.name).exists():
                shutil.copy(file, both)
        for by in (Trust(), trust, Trust(signed=True)):
            with pytest.raises(UserError, match=r"holds|is not signed"):
                verify(both, anchor, by)
    store = merge(anchor, [], tmp_path / "model").path.parent / "flexolmo-store"
    data = prepared["code"]
    for path, base, by in (
        (anchor, None, trust),
        (anchor, None, Trust(signed=True)),
        (store, None, trust),
        (store, anchor, Trust()),
        (data, None, trust),
        (data, anchor, Trust()),
    ):
        assert verify(path)["verified"]
        with pytest.raises(UserError, match=r"which (nobody signs|has no anchor); leave out"):
            verify(path, base, by)
