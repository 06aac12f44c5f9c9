"""Cross entropy in chunks of rows: no more than `LARGEST` logits exist at once, forward or
backward.

forward    z = logsumexp(X W);  loss = z - (X W)[target]
backward   G = exp(X W - z) (dloss + dz) - onehot(target) dloss
           dX = G W^T;  dW += X^T G

Saved are X, W, targets and z; the backward pass computes the logits once more.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# logits in memory at once: 256 MiB. At V = 100k 512 rows, which reuse W enough to keep matrix units
# busy
LARGEST = 2**26


@jax.custom_vjp
def cross_entropy(
    x: Float[Array, "N D"], head: Float[Array, "D V"], targets: Int[Array, "N"]
) -> tuple[Float[Array, "N"], Float[Array, "N"]]:
    """(losses, logsumexps)."""
    return _forward(x, head, targets)[0]


def _forward(x, head, targets):
    N, n = x.shape[0], _count(x, head)

    def chunk(_, xs):
        x, targets = xs
        logits = jnp.einsum("nd,dv->nv", x, head, preferred_element_type=jnp.float32)
        log_z = jax.nn.logsumexp(logits, axis=-1)
        return None, (log_z - jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0], log_z)

    losses, log_z = (
        _joined(a, N) for a in jax.lax.scan(chunk, None, (_split(x, n), _split(targets, n)))[1]
    )
    return (losses, log_z), (x, head, targets, log_z)


def _backward(saved, cotangents):
    x, head, targets, log_z = saved
    N, n = x.shape[0], _count(x, head)

    def chunk(d_head, xs):
        x, targets, log_z, d_loss, d_log_z = xs
        logits = jnp.einsum("nd,dv->nv", x, head, preferred_element_type=jnp.float32)
        hit = targets[:, None] == jnp.arange(logits.shape[-1])
        d_logits = jnp.exp(logits - log_z[:, None]) * (d_loss + d_log_z)[:, None] - jnp.where(
            hit, d_loss[:, None], 0
        )
        d_logits = d_logits.astype(x.dtype)  # matrix units multiply equals
        # Summed over chunks in float32: in bfloat16 the sum soon swallows what a chunk adds.
        d_head += jnp.einsum("nd,nv->dv", x, d_logits, preferred_element_type=jnp.float32)
        return d_head, jnp.einsum(
            "nv,dv->nd", d_logits, head, preferred_element_type=jnp.float32
        ).astype(x.dtype)

    xs = tuple(_split(a, n) for a in (x, targets, log_z, *cotangents))
    d_head, d_x = jax.lax.scan(chunk, jnp.zeros(head.shape, jnp.float32), xs)
    return _joined(d_x, N), d_head.astype(head.dtype), None


cross_entropy.defvjp(_forward, _backward)


def _count(x: Array, head: Array) -> int:
    """How many chunks."""
    return -(-x.shape[0] // max(1, LARGEST // head.shape[1]))


def _split(rows: Float[Array, "N *D"], n: int) -> Float[Array, "n chunk *D"]:
    """Chunk i holds rows i, i + n, ...; the last ones are filled up with 0, whose gradients are
    0."""
    rows = jnp.pad(rows, ((0, -rows.shape[0] % n), *((0, 0),) * (rows.ndim - 1)))
    return jnp.moveaxis(rows.reshape(-1, n, *rows.shape[1:]), 1, 0)


def _joined(chunks: Float[Array, "n chunk *D"], rows: int) -> Float[Array, "N *D"]:
    return jnp.moveaxis(chunks, 0, 1).reshape(-1, *chunks.shape[2:])[:rows]
