"""Plans real steps on real slices, as `flexolmo plan` does, and checks what the plans say. Needs
libtpu, no TPU.

.venv-tpu/bin/python tests/tpu/plan_steps.py    # make test-tpu-compile does it too
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
GIB = 2**30
SLACK = 1.2  # more than what FSDP cannot do without


def plan(*arguments: str) -> tuple[int, dict[str, Any]]:
    command = [sys.executable, "-m", "flexolmo_jax.cli", "plan", *arguments, "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    if not done.stdout:
        raise AssertionError(f"{' '.join(arguments)}: {done.stderr[-2000:]}")
    return done.returncode, json.loads(done.stdout)


def of_kind(report: dict[str, Any], *kinds: str) -> float:
    return sum(row["bytes"] for row in report["collectives"] if row["kind"] in kinds)


def a_pair_reduces_gradients_of_its_expert_alone(topology: str) -> str:
    status, report = plan(
        "configs/1b/pair.yaml",
        "--topology",
        topology,
        "--set",
        "data.batch_size=32",
        "--set",
        "train.accumulate=2",
    )
    assert status == 0 and report["fits"], report["peak_bytes"]
    moved, least = report["collective_bytes"], report["fsdp_minimum_bytes"]
    devices = report["devices"]
    # Less than the least is little: what lies outside of the layers is gathered once for all
    # microbatches.
    assert 0.95 * least < moved < SLACK * least, (moved, least)
    # two microbatches, in bfloat16
    gradients = 2 * report["parameters_bytes"] / 4 * 2 * (devices - 1)
    reduced = of_kind(report, "reduce-scatter", "all-reduce")
    assert 0.95 * gradients < reduced < 1.05 * gradients, (reduced, gradients)
    held = sum(
        report[key]
        for key in ("parameters_bytes", "frozen_bytes", "optimizer_bytes", "batch_bytes")
    )
    assert report["restore_bytes"] == held - report["batch_bytes"], report
    total = held + report["temporary_bytes"] + report["result_bytes"]
    assert abs(total - report["peak_bytes"]) < 0.02 * total and report["temporary_bytes"] > 0, (
        total,
        report["peak_bytes"],
    )
    return f"{report['peak_bytes'] / GIB:.1f} GiB, moved {moved / least:.2f} of the least"


def what_a_pair_moves_overlaps_with_its_products(topology: str) -> str:
    """All but a tenth, where there is a SparseCore; and no more moves for its sake."""
    status, report = plan(
        "configs/7b/pair.yaml", "--topology", topology, "--set", "train.accumulate=64"
    )
    moved, least, blocking = (
        report[key] for key in ("collective_bytes", "fsdp_minimum_bytes", "blocking_bytes")
    )
    assert status == 0 and blocking <= 0.1 * moved, (blocking, moved)
    assert moved <= 1.1 * least, (moved, least)
    return f"{blocking / moved:.0%} blocks, moved {moved / least:.2f} of the least"


def what_does_not_fit_is_refused_with_its_sizes(topology: str) -> str:
    status, report = plan(
        "configs/7b/pair.yaml", "--topology", topology, "--set", "train.accumulate=256"
    )
    assert status == 1 and not report["fits"]
    assert (
        report["peak_bytes"] > report["hbm_bytes"] > 15 * GIB
        and "a larger slice, such as v5e:" in report["change"]
    ), report
    return (
        f"{report['peak_bytes'] / GIB:.1f} of {report['hbm_bytes'] / GIB:.1f} GiB;"
        f" {report['change']}"
    )


def a_decoding_step_gathers_no_weights(topology: str) -> str:
    sets = ("--set", "model.preset=1b", "--set", "model.n_experts=4", "--set", "model.n_active=2")
    status, report = plan(
        "configs/7b/joint.yaml", "--topology", topology, "--decode", "8x1024", *sets
    )
    held = report["frozen_bytes"] + report["cache_bytes"]
    assert status == 0 and report["cache_bytes"] > 0
    # Weights and cache lie as the loop reads them: it holds no second copy of either.
    assert report["temporary_bytes"] < 0.05 * held, (report["temporary_bytes"], held)
    assert report["peak_bytes"] >= report["prefill_bytes"] > held
    assert of_kind(report, "all-gather") < 0.01 * report["frozen_bytes"], report["collectives"]
    seconds = report["seconds"]
    return (
        f"{report['peak_bytes'] / GIB:.1f} GiB, a token takes {seconds['overlapped'] * 1e3:.2f} ms"
        f" at least ({seconds['bound']})"
    )


def several_slices_reduce_over_their_network(topology: str) -> str:
    sets = ("--set", "data.batch_size=32", "--set", "train.accumulate=2", "--set", "mesh.data=2")
    status, report = plan("configs/1b/pair.yaml", "--topology", topology, "--slices", "2", *sets)
    across = sum(
        row["bytes"] for row in report["collectives"] if "data" in row["axes"].split(" x ")
    )
    assert (
        status == 0
        and report["devices"] == 16
        and 0 < across < 1.1 * report["parameters_bytes"]  # once a step, not once a microbatch
    ), report["collectives"]
    return f"{across / GIB:.2f} GiB a step between slices"


SMALL = [
    word
    for key in ("model.n_layers=8", "model.d_model=512", "model.d_ffn=1024", "model.n_heads=4")
    for word in ("--set", key)
]
SMALL += ["--set", "model.n_kv_heads=4", "--set", "model.vocab_size=1024"]
SMALL += ["--set", "data.batch_size=16", "--set", "data.seq_len=2048"]


def what_is_offloaded_leaves_the_device(topology: str) -> str:
    peaks = {}
    for remat in ("outputs", "offload"):
        sets = (*SMALL, "--set", "train.accumulate=2", "--set", f"train.remat={remat}")
        status, report = plan("configs/7b/anchor.yaml", "--topology", topology, *sets)
        assert status == 0 and (report["seconds"]["host"] > 0) == (remat == "offload"), report
        peaks[remat] = report["peak_bytes"]
    assert peaks["offload"] < peaks["outputs"], peaks
    return f"{peaks['offload'] / GIB:.2f} instead of {peaks['outputs'] / GIB:.2f} GiB"


def the_fastest_that_fits_is_planned(topology: str) -> str:
    status, report = plan("configs/7b/anchor.yaml", "--topology", topology, "--tune", *SMALL)
    tune, chosen = report["tune"], report["program"]["train"]
    assert status == 0 and tune["set"] == [
        f"train.{key}={chosen[key]}" for key in ("remat", "accumulate")
    ], tune
    # There is room for all of it: nothing is multiplied again.
    assert chosen["remat"] == "dots" and chosen["accumulate"] == 1, tune
    assert len(tune["tried"]) < len(tune["left_out"]), tune
    return f"{' '.join(tune['set'])}, {len(tune['tried'])} compiled"


CHECKS = [
    *(
        (a_pair_reduces_gradients_of_its_expert_alone, topology)
        for topology in ("v5e:2x4", "v5p:2x2x2")
    ),
    *(
        (what_a_pair_moves_overlaps_with_its_products, topology)
        for topology in ("v5p:2x2x4", "v6e:4x4")
    ),
    (what_does_not_fit_is_refused_with_its_sizes, "v5e:2x2"),
    (a_decoding_step_gathers_no_weights, "v6e:2x4"),
    (what_is_offloaded_leaves_the_device, "v5p:2x2x1"),
    (the_fastest_that_fits_is_planned, "v5p:2x2x1"),
    (several_slices_reduce_over_their_network, "v5e:2x4"),
]


def main() -> int:
    failed = 0
    for check, topology in CHECKS:
        try:
            outcome = check(topology)
        except AssertionError as error:
            failed, outcome = failed + 1, f"FAILED: {error}"
        print(f"{check.__name__.replace('_', ' ')}, {topology}: {outcome}", flush=True)
    print(f"{len(CHECKS) - failed} passed, {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
