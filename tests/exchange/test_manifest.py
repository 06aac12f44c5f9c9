"""What a manifest may say: keys of each format, an owner's statements, a licence's last day."""

import datetime
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flexolmo_jax.config import LARGEST, LAYERS, ModelConfig
from flexolmo_jax.coordinator.info import info
from flexolmo_jax.coordinator.merge import append, merge, opt_out, replace
from flexolmo_jax.coordinator.verify import verify
from flexolmo_jax.errors import UserError
from flexolmo_jax.exchange.contribution import (
    HEADER_OF_TENSOR,
    MANIFEST,
    MANIFEST_LIMIT,
    open_contribution,
    read_manifest,
    sealed,
    tensor_shapes,
)
from flexolmo_jax.owner.package import package
from flexolmo_jax.owner.pair import train_pair
from tests.exchange.test_contribution import manifest_of, resealed
from tests.tiny import pair_config


def test_an_expired_licence_is_refused_on_the_day_after_its_last(anchor, copy, model, tmp_path):
    today = datetime.datetime.now(datetime.UTC).date()
    assert verify(resealed(copy, expires=str(today + datetime.timedelta(1))), anchor)["verified"]
    resealed(copy, expires=str(today - datetime.timedelta(2)))
    # may still be looked at
    assert info(copy)["stated"]["expires"] == str(today - datetime.timedelta(2))
    without = opt_out(model, ["code"], tmp_path / "without").path
    for read in (
        lambda: verify(copy),
        lambda: merge(anchor, [copy], tmp_path / "out"),
        lambda: replace(model, copy, tmp_path / "out"),
        lambda: append(without, copy, tmp_path / "out"),
    ):
        with pytest.raises(UserError, match="expired on"):
            read()
    assert not (tmp_path / "out").exists()


def test_what_an_owner_states_is_in_the_manifest_the_model_and_info_apart_from_what_was_measured(
    anchor, prepared, tmp_path
):
    stated_so = (
        "pair.owner=ACME",
        "pair.licence=ours",
        "pair.expires=2999-12-31",
        "pair.sequence=3",
    )
    config = pair_config(anchor, prepared["code"], "code", "train.steps=1", *stated_so)
    train_pair(config, tmp_path / "run")
    contribution = package(tmp_path / "run", tmp_path / "c").path
    stated = {
        "owner": "ACME",
        "domain": "code",
        "licence": "ours",
        "expires": "2999-12-31",
        "sequence": 3,
        "privacy": "none",
    }
    assert {key: manifest_of(contribution)[key] for key in stated} == stated
    (member,) = info(merge(anchor, [contribution], tmp_path / "model").path)["members"]
    for told in (info(contribution), member):
        assert {key: told["stated"][key] for key in stated} == stated and "not checked" in told[
            "stated"
        ]["by"]
        assert told["measured"].keys() == {"by", *manifest_of(contribution)["training"]}
        assert not stated.keys() & (told["measured"].keys() | told.keys())


def test_an_owner_whose_licence_is_over_hears_of_it_first(anchor, prepared, tmp_path, capsys):
    settings = "train.steps=1", "pair.expires=2020-12-31"
    train_pair(pair_config(anchor, prepared["code"], "code", *settings), tmp_path / "run")
    package(tmp_path / "run", tmp_path / "c")
    assert "its licence expired on 2020-12-31" in capsys.readouterr().err


def as_format_1(path: Path, **changes: Any) -> Path:
    manifest: dict[str, Any] = manifest_of(path) | {"format": 1} | changes
    del manifest["sequence"]
    (path / MANIFEST).write_bytes(sealed(manifest))
    return path


