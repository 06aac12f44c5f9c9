"""Configs: strict keys with hints, types, overrides, presets, cross-field checks, round trips, and
no heavy import."""

import dataclasses
import datetime
import math
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from flexolmo_jax.config import (
    PRESETS,
    MeshConfig,
    ModelConfig,
    RopeScaling,
    RunConfig,
    build,
    dump_yaml,
    load_config,
    resolve,
    to_dict,
)
from flexolmo_jax.errors import UserError
from flexolmo_jax.plain_yaml import parse_yaml, to_yaml

ROOT = Path(__file__).parents[1]
DATA = {"train": [{"path": "records/web"}]}
MINIMAL = {"data": DATA}


def test_importing_the_config_imports_nothing_heavy():
    program = (
        "import sys, flexolmo_jax.config; print(*sorted({'jax', 'flax', 'numpy', 'orbax',"
        " 'tensorstore'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == []


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"trian": {}}, "'trian'; did you mean 'train'"),
        ({"optim": {"learning_rate": 1}}, "'optim.learning_rate'; expected one of lr, "),
        ({"optim": {"warmpu": 1}}, "'optim.warmpu'; did you mean 'optim.warmup'"),
        (
            {"data": {"train": [{"path": "a"}, {"pth": "b"}]}},
            r"'data.train\[1\].pth'; did you mean 'data.train\[1\].path'",
        ),
        ({"model": {"preset": "13b"}}, f"'13b'; expected one of {', '.join(PRESETS)}"),
    ],
)
def test_an_unknown_key_names_the_nearest_known_one(tree, message):
    with pytest.raises(UserError, match=message):
        resolve(MINIMAL | tree)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"train": {"steps": "ten"}}, "train.steps is 'ten'; expected a value of type int"),
        ({"train": {"steps": 1.5}}, "train.steps is 1.5"),
        ({"train": {"steps": True}}, "train.steps is True"),
        ({"train": {"steps": None}}, "train.steps is None"),
        ({"optim": {"lr": "fast"}}, "optim.lr is 'fast'; expected a value of type float"),
        ({"optim": {"lr": False}}, "optim.lr is False"),
        ({"optim": {"lr": math.inf}}, "optim.lr is inf; expected a positive, finite number"),
        ({"optim": {"z_loss": math.inf}}, "optim.z_loss is inf; expected a finite number from 0"),
        ({"data": {"train": [{"path": "a", "weight": math.inf}]}}, "weight of a is inf; expected"),
        ({"model": {"router_bias": 1}}, "model.router_bias is 1; expected a value of type bool"),
        (
            {"train": {"remat": "some"}},
            "train.remat is 'some'; expected one of none, dots, ffn, outputs, attention, full, off",
        ),
        ({"run": "anker"}, "run is 'anker'; expected one of anchor, pair, router, joint"),
        ({"data": {"train": "web"}}, "data.train is 'web'; expected a list"),
        (
            {"data": {"train": ["web"]}},
            r"data.train\[0\] is 'web'; expected a section with keys path, weight, name",
        ),
        ({"train": 3}, "train is 3; expected a section"),
        ({"model": {"preset": ["7b"]}}, "model.preset"),
        ({"model": None}, "model is None; expected a section"),
        (
            {"pair": {"name": datetime.date(2026, 1, 1)}},
            "pair.name is datetime.date.*expected a value of type str",
        ),  # YAML's dates
    ],
)
def test_a_value_of_another_type_is_refused_by_name(tree, message):
    with pytest.raises(UserError, match=message) as caught:
        resolve(MINIMAL | tree)
    assert "\n" not in str(caught.value)


