"""The configs that ship: each is complete and explained, has the shapes it says, and makes a step
as `flexolmo train` runs it."""

import dataclasses
import functools
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import yaml

from flexolmo_jax.cli import main
from flexolmo_jax.config import ModelConfig, RunConfig, load_config
from flexolmo_jax.coordinator.router import is_trained as is_trained_in_a_router_run
from flexolmo_jax.model import Params, init_params, logical_axes
from flexolmo_jax.model.tree import flatten, partition
from flexolmo_jax.owner.pair import is_trained as is_trained_in_a_pair
from flexolmo_jax.runtime.sharding import parameter_sharding
from flexolmo_jax.train.metrics import read_metrics
from flexolmo_jax.train.optimizer import make_optimizer
from flexolmo_jax.train.state import TrainState
from flexolmo_jax.train.step import make_step
from tests.tiny import MODEL, SEQ_LEN

ROOT = Path(__file__).parent.parent
CONFIGS = sorted(
    path for path in (ROOT / "configs").rglob("*.yaml") if path.parent.name != "reproduce"
)
LARGE = [path for path in CONFIGS if path.parent.name != "tiny"]
EXPERTS = 8  # of the merged model in shape checks: the paper's larger one


def name(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


each_config = pytest.mark.parametrize("path", CONFIGS, ids=name)
each_large_config = pytest.mark.parametrize("path", LARGE, ids=name)
TRAINED = {
    "anchor": lambda _: True,
    "joint": lambda _: True,
    "pair": is_trained_in_a_pair,
    "router": is_trained_in_a_router_run,
}


def architecture(path: Path) -> tuple[RunConfig, ModelConfig]:
    """A config and the architecture it trains, which for a pair and a router comes from the anchor
    of the same size."""
    run = load_config(path)
    model = run.model
    if run.run in ("pair", "router"):
        anchor = load_config(path.with_name("anchor.yaml")).model
        model = dataclasses.replace(
            anchor, router_bias=model.router_bias, init_bias=model.init_bias
        )
    if run.run == "router":
        model = dataclasses.replace(model, n_experts=EXPERTS, n_active=4)
    if model.vocab_size == 0:  # the tokenizer's, known when the run starts
        model = dataclasses.replace(model, vocab_size=8192)
    return run, model


def shapes(model: ModelConfig, pair: bool) -> Params:
    return jax.eval_shape(functools.partial(init_params, model, pair=pair), jax.random.key(0))


def count(params: Params) -> int:
    return sum(math.prod(a.shape) for a in jax.tree.leaves(params))


def test_every_size_has_its_three_runs():
    assert {name(path) for path in CONFIGS} >= {
        f"{size}/{run}" for size in ("tiny", "1b", "7b") for run in ("anchor", "pair", "router")
    }


@each_large_config
def test_every_knob_has_a_comment(path):
    lines = path.read_text().splitlines()
    knobs = [
        i
        for i, line in enumerate(lines)
        if line.strip() and not line.strip().startswith("#") and not line.endswith(":")
    ]
    assert [
        lines[i] for i in knobs if "#" not in lines[i] and not lines[i - 1].strip().startswith("#")
    ] == []


@each_large_config
def test_large_configs_show_every_knob_that_matters_to_them(path):
    written = yaml.safe_load(path.read_text())
    run = load_config(path)
    not_used = {
        "data": {"tokenizer"},
        "train": {"init"},
        "optim": {"router_z_loss", "router_lr", "load_balance"},
    }
    for section in ("data", "train", "optim", "mesh", *({"pair", "router"} & written.keys())):
        fields = {field.name for field in dataclasses.fields(getattr(run, section))}
        assert fields - written[section].keys() <= not_used.get(section, set()), section


@each_config
def test_a_step_of_the_whole_size_has_the_shapes_it_should(path):
    run, model = architecture(path)
    run = dataclasses.replace(run, model=model)
    params = shapes(model, pair=run.run == "pair")
    trained, frozen = partition(params, TRAINED[run.run])
    released = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, jnp.bfloat16), frozen)
    optimizer = make_optimizer(run.optim, run.train.steps, run.train.skip_spikes)
    state = TrainState(trained, jax.eval_shape(optimizer.init, trained))
    records = (run.data.batch_size, run.data.seq_len)
    batch = {
        "tokens": jax.ShapeDtypeStruct(records, "int32"),
        "segments": jax.ShapeDtypeStruct(records, "int32"),
    }
    batch["targets"] = jax.ShapeDtypeStruct(records, "bool")
    after, metrics = jax.eval_shape(make_step(model, run, optimizer), state, released, batch, 1)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), after) == jax.tree.map(
        lambda a: (a.shape, a.dtype), state
    )
    assert metrics["loss"].shape == () and metrics["loss"].dtype == jnp.float32
    assert metrics["router_share"].shape == (model.n_experts + (run.run == "pair"),)


