"""What `flexolmo plan` takes and tells, as far as it goes without the TPU's compiler; tests/tpu has
the rest."""

import dataclasses
import functools
import importlib.util
import json
import math
import re

import jax
import pytest

from flexolmo_jax.cli import main
from flexolmo_jax.config import MeshConfig, load_config
from flexolmo_jax.errors import UserError
from flexolmo_jax.kernels import Kernels
from flexolmo_jax.model import init_params
from flexolmo_jax.model.tree import flatten
from flexolmo_jax.plan import report
from flexolmo_jax.plan.program import program_of
from flexolmo_jax.plan.report import _needed, unread_bytes
from flexolmo_jax.plan.steps import Decoded, architecture, decoded, generation, training_step
from flexolmo_jax.runtime.sharding import make_mesh
from flexolmo_jax.train.flops import forward_flops, step_flops
from tests.test_configs import CONFIGS, LARGE, ROOT, name

PAIR = ROOT / "configs" / "7b" / "pair.yaml"


@pytest.mark.parametrize("path", LARGE, ids=name)
def test_flops_are_two_for_every_weight_a_token_meets_and_every_place_it_attends_to(path):
    run = load_config(path)
    model = architecture(run)
    shapes = flatten(
        jax.eval_shape(
            functools.partial(init_params, model, pair=run.pair is not None), jax.random.key(0)
        )
    )
    sizes = {
        key: math.prod(a.shape)
        for key, a in shapes.items()
        if key == "trunk/head/kernel" or (len(a.shape) > 2 and not key.endswith("row"))
    }
    active = {"pair": 2, "router": model.n_experts}.get(run.run, model.n_active)
    experts = (
        sum(n for key, n in sizes.items() if key.startswith("expert"))
        / (2 if run.pair else model.n_experts)
        * active
    )
    trunk = sum(n for key, n in sizes.items() if key.startswith("trunk"))
    T = run.data.seq_len
    scores = model.n_layers * 2 * 2 * (T / 2) * model.d_model
    assert sum(forward_flops(model, active, T / 2)) == pytest.approx(2 * (trunk + experts) + scores)
    flops = step_flops(run, model)
    weights = {"pair": experts / 2, "router": 0}.get(run.run, trunk + experts)
    tokens = run.data.batch_size * T
    assert flops.model == pytest.approx(
        tokens * (2 * (2 * (trunk + experts) + weights) + 3 * scores)
    )
    # a forward pass of the layers again
    assert 1.1 * flops.model < flops.hardware < 1.6 * flops.model


@pytest.mark.parametrize("path", CONFIGS, ids=name)
def test_every_config_can_be_planned_without_anything_beside_it(path):
    """An anchor and a merged model that are not there yet are taken to be what the config's `model`
    says."""
    overrides = ["model.vocab_size=512"] if path.parent.name == "tiny" else []
    overrides += ["model.n_experts=3"] if path == ROOT / "configs" / "tiny" / "router.yaml" else []
    run = load_config(path, [*overrides, "train.accumulate=2", "mesh.fsdp=2"])
    mesh = make_mesh(run.mesh)
    step = training_step(run, architecture(run), mesh)
    state, metrics = jax.eval_shape(step.function, *step.arguments)
    assert (
        jax.tree.structure(state) == jax.tree.structure(step.arguments[0])
        and metrics["loss"].shape == ()
    )


def small_decoding(*overrides: str, **sizes: int) -> Decoded:
    what = decoded(ROOT / "configs" / "7b" / "joint.yaml", overrides)
    model = dataclasses.replace(what.model, d_model=256, d_ffn=64, n_layers=2, **sizes)
    return what._replace(model=model, vocab_size=model.vocab_size)


def test_the_cache_stays_where_it_lies_while_prompts_are_read_and_completed():
    what = small_decoding("mesh.tensor=8", n_heads=8, n_kv_heads=8, vocab_size=512)
    generating = generation(what, make_mesh(what.mesh), 4, 64)
    loop = generating.step()
    loop = loop.function.lower(*loop.arguments).compile()
    prefill = generating.prefill(loop)
    prefill = prefill.function.lower(*prefill.arguments).compile()
    for compiled in (loop, prefill):
        keys = compiled.output_shardings.cache.keys
        assert keys.shard_shape((2, 4, 8, 64, 32)) == (2, 4, 1, 64, 32)


