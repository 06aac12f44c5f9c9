"""Names of what a backward pass may keep instead of computing it again.

Arrays get them from `jax.ad_checkpoint.checkpoint_name`; a policy of `jax.checkpoint` says which
are kept. Without such a policy a name changes nothing.
"""

ATTENTION = "attention"  # attention's output and logsumexp
PROJECTIONS = "projections"  # queries, keys and values before their norms; attention's last product
FFN = "ffn"  # an expert's first two products, x gate and x up
OUTPUTS = "outputs"  # what experts give: each of them, or the sum over those that a token chose
# Of loops, not of arrays: rounds of an exchange between experts' devices that even choices do not
# need.
FURTHER_ROUNDS = "further_rounds"