# every device routes its tokens by all of them; 4 MiB at the largest size
ON_PURPOSE = ("experts/row", "expert/row")


@pytest.mark.parametrize(
    ("path", "devices"), [(path, n) for path in CONFIGS for n in ((64,
    256) if path in LARGE else (8,))],
    ids=lambda value: name(value) if isinstance(value, Path) else str(value),
)  # fmt: skip
def test_no_large_parameter_is_whole_on_every_device_by_accident(path, devices):
    """Trained or frozen: above 1 MiB in float32 each is split over some axis of its config's
    mesh."""
    run, model = architecture(path)
    sizes = dataclasses.asdict(run.mesh)
    rest = devices // math.prod(n for n in sizes.values() if n != -1)
    mesh = jax.sharding.AbstractMesh(
        tuple(rest if n == -1 else n for n in sizes.values()), tuple(sizes)
    )
    pair = run.run == "pair"
    axes = flatten(logical_axes(model, pair=pair))
    whole = [
        path
        for path, a in flatten(shapes(model, pair)).items()
        if 4 * math.prod(a.shape) > 2**20
        and parameter_sharding(mesh, axes[path], a.shape).shard_shape(a.shape) == a.shape
    ]
    assert mesh.size == devices and not set(whole) - set(ON_PURPOSE)


@pytest.mark.parametrize(
    ("size", "dense", "pair"),
    [("1b", 1.48, 2.29), ("7b", 7.30, 11.63)],  # billions; the 7B's are the paper's
)
def test_large_models_have_the_published_number_of_parameters(size, dense, pair):
    _, model = architecture(ROOT / "configs" / size / "anchor.yaml")
    assert count(shapes(model, pair=False)) / 1e9 == pytest.approx(dense, abs=0.005)
    assert count(shapes(model, pair=True)) / 1e9 == pytest.approx(pair, abs=0.005)


@pytest.mark.parametrize(("kind", "tokens"), [("anchor", 1000e9), ("pair", 50e9), ("router", 5e9)])
def test_the_largest_configs_run_for_the_papers_tokens(kind, tokens):
    run = load_config(ROOT / "configs" / "7b" / f"{kind}.yaml")
    assert run.train.steps * run.data.batch_size * run.data.seq_len == pytest.approx(
        tokens, rel=1e-3
    )


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(
            path, marks=[] if path.parent.name == "tiny" else pytest.mark.slow, id=name(path)
        )
        for path in CONFIGS
    ],
)
def test_one_step_of_it_runs_at_a_reduced_width(path, anchor, model, prepared, tmp_path, capfd):
    run, out = load_config(path), tmp_path / "run"
    corpora = ["care"] if run.run == "pair" else ["public", "code", "law"][: len(run.data.train)]
    overrides: dict[str, Any] = {
        "data.train": [{"path": str(prepared[corpus])} for corpus in corpora],
        "data.eval": [],
        "data.tokenizer": "",
        "data.seq_len": SEQ_LEN,
        "data.batch_size": 4 * run.train.accumulate,
        "train.steps": 1,
        "train.eval_records": 8,
        "train.init": run.train.init and str(anchor),
        "optim.warmup": 0,  # else the first step's learning rate is 0
        # compiles three times faster than eight devices, which tests of the loop are about
        "mesh.fsdp": 1,
    }
    if run.run == "pair":
        overrides["pair.anchor"] = str(anchor)
    elif run.run == "router":
        overrides["router.model"] = str(model)
    if not run.train.init:
        overrides |= {f"model.{name}": value for name, value in (MODEL | {"vocab_size": 0}).items()}
    settings = [
        word for key, value in overrides.items() for word in ("--set", f"{key}={json.dumps(value)}")
    ]
    assert main(["train", str(path), *settings, "--out", str(out), "--json"]) == 0
    result = json.loads(capfd.readouterr().out)
    assert result["step"] == 1 and all(0 < score < 20 for score in result["bits_per_byte"].values())
    entry = read_metrics(out)[0]
    assert (
        math.isfinite(entry["loss"])
        and entry["gradient_norm"] > 0
        and entry["learning_rate"] == pytest.approx(run.optim.lr)
    )
    stored = json.loads((out / "flexolmo.json").read_text())["tensors"]
    assert stored.keys() == {
        name
        for name in flatten(shapes(architecture(path)[1], run.run == "pair"))
        if TRAINED[run.run](name)
    }