def test_format_1_is_still_read_and_its_privacy_shown_as_stated(anchor, copy, tmp_path):
    privacy = {"epsilon": 8.0, "delta": 1e-6}
    old = open_contribution(as_format_1(copy, privacy=privacy))
    assert old.sequence == 0 and verify(copy, anchor)["verified"]
    (member,) = info(merge(anchor, [copy], tmp_path / "model").path)["members"]
    for told in (info(copy), member):
        assert (
            told["stated"]["privacy"] == privacy
            and told["stated"]["by"] == "the owner; not checked"
        )


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2, "sequence": None},
        {"format": 1, "sequence": 1},
        {"format": 3},
        {"format": True},
        {"format": 2.0},
    ],
)
def test_each_format_has_its_own_keys(copy, change):
    manifest = {
        key: value
        for key, value in (manifest_of(copy) | change).items()
        if value is not None or key == "expires"
    }
    (copy / MANIFEST).write_bytes(sealed(manifest))
    with pytest.raises(UserError, match=r"sequence|the format is"):
        open_contribution(copy)


def test_a_manifest_of_the_largest_model_is_within_the_limits(copy):
    manifest = manifest_of(copy)
    largest = {
        "n_layers": LAYERS,
        **{key: LARGEST[key] for key in ("d_model", "d_ffn")},
        "n_heads": 1024,
        "n_kv_heads": 1024,
    }
    model = manifest["model"] | largest
    tensors = {
        name: {"dtype": "bfloat16", "sha256": "f" * 64, "shape": list(shape)}
        for name, shape in tensor_shapes(ModelConfig(**model), manifest["router_bias"]).items()
    }
    scores = {f"{i}{'x' * 200}": 1.234567 for i in range(1000)}
    training = {
        "steps": 2**62,
        "tokens": 2**62,
        "public_share": 0.3,
        "bits_per_byte": {"anchor": scores, "pair": scores},
    }
    text = sealed(
        manifest | {"model": model, "tensors": tensors, "training": training, "licence": "x" * 1000}
    )
    assert read_manifest(text)["model"] == model and len(text) < MANIFEST_LIMIT / 2
    header = {
        name: {"dtype": "BF16", "shape": t["shape"], "data_offsets": [2**47, 2**47]}
        for name, t in tensors.items()
    }
    assert len(json.dumps(header)) < HEADER_OF_TENSOR * len(tensors) / 2


def test_a_contribution_replaces_an_older_one_only_unless_asked(anchor, copy, tmp_path):
    newer = resealed(Path(shutil.copytree(copy, tmp_path / "newer")), sequence=2)
    equal = resealed(Path(shutil.copytree(copy, tmp_path / "equal")), sequence=2, licence="another")
    model = merge(anchor, [copy], tmp_path / "model").path
    second = replace(model, newer, tmp_path / "second").path
    assert replace(second, newer, tmp_path / "same").path  # the very one
    for older in (copy, equal, as_format_1(Path(shutil.copytree(copy, tmp_path / "first")))):
        with pytest.raises(
            UserError,
            match=r"has sequence [012]; expected more than the model's, 2; .* --allow-older",
        ):
            replace(second, older, tmp_path / "no")
    assert not (tmp_path / "no").exists()
    assert replace(second, copy, tmp_path / "back", allow_older=True).path


