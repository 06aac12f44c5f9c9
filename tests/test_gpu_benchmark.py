"""benchmarks/gpu.py on any device: without a GPU its figures mean nothing, but every case runs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_every_case_but_cudnns_runs_without_a_gpu(tmp_path):
    out = tmp_path / "tiny.json"
    command = [sys.executable, ROOT / "benchmarks/gpu.py", "--size", "tiny", "--out", out]
    subprocess.run([*command, "--work", tmp_path], check=True)
    measured = json.loads(out.read_text())["measured"]
    assert [case for case, found in measured.items() if "failed" in str(found)] == [
        "attention cudnn"
    ]
    assert measured["logits differ by"] < 1e-3
    assert measured["pair none"]["share"] > 0
    assert {"experts blocks", "experts ragged_dot"} <= measured.keys()
    assert set(measured["decode here"]["seconds_a_token"]) == {"batch 1", "batch 16"}
    assert not [path for path in tmp_path.iterdir() if path != out]
