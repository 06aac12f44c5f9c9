"""Where the time goes: phases add up, MFU is what hand-made figures give, profiles are written of
the steps asked for."""

import gzip
import json
import time
from types import SimpleNamespace

import pytest

from flexolmo_jax.runtime.tpus import CHIPS
from flexolmo_jax.train.accounting import PHASES, Accounting, peak_flops
from flexolmo_jax.train.flops import step_flops
from flexolmo_jax.train.metrics import read_metrics
from flexolmo_jax.train.pretrain import pretrain
from tests.tiny import run_config


def device(platform: str, kind: str) -> SimpleNamespace:
    return SimpleNamespace(platform=platform, device_kind=kind)


def test_phases_add_up_to_the_time_that_passed():
    accounting = Accounting()
    with accounting.spent("step"):
        time.sleep(0.02)
    with accounting.spent("data"):
        time.sleep(0.01)
    seconds = accounting.seconds()
    assert seconds["step"] >= 0.02 and seconds["data"] >= 0.01 and seconds["other"] >= 0
    assert sum(seconds[name] for name in (*PHASES, "other")) == pytest.approx(seconds["total"])
    assert 0 < accounting.goodput() < 1


def test_the_peak_is_that_of_a_device_and_unknown_for_a_cpu():
    assert peak_flops(device("tpu", "TPU v5p")) == 459e12
    assert peak_flops(device("tpu", "TPU7x")) == 2307e12 / 2  # two devices a chip
    assert peak_flops(device("gpu", "NVIDIA H100 80GB HBM3")) == 989e12
    assert peak_flops(device("cpu", "cpu")) is None and peak_flops(device("tpu", "TPU v3")) is None
    assert len({kind for chip in CHIPS.values() for kind in chip.kinds}) == 7


def test_a_run_tells_its_goodput_its_phases_and_its_share_of_the_peak(
    prepared, tmp_path, monkeypatch
):
    run = run_config(
        "anchor", prepared["public"], "train.steps=6", "train.save_every=3", "model.vocab_size=384"
    )
    monkeypatch.setattr("flexolmo_jax.train.accounting.peak_flops", lambda _: 1e9)
    pretrain(run, tmp_path / "run")
    entries = read_metrics(tmp_path / "run")
    steps = [entry for entry in entries if "loss" in entry]
    flops = step_flops(run, run.model).model
    for entry in steps:
        assert entry["mfu"] == pytest.approx(flops * entry["tokens_per_second"] / (8 * 32) / 1e9)
        assert 0 < entry["goodput"] < 1
    seconds = [entry["seconds"] for entry in entries if "seconds" in entry]
    assert (
        len(seconds) == 2
        and seconds[0]["total"] < seconds[1]["total"]
        and seconds[1]["compile"] > 0
        and seconds[1]["eval"] > 0
    )


def test_a_profile_holds_the_steps_that_were_asked_for(prepared, tmp_path, capsys):
    pretrain(
        run_config("anchor", prepared["public"], "train.steps=6", "train.profile='3:4'"),
        tmp_path / "run",
    )
    places = [
        path.relative_to(tmp_path / "run" / "profile" / "plugins" / "profile")
        for path in (tmp_path / "run").rglob("*.xplane.pb")
    ]
    assert len(places) == 1 and len(places[0].parts) == 2  # when/host, as xprof looks for them
    (trace,) = (tmp_path / "run").rglob("*.trace.json.gz")
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    assert {event["args"]["step_num"] for event in events if event.get("name") == "train"} == {
        "3",
        "4",
    }
    assert "see it with xprof" in capsys.readouterr().err
