"""The part of a config that decides the compiled training step."""

from typing import Any

from flexolmo_jax.config import RunConfig, to_dict
from flexolmo_jax.kernels import Kernels


def program_of(run: RunConfig) -> dict[str, Any]:
    """What a run's program depends on: two configs that agree here have the same plan.

    A pair's and a router run's architecture is not in it, as it comes from their anchor or model.
    """
    pair = run.pair and {
        "contrast": run.pair.is_contrasted,
        "router_noise": run.pair.router_noise > 0,
    }
    train = {key: getattr(run.train, key) for key in ("accumulate", "compute_dtype", "remat")}
    if run.train.skip_spikes:  # plans of earlier versions do not name it
        train["skip_spikes"] = True
    return {
        "run": run.run,
        "model": to_dict(run.model),
        "data": {"batch_size": run.data.batch_size, "seq_len": run.data.seq_len},
        "train": train,
        "pair": pair,
        "mesh": to_dict(run.mesh),
        **named(run.kernels),
    }


def named(kernels: Kernels) -> dict[str, str]:
    """Kernels that are asked for by name. Those of the platform are not named: plans of earlier
    versions have none."""
    return {} if kernels == "auto" else {"kernels": kernels}
