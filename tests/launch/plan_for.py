"""A plan of the form that `flexolmo plan --json` prints, for a job, made up: what preflight finds
instead of compiling.

python tests/launch/plan_for.py JOB.yaml [--too-big | --fallback] > plans/any.json
"""

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from flexolmo_jax.config import load_config
from flexolmo_jax.plan.program import program_of
from launch.job import ROOT, Job, choices, load_job


def plan_for(job: Job, fits: bool = True) -> dict[str, Any]:
    used, advice = (40, {}) if fits else (112, {"change": "--set train.remat=full"})
    return {
        "topology": job.slice.name,
        "slices": job.slices,
        "program": program_of(load_config(ROOT / job.config, job.set)),
        "fits": fits,
        "hbm_bytes": 95 * 2**30,
        "peak_bytes": used * 2**30,
    } | advice


if __name__ == "__main__":
    job = choices(load_job(Path(sys.argv[1])))["--fallback" in sys.argv]
    print(json.dumps(plan_for(job, "--too-big" not in sys.argv)))
