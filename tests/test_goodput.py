"""The simulated year of preemptions against what is known without simulating, and the configs
against its result."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest

from benchmarks.goodput import (
    HOUR,
    ROOT,
    YEAR,
    Costs,
    daly,
    main,
    on_a_slice,
    simulate,
    young,
)
from flexolmo_jax.config import load_config
from flexolmo_jax.config.run import TrainConfig

COSTS = Costs(step=12.0, block=3.0, write=0.0, start=300.0)
REPORT = json.loads((ROOT / "benchmarks/results/goodput.json").read_text())


def test_a_table_of_no_results_is_a_mistake_told_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["goodput.py", "--out", str(tmp_path / "no.json"), "--table"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2 and "no.json has no results" in capsys.readouterr().err


@pytest.mark.parametrize("interval", [1.0, 60.0, 1800.0])
def test_without_preemptions_the_rest_is_what_saves_block(interval):
    costs = dataclasses.replace(COSTS, start=0.0, write=5.0)
    steps = max(1, math.ceil(interval / costs.step))
    # a save waits for the one before it
    between = max(steps * costs.step, costs.write) + costs.block
    expected = steps * costs.step / between
    found = simulate(costs, interval, math.inf, length=YEAR)
    assert found.slices == 1
    assert found.goodput == pytest.approx(expected, abs=3 * between / YEAR)


@pytest.mark.parametrize("life", [2 * HOUR, 16 * HOUR])
@pytest.mark.parametrize("minutes", [5, 30, 120])
def test_with_exponential_lives_it_is_what_daly_expects(minutes, life):
    values = [simulate(COSTS, 60 * minutes, life, seed=seed).goodput for seed in range(16)]
    error = np.std(values, ddof=1) / math.sqrt(len(values))
    assert abs(np.mean(values) - daly(COSTS, 60 * minutes, life)) < 4 * error
    assert error < 0.005


def test_the_best_interval_is_youngs():
    costs, life = dataclasses.replace(COSTS, step=1.0, block=30.0), 8 * HOUR
    best = young(costs, life)
    goodputs = [
        np.mean([simulate(costs, best * factor, life, seed=seed).goodput for seed in range(8)])
        for factor in (0.25, 1.0, 4.0)
    ]
    assert max(goodputs) == goodputs[1]


def test_only_a_save_that_is_whole_counts():
    costs = Costs(step=10.0, block=1.0, write=100.0, start=50.0)
    for end, kept in ((49, 0), (150, 0), (209, 0), (211, 100), (1e4, None)):
        found, on_notice = on_a_slice(costs, 60.0, end, 0.0)
        assert not on_notice
        if kept is not None:
            # six steps and the block are over at 111, the save is whole at 211
            assert found == (60 if end == 211 else kept)


def test_a_notice_saves_the_step_that_is_running_where_there_is_time():
    costs = Costs(step=10.0, block=1.0, write=5.0, start=50.0)
    # at 305 the step from 300 on is running; it ends at 310 and is whole at 316
    assert on_a_slice(costs, 1e9, 316 + 1e-6, 11 + 1e-6) == (260.0, True)
    assert on_a_slice(costs, 1e9, 315, 10) == (0.0, False)
    slow = dataclasses.replace(costs, step=40.0)
    for seed in range(3):
        with_notice, without = (simulate(slow, 600, 4 * HOUR, n, seed) for n in (30.0, 0.0))
        assert without.saved_on_notice == 0 < with_notice.saved_on_notice < with_notice.slices
        assert with_notice.kept > without.kept
        too_short = simulate(slow, 600, 4 * HOUR, 5.0, seed)
        assert too_short.saved_on_notice == 0 and too_short.kept <= without.kept


def test_what_the_configs_say_is_what_the_year_says():
    said = REPORT["save_minutes"]
    configs = [path for size in ("1b", "7b") for path in Path(ROOT / "configs" / size).glob("*")]
    assert len(configs) > 5
    assert {load_config(path).train.save_minutes for path in configs} == {said}
    assert TrainConfig().save_minutes == said