def test_numbers_are_read_as_people_write_them():
    config = resolve(
        parse_yaml("{data: {train: [{path: a, weight: 2}]}, optim: {lr: 1e-3, clip: 1}}")
    )
    assert (config.optim.lr, config.optim.clip, config.data.train[0].weight) == (1e-3, 1.0, 2.0)
    assert isinstance(config.optim.clip, float)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"data": {}}, "data.train is 'nothing'"),
        ({"data": {"train": [{"path": ""}]}}, "data path"),
        ({"data": {"train": [{"path": "a", "weight": 0.0}]}}, "weight of a"),
        (
            {"data": DATA | {"seq_len": 8192}},
            "data.seq_len is 8192; expected at most model.max_seq_len",
        ),
        (
            {"data": DATA | {"batch_size": 6}, "train": {"accumulate": 4}},
            "train.accumulate is 4; expected a divisor",
        ),
        ({"model": {"n_heads": 7}}, "model.n_heads is 7; expected a divisor of model.d_model"),
        ({"model": {"n_kv_heads": 3}}, "model.n_kv_heads is 3; expected a divisor of n_heads"),
        ({"model": {"d_model": 24}}, "expected an even head size"),
        ({"model": {"n_layers": 0}}, "model.n_layers is 0; expected a positive number"),
        (
            {"model": {"n_layers": 1025}},
            "model.n_layers is 1025; expected a positive number, at most 1024",
        ),
        ({"model": {"vocab_size": -1}}, "model.vocab_size is -1; expected a number from 0"),
        (
            {"model": {"rope_theta": float("inf")}},
            "model.rope_theta is inf; expected a positive, finite number",
        ),
        (
            {"model": {"norm_eps": float("nan")}},
            "model.norm_eps is nan; expected a positive, finite number",
        ),
        ({"model": {"norm": "sandwich"}}, "model.norm is 'sandwich'; expected one of post, pre"),
        ({"model": {"d_head": 7}}, "model.d_head is 7; expected an even head size"),
        ({"model": {"window": -1}}, "model.window is -1; expected a number from 0"),
        ({"model": {"full_every": 4}}, "model.full_every is 4; expected 0, since model.window"),
        (
            {"model": {"window": 8, "window_rope_theta": 1e4}},
            "model.window_rope_theta is 10000.0; expected 0, since model.full_every is 0",
        ),
        (
            {"model": {"rope_scaling": {"factor": 0.5}}},
            "model.rope_scaling.factor is 0.5; expected a number from 1 on",
        ),
        (
            {"model": {"rope_scaling": {"kind": "llama3", "high_frequency": 1.0}}},
            "model.rope_scaling.high_frequency is 1.0; expected a number above 1.0",
        ),
        (
            {"model": {"init_bias": float("nan")}},
            "model.init_bias is nan; expected a finite number",
        ),
        (
            {"run": "pair", "pair": {"anchor": "a", "name": "b", "privacy": {"epsilon": 8.0}}},
            "pair.privacy is .* remove the key",
        ),
        (
            {"run": "pair", "pair": {"anchor": "a", "name": "b", "sequence": 0}},
            "pair.sequence is 0; expected a number from 1",
        ),
        (
            {"run": "pair", "pair": {"anchor": "a", "name": "b", "owner": "x" * 1001}},
            "pair.owner is .* at most 1000 characters",
        ),
        (
            {
                "run": "pair",
                "pair": {"anchor": "a", "name": "b"},
                "data": {"train": [{"path": "a", "name": "\x1b"}]},
            },
            "name of 'a' is",
        ),
        ({"model": {"n_active": 2}}, "model.n_active is 2; expected at most model.n_experts"),
        ({"model": {"n_experts": 4}}, "model.n_experts is 4; expected 1 for an anchor"),
        ({"run": "pair"}, "run: pair needs the section 'pair'"),
        ({"pair": {"anchor": "a", "name": "b"}}, "'pair' belongs to run: pair"),
        ({"run": "pair", "pair": {"anchor": "a"}}, "pair.name"),
        ({"run": "pair", "pair": {"name": "b"}}, "pair.anchor"),
        ({"run": "pair", "pair": {"anchor": "a", "name": "anchor"}}, "expected another name"),
        (
            {"run": "pair", "pair": {"anchor": "a", "name": "b"}, "train": {"init": "r"}},
            "train.init",
        ),
        ({"run": "router", "router": {}}, "router.model"),
        ({"optim": {"final_fraction": 1.5}}, "optim.final_fraction"),
        ({"mesh": {"data": -1}}, "mesh is .*-1 on one axis at most"),
        ({"mesh": {"tensor": 0}}, "mesh is"),
    ],
)
def test_values_that_cannot_work_together_are_refused_before_anything_runs(tree, message):
    with pytest.raises(UserError, match=message):
        resolve(MINIMAL | tree)


