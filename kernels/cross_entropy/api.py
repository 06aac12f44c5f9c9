"""Cross entropy of a large vocabulary: `z_n = logsumexp(x_n W)`, `loss_n = z_n - x_n W[:,
target_n]`, in float32."""

from typing import Literal

from jaxtyping import Array, Float, Int

from . import chunks, reference

Implementation = Literal["reference", "chunks"]


def cross_entropy(
    x: Float[Array, "N D"],
    head: Float[Array, "D V"],
    targets: Int[Array, "N"],
    *,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "N"], Float[Array, "N"]]:
    """(losses in nats, logsumexps) of each row of `x`; the gradients of `x` and `head` have their
    dtypes.

    By default "reference", which keeps the logits for the gradient, where they are small
    (`chunks.LARGEST` numbers), else "chunks", which makes those of some rows at a time, once
    forward and once backward. Both are plain XLA, on every platform. Chunks take every n-th row, so
    that each holds an even share of rows that are spread over devices; but the gradient of `head`
    is then summed over devices once a chunk, unless this is called inside `jax.shard_map` over the
    devices that share the rows.
    """
    if implementation is None:
        implementation = "reference" if x.shape[0] * head.shape[1] <= chunks.LARGEST else "chunks"
    return {"reference": reference.cross_entropy, "chunks": chunks.cross_entropy}[implementation](
        x, head, targets
    )
