"""Cross entropy in chunks of tokens: at most `LARGEST` logits exist at once, forward or backward.

    forward    z = logsumexp(X W);  loss = z - (X W)[target]
    backward   G = exp(X W - z) (dloss + dz) - onehot(target) dloss
               dX = G W^T;  dW += X^T G

Saved are X, W, targets and z. The backward pass computes the logits again: to keep them for a batch
of 7B's would take gigabytes. Where one chunk has all tokens, its logits are kept.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# 256 MiB of float32. At V = 100k that is 512 tokens, enough for a matrix unit to be busy while W is
# read.
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
        logits = _product("nd,dv->nv", x, head)
        log_z = jax.nn.logsumexp(logits, axis=-1)
        of_target = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
        return None, (log_z - of_target, log_z, logits if n == 1 else None)

    _, (*chunks, logits) = jax.lax.scan(chunk, None, (_split(x, n), _split(targets, n)))
    losses, log_z = (_joined(a, N) for a in chunks)
    return (losses, log_z), (x, head, targets, log_z, logits)


def _backward(saved, cotangents):
    x, head, targets, log_z, all_logits = saved
    N, n = x.shape[0], _count(x, head)

    def chunk(d_head, xs):
        x, targets, log_z, d_loss, d_log_z, logits = xs
        logits = _product("nd,dv->nv", x, head) if logits is None else logits
        hit = targets[:, None] == jnp.arange(logits.shape[-1])
        p = jnp.exp(logits - log_z[:, None])
        d_logits = p * (d_loss + d_log_z)[:, None] - jnp.where(hit, d_loss[:, None], 0)
        d_logits = d_logits.astype(x.dtype)  # a matrix unit multiplies numbers of one dtype
        # Turned here: XLA's product on a CPU takes twice as long if it has to turn x itself.
        turned = jax.lax.optimization_barrier(x.T)
        # Summed over chunks in float32: a sum in bfloat16 soon is too large to change.
        d_head += _product("dn,nv->dv", turned, d_logits)
        d_x = _product("nv,dv->nd", d_logits, head)
        return d_head, d_x.astype(x.dtype)

    of_tokens = tuple(_split(a, n) for a in (x, targets, log_z, *cotangents))
    start = jnp.zeros(head.shape, jnp.float32)
    d_head, d_x = jax.lax.scan(chunk, start, (*of_tokens, all_logits))
    return _joined(d_x, N), d_head.astype(head.dtype), None


cross_entropy.defvjp(_forward, _backward)


def _product(letters: str, a: Array, b: Array) -> Array:
    return jnp.einsum(letters, a, b, preferred_element_type=jnp.float32)


def _count(x: Array, head: Array) -> int:
    """The number of chunks."""
    return -(-x.shape[0] // max(1, LARGEST // head.shape[1]))


def _split(tokens: Float[Array, "N *D"], n: int) -> Float[Array, "n chunk *D"]:
    """Chunk i holds tokens i, i + n, ...; the last chunks are padded with 0, whose gradients
    are 0."""
    tokens = jnp.pad(tokens, ((0, -tokens.shape[0] % n), *((0, 0),) * (tokens.ndim - 1)))
    return jnp.moveaxis(tokens.reshape(-1, n, *tokens.shape[1:]), 1, 0)


def _joined(chunks: Float[Array, "n chunk *D"], N: int) -> Float[Array, "N *D"]:
    return jnp.moveaxis(chunks, 0, 1).reshape(-1, *chunks.shape[2:])[:N]
