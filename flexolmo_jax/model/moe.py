"""The experts of a model and the mixture they form.

`Experts` holds the FFNs of `E` experts with their router rows and biases. A dense model has one of
it with one expert; a merged model one with E; a pair has two, each with one expert, because the
anchor's is frozen and the new one is trained: separate trees, so that frozen means no gradient and
no optimiser state.

The mixture: `y = sum over the top k of p_e * FFN_e(h)`, `p = softmax(rows . h + min(bias, 0))`;
expert 0 is the anchor's and has no bias.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from flexolmo_jax.config import ModelConfig
from flexolmo_jax.kernels.expert_ffn import swiglu
from flexolmo_jax.kernels.moe_ffn import sparse_experts
from flexolmo_jax.kernels.route import Routing, dense_weights, route_topk, router_probabilities
from flexolmo_jax.runtime import sharding


class RouterOutput(NamedTuple):
    """What the routers did with each token: the weight of each expert (0 where not chosen), the
    logsumexp of the logits (for the z-loss) and the entropy of the probabilities in nats (no
    gradient)."""

    weights: Float[Array, "*L B T E"]
    log_z: Float[Array, "*L B T"]
    entropy: Float[Array, "*L B T"]


class Experts(nnx.Module):
    """FFNs, router rows and (where experts have one) biases of `num_experts` experts of one
    layer."""

    def __init__(self, config: ModelConfig, num_experts: int, has_bias: bool, rngs: nnx.Rngs):
        E, D, F = num_experts, config.d_model, config.d_ffn

        def normal(*shape: int) -> Array:
            return config.init_std * jax.random.normal(rngs.params(), shape)

        self.gate = nnx.Param(normal(E, D, F), axes=("expert", "embed", "ffn"))
        self.up = nnx.Param(normal(E, D, F), axes=("expert", "embed", "ffn"))
        self.down = nnx.Param(normal(E, F, D), axes=("expert", "ffn", "embed"))
        self.row = nnx.Param(normal(E, D), axes=("expert", None))
        self.bias = nnx.Param(jnp.full(E, config.init_bias), axes=("expert",)) if has_bias else None

    @staticmethod
    def is_matrix(path: tuple, _) -> bool:
        """Whether a path leads to a parameter of the FFNs: an nnx filter."""
        return path[-1] in ("gate", "up", "down")


def mixture(
    h: Float[Array, "B T D"],
    groups: tuple[Experts, ...],
    active: int,
    allowed: Bool[Array, "E"],
    noise: Float[Array, "B T E"] | None = None,
    mesh: Mesh | None = None,
    layer: Int[Array, ""] | None = None,
) -> tuple[Float[Array, "B T D"], RouterOutput]:
    """The mixture of all experts of all groups, in order; the first expert of the first group is
    the anchor's.

    One group with fewer active experts than it holds is dispatched sparsely; everything else runs
    every expert. `noise` on the logits changes the weights that are used, not those that are
    returned; it is for training with every expert active. Over a mesh each device runs its own
    experts of a group. With `layer` the groups' matrices are those of all layers, `[L, E, ...]`.
    """
    B, T, D = h.shape
    x = h.reshape(B * T, D)
    # float32 from the residual stream on: routing decisions must not depend on the compute dtype.
    # The precision is asked for, because by default TPUs multiply float32 as bfloat16 and GPUs as
    # TF32.
    rows = jnp.concatenate([group.row[...] for group in groups]).astype(jnp.float32)
    logits = jnp.matmul(x.astype(jnp.float32), rows.T, precision="highest") + _bias(groups)
    E = rows.shape[0]
    # all of them: nothing to choose, and sorting is not free
    routing = route_topk(logits, active, allowed) if active < E else None
    if routing is None:
        weights, log_z = router_probabilities(logits, allowed)
    else:
        weights, log_z = dense_weights(routing, E), routing.log_z
    if routing is not None and len(groups) == 1:
        y = _run(_sparse_experts, (x, routing), groups[0], mesh, layer)
    else:
        used = (
            weights
            if noise is None
            else router_probabilities(logits + noise.reshape(B * T, E), allowed)[0]
        )
        y, first = jnp.zeros_like(x), 0
        for group in groups:
            own = used[:, first : first + group.row.shape[0]]
            y += _run(_dense_experts, (x, own), group, mesh, layer)
            first += group.row.shape[0]
    router = RouterOutput(
        weights.reshape(B, T, E),
        log_z.reshape(B, T),
        _entropy(logits, log_z, allowed).reshape(B, T),
    )
    return y.reshape(B, T, D), router


def _entropy(
    logits: Float[Array, "N E"], log_z: Float[Array, "N"], allowed: Bool[Array, "E"]
) -> Float[Array, "N"]:
    """`-sum p ln p = log_z - sum p * logit` over the allowed experts."""
    logits, log_z = jax.lax.stop_gradient((logits, log_z))
    return log_z - jnp.sum(
        jnp.where(allowed, jnp.exp(logits - log_z[:, None]) * logits, 0), axis=-1
    )


def _bias(groups: tuple[Experts, ...]) -> Float[Array, "E"]:
    """min(b, 0) of every expert; 0 where there is none and for the anchor, whatever is stored
    there."""
    biases = [
        (
            jnp.zeros(g.row.shape[0])
            if g.bias is None
            else jnp.minimum(g.bias[...].astype(jnp.float32), 0)
        )
        for g in groups
    ]
    bias = jnp.concatenate(biases)
    # Not `.at[0].set(0)`: its gradient is wrong on jax 0.10 where several of the experts lie on
    # each device.
    return jnp.where(jnp.arange(len(bias)) == 0, 0, bias)


def _run(
    path, tokens: tuple, group: Experts, mesh: Mesh | None, layer: Int[Array, ""] | None
) -> Float[Array, "N D"]:
    """One of the paths below with the group's weights, spread over the mesh where there are several
    experts.

    A single expert is left to the compiler: plain products, which it spreads well.
    """
    dtype, weights = tokens[0].dtype, [w[...] for w in (group.gate, group.up, group.down)]
    if path is _dense_experts and layer is not None:
        weights, layer = [w[layer] for w in weights], None
    spread = sharding.over_experts(mesh if group.row.shape[0] > 1 else None, path)

    def run(tokens: tuple, *weights: Array) -> Array:
        # before they are gathered, not after
        return spread((tokens, layer), *(w.astype(dtype) for w in weights))

    if path is _dense_experts:
        # Saved for the backward pass: what comes in and the products. Slices of weights would be
        # saved for every layer, a copy of the model.
        run = jax.checkpoint(run, policy=jax.checkpoint_policies.dots_saveable, prevent_cse=False)
    return run(tokens, *weights)


def _sparse_experts(
    tokens: tuple[tuple[Float[Array, "N D"], Routing], Int[Array, ""] | None],
    gate: Array,
    up: Array,
    down: Array,
    first: Array | int,
) -> Float[Array, "N D"]:
    """What experts `first`, `first` + 1, ... add to the tokens that chose them.

    With a layer, the weights are those of all layers: experts nobody chose are never read, those of
    the other layers among them.
    """
    (x, routing), layer = tokens
    count = gate.shape[-3]
    local = routing.ids - first
    mine = (local >= 0) & (local < count)
    if layer is not None:
        gate, up, down = (w.reshape(-1, *w.shape[-2:]) for w in (gate, up, down))
        local += layer * count
    # A slot of weight 0 gets no row: slots of other devices' experts cost nothing here.
    routing = routing._replace(
        weights=jnp.where(mine, routing.weights, 0), ids=jnp.where(mine, local, 0)
    )
    return sparse_experts(x, routing, gate, up, down)


def _dense_experts(
    tokens: tuple[tuple[Float[Array, "N D"], Float[Array, "N E"]], None],
    gate: Array,
    up: Array,
    down: Array,
    first: Array | int,
) -> Float[Array, "N D"]:
    """What experts `first`, `first` + 1, ... add to every token.

    A loop over experts, not one batched product: canonical matmuls reach the hardware's peak,
    `td,edf->etf` does not.
    """
    (x, weights), _ = tokens
    count = gate.shape[0]
    weights = jax.lax.dynamic_slice_in_dim(
        jnp.pad(weights, ((0, 0), (0, count))), first, count, axis=1
    )
    y = jnp.zeros_like(x)
    for i in range(count):
        weight = weights[:, i, None]
        # `where`, never a product with 0: NaN in an excluded expert must not leak.
        out = swiglu(x, gate[i], up[i], down[i])
        y += jnp.where(weight > 0, out * weight.astype(x.dtype), 0)
    return y