def test_overrides_go_over_the_file_and_the_file_over_the_preset(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model: {preset: 7b, n_layers: 8}\ndata: {train: [{path: a}]}\n")
    config = load_config(
        path,
        [
            "model.d_ffn=512",
            "optim.lr=3e-4",
            "data.eval=[{path: b, name: held}]",
            "train.remat=full",
        ],
    )
    assert (config.model.d_model, config.model.n_layers, config.model.d_ffn) == (4096, 8, 512)
    assert (config.optim.lr, config.data.eval[0].title, config.train.remat) == (
        3e-4,
        "held",
        "full",
    )


def test_overrides_can_choose_the_preset_and_open_a_section():
    config = resolve(MINIMAL, ["model.preset=1b", "run=pair", "pair.anchor=a", "pair.name=b"])
    assert (config.model.n_layers, config.pair and config.pair.name) == (16, "b")


@pytest.mark.parametrize(
    ("preset", "published"),
    [
        ("7b", 7298617344),
        ("smollm2-135m", 134515008),
        ("olmo3-7b", 7298011136),
        ("llama3.1-8b", 8030261248),
        ("qwen3-8b", 8190735360),
    ],
)
def test_a_preset_has_as_many_parameters_as_the_published_model(preset, published):
    from flexolmo_jax.model import parameter_shapes

    shapes = parameter_shapes(resolve(MINIMAL, [f"model.preset={preset}"]).model)
    router = sum(math.prod(shape) for name, shape in shapes.items() if "/row" in name)
    assert sum(map(math.prod, shapes.values())) - router == published


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1:30", "1:30"), ("190:20:30", "190:20:30"), ("on", "on"), ("No", "No"), ("y", "y"),
        ("True", True), ("~", None), ("017", 17), ("0o17", 15), ("0x1F", 31), ("0b1", "0b1"),
        ("1_000", "1_000"), ("1e-3", 0.001), ("+.5", 0.5), ("-.inf", float("-inf")),
        ("2027-12-31", "2027-12-31"), ("<<", "<<"), ("=", "="), ("1.2.3", "1.2.3"),
    ],
)  # fmt: skip
def test_values_are_read_as_in_yaml_1_2(text, value):
    assert parse_yaml(f"key: {text}") == {"key": value}
    assert parse_yaml(f"{text}: 1") == {value: 1}


def test_a_profile_and_a_date_need_no_quotes():
    config = resolve(MINIMAL, ["train.profile=10:13", "train.steps=20"])
    assert config.train.profile == "10:13"
    pair = ["run=pair", "pair.anchor=a", "pair.name=on", "pair.expires=2027-12-31"]
    found = resolve(MINIMAL, pair).pair
    assert found and (found.name, found.expires) == ("on", "2027-12-31")


@given(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12))
def test_text_that_is_written_comes_back_by_either_version_of_yaml(text):
    written = to_yaml({"key": text})
    assert parse_yaml(written) == yaml.safe_load(written) == {"key": text}


@pytest.mark.parametrize("text", ["a: 1\nb: 2\na: 3", "t: {x: 1, y: 2, x: 1}", "a: 1\n'a': 1"])
def test_a_key_that_is_given_twice_is_refused(text):
    with pytest.raises(ValueError, match="a key is given twice"):
        parse_yaml(text)


def test_resolving_leaves_its_input_as_it_was():
    tree = MINIMAL | {"model": {"preset": "1b"}}
    resolve(tree, ["model.n_layers=2"])
    assert tree == MINIMAL | {"model": {"preset": "1b"}}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.steps", "expected section.key=value"),
        ("train.steps.more=1", "'steps' is not a section"),
        ("data.train.path=1", "'train' is not a section"),
        ("train.stepz=1", "did you mean 'train.steps'"),
        ("train.steps=[1", "--set got"),
    ],
)
def test_an_override_that_cannot_be_applied_is_refused(override, message):
    with pytest.raises(UserError, match=message):
        resolve(MINIMAL | {"train": {"steps": 3}}, [override])


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "no config at"), ("a: [", "not valid YAML"), ("- a", "expected"), ("", "data.train")],
)
def test_a_file_that_is_no_config_is_refused(tmp_path, text, message):
    path = tmp_path / "run.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=message):
        load_config(path)


@settings(max_examples=30)
@given(st.data())
def test_a_dumped_config_loads_to_an_equal_one(data):
    number = st.floats(min_value=1e-12, max_value=1e12)
    text = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1)
    config = resolve(MINIMAL)
    optim = dataclasses.replace(
        config.optim,
        lr=data.draw(number),
        z_loss=data.draw(number),
        warmup=data.draw(st.integers(0, 99)),
    )
    sources = data.draw(st.lists(st.tuples(text, number, text), min_size=1, max_size=3))
    train = [dict(path=path, weight=weight, name=name) for path, weight, name in sources]
    config = dataclasses.replace(config, optim=optim, data=resolve({"data": {"train": train}}).data)
    assert resolve(parse_yaml(dump_yaml(config))) == config
    assert build(RunConfig, to_dict(config)) == config


def test_a_pair_config_round_trips():
    config = resolve(
        MINIMAL | {"run": "pair", "pair": {"anchor": "a", "name": "b", "public_share": 0}}
    )
    assert resolve(parse_yaml(dump_yaml(config))) == config


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_a_valid_architecture(preset):
    config = resolve(MINIMAL | {"model": {"preset": preset}}).model
    assert config == build(ModelConfig, PRESETS[preset], "model")


def test_a_dataset_is_called_by_its_name_or_by_its_path():
    train = [
        {"path": "corpora/web.jsonl.gz"},
        {"path": "records/math/"},
        {"path": "a", "name": "code"},
    ]
    assert [dataset.title for dataset in resolve({"data": {"train": train}}).data.train] == [
        "web",
        "math",
        "code",
    ]


