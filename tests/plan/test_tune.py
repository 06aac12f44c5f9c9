"""Which steps `flexolmo plan --tune` compiles, and which it chooses; tests/tpu has it with the
TPU's compiler."""

import itertools
import random
from typing import Any, get_args

import pytest

from flexolmo_jax.cli import main
from flexolmo_jax.config import MeshConfig, Remat, RunConfig, load_config
from flexolmo_jax.plan import tune as tuning
from flexolmo_jax.plan.report import GIB, _training_advice
from flexolmo_jax.plan.tune import TOO_LARGE, Candidate, Search, search
from flexolmo_jax.runtime.sharding import make_mesh
from flexolmo_jax.runtime.tpus import slice_of
from tests.test_configs import ROOT

ANCHOR = ROOT / "configs" / "7b" / "anchor.yaml"
ROW = ("full", "attention", "outputs", "ffn", "dots")  # each keeps more than the one before
SPLITS = (1, 2, 4, 8)
LIMIT = 1000
TIMES = {"overlapped": 1.0, "in_turn": 1.0}


def run_of(remat: str, accumulate: int) -> RunConfig:
    return load_config(ANCHOR, [f"train.remat={remat}", f"train.accumulate={accumulate}"])


RUNS = {key: run_of(*key) for key in itertools.product((*ROW, "offload"), SPLITS)}


def kept(remat: str) -> int:
    return 0 if remat == "offload" else ROW.index(remat)


class Compiler:
    """Figures of a step with any settings, drawn at random: a peak that grows with what is kept
    and with the microbatch, and times no less than their bounds."""

    def __init__(self, seed: int):
        draw = random.Random(seed)
        self.asked: list[tuple[str, int]] = []
        base, slope = draw.uniform(100, 1200), draw.uniform(10, 300)
        speed, network = draw.uniform(1, 10), draw.uniform(0, 20)
        self.bounds, self.reports = {}, {}
        for remat, accumulate in RUNS:
            peak = int(base + slope * (1 + kept(remat)) * 8 / accumulate)
            compute = 10 + speed * (4 - kept("outputs" if remat == "offload" else remat))
            host = draw.uniform(0, 5) if remat == "offload" else 0.0
            least = {"overlapped": compute, "in_turn": compute + network * accumulate / 8 + host}
            times = {name: time * draw.uniform(1, 1.1) for name, time in least.items()}
            self.bounds[remat, accumulate] = int(peak * draw.uniform(0.5, 1)), least
            fits = peak <= LIMIT
            report = {"fits": fits, "peak_bytes": peak} | ({"seconds": times} if fits else {})
            self.reports[remat, accumulate] = report

    def candidates(self) -> list[Candidate]:
        return [Candidate(RUNS[key], *bounds) for key, bounds in self.bounds.items()]

    def plan(self, run: RunConfig) -> dict[str, Any]:
        key = run.train.remat, run.train.accumulate
        self.asked.append(key)
        return self.reports[key]

    def search(self) -> Search:
        return search(self.candidates(), LIMIT, self.plan)


def rank(report: dict[str, Any]) -> tuple[float, int]:
    """The middle of the times, to three digits; then the peak."""
    middle = sum(report["seconds"].values()) / 2
    return float(f"{middle:.3g}"), report["peak_bytes"]


@pytest.mark.parametrize("seed", range(200))
def test_the_search_finds_what_trying_everything_finds_with_fewer_compilations(seed):
    compiler = Compiler(seed)
    found = compiler.search()
    fitting = [rank(report) for report in compiler.reports.values() if report["fits"]]
    assert len(compiler.asked) == len(set(compiler.asked)) == len(found.tried) < len(RUNS)
    assert len(found.tried) + len(found.left_out) == len(RUNS)
    if not fitting:
        assert found.best is None and found.tried
        return
    assert found.best is not None
    assert rank(found.best.report) == min(fitting)


def test_equal_times_are_decided_by_the_peak():
    times = {"overlapped": 10.0, "in_turn": 12.0}
    found = [Candidate(RUNS["dots", n], 10, times) for n in (1, 2)]
    peaks = {1: 800, 2: 500}

    def plan(run: RunConfig) -> dict[str, Any]:
        near = times | {"in_turn": 12.0 + 0.001 * run.train.accumulate}
        return {"fits": True, "peak_bytes": peaks[run.train.accumulate], "seconds": near}

    best = search(found, LIMIT, plan).best
    assert best is not None and best.candidate.settings == {"remat": "dots", "accumulate": 2}


def test_what_keeps_no_less_than_what_was_refused_is_not_compiled():
    times = {"overlapped": 1.0, "in_turn": 1.0}
    found = [Candidate(RUNS[key], 10, times) for key in RUNS]
    asked = []

    def plan(run: RunConfig) -> dict[str, Any]:
        asked.append((run.train.remat, run.train.accumulate))
        return {"fits": False, "peak_bytes": 2 * LIMIT}

    result = search(found, LIMIT, plan)
    for later, (remat, accumulate) in enumerate(asked):
        for before in asked[:later]:
            assert kept(before[0]) > kept(remat) or before[1] < accumulate
    assert result.best is None and {one["why"] for one in result.left_out} == {TOO_LARGE}


def test_where_nothing_can_fit_the_smallest_is_compiled_for_its_refusal():
    found = [
        Candidate(RUNS["full", n], 2 * LIMIT // n + LIMIT, {"overlapped": 1.0, "in_turn": float(n)})
        for n in SPLITS
    ]
    result = search(found, LIMIT, lambda run: {"fits": False, "peak_bytes": 3 * LIMIT})
    assert [one.candidate.settings for one in result.tried] == [{"remat": "full", "accumulate": 8}]
    assert len(result.left_out) == 3


def test_where_nothing_fits_no_setting_is_advised(monkeypatch):
    monkeypatch.setattr(tuning, "candidates", lambda *_: [Candidate(RUNS["full", 1], 1, TIMES)])
    refused = {"fits": False, "peak_bytes": 100 * GIB, "change": "--set train.accumulate=2"}
    monkeypatch.setattr(tuning, "plan_training", lambda *_: refused)
    report = tuning.tune(RUNS["full", 1], slice_of("v5p:2x2x1"))
    assert report["change"] == "more slices or a larger slice, such as v5p:2x2x2"
    assert report["tune"]["set"] == []


def test_no_setting_is_advised_where_the_state_alone_does_not_fit():
    slice_, run = slice_of("v5e:1x1"), load_config(ANCHOR, ["train.accumulate=1"])
    mesh = make_mesh(MeshConfig(fsdp=1))
    report = {"peak_bytes": 122 * GIB, "hbm_bytes": 15 * GIB, "frozen_bytes": 0}
    report |= {"parameters_bytes": 10 * GIB, "optimizer_bytes": 20 * GIB}
    told = _training_advice(run, slice_, 1, mesh, report)
    assert told == "more slices or a larger slice, such as v5e:2x4"
    report |= {"parameters_bytes": 2 * GIB, "optimizer_bytes": 4 * GIB}
    assert "train.accumulate=" in _training_advice(run, slice_, 1, mesh, report)


def test_every_policy_is_known_to_the_order():
    assert {*ROW, "offload", "none"} == set(get_args(Remat))


def test_tuning_is_for_training_steps(capsys):
    arguments = ["plan", str(ANCHOR), "--topology", "v5p:2x2x1", "--decode", "16x4096", "--tune"]
    assert main(arguments) == 2
    assert "--tune is for training steps; leave out --tune or --decode" in capsys.readouterr().err