def test_prompts_that_do_not_divide_over_the_mesh_are_refused_before_anything_is_compiled():
    what = small_decoding("mesh.expert=4", "mesh.tensor=1")
    with pytest.raises(UserError, match="3 sequences do not divide over 4 devices"):
        generation(what, make_mesh(what.mesh), 3, 64)


def test_a_decoding_step_is_planned_with_the_kernels_that_are_named():
    what, where = small_decoding(n_heads=2, n_kv_heads=2), make_mesh(MeshConfig(fsdp=1))
    routing = {"route_forward", "dispatch_plan", "permute", "combine"}
    cases: dict[Kernels, set[str]] = {"xla": set(), "pallas": routing}
    for kernels, named in cases.items():
        step = generation(what, where, 4, 64, kernels).step()
        lowered = step.function.trace(*step.arguments).lower(lowering_platforms=("tpu",))
        found = set(re.findall(r'kernel_name = "(\w+)"', lowered.as_text()))
        assert found - {"kernel"} == named  # below jax 0.12 megablox's products are `kernel`


def test_a_program_is_the_same_where_only_what_the_compiler_never_sees_differs():
    run = load_config(PAIR)
    same = load_config(
        PAIR,
        ["optim.lr=1e-3", "train.steps=5", "pair.name=other", "data.train=[{path: elsewhere}]"],
    )
    assert program_of(run) == program_of(same)
    for change in (
        "train.remat=none",
        "data.batch_size=512",
        "mesh.tensor=2",
        "model.d_ffn=64",
        "pair.contrast=0",
        "train.accumulate=8",
        "kernels=pallas",
    ):
        assert program_of(load_config(PAIR, [change])) != program_of(run), change


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--topology", "v5x:4x4x4"], "did you mean v5"),
        (["--topology", "v5p:4x4x5"], "the nearest is v5p:4x4x4"),
        (
            ["--topology", "v5p:4x4x4", "--set", "mesh.fsdp=32"],
            "does not fill the 64 devices of 1 x v5p:4x4x4",
        ),
        (["--topology", "v5p:4x4x4", "--set", "mesh.tensor=3"], "does not divide 64 devices"),
        (["--topology", "v5p:4x4x4", "--set", "mesh.fsdp=128"], "needs 128 devices; got 64"),
        (["--topology", "v5p:4x4x4", "--slices", "2"], "mesh.data is 1; expected a multiple of 2"),
        (
            [
                "--topology",
                "v5p:4x4x4",
                "--set",
                "data.batch_size=96",
                "--set",
                "train.accumulate=1",
            ],
            "does not divide over the 64 devices",
        ),
        (["--topology", "v5p:4x4x4", "--set", "model.n_layers=0"], "model.n_layers is 0"),
        (["--topology", "v5p:4x4x4", "--decode", "16"], "expected prompts x tokens of context"),
        (["--topology", "v5p:4x4x4", "--slices", "0"], "expected 1 or more"),
        (
            ["--topology", "v5p:2x2x1", "--decode", "16x4096", "--slices", "2"],
            "what generates runs on one slice",
        ),
        (
            ["--topology", "v5p:2x2x1", "--decode", "16x4097"],
            "context of --decode is 4097; expected 2 to 4096",
        ),
        (["--topology", "v5p:2x2x1", "--decode", "16x1"], "context of --decode is 1;"),
    ],
)
def test_mistakes_are_told_in_one_line_before_anything_is_compiled(arguments, told, capsys):
    try:
        status = main(["plan", str(PAIR), *arguments])
    except SystemExit as stop:
        status = stop.code
    error = capsys.readouterr().err
    assert status == 2 and told in error and "Traceback" not in error


@pytest.mark.parametrize(
    ("message", "gib"),
    [
        # As libtpu 0.0.50 says it, and as earlier ones did.
        (
            (
                "Ran out of memory on HBM, the total memory required for HLO temporaries (45.83G)"
                " exceeds available HBM (31.24G)."
            ),
            45.83,
        ),
        (
            (
                "Ran out of memory in memory space hbm. Used 35.80G of 31.24G hbm. Exceeded hbm"
                " capacity by 4.56G."
            ),
            35.8,
        ),
        ("Used 512.00M of 256.00M hbm.", 0.5),
    ],
)
def test_a_refusal_tells_what_would_be_needed(message, gib):
    assert _needed(message) == pytest.approx(gib * 2**30)