def test_the_default_mesh_puts_every_device_on_fsdp():
    assert MeshConfig() == MeshConfig(data=1, fsdp=-1, tensor=1, expert=1)


def test_keys_that_earlier_versions_lack_are_written_only_where_they_say_something():
    """So the fingerprints of earlier anchors stay what they are."""
    written = to_dict(ModelConfig())
    assert list(written) == [
        *("vocab_size", "d_model", "n_layers", "n_heads", "n_kv_heads", "d_ffn", "n_experts"),
        *("n_active", "router_bias", "init_bias", "rope_theta", "norm_eps", "init_std"),
        "max_seq_len",
    ]
    other = ModelConfig(norm="pre", d_head=16, rope_scaling=RopeScaling("yarn", factor=2.0))
    more = to_dict(other)
    assert more.keys() - written.keys() == {"norm", "d_head", "rope_scaling"}
    assert build(ModelConfig, more, "model") == other


@pytest.mark.parametrize(
    ("file", "told"),
    [
        (
            "launch/jobs/biomed.yaml",
            "a launcher's job; expected a run's config; that job's is 'configs/7b/pair.yaml'",
        ),
        ("launch/ray/kuberay.yaml", None),  # several documents
        ("launch/ray/skypilot.yaml", "a SkyPilot task; expected a run's config"),
        ("launch/skypilot.yaml", "a SkyPilot task; expected a run's config"),
        ("launch/plans/pair-v5p-2x2x1.json", "a plan; expected a run's config"),
        ("configs/reproduce/cpu.yaml", "a study; expected a run's config"),
    ],
)
def test_another_kind_of_file_is_named(file, told):
    path = ROOT / file
    with pytest.raises(UserError) as error:
        load_config(path)
    assert told is None or str(error.value) == f"{path} seems to be {told}"


def test_every_config_is_one():
    for path in (ROOT / "configs").glob("[!r]*/*.yaml"):
        load_config(path)
    with pytest.raises(UserError, match="unknown config key 'owner'; did you mean 'router'"):
        resolve(MINIMAL | {"owner": "me", "zone": "a"})


@pytest.mark.parametrize("override", ["pair.anchor=a", "router.model=b", "pair={}"])
def test_an_override_of_another_kind_of_run_is_told_from_a_section_of_the_file(override):
    section = "pair" if override.startswith("pair") else "router"
    told = rf"--set \(of a job: set\) got '{override}', but run is anchor, which has no section"
    with pytest.raises(UserError, match=f"{told} '{section}'"):
        resolve(MINIMAL, [override])
    with pytest.raises(UserError, match="section 'pair' belongs to run: pair; got run: anchor"):
        resolve(MINIMAL | {"pair": {"name": "b"}}, ["pair.anchor=a"])


# strings of a config that are no paths
WORDS = {"name", "domain", "owner", "licence", "profile", "text_key", "separator"}


def test_a_run_knows_every_key_that_is_a_path():
    def strings(section: Any) -> set[str]:
        hints = typing.get_type_hints(section)
        inner = [one for hint in hints.values() for one in (hint, *typing.get_args(hint))]
        deeper = [strings(one) for one in inner if dataclasses.is_dataclass(one)]
        return {key for key, hint in hints.items() if hint is str}.union(*deeper)

    tree = {"data": {"train": [{"path": "a"}], "eval": [{"path": "b"}], "tokenizer": "c"}}
    pair = resolve(tree | {"run": "pair", "pair": {"anchor": "d", "name": "n", "public": "e"}})
    router = resolve(tree | {"run": "router", "router": {"model": "f"}})
    anchor = resolve(tree | {"train": {"init": "g"}})
    data = {"data.train[0].path": "a", "data.eval[0].path": "b", "data.tokenizer": "c"}
    assert pair.paths == data | {"pair.anchor": "d", "pair.public": "e"}
    assert router.paths == data | {"router.model": "f"}
    assert anchor.paths == data | {"train.init": "g"}
    known = {key.rpartition(".")[2] for run in (pair, router, anchor) for key in run.paths}
    assert strings(RunConfig) - WORDS == known


@pytest.mark.parametrize("path", ["..", ".", "~", "../there", "~/there/"])
def test_a_source_has_a_name_however_its_path_is_written(path, tmp_path, monkeypatch):
    (tmp_path / "there" / "below").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / ("" if "/" in path else "there")))
    monkeypatch.chdir(tmp_path / "there" / ("below" if path == ".." else ""))
    assert resolve({"data": {"train": [{"path": path}]}}).data.train[0].title == "there"
