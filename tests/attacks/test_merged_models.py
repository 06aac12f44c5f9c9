"""Attacks on what a merged model says of its anchor, members and router. The promise: a claim
passes only with the bytes that it is made of."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flexolmo_jax.config import Settings
from flexolmo_jax.coordinator.gate import Gate
from flexolmo_jax.coordinator.merge import append, apply_tuning, merge, opt_out, replace
from flexolmo_jax.coordinator.router import train_router, tune
from flexolmo_jax.coordinator.verify import verify
from flexolmo_jax.description import write_description
from flexolmo_jax.errors import UserError
from flexolmo_jax.exchange.contribution import MANIFEST, TENSORS, open_contribution, sealed
from flexolmo_jax.exchange.signature import Trust, keygen
from flexolmo_jax.integrity import fingerprint_of, parts_of, tensor_digest
from flexolmo_jax.loaded import load
from flexolmo_jax.owner.package import package
from flexolmo_jax.storage.tensorfile import TensorFile, write_tensors
from flexolmo_jax.storage.weights import Reader
from flexolmo_jax.train.pretrain import pretrain
from tests.attacks.forging import copied, redescribed, written
from tests.tiny import run_config


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
