"""The experts of a model and the mixture they form.

`Experts` holds the FFNs of `E` experts with their router rows and biases. A dense model has one of
it, with one expert; a merged model one with E. A pair has two, each with one expert: the anchor's
is frozen and the new one is trained, and in separate trees frozen means no gradient and no
optimiser state.

    logits = rows . h + min(bias, 0)              [N, E]   float32; the anchor's expert has no bias
    p      = softmax(logits) over all experts     [N, E]
    y      = sum over the top k of p_e * FFN_e(h) [N, D]

Source: FlexOlmo, arXiv 2507.07024, section 3.
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from flexolmo_jax.config import ModelConfig, Remat
from flexolmo_jax.kernels import Kernels, names
from flexolmo_jax.kernels.expert_ffn import swiglu
from flexolmo_jax.kernels.route import (
    Routing,
    dense_probabilities,
    route_topk,
    router_probabilities,
)
from flexolmo_jax.runtime import sharding

from .dispatch import run_chosen


@dataclass(frozen=True)
class Choices:
    """What is chosen when a model runs, and not when it is made."""

    active: int  # experts that a token uses
    allowed: Bool[Array, "E"]  # experts that tokens may use
    # Added to the routers' logits, and only where they mix the experts' outputs: what is reported
    # is without it. For training with every expert active. A layer gets its own part.
    noise: Float[Array, "*L B T E"] | None = None
    dtype: DTypeLike = jnp.float32  # of activations
    remat: Remat = "none"  # what the backward pass keeps, see `rematerialisation`
    mesh: Mesh | None = None  # that parameters and batch are spread over
    kernels: Kernels = "auto"  # that route tokens, see `kernels.choice`


class RouterOutput(NamedTuple):
    """What the routers did with each token."""

    probabilities: Float[Array, "*L B T E"]  # of each expert; 0 where it was not chosen
    log_z: Float[Array, "*L B T"]  # logsumexp of the logits, for the z-loss
    entropy: Float[Array, "*L B T"]  # of all probabilities, in nats; no gradient


class Experts(nnx.Module):
    """FFNs, router rows and (where experts have one) biases of `num_experts` experts of a layer."""

    def __init__(self, config: ModelConfig, num_experts: int, has_bias: bool, rngs: nnx.Rngs):
        E, D, F = num_experts, config.d_model, config.d_ffn

        def normal(*shape: int) -> Array:
            return config.init_std * jax.random.normal(rngs.params(), shape)

        self.gate = nnx.Param(normal(E, D, F), axes=("expert", "embed", "ffn"))
        self.up = nnx.Param(normal(E, D, F), axes=("expert", "embed", "ffn"))
        self.down = nnx.Param(normal(E, F, D), axes=("expert", "ffn", "embed"))
        self.row = nnx.Param(normal(E, D), axes=("expert", None))
        self.bias = nnx.Param(jnp.full(E, config.init_bias), axes=("expert",)) if has_bias else None

    def __call__(
        self,
        x: Float[Array, "N D"],
        probabilities: Float[Array, "N E"],
        mesh: Mesh | None = None,
        layer: Int[Array, ""] | int | None = None,
    ) -> Float[Array, "N D"]:
        """`sum over e of probabilities[n, e] * FFN_e(x_n)`: every expert runs on every token.

        With `layer` the matrices are those of all layers, `[L, E, ...]`.
        """
        matrices = [m if layer is None else m[layer] for m in self._matrices()]
        spread = sharding.over_experts(self._mesh(mesh), _every_expert)

        def run(tokens: tuple, *matrices: Array) -> Array:
            # Cast before they are gathered over the mesh, not after: half the bytes.
            return spread((tokens, None), *(m.astype(x.dtype) for m in matrices))

        # Saved for the backward pass: what comes in, and the products. Otherwise slices of the
        # matrices are saved for every layer, which is a copy of the model.
        saved = jax.checkpoint_policies.dots_saveable
        run = jax.checkpoint(run, policy=saved, prevent_cse=False)
        return run((x, probabilities), *matrices)

    def sparse(
        self,
        x: Float[Array, "N D"],
        routing: Routing,
        choices: Choices,
        layer: Int[Array, ""] | int | None = None,
    ) -> Float[Array, "N D"]:
        """The same where each token runs only the experts that it chose. No token is dropped.

        With `layer` the matrices are those of all layers, and what no token chose is never read.
        """
        chosen = functools.partial(run_chosen, choices.kernels)
        spread = sharding.over_experts(self._mesh(choices.mesh), chosen)
        matrices = (m.astype(x.dtype) for m in self._matrices())
        return checkpoint_name(spread(((x, routing), layer), *matrices), names.OUTPUTS)

    def _matrices(self) -> list[Array]:
        return [m[...] for m in (self.gate, self.up, self.down)]

    def _mesh(self, mesh: Mesh | None) -> Mesh | None:
        """Several experts are spread over the mesh's devices. A single one is left to the compiler:
        plain products, which it spreads well."""
        return mesh if self.row.shape[0] > 1 else None

    @staticmethod
    def is_matrix(path: tuple, _) -> bool:
        """Whether a path leads to a parameter of the FFNs: an nnx filter."""
        return path[-1] in ("gate", "up", "down")


def mixture(
    h: Float[Array, "B T D"],
    groups: tuple[Experts, ...],
    choices: Choices,
    layer: Int[Array, ""] | int | None = None,
    renormalise: bool = False,
) -> tuple[Float[Array, "B T D"], RouterOutput]:
    """The mixture of all experts of all groups, in order. The first is the anchor's.

    With `layer` the groups' matrices are those of all layers, `[L, E, ...]`. `renormalise`: the
    weights of the active experts add up to 1.
    """
    B, T, D = h.shape
    x = h.reshape(B * T, D)
    logits = router_logits(x, groups)
    E = logits.shape[1]
    # A pair's groups lie in two trees: it runs both, whatever is active.
    mix = sparse_mixture if choices.active < E and len(groups) == 1 else dense_mixture
    y, probabilities, log_z = mix(x, logits, groups, choices, layer, renormalise)
    router = RouterOutput(
        probabilities=probabilities.reshape(B, T, E),
        log_z=log_z.reshape(B, T),
        entropy=_entropy(logits, log_z, choices.allowed).reshape(B, T),
    )
    return y.reshape(B, T, D), router


# y, probabilities, log_z
Mixed = tuple[Float[Array, "N D"], Float[Array, "N E"], Float[Array, "N"]]


def router_logits(x: Float[Array, "N D"], groups: tuple[Experts, ...]) -> Float[Array, "N E"]:
    """Of every expert of every group, in float32 whatever the compute dtype: it must not decide
    where a token goes. The precision is asked for, because by default TPUs multiply float32 as
    bfloat16 and GPUs as TF32.
    """
    rows = jnp.concatenate([group.row[...] for group in groups]).astype(jnp.float32)
    return jnp.matmul(x.astype(jnp.float32), rows.T, precision="highest") + _bias(groups)


def route(logits: Float[Array, "N E"], choices: Choices, renormalise: bool) -> Routing:
    """The `active` experts of each token, of which each device routes its own."""

    def of_shard(logits: Array, allowed: Array) -> tuple[Array, ...]:
        return tuple(route_topk(logits, choices.active, allowed, kernels=choices.kernels))

    by_token = ("batch", None)
    out = (by_token, by_token, ("batch",))
    run = sharding.on_each_shard(choices.mesh, of_shard, (by_token, (None,)), out)
    routing = Routing(*run(logits, choices.allowed))
    if not renormalise:
        return routing
    p = routing.probabilities
    return routing._replace(probabilities=p / jnp.sum(p, axis=-1, keepdims=True))


def sparse_mixture(
    x: Float[Array, "N D"],
    logits: Float[Array, "N E"],
    groups: tuple[Experts, ...],
    choices: Choices,
    layer: Int[Array, ""] | int | None,
    renormalise: bool,
) -> Mixed:
    """Route, dispatch, combine: each token runs only its `active` experts. For a single group."""
    (experts,) = groups
    routing = route(logits, choices, renormalise)  # ids and probabilities [N, A]
    probabilities = dense_probabilities(routing, logits.shape[1])
    y = experts.sparse(x, routing, choices, layer)
    return y, probabilities, routing.log_z


def dense_mixture(
    x: Float[Array, "N D"],
    logits: Float[Array, "N E"],
    groups: tuple[Experts, ...],
    choices: Choices,
    layer: Int[Array, ""] | int | None,
    renormalise: bool,
) -> Mixed:
    """Every expert runs on every token; what a token did not choose has probability 0."""
    E = logits.shape[1]
    if choices.active < E:
        routing = route(logits, choices, renormalise)
        probabilities, log_z = dense_probabilities(routing, E), routing.log_z
    else:  # nothing to choose, and sorting is not free
        probabilities, log_z = router_probabilities(logits, choices.allowed)
    used = probabilities
    if choices.noise is not None:
        noisy = logits + choices.noise.reshape(logits.shape)
        used = router_probabilities(noisy, choices.allowed)[0]
    # Summed in float32, rounded once.
    y, first = jnp.zeros(x.shape, jnp.float32), 0
    for experts in groups:
        count = experts.row.shape[0]
        y += experts(x, used[:, first : first + count], choices.mesh, layer)
        first += count
    return y.astype(x.dtype), probabilities, log_z


def _bias(groups: tuple[Experts, ...]) -> Float[Array, "E"]:
    """min(b, 0) of every expert; 0 where there is none and for the anchor, whatever its value."""
    biases = [
        jnp.zeros(group.row.shape[0])
        if group.bias is None
        else jnp.minimum(group.bias[...].astype(jnp.float32), 0)
        for group in groups
    ]
    bias = jnp.concatenate(biases)
    # Not `.at[0].set(0)`: its gradient is wrong on jax 0.10 where several of the experts lie on
    # each device.
    return jnp.where(jnp.arange(len(bias)) == 0, 0, bias)


def _entropy(
    logits: Float[Array, "N E"], log_z: Float[Array, "N"], allowed: Bool[Array, "E"]
) -> Float[Array, "N"]:
    """`-sum p ln p = log_z - sum p * logit` over the allowed experts."""
    logits, log_z = jax.lax.stop_gradient((logits, log_z))
    p = jnp.exp(logits - log_z[:, None])
    return log_z - jnp.sum(jnp.where(allowed, p * logits, 0), axis=-1)


def _every_expert(
    axis: sharding.ExpertAxis,
    inputs: tuple[tuple[Float[Array, "N D"], Float[Array, "N E"]], None],
    gate: Array,
    up: Array,
    down: Array,
) -> Float[Array, "N D"]:
    """What all experts give for a device's tokens. The devices gather each other's tokens, run
    their own experts on all of them, and scatter the sums.

    A loop over experts, not one batched product: canonical matmuls reach the hardware's peak,
    `td,edf->etf` does not.
    """
    x, probabilities = axis.gather(inputs[0])
    count = gate.shape[0]
    # Padded, as the last device may hold empty experts behind the last one.
    padded = jnp.pad(probabilities, ((0, 0), (0, count)))
    own = jax.lax.dynamic_slice_in_dim(padded, axis.first(count), count, axis=1)
    y = jnp.zeros(x.shape, jnp.float32)  # rounded once
    for i in range(count):
        p = own[:, i, None]
        # `where`, never a product with 0: NaN in an excluded expert must not leak. Its row and
        # bias are masked in `kernels/route`; the sparse mixture never reads it.
        out = swiglu(x, gate[i], up[i], down[i])
        y += jnp.where(p > 0, out.astype(jnp.float32) * p, 0)
    return axis.scatter(y.astype(x.dtype))
