"""Mixtures that other methods start from: dense models become experts, and are then trained
together.

- Branch-Train-MiX (Sukhbaatar et al., arXiv 2403.07816): FFNs of dense models become experts,
  everything else is their average.
- Unrestricted joint training from an anchor: every expert starts as the anchor's FFN (sparse
  upcycling).
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from flexolmo_jax.artifact import Artifact, open_artifact, write_description
from flexolmo_jax.config import RunConfig, to_dict
from flexolmo_jax.errors import UserError
from flexolmo_jax.model import logical_axes
from flexolmo_jax.model.tree import flatten
from flexolmo_jax.storage import weights
from flexolmo_jax.storage.files import new_directory
from flexolmo_jax.storage.outputs import check_new
from flexolmo_jax.train.flops import step_flops


def assemble(dense: Mapping[str, Path], out: Path, *, active: int, seed: int = 0) -> Artifact:
    """Writes a mixture, in float32, of dense models' FFNs by the names of its experts: to be
    trained on (`train.init` of a joint run).

    Other weights are the models' average, router rows are random. Raises UserError for models that
    are not dense or do not fit together.
    """
    check_new(out)
    artifacts = [open_artifact(path) for path in dense.values()]
    first = artifacts[0]
    for artifact in artifacts:
        if artifact.config.n_experts != 1 or artifact.is_pair:
            raise UserError(
                f"{artifact.path} has experts {', '.join(artifact.experts)}; expected a dense model"
            )
        if artifact.config != first.config or artifact.tokenizer.digest != first.tokenizer.digest:
            raise UserError(
                f"{artifact.path} has another architecture or tokenizer than {first.path}; their"
                " weights do not fit together"
            )
    config = dataclasses.replace(
        first.config, n_experts=len(artifacts), n_active=active, router_bias=False
    )
    config.check()
    opened = {artifact.path: artifact.arrays() for artifact in artifacts}
    each = [
        {path: np.asarray(a[...], np.float32) for path, a in opened[artifact.path].items()}
        for artifact in artifacts
    ]
    rows = (
        np.random.default_rng(seed)
        .normal(0, config.init_std, (config.n_layers, len(each), config.d_model))
        .astype(np.float32)
    )
    params = {
        path: (
            np.concatenate([a[path] for a in each], 1)
            if path.startswith("experts/")
            else _mean([a[path] for a in each])
        )
        for path in each[0]
    }
    params["experts/row"] = rows
    with new_directory(out) as directory:
        first.tokenizer.save(directory / "tokenizer.json")
        digests = weights.save(directory / "weights", params, flatten(logical_axes(config)))
        tensors = {
            path: {"dtype": "float32", "shape": list(a.shape), "sha256": digests[path]}
            for path, a in params.items()
        }
        description = {
            "kind": "model",
            "model": to_dict(config),
            "experts": list(dense),
            "members": [],
            "fingerprint": None,
        }
        write_description(
            directory, description | {"tensors": tensors, "tokenizer": first.tokenizer.digest}
        )
    return open_artifact(out)


def steps_of_flops(flops: float, run: RunConfig) -> int:
    """How many steps of a run come nearest to so many floating-point operations, at least one."""
    return max(1, round(flops / step_flops(run, run.model).model))


def _mean(arrays: list[np.ndarray]) -> np.ndarray:
    """Of equal ones exactly that one."""
    if all(np.array_equal(arrays[0], a) for a in arrays[1:]):
        return arrays[0]
    return np.asarray(np.mean(arrays, axis=0, dtype=np.float64), np.float32)
