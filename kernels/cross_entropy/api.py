"""Cross entropy over a large vocabulary, in float32.

z_n = logsumexp(x_n W)      loss_n = z_n - x_n W[:, target_n]
"""

from typing import Literal

from jaxtyping import Array, Float, Int

from . import chunks, reference

Implementation = Literal["reference", "chunks"]


def cross_entropy(
    x: Float[Array, "N D"],
    head: Float[Array, "D V"],
    targets: Int[Array, "N"],
    *,
    implementation: Implementation = "chunks",
) -> tuple[Float[Array, "N"], Float[Array, "N"]]:
    """(losses in nats, logsumexps) of each token; the gradients have the dtypes of `x` and `head`.

    By default "chunks", which makes the logits of some tokens at a time, and keeps them for the
    gradient where they are few (`chunks.LARGEST` numbers). It is plain XLA, on every platform. A
    chunk takes every n-th token, so that it holds an even share of tokens that are spread over
    devices. But the gradient of `head` is then summed over devices once a chunk, unless this is
    called inside `jax.shard_map` over the devices that share the tokens.
    """
    functions = {"reference": reference.cross_entropy, "chunks": chunks.cross_entropy}
    return functions[implementation](x, head, targets)