def test_an_architecture_that_nothing_says_is_asked_for():
    run = load_config(ROOT / "configs" / "tiny" / "pair.yaml")
    with pytest.raises(UserError, match=r"vocab_size is not given; .*: --set model\.preset=7b"):
        architecture(run)
    run = load_config(ROOT / "configs" / "tiny" / "anchor.yaml")  # all but the tokenizer's size
    with pytest.raises(UserError, match=r": --set model\.vocab_size=8192$"):
        architecture(run)


@pytest.fixture
def refused(monkeypatch):
    """A slice that does not exist here, for which the compiler refuses every program."""
    monkeypatch.setattr(report, "_devices", lambda *_: jax.devices())
    monkeypatch.setattr(report, "_compiled", lambda *_: 141 * 2**30)


@pytest.mark.parametrize("more", [(), ("--decode", "16x4096", "--set", "mesh.tensor=8")])
def test_the_memory_of_what_does_not_fit_adds_up_to_what_it_needs(more, refused, capsys):
    config = ROOT / "configs" / "7b" / ("joint.yaml" if more else "anchor.yaml")
    assert main(["plan", str(config), "--topology", "v5e:2x4", *more]) == 1
    listed = re.findall(r"^  (.+?)  +([0-9.]+) GiB$", capsys.readouterr().out, re.MULTILINE)
    sizes = {name: float(size) for name, size in listed}
    assert sum(sizes.values()) == pytest.approx(141, abs=0.05) and sizes["temporaries"] > 50


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ((), "a training step (train.remat=full, train.accumulate=4) for v5e:2x4; this may take"),
        (("--decode", "16x4096", "--set", "mesh.tensor=8"), "what reads 16 prompts and completes"),
    ],
)
def test_a_plan_says_what_it_compiles_before_it_does(more, told, refused, monkeypatch, capsys):
    monkeypatch.setattr(report, "_compiled", lambda *_: pytest.fail(capsys.readouterr().err))
    with pytest.raises(pytest.fail.Exception, match=re.escape(f"compiling {told}")):
        main(["plan", str(ROOT / "configs/7b/joint.yaml"), "--topology", "v5e:2x4", *more])


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is here")
def test_a_plan_without_the_compiler_says_how_to_get_it(capsys):
    assert main(["plan", str(PAIR), "--topology", "v5p:4x4x4"]) == 2
    assert "&& .venv-tpu/bin/pip install -e '.[tpu]' && .venv" in capsys.readouterr().err


def test_the_report_of_a_plan_is_written_whole_to_a_new_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "plan_training", lambda *_: {"fits": False, "peak_bytes": 1})
    monkeypatch.setattr(report, "show", lambda _: "what people read")
    out = tmp_path / "plans" / "pair.json"
    command = ["plan", str(PAIR), "--topology", "v5p:4x4x4", "--out", str(out)]
    assert main(command) == 1  # it does not fit: a report too
    assert json.loads(out.read_text()) == {"fits": False, "peak_bytes": 1}
    assert capsys.readouterr().out == "what people read\n"
    monkeypatch.setattr(report, "plan_training", lambda *_: pytest.fail("compiled for nothing"))
    assert main(command) == 2 and f"{out} exists; give a new file" in capsys.readouterr().err


@pytest.mark.parametrize(("active", "batch", "share"), [(2, 1, 3 / 4), (2, 3, 27 / 64), (8, 1, 0)])
def test_experts_that_no_token_chooses_are_not_read(active, batch, share):
    what = small_decoding("mesh.expert=4", "mesh.tensor=1", n_experts=8, n_active=active)
    step = generation(what, make_mesh(what.mesh), 4, 64).step()
    experts = 3 * 2 * (8 // 4) * 256 * 64 * 2  # matrices, layers, experts of a device, width, bytes
    assert unread_bytes(step.kinds["frozen"], what.model, batch) == int(experts * share)
