"""Plans an expert of the quickstart on Colab's accelerators: memory from the TPU's compiler,
minutes from its count of operations. Nothing is run, and nothing here was measured on one.

    python benchmarks/colab.py        # with libtpu (see `flexolmo plan`); prints a table

A T4 has no plan of its own: its line is the float32 program as compiled for a v5e, beside the T4's
memory and its peak in float32.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import jupytext
import yaml

QUICKSTART = Path(__file__).parent.parent / "notebooks" / "quickstart.py"
GIB = 2**30
REACHED = 0.3  # of the peak, assumed
# accelerator of the notebook, slice to compile for, memory (GiB) and peak (FLOP/s) where they are
# not the slice's
DEVICES = {
    "v5e-1": ("tpu", "v5e:1x1", None, 197e12),
    "v6e-1": ("tpu", "v6e:1x1", None, 918e12),
    "T4": ("cuda", "v5e:1x1", 15.0, 8.1e12),
}


def main() -> None:
    how = argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser(description=__doc__, formatter_class=how).parse_args()
    print("| device | memory, GiB | of | FLOPs a step | steps | minutes |\n" + "|---" * 6 + "|")
    for device, (accelerator, topology, memory, peak) in DEVICES.items():
        config = expert(accelerator)
        report, steps = plan(config, topology), config["train"]["steps"]
        held, limit = report["peak_bytes"] / GIB, memory or report["hbm_bytes"] / GIB
        minutes = report["model_flops"] * steps / (peak * REACHED) / 60
        figures = f"{report['model_flops']:.2e} | {steps} | {minutes:.1f}"
        print(f"| {device} | {held:.1f} | {limit:.1f} | {figures} |", flush=True)


def expert(accelerator: str) -> dict:
    """The config of an owner's run, with the sizes of the notebook."""
    cells = [cell.source for cell in jupytext.read(QUICKSTART).cells]
    names: dict = {"accelerator": accelerator}
    sizes = next(cell for cell in cells if "SIZES = {" in cell)
    exec(sizes.replace("print(", "str("), names)
    size = names["size"]
    return {
        "run": "pair",
        "model": {"preset": size["OPEN"]},
        "data": {
            "train": [{"path": "private"}],
            "batch_size": size["BATCH"],
            "seq_len": size["SEQ"],
        },
        "train": {"steps": size["EXPERT_STEPS"], "compute_dtype": size["COMPUTE"]},
        "optim": {"lr": size["EXPERT_LR"], "router_lr": size["ROUTER_LR"]},
        "pair": {"anchor": "anchor", "name": "private", "contrast": 1.0},
    }


def plan(config: dict, topology: str) -> dict:
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump(config, file)
        file.flush()
        command = [sys.executable, "-m", "flexolmo_jax.cli", "plan", file.name, "--json"]
        done = subprocess.run(
            [*command, "--topology", topology], capture_output=True, text=True, check=False
        )
    if not done.stdout:
        sys.exit(done.stderr)
    return json.loads(done.stdout)


if __name__ == "__main__":
    main()
