"""Mixtures that other methods start from: dense models become experts, then train together.

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
from flexolmo_jax.storage.paths import takes_paths
from flexolmo_jax.train.flops import step_flops


@takes_paths
def assemble(dense: Mapping[str, Path], out: Path, *, active: int, seed: int = 0) -> Artifact:
    """Writes a mixture of dense models' FFNs, in float32, for a joint run's `train.init`.

    dense: a model for each expert, by the expert's name. Weights outside the FFNs are the models'
    average, router rows are random. Raises UserError for models that are not dense or do not fit
    together.
    """
    check_new(out)
    artifacts = [open_artifact(path) for path in dense.values()]
    _check_fit(artifacts)
    first, E = artifacts[0], len(artifacts)
    config = dataclasses.replace(first.config, n_experts=E, n_active=active, router_bias=False)
    config.check()
    params = _mixture(artifacts)
    random = np.random.default_rng(seed)
    rows = random.normal(0, config.init_std, (config.n_layers, E, config.d_model))
    params["experts/row"] = rows.astype(np.float32)
    with new_directory(out) as directory:
        first.tokenizer.save(directory)
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
            "tensors": tensors,
            **first.tokenizer.digests,
        }
        write_description(directory, description)
    return open_artifact(out)


def steps_of_flops(flops: float, run: RunConfig) -> int:
    """How many steps of a run come nearest to this many floating-point operations, at least one."""
    return max(1, round(flops / step_flops(run, run.model).model))


def _check_fit(artifacts: list[Artifact]) -> None:
    first = artifacts[0]
    for artifact in artifacts:
        if artifact.config.n_experts != 1 or artifact.is_pair:
            raise UserError(
                f"{artifact.path} has experts {', '.join(artifact.experts)}; expected a dense model"
            )
        same_text = artifact.tokenizer.text_digest == first.tokenizer.text_digest
        if artifact.config != first.config or not same_text:
            raise UserError(
                f"{artifact.path} has another architecture or tokenizer than {first.path}; their"
                " weights do not fit together"
            )


def _mixture(artifacts: list[Artifact]) -> dict[str, np.ndarray]:
    """By path: FFNs side by side, the mean of everything else."""
    # a model that stands for several experts is opened once
    opened = {artifact.path: artifact.arrays() for artifact in artifacts}
    each = [
        {path: np.asarray(a[...], np.float32) for path, a in opened[artifact.path].items()}
        for artifact in artifacts
    ]
    params = {}
    for path in each[0]:
        arrays = [params_of_one[path] for params_of_one in each]
        is_expert = path.startswith("experts/")
        params[path] = np.concatenate(arrays, 1) if is_expert else _mean(arrays)
    return params


def _mean(arrays: list[np.ndarray]) -> np.ndarray:
    """Of equal arrays exactly that array."""
    if all(np.array_equal(arrays[0], a) for a in arrays[1:]):
        return arrays[0]
    return np.asarray(np.mean(arrays, axis=0, dtype=np.float64), np.float32)
