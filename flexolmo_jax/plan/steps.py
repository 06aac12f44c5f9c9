"""The programs that are planned, a training step and a decoding step, with shapes as arguments.

The shapes have shardings, so that a program can be compiled for devices that do not exist here.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from flexolmo_jax.artifact import open_artifact
from flexolmo_jax.config import (
    MeshConfig,
    ModelConfig,
    RunConfig,
    build,
    check_microbatch,
    load_config,
    override,
    to_dict,
)
from flexolmo_jax.coordinator.router import is_trained as is_trained_in_a_router_run
from flexolmo_jax.errors import UserError
from flexolmo_jax.kernels import Kernels
from flexolmo_jax.model.decoding import GREEDY, Decoding, Sizes, Weights
from flexolmo_jax.model.tree import flatten, partition
from flexolmo_jax.owner.pair import is_trained as is_trained_in_a_pair
from flexolmo_jax.owner.pair import model_of_pair
from flexolmo_jax.runtime import sharding
from flexolmo_jax.storage.paths import path_of
from flexolmo_jax.train.optimizer import make_optimizer
from flexolmo_jax.train.state import abstract_params, abstract_state
from flexolmo_jax.train.step import make_step

RELEASED = "bfloat16"  # what a published anchor and a merged model are stored in
# Nothing is gathered: every device reads its own part of every weight.
DECODING_MESH = MeshConfig(data=1, fsdp=1, tensor=-1, expert=1)
LAYERS = ("trunk/layers/", "experts/", "expert/")  # where the paths of layers' parameters start
IS_TRAINED: dict[str, Callable[[str], bool]] = {
    "pair": is_trained_in_a_pair,
    "router": is_trained_in_a_router_run,
}


class Step(NamedTuple):
    """A jitted function and the arguments that it is compiled for."""

    function: Any
    arguments: tuple[Any, ...]
    kinds: dict[str, Any]  # parameters, frozen, optimizer, cache, batch -> its ShapeDtypeStructs


def architecture(run: RunConfig) -> ModelConfig:
    """The model that a run trains.

    For a pair or a router run it is that of the anchor or model at the run's path; where there is
    none yet, the config's `model`. Raises UserError if that is not given either.
    """
    start = run.pair.anchor if run.pair else run.router.model if run.router else run.train.init
    if start and path_of(start).exists():
        model = open_artifact(start).config
        return model_of_pair(run, model) if run.pair else model
    if run.model.vocab_size == 0:
        where = f"{start} does not exist and " if start else ""
        is_said = run.model != ModelConfig()  # but for the tokenizer's, which is not read
        missing = "model.vocab_size=8192" if is_said else "model.preset=7b, or the keys of `model`"
        raise UserError(
            f"{where}model.vocab_size is not given; a plan needs the architecture: --set {missing}"
        )
    if run.run == "router" and run.model.n_experts == 1:
        raise UserError(
            f"{start} does not exist, and model.n_experts is 1; say how many experts are merged:"
            " --set model.n_experts=7"
        )
    return run.model


class Decoded(NamedTuple):
    """What generates."""

    model: ModelConfig
    vocab_size: int  # the tokenizer's, where there is one and it is smaller
    mesh: MeshConfig


def decoded(path: Path, overrides: Sequence[str] = ()) -> Decoded:
    """A config or a model that is to generate, and the mesh for it.

    The mesh is DECODING_MESH with `overrides`; a config's own mesh is for training.
    """
    meshes = [override for override in overrides if override.startswith("mesh.")]
    others = [override for override in overrides if override not in meshes]
    mesh = build(MeshConfig, override({"mesh": to_dict(DECODING_MESH)}, meshes)["mesh"], "mesh")
    mesh.check()
    if path.is_dir():
        if others:
            raise UserError(
                f"--set got {others[0]!r}, but {path} is a model, whose architecture is fixed; only"
                " mesh.* may be set"
            )
        artifact = open_artifact(path)
        config = artifact.config
        vocab_size = min(artifact.tokenizer.vocab_size, config.vocab_size)
        return Decoded(config, vocab_size, mesh)
    model = architecture(load_config(path, others))
    return Decoded(model, model.vocab_size, mesh)


def training_step(
    run: RunConfig, model: ModelConfig, mesh: Mesh, is_trained: Callable[[str], bool] | None = None
) -> Step:
    """The step that `flexolmo train` runs: trained parameters in float32, frozen ones in RELEASED.

    `is_trained`: by path, where it is not the run's own.
    """
    check_microbatch(run, mesh.shape)
    is_trained = is_trained or IS_TRAINED.get(run.run, lambda _: True)
    params = abstract_params(
        model,
        mesh,
        pair=run.pair is not None,
        dtype=lambda path: "float32" if is_trained(path) else RELEASED,
    )
    trained, frozen = partition(params, is_trained)
    optimizer = make_optimizer(run.optim, run.train.steps, run.train.skip_spikes)
    state = abstract_state(optimizer, trained, mesh)
    B, T = run.data.batch_size, run.data.seq_len
    records = {
        "tokens": ((B, T), "int32"),
        "segments": ((B, T), "int32"),
        "targets": ((B, T), "bool"),
    }
    if run.pair and run.pair.is_contrasted:
        records |= {"expert": ((B,), "int32"), "expert_weight": ((B,), "float32")}
    placed = sharding.batch_sharding(mesh)
    batch = {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=placed)
        for name, (shape, dtype) in records.items()
    }
    number = jax.ShapeDtypeStruct((), "int32", sharding=sharding.replicated(mesh))
    kinds = {"parameters": trained, "frozen": frozen, "optimizer": state.optimizer, "batch": batch}
    return Step(make_step(model, run, optimizer, mesh), (state, frozen, batch, number), kinds)


def fsdp_minimum(step: Step, dtype: str, *, of_layers: bool = False) -> int:
    """Bytes that each device has to receive for one microbatch, whatever the compiler does.

    Every sharded weight is gathered for the forward pass and again for the backward pass (the
    embedding for the forward pass only). Gradients of trained weights are reduced and scattered
    once. All of it has the dtype of activations. `of_layers`: of the layers alone; what lies
    outside of them may be gathered once for all microbatches.
    """
    total, trees = (
        0,
        [(flatten(step.kinds[kind]), n) for kind, n in (("parameters", 1), ("frozen", 0))],
    )
    has_head = any("trunk/head/kernel" in tree for tree, _ in trees)
    for tree, gradients in trees:
        for path, a in tree.items():
            own = math.prod(a.sharding.shard_shape(a.shape))
            if of_layers and not path.startswith(LAYERS):
                continue
            of_others = own * (sharding.devices_gathered(a.sharding) - 1)
            gathers = 1 if path == "trunk/embedding" and has_head else 2
            total += of_others * (gathers + gradients)
    return total * jnp.dtype(dtype).itemsize


class Generation(NamedTuple):
    """The programs that `flexolmo generate` runs, for weights in RELEASED."""

    decoding: Decoding
    weights: Weights
    sizes: Sizes

    def step(self) -> Step:
        """The loop: each pass chooses a token for every prompt."""
        function, arguments = self.decoding.run(self.weights, self.sizes)
        params, state, request, _ = arguments
        small = state._replace(cache=None), request
        return Step(function, arguments, {"frozen": params, "cache": state.cache, "batch": small})

    def prefill(self, loop: Any) -> Step:
        """What reads the prompts; `loop` is the compiled step."""
        function, arguments = self.decoding.prefill(self.weights, self.sizes, loop)
        return Step(function, arguments, {})


def generation(
    what: Decoded, mesh: Mesh, batch: int, context: int, kernels: Kernels = "auto"
) -> Generation:
    """What generates for `batch` prompts. The cache has `context` slots, half of them for new
    tokens.

    Raises UserError for prompts that do not divide over the mesh.
    """
    sharding.check_batch(mesh, batch)
    model = what.model
    params = abstract_params(model, mesh, pair=False, dtype=lambda _: RELEASED)
    how: dict[str, Any] = {"mesh": mesh, "kernels": kernels}
    decoding = Decoding(model, model.n_active, what.vocab_size, GREEDY, RELEASED, **how)
    new = context // 2
    return Generation(decoding, Weights.of(params), Sizes(batch, context - new, new))