def test_what_is_stated_can_change_without_training_anew(anchor, prepared, tmp_path):
    """An owner renews a licence: the same weights, a higher sequence."""
    for sequence, out in ((1, "first"), (2, "second")):
        config = pair_config(
            anchor,
            prepared["code"],
            "code",
            "train.steps=1",
            f"pair.sequence={sequence}",
            f"pair.licence={out}",
        )
        train_pair(config, tmp_path / "run")
        package(tmp_path / "run", tmp_path / out)
    first, second = (manifest_of(tmp_path / out) for out in ("first", "second"))
    assert first["tensors"] == second["tensors"] and (second["sequence"], second["licence"]) == (
        2,
        "second",
    )
    assert replace(
        merge(anchor, [tmp_path / "first"], tmp_path / "model").path,
        tmp_path / "second",
        tmp_path / "renewed",
    ).path


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("expires", "tomorrow"), ("expires", "2027-2-30"), ("expires", "2027-1-2"), ("expires", ""),
        ("privacy", "differential"), ("privacy", {"epsilon": 1.0}),
        ("privacy", {"epsilon": -1, "delta": 0}), ("privacy", {"epsilon": True, "delta": 0}),
        ("owner", "two\nlines"), ("licence", "\x1b[2J"), ("header", 3), ("more", "keys"), ("owner",
        "x" * 1001), ("tool", "x" * 1001),
        ("training", {"more": 1}), ("training", {"steps": -1}), ("training", {"steps": 1.0}),
        ("training", {"public_share": 1.5}),
        ("training", {"bits_per_byte": {"pair": {"\x1b[2J": 1.0}}}), ("training",
        {"bits_per_byte": {"\n": {}}}),
        ("training", {"imported": "\n"}),
        ("sequence", 0), ("sequence", True), ("sequence", 2**60), ("dtype", "float64"), ("anchor",
        "F" * 64),
    ],
)  # fmt: skip
def test_statements_that_are_none_are_refused(copy, key, value):
    with pytest.raises(UserError, match=r"manifest\.json") as error:
        open_contribution(resealed(copy, **{key: value}))
    assert "\n" not in str(error.value) and "\x1b" not in str(error.value)


HOSTILE = {
    "nothing": "", "no JSON": "{]", "a list": "[]", "a number": "1", "null": "null",
    "deep": "[" * 100_000,
    "NUL": "\0", "a big number": "9" * 5000,
    "an empty object": "{}",
}  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_manifest_that_is_none_is_an_error_of_one_line(copy, text):
    (copy / MANIFEST).write_text(text)
    for read in (open_contribution, verify, info):
        with pytest.raises(UserError) as error:
            read(copy)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "key",
    [
        *(
            "name",
            "owner",
            "domain",
            "licence",
            "expires",
            "anchor",
            "model",
            "router_bias",
            "dtype",
            "tensors",
            "header",
        ),
        *("training", "privacy", "tool"),
    ],
)
def test_a_manifest_with_a_key_missing_or_of_another_type_is_an_error_of_one_line(
    anchor, copy, key, tmp_path
):
    whole = manifest_of(copy)
    values = [
        7,
        None,
        [1],
        "x" if not isinstance(whole[key], str) else {"a": 1},
        {"n_layers": 10**12} if key == "model" else [[]],
    ]
    for manifest in (
        {k: v for k, v in whole.items() if k != key},
        *(whole | {key: value} for value in values if value != whole[key]),
    ):
        (copy / MANIFEST).write_bytes(sealed(manifest))
        for read in (
            lambda: info(copy),
            lambda: verify(copy),
            lambda: merge(anchor, [copy], tmp_path / "model"),
        ):
            with pytest.raises(UserError) as error:
                read()
            assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name",
    ["", "anchor", "../../etc/passwd", "/etc", "a/b", "..", "a\nb", "x" * 65, "\x1b[2J", "--out"],
)
def test_a_name_that_could_be_a_path_or_an_option_is_refused(copy, name):
    (copy / MANIFEST).write_bytes(sealed(manifest_of(copy) | {"name": name}))
    with pytest.raises(UserError, match="name") as error:
        open_contribution(copy)
    assert "\n" not in str(error.value) and "\x1b" not in str(error.value)


def test_a_licence_holds_to_the_end_of_its_last_day_in_utc(copy, monkeypatch):
    contribution = open_contribution(resealed(copy, expires="2027-12-31"))

    def at(*when: int) -> None:
        clock = SimpleNamespace(
            now=lambda zone: datetime.datetime(*when, tzinfo=datetime.UTC).astimezone(zone)
        )
        monkeypatch.setattr(
            "flexolmo_jax.exchange.contribution.datetime",
            SimpleNamespace(datetime=clock, UTC=datetime.UTC),
        )

    at(2027, 12, 31, 23, 59, 59)
    contribution.check()
    at(2028, 1, 1, 0, 0, 0)
    with pytest.raises(UserError, match="expired on 2027-12-31"):
        contribution.check()
