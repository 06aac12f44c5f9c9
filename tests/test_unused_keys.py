"""Keys and values that are given and would change nothing: each is refused by name."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from flexolmo_jax.config import Reading, dump_yaml, load_config, read_config, resolve
from flexolmo_jax.coordinator.router import train_router
from flexolmo_jax.data.prepare import prepare
from flexolmo_jax.data.tokenizer import train_tokenizer
from flexolmo_jax.errors import UserError
from flexolmo_jax.owner.pair import train_pair
from flexolmo_jax.train.pretrain import pretrain
from tests.tiny import MODEL, SEQ_LEN, pair_config, run_config, write_jsonl

SECTIONS: dict[str, dict[str, Any]] = {
    "anchor": {},
    "joint": {"model": {"n_experts": 3, "n_active": 2}},
    "pair": {"pair": {"anchor": "a", "name": "b"}},
    "router": {"router": {"model": "m"}},
}
OTHERS = SECTIONS.keys() - {"joint"}
SCALED = 'model.rope_scaling={kind: "linear", factor: 2.0, beta_fast: 16.0}'
UNUSED = [
    ("anchor", ["optim.router_lr=0.1"], "optim.router_lr is 0.1"),
    ("anchor", ["optim.router_z_loss=0.1"], "optim.router_z_loss is 0.1"),
    ("anchor", ["model.router_bias=false"], "model.router_bias is False"),
    ("anchor", ["model.init_bias=-1.0"], "model.init_bias is -1.0"),
    ("anchor", [SCALED], "model.rope_scaling.beta_fast is 16.0"),
    ("joint", ["model.router_bias=false", "model.init_bias=-1.0"], "model.init_bias is -1.0"),
    ("pair", ["model.router_bias=false", "model.init_bias=-1.0"], "model.init_bias is -1.0"),
    ("pair", ["pair.contrast=0.5", "pair.public_share=0"], "pair.contrast is 0.5"),
    ("pair", ["pair.contrast=0.5", "pair.beside_anchor=false"], "pair.contrast is 0.5"),
    ("pair", ["pair.router_noise=2", "pair.beside_anchor=false"], "pair.router_noise is 2.0"),
    ("pair", ["data.eval=[{path: x, weight: 2}]"], "weight is 2"),
    *((kind, ["optim.load_balance=0.1"], "optim.load_balance is 0.1") for kind in sorted(OTHERS)),
]


def tree(kind: str) -> dict[str, Any]:
    return {"run": kind, "data": {"train": [{"path": "x"}]}, **SECTIONS[kind]}


@pytest.mark.parametrize(("kind", "given", "told"), UNUSED)
def test_a_key_that_this_run_does_not_use_is_refused(kind, given, told):
    with pytest.raises(UserError, match=f"{told}, which has no effect: .*; leave it out"):
        resolve(tree(kind), given)


@pytest.mark.parametrize("kind", SECTIONS)
def test_a_resolved_config_may_have_every_key_at_its_default(kind, tmp_path):
    (tmp_path / "config.yaml").write_text(dump_yaml(run := resolve(tree(kind))))
    assert load_config(tmp_path / "config.yaml") == run


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        ("joint", ["optim.load_balance=0.1", "optim.router_z_loss=0.1", "kernels=xla"]),
        ("pair", ["model.init_bias=-1.0", "optim.router_lr=0.1", "pair.contrast=0.5"]),
        ("pair", ["pair.contrast=0", "pair.public_share=0"]),
        ("pair", ["pair.router_noise=2", "pair.beside_anchor=false", "optim.router_z_loss=0.1"]),
        ("anchor", [SCALED.replace("linear", "yarn")]),
    ],
)
def test_keys_that_it_uses_are_taken(kind, given):
    resolve(tree(kind), given)


def test_a_run_of_an_earlier_version_with_such_a_key_goes_on_without_it(
    anchor, prepared, tmp_path, pair_runs
):
    run = Path(shutil.copytree(pair_runs["law"], tmp_path / "run"))
    written = yaml.safe_load((run / "config.yaml").read_text())
    written["optim"]["load_balance"] = 0.5
    (run / "config.yaml").write_text(yaml.safe_dump(written))
    with pytest.raises(UserError, match=r"optim.load_balance is 0.5"):
        load_config(run / "config.yaml")
    assert read_config(run / "config.yaml").optim.load_balance == 0.5
    config = pair_config(anchor, prepared["law"], "law", "train.steps=8")
    assert train_pair(config, run)["step"] == 8
    load_config(run / "config.yaml")


def start(kind: str, places: dict[str, Path], given: list[str], out: Path) -> dict[str, Any]:
    data = places["data"]
    if kind == "pair":
        return train_pair(pair_config(places["anchor"], data, "law", *given), out)
    if kind == "router":
        section = {"model": str(places["model"])}
        return train_router(run_config("router", data, *given, router=section), out)
    return pretrain(run_config("anchor", data, f"train.init={places['anchor']}", *given), out)


@pytest.fixture
def places(anchor, model, prepared) -> dict[str, Path]:
    return {"anchor": anchor, "model": model, "data": prepared["law"]}


@pytest.mark.parametrize("kind", ["pair", "router", "init"])
@pytest.mark.parametrize(("key", "value"), [("d_ffn", 4096), ("n_layers", 4), ("init_std", 0.5)])
def test_an_architecture_that_is_not_what_a_run_starts_from_is_refused_with_both_values(
    kind, key, value, places, tmp_path
):
    """Also where it is a default: n_layers."""
    found = MODEL.get(key, 0.02)
    with pytest.raises(UserError, match=f"model.{key} is {value}, and {found} in .*; leave it out"):
        start(kind, places, [f"model.{key}={value}"], tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_model_section_that_agrees_with_the_anchor_is_taken_and_so_is_the_resolved_config(
    places, tmp_path
):
    first = start("pair", places, ["train.steps=1"], tmp_path / "run")
    resolved = load_config(tmp_path / "run" / "config.yaml")
    assert "d_ffn" in resolved.stated
    assert train_pair(resolved, tmp_path / "run") == first


@pytest.mark.parametrize("kind", ["pair", "router", "init"])
def test_another_tokenizer_than_that_of_what_a_run_starts_from_is_refused(
    kind, places, corpora, tmp_path
):
    train_tokenizer([corpora["law"]], 300, tmp_path / "other.json")
    with pytest.raises(UserError, match=r"is not the tokenizer of .*; leave it out"):
        start(kind, places, [f"data.tokenizer={tmp_path / 'other.json'}"], tmp_path / "run")


@pytest.mark.parametrize("given", ["data.text_key=body", "data.separator=END"])
def test_a_way_to_read_documents_is_refused_where_all_are_prepared(given, places, tmp_path):
    with pytest.raises(UserError, match="which has no effect: all data are prepared already"):
        start("init", places, [given], tmp_path / "run")


def test_a_way_to_read_documents_may_be_that_of_the_prepared_ones(tmp_path, places, tiny_tokenizer):
    body = tmp_path / "body.jsonl"
    write_jsonl(body, [f"text {i}" * 9 for i in range(60)])
    body.write_text(body.read_text().replace('"text":', '"body":'))
    prepare([body], tiny_tokenizer, SEQ_LEN, tmp_path / "data", reading=Reading(text_key="body"))
    of_body = places | {"data": tmp_path / "data"}
    steps = ["data.text_key=body", "train.steps=1", "data.batch_size=2"]
    assert start("init", of_body, steps, tmp_path / "run")["step"] == 1
